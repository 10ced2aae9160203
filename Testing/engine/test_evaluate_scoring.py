"""Scores of proposals and figures over cases, against brute force and by hand."""

from __future__ import annotations

import math
from itertools import combinations, pairwise

import numpy as np
import pytest

from progidiff.evaluation.metrics import hd95, nsd
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


@pytest.mark.parametrize("n", [1, 2, 3, 5, 6])
@pytest.mark.parametrize("k", [1, 2, 3])
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
        targets.append(
            TargetResult(
                target=target,
                present=value is not None,
                size=1.0,
                answers=answers,
                proposals=[],
                scores=[],
                first=0,
                spearman=None,
                diversity=1.0,
                empty_share=float(not value),
                calibration=Calibration(pixels=[1] * 10, predicted=[0.5] * 10, positive=[1] * 10),
            )
        )
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


def test_a_target_that_no_drawn_patient_has_is_left_out_of_that_draw() -> None:
    figure = patient_bootstrap({"a": [0.5], "b": [0.5]}, {"a": [0.9]})
    assert figure.mean == pytest.approx(0.7)
    assert figure.low == pytest.approx(0.5)
    assert figure.high == pytest.approx(0.7)
