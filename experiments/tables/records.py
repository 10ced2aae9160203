"""Figures of single slices and targets, their means with intervals over patients, and how both are written in a cell."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from progidiff.evaluation.summary import BootstrapInterval, patient_bootstrap

MEAN = "mean of targets"
RESAMPLES = 2000


@dataclass(frozen=True)
class Record:
    """Figures of one target on one slice; NaN where a figure is not known there.

    Attributes:
        set: name of the set.
        target: target key.
        patient: the unit of resampling; never printed.
        values: figures by name.
    """

    set: str
    target: str
    patient: str
    values: Mapping[str, float]


def interval(records: Iterable[Record], figure: str, seed: int = 0, resamples: int = RESAMPLES) -> BootstrapInterval:
    """Mean of a figure with its 95 % patient-bootstrap interval, every target counted once.

    Slices are averaged within a target, then targets are averaged, so that a target on many slices does not outweigh a rare
    one. Patients are drawn with replacement and bring all their slices and targets; a target that a draw misses is left out
    of that draw. For one target this is :func:`progidiff.evaluation.summary.patient_bootstrap`.

    Returns:
        ``low`` and ``high`` are NaN with fewer than two patients; ``values`` counts pairs of slice and target.
    """
    by_target: dict[str, dict[str, list[float]]] = {}
    for record in records:
        value = record.values.get(figure, float("nan"))
        by_target.setdefault(record.target, {}).setdefault(record.patient, []).append(value)
    return patient_bootstrap(*by_target.values(), seed=seed, resamples=resamples)


def groups(records: Sequence[Record], with_mean: bool = True) -> list[tuple[str, str, list[Record]]]:
    """Records by set and target, in order of appearance; after the targets of a set all of them as :data:`MEAN`."""
    found: list[tuple[str, str, list[Record]]] = []
    for name in dict.fromkeys(r.set for r in records):
        inside = [r for r in records if r.set == name]
        targets = list(dict.fromkeys(r.target for r in inside))
        found += [(name, target, [r for r in inside if r.target == target]) for target in targets]
        if with_mean and len(targets) > 1:
            found.append((name, MEAN, inside))
    return found


def size(records: Iterable[Record]) -> str:
    """Numbers of pairs of slice and target, and of patients: ``"150 / 10"``."""
    chosen = list(records)
    return f"{len(chosen)} / {len({r.patient for r in chosen})}"


def cell(value: BootstrapInterval, digits: int = 3, factor: float = 1.0) -> str:
    """``"0.812 (0.764-0.851)"``; the mean alone where there is one patient, a dash where nothing is known."""
    if np.isnan(value.mean):
        return "–"
    text = f"{value.mean * factor:.{digits}f}"
    if np.isnan(value.low):
        return text
    dash = " to " if value.low < 0 else "-"
    return f"{text} ({value.low * factor:.{digits}f}{dash}{value.high * factor:.{digits}f})"


def fact(value: BootstrapInterval) -> dict[str, Any]:
    """The same as numbers."""
    return {"mean": value.mean, "low": value.low, "high": value.high, "pairs": value.values, "patients": value.patients}


def numbers(records: Iterable[Record]) -> str:
    """Sentence on how much was measured, per set."""
    chosen = list(records)
    parts = []
    for name in dict.fromkeys(r.set for r in chosen):
        inside = [r for r in chosen if r.set == name]
        patients = len({r.patient for r in inside})
        parts.append(f"{name}: {len(inside)} pairs of slice and target, {patients} patient{'s' if patients != 1 else ''}")
    return "; ".join(parts) + "."
