"""Metrics against brute force and MONAI, and the rules for empty masks."""

from __future__ import annotations

import math

import numpy as np
import pytest
from scipy.ndimage import binary_erosion, distance_transform_edt

from progidiff.evaluation.metrics import (
    dice,
    hd95,
    metric_library,
    nsd,
    presence,
    proposal_scores,
    spearman,
)
from progidiff.evaluation.summary import (
    patient_bootstrap,
)
from progidiff.proposals.ranking import rank
from progidiff.proposals.votes import gram_matrix

FULL = np.pad(np.ones((6, 8), dtype=bool), 10)
EMPTY = np.zeros_like(FULL)


def box(shape: tuple[int, ...], *slices: slice) -> np.ndarray:
    mask = np.zeros(shape, dtype=bool)
    mask[slices] = True
    return mask


@pytest.mark.parametrize("seed", range(6))
def test_dice_is_monais_where_the_reference_is_not_empty(seed: int) -> None:
    torch = pytest.importorskip("torch")
    from monai.metrics import DiceMetric

    rng = np.random.default_rng(seed)
    a, b = rng.random((2, 20, 30)) < rng.uniform(0.05, 0.9)
    metric = DiceMetric(include_background=True)
    metric(torch.from_numpy(a[None, None]).float(), torch.from_numpy(b[None, None]).float())
    assert dice(a, b) == pytest.approx(metric.aggregate().item(), abs=1e-6)
    assert dice(a, b) == dice(b, a)


def test_dice_by_hand() -> None:
    a, b = box((4, 4), slice(0, 2), slice(0, 2)), box((4, 4), slice(1, 3), slice(0, 2))
    assert dice(a, b) == 0.5
    assert dice(a, a) == 1.0
    assert dice(a.astype(np.uint8) * 255, b.astype(np.float32)) == 0.5


def test_an_absent_organ_has_no_dice_and_an_invented_one_has_zero() -> None:
    assert math.isnan(dice(EMPTY, EMPTY))
    assert dice(FULL, EMPTY) == 0.0
    assert dice(EMPTY, FULL) == 0.0
    assert [presence(*pair) for pair in ((FULL, FULL), (FULL, EMPTY), (EMPTY, FULL), (EMPTY, EMPTY))] == [
        "TP",
        "FP",
        "FN",
        "TN",
    ]


@pytest.mark.parametrize("metric", [dice, presence])
def test_masks_of_different_shapes_are_refused(metric: object) -> None:
    with pytest.raises(ValueError, match="shapes"):
        metric(np.ones((3, 4)), np.ones((4, 3)))  # type: ignore[operator]


def hd95_by_hand(a: np.ndarray, b: np.ndarray, spacing: tuple[float, ...]) -> float:
    """Distances of border pixels to the other border, the larger of the two 95th percentiles."""
    edges = [mask & ~binary_erosion(mask) for mask in (a, b)]
    far = [distance_transform_edt(~edge, sampling=spacing) for edge in edges]
    return max(np.percentile(far[1][edges[0]], 95), np.percentile(far[0][edges[1]], 95))


@pytest.mark.parametrize("spacing", [(1.0, 1.0), (0.7, 2.5)])
def test_hd95_in_millimetres_is_that_of_the_borders(spacing: tuple[float, float]) -> None:
    a = box((60, 60), slice(10, 40), slice(12, 44))
    b = box((60, 60), slice(14, 40), slice(12, 50))
    assert hd95(a, b, spacing) == pytest.approx(hd95_by_hand(a, b, spacing), rel=1e-5)


def test_hd95_in_three_dimensions() -> None:
    a = box((12, 30, 30), slice(2, 9), slice(5, 20), slice(5, 20))
    b = box((12, 30, 30), slice(2, 11), slice(5, 20), slice(5, 20))
    # The tops are two slices of 5 mm apart.
    assert hd95(a, b, (5.0, 0.8, 0.8)) == pytest.approx(10.0)


def test_nsd_counts_the_border_within_the_tolerance() -> None:
    a = box((60, 60), slice(10, 50), slice(10, 50))
    b = box((60, 60), slice(10, 50), slice(10, 52))
    assert nsd(a, a, (1.0, 1.0), 0.5) == pytest.approx(1.0)
    assert nsd(a, b, (1.0, 1.0), 2.0) == pytest.approx(1.0)
    # About one side of four is two pixels off.
    assert nsd(a, b, (1.0, 1.0), 1.0) == pytest.approx(0.75, abs=0.03)
    # In millimetres, the same two pixels are within reach where they are small.
    assert nsd(a, b, (0.4, 0.4), 1.0) == pytest.approx(1.0)


