"""Pictures of the best, the median and the worst case of every target. They show patients: for the report only."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

from progidiff.errors import CancelledError
from progidiff.evaluation.cases import EvaluationCase
from progidiff.evaluation.evaluate import EvaluationDocument
from progidiff.evaluation.scoring import CaseResult, TargetResult
from progidiff.outputs.report import Backdrop, display_window, outlines_png, windowed
from progidiff.proposals.masks import bounding_box
from progidiff.sampling.engine import Engine
from progidiff.volumes.slicing import extract_slice
from progidiff.wire.messages import ProposeRequest

#: What a picture shows about the outlines.
MARGIN_MM = 50.0


@dataclass(frozen=True)
class ExamplePicture:
    """One picture.

    Attributes:
        set, target: which row of the summary it belongs to.
        dimensions: 2 or 3.
        kind: "best", "median" or "worst" by Dice of rank 1, or "only case".
        case, slice: what it shows.
        dice, hd95_mm: of rank 1 in this case (the whole volume where it is one).
        png: the slice with the outlines of rank 1 and of the reference.
    """

    set: str
    target: str
    dimensions: int
    kind: str
    case: str
    slice: int
    dice: float
    hd95_mm: float | None
    png: bytes


def draw_examples(
    engine: Engine,
    cases: Sequence[EvaluationCase],
    document: EvaluationDocument,
    cancelled: Callable[[], bool] = lambda: False,
) -> list[ExamplePicture]:
    """Sample the first-ranked proposal of the chosen cases again, on one slice each, and draw it.

    Nothing of a picture is kept between runs: the same seed gives the same proposal again.

    Raises:
        CancelledError: ``cancelled()`` turned true.
    """
    by_name = {(case.set, case.name): case for case in cases}
    pictures: dict[tuple[str, str, str], bytes | None] = {}
    examples = []
    for row, target, kind in _chosen(document.cases):
        key = (row.set, row.name, target.target)
        if key not in pictures:
            pictures[key] = _picture(engine, by_name[row.set, row.name], target, document, cancelled)
        png, first = pictures[key], target.answers["rank1"]
        if png is not None and target.picture_slice is not None:
            dice = first.dice or 0.0
            place = target.picture_slice
            shown = (row.set, target.target, row.dimensions, kind, row.name, place, dice, first.hd95_mm, png)
            examples.append(ExamplePicture(*shown))
    return examples


def _chosen(cases: Sequence[CaseResult]) -> list[tuple[CaseResult, TargetResult, str]]:
    """Best, median and worst case of each set, dimension and target; fewer where there are fewer cases."""
    groups: dict[tuple[str, int, str], list[tuple[CaseResult, TargetResult]]] = {}
    for case in cases:
        for target in case.targets:
            if target.present:
                groups.setdefault((case.set, case.dimensions, target.target), []).append((case, target))
    chosen = []
    for group in groups.values():
        ordered = sorted(group, key=lambda pair: -(pair[1].answers["rank1"].dice or 0.0))
        last = len(ordered) - 1
        # of two cases one is the worst and none the median
        places = {"best": 0} if not last else {"best": 0, "median": len(ordered) // 2, "worst": last}
        for kind, place in places.items():
            if kind != "median" or 0 < place < last:
                chosen.append((*ordered[place], kind if last else "only case"))
    return chosen


def _picture(
    engine: Engine,
    case: EvaluationCase,
    target: TargetResult,
    document: EvaluationDocument,
    cancelled: Callable[[], bool],
) -> bytes | None:
    """PNG, or ``None`` where the case can no longer be read or drawn."""
    assert target.picture_slice is not None
    index = target.picture_slice
    try:
        image = case.read()
        engine.set_image(image.array, image.geometry.affine, image.modality, image.plan.plane)
        # proposal i is the same however many follow it
        count = target.first + 1
        request = ProposeRequest(
            (target.target,),
            proposals=count,
            steps=document.settings.steps,
            seed=document.settings.seed,
            slices=(index, index + 1),
        )
        first = engine.gather(request, cancelled)[target.target].slice_mask(target.first, index)
        pixels = windowed(extract_slice(image.array, image.plan, index), display_window(image.array, image.modality))
        found = [first, extract_slice(image.reference(target.target), image.plan, index)]
        # small organs would be lost in a whole slice
        box = bounding_box(found[0] | found[1], *(round(MARGIN_MM / spacing) for spacing in image.plan.spacing_rc))
        return outlines_png(Backdrop(pixels[box], image.plan.spacing_rc), [mask[box] for mask in found])
    except CancelledError:
        raise
    except Exception:  # a picture less is no reason to lose the figures
        return None
