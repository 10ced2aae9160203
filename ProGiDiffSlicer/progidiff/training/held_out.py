"""What a model is worth on held-out slices before and after tuning: the first-ranked proposals, as a user gets them."""

from __future__ import annotations

import io
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from progidiff.cards import TargetScore
from progidiff.datasets.slices import LabelledSlice, present_targets
from progidiff.evaluation.cases import as_volume
from progidiff.evaluation.metrics import dice
from progidiff.sampling.engine import Engine
from progidiff.training.stacks import Stack
from progidiff.wire.messages import ProposeRequest


@dataclass(frozen=True)
class FirstRanked:
    """The first-ranked proposal of a target on a held-out slice: bool (H, W), and its Dice."""

    item: LabelledSlice
    target: str
    mask: np.ndarray
    dice: float


def choose_slices(stacks: Sequence[Stack], vocabulary: Sequence[str], most: int) -> list[LabelledSlice]:
    """Slices that show labelled targets, spread over the stacks and within each."""
    share = -(-most // max(len(stacks), 1))
    chosen: list[LabelledSlice] = []
    for stack in stacks:
        shown = [item for item in stack.read() if present_targets(item, vocabulary)]
        places = np.linspace(0, len(shown) - 1, min(share, len(shown)) + 2)[1:-1].round().astype(int)
        chosen += [shown[int(place)] for place in places]
    return chosen[:most]


def first_ranked(
    engine: Engine, items: Sequence[LabelledSlice], vocabulary: Sequence[str], proposals: int = 8, seed: int = 0
) -> list[FirstRanked]:
    """Propose on every slice what it shows, and keep the proposal that is ranked first without ground truth."""
    found: list[FirstRanked] = []
    for item in items:
        targets = tuple(present_targets(item, vocabulary))
        if not targets:
            continue
        engine.set_image(*as_volume(item, engine.card), item.modality, item.plane)
        gathered = engine.gather(ProposeRequest(targets, proposals=proposals, seed=seed))
        for target in targets:
            mask = gathered[target].slice_mask(gathered[target].checked().order[0], 0)
            found.append(FirstRanked(item, target, mask, dice(mask, item.labels[target])))
    return found


def scores(found: Sequence[FirstRanked]) -> dict[str, TargetScore]:
    """Mean Dice by target, with numbers of slices and patients."""
    result = {}
    for target in dict.fromkeys(f.target for f in found):
        own = [f for f in found if f.target == target]
        patients = len({f.item.patient for f in own})
        result[target] = TargetScore(dice=float(np.mean([f.dice for f in own])), n_slices=len(own), n_patients=patients)
    return result


def mean_score(by_target: dict[str, TargetScore]) -> float | None:
    """Mean over targets; ``None`` where there are none."""
    return float(np.mean([s.dice for s in by_target.values()])) if by_target else None


def before_after_png(before: FirstRanked, after: FirstRanked) -> bytes:
    """The slice twice side by side, first-ranked proposal of the base and of the adapter; reference dashed."""
    from PIL import Image

    from progidiff.outputs.report import Backdrop, display_window, outlines_png, windowed

    item = before.item
    window = (0.0, 1.0) if item.window else display_window(item.image, item.modality)
    frame = Backdrop(windowed(item.image, window), item.spacing_rc)
    reference = item.labels[before.target]
    halves = [Image.open(io.BytesIO(outlines_png(frame, [f.mask, reference]))) for f in (before, after)]
    joined = Image.new("RGB", (sum(h.width for h in halves) + 6, halves[0].height), "white")
    joined.paste(halves[0], (0, 0))
    joined.paste(halves[1], (halves[0].width + 6, 0))
    buffer = io.BytesIO()
    joined.save(buffer, format="PNG")
    return buffer.getvalue()
