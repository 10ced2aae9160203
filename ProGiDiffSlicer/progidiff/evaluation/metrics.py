"""Accuracy of masks, with one definition for every case that libraries treat differently.

An organ that is absent from the reference and from the prediction has no Dice: it is NaN, and counted as
a true absence. An organ that is only in one of the two has Dice 0, and counts as a presence error.
Distances come from MONAI (see :func:`metric_library`).
"""

from __future__ import annotations

import warnings
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Literal

import numpy as np

from progidiff.proposals.ranking import Ranking
from progidiff.wire.messages import RankingEvent

Presence = Literal["TP", "FP", "FN", "TN"]


def dice(prediction: np.ndarray, reference: np.ndarray) -> float:
    """Dice of two bool masks of equal shape; NaN where both are empty, 0 where one of them is."""
    a, b = _pair(prediction, reference)
    total = int(np.count_nonzero(a)) + int(np.count_nonzero(b))
    return 2.0 * int(np.count_nonzero(a & b)) / total if total else float("nan")


def presence(prediction: np.ndarray, reference: np.ndarray) -> Presence:
    """Whether the organ was rightly found (TP) or left out (TN), invented (FP) or missed (FN)."""
    a, b = _pair(prediction, reference)
    if b.any():
        return "TP" if a.any() else "FN"
    return "FP" if a.any() else "TN"


def hd95(prediction: np.ndarray, reference: np.ndarray, spacing: Sequence[float]) -> float:
    """Symmetric 95th-percentile Hausdorff distance in mm (MONAI: the larger of the two directed percentiles).

    Args:
        prediction: bool, 2-D or 3-D.
        reference: bool, same shape.
        spacing: mm per voxel along each array axis.

    Returns:
        NaN where both masks are empty, infinity where one is; a summary must report the infinite ones as
        failures.
    """
    a, b = _pair(prediction, reference)
    if not a.any() or not b.any():
        return float("nan") if a.any() == b.any() else float("inf")
    from monai.metrics import compute_hausdorff_distance

    with _quiet_monai():
        distance = compute_hausdorff_distance(*_tensors(a, b), include_background=True, percentile=95, spacing=list(spacing))
    return float(distance)


def nsd(prediction: np.ndarray, reference: np.ndarray, spacing: Sequence[float], tolerance_mm: float) -> float:
    """Normalised surface Dice at a tolerance in mm, with sub-voxel surfaces as in DeepMind's
    surface-distance (via MONAI).

    NaN where both masks are empty, 0 where one is. Arguments as for :func:`hd95`.
    """
    a, b = _pair(prediction, reference)
    if not a.any() or not b.any():
        return float("nan") if a.any() == b.any() else 0.0
    from monai.metrics import compute_surface_dice

    with _quiet_monai():
        dice_of_surfaces = compute_surface_dice(
            *_tensors(a, b),
            class_thresholds=[float(tolerance_mm)],
            include_background=True,
            spacing=list(spacing),
            use_subvoxels=True,
        )
    return float(dice_of_surfaces)


@contextmanager
def _quiet_monai() -> Iterator[None]:
    """MONAI speaks of its own next versions, to whoever uses this program."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", FutureWarning)
        yield


def metric_library() -> str:
    """Name and version of the library that computes the distances, to be printed beside them."""
    from importlib.metadata import version

    return f"MONAI {version('monai')}"


@dataclass(frozen=True)
class ProposalScores:
    """What a set of proposals is worth, measured against the reference.

    Attributes:
        rank1: Dice of the proposal ranked first without ground truth.
        mean: mean Dice of all proposals.
        best: Dice of the best proposal (best-of-N).
        rand_top_k: expected Dice of a random pick among the k proposals that are best *by the reference*,
            the paper's RandTop-k.
        shortlist: expected Dice of a random pick among the k that the ranking puts first.
        spearman: rank correlation of score and Dice over the proposals; NaN where either is constant.
        regret: ``best - rank1``.
        proposals: N.
    """

    rank1: float
    mean: float
    best: float
    rand_top_k: float
    shortlist: float
    spearman: float
    regret: float
    proposals: int


def proposal_scores(true_dice: Sequence[float], ranking: Ranking | RankingEvent, k: int = 3) -> ProposalScores:
    """Summarise proposals whose true Dice is known.

    Args:
        true_dice: Dice of every proposal with the reference, by proposal index. NaN (both empty) is
            excluded from the means; an absent organ is judged by :func:`presence`.
        ranking: their ranking without ground truth.
        k: how many proposals a reader is shown.
    """
    values = np.asarray(true_dice, dtype=np.float64)
    if len(values) != len(ranking.scores):
        raise ValueError(f"{len(values)} Dice values do not fit {len(ranking.scores)} ranked proposals.")
    if k < 1:
        raise ValueError(f"k must be at least 1, not {k}.")
    known = values[~np.isnan(values)]
    rank1 = float(values[ranking.order[0]])
    best = float(known.max()) if known.size else float("nan")
    return ProposalScores(
        rank1=rank1,
        mean=_mean(known),
        best=best,
        rand_top_k=_mean(np.sort(known)[::-1][:k]),
        shortlist=_mean(values[list(ranking.order[:k])]),
        spearman=spearman(ranking.scores, values),
        regret=best - rank1,
        proposals=len(values),
    )


def spearman(a: Sequence[float] | np.ndarray, b: Sequence[float] | np.ndarray) -> float:
    """Spearman's rank correlation with mean ranks for ties (SciPy); NaN where a side is constant or fewer
    than two pairs are known.
    """
    x, y = np.asarray(a, dtype=np.float64), np.asarray(b, dtype=np.float64)
    known = ~(np.isnan(x) | np.isnan(y))
    x, y = x[known], y[known]
    if len(x) < 2 or np.ptp(x) == 0 or np.ptp(y) == 0:
        return float("nan")
    from scipy.stats import spearmanr

    return float(spearmanr(x, y).statistic)


def _pair(prediction: np.ndarray, reference: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    a, b = np.asarray(prediction), np.asarray(reference)
    if a.shape != b.shape:
        raise ValueError(f"Masks of shapes {a.shape} and {b.shape} cannot be compared.")
    return a != 0, b != 0


def _tensors(a: np.ndarray, b: np.ndarray) -> tuple[object, object]:
    import torch

    return torch.from_numpy(a[None, None].astype(np.uint8)), torch.from_numpy(b[None, None].astype(np.uint8))


def _mean(values: np.ndarray) -> float:
    known = values[~np.isnan(values)]
    return float(known.mean()) if known.size else float("nan")
