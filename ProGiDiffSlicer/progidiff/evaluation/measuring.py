"""One labelled case through the engine that users run: every labelled target proposed and scored."""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace

import numpy as np

from progidiff.datasets.slices import MIN_AREA_MM2
from progidiff.evaluation.cases import EvaluationCase, LabelledImage
from progidiff.evaluation.metrics import spearman
from progidiff.evaluation.scoring import (
    SINGLE,
    AnswerScore,
    CalibrationCount,
    CaseResult,
    MaskScore,
    TargetResult,
    by_reference,
    dice_curve,
    one,
    score_mask,
)
from progidiff.proposals.proposals import CONSENSUS, MEAN, MaskKey, Proposals
from progidiff.proposals.ranking import rank
from progidiff.sampling.engine import CPU_BATCH, CUDA_BATCH, Engine
from progidiff.volumes.slicing import extract_slice
from progidiff.wire.messages import (
    IMAGE_WARNINGS,
    ProgressEvent,
    ProposeRequest,
    RankingEvent,
    SliceEvent,
    TidiedEvent,
    WarningEvent,
)


@dataclass(frozen=True)
class EvaluationSettings:
    """What the figures depend on besides model and data.

    Attributes:
        proposals: N.
        steps: denoising steps.
        seed: seed of the noise.
        k: of RandTop-k.
        tolerance_mm: of the normalised surface Dice; ``None`` leaves both distances out.
        absent: also ask for targets that are labelled as absent.
        targets: only these, in this order; empty for all of the model's that are labelled.
        plane: plane in which volumes are cut; ``None`` for the one that suits each volume and the model.
        correct_values: take values of a CT that cannot be Hounsfield units for what they look like.
    """

    proposals: int = 16
    steps: int = 4
    seed: int = 0
    k: int = 3
    tolerance_mm: float | None = 2.0
    absent: bool = True
    targets: tuple[str, ...] = ()
    plane: str | None = None
    correct_values: bool = False


def measure_case(
    engine: Engine,
    case: EvaluationCase,
    settings: EvaluationSettings,
    cancelled: Callable[[], bool] = lambda: False,
    progress: Callable[[float], None] = lambda share: None,
) -> CaseResult:
    """Score all labelled targets of one case.

    On a single slice, a target smaller than 100 mm² is neither present nor absent and is left out. In a volume one proposal
    is one noise field for the whole stack, and everything is measured in 3-D.

    Raises:
        CancelledError: ``cancelled()`` turned true.
        DatasetError: the case cannot be read.
        InputError: its image cannot be used.
        ModelError: the model was not made for its modality.
    """
    began = time.monotonic()
    image = case.read()
    result = CaseResult(
        set=case.set,
        name=case.name,
        patient=case.patient,
        dimensions=2 if image.plan.count == 1 else 3,
        slices=image.plan.count,
        modality=image.modality,
        plane=image.plan.plane,
        spacing_exact=case.spacing_exact,
        notes=image.notes,
        targets=[],
    )
    targets = _askable(engine, image, settings)
    if targets:
        place = (image.array, image.geometry.affine)
        engine.set_image(*place, image.modality, image.plan.plane, settings.correct_values)
        gathered = {target: _Compared(image, target) for target in targets}
        result.warnings = _propose(engine, gathered, settings, cancelled, progress)
        result.targets = [gathered[target].scored(settings) for target in targets]
    return result.model_copy(update={"seconds": time.monotonic() - began})


def _askable(engine: Engine, image: LabelledImage, settings: EvaluationSettings) -> list[str]:
    """Labelled targets of the vocabulary that are present, or absent where those are wanted."""
    pixel = image.plan.spacing_rc[0] * image.plan.spacing_rc[1]
    least = MIN_AREA_MM2 / pixel if image.plan.count == 1 else 1
    chosen = []
    for target in settings.targets or engine.card.vocabulary:
        if target not in image.labelled:
            continue
        count = int(np.count_nonzero(image.reference(target)))
        if count >= least or (count == 0 and settings.absent):
            chosen.append(target)
    return chosen


