"""Adaptive sampling: blocks until the consensus has settled, decided on a few slices of a large stack."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
import pytest

from progidiff.proposals.ranking import rank
from progidiff.proposals.votes import gram_matrix
from progidiff.sampling import sampler
from progidiff.sampling.denoise import proposal_noise
from progidiff.sampling.engine import PILOT_SLICES
from progidiff.wire.messages import RankingEvent, SliceEvent

Run = Callable[..., Any]


@pytest.fixture
def sure_of_the_liver(monkeypatch: pytest.MonkeyPatch) -> None:
    """All proposals of the liver start from one noise field and are alike; other targets stay diverse."""

    def noise(seed: int, target: str, proposal: int, *rest: Any) -> Any:
        return proposal_noise(seed, target, 0 if target == "liver" else proposal, *rest)

    monkeypatch.setattr(sampler, "proposal_noise", noise)


@pytest.mark.slow
@pytest.mark.usefixtures("sure_of_the_liver")
@pytest.mark.parametrize("count", [2, PILOT_SLICES, 11])
def test_each_target_stops_when_it_has_settled(engine: Any, run_engine: Run, make_phantom: Run, count: int) -> None:
    engine.set_image(*make_phantom(count), "CT")
    result = run_engine(engine, "liver", "spleen", proposals=14, adaptive=True, steps=1)
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
def test_no_slice_is_sampled_twice(engine: Any, run_engine: Run, make_phantom: Run, count: int) -> None:
    """The slices of the decision are results, too: rows through the denoiser are rows that were sent."""
    engine.set_image(*make_phantom(count), "CT")
    rows = 0

    def add(_: Any, args: tuple[Any, ...]) -> None:
        nonlocal rows
        rows += len(args[0])

    engine.model.unet.register_forward_pre_hook(add)
    result = run_engine(engine, proposals=8, adaptive=True, steps=1)
    assert rows == sum(len(event.masks) for event in result.slices) == 8 * count


def test_blocks_carry_what_is_known_so_far(engine: Any, run_engine: Run) -> None:
    result = run_engine(engine, proposals=8, adaptive=True, steps=1, slices=(0, 2), batch_size=16)
    assert [(e.slice_index, e.first_proposal) for e in result.slices] == [(0, 0), (1, 0), (0, 4), (1, 4)]
    assert all(event.complete for event in result.slices)


@pytest.mark.slow
def test_adaptive_masks_are_those_of_a_fixed_number(engine: Any, run_engine: Run, make_phantom: Run) -> None:
    engine.set_image(*make_phantom(9), "CT")
    adaptive = run_engine(engine, proposals=6, adaptive=True, batch_size=5, steps=1)
    fixed = run_engine(engine, proposals=6, steps=1)
    assert all(np.array_equal(mask, fixed.masks("liver")[index]) for index, mask in adaptive.masks("liver").items())
    for a, b in zip(adaptive.rankings["liver"].scores, fixed.rankings["liver"].scores, strict=True):
        assert a == pytest.approx(b)


@pytest.mark.slow
@pytest.mark.usefixtures("sure_of_the_liver")
@pytest.mark.parametrize("count", [2, 10])
def test_progress_never_falls_and_ends_at_one(engine: Any, run_engine: Run, make_phantom: Run, count: int) -> None:
    engine.set_image(*make_phantom(count), "CT")
    result = run_engine(engine, "liver", "spleen", proposals=30, adaptive=True, steps=1)
    fractions = [event.fraction for event in result.progress]
    assert fractions == sorted(fractions)
    assert fractions[-1] == 1
    assert result.progress[-1].slices_done == count


@pytest.mark.parametrize("proposals", [1, 3])
def test_few_proposals_need_no_decision(engine: Any, run_engine: Run, proposals: int) -> None:
    result = run_engine(engine, proposals=proposals, adaptive=True, steps=1, slices=(0, 1), batch_size=8)
    assert len(result.masks("liver")[0]) == proposals
    assert [type(e) for e in result.events if isinstance(e, SliceEvent | RankingEvent)] == [SliceEvent, RankingEvent]