def test_distances_of_empty_masks_are_never_silent_numbers() -> None:
    spacing = (1.0, 1.0)
    assert math.isnan(hd95(EMPTY, EMPTY, spacing))
    assert hd95(FULL, EMPTY, spacing) == hd95(EMPTY, FULL, spacing) == math.inf
    assert math.isnan(nsd(EMPTY, EMPTY, spacing, 1.0))
    assert nsd(FULL, EMPTY, spacing, 1.0) == nsd(EMPTY, FULL, spacing, 1.0) == 0.0


def test_the_distance_library_is_named_with_its_version() -> None:
    import monai

    assert metric_library() == f"MONAI {monai.__version__}"


def test_proposal_scores() -> None:
    r, c = np.mgrid[:64, :64]
    masks = np.stack([(r - 32) ** 2 + (c - 32 - shift) ** 2 <= 150 for shift in (0, 2, -2, 9, 14)])
    truth = masks[1]
    values = [dice(mask, truth) for mask in masks]
    ranking = rank(gram_matrix(masks))
    scores = proposal_scores(values, ranking, k=3)
    assert ranking.order[0] == 0 or ranking.order[0] == 1
    assert scores.rank1 == values[ranking.order[0]]
    assert scores.mean == pytest.approx(np.mean(values))
    assert scores.best == 1.0
    assert scores.rand_top_k == pytest.approx(np.mean(sorted(values)[-3:]))
    assert scores.shortlist == pytest.approx(np.mean([values[i] for i in ranking.order[:3]]))
    assert scores.regret == pytest.approx(1.0 - scores.rank1)
    assert scores.spearman > 0.5
    assert scores.proposals == 5


def test_proposal_scores_of_an_absent_organ() -> None:
    masks = np.stack([FULL, EMPTY, EMPTY])
    values = [dice(mask, EMPTY) for mask in masks]
    scores = proposal_scores(values, rank(gram_matrix(masks)))
    assert math.isnan(scores.rank1)
    assert scores.mean == scores.best == 0.0
    assert math.isnan(scores.spearman)
    with pytest.raises(ValueError, match="do not fit"):
        proposal_scores(values[:2], rank(gram_matrix(masks)))
    with pytest.raises(ValueError, match="at least 1"):
        proposal_scores(values, rank(gram_matrix(masks)), k=0)


def test_spearman_ignores_what_is_unknown_and_ties_rightly() -> None:
    assert spearman([1, 2, 3, 4], [10, 20, 40, 30]) == pytest.approx(0.8)
    assert spearman([1, 2, 3, np.nan], [3, 2, 1, 9]) == pytest.approx(-1.0)
    assert spearman([1, 1, 2, 2], [1, 2, 3, 4]) == pytest.approx(2 / math.sqrt(5))
    assert math.isnan(spearman([1, 1, 1], [1, 2, 3]))
    assert math.isnan(spearman([1], [1]))


def test_bootstrap_over_patients_matches_theory_for_equal_patients() -> None:
    rng = np.random.default_rng(5)
    means = rng.normal(0.8, 0.05, 60)
    result = patient_bootstrap({f"p{i}": [m] * 4 for i, m in enumerate(means)}, seed=1)
    half = 1.96 * means.std() / math.sqrt(60)
    assert result.mean == pytest.approx(means.mean())
    assert (result.patients, result.values, result.missing) == (60, 240, 0)
    assert result.high - result.low == pytest.approx(2 * half, rel=0.1)


def test_bootstrap_does_not_take_slices_for_patients() -> None:
    values = np.random.default_rng(6).normal(0.8, 0.05, 200)
    by_slice = patient_bootstrap({f"s{i}": [v] for i, v in enumerate(values)})
    few = patient_bootstrap({f"p{i}": np.full(50, v) for i, v in enumerate(values[:4])})
    assert few.high - few.low > 3 * (by_slice.high - by_slice.low)


def test_bootstrap_is_repeatable_and_independent_of_the_order() -> None:
    values = {"b": [0.9, 0.8], "a": [0.5], "c": [float("nan"), 0.7]}
    result = patient_bootstrap(values, seed=3)
    assert result == patient_bootstrap(dict(reversed(values.items())), seed=3)
    assert result != patient_bootstrap(values, seed=4, resamples=50)
    assert (result.values, result.missing) == (4, 1)
    assert result.mean == pytest.approx(0.725)
    assert "3 patients" in str(result)


def test_bootstrap_claims_no_interval_for_one_patient_or_none() -> None:
    single = patient_bootstrap({"a": [0.5, 0.7], "b": [float("nan")]})
    assert single.mean == pytest.approx(0.6)
    assert math.isnan(single.low)
    assert math.isnan(single.high)
    assert str(single) == "0.600 (n = 2 in 1 patient)"
    assert str(patient_bootstrap({})) == "no values"
