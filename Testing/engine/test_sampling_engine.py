"""Requests on the real engine with a tiny model: which events come, what they hold, and what the masks depend on."""

from __future__ import annotations

import weakref
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch

from progidiff.errors import InputError, ModelError
from progidiff.proposals.proposals import Gathered
from progidiff.proposals.ranking import rank
from progidiff.proposals.votes import gram_matrix, mean_pairwise_dice
from progidiff.sampling import sampler
from progidiff.volumes.geometry import Geometry
from progidiff.volumes.slicing import plan_slices
from progidiff.wire.messages import DoneEvent, ProgressEvent, ProposeRequest, RankingEvent, SliceEvent, TidiedEvent

Run = Callable[..., Any]


def _same(a: dict[int, np.ndarray], b: dict[int, np.ndarray]) -> bool:
    return a.keys() == b.keys() and all(np.array_equal(a[index], b[index]) for index in a)


def test_events_are_complete_and_in_order(engine: Any, run_engine: Run) -> None:
    result = run_engine(engine, "liver", "left kidney", proposals=5, batch_size=3, slices=(1, 4))
    for target in ("liver", "left kidney"):
        masks = result.masks(target)
        assert list(masks) == [1, 2, 3]
        assert all(m.shape == (5, 30, 34) for m in masks.values())
        filled = np.concatenate(list(masks.values())).mean((1, 2))
        assert ((filled > 0.05) & (filled < 0.95)).all(), "the model under test must not be trivial"
    kinds = [type(event) for event in result.events if not isinstance(event, ProgressEvent)]
    assert kinds == [SliceEvent] * (len(kinds) - 3) + [RankingEvent] * 2 + [DoneEvent]
    assert result.done.proposals == 5
    assert result.done.model_id == engine.card.model_id
    assert result.done.timing["first_proposal_s"] <= result.done.timing["total_s"]


@pytest.mark.slow
def test_the_last_part_of_a_slice_is_told_from_the_others(engine: Any, run_engine: Run) -> None:
    result = run_engine(engine, "liver", "spleen", proposals=5, batch_size=2)
    for event in result.slices:
        assert event.complete == (event.first_proposal + len(event.masks) == 5)
        assert event.mean_probability is None or event.mean_probability.dtype == np.float32


def test_mean_probability_fits_the_masks(engine: Any, run_engine: Run) -> None:
    (single,) = run_engine(engine, proposals=1, slices=(0, 1)).slices
    assert np.array_equal(single.mean_probability > 0.5, single.masks[0])
    ones = [run_engine(engine, proposals=n, slices=(0, 1)).slices[-1].mean_probability for n in (1, 2)]
    assert not np.array_equal(*ones)
    assert all(p.min() >= 0 and p.max() <= 1 for p in ones)
    assert np.abs(ones[0] / 2 - ones[1]).max() <= 0.5 + 1e-6  # the second probability is in [0, 1]


def test_progress_never_falls_and_ends_at_one(engine: Any, run_engine: Run) -> None:
    result = run_engine(engine, "liver", "spleen", proposals=3, batch_size=4)
    fractions = [event.fraction for event in result.progress]
    assert fractions == sorted(fractions)
    assert fractions[0] == 0
    assert fractions[-1] == 1
    assert result.progress[-1].slices_done == result.progress[-1].slices_total == 4
    assert result.progress[-1].eta_s == 0


@pytest.mark.slow
def test_masks_are_the_same_whatever_the_batch_size(engine: Any, run_engine: Run) -> None:
    results = [run_engine(engine, "liver", "spleen", proposals=6, batch_size=n, slices=(0, 2)) for n in (1, 3, 16)]
    for target in ("liver", "spleen"):
        first = results[0].masks(target)
        assert all(_same(first, other.masks(target)) for other in results[1:])


@pytest.mark.slow
def test_masks_are_the_same_alone_or_together(engine: Any, run_engine: Run) -> None:
    together = run_engine(engine, "liver", "spleen", proposals=3)
    alone = run_engine(engine, "spleen", proposals=3)
    assert _same(together.masks("spleen"), alone.masks("spleen"))
    third = run_engine(engine, "spleen", proposals=3, slices=(2, 3))
    assert np.array_equal(third.masks("spleen")[2], alone.masks("spleen")[2])
    assert not np.array_equal(together.masks("liver")[0], together.masks("spleen")[0])


@pytest.mark.parametrize("scheduler", ["ddim", "dpmsolver++"])
def test_fewer_proposals_are_the_first_ones(engine: Any, run_engine: Run, scheduler: str) -> None:
    few, many = (run_engine(engine, proposals=n, scheduler=scheduler, slices=(0, 2)).masks("liver") for n in (4, 8))
    assert all(np.array_equal(few[index], many[index][:4]) for index in few)
    assert len({mask.tobytes() for mask in many[0]}) == 8, "proposals must differ"