def _propose(
    engine: Engine,
    gathered: dict[str, _Compared],
    settings: EvaluationSettings,
    cancelled: Callable[[], bool],
    progress: Callable[[float], None],
) -> list[str]:
    """Gather the proposals; what the engine says of the values of the image."""
    warnings: list[str] = []

    def collect(event: object) -> None:
        if isinstance(event, SliceEvent):
            gathered[event.target].take(event)
        elif isinstance(event, TidiedEvent):
            gathered[event.target].take_tidied(event)
        elif isinstance(event, RankingEvent):
            gathered[event.target].proposals.add(event)
        elif isinstance(event, ProgressEvent):
            progress(event.fraction)
        elif isinstance(event, WarningEvent) and event.code in IMAGE_WARNINGS[1:4]:
            warnings.append(event.message)

    batch = CUDA_BATCH if engine.model.device.type == "cuda" else CPU_BATCH
    request = ProposeRequest(
        tuple(gathered), proposals=settings.proposals, steps=settings.steps, seed=settings.seed, batch_size=batch
    )
    engine.propose(request, collect, cancelled)
    return warnings


class _Compared:
    """The proposals of one target, and how they compare with its reference."""

    def __init__(self, image: LabelledImage, target: str) -> None:
        self._image, self._target = image, target
        self._reference = image.reference(target)
        if image.ignored is not None:
            self._reference = self._reference & ~image.ignored
        self._calibration = CalibrationCount()
        self.proposals = Proposals(target, image.plan, range(image.plan.count))

    def take(self, event: SliceEvent) -> None:
        """Some proposals on a slice; with the last of them the slice is complete."""
        image, mean = self._image, event.mean_probability
        if image.ignored is not None:
            known = ~extract_slice(image.ignored, image.plan, event.slice_index)
            mean = None if mean is None else mean * known
            event = replace(event, masks=event.masks & known, mean_probability=mean)
        self.proposals.add(event)
        if mean is not None:
            self._calibration.add(mean, extract_slice(self._reference, image.plan, event.slice_index))

    def take_tidied(self, event: TidiedEvent) -> None:
        """A slice without what is not the organ; the calibration is that of the probabilities, which stay."""
        if self._image.ignored is not None:
            (top, left), (rows, columns) = event.corner, event.masks.shape[1:]
            ignored = extract_slice(self._image.ignored, self._image.plan, event.slice_index)
            event = replace(event, masks=event.masks & ~ignored[top : top + rows, left : left + columns])
        self.proposals.add(event)

    def scored(self, settings: EvaluationSettings) -> TargetResult:
        """Everything about the target."""
        event, gram = self.proposals.checked(), self.proposals.gram
        present = bool(self._reference.any())
        proposals = [self._score(number, settings) for number in range(self.proposals.count)]
        medoid = rank(gram, "medoid").order[0]
        answers: dict[str, AnswerScore] = {
            "rank1": one(proposals[event.order[0]]),
            "medoid": one(proposals[medoid]),
            "consensus": one(self._score(CONSENSUS, settings)),
            "ensemble": one(self._score(MEAN, settings)),
        }
        assert tuple(answers) == SINGLE
        values = [p.dice or 0.0 for p in proposals]
        if present:
            answers |= by_reference(proposals, settings.k)
        correlation = spearman(event.scores, values) if present else float("nan")
        return TargetResult(
            target=self._target,
            present=present,
            size=self._size(),
            answers=answers,
            proposals=proposals,
            scores=event.scores,
            first=event.order[0],
            spearman=None if np.isnan(correlation) else correlation,
            diversity=event.mean_pairwise_dice,
            empty_share=event.empty_share,
            curve=dice_curve(values, gram, settings.k) if present else [],
            calibration=self._calibration.result(),
            picture_slice=self._fullest() if present else None,
        )

    def _score(self, key: MaskKey, settings: EvaluationSettings) -> MaskScore:
        spacing: Sequence[float] = self._image.geometry.spacing[::-1]
        prediction, reference = self.proposals.volume(key), self._reference
        axis = self._image.plan.axis
        if self._image.plan.count == 1:
            # a single slice has no extent across it: its outline is a curve, not a surface
            prediction, reference = prediction.take(0, axis), reference.take(0, axis)
            spacing = [s for n, s in enumerate(spacing) if n != axis]
        return score_mask(prediction, reference, spacing, settings.tolerance_mm)

    def _size(self) -> float:
        count = int(np.count_nonzero(self._reference))
        rows, columns = self._image.plan.spacing_rc
        if self._image.plan.count == 1:
            return count * rows * columns / 100.0
        return count * self._image.geometry.voxel_volume_ml

    def _fullest(self) -> int:
        others = tuple(axis for axis in range(3) if axis != self._image.plan.axis)
        return int(np.count_nonzero(self._reference, axis=others).argmax())
