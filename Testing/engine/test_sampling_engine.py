"""Requests on the engine with a tiny model: events, masks, adaptive sampling, presence, cancelling, too little memory."""

from __future__ import annotations

import gc
import weakref
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from progidiff.errors import CancelledError, InputError, ModelError
from progidiff.model.folder import load_model, save_model
from progidiff.proposals.proposals import Gathered
from progidiff.proposals.ranking import rank
from progidiff.proposals.votes import gram_matrix, mean_pairwise_dice
from progidiff.sampling import sampler
from progidiff.sampling.conditioning import presence_of, presence_threshold
from progidiff.sampling.denoise import proposal_noise
from progidiff.sampling.engine import PILOT_SLICES, Engine
from progidiff.volumes.geometry import Geometry
from progidiff.volumes.slicing import plan_slices
from progidiff.wire.messages import DoneEvent, ProgressEvent, ProposeRequest, RankingEvent, SliceEvent, TidiedEvent

from .conftest import phantom, sample


def _same(a: dict[int, np.ndarray], b: dict[int, np.ndarray]) -> bool:
    return a.keys() == b.keys() and all(np.array_equal(a[index], b[index]) for index in a)


def test_events_are_complete_and_in_order(engine: Any) -> None:
    result = sample(engine, "liver", "left kidney", proposals=5, batch_size=3, slices=(1, 4))
    for target in ("liver", "left kidney"):
        masks = result.masks(target)
        assert list(masks) == [1, 2, 3]
        assert all(m.shape == (5, 30, 34) for m in masks.values())
        filled = np.concatenate(list(masks.values())).mean((1, 2))
        assert ((filled > 0.05) & (filled < 0.95)).all(), "the model under test must not be trivial"
    kinds = [type(event) for event in result.events if not isinstance(event, ProgressEvent)]
    assert kinds == [SliceEvent] * (len(kinds) - 3) + [RankingEvent] * 2 + [DoneEvent]
    for event in result.slices:
        assert event.complete == (event.first_proposal + len(event.masks) == 5)
    assert result.done.proposals == 5
    assert result.done.model_id == engine.card.model_id
    assert result.done.timing["first_proposal_s"] <= result.done.timing["total_s"]


def test_mean_probability_fits_the_masks(engine: Any) -> None:
    (single,) = sample(engine, proposals=1, slices=(0, 1)).slices
    assert np.array_equal(single.mean_probability > 0.5, single.masks[0])
    ones = [sample(engine, proposals=n, slices=(0, 1)).slices[-1].mean_probability for n in (1, 2)]
    assert not np.array_equal(*ones)
    assert all(p.min() >= 0 and p.max() <= 1 for p in ones)
    assert np.abs(ones[0] / 2 - ones[1]).max() <= 0.5 + 1e-6  # the second probability is in [0, 1]


def test_progress_never_falls_and_ends_at_one(engine: Any) -> None:
    result = sample(engine, "liver", "spleen", proposals=3, batch_size=4)
    fractions = [event.fraction for event in result.progress]
    assert fractions == sorted(fractions)
    assert fractions[0] == 0
    assert fractions[-1] == 1
    assert result.progress[-1].slices_done == result.progress[-1].slices_total == 4
    assert result.progress[-1].eta_s == 0
    once = sample(engine, "liver", "liver", slices=(0, 1))
    assert len(once.masks("liver")[0]) == 4, "a repeated target is sampled once"


@pytest.mark.slow
def test_masks_are_the_same_whatever_the_batch_size(engine: Any) -> None:
    results = [sample(engine, "liver", "spleen", proposals=6, batch_size=n, slices=(0, 2)) for n in (1, 16)]
    for target in ("liver", "spleen"):
        first = results[0].masks(target)
        assert all(_same(first, other.masks(target)) for other in results[1:])


@pytest.mark.slow
def test_masks_are_the_same_alone_or_together(engine: Any) -> None:
    together = sample(engine, "liver", "spleen", proposals=3)
    alone = sample(engine, "spleen", proposals=3)
    assert _same(together.masks("spleen"), alone.masks("spleen"))
    third = sample(engine, "spleen", proposals=3, slices=(2, 3))
    assert np.array_equal(third.masks("spleen")[2], alone.masks("spleen")[2])
    assert not np.array_equal(together.masks("liver")[0], together.masks("spleen")[0])


