"""Adaptive stopping: its statistics against simulation, its rule case by case."""

from __future__ import annotations

import numpy as np
import pytest

from progidiff.errors import InputError
from progidiff.ranking.ensembles import consensus
from progidiff.ranking.gram import gram_matrix, mean_pairwise_dice
from progidiff.ranking.stopping import (
    AdaptiveStopping,
    Overlap,
    StopDecision,
    consensus_overlap,
    mean_dice_half_width,
)


def proposals(rng: np.random.Generator, count: int, spread: float) -> np.ndarray:
    """Discs whose place and size vary with ``spread``."""
    r, c = np.mgrid[:48, :48]
    rows, columns, radii = rng.normal((24, 24, 14), (spread, spread, spread / 2), (count, 3)).T[:, :, None, None]
    return (r - rows) ** 2 + (c - columns) ** 2 <= radii**2


def run(masks: np.ndarray, stopping: AdaptiveStopping) -> list[StopDecision]:
    """Feed blocks until the decision is to stop."""
    decisions: list[StopDecision] = []
    count, before = 0, None
    while not decisions or not decisions[-1].stop:
        count += stopping.next_block(count)
        after = consensus(masks[:count])
        dice = None if before is None else consensus_overlap(before, after).dice
        decisions.append(stopping.update(gram_matrix(masks[:count]), dice))
        before = after
    return decisions


def test_the_interval_is_the_jackknife_over_proposals() -> None:
    masks = proposals(np.random.default_rng(1), 9, 2.0)
    without = np.array([mean_pairwise_dice(gram_matrix(np.delete(masks, i, axis=0))) for i in range(9)])
    expected = 1.96 * np.sqrt(8 / 9 * ((without - without.mean()) ** 2).sum())
    assert mean_dice_half_width(gram_matrix(masks)) == pytest.approx(expected, rel=1e-3)


def test_the_interval_covers_the_true_mean_about_as_often_as_it_says() -> None:
    rng = np.random.default_rng(2)
    truth = mean_pairwise_dice(gram_matrix(proposals(rng, 600, 2.0)))
    hits = []
    for _ in range(300):
        gram = gram_matrix(proposals(rng, 16, 2.0))
        hits.append(abs(mean_pairwise_dice(gram) - truth) <= mean_dice_half_width(gram))
    assert 0.87 <= np.mean(hits) <= 1.0


def test_two_proposals_say_nothing_about_the_spread() -> None:
    masks = proposals(np.random.default_rng(3), 3, 1.0)
    assert mean_dice_half_width(gram_matrix(masks[:2])) == float("inf")
    assert mean_dice_half_width(gram_matrix(masks)) < float("inf")
    assert mean_dice_half_width(gram_matrix(np.repeat(masks[:1], 5, axis=0))) == pytest.approx(0.0, abs=1e-9)


def test_overlap_adds_up_over_slices() -> None:
    rng = np.random.default_rng(4)
    a, b = rng.random((2, 5, 20, 20)) > 0.5
    total = sum((consensus_overlap(a[k], b[k]) for k in range(5)), Overlap())
    assert total == consensus_overlap(a, b)
    assert total.dice == pytest.approx(2 * (a & b).sum() / (a.sum() + b.sum()))
    assert Overlap().dice == 1.0
    assert Overlap(0, 3, 0).dice == 0.0


@pytest.mark.parametrize("radius_is_zero", [False, True])
def test_identical_proposals_stop_once_the_consensus_was_steady_twice(radius_is_zero: bool) -> None:
    masks = np.repeat(proposals(np.random.default_rng(5), 1, 1.0), 40, axis=0)
    if radius_is_zero:
        masks[:] = False
    decisions = run(masks, AdaptiveStopping())
    # Blocks of 4: the first has no predecessor, the second and third are steady.
    assert [d.proposals for d in decisions] == [4, 8, 12]
    assert "settled" in decisions[-1].reason
    assert decisions[-1].mean_dice == 1.0


def test_proposals_that_vary_run_to_the_maximum_and_say_so() -> None:
    masks = proposals(np.random.default_rng(6), 40, 8.0)
    last = run(masks, AdaptiveStopping(maximum=30))[-1]
    assert last.proposals == 30
    assert "maximum of 30" in last.reason
    assert f"{last.mean_dice:.3f}" in last.reason


def test_easy_organs_need_fewer_proposals_than_hard_ones() -> None:
    rng = np.random.default_rng(7)
    easy = run(proposals(rng, 64, 0.2), AdaptiveStopping(maximum=64))[-1].proposals
    hard = run(proposals(rng, 64, 4.0), AdaptiveStopping(maximum=64))[-1].proposals
    assert easy < hard


def test_a_block_that_moves_the_consensus_starts_the_count_again() -> None:
    gram = np.full((12, 12), 100.0)
    stopping = AdaptiveStopping()
    stops = [stopping.update(gram, dice).stop for dice in (None, 0.999, 0.9, 0.999, 0.999)]
    assert stops == [False, False, False, False, True]


def test_below_the_minimum_sampling_goes_on() -> None:
    gram = np.full((4, 4), 100.0)
    stopping = AdaptiveStopping(minimum=8)
    decisions = [stopping.update(gram, dice) for dice in (None, 1.0, 1.0)]
    assert not any(d.stop for d in decisions)
    assert "4 of at least 8" in decisions[-1].reason


def test_a_consensus_that_still_moves_keeps_sampling() -> None:
    gram = gram_matrix(proposals(np.random.default_rng(8), 12, 4.0))
    stopping = AdaptiveStopping()
    decision = [stopping.update(gram, dice) for dice in (None, 0.97, 0.99)][-1]
    assert not decision.stop
    assert "steady in 1 of 2 blocks" in decision.reason


def test_a_faint_consensus_is_not_taken_for_a_settled_one() -> None:
    """Of small organs no pixel may be in half of the proposals: two empty majorities agree, but nothing has settled."""
    rng = np.random.default_rng(9)
    masks = np.zeros((32, 40, 40), bool)
    for mask in masks:
        row, column = rng.integers(5, 31, 2)
        mask[row : row + 4, column : column + 4] = True
    assert not (masks.mean(0) > 0.5).any()
    assert run(masks, AdaptiveStopping(maximum=32))[-1].proposals == 32


def test_blocks_never_pass_the_maximum() -> None:
    stopping = AdaptiveStopping(block=4, minimum=1, maximum=10)
    assert [stopping.next_block(n) for n in (0, 4, 8, 10, 12)] == [4, 4, 2, 0, 0]


@pytest.mark.parametrize("numbers", [{"block": 0}, {"minimum": 0}, {"minimum": 9, "maximum": 8}, {"settled": 0}])
def test_impossible_settings_are_refused(numbers: dict[str, int]) -> None:
    with pytest.raises(InputError):
        AdaptiveStopping(**numbers)
