"""Figures of the tables against values that were worked out by hand."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest

from experiments.samples import Samples
from experiments.tables import ablations, n_curve, ranking, raters
from experiments.tables.proposals import kept_numbers, thinned
from experiments.tables.records import MEAN, Record, cell, fact, groups, interval, numbers, size
from experiments.tables.setup import TableResult, plain
from progidiff.evaluation.metrics import dice
from progidiff.evaluation.summary import patient_bootstrap

NAN = float("nan")


def bars(*ends: tuple[int, int], length: int = 20) -> np.ndarray:
    """One mask per half-open range of columns, in the middle row of three."""
    masks = np.zeros((len(ends), 3, length), bool)
    for mask, (first, last) in zip(masks, ends, strict=True):
        mask[1, first:last] = True
    return masks


TRUTH = bars((5, 15))[0]
#: Dice with the truth: 1.0, 0.8, 0.5, 0.
PROPOSALS = bars((5, 15), (7, 17), (10, 20), (16, 20))
DICE = (1.0, 0.8, 0.5, 0.0)


def record(value: float, patient: str = "a", target: str = "liver", name: str = "set") -> Record:
    return Record(name, target, patient, {"x": value})


def test_a_mean_counts_every_target_once_and_its_interval_is_of_patients() -> None:
    livers = [record(0.9), record(0.7), record(0.5, "b"), record(NAN, "c")]
    pancreas = [record(0.2, "b", "pancreas")]
    one = interval(livers, "x")
    assert one == patient_bootstrap({"a": [0.9, 0.7], "b": [0.5], "c": [NAN]})
    assert (one.mean, one.values, one.patients, one.missing) == (pytest.approx(0.7), 3, 2, 1)
    assert (one.low, one.high) == (pytest.approx(0.5), pytest.approx(0.8))  # only b, only a
    both = interval(livers + pancreas, "x")
    assert both.mean == pytest.approx((0.7 + 0.2) / 2)
    assert both.low == pytest.approx((0.5 + 0.2) / 2)  # b twice
    assert both.high == pytest.approx(0.8)  # a twice: the pancreas is not in such a draw
    assert np.isnan(interval(livers[:2], "x").low)
    assert np.isnan(interval(livers, "unknown").mean)


def test_groups_sizes_and_cells() -> None:
    records = [record(0.9), record(0.7, "b"), record(0.5, "b", "spleen"), record(0.1, name="other")]
    assert [(name, target, len(chosen)) for name, target, chosen in groups(records)] == [
        ("set", "liver", 2),
        ("set", "spleen", 1),
        ("set", MEAN, 3),
        ("other", "liver", 1),
    ]
    assert size(records[:3]) == "3 / 2"
    assert cell(interval(records[:2], "x")) == "0.800 (0.700-0.900)"
    assert cell(interval(records[3:], "x")) == "0.100"
    assert cell(interval([], "x")) == "–"
    assert cell(interval([record(-0.2), record(0.1, "b")], "x"), 1) == "-0.1 (-0.2 to 0.1)"
    assert fact(interval(records[3:], "x"))["pairs"] == 1
    assert numbers(records) == (
        "set: 3 pairs of slice and target, 2 patients; other: 1 pairs of slice and target, 1 patient."
    )
    assert [thinned(n) for n in (1, 2, 3, 5)] == ["all slices", "every 2nd slice", "every 3rd slice", "every 5th slice"]
    assert kept_numbers(50) == [1, 2, 5, 10, 20, 50]
    assert kept_numbers(16) == [1, 2, 5, 10, 16]


def test_the_curve_takes_the_first_n() -> None:
    assert [dice(mask, TRUTH) for mask in PROPOSALS] == pytest.approx(DICE)
    order = [3, 2, 1, 0]  # worst first
    probability = np.where(TRUTH, 0.51, 0.2)
    samples = Samples(PROPOSALS[order], {2: probability}, (10.0, 10.0))
    values = n_curve.measure(samples, TRUTH, (1, 2, 4))
    for figure in ("rand_top_3", "rank1", "best", "mean", "consensus", "majority", "medoid", "staple"):
        assert values[f"1 {figure}"] == 0.0  # a single one is every ensemble of itself
    assert values["2 best"] == pytest.approx(0.5)
    assert values["2 mean"] == values["2 rand_top_3"] == pytest.approx(0.25)  # a pick among the two there are
    assert values["2 probability"] == 1.0
    assert np.isnan(values["4 probability"])  # not kept for 4
    assert values["4 rand_top_3"] == pytest.approx((1.0 + 0.8 + 0.5) / 3)
    assert values["4 best"] == 1.0
    assert values["4 mean"] == pytest.approx(sum(DICE) / 4)
    # more than half of the four: columns 10 to 14 (three of them), 15 to 16 (two: even, background), 16 (three)
    consensus = PROPOSALS.sum(0) > 2
    assert values["4 majority"] == pytest.approx(dice(consensus, TRUTH))
    # mean Dice to the others: 7-17 has 0.8, 0.7 and 2/14; 10-20 has 0.5, 0.7 and 8/14
    assert values["4 medoid"] == pytest.approx(0.5)


def test_adaptive_sampling_stops_where_the_engine_would() -> None:
    alike = Samples(np.repeat(TRUTH[None], 50, 0), {}, (1.0, 1.0))
    assert n_curve.measure(alike, TRUTH, (1,))["adaptive n"] == 12  # 4, then two blocks that change nothing
    rng = np.random.default_rng(0)
    random = Samples(rng.random((20, 3, 20)) > 0.5, {}, (1.0, 1.0))
    values = n_curve.measure(random, TRUTH, (20,))
    assert (values["adaptive n"], values["adaptive at maximum"]) == (20, 1)
    assert values["adaptive rank1"] == values["20 rank1"]
    # two kinds of proposals that alternate: they stay apart, but what they agree on is certain
    two = Samples(bars(*((5, 15), (5, 15), (0, 2)) * 16, (5, 15), (5, 15)), {}, (1.0, 1.0))
    values = n_curve.measure(two, TRUTH, (50,))
    assert values["adaptive n"] == 12
    assert values["adaptive rank1"] == 1.0
    few = Samples(np.repeat(TRUTH[None], 3, 0), {}, (1.0, 1.0))
    assert n_curve.measure(few, TRUTH, (3,))["adaptive n"] == 3


def test_regret_of_a_ranking() -> None:
    values = ranking.measure(Samples(PROPOSALS, {}, (1.0, 1.0)), TRUTH, "medoid")
    # medoid scores: (0.8 + 0.5 + 0) / 3, (0.8 + 0.7 + 1/7) / 3, (0.5 + 0.7 + 4/7) / 3, (0 + 1/7 + 4/7) / 3
    scores = [1.3 / 3, (1.5 + 1 / 7) / 3, (1.2 + 4 / 7) / 3, (5 / 7) / 3]
    assert np.argsort(scores)[::-1].tolist() == [2, 1, 0, 3]
    assert values["regret"] == pytest.approx(1.0 - 0.5)
    assert values["random"] == pytest.approx(1.0 - sum(DICE) / 4)
    assert values["shortlist_best"] == pytest.approx(0.0)  # the best one is third
    # ranks of scores 2 3 4 1 and of Dice 4 3 2 1: 1 - 6 * (4 + 0 + 4 + 0) / (4 * 15)
    assert values["spearman"] == pytest.approx(0.2)
    records = [
        Record("set", "liver", "a", {"random": 0.4, "regret": 0.1}),
        Record("set", "liver", "a", {"random": 0.2, "regret": 0.2}),
    ]
    assert ranking.recovered(records, 0) == pytest.approx(0.5)
    assert np.isnan(ranking.recovered([Record("set", "liver", "a", {"random": 0.0, "regret": 0.0})], 0))


def test_calibration_error_by_hand() -> None:
    confidence = np.array([0.05, 0.05, 0.95, 1.0])
    # bins 0 and 9: said 0.05 and 0.975 on average, true 0.5 and 0.5; half of the pixels in each
    truth = np.array([0.0, 1.0, 1.0, 0.0])
    assert raters.calibration_error(confidence, truth) == pytest.approx((0.45 + 0.475) / 2)
    assert raters.calibration_error(truth, truth) == 0.0
    one_bin = raters.calibration_error(confidence, truth, 1)
    assert one_bin == pytest.approx(abs(confidence.mean() - 0.5))


def test_proposals_against_two_raters() -> None:
    first, second = bars((5, 15), (5, 13))
    # distances 1 - IoU: a-first 0, a-second 0.2, b-first 1, b-second 1
    samples = Samples(bars((5, 15), (16, 20)), {2: np.where(first, 1.0, 0.0)}, (100.0, 100.0))
    values = raters.measure(samples, first, second)
    cross, within, between = (0 + 0.2 + 1 + 1) / 4, (0 + 1 + 1 + 0) / 4, (0 + 0.2 + 0.2 + 0) / 4
    assert values["ged"] == pytest.approx(2 * cross - within - between)
    assert values["best_first"] == 1.0
    assert values["best_second"] == values["human"] == pytest.approx(16 / 18)
    assert values["covered"] == 1.0  # columns 13 and 14 are in one of two proposals
    assert values["uncertain"] == pytest.approx(14 / 9)
    # 20 mm are less than a pixel here, so the box is columns 5 to 14: agreement is 0.5 on all of it
    truth = np.array([1.0] * 8 + [0.5] * 2)
    assert values["ece"] == pytest.approx(abs(0.5 - truth.mean()))
    assert values["brier"] == pytest.approx(((0.5 - truth) ** 2).mean())
    assert values["ece_probability"] == pytest.approx(1 - truth.mean())
    same = raters.measure(samples, first, first)
    assert np.isnan(same["covered"])
    assert same["human"] == 1.0


def test_absent_organs() -> None:
    empty = np.zeros((3, 20), bool)
    mostly_empty = Samples(np.stack([empty, empty, TRUTH]), {}, (5.0, 10.0))
    mostly_full = Samples(np.stack([empty, TRUTH, TRUTH]), {}, (1.0, 5.0))
    values = ablations.measure_absent(mostly_empty, mostly_full, TRUTH)
    assert values["rank1_full"] == 0.0
    assert np.isnan(values["area_cm2"])
    assert values["share_full"] == pytest.approx(1 / 3)
    assert values["everywhere_rank1_full"] == 1.0
    assert values["everywhere_share_full"] == pytest.approx(2 / 3)
    assert (values["twin_full"], values["twin_area_cm2"]) == (1.0, pytest.approx(5.0))
    values = ablations.measure_absent(mostly_full, mostly_empty, None)
    assert values["rank1_full"] == 1.0
    assert values["area_cm2"] == pytest.approx(0.5)
    assert values["everywhere_rank1_full"] == 0.0
    assert np.isnan(values["twin_full"])


def test_a_result_is_written_whole(tmp_path: Path) -> None:
    inner = TableResult("inner", "Inner", [], ["b"], [["2"]], {"y": float("inf")})
    result = TableResult("outer", "Outer", ["a note"], ["a | b"], [["1|2"], []], {"x": NAN, "n": 3}, (inner,))
    assert [p.name for p in result.write(tmp_path)] == ["outer.json", "outer.md"]
    content = json.loads((tmp_path / "outer.json").read_text("utf-8"))
    assert content["facts"] == {"x": None, "n": 3}
    assert content["rows"] == [["1|2"]]
    assert content["also"][0]["facts"] == {"y": None}
    text = (tmp_path / "outer.md").read_text("utf-8")
    assert "| 1\\|2 |" in text
    assert text.index("- a note") < text.index("## Inner")
    assert plain((1.0, [NAN])) == [1.0, [None]]


def iou_distance(a: np.ndarray, b: np.ndarray) -> float:
    union = (a | b).sum()
    return 0.0 if union == 0 else 1 - (a & b).sum() / union


def test_energy_distance_by_brute_force_with_empty_masks() -> None:
    rng = np.random.default_rng(3)
    samples, references = rng.random((5, 9, 9)) < 0.4, rng.random((3, 9, 9)) < 0.4
    samples[0] = references[0] = False

    def mean(x: np.ndarray, y: np.ndarray) -> float:
        return float(np.mean([iou_distance(a, b) for a in x for b in y]))

    expected = 2 * mean(samples, references) - mean(samples, samples) - mean(references, references)
    assert raters.generalized_energy_distance(samples, references) == pytest.approx(expected)
    assert raters.generalized_energy_distance(references, references) == pytest.approx(0.0)
    assert raters.generalized_energy_distance(samples[:1], references[:1]) == 0.0