@pytest.mark.parametrize("scheduler", ["ddim", "dpmsolver++"])
def test_fewer_proposals_are_the_first_ones(engine: Any, scheduler: str) -> None:
    few, many = (sample(engine, proposals=n, scheduler=scheduler, slices=(0, 2)).masks("liver") for n in (4, 8))
    assert all(np.array_equal(few[index], many[index][:4]) for index in few)
    assert len({mask.tobytes() for mask in many[0]}) == 8, "proposals must differ"


def test_seed_changes_every_proposal_and_repeats_it(engine: Any) -> None:
    a, b, again = (sample(engine, seed=seed, slices=(0, 1)).masks("liver")[0] for seed in (0, 1, 0))
    assert np.array_equal(a, again)
    assert all((x != y).any() for x, y in zip(a, b, strict=True))


def test_neighbouring_slices_continue_a_proposal(engine: Any) -> None:
    """The masks of one proposal on two neighbouring slices are more alike than those of two proposals."""
    masks = sample(engine, proposals=6, slices=(1, 3)).masks("liver")
    agree = np.array([[(a == b).mean() for b in masks[2]] for a in masks[1]])
    assert np.diagonal(agree).mean() > agree[~np.eye(6, dtype=bool)].mean() + 0.05


@pytest.mark.slow
@pytest.mark.parametrize("method", ["soft_dice", "medoid"])
def test_ranking_is_that_of_all_the_masks(engine: Any, method: Any) -> None:
    result = sample(engine, "liver", "spleen", proposals=5, ranking=method, top_k=2, batch_size=4)
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
def test_a_stack_is_tidied_before_it_is_ranked(engine: Any, adaptive: bool) -> None:
    """What remains has the pieces and volumes that the ranking speaks of; the receiver gathers the same."""
    settings = {"proposals": 6, "slices": (0, 3), "steps": 1, "adaptive": adaptive}
    raw = sample(engine, "liver", "spleen", **settings)
    assert not raw.of(TidiedEvent)
    result = sample(engine, "liver", "spleen", keep_pieces=False, **settings)
    kinds = [(type(event), event.target) for event in result.events if not isinstance(event, ProgressEvent | DoneEvent)]
    kinds = list(dict.fromkeys(kinds))
    assert kinds[2:] == [(kind, target) for target in ("liver", "spleen") for kind in (TidiedEvent, RankingEvent)]
    gathered = Gathered(("liver", "spleen"), plan_slices(Geometry((34, 30, 4), phantom()[1])), (0, 3))
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


def test_a_single_slice_is_left_alone(engine: Any) -> None:
    result = sample(engine, "liver", slices=(1, 2), keep_pieces=False)
    assert not result.of(TidiedEvent)
    assert result.rankings["liver"].dropped_pieces == []


def test_proposals_that_agree_nowhere_are_said(engine: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    def apart(model: Any, latents: Any) -> Any:
        size = engine.card.image_size
        logits = torch.full((len(latents), size, size), -5.0)
        for row in range(len(latents)):  # every proposal a band of its own
            logits[row, size // 2 + 3 * row : size // 2 + 3 * row + 2] = 5.0
        return logits

    monkeypatch.setattr(sampler, "decode", apart)
    result = sample(engine, "liver", proposals=4, batch_size=4, slices=(0, 1), steps=1)
    assert not any(result.rankings["liver"].empty)
    assert [w.code for w in result.warnings if w.code != "modality"] == ["disagreement"]
    same = sample(engine, "liver", proposals=1, slices=(0, 1), steps=1)
    assert not [w for w in same.warnings if w.code == "disagreement"], "one proposal is its own consensus"


def test_empty_answers_are_said(own_engine: Any) -> None:
    own_engine.model.vae.decoder.conv_out.bias.data.fill_(-50)
    result = sample(own_engine, proposals=3)
    assert not any(mask.any() for mask in result.masks("liver").values())
    event = result.rankings["liver"]
    assert (event.empty, event.empty_share, event.millilitres) == ([True] * 3, 1.0, [0.0] * 3)
    (warning,) = result.warnings
    assert warning.code == "empty"
    assert "liver" in warning.message
    assert "100%" in warning.message


def test_masks_are_not_kept_once_they_are_sent(engine: Any) -> None:
    """While a long stack is sampled, at most the slice in the making is held: nothing grows with the number of slices."""
    engine.set_image(*phantom(12), "CT")
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
        ({"targets": ()}, InputError), ({"targets": ("heart",)}, ModelError), ({"proposals": 0}, InputError),
        ({"top_k": 0}, InputError), ({"batch_size": 0}, InputError), ({"seed": -1}, InputError), ({"steps": 0}, InputError),
        ({"scheduler": "euler"}, InputError), ({"ranking": "beauty"}, InputError), ({"slices": (2, 2)}, InputError),
        ({"slices": (0, 5)}, InputError),
    ],
)  # fmt: skip
def test_requests_that_cannot_be_served_are_refused_before_anything_is_sampled(
    engine: Any, wrong: dict[str, Any], error: type[Exception]
) -> None:
    events: list[Any] = []
    with pytest.raises(error, match=r"^[^\n]*\.$"):
        engine.propose(ProposeRequest(**{"targets": ("liver",), **wrong}), events.append, lambda: False)
    assert events == []


