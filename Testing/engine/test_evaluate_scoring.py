"""Metrics against brute force and MONAI, scores of proposals, and figures over cases."""

from __future__ import annotations

import math
from itertools import combinations, pairwise
from typing import Any

import numpy as np
import pytest
from scipy.ndimage import binary_erosion, distance_transform_edt

from progidiff.evaluation.metrics import dice, hd95, nsd, presence, proposal_scores, spearman
from progidiff.evaluation.scoring import (
    AnswerScore,
    Calibration,
    CalibrationCount,
    CaseResult,
    MaskScore,
    TargetResult,
    by_reference,
    dice_curve,
    expected_top,
    one,
    score_mask,
    several,
)
from progidiff.evaluation.summary import MEAN, calibration_error, patient_bootstrap, summarise_cases
from progidiff.proposals.ranking import rank
from progidiff.proposals.votes import gram_matrix

FULL = np.pad(np.ones((6, 8), dtype=bool), 10)
EMPTY = np.zeros_like(FULL)


def box(shape: tuple[int, ...], *slices: slice) -> np.ndarray:
    mask = np.zeros(shape, dtype=bool)
    mask[slices] = True
    return mask


@pytest.mark.parametrize("seed", range(2))
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
    assert dice(FULL, EMPTY) == dice(EMPTY, FULL) == 0.0
    assert math.isnan(hd95(EMPTY, EMPTY, (1, 1)))
    assert hd95(FULL, EMPTY, (1, 1)) == hd95(EMPTY, FULL, (1, 1)) == math.inf
    assert math.isnan(nsd(EMPTY, EMPTY, (1, 1), 1.0))
    assert nsd(FULL, EMPTY, (1, 1), 1.0) == nsd(EMPTY, FULL, (1, 1), 1.0) == 0.0
    pairs = ((FULL, FULL), (FULL, EMPTY), (EMPTY, FULL), (EMPTY, EMPTY))
    assert [presence(*pair) for pair in pairs] == ["TP", "FP", "FN", "TN"]


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


def test_nsd_counts_the_border_within_the_tolerance() -> None:
    a = box((60, 60), slice(10, 50), slice(10, 50))
    b = box((60, 60), slice(10, 50), slice(10, 52))
    assert nsd(a, a, (1.0, 1.0), 0.5) == pytest.approx(1.0)
    assert nsd(a, b, (1.0, 1.0), 2.0) == pytest.approx(1.0)
    # About one side of four is two pixels off.
    assert nsd(a, b, (1.0, 1.0), 1.0) == pytest.approx(0.75, abs=0.03)
    # In millimetres, the same two pixels are within reach where they are small.
    assert nsd(a, b, (0.4, 0.4), 1.0) == pytest.approx(1.0)


def test_proposal_scores() -> None:
    r, c = np.mgrid[:64, :64]
    masks = np.stack([(r - 32) ** 2 + (c - 32 - shift) ** 2 <= 150 for shift in (0, 2, -2, 9, 14)])
    values = [dice(mask, masks[1]) for mask in masks]
    ranking = rank(gram_matrix(masks))
    scores = proposal_scores(values, ranking, k=3)
    assert (scores.rank1, scores.best, scores.proposals) == (values[ranking.order[0]], 1.0, 5)
    assert scores.mean == pytest.approx(np.mean(values))
    assert scores.rand_top_k == pytest.approx(np.mean(sorted(values)[-3:]))
    assert scores.shortlist == pytest.approx(np.mean([values[i] for i in ranking.order[:3]]))
    assert scores.regret == pytest.approx(1.0 - scores.rank1)
    assert scores.spearman > 0.5


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


def test_bootstrap_is_repeatable_and_claims_no_interval_for_one_patient_or_none() -> None:
    values = {"b": [0.9, 0.8], "a": [0.5], "c": [float("nan"), 0.7]}
    result = patient_bootstrap(values, seed=3)
    assert result == patient_bootstrap(dict(reversed(values.items())), seed=3)
    assert result != patient_bootstrap(values, seed=4, resamples=50)
    assert (result.values, result.missing, result.mean) == (4, 1, pytest.approx(0.725))
    single = patient_bootstrap({"a": [0.5, 0.7], "b": [float("nan")]})
    assert single.mean == pytest.approx(0.6)
    assert math.isnan(single.low)
    assert math.isnan(single.high)
    assert str(single) == "0.600 (n = 2 in 1 patient)"
    assert str(patient_bootstrap({})) == "no values"


