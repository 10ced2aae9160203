"""What is kept of every evaluated case, plain numbers without pixels, and how the masks of N proposals become these."""

from __future__ import annotations

from collections.abc import Sequence
from math import comb
from typing import Literal

import numpy as np
from pydantic import BaseModel, ConfigDict, Field

from progidiff.evaluation.metrics import Presence, dice, hd95, nsd, presence
from progidiff.proposals.masks import bounding_box
from progidiff.proposals.ranking import rank

#: What a set of N proposals can be taken for. The last three are chosen or averaged by the reference, which a reader lacks.
ANSWERS = ("rank1", "medoid", "consensus", "ensemble", "mean", "best", "rand_top_k")
#: Those of them that are one mask, found without the reference.
SINGLE = ("rank1", "medoid", "consensus", "ensemble")
CALIBRATION_BINS = 10
_FAINT = 0.01


class Part(BaseModel):
    """Base of what is written: finite numbers only, ``None`` where there is no number."""

    model_config = ConfigDict(extra="ignore", allow_inf_nan=False, protected_namespaces=())


class MaskScore(Part):
    """One mask against the reference.

    Attributes:
        presence: TP, FP, FN or TN.
        dice: ``None`` for TN.
        hd95_mm: ``None`` for TN, and for FP and FN, where it is infinite and counts as a failure.
        nsd: ``None`` for TN, and 0 for FP and FN.
    """

    presence: Presence
    dice: float | None
    hd95_mm: float | None = None
    nsd: float | None = None


class AnswerScore(Part):
    """One answer of a case: a mask, or the mean over several.

    Attributes:
        dice: mean Dice; ``None`` where it is undefined.
        hd95_mm: mean over the masks whose distance is finite.
        hd95_failures: share of the masks whose distance is infinite.
        nsd: mean.
        presence: of a single mask.
    """

    dice: float | None
    hd95_mm: float | None = None
    hd95_failures: float = 0.0
    nsd: float | None = None
    presence: Presence | None = None


class CurvePoint(Part):
    """Dice with n of the N proposals: rank 1 of the first n, the others as expectations over random choices of n."""

    proposals: int
    rank1: float
    mean: float
    best: float
    rand_top_k: float


class Calibration(Part):
    """Mean probability against the reference, in ten equal bins, over pixels with a probability of at least
    1 % or in the reference: pixels, sum of probabilities and pixels of the reference by bin.
    """

    pixels: list[int]
    predicted: list[float]
    positive: list[int]


class TargetResult(Part):
    """One target in one case.

    Attributes:
        present: whether the reference holds it.
        size: its volume in mL, or its area in cm² on a slice.
        answers: by the names in ``ANSWERS``; for an absent target only those of ``SINGLE``.
        proposals: every proposal by index.
        scores: their scores without ground truth.
        first: index of the proposal that is ranked first.
        spearman: rank correlation of scores and Dice.
        diversity: mean pairwise Dice.
        empty_share: share of empty proposals.
        curve: Dice by number of proposals; empty for an absent target.
        picture_slice: slice with the largest reference area, or ``None``.
    """

    target: str
    present: bool
    size: float
    answers: dict[str, AnswerScore]
    proposals: list[MaskScore]
    scores: list[float]
    first: int
    spearman: float | None
    diversity: float
    empty_share: float
    curve: list[CurvePoint] = []
    calibration: Calibration
    picture_slice: int | None = None


class CaseResult(Part):
    """One case. ``dimensions`` is 2 for a single slice and 3 for a volume; ``warnings`` are about its values."""

    set: str
    name: str
    patient: str
    dimensions: Literal[2, 3]
    slices: int = Field(ge=1)
    modality: str
    plane: str
    spacing_exact: bool = True
    notes: tuple[str, ...] = ()
    fingerprint: str = ""
    seconds: float = 0.0
    warnings: list[str] = []
    targets: list[TargetResult]


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
