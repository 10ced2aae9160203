"""Ensembles against SimpleITK, an own expectation maximisation and brute force."""

from __future__ import annotations

import numpy as np
import pytest
import SimpleITK as sitk

from progidiff.ranking.ensembles import (
    agreement,
    consensus,
    consensus_level,
    majority,
    mean_probability,
    staple,
    volume_spread,
)


def raters(seed: int, count: int = 5, shape: tuple[int, ...] = (30, 40)) -> np.ndarray:
    """One shape as raters of different quality draw it; they touch the whole box of the image."""
    rng = np.random.default_rng(seed)
    truth = np.zeros(shape, dtype=bool)
    truth[tuple(slice(n // 4, 3 * n // 4) for n in shape)] = True
    flip = rng.random((count, *shape)) < rng.uniform(0.02, 0.2, (count,) + (1,) * len(shape))
    masks = truth[None] ^ flip
    masks[0][(0,) * len(shape)] = masks[0][tuple(n - 1 for n in shape)] = True
    return masks


def staple_by_hand(masks: np.ndarray, iterations: int = 200) -> np.ndarray:
    """Warfield's expectation maximisation with a spatially constant prior, written out."""
    decisions = masks.reshape(len(masks), -1).astype(float)
    prior = decisions.mean()
    p, q = np.full(len(masks), 0.99999), np.full(len(masks), 0.99999)
    weights = np.zeros(decisions.shape[1])
    for _ in range(iterations):
        a = prior * np.prod(np.where(decisions == 1, p[:, None], 1 - p[:, None]), axis=0)
        b = (1 - prior) * np.prod(np.where(decisions == 0, q[:, None], 1 - q[:, None]), axis=0)
        weights = a / (a + b)
        p = (decisions * weights).sum(axis=1) / weights.sum()
        q = ((1 - decisions) * (1 - weights)).sum(axis=1) / (1 - weights).sum()
    return weights.reshape(masks.shape[1:])


def test_agreement_is_the_share_of_proposals() -> None:
    masks = raters(1, 7)
    result = agreement(masks)
    assert result.dtype == np.float32
    assert np.allclose(result, masks.sum(axis=0) / 7)


@pytest.mark.parametrize("count", [1, 2, 3, 6])
def test_majority_needs_more_than_half(count: int) -> None:
    masks = raters(2, count)
    expected = np.array([sum(votes) > count / 2 for votes in masks.reshape(count, -1).T])
    assert np.array_equal(majority(masks).ravel(), expected)


@pytest.mark.parametrize("count", [1, 2, 5, 16])
def test_the_consensus_has_the_highest_expected_dice(count: int) -> None:
    masks = raters(9, count)
    votes = masks.sum(axis=0)
    mean_size = masks.reshape(count, -1).sum(axis=1).mean()

    def expected_dice(level: int) -> float:
        mask = votes >= level
        overlap = np.mean([(mask & proposal).sum() for proposal in masks])
        return float(2 * overlap / (mask.sum() + mean_size))

    best = max(range(1, count + 1), key=lambda level: (expected_dice(level), level))
    assert consensus_level(np.bincount(votes.ravel(), minlength=count + 1), count) == best
    assert np.array_equal(consensus(masks), votes >= best)


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


def test_majority_is_itks_label_vote_for_an_odd_number() -> None:
    masks = raters(3, 5)
    voted = sitk.LabelVoting([sitk.GetImageFromArray(mask.astype(np.uint8)) for mask in masks], 255)
    assert np.array_equal(majority(masks), sitk.GetArrayFromImage(voted) == 1)


def test_mean_probability_and_its_mask() -> None:
    probabilities = np.random.default_rng(4).random((6, 8, 9)).astype(np.float32)
    mask, mean = mean_probability(probabilities)
    assert np.allclose(mean, np.mean(probabilities, axis=0))
    assert mean.dtype == np.float32
    assert np.array_equal(mask, mean > 0.5)
    assert mean_probability(probabilities, 0.3)[0].sum() > mask.sum()


def test_mean_of_half_precision_does_not_lose_small_probabilities() -> None:
    probabilities = np.full((4096, 1, 2), 0.1, dtype=np.float16)
    assert mean_probability(probabilities)[1] == pytest.approx(float(np.float16(0.1)), abs=1e-6)


@pytest.mark.parametrize("shape", [(30, 40), (10, 12, 14)])
def test_staple_is_simpleitks_on_the_same_grid(shape: tuple[int, ...]) -> None:
    masks = raters(5, 5, shape)
    reference = sitk.STAPLEImageFilter()
    reference.SetForegroundValue(1.0)
    reference.SetMaximumIterations(100)
    expected = reference.Execute([sitk.GetImageFromArray(mask.astype(np.uint8)) for mask in masks])
    result = staple(masks)
    assert np.allclose(result.probability, sitk.GetArrayFromImage(expected), atol=1e-6)
    assert np.allclose(result.sensitivity, reference.GetSensitivity())
    assert np.allclose(result.specificity, reference.GetSpecificity())


@pytest.mark.parametrize("seed", range(3))
def test_staple_agrees_with_the_published_algorithm(seed: int) -> None:
    masks = raters(seed, 6)
    assert np.allclose(staple(masks).probability, staple_by_hand(masks), atol=1e-3)


def test_staple_does_not_depend_on_the_background_around_the_organ() -> None:
    masks = raters(6, 4)
    wide = np.pad(masks, ((0, 0), (50, 60), (70, 10)))
    inner, outer = staple(masks), staple(wide)
    assert np.array_equal(outer.probability[50:80, 70:110], inner.probability)
    assert outer.probability.sum() == pytest.approx(inner.probability.sum())


def test_staple_trusts_careful_raters_more_than_a_careless_one() -> None:
    rng = np.random.default_rng(8)
    truth = np.zeros((40, 40), dtype=bool)
    truth[10:30, 10:30] = True
    noise = [0.02, 0.02, 0.35]
    masks = np.stack([truth ^ (rng.random(truth.shape) < n) for n in noise])
    result = staple(masks)
    assert result.sensitivity[2] < min(result.sensitivity[:2])
    assert result.specificity[2] < min(result.specificity[:2])
    assert (result.mask == truth).mean() > (masks[2] == truth).mean()


@pytest.mark.parametrize("count", [1, 4])
def test_staple_of_identical_masks_is_the_mask(count: int) -> None:
    masks = np.repeat(raters(9, 1), count, axis=0)
    result = staple(masks)
    assert np.array_equal(result.mask, masks[0])
    assert np.array_equal(result.probability, masks[0].astype(np.float32))
    assert np.array_equal(result.sensitivity, np.ones(count))


def test_staple_of_empty_masks_is_empty() -> None:
    result = staple(np.zeros((3, 5, 6), dtype=bool))
    assert not result.mask.any()
    assert not result.probability.any()
    assert np.isnan(result.sensitivity).all()
    assert np.array_equal(result.specificity, np.ones(3))


@pytest.mark.parametrize("empty", [1, 3])
def test_staple_with_some_empty_masks_is_finite(empty: int) -> None:
    masks = raters(10, 5)
    masks[:empty] = False
    result = staple(masks)
    assert np.isfinite(result.probability).all()
    assert result.mask.shape == masks.shape[1:]


def test_staple_of_disjoint_masks_is_finite_and_repeatable() -> None:
    masks = np.zeros((2, 10, 10), dtype=bool)
    masks[0, :3, :3] = masks[1, 6:, 6:] = True
    result = staple(masks)
    assert np.isfinite(result.probability).all()
    assert np.array_equal(result.probability, staple(masks).probability)


@pytest.mark.parametrize("function", [agreement, majority, staple, mean_probability])
def test_no_proposals_are_refused(function: object) -> None:
    with pytest.raises(ValueError, match="proposals"):
        function(np.zeros((0, 4, 4), dtype=bool))  # type: ignore[operator]


def test_volume_spread() -> None:
    values = np.random.default_rng(11).normal(1500, 50, 200)
    spread = volume_spread(values.tolist())
    assert spread.mean == pytest.approx(values.mean())
    assert spread.sd == pytest.approx(np.std(values, ddof=1))
    assert spread.low < spread.median < spread.high
    assert ((values >= spread.low) & (values <= spread.high)).mean() == pytest.approx(0.9, abs=0.01)
    single = volume_spread([12.5])
    assert (single.mean, single.sd, single.low, single.high) == (12.5, 0.0, 12.5, 12.5)
    with pytest.raises(ValueError, match="no volumes"):
        volume_spread([])
