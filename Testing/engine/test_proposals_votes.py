"""Overlaps against brute force, ensembles against SimpleITK, adaptive stopping case by case and against simulation."""

from __future__ import annotations

import numpy as np
import pytest
import SimpleITK as sitk

from progidiff.errors import InputError
from progidiff.proposals import votes
from progidiff.proposals.votes import (
    AdaptiveStopping,
    Overlap,
    StopDecision,
    agreement,
    consensus,
    consensus_level,
    consensus_overlap,
    finished,
    gram_matrix,
    grow_gram,
    majority,
    mean_dice_half_width,
    mean_pairwise_dice,
    pairwise_dice,
    staple,
    staple_probability,
)


def brute_force(masks: np.ndarray) -> np.ndarray:
    return np.array([[np.logical_and(a, b).sum() for b in masks] for a in masks], dtype=float)


def random_masks(seed: int, shape: tuple[int, ...]) -> np.ndarray:
    rng = np.random.default_rng(seed)
    return rng.random(shape) < rng.uniform(0.05, 0.9, (shape[0],) + (1,) * (len(shape) - 1))


@pytest.mark.parametrize("shape", [(1, 5, 5), (9, 4, 13, 11)])
def test_gram_matrix_is_every_pairs_intersection(shape: tuple[int, ...], monkeypatch: pytest.MonkeyPatch) -> None:
    masks = random_masks(1, shape)
    assert np.array_equal(gram_matrix(masks), brute_force(masks))
    monkeypatch.setattr(votes, "_CHUNK", 37)
    assert np.array_equal(gram_matrix(masks), brute_force(masks)), "chunks add up"
    assert np.array_equal(gram_matrix(masks.astype(np.uint8) * 255), brute_force(masks))


def test_counts_beyond_the_precision_of_float32_stay_exact() -> None:
    # 2**24 + 1 is the first count that float32 cannot hold.
    masks = np.ones((1, 2**24 + 1), dtype=bool)
    assert gram_matrix(masks)[0, 0] == 2**24 + 1


def test_a_stack_built_slice_by_slice_and_block_by_block_equals_the_whole() -> None:
    stack = random_masks(3, (11, 6, 20, 15))
    gram = np.zeros((0, 0))
    for start, stop in ((0, 4), (4, 8), (8, 11)):
        for k in range(6):
            gram = grow_gram(gram, stack[:start, k], stack[start:stop, k])
        assert np.array_equal(gram, brute_force(stack[:stop]))
    with pytest.raises(ValueError, match="voxels"):
        grow_gram(gram, stack[:, 0], stack[:4, 0, :5])


def test_pairwise_dice_with_empty_masks() -> None:
    masks = np.array([[0, 0, 0], [0, 0, 0], [1, 1, 0], [0, 1, 1]], dtype=bool)
    expected = [[1, 1, 0, 0], [1, 1, 0, 0], [0, 0, 1, 0.5], [0, 0, 0.5, 1]]
    assert np.allclose(pairwise_dice(gram_matrix(masks)), expected)


def test_mean_pairwise_dice_is_the_mean_over_different_pairs() -> None:
    masks = random_masks(6, (7, 12, 12))
    pairs = [2 * (masks[i] & masks[j]).sum() / (masks[i].sum() + masks[j].sum()) for i in range(7) for j in range(i)]
    assert mean_pairwise_dice(gram_matrix(masks)) == pytest.approx(np.mean(pairs))
    assert mean_pairwise_dice(gram_matrix(masks[:1])) == 1.0