def test_request_without_an_image_is_refused(responsive_folder: Any) -> None:
    with pytest.raises(InputError, match="image"):
        Engine.load(responsive_folder, "auto").propose(ProposeRequest(("liver",)), lambda event: None, lambda: False)


def test_unknown_device_is_refused(responsive_folder: Any) -> None:
    with pytest.raises(ModelError, match="auto, cpu or cuda"):
        Engine.load(responsive_folder, "meta")


@pytest.fixture
def sure_of_the_liver(monkeypatch: pytest.MonkeyPatch) -> None:
    """All proposals of the liver start from one noise field and are alike; other targets stay diverse."""

    def noise(seed: int, target: str, proposal: int, *rest: Any) -> Any:
        return proposal_noise(seed, target, 0 if target == "liver" else proposal, *rest)

    monkeypatch.setattr(sampler, "proposal_noise", noise)


@pytest.mark.slow
@pytest.mark.usefixtures("sure_of_the_liver")
@pytest.mark.parametrize("count", [2, 11])
def test_each_target_stops_when_it_has_settled(engine: Any, count: int) -> None:
    engine.set_image(*phantom(count), "CT")
    result = sample(engine, "liver", "spleen", proposals=14, adaptive=True, steps=1)
    expected = {"liver": 12, "spleen": 14}  # two quiet blocks of four after the first; the maximum
    for target, proposals in expected.items():
        masks = result.masks(target)
        assert sorted(masks) == list(range(count))
        assert {len(m) for m in masks.values()} == {proposals}, "every slice has the same proposals"
        event = result.rankings[target]
        assert len(event.scores) == proposals
        gram = gram_matrix(np.stack([masks[index] for index in sorted(masks)], axis=1))
        assert event.scores == pytest.approx(rank(gram).scores)
        assert event.order == list(rank(gram).order)
    liver, spleen = (result.rankings[target] for target in expected)
    assert "settled" in liver.stop_reason
    assert "12 proposals" in liver.stop_reason
    assert liver.groups == [list(range(12))]
    assert "maximum of 14" in spleen.stop_reason
    assert (f"{PILOT_SLICES} of 11 slices" in liver.stop_reason) == (count == 11)
    assert result.done.proposals == 14


@pytest.mark.parametrize("count", [3, 10])
def test_no_slice_is_sampled_twice(own_engine: Any, count: int) -> None:
    """The slices of the decision are results, too: rows through the denoiser are rows that were sent."""
    own_engine.set_image(*phantom(count), "CT")
    rows = 0

    def add(_: Any, args: tuple[Any, ...]) -> None:
        nonlocal rows
        rows += len(args[0])

    own_engine.model.unet.register_forward_pre_hook(add)
    result = sample(own_engine, proposals=8, adaptive=True, steps=1, batch_size=5)
    assert rows == sum(len(event.masks) for event in result.slices) == 8 * count
    fixed = sample(own_engine, proposals=8, steps=1).masks("liver")
    assert all(np.array_equal(mask, fixed[index]) for index, mask in result.masks("liver").items())


def test_blocks_carry_what_is_known_so_far(engine: Any) -> None:
    result = sample(engine, proposals=8, adaptive=True, steps=1, slices=(0, 2), batch_size=16)
    assert [(e.slice_index, e.first_proposal) for e in result.slices] == [(0, 0), (1, 0), (0, 4), (1, 4)]
    assert all(event.complete for event in result.slices)


