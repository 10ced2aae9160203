"""The slices of a target that a report shows."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from progidiff.outputs.report import Frame, SlicePicture, agreement_png, outlines_png, windowed
from progidiff.proposals.proposals import Proposals
from progidiff.volumes.slicing import SlicePlan, extract_slice

SLICES_PER_TARGET = 3


def choose_slices(weights: np.ndarray, count: int = SLICES_PER_TARGET) -> list[int]:
    """Slices that show an organ best: the fullest one, and others at even shares of its volume; ascending.

    Args:
        weights: float (slices,), e.g. the sum of the agreement map on each slice; no slice is chosen where
            all are 0.
        count: how many slices at most.
    """
    weights = np.asarray(weights, dtype=np.float64)
    total = weights.sum()
    if total <= 0 or count < 1:
        return []
    passed = np.cumsum(weights) / total
    chosen = [int(weights.argmax())]
    for place in range(count):
        index = int(np.searchsorted(passed, (place + 0.5) / count))
        if index not in chosen and len(chosen) < count:
            chosen.append(index)
    # a thin organ has one slice at several shares: fill up with its next fullest slices
    for index in np.argsort(-weights, kind="stable").tolist():
        if len(chosen) < count and weights[index] > 0 and index not in chosen:
            chosen.append(index)
    return sorted(chosen)


def target_pictures(
    array_kji: np.ndarray,
    plan: SlicePlan,
    window: tuple[float, float],
    proposals: Proposals,
    agreement_kji: np.ndarray,
    put_forward: Sequence[int],
) -> list[SlicePicture]:
    """Pictures of one target.

    Args:
        array_kji: the image, (K, J, I).
        plan: how it is cut into slices.
        window: grey values drawn black and white.
        proposals: the target's proposals.
        agreement_kji: share of proposals, float32 (K, J, I).
        put_forward: proposals to outline, best first.
    """
    other_axes = tuple(axis for axis in range(3) if axis != plan.axis)
    pictures = []
    for index in choose_slices(agreement_kji.sum(axis=other_axes, dtype=np.float64)):
        frame = Frame(windowed(extract_slice(array_kji, plan, index), window), plan.spacing_rc)
        masks = [proposals.slice_mask(number, index) for number in put_forward]
        agreement = extract_slice(agreement_kji, plan, index)
        pictures.append(SlicePicture(index, outlines_png(frame, masks), agreement_png(frame, agreement)))
    return pictures
