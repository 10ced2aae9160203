"""What is kept of every evaluated case: plain numbers, no pixels."""

from __future__ import annotations

from typing import Literal

from pydantic import BaseModel, ConfigDict, Field

from progidiff.evaluation.metrics import Presence

#: What a set of N proposals can be taken for. The last three are chosen or averaged by the reference, which a reader lacks.
ANSWERS = ("rank1", "medoid", "consensus", "ensemble", "mean", "best", "rand_top_k")
#: Those of them that are one mask, found without the reference.
SINGLE = ("rank1", "medoid", "consensus", "ensemble")
CALIBRATION_BINS = 10


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