@pytest.mark.slow
@pytest.mark.usefixtures("sure_of_the_liver")
def test_progress_of_blocks_never_falls_and_ends_at_one(engine: Any) -> None:
    engine.set_image(*phantom(10), "CT")
    result = sample(engine, "liver", "spleen", proposals=16, adaptive=True, steps=1)
    fractions = [event.fraction for event in result.progress]
    assert fractions == sorted(fractions)
    assert fractions[-1] == 1
    assert result.progress[-1].slices_done == 10


@pytest.mark.parametrize("proposals", [1, 3])
def test_few_proposals_need_no_decision(engine: Any, proposals: int) -> None:
    result = sample(engine, proposals=proposals, adaptive=True, steps=1, slices=(0, 1), batch_size=8)
    assert len(result.masks("liver")[0]) == proposals
    assert [type(e) for e in result.events if isinstance(e, SliceEvent | RankingEvent)] == [SliceEvent, RankingEvent]


@pytest.fixture
def headed(headed_folder: Path) -> Engine:
    """An engine whose head finds the liver for certain, the spleen never and the left kidney with presence 0.3."""
    loaded = Engine.load(headed_folder, "cpu")
    loaded.set_image(*phantom(), "CT")
    return loaded


def test_presence_is_judged_by_the_likeliest_area() -> None:
    logits = torch.full((3, 20, 20), -30.0)
    logits[0, 3:6, 4:7] = 0.0  # nine pixels of 2.4 mm: 50 mm² at even odds
    logits[1, 3, 4] = 30.0  # a speck
    assert presence_of(logits, 2.4).tolist() == pytest.approx([1.0, 2 / 9, 0.0])
    assert presence_of(logits, 1.0).tolist() == pytest.approx([2 * 9 * 0.5 / 50, 2 / 50, 0.0])
    assert presence_of(logits, 100.0).tolist() == pytest.approx([1.0, 1.0, 0.0])  # a pixel is the least


def test_as_many_proposals_show_a_target_as_it_is_likely() -> None:
    thresholds = [presence_threshold(i) for i in range(64)]
    assert thresholds[:4] == [0.5, 0.25, 0.75, 0.125]
    assert len(set(thresholds)) == 64
    for count in (4, 16, 50, 64):
        for presence in (0.0, 0.1, 0.5, 0.9, 1.0):
            shown = sum(presence > threshold for threshold in thresholds[:count]) / count
            assert shown == pytest.approx(presence, abs=3 / count)
    assert all(0 < threshold < 1 for threshold in thresholds)  # certainty either way is the same for every proposal


def test_an_absent_target_is_left_out_and_costs_nothing(headed: Engine) -> None:
    rows: list[int] = []
    headed.model.unet.register_forward_pre_hook(lambda _, args: rows.append(len(args[0])))
    result = sample(headed, "spleen", proposals=6, steps=2)
    assert rows == []
    assert all(not masks.any() for masks in result.masks("spleen").values())
    ranking = result.rankings["spleen"]
    assert ranking.empty_share == 1.0
    assert ranking.millilitres == [0.0] * 6
    assert [w.code for w in result.warnings] == ["empty"]
    events = [event for event in result.slices if event.target == "spleen" and event.complete]
    assert len(events) == 4
    assert all(not e.masks.any() and not e.mean_probability.any() for e in events)


@pytest.mark.slow
@pytest.mark.parametrize("batch_size", [None, 3])
def test_a_doubtful_target_is_in_some_proposals_and_in_the_same_ones_on_every_slice(
    headed: Engine, engine: Any, batch_size: int | None
) -> None:
    everything = sample(engine, "left kidney", "liver", proposals=8, batch_size=batch_size)
    result = sample(headed, "left kidney", "liver", proposals=8, batch_size=batch_size)
    shown = [1, 3, 7]  # thresholds 0.25, 0.125 and 0.0625 of a presence of 0.3
    for index, masks in result.masks("left kidney").items():
        wanted = everything.masks("left kidney")[index].copy()
        wanted[[i for i in range(8) if i not in shown]] = False
        np.testing.assert_array_equal(masks, wanted)
        np.testing.assert_array_equal(result.masks("liver")[index], everything.masks("liver")[index])
    assert result.rankings["left kidney"].empty_share == 5 / 8
    assert result.rankings["left kidney"].empty[result.rankings["left kidney"].order[0]]
    assert "empty" in [w.code for w in result.warnings]


