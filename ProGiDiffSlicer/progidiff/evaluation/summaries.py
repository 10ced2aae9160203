"""Figures over many slices and patients, with their numbers and confidence intervals."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass

import numpy as np

from progidiff.evaluation.metrics import Presence, dice, presence


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
    values_by_patient: Mapping[str, Sequence[float]],
    seed: int = 0,
    resamples: int = 2000,
    level: float = 0.95,
) -> BootstrapInterval:
    """Mean over all values, and its percentile bootstrap interval with the patient as the unit of resampling.

    Slices of one patient are alike, so a bootstrap over slices would claim too much. Patients are drawn
    with replacement and bring all their values (cluster bootstrap: Field and Welsh, J. R. Stat. Soc. B
    2007). NaN values are left out and counted. The order of the patients does not matter.
    """
    sums, counts, missing = [], [], 0
    for patient in sorted(values_by_patient):
        values = np.asarray(values_by_patient[patient], dtype=np.float64)
        known = values[~np.isnan(values)]
        missing += len(values) - len(known)
        if known.size:
            sums.append(float(known.sum()))
            counts.append(len(known))
    nan = float("nan")
    if not counts:
        return BootstrapInterval(nan, nan, nan, 0, 0, missing)
    total, number = np.asarray(sums), np.asarray(counts)
    low = high = nan
    if len(number) > 1:
        drawn = np.random.default_rng(seed).integers(len(number), size=(resamples, len(number)))
        means = total[drawn].sum(axis=1) / number[drawn].sum(axis=1)
        low, high = (float(v) for v in np.quantile(means, ((1 - level) / 2, (1 + level) / 2)))
    return BootstrapInterval(float(total.sum() / number.sum()), low, high, len(number), int(number.sum()), missing)


@dataclass(frozen=True)
class CaseScore:
    """One target in one slice or volume of one patient: its Dice (NaN for a true absence) and presence."""

    target: str
    patient: str
    dice: float
    presence: Presence


@dataclass(frozen=True)
class TargetSummary:
    """Accuracy for one target.

    Attributes:
        target: target key.
        present: Dice over the cases whose reference contains the target; a missed organ counts as 0.
        presence: number of cases for each of TP, FP, FN and TN.
    """

    target: str
    present: BootstrapInterval
    presence: Mapping[Presence, int]

    @property
    def sensitivity(self) -> float:
        """Share of present organs that were found; NaN where none is present."""
        return _share(self.presence["TP"], self.presence["FN"])

    @property
    def specificity(self) -> float:
        """Share of absent organs that were left out; NaN where none is absent."""
        return _share(self.presence["TN"], self.presence["FP"])


def score_case(target: str, patient: str, prediction: np.ndarray, reference: np.ndarray) -> CaseScore:
    """Score one prediction: bool masks of equal shape."""
    return CaseScore(target, patient, dice(prediction, reference), presence(prediction, reference))


def summarize(cases: Iterable[CaseScore], seed: int = 0) -> dict[str, TargetSummary]:
    """Summary by target, in the order in which targets first appear.

    The mean Dice covers organs that are present (TP and FN). False positives are counted in ``presence``
    instead of being averaged in as zeros, since their number depends on how many empty slices a data set
    happens to hold.
    """
    by_target: dict[str, list[CaseScore]] = {}
    for case in cases:
        by_target.setdefault(case.target, []).append(case)
    summaries = {}
    for target, scored in by_target.items():
        counts: dict[Presence, int] = {"TP": 0, "FP": 0, "FN": 0, "TN": 0}
        values: dict[str, list[float]] = {}
        for case in scored:
            counts[case.presence] += 1
            if case.presence in ("TP", "FN"):
                values.setdefault(case.patient, []).append(case.dice)
        summaries[target] = TargetSummary(target, patient_bootstrap(values, seed), counts)
    return summaries


def mean_over_targets(summaries: Mapping[str, TargetSummary]) -> float:
    """Unweighted mean of the targets' mean Dice, leaving out targets that are nowhere present; NaN if all
    are.
    """
    means = [s.present.mean for s in summaries.values() if s.present.values]
    return float(np.mean(means)) if means else float("nan")


def _share(hit: int, miss: int) -> float:
    return hit / (hit + miss) if hit + miss else float("nan")
