"""Splits by patient, so that no patient is on both sides."""

from __future__ import annotations

from collections.abc import Iterable

import numpy as np

from progidiff.errors import DatasetError


def split_by_patient(ids: Iterable[str], fraction: float, seed: int = 0) -> tuple[frozenset[str], frozenset[str]]:
    """Divide patients into those to train on and those to hold out.

    Args:
        ids: patient of every slice or case; repeats and order do not matter.
        fraction: share of the patients to hold out, in (0, 1); at least one patient is on each side.
        seed: the same seed and patients give the same split.

    Returns:
        Patients for training, patients held out.

    Raises:
        DatasetError: fewer than two patients, or a fraction outside (0, 1).
    """
    if not 0.0 < fraction < 1.0:
        raise DatasetError(f"The share of held-out patients must be between 0 and 1, not {fraction:g}.")
    patients = sorted(set(ids))
    if len(patients) < 2:
        raise DatasetError("A split by patient needs at least two patients; add cases of further patients.")
    held_out = min(max(round(fraction * len(patients)), 1), len(patients) - 1)
    order = np.random.default_rng(seed).permutation(len(patients))
    return (
        frozenset(patients[i] for i in order[held_out:]),
        frozenset(patients[i] for i in order[:held_out]),
    )
