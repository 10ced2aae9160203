"""One mask out of many proposals, and where the proposals disagree."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np


@dataclass(frozen=True, eq=False)
class StapleResult:
    """Consensus of STAPLE.

    Attributes:
        mask: bool, probability of at least one half.
        probability: float32 in [0, 1], same shape.
        sensitivity: estimated sensitivity of each proposal, float64 (N,); NaN where it cannot be estimated.
        specificity: likewise, within the box around all proposals.
    """

    mask: np.ndarray
    probability: np.ndarray
    sensitivity: np.ndarray
    specificity: np.ndarray


@dataclass(frozen=True)
class VolumeSpread:
    """Volume over the proposals in mL: mean, standard deviation, median and the 5th and 95th percentile."""

    mean: float
    sd: float
    median: float
    low: float
    high: float


def agreement(masks: np.ndarray) -> np.ndarray:
    """Share of proposals that contain each voxel: bool (N, ...) -> float32 (...) in [0, 1]."""
    masks = _bool_stack(masks)
    return (np.count_nonzero(masks, axis=0) / len(masks)).astype(np.float32)


def majority(masks: np.ndarray) -> np.ndarray:
    """Voxels that more than half of the proposals contain: bool (N, ...) -> bool (...); an even split is
    background.
    """
    masks = _bool_stack(masks)
    return np.asarray(2 * np.count_nonzero(masks, axis=0) > len(masks))


def consensus_level(histogram: np.ndarray, filled: int) -> int:
    """How many of N proposals have to contain a voxel, so that the mask of these voxels has the highest expected Dice.

    A cut at half of the votes has the fewest wrong voxels. It is not the best one for Dice: that lies at half of the
    Dice that can be reached (Lipton et al., arXiv 1402.1892), so the less the proposals agree, the fewer votes are needed.
    Here ``2 A(L) / (N V(L) + A(1))`` is maximised, A(L) being the votes and V(L) the number of voxels with at least L
    votes: the Dice of the mask with a proposal, with numerator and denominator averaged over the proposals.

    Args:
        histogram: int (N + 1,), voxels by number of votes; the first entry does not count.
        filled: how many of the proposals are not empty.

    Returns:
        L in 1 to N, the highest where several are best; N + 1 where more than half of the proposals are empty, since most of
        them say then that the organ is not there.
    """
    if 2 * filled < len(histogram) - 1:
        return len(histogram)
    votes = np.arange(1, len(histogram))
    counts = np.asarray(histogram[1:], dtype=np.float64)
    voxels = np.cumsum(counts[::-1])[::-1]
    agreed = np.cumsum((counts * votes)[::-1])[::-1]
    if not len(votes) or not agreed[0]:
        return 1
    expected = 2 * agreed / (len(votes) * voxels + agreed[0])
    return int(votes[len(votes) - 1 - np.argmax(expected[::-1])])


def consensus(masks: np.ndarray) -> np.ndarray:
    """Voxels in enough proposals for the highest expected Dice: bool (N, ...) -> bool (...), see :func:`consensus_level`."""
    masks = _bool_stack(masks)
    filled = int(masks.reshape(len(masks), -1).any(axis=1).sum())
    return consensus_of_votes(np.count_nonzero(masks, axis=0), len(masks), filled)


def consensus_of_votes(votes: np.ndarray, count: int, filled: int) -> np.ndarray:
    """The same from the number of proposals that contain each voxel.

    Args:
        votes: int (...), 0 to ``count``.
        count: N.
        filled: how many of the proposals are not empty.
    """
    return np.asarray(votes >= consensus_level(np.bincount(votes.ravel(), minlength=count + 1), filled))


def mean_probability(probabilities: np.ndarray, threshold: float = 0.5) -> tuple[np.ndarray, np.ndarray]:
    """Mean of the proposals' probabilities, and its mask.

    Averaging probabilities beats voting on thresholded masks (Zbinden et al., CCDM, ICCV 2023).

    Args:
        probabilities: float (N, ...) in [0, 1].
        threshold: a voxel belongs to the mask when its mean is above this.

    Returns:
        mask bool (...) and mean float32 (...).
    """
    probabilities = np.asarray(probabilities)
    if probabilities.ndim < 2 or not len(probabilities):
        raise ValueError("Probabilities need the shape (proposals, ...) with at least one proposal.")
    mean = probabilities.mean(axis=0, dtype=np.float64).astype(np.float32)
    return mean > threshold, mean


def staple(masks: np.ndarray, max_iterations: int = 100) -> StapleResult:
    """STAPLE (Warfield et al., IEEE TMI 2004) by SimpleITK's filter, which weights proposals by how well
    they fit the consensus.

    It runs inside the bounding box of all proposals: STAPLE's prior is the share of foreground, and a
    large agreed background would push every specificity to 1 and so the consensus towards the union.
    Voxels outside the box are background with certainty.

    Args:
        masks: bool (N, ...), any number of axes.
        max_iterations: limit of the expectation maximisation.
    """
    masks = _bool_stack(masks)
    count, shape = len(masks), masks.shape[1:]
    probability = np.zeros(shape, dtype=np.float32)
    if (masks == masks[0]).all():
        # One proposal, identical ones or only empty ones: the estimate divides by zero, and there is
        # nothing to weigh.
        probability[masks[0]] = 1.0
        known = np.ones(count)
        unknown = np.full(count, np.nan)
        has_mask, has_background = bool(masks[0].any()), not masks[0].all()
        return StapleResult(
            masks[0].copy(), probability, known if has_mask else unknown, known if has_background else unknown
        )
    import SimpleITK as sitk

    box = _bounding_box(np.any(masks, axis=0))
    # STAPLE treats voxels as independent, so one row holds them all, whatever the number of axes.
    rows = masks[(slice(None), *box)].reshape(count, 1, -1).astype(np.uint8)
    staple_filter = sitk.STAPLEImageFilter()
    staple_filter.SetForegroundValue(1.0)
    staple_filter.SetMaximumIterations(max_iterations)
    inside = sitk.GetArrayFromImage(staple_filter.Execute([sitk.GetImageFromArray(row) for row in rows]))
    probability[box] = np.clip(inside, 0.0, 1.0).reshape(probability[box].shape)
    return StapleResult(
        mask=probability >= 0.5,
        probability=probability,
        sensitivity=np.asarray(staple_filter.GetSensitivity(), dtype=np.float64),
        specificity=np.asarray(staple_filter.GetSpecificity(), dtype=np.float64),
    )


def volume_spread(millilitres: Sequence[float]) -> VolumeSpread:
    """Spread of the proposals' volumes (mL); percentiles by linear interpolation, ``sd`` of the sample (0
    for one proposal).
    """
    values = np.asarray(millilitres, dtype=np.float64)
    if not values.size:
        raise ValueError("There are no volumes.")
    low, median, high = (float(v) for v in np.percentile(values, (5, 50, 95)))
    sd = float(values.std(ddof=1)) if values.size > 1 else 0.0
    return VolumeSpread(mean=float(values.mean()), sd=sd, median=median, low=low, high=high)


def _bool_stack(masks: np.ndarray) -> np.ndarray:
    masks = np.asarray(masks)
    if masks.ndim < 2 or not len(masks):
        raise ValueError("Masks need the shape (proposals, ...) with at least one proposal.")
    return masks if masks.dtype == np.bool_ else masks != 0


def _bounding_box(mask: np.ndarray) -> tuple[slice, ...]:
    box = []
    for axis in range(mask.ndim):
        used = np.flatnonzero(mask.any(axis=tuple(other for other in range(mask.ndim) if other != axis)))
        box.append(slice(int(used[0]), int(used[-1]) + 1))
    return tuple(box)