def disc(radius: float, shape: tuple[int, ...] = (60, 70), centre: float = 30.0) -> np.ndarray:
    grid = np.indices(shape)
    return np.asarray(sum((axis - centre) ** 2 for axis in grid) <= radius**2)


@pytest.mark.parametrize("shape", [(60, 70), (24, 28, 26)])
def test_the_box_changes_no_distance(shape: tuple[int, ...]) -> None:
    spacing = (2.5, 0.8, 0.7)[-len(shape) :]
    centre = 0.0  # touches the array's edge, where a box must not cut differently
    a, b = disc(9, shape, centre), disc(12, shape, centre)
    score = score_mask(a, b, spacing, 1.0)
    assert score.hd95_mm == pytest.approx(hd95(a, b, spacing))
    assert score.nsd == pytest.approx(nsd(a, b, spacing, 1.0))
    assert score.presence == "TP"


def test_empty_masks_have_one_definition() -> None:
    full, empty = disc(8), np.zeros((60, 70), bool)
    assert score_mask(empty, empty, (1, 1), 2.0) == MaskScore(presence="TN", dice=None)
    for prediction, reference, name in ((full, empty, "FP"), (empty, full, "FN")):
        score = score_mask(prediction, reference, (1, 1), 2.0)
        assert score == MaskScore(presence=name, dice=0.0, hd95_mm=None, nsd=0.0)
        assert one(score).hd95_failures == 1.0
    assert score_mask(full, full, (1, 1), None) == MaskScore(presence="TP", dice=1.0)


def scores(*values: float) -> list[MaskScore]:
    return [
        MaskScore(presence="TP", dice=v, hd95_mm=10 * (1 - v), nsd=v) if v else MaskScore(presence="FN", dice=0.0, nsd=0.0)
        for v in values
    ]


def test_mean_best_and_rand_top_k() -> None:
    answers = by_reference(scores(0.5, 0.9, 0.0, 0.7), 2)
    assert answers["mean"].dice == pytest.approx(0.525)
    assert answers["mean"].hd95_mm == pytest.approx((5 + 1 + 3) / 3)
    assert answers["mean"].hd95_failures == 0.25
    assert answers["best"].dice == 0.9
    assert answers["best"].hd95_mm == pytest.approx(1)
    assert answers["rand_top_k"].dice == pytest.approx(0.8)
    assert answers["rand_top_k"].hd95_failures == 0
    assert several(scores(0.0, 0.0)).hd95_mm is None


@pytest.mark.parametrize(("n", "k"), [(1, 2), (3, 1), (5, 3), (6, 3)])
def test_expectations_are_those_over_all_choices(n: int, k: int) -> None:
    values = [0.9, 0.8, 0.8, 0.4, 0.1, 0.0]
    brute = np.mean([np.mean(sorted(choice)[::-1][:k]) for choice in combinations(values, n)])
    assert expected_top(values, n, k) == pytest.approx(brute)


def test_the_curve_ends_at_what_is_reported() -> None:
    masks = np.stack([disc(radius) for radius in (6, 8, 9, 10, 12)])
    reference = disc(9)
    values = [2 * (m & reference).sum() / (m.sum() + reference.sum()) for m in masks]
    gram = gram_matrix(masks)
    curve = dice_curve(values, gram, 3)
    assert [point.proposals for point in curve] == [1, 2, 4, 5]
    assert curve[0].rank1 == values[0]
    assert curve[-1].rank1 == values[rank(gram).order[0]]
    assert curve[-1].best == pytest.approx(max(values))
    assert curve[-1].rand_top_k == pytest.approx(np.mean(sorted(values)[::-1][:3]))
    assert curve[0].best == pytest.approx(np.mean(values))
    assert all(a.best <= b.best for a, b in pairwise(curve))