def raters(seed: int, count: int = 5, shape: tuple[int, ...] = (30, 40)) -> np.ndarray:
    """One shape as raters of different quality draw it; they touch the whole box of the image."""
    rng = np.random.default_rng(seed)
    truth = np.zeros(shape, dtype=bool)
    truth[tuple(slice(n // 4, 3 * n // 4) for n in shape)] = True
    flip = rng.random((count, *shape)) < rng.uniform(0.02, 0.2, (count,) + (1,) * len(shape))
    masks = truth[None] ^ flip
    masks[0][(0,) * len(shape)] = masks[0][tuple(n - 1 for n in shape)] = True
    return masks


def test_agreement_is_the_share_of_proposals() -> None:
    masks = raters(1, 7)
    result = agreement(masks)
    assert result.dtype == np.float32
    assert np.allclose(result, masks.sum(axis=0) / 7)


@pytest.mark.parametrize("count", [1, 2, 3])
def test_majority_needs_more_than_half(count: int) -> None:
    masks = raters(2, count)
    expected = np.array([sum(column) > count / 2 for column in masks.reshape(count, -1).T])
    assert np.array_equal(majority(masks).ravel(), expected)


@pytest.mark.parametrize("count", [1, 2, 5, 16])
def test_the_consensus_has_the_highest_expected_dice(count: int) -> None:
    masks = raters(9, count)
    counts = masks.sum(axis=0)
    mean_size = masks.reshape(count, -1).sum(axis=1).mean()

    def expected_dice(level: int) -> float:
        mask = counts >= level
        overlap = np.mean([(mask & proposal).sum() for proposal in masks])
        return float(2 * overlap / (mask.sum() + mean_size))

    best = max(range(1, count + 1), key=lambda level: (expected_dice(level), level))
    assert consensus_level(np.bincount(counts.ravel(), minlength=count + 1), count) == best
    assert np.array_equal(consensus(masks), counts >= best)


def test_the_consensus_of_scattered_proposals_is_not_empty_but_of_mostly_empty_ones_it_is() -> None:
    masks = np.zeros((4, 20), dtype=bool)
    for number in range(4):
        masks[number, 5 * number : 5 * number + 5] = True
    assert not majority(masks).any()
    assert consensus(masks).all()
    masks[1:] = False
    assert not consensus(masks).any()
    masks[1, :5] = True  # two of four
    assert np.array_equal(consensus(masks), masks[0])
    assert not consensus(np.zeros((3, 4, 4), dtype=bool)).any()


def staple_by_pattern(masks: np.ndarray) -> np.ndarray:
    """Probability of each voxel, every voxel being a pattern of its own."""
    ballots = masks.reshape(len(masks), -1).T.astype(np.float64)
    return finished(staple_probability(ballots, np.ones(len(ballots)))).reshape(masks.shape[1:])


def staple_of_itk(masks: np.ndarray) -> np.ndarray:
    reference = sitk.STAPLEImageFilter()
    reference.SetForegroundValue(1.0)
    reference.SetMaximumIterations(100)
    rows = masks.reshape(len(masks), 1, -1).astype(np.uint8)
    found = reference.Execute([sitk.GetImageFromArray(row) for row in rows])
    return np.asarray(sitk.GetArrayFromImage(found)).reshape(masks.shape[1:])


@pytest.mark.parametrize("shape", [(30, 40), (10, 12, 14)])
def test_staple_is_simpleitks_on_the_same_grid(shape: tuple[int, ...]) -> None:
    masks = raters(5, 5, shape)
    expected = staple_of_itk(masks)
    assert np.allclose(staple_by_pattern(masks), expected, atol=1e-6)
    assert np.array_equal(staple(masks), expected >= 0.5)


@pytest.mark.parametrize("count", [2, 17])
def test_staple_of_proposals_that_follow_one_truth_is_simpleitks(count: int) -> None:
    rng = np.random.default_rng(4)
    k, j, i = np.meshgrid(*(np.arange(n) for n in (9, 28, 31)), indexing="ij")
    truth = (k - 4) ** 2 / 9 + (j - 14) ** 2 / 80 + (i - 13) ** 2 / 110 < 1
    masks = np.stack([truth ^ (rng.random(truth.shape) < 0.02 + 0.01 * n) for n in range(count)])
    assert np.array_equal(staple(masks), staple_of_itk(masks) >= 0.5)


def test_staple_does_not_depend_on_the_background_around_the_organ() -> None:
    masks = raters(6, 4)
    wide = np.pad(masks, ((0, 0), (50, 60), (70, 10)))
    inner, outer = staple(masks), staple(wide)
    assert np.array_equal(outer[50:80, 70:110], inner)
    assert outer.sum() == inner.sum()


def test_empty_slices_between_others_are_background_to_staple_and_those_beyond_are_not() -> None:
    masks = np.zeros((3, 7, 12, 12), dtype=bool)
    masks[:, (1, 4)] = raters(12, 3, (2, 12, 12))
    inner = masks[:, 1:5]
    expected = staple_of_itk(inner) >= 0.5
    assert np.array_equal(staple(masks)[1:5], expected)
    assert np.array_equal(staple(inner), expected)


@pytest.mark.parametrize("empty", [1, 3])
def test_staple_with_some_empty_masks_is_finite(empty: int) -> None:
    masks = raters(10, 5)
    masks[:empty] = False
    assert np.isfinite(staple_by_pattern(masks)).all()
    assert staple(masks).shape == masks.shape[1:]
    masks[:] = False
    assert not staple(masks).any()
    same = np.repeat(raters(9, 1), empty, axis=0)
    assert np.array_equal(staple(same), same[0])


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
    for _ in range(100):
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


def test_a_block_that_moves_the_consensus_starts_the_count_again() -> None:
    gram = np.full((12, 12), 100.0)
    stopping = AdaptiveStopping()
    decisions = [stopping.update(gram, dice) for dice in (None, 0.999, 0.9, 0.999, 0.999)]
    assert [decision.stop for decision in decisions] == [False, False, False, False, True]
    assert "steady in 1 of 2 blocks" in decisions[3].reason
    few = AdaptiveStopping(minimum=13)
    decisions = [few.update(gram, dice) for dice in (None, 1.0, 1.0)]
    assert not decisions[-1].stop
    assert "12 of at least 13" in decisions[-1].reason


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
