"""Figures over all evaluated cases: per organ and over organs, with their numbers and patient-bootstrap intervals."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np
from pydantic import Field

from progidiff.evaluation.metrics import Presence
from progidiff.evaluation.scoring import (
    ANSWERS,
    CALIBRATION_BINS,
    SINGLE,
    Calibration,
    CaseResult,
    CurvePoint,
    Part,
    TargetResult,
    mean_of,
)

#: Name of the row that averages the targets of a set.
MEAN = "mean of targets"

ByPatient = Mapping[str, Sequence[float]]


@dataclass(frozen=True)
class BootstrapInterval:
    """A mean and its bootstrap confidence interval over patients.

    Attributes:
        mean: mean over all known values.
        low, high: percentile interval; NaN with fewer than two patients, where it cannot be estimated.
        patients: patients with at least one known value.
        values: number of known values.
        missing: number of NaN values that were left out.
    """

    mean: float
    low: float
    high: float
    patients: int
    values: int
    missing: int

    def __str__(self) -> str:
        if np.isnan(self.mean):
            return "no values"
        size = f"n = {self.values} in {self.patients} patient{'s' if self.patients != 1 else ''}"
        if np.isnan(self.low):
            return f"{self.mean:.3f} ({size})"
        return f"{self.mean:.3f} ({self.low:.3f}-{self.high:.3f}; {size})"


def patient_bootstrap(
    *by_target: Mapping[str, Sequence[float]], seed: int = 0, resamples: int = 2000, level: float = 0.95
) -> BootstrapInterval:
    """Mean over targets of each target's mean over all its values, and its percentile bootstrap interval over patients.

    Slices of one patient are alike, so a bootstrap over slices would claim too much. Patients are drawn with replacement and
    bring all their values (cluster bootstrap: Field and Welsh, J. R. Stat. Soc. B 2007), once for all targets, since one
    patient's organs are alike too; a target that no drawn patient has is left out of that draw. NaN values are left out and
    counted. The order of the patients does not matter.

    Args:
        by_target: for each target, or for the only one, the values by patient.
        seed: of the draws.
        resamples: number of draws.
        level: of the interval.
    """
    nan = float("nan")
    given = [{p: np.asarray(v, dtype=np.float64) for p, v in by.items()} for by in by_target]
    known = [{p: v[~np.isnan(v)] for p, v in by.items()} for by in given]
    missing = sum(len(v) - len(known[n][p]) for n, by in enumerate(given) for p, v in by.items())
    kept = [by for by in known if any(len(v) for v in by.values())]
    patients = sorted({p for by in kept for p, v in by.items() if len(v)})
    if not patients:
        return BootstrapInterval(nan, nan, nan, 0, 0, missing)
    sums = np.array([[float(by[p].sum()) if p in by else 0.0 for p in patients] for by in kept])
    counts = np.array([[len(by.get(p, ())) for p in patients] for by in kept])
    mean = float((sums.sum(1) / counts.sum(1)).mean())
    low = high = nan
    if len(patients) > 1:
        drawn = np.random.default_rng(seed).integers(len(patients), size=(resamples, len(patients)))
        number = counts[:, drawn].sum(-1)
        each = np.divide(sums[:, drawn].sum(-1), number, out=np.full(number.shape, nan), where=number > 0)
        low, high = (float(v) for v in np.quantile(np.nanmean(each, 0), ((1 - level) / 2, (1 + level) / 2)))
    return BootstrapInterval(mean, low, high, len(patients), int(counts.sum()), missing)


class Figure(Part):
    """A mean with its 95 % interval over patients (``None`` with fewer than two), and how many values and patients."""

    mean: float | None
    low: float | None = None
    high: float | None = None
    values: int = 0
    patients: int = 0


class AnswerSummary(Part):
    """One answer over the cases in which the target is present.

    Attributes:
        dice, nsd: over all of them; a missed organ counts as 0.
        dice_median: median Dice.
        hd95_mm: over those with a finite distance.
        hd95_failures: those without, as the organ was missed; a share of N for answers that average proposals.
        presence: cases that are TP, FP, FN and TN, absent targets included; empty for answers that need the reference.
    """

    dice: Figure
    dice_median: float | None
    hd95_mm: Figure
    hd95_failures: float
    nsd: Figure
    presence: dict[Presence, int] = Field(default_factory=dict)


class TargetSummary(Part):
    """One target of one set, or the mean over the targets of the set.

    Attributes:
        dimensions: 2 for slices, 3 for volumes.
        cases: cases (slices or volumes) in which the target is present.
        slices: slices of these.
        patients: patients of these.
        absent: cases in which it is labelled as absent.
        absent_empty_share: share of empty proposals there.
        diversity, spearman: means over the present cases.
        curve: mean Dice by number of proposals.
        calibration: counts over all cases.
        calibration_error: expected calibration error.
    """

    set: str
    target: str
    dimensions: int
    cases: int
    slices: int
    patients: int
    absent: int
    absent_empty_share: float | None
    answers: dict[str, AnswerSummary]
    diversity: float | None
    spearman: float | None
    curve: list[CurvePoint]
    calibration: Calibration
    calibration_error: float | None


def summarise_cases(cases: Sequence[CaseResult], seed: int = 0) -> list[TargetSummary]:
    """A row per set and target, and after those of a set their mean; sets with volumes and slices have rows for each."""
    rows: list[TargetSummary] = []
    for name, dimensions in dict.fromkeys((c.set, c.dimensions) for c in cases):
        chosen = [c for c in cases if (c.set, c.dimensions) == (name, dimensions)]
        targets = list(dict.fromkeys(t.target for c in chosen for t in c.targets))
        own = [_target(name, dimensions, target, chosen, seed) for target in targets]
        rows += own
        present = [row for row in own if row.cases]
        if len(present) > 1:
            rows.append(_mean(name, dimensions, present, chosen, seed))
    return rows


def calibration_error(counts: Calibration) -> float | None:
    """Expected calibration error: |mean probability - share of the reference| over bins, weighted by pixels."""
    pixels = np.asarray(counts.pixels, dtype=np.float64)
    if not pixels.sum():
        return None
    gap = np.abs(np.asarray(counts.predicted) - np.asarray(counts.positive))
    return float(gap.sum() / pixels.sum())


def _target(name: str, dimensions: int, target: str, cases: Sequence[CaseResult], seed: int) -> TargetSummary:
    all_of_it = [(c, t) for c in cases for t in c.targets if t.target == target]
    present = [(c, t) for c, t in all_of_it if t.present]
    absent = [t for _, t in all_of_it if not t.present]
    counts = _sum([t.calibration for _, t in all_of_it])
    return TargetSummary(
        set=name,
        target=target,
        dimensions=dimensions,
        cases=len(present),
        slices=sum(c.slices for c, _ in present),
        patients=len({c.patient for c, _ in present}),
        absent=len(absent),
        absent_empty_share=mean_of([t.empty_share for t in absent]),
        answers={answer: _answer(answer, present, [t for _, t in all_of_it], seed) for answer in ANSWERS},
        diversity=mean_of([t.diversity for _, t in present]),
        spearman=mean_of([t.spearman for _, t in present]),
        curve=_mean_curve([t.curve for _, t in present]),
        calibration=counts,
        calibration_error=calibration_error(counts),
    )


def _answer(
    answer: str, present: Sequence[tuple[CaseResult, TargetResult]], every: Sequence[TargetResult], seed: int
) -> AnswerSummary:
    scores = [(c.patient, t.answers[answer]) for c, t in present]
    counts: dict[Presence, int] = {}
    if answer in SINGLE:
        counts = {"TP": 0, "FP": 0, "FN": 0, "TN": 0}
        for target in every:
            found = target.answers[answer].presence
            assert found is not None
            counts[found] += 1
    known = [s.dice for _, s in scores if s.dice is not None]
    return AnswerSummary(
        dice=_figure(seed, _by_patient([(p, s.dice) for p, s in scores])),
        dice_median=float(np.median(known)) if known else None,
        hd95_mm=_figure(seed, _by_patient([(p, s.hd95_mm) for p, s in scores])),
        hd95_failures=sum(s.hd95_failures for _, s in scores),
        nsd=_figure(seed, _by_patient([(p, s.nsd) for p, s in scores])),
        presence=counts,
    )


def _figure(seed: int, *by_target: ByPatient) -> Figure:
    found = patient_bootstrap(*by_target, seed=seed)
    if not found.values:
        return Figure(mean=None)
    low, high = (None if np.isnan(end) else end for end in (found.low, found.high))
    return Figure(mean=found.mean, low=low, high=high, values=found.values, patients=found.patients)


def _by_patient(values: Sequence[tuple[str, float | None]]) -> dict[str, list[float]]:
    found: dict[str, list[float]] = {}
    for patient, value in values:
        if value is not None:
            found.setdefault(patient, []).append(value)
    return found


def _mean(
    name: str, dimensions: int, rows: Sequence[TargetSummary], cases: Sequence[CaseResult], seed: int
) -> TargetSummary:
    """The mean over targets, each counted once, however many cases show it."""
    names = [row.target for row in rows]
    present = [(c, t) for c in cases for t in c.targets if t.present]
    seen = {c.name: c for c, _ in present}.values()

    def over_targets(answer: str, field: str) -> Figure:
        return _figure(
            seed,
            *(
                _by_patient([(c.patient, getattr(t.answers[answer], field)) for c, t in present if t.target == target])
                for target in names
            ),
        )

    answers = {
        answer: AnswerSummary(
            dice=over_targets(answer, "dice"),
            dice_median=mean_of([row.answers[answer].dice_median for row in rows]),
            hd95_mm=over_targets(answer, "hd95_mm"),
            hd95_failures=sum(row.answers[answer].hd95_failures for row in rows),
            nsd=over_targets(answer, "nsd"),
            presence={
                p: sum(t.answers[answer].presence == p for c in cases for t in c.targets) for p in ("TP", "FP", "FN", "TN")
            }
            if answer in SINGLE
            else {},
        )
        for answer in ANSWERS
    }
    counts = _sum([t.calibration for c in cases for t in c.targets])
    absent = [t for c in cases for t in c.targets if not t.present]
    return TargetSummary(
        set=name,
        target=MEAN,
        dimensions=dimensions,
        cases=len(seen),
        slices=sum(c.slices for c in seen),
        patients=len({c.patient for c in seen}),
        absent=len(absent),
        absent_empty_share=mean_of([t.empty_share for t in absent]),
        answers=answers,
        diversity=mean_of([row.diversity for row in rows]),
        spearman=mean_of([row.spearman for row in rows]),
        curve=_mean_curve([row.curve for row in rows]),
        calibration=counts,
        calibration_error=calibration_error(counts),
    )


def _mean_curve(curves: Sequence[Sequence[CurvePoint]]) -> list[CurvePoint]:
    known = [curve for curve in curves if curve]
    points = []
    for same in zip(*known, strict=True):
        numbers = {
            field: float(np.mean([getattr(p, field) for p in same])) for field in ("rank1", "mean", "best", "rand_top_k")
        }
        points.append(CurvePoint(proposals=same[0].proposals, **numbers))
    return points


def _sum(counts: Sequence[Calibration]) -> Calibration:
    zero = [0] * CALIBRATION_BINS
    return Calibration(
        pixels=[sum(column) for column in zip(zero, *(c.pixels for c in counts), strict=True)],
        predicted=[sum(column) for column in zip(zero, *(c.predicted for c in counts), strict=True)],
        positive=[sum(column) for column in zip(zero, *(c.positive for c in counts), strict=True)],
    )