def test_seed_changes_every_proposal_and_repeats_it(engine: Any, run_engine: Run) -> None:
    a, b, again = (run_engine(engine, seed=seed, slices=(0, 1)).masks("liver")[0] for seed in (0, 1, 0))
    assert np.array_equal(a, again)
    assert all((x != y).any() for x, y in zip(a, b, strict=True))


@pytest.mark.slow
@pytest.mark.parametrize("scheduler", ["ddim", "dpmsolver++"])
@pytest.mark.parametrize("steps", [1, 3, 20])
def test_every_number_of_steps_gives_finite_results(engine: Any, run_engine: Run, scheduler: str, steps: int) -> None:
    result = run_engine(engine, proposals=2, scheduler=scheduler, steps=steps, slices=(0, 1))
    assert np.isfinite(result.slices[-1].mean_probability).all()
    assert len(result.masks("liver")[0]) == 2


def test_neighbouring_slices_continue_a_proposal(engine: Any, run_engine: Run) -> None:
    """The masks of one proposal on two neighbouring slices are more alike than those of two proposals."""
    masks = run_engine(engine, proposals=6, slices=(1, 3)).masks("liver")
    agree = np.array([[(a == b).mean() for b in masks[2]] for a in masks[1]])
    assert np.diagonal(agree).mean() > agree[~np.eye(6, dtype=bool)].mean() + 0.05


@pytest.mark.slow
@pytest.mark.parametrize("method", ["soft_dice", "medoid"])
def test_ranking_is_that_of_all_the_masks(engine: Any, run_engine: Run, method: Any) -> None:
    result = run_engine(engine, "liver", "spleen", proposals=5, ranking=method, top_k=2, batch_size=4)
    for target, event in result.rankings.items():
        stack = np.stack(list(result.masks(target).values()), axis=1)
        gram = gram_matrix(stack)
        expected = rank(gram, method)
        assert event.order == list(expected.order)
        assert event.scores == pytest.approx(expected.scores)
        assert event.groups == [list(group) for group in expected.groups]
        assert event.top_k == event.order[:2]
        assert event.random_pick in event.top_k
        assert event.millilitres == pytest.approx([float(m.sum()) * 3.5 * 4.0 * 7.0 / 1000 for m in stack])
        assert event.mean_pairwise_dice == pytest.approx(mean_pairwise_dice(gram))
        assert event.empty == [not m.any() for m in stack]
        assert "5 proposals" in event.stop_reason


@pytest.mark.parametrize("adaptive", [False, True])
def test_a_stack_is_tidied_before_it_is_ranked(engine: Any, run_engine: Run, make_phantom: Run, adaptive: bool) -> None:
    """What remains has the pieces and volumes that the ranking speaks of; the receiver gathers the same."""
    settings = {"proposals": 6, "slices": (0, 3), "steps": 1, "adaptive": adaptive}
    raw = run_engine(engine, "liver", "spleen", **settings)
    assert not raw.of(TidiedEvent)
    result = run_engine(engine, "liver", "spleen", keep_pieces=False, **settings)
    kinds = [(type(event), event.target) for event in result.events if not isinstance(event, ProgressEvent | DoneEvent)]
    kinds = list(dict.fromkeys(kinds))
    assert kinds[2:] == [(kind, target) for target in ("liver", "spleen") for kind in (TidiedEvent, RankingEvent)]
    gathered = Gathered(("liver", "spleen"), plan_slices(Geometry((34, 30, 4), make_phantom()[1])), (0, 3))
    for event in result.events:
        gathered.add(event)
    for target, ranking in result.rankings.items():
        before = np.stack(list(raw.masks(target).values()), axis=1)
        assert np.array_equal(before, np.stack(list(result.masks(target).values()), axis=1))
        after = np.stack([[gathered[target].slice_mask(n, k) for k in range(3)] for n in range(len(before))])
        assert ranking.order == list(rank(gram_matrix(after)).order)
        voxel_ml = 3.5 * 4.0 * 7.0 / 1000
        assert ranking.millilitres == pytest.approx([m.sum() * voxel_ml for m in after])
        assert ranking.dropped_ml == pytest.approx([(b & ~a).sum() * voxel_ml for a, b in zip(after, before, strict=True)])
        assert ranking.filled_ml == pytest.approx([(a & ~b).sum() * voxel_ml for a, b in zip(after, before, strict=True)])
        assert [count > 0 for count in ranking.dropped_pieces] == [ml > 0 for ml in ranking.dropped_ml]
        assert any(ranking.dropped_pieces)


