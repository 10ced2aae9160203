"""From the masks of N proposals to the scores of everything they can be taken for."""

from __future__ import annotations

from collections.abc import Sequence
from math import comb

import numpy as np

from progidiff.evaluation.case_results import CALIBRATION_BINS, AnswerScore, Calibration, CurvePoint, MaskScore
from progidiff.evaluation.metrics import dice, hd95, nsd, presence
from progidiff.proposals.masks import bounding_box
from progidiff.proposals.ranking import rank

_FAINT = 0.01


def score_mask(
    prediction: np.ndarray, reference: np.ndarray, spacing: Sequence[float], tolerance_mm: float | None
) -> MaskScore:
    """Dice, and with a tolerance HD95 and NSD, of two bool masks of one shape, 2-D or 3-D; spacing in mm by axis."""
    found = presence(prediction, reference)
    if found == "TN":
        return MaskScore(presence=found, dice=None)
    overlap = dice(prediction, reference)
    if tolerance_mm is None:
        return MaskScore(presence=found, dice=overlap)
    if found != "TP":
        return MaskScore(presence=found, dice=overlap, nsd=0.0)
    # the distances need the surroundings of both masks only, and a whole volume costs a hundred times as much
    box = bounding_box(prediction | reference, *[1] * reference.ndim)
    assert box is not None
    a, b = prediction[box], reference[box]
    return MaskScore(presence=found, dice=overlap, hd95_mm=hd95(a, b, spacing), nsd=nsd(a, b, spacing, tolerance_mm))


def one(score: MaskScore) -> AnswerScore:
    """A single mask as an answer."""
    failed = float(score.presence in ("FP", "FN"))
    return AnswerScore(dice=score.dice, hd95_mm=score.hd95_mm, hd95_failures=failed, nsd=score.nsd, presence=score.presence)


def several(scores: Sequence[MaskScore]) -> AnswerScore:
    """The mean over several masks of a present target: the expectation of one of them picked at random."""
    return AnswerScore(
        dice=mean_of([s.dice for s in scores]),
        hd95_mm=mean_of([s.hd95_mm for s in scores]),
        hd95_failures=float(np.mean([s.presence in ("FP", "FN") for s in scores])),
        nsd=mean_of([s.nsd for s in scores]),
    )


def by_reference(scores: Sequence[MaskScore], k: int) -> dict[str, AnswerScore]:
    """Mean, best-of-N and RandTop-k of the proposals for a present target; best means highest Dice."""
    order = sorted(range(len(scores)), key=lambda i: -(scores[i].dice or 0.0))
    best = one(scores[order[0]]).model_copy(update={"presence": None})
    return {"mean": several(scores), "best": best, "rand_top_k": several([scores[i] for i in order[:k]])}


def dice_curve(values: Sequence[float], gram: np.ndarray, k: int) -> list[CurvePoint]:
    """Dice by number of proposals n = 1, 2, 4, ..., N.

    Args:
        values: Dice of each proposal.
        gram: their overlaps, float64 (N, N).
        k: of RandTop-k.
    """
    count = len(values)
    best_first = sorted(values, reverse=True)
    numbers = sorted({2**power for power in range(count.bit_length()) if 2**power <= count} | {count})
    return [
        CurvePoint(
            proposals=n,
            rank1=values[rank(gram[:n, :n]).order[0]],
            mean=float(np.mean(values)),
            best=expected_top(best_first, n, 1),
            rand_top_k=expected_top(best_first, n, k),
        )
        for n in numbers
    ]


def expected_top(best_first: Sequence[float], n: int, k: int) -> float:
    """Expected mean of the k highest among n of the values, drawn without replacement (all n where k is larger)."""
    count, k = len(best_first), min(k, n)
    total = 0.0
    for place, value in enumerate(best_first):
        # the value is drawn together with `better` higher ones, fewer than k
        ways = sum(comb(place, better) * comb(count - 1 - place, n - 1 - better) for better in range(min(k, n)))
        total += value * ways
    return total / (comb(count, n) * k)


class CalibrationCount:
    """Counts for :class:`Calibration`, slice by slice."""

    def __init__(self) -> None:
        self._pixels = np.zeros(CALIBRATION_BINS, dtype=np.int64)
        self._predicted = np.zeros(CALIBRATION_BINS)
        self._positive = np.zeros(CALIBRATION_BINS, dtype=np.int64)

    def add(self, probability: np.ndarray, reference: np.ndarray) -> None:
        """Add a slice: probability float and reference bool, both (rows, columns)."""
        used = (probability >= _FAINT) | reference
        p, truth = probability[used].astype(np.float64), reference[used]
        place = np.clip((p * CALIBRATION_BINS).astype(int), 0, CALIBRATION_BINS - 1)
        self._pixels += np.bincount(place, minlength=CALIBRATION_BINS)
        self._predicted += np.bincount(place, weights=p, minlength=CALIBRATION_BINS)
        self._positive += np.bincount(place, weights=truth, minlength=CALIBRATION_BINS).astype(np.int64)

    def result(self) -> Calibration:
        """The counts so far."""
        return Calibration(
            pixels=self._pixels.tolist(), predicted=self._predicted.tolist(), positive=self._positive.tolist()
        )


def mean_of(values: Sequence[float | None]) -> float | None:
    """Mean of the numbers among the values."""
    known = [v for v in values if v is not None]
    return float(np.mean(known)) if known else None
