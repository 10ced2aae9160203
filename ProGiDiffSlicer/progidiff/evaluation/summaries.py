"""Figures over many slices and patients, with their numbers and confidence intervals."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np


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