@pytest.mark.slow
def test_everywhere_means_everywhere(headed: Engine, engine: Any) -> None:
    wanted = sample(engine, "spleen", proposals=4)
    result = sample(headed, "spleen", proposals=4, everywhere=True)
    assert all(np.array_equal(result.masks("spleen")[index], masks) for index, masks in wanted.masks("spleen").items())
    assert wanted.rankings["spleen"].millilitres == result.rankings["spleen"].millilitres


def test_another_adapter_is_asked_again(headed: Engine) -> None:
    """What the head said belongs to the weights that it said it with."""
    assert sample(headed, "spleen").rankings["spleen"].empty_share == 1.0
    head = headed.model.image_encoder.segmentation_head
    head.bias.data += 20.0
    headed._conditioner.forget_slices()
    assert sample(headed, "spleen").rankings["spleen"].empty_share < 1.0


def test_a_head_for_other_targets_is_refused(headed_folder: Path, tmp_path: Path) -> None:
    model = load_model(headed_folder)
    model.image_encoder.learn_classes(2)
    with pytest.raises(ModelError, match="the image encoder's targets is 2, the card's is 3"):
        save_model(model, tmp_path / "model")


@pytest.mark.slow
def test_the_bundled_model_leaves_out_what_is_not_there() -> None:
    """Slices of soft tissue without any organ; of these three the model has seen slices without them."""
    engine = Engine.load(None, "cpu")
    tissue = np.full((2, 128, 128), -1000.0, dtype=np.float32)
    rows, columns = np.mgrid[:128, :128] - 63.5
    body = (rows / 40) ** 2 + (columns / 55) ** 2 < 1
    tissue[:, body] = np.random.default_rng(0).normal(40, 20, (2, body.sum()))
    engine.set_image(tissue, np.diag([3.0, 3.0, 5.0, 1.0]), "CT")
    targets = ("right kidney", "pancreas", "gallbladder")
    left_out = sample(engine, *targets, proposals=4)
    drawn = sample(engine, *targets, proposals=4, everywhere=True)
    for target in targets:
        assert left_out.rankings[target].empty_share == 1.0, target
    assert any(drawn.rankings[target].empty_share < 1.0 for target in targets)


CPU_MESSAGE = (
    "[enforce fail at alloc_cpu.cpp:121] . DefaultCPUAllocator: can't allocate memory: you tried to allocate 9 bytes."
)


@pytest.mark.slow
@pytest.mark.parametrize(
    ("part", "adaptive"),
    [("text_encoder", False), ("image_encoder", False), ("controlnet", False), ("unet", True), ("decoder", True)],
)
def test_cancel_takes_effect_within_one_step(own_engine: Any, part: str, adaptive: bool) -> None:
    """Asked for while a network runs, whichever: no further step begins, nothing is sent, and the engine goes on working."""
    model = own_engine.model
    before = sample(own_engine, slices=(0, 1)).masks("liver")[0]
    volume, affine = phantom()
    own_engine.set_image(volume[::-1], affine, "CT")  # so that nothing of it is known yet
    network = model.vae.decoder if part == "decoder" else getattr(model, part)
    wanted, steps_after = False, 0

    def ask(*_: Any) -> None:
        nonlocal wanted
        wanted = True

    def count(*_: Any) -> None:
        nonlocal steps_after
        steps_after += wanted

    hooks = [model.controlnet.register_forward_pre_hook(count), network.register_forward_pre_hook(ask)]
    events: list[Any] = []
    request = ProposeRequest(("spleen",), proposals=4, steps=4, batch_size=2, adaptive=adaptive)
    with pytest.raises(CancelledError):
        own_engine.propose(request, events.append, lambda: wanted)
    for hook in hooks:
        hook.remove()
    assert steps_after <= (1 if part in ("controlnet", "unet") else 0)
    assert not any(isinstance(event, SliceEvent) for event in events)
    own_engine.set_image(volume, affine, "CT")
    assert np.array_equal(sample(own_engine, slices=(0, 1)).masks("liver")[0], before)


