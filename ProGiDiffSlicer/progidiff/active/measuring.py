"""Proposals on a few slices of a volume, and what they say about it."""

from __future__ import annotations

import itertools
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import numpy as np

from progidiff.active.disagreement import SliceDoubt, TargetDoubt
from progidiff.active.record import Item, TargetItem
from progidiff.sampling.engine import CPU_BATCH, CUDA_BATCH, Engine
from progidiff.volumes.geometry import Geometry
from progidiff.volumes.reading import Volume
from progidiff.volumes.slicing import SlicePlan, plan_slices, restore_slice
from progidiff.wire.messages import IMAGE_WARNINGS, Event, ProposeRequest, SliceEvent, WarningEvent


@dataclass(frozen=True)
class NextSettings:
    """How much is sampled of each volume; equal settings give equal numbers.

    Attributes:
        proposals: N per target and slice, at least 2.
        steps: denoising steps.
        slices: slices spread evenly over the volume.
        closer: further slices for each target, between those on which it was found and their neighbours.
        seed: seed of the noise.
        modality: "CT" or "MR" for files that do not say it; ``None`` guesses from the values.
        plane: plane of the slices; ``None`` for the one that suits each volume and the model.
        correct_values: take values of a CT that cannot be Hounsfield units for what they look like.
    """

    proposals: int = 6
    steps: int = 2
    slices: int = 8
    closer: int = 4
    seed: int = 0
    modality: str | None = None
    plane: str | None = None
    correct_values: bool = False


def measure(
    engine: Engine,
    volume: Volume,
    targets: Sequence[str],
    settings: NextSettings,
    cancelled: Callable[[], bool] = lambda: False,
    progress: Callable[[float], None] = lambda share: None,
) -> Item:
    """Measure how much the proposals of each target disagree on a volume.

    Args:
        engine: loaded engine; its current image is replaced.
        volume: the volume.
        targets: targets of the model's vocabulary.
        settings: how much to sample.
        cancelled: asked at every denoising step.
        progress: told the share that is done.

    Returns:
        The item without path and fingerprint.

    Raises:
        CancelledError: ``cancelled()`` turned true.
        InputError: the volume cannot be used.
        ModelError: the model is not made for its modality.
    """
    said = volume.modality
    modality = said if said in ("CT", "MR") else settings.modality or said
    info = engine.set_image(volume.array, volume.geometry.affine, modality, settings.plane, settings.correct_values)
    doubts = {target: TargetDoubt(info.spacing_rc[0] * info.spacing_rc[1]) for target in targets}
    notes: dict[str, None] = {}
    spread = spread_slices(info.slice_count, settings.slices)
    most = len(spread) + settings.closer

    def look(index: int, wanted: Sequence[str]) -> None:
        parts = _sample(engine, wanted, index, settings, cancelled, notes)
        for target, (masks, probability) in parts.items():
            doubts[target].add(index, masks, probability)

    for number, index in enumerate(spread, 1):
        look(index, targets)
        progress(number / most)
    for round_ in range(settings.closer):
        # one further slice of each target at a time, so that each is placed by what the last one showed
        wanted: dict[int, list[str]] = {}
        for target, doubt in doubts.items():
            further = next_slice(doubt, info.slice_count)
            if further is not None:
                wanted.setdefault(further, []).append(target)
        for index, some in wanted.items():
            look(index, some)
        progress((len(spread) + round_ + 1) / most)
    plan = plan_slices(volume.geometry, info.plane)
    per_target = {target: _item(doubt, volume.geometry, plan) for target, doubt in doubts.items()}
    first = max(per_target, key=lambda t: per_target[t].disagreement)
    return Item(
        disagreement=per_target[first].disagreement,
        target=first,
        slice=per_target[first].slice,
        ras=per_target[first].ras,
        plane=info.plane,
        slice_count=info.slice_count,
        per_target=per_target,
        notes=[*volume.warnings, *notes],
    )


def spread_slices(count: int, wanted: int) -> list[int]:
    """At most ``wanted`` of ``count`` slices in the middles of equal parts; all where there are no more."""
    if count <= wanted:
        return list(range(count))
    return [int((part + 0.5) * count / wanted) for part in range(wanted)]


def next_slice(doubt: TargetDoubt, count: int) -> int | None:
    """The slice to look at next for one target: in the middle of the widest gap beside a slice on which it was found.

    Where it was found nowhere the likeliest slice takes the place of those, so that an organ between two slices is not
    missed. ``None`` when there is no gap left.
    """
    known = doubt.looked_at
    around = doubt.found_on() or [doubt.likeliest().index]
    edges = [-1, *known, count]
    gaps = []
    for low, high in itertools.pairwise(edges):
        if high - low > 1 and (low in around or high in around):
            gaps.append((high - low, -low, (low + high) // 2))
    return max(gaps)[2] if gaps else None


def _sample(
    engine: Engine,
    targets: Sequence[str],
    index: int,
    settings: NextSettings,
    cancelled: Callable[[], bool],
    notes: dict[str, None],
) -> dict[str, tuple[np.ndarray, np.ndarray]]:
    """Masks (N, H, W) and mean probability (H, W) of each target on one slice."""
    probability: dict[str, np.ndarray] = {}

    def told(event: Event) -> None:
        if isinstance(event, SliceEvent):
            if event.mean_probability is not None:
                probability[event.target] = event.mean_probability
        elif isinstance(event, WarningEvent) and event.code in IMAGE_WARNINGS:
            notes.setdefault(event.message)

    request = ProposeRequest(
        tuple(targets),
        proposals=settings.proposals,
        steps=settings.steps,
        seed=settings.seed,
        slices=(index, index + 1),
        # nobody watches a preview, so the first batch is as large as the others
        batch_size=CUDA_BATCH if engine.model.device.type == "cuda" else CPU_BATCH,
    )
    gathered = engine.gather(request, cancelled, told)
    return {target: (gathered[target].slice_masks(index), probability[target]) for target in targets}


def _item(doubt: TargetDoubt, geometry: Geometry, plan: SlicePlan) -> TargetItem:
    number, worst = doubt.disagreement(), doubt.most_uncertain()
    return TargetItem(
        disagreement=number.value,
        presence=number.presence,
        pairwise=number.pairwise,
        entropy=number.entropy,
        empty_share=number.empty_share,
        slice=worst.index,
        ras=_place(worst, geometry, plan),
        slices=doubt.looked_at,
    )


def _place(doubt: SliceDoubt, geometry: Geometry, plan: SlicePlan) -> tuple[float, float, float]:
    """Centre of the doubt in RAS millimetres, or the centre of the slice."""
    rows, columns = plan.shape_rc
    r, c = doubt.centre_rc or ((rows - 1) / 2, (columns - 1) / 2)
    marker = np.zeros(plan.shape_rc, dtype=bool)
    marker[min(round(r), rows - 1), min(round(c), columns - 1)] = True
    inside = np.argwhere(restore_slice(marker, plan))[0]
    kji = np.insert(inside, plan.axis, doubt.index)
    ras = geometry.affine @ np.array([*kji[::-1], 1.0])
    return (float(ras[0]), float(ras[1]), float(ras[2]))
