"""How much the proposals of one target disagree, as one number.

The number is ``presence x (d + h) / 2``, in [0, 1]:

``d``
    1 minus the mean Dice over all pairs of proposals (Roy et al., Bayesian QuickNAT, arXiv 1811.09800, whose structure-wise
    uncertainty is the same pairwise Dice between Monte Carlo samples), over all slices that were looked at.
``h``
    Mean binary entropy, in bits, of the agreement map over the pixels that at least one proposal contains. It tells a seam
    of doubt along an outline from proposals that lie in different places, where few pairs decide ``d``.
``presence``
    How likely the organ is there at all: the mean probability of the 50 mm² that most likely belong to it, on the slice
    where that is highest. Where an organ is absent, proposals are empty (``d`` is 0) or scattered specks that overlap
    nowhere (``d`` is near 1). The specks of N proposals leave every pixel a mean probability of about 1/N, so that such
    volumes do not come out as the most uncertain ones.
"""

from __future__ import annotations

import itertools
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import numpy as np

from progidiff.active.record import Item, TargetItem
from progidiff.proposals.votes import grow_gram, mean_pairwise_dice
from progidiff.sampling.conditioning import PRESENCE_MM2
from progidiff.sampling.engine import CPU_BATCH, CUDA_BATCH, Engine
from progidiff.volumes.geometry import Geometry
from progidiff.volumes.reading import Volume
from progidiff.volumes.slicing import SlicePlan, plan_slices, restore_slice
from progidiff.wire.messages import IMAGE_WARNINGS, Event, NextSettings, ProposeRequest, SliceEvent, WarningEvent

#: Mean probability from which something counts as found on a slice.
FOUND = 0.5


@dataclass(frozen=True)
class Disagreement:
    """The number and its parts, all in [0, 1]; ``empty_share`` is the share of proposals without a pixel."""

    value: float
    presence: float
    pairwise: float
    entropy: float
    empty_share: float


@dataclass(frozen=True)
class SliceDoubt:
    """One target on one slice.

    Attributes:
        index: slice index.
        presence: see the module's text, on this slice alone.
        pixels: pixels that at least one proposal contains.
        entropy: sum of their binary entropies, in bits.
        weight: presence x entropy x pixel area in mm²: where a correction would change most.
        centre_rc: centre of the entropy in canonical rows and columns, or ``None`` where the proposals agree.
    """

    index: int
    presence: float
    pixels: int
    entropy: float
    weight: float
    centre_rc: tuple[float, float] | None


class TargetDoubt:
    """Collects the slices of one target and sums them up.

    Args:
        pixel_mm2: area of a pixel.
    """

    def __init__(self, pixel_mm2: float) -> None:
        self._pixel_mm2 = pixel_mm2
        self._gram = np.zeros((0, 0))
        self.slices: list[SliceDoubt] = []

    def add(self, index: int, masks: np.ndarray, mean_probability: np.ndarray) -> None:
        """Add a slice: masks bool (N, rows, columns) and their mean probability float (rows, columns)."""
        self._gram = grow_gram(self._gram, masks[:0], masks)
        entropy = binary_entropy(masks.mean(axis=0, dtype=np.float64))
        presence = likely_presence(mean_probability, self._pixel_mm2)
        total = float(entropy.sum())
        self.slices.append(
            SliceDoubt(
                index=index,
                presence=presence,
                pixels=int(np.count_nonzero(masks.any(axis=0))),
                entropy=total,
                weight=presence * total * self._pixel_mm2,
                centre_rc=_centre(entropy),
            )
        )

    @property
    def looked_at(self) -> list[int]:
        """Indices of the slices so far, ascending."""
        return sorted(s.index for s in self.slices)

    def found_on(self) -> list[int]:
        """Slices on which the organ is more likely there than not, ascending."""
        return sorted(s.index for s in self.slices if s.presence >= FOUND)

    def likeliest(self) -> SliceDoubt:
        """The slice on which the organ is most likely."""
        return max(self.slices, key=lambda s: s.presence)

    def most_uncertain(self) -> SliceDoubt:
        """The slice on which a correction would change most; the likeliest one where the proposals agree everywhere."""
        chosen = max(self.slices, key=lambda s: s.weight)
        return chosen if chosen.weight > 0 else self.likeliest()

    def disagreement(self) -> Disagreement:
        """The number over all slices so far."""
        pixels = sum(s.pixels for s in self.slices)
        pairwise = 1.0 - mean_pairwise_dice(self._gram)
        entropy = sum(s.entropy for s in self.slices) / pixels if pixels else 0.0
        presence = max(s.presence for s in self.slices)
        value = presence * (pairwise + entropy) / 2
        return Disagreement(value, presence, pairwise, entropy, float(np.mean(np.diagonal(self._gram) == 0)))


def binary_entropy(share: np.ndarray) -> np.ndarray:
    """Entropy in bits of a yes with probability ``share``: float64, same shape, in [0, 1]."""
    p = np.clip(np.asarray(share, np.float64), 0.0, 1.0)
    inside = (p > 0) & (p < 1)
    entropy = np.zeros_like(p)
    q = p[inside]
    entropy[inside] = -q * np.log2(q) - (1 - q) * np.log2(1 - q)
    return entropy


def likely_presence(mean_probability: np.ndarray, pixel_mm2: float) -> float:
    """Mean of the ``PRESENCE_MM2`` of highest probability on a slice, at least one pixel."""
    flat = np.asarray(mean_probability).reshape(-1)
    count = min(max(1, round(PRESENCE_MM2 / pixel_mm2)), flat.size)
    return float(np.partition(flat, flat.size - count)[flat.size - count :].mean(dtype=np.float64))


def _centre(entropy: np.ndarray) -> tuple[float, float] | None:
    total = entropy.sum()
    if total <= 0:
        return None
    rows, columns = np.indices(entropy.shape)
    return float((rows * entropy).sum() / total), float((columns * entropy).sum() / total)


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
        # nobody watches the slices come in, so the first batch is as large as the others
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