@pytest.mark.parametrize("sent", [0, 1, 4])
def test_cancel_while_slices_are_sent_stops_the_next_one(engine: Any, sent: int) -> None:
    """Before it began, after the first, and after the last slice: then there is no ranking."""
    events: list[Any] = []
    request = ProposeRequest(("liver",), proposals=2, steps=1, batch_size=8)  # all slices in one batch
    with pytest.raises(CancelledError):
        engine.propose(request, events.append, lambda: sum(isinstance(e, SliceEvent) for e in events) == sent)
    assert sum(isinstance(event, SliceEvent) for event in events) == sent
    assert not any(isinstance(event, RankingEvent) for event in events)


def _limit(module: torch.nn.Module, rows: int, error: Exception) -> list[int]:
    """Let a network run out of memory for more than ``rows`` rows; notes the batches that it was given."""
    seen: list[int] = []

    def check(_: Any, args: tuple[Any, ...]) -> None:
        seen.append(len(args[0]))
        if len(args[0]) > rows:
            raise error

    module.register_forward_pre_hook(check)
    return seen


@pytest.mark.slow
@pytest.mark.parametrize(
    ("part", "error"),
    [
        ("unet", torch.OutOfMemoryError("CUDA out of memory.")),
        ("unet", RuntimeError(CPU_MESSAGE)),
        ("decoder", MemoryError()),
    ],
    ids=lambda value: str(value)[:8],
)
def test_out_of_memory_halves_the_batch_and_changes_no_mask(own_engine: Any, part: str, error: Exception) -> None:
    expected = sample(own_engine, "liver", "spleen", proposals=5, batch_size=16)
    seen = _limit(own_engine.model.unet if part == "unet" else own_engine.model.vae.decoder, 5, error)
    result = sample(own_engine, "liver", "spleen", proposals=5, batch_size=16)
    assert seen[0] == 16
    assert max(seen[-4:]) <= 4
    assert [w.code for w in result.warnings] == ["memory", "memory"]
    assert ["8 samples" in result.warnings[0].message, "4 samples" in result.warnings[1].message] == [True, True]
    for target in ("liver", "spleen"):
        found, wanted = result.masks(target), expected.masks(target)
        assert all(np.array_equal(found[index], wanted[index]) for index in wanted)
    fractions = [event.fraction for event in result.progress]
    assert fractions[-1] == 1
    assert max(fractions) <= 1
    assert result.rankings["liver"].order == expected.rankings["liver"].order


def test_out_of_memory_is_counted_from_the_rows_there_are(own_engine: Any) -> None:
    """Four rows under a limit of 64 go on with two, not through four rounds of halving a number that was never reached."""
    seen = _limit(own_engine.model.unet, 2, torch.OutOfMemoryError())
    result = sample(own_engine, proposals=4, batch_size=64, slices=(0, 1), steps=1)
    assert seen == [4, 2, 2]
    assert len(result.warnings) == 1


def test_out_of_memory_lets_go_of_what_it_held(own_engine: Any) -> None:
    """The tensors of the failed batch must be gone when the smaller one begins, or the memory would still be missing."""
    held: list[weakref.ref[torch.Tensor]] = []
    alive: list[bool] = []
    gc.disable()  # only reference counts may free them

    def check(_: Any, args: tuple[Any, ...]) -> None:
        if not held:
            held.append(weakref.ref(args[0]))
            raise torch.OutOfMemoryError
        alive.append(held[0]() is not None)

    own_engine.model.unet.register_forward_pre_hook(check)
    try:
        sample(own_engine, batch_size=4, slices=(0, 1))
    finally:
        gc.enable()
    assert alive
    assert not any(alive)


def test_too_little_memory_for_one_sample_is_said(own_engine: Any) -> None:
    _limit(own_engine.model.unet, 0, torch.OutOfMemoryError())
    with pytest.raises(ModelError, match=r"not enough memory .*\.$"):
        sample(own_engine, batch_size=4, slices=(0, 1))


def test_other_errors_are_not_taken_for_memory(own_engine: Any) -> None:
    seen = _limit(own_engine.model.unet, 0, RuntimeError("mat1 and mat2 shapes cannot be multiplied"))
    with pytest.raises(RuntimeError, match="mat1"):
        sample(own_engine, batch_size=4, slices=(0, 1))
    assert len(seen) == 1