def test_calibration_counts_pixels_that_matter() -> None:
    count = CalibrationCount()
    probability = np.array([[0.0, 0.005, 0.25, 0.25, 1.0, 0.0]])
    count.add(probability, np.array([[False, False, True, False, True, True]]))
    result = count.result()
    assert result.pixels == [1, 0, 2, 0, 0, 0, 0, 0, 0, 1]
    assert result.positive == [1, 0, 1, 0, 0, 0, 0, 0, 0, 1]
    assert calibration_error(result) == pytest.approx((1 + abs(0.5 - 1)) / 4)
    assert calibration_error(Calibration(pixels=[0] * 10, predicted=[0] * 10, positive=[0] * 10)) is None


def case(name: str, patient: str, **dice: float | None) -> CaseResult:
    """A case whose answers all have one Dice; ``None`` is a target that is absent and was left out."""
    targets = []
    for target, value in dice.items():
        kind = "TN" if value is None else "TP" if value else "FN"
        answer = AnswerScore(dice=value, hd95_mm=5.0 if value else None, hd95_failures=float(value == 0), presence=kind)
        rest = answer.model_copy(update={"presence": None})
        answers = {"rank1": answer, "medoid": answer, "consensus": answer, "ensemble": answer}
        answers |= {} if value is None else {"mean": rest, "best": rest, "rand_top_k": rest}
        counts = Calibration(pixels=[1] * 10, predicted=[0.5] * 10, positive=[1] * 10)
        facts: Any = {"size": 1.0, "proposals": [], "scores": [], "first": 0, "spearman": None, "diversity": 1.0}
        facts |= {"empty_share": float(not value), "calibration": counts}
        targets.append(TargetResult(target=target, present=value is not None, answers=answers, **facts))
    return CaseResult(
        set="s", name=name, patient=patient, dimensions=2, slices=1, modality="CT", plane="axial", targets=targets
    )


def test_a_row_per_target_and_their_mean() -> None:
    cases = [
        case("1", "a", liver=0.9, spleen=0.0),
        case("2", "a", liver=0.7, spleen=None),
        case("3", "b", liver=0.5, spleen=0.6),
    ]
    liver, spleen, mean = summarise_cases(cases)
    assert (liver.cases, liver.patients, liver.absent) == (3, 2, 0)
    assert liver.answers["rank1"].dice.mean == pytest.approx(0.7)
    expected = patient_bootstrap({"a": [0.9, 0.7], "b": [0.5]})
    assert (liver.answers["rank1"].dice.low, liver.answers["rank1"].dice.high) == (expected.low, expected.high)
    assert (spleen.cases, spleen.absent, spleen.absent_empty_share) == (2, 1, 1.0)
    assert spleen.answers["rank1"].dice.mean == pytest.approx(0.3)
    assert spleen.answers["rank1"].hd95_failures == 1
    assert spleen.answers["rank1"].hd95_mm.values == 1
    assert spleen.answers["ensemble"].presence == {"TP": 1, "FP": 0, "FN": 1, "TN": 1}
    assert mean.target == MEAN
    assert mean.answers["rank1"].dice.mean == pytest.approx(0.5)
    assert (mean.cases, mean.patients) == (3, 2)


def test_the_mean_over_targets_draws_patients_once() -> None:
    values = {"liver": {"a": [1.0], "b": [0.0]}, "spleen": {"a": [0.0], "b": [1.0]}}
    figure = patient_bootstrap(*values.values())
    # patients' organs cancel out: drawn one by one the interval would be wide
    assert (figure.mean, figure.low, figure.high) == (0.5, 0.5, 0.5)
    single = patient_bootstrap({"a": [0.2, 0.4]})
    assert single.mean == pytest.approx(0.3)
    assert math.isnan(single.low)
    assert math.isnan(patient_bootstrap({}).mean)
    # a target that no drawn patient has is left out of that draw
    figure = patient_bootstrap({"a": [0.5], "b": [0.5]}, {"a": [0.9]})
    assert (figure.mean, figure.low, figure.high) == (pytest.approx(0.7), pytest.approx(0.5), pytest.approx(0.7))