def test_a_single_slice_is_left_alone(engine: Any, run_engine: Run) -> None:
    result = run_engine(engine, "liver", slices=(1, 2), keep_pieces=False)
    assert not result.of(TidiedEvent)
    assert result.rankings["liver"].dropped_pieces == []


def test_proposals_that_agree_nowhere_are_said(engine: Any, run_engine: Run, monkeypatch: pytest.MonkeyPatch) -> None:
    def apart(model: Any, latents: Any) -> Any:
        size = engine.card.image_size
        logits = torch.full((len(latents), size, size), -5.0)
        for row in range(len(latents)):  # every proposal a band of its own
            logits[row, size // 2 + 3 * row : size // 2 + 3 * row + 2] = 5.0
        return logits

    monkeypatch.setattr(sampler, "decode", apart)
    result = run_engine(engine, "liver", proposals=4, batch_size=4, slices=(0, 1), steps=1)
    assert not any(result.rankings["liver"].empty)
    assert [w.code for w in result.warnings if w.code != "modality"] == ["disagreement"]
    same = run_engine(engine, "liver", proposals=1, slices=(0, 1), steps=1)
    assert not [w for w in same.warnings if w.code == "disagreement"], "one proposal is its own consensus"


def test_empty_answers_are_said(engine: Any, run_engine: Run) -> None:
    engine.model.vae.decoder.conv_out.bias.data.fill_(-50)
    result = run_engine(engine, proposals=3)
    assert not any(mask.any() for mask in result.masks("liver").values())
    event = result.rankings["liver"]
    assert (event.empty, event.empty_share, event.millilitres) == ([True] * 3, 1.0, [0.0] * 3)
    (warning,) = result.warnings
    assert warning.code == "empty"
    assert "liver" in warning.message
    assert "100%" in warning.message


def test_repeated_target_is_sampled_once(engine: Any, run_engine: Run) -> None:
    result = run_engine(engine, "liver", "liver", slices=(0, 1))
    assert len(result.masks("liver")[0]) == 4
    assert result.progress[-1].fraction == 1


def test_masks_are_not_kept_once_they_are_sent(engine: Any, make_phantom: Run) -> None:
    """While a long stack is sampled, at most the slice in the making is held: nothing grows with the number of slices."""
    engine.set_image(*make_phantom(12), "CT")
    sent: list[weakref.ref[np.ndarray]] = []
    most = 0

    def emit(event: Any) -> None:
        nonlocal most
        if isinstance(event, SliceEvent):
            sent.append(weakref.ref(event.masks))
        most = max(most, sum(ref() is not None for ref in sent))

    engine.propose(ProposeRequest(("liver",), proposals=4, steps=1, batch_size=2), emit, lambda: False)
    assert len(sent) == 24
    assert most <= 4


@pytest.mark.parametrize(
    ("wrong", "error"),
    [
        ({"targets": ()}, InputError),
        ({"targets": ("heart",)}, ModelError),
        ({"proposals": 0}, InputError),
        ({"proposals": 1001}, InputError),
        ({"top_k": 0}, InputError),
        ({"batch_size": 0}, InputError),
        ({"seed": -1}, InputError),
        ({"steps": 0}, InputError),
        ({"steps": 101}, InputError),
        ({"scheduler": "euler"}, InputError),
        ({"ranking": "beauty"}, InputError),
        ({"slices": (2, 2)}, InputError),
        ({"slices": (0, 5)}, InputError),
        ({"slices": (-1, 2)}, InputError),
    ],
)
def test_requests_that_cannot_be_served_are_refused_before_anything_is_sampled(
    engine: Any, wrong: dict[str, Any], error: type[Exception]
) -> None:
    events: list[Any] = []
    with pytest.raises(error, match=r"^[^\n]*\.$"):
        engine.propose(ProposeRequest(**{"targets": ("liver",), **wrong}), events.append, lambda: False)
    assert events == []


def test_request_without_an_image_is_refused(responsive_folder: Any) -> None:
    from progidiff.sampling.engine import Engine

    with pytest.raises(InputError, match="image"):
        Engine.load(responsive_folder, "auto").propose(ProposeRequest(("liver",)), lambda event: None, lambda: False)


@pytest.mark.parametrize("device", ["tpu-9", "meta", ""])
def test_unknown_device_is_refused(responsive_folder: Any, device: str) -> None:
    from progidiff.sampling.engine import Engine

    with pytest.raises(ModelError, match="auto, cpu or cuda"):
        Engine.load(responsive_folder, device)
