"""Training batches: images with masks per target, and which targets are known. Unknown is never background.

They are painted, or come from labelled data sets with bounded memory, or from several sources at once.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Protocol

import numpy as np
import torch
from torch import Tensor
from torch.nn import functional as F

from progidiff.cards import ModelCard
from progidiff.datasets.slices import split_by_patient
from progidiff.errors import DatasetError
from progidiff.synthesis.fields import Shape, blur, normal, plane_coordinates, smooth_noise, uniform
from progidiff.synthesis.labelmaps import LabelVolume
from progidiff.synthesis.source import BODY_GRIDS, Plane, SyntheticBatch, SyntheticSource
from progidiff.synthesis.tissues import VOCABULARY
from progidiff.training.stacks import PreparedStack, Stack, margin_of, prepare


@dataclass(frozen=True)
class TrainingBatch:
    """Images with partial labels.

    Attributes:
        images: float32 (B, 1, S, S) in [0, 1].
        masks: bool (B, V, S, S), one mask per target of the vocabulary.
        known: bool (B, V), whether the target was labelled on that image; masks of unknown targets mean nothing.
    """

    images: Tensor
    masks: Tensor
    known: Tensor


class BatchSource(Protocol):
    """Anything that makes training batches and can resume exactly."""

    def batch(self, count: int) -> TrainingBatch:
        """The next ``count`` images."""
        ...

    def state(self) -> Tensor:
        """State of the source as a uint8 tensor."""
        ...

    def restore(self, state: Tensor) -> None:
        """Continue from a state."""
        ...


def as_training_batch(made: SyntheticBatch, vocabulary: Sequence[str]) -> TrainingBatch:
    """Painted slices with a mask for each target of a vocabulary; one that is not painted is unknown."""
    nothing = made.known.new_zeros(len(made.known))
    known = torch.stack([made.known[:, VOCABULARY.index(n)] if n in VOCABULARY else nothing for n in vocabulary], 1)
    masks = torch.stack([made.mask(name) for name in vocabulary], 1) & known[..., None, None]
    return TrainingBatch(made.images, masks, known)


class SyntheticBatches:
    """Synthetic slices as training batches.

    Args:
        source: the painted slices.
        vocabulary: target names; one that no source paints stays unknown.
    """

    def __init__(self, source: SyntheticSource, vocabulary: Sequence[str]) -> None:
        self.source = source
        self.vocabulary = tuple(vocabulary)

    def batch(self, count: int) -> TrainingBatch:
        """``count`` painted slices; what their anatomies label is known."""
        return as_training_batch(self.source.batch(count), self.vocabulary)

    def state(self) -> Tensor:
        """State of the source's generator."""
        return self.source.state()

    def restore(self, state: Tensor) -> None:
        """Continue from a state."""
        self.source.restore(state)


class ReusedBatches:
    """Painted slices that are each used several times: painting one takes half as long as learning from it.

    Slices are painted in shards, each from a seed of its own; the latest shards are drawn from at random, each time with
    another small turn, shift, zoom, gamma and noise. What is drawn follows from the seed and the number of slices drawn
    before, so a restored source paints the shards that it needs again and goes on exactly.

    Args:
        source: paints the slices; it is seeded anew for each shard.
        vocabulary: target names.
        seed: seed of everything drawn here, and the first shard's.
        visits: how often a slice is drawn on average.
    """

    _SHARD, _KEPT, _TOGETHER = 96, 8, 8

    def __init__(self, source: SyntheticSource, vocabulary: Sequence[str], seed: int = 0, visits: int = 3) -> None:
        self._source, self.vocabulary, self._seed, self._visits = source, tuple(vocabulary), seed, visits
        self._drawn = 0
        self._shards: dict[int, list[SyntheticBatch]] = {}
        self._generator = torch.Generator(device=source.device).manual_seed(seed)

    def batch(self, count: int) -> TrainingBatch:
        """The next ``count`` slices, all of one plane."""
        newest = self._drawn // (self._SHARD * self._visits)
        for number in range(max(0, newest - self._KEPT + 1), newest + 1):
            if number not in self._shards:
                self._shards[number] = self._painted(number)
        self._shards = {n: shard for n, shard in self._shards.items() if n > newest - self._KEPT}
        parts = [part for shard in self._shards.values() for part in shard]
        part = parts[self._random(len(parts))]
        alike = [p for p in parts if p.images.shape == part.images.shape]
        rows = [(alike[self._random(len(alike))], self._random(self._TOGETHER)) for _ in range(count)]
        images, tissues, known = (
            torch.stack([getattr(part, name)[row] for part, row in rows]) for name in ("images", "tissues", "known")
        )
        self._drawn += count
        drawn = SyntheticBatch(*self._varied(images, tissues), known)
        return as_training_batch(drawn, self.vocabulary)

    def _painted(self, number: int) -> list[SyntheticBatch]:
        self._source.generator.manual_seed(self._seed + 7919 * (number + 1))
        made = (self._source.batch(self._TOGETHER) for _ in range(self._SHARD // self._TOGETHER))
        return [SyntheticBatch(m.images, m.tissues.to(torch.uint8), m.known) for m in made]

    def _varied(self, images: Tensor, tissues: Tensor) -> tuple[Tensor, Tensor]:
        b, g = len(images), self._generator
        angle, zoom = normal((b,), g) * 0.05, torch.exp(normal((b,), g) * 0.04)
        cos, sin, aspect = torch.cos(angle) * zoom, torch.sin(angle) * zoom, images.shape[-1] / images.shape[-2]
        shift = normal((b, 2), g) * 0.03
        turn = torch.stack([cos, -sin / aspect, shift[:, 0], sin * aspect, cos, shift[:, 1]], 1).view(b, 2, 3)
        grid = F.affine_grid(turn, list(images.shape), align_corners=False)
        moved = F.grid_sample(images, grid, mode="bilinear", padding_mode="zeros", align_corners=False)
        labels = F.grid_sample(tissues[:, None].float(), grid, mode="nearest", padding_mode="zeros", align_corners=False)
        look = moved.clamp(0, 1) ** torch.exp(normal((b, 1, 1, 1), g) * 0.15)
        look = look * (1 + normal((b, 1, 1, 1), g) * 0.05) + normal((b, 1, 1, 1), g) * 0.02
        return (look + normal(tuple(look.shape), g) * 0.015).clamp(0, 1), labels[:, 0].round().long()

    def _random(self, below: int) -> int:
        return int(torch.randint(below, (1,), generator=self._generator, device=self._generator.device))

    def state(self) -> Tensor:
        """Slices drawn so far, and the generator's state."""
        return torch.cat([torch.tensor([self._drawn]).view(torch.uint8), self._generator.get_state()])

    def restore(self, state: Tensor) -> None:
        """Continue from a state."""
        self._drawn = int(state[:8].clone().view(torch.int64))
        self._generator.set_state(state[8:].clone())
        self._shards = {}


def painted_batches(
    volumes: Sequence[LabelVolume], card: ModelCard, device: torch.device | str = "cpu", seed: int = 0
) -> SyntheticBatches:
    """Painted slices on a model's grid, of its vocabulary; phantoms where there are no volumes."""
    square: Mapping[Plane, Shape] = {"axial": (card.image_size, card.image_size)}
    on_body = {plane: card.body_grids[plane] for plane in BODY_GRIDS if plane in card.body_grids}
    pixel_mm = None if on_body else card.spacing_mm
    return SyntheticBatches(SyntheticSource(volumes, on_body or square, pixel_mm, device, seed), card.vocabulary)


def pick_prompts(
    batch: TrainingBatch, per_image: int, absent_share: float = 0.3, believed: Tensor | None = None
) -> tuple[Tensor, Tensor]:
    """Which targets are asked for on which image.

    Present targets (more than 15 pixels) are drawn evenly, whatever their size; now and then an absent one, whose right
    answer is an empty mask. Targets that are not known on an image are never asked for.

    Args:
        batch: the batch.
        per_image: prompts per image.
        absent_share: chance that a prompt names an absent target.
        believed: float (B, V) in [0, 1], how much the model believes that a target is there; absent targets in which it
            believes are asked for first, since they are the ones to learn from.

    Returns:
        image index and target index of each prompt, both int64 (B * per_image,); fewer where an image has nothing known.
    """
    present = (batch.masks.flatten(2).sum(-1) > 15) & batch.known
    absent = ~present & batch.known
    noise = torch.rand(present.shape, device=present.device)
    is_absent = torch.rand(present.shape[0], per_image, device=present.device) < absent_share
    order_present = torch.where(present, noise, noise - 2).argsort(1, descending=True)
    if believed is not None:  # a draw without replacement by these weights (Efraimidis and Spirakis 2006)
        noise = noise ** (1 / (0.03 + believed))
    order_absent = torch.where(absent, noise, noise - 2).argsort(1, descending=True)
    n_present, n_absent = present.sum(1, keepdim=True), absent.sum(1, keepdim=True)
    slot = torch.arange(per_image, device=present.device)[None]
    use_absent = (is_absent & (n_absent > 0)) | (n_present == 0)
    count = torch.where(use_absent, n_absent, n_present)
    position = slot % count.clamp_min(1)
    chosen = torch.where(use_absent, order_absent.gather(1, position), order_present.gather(1, position))
    image = torch.arange(present.shape[0], device=present.device)[:, None].expand_as(chosen)
    keep = count.expand_as(chosen) > 0
    return image[keep], chosen[keep]


#: Real patients differ enough among themselves: half of the warps that synthetic slices need.
_WARP = 0.5


def augment(
    images: Tensor,
    masks: Tensor,
    is_mr: Tensor,
    margin: int,
    pixel_mm: Tensor,
    generator: torch.Generator,
    strength: float = 1.0,
) -> tuple[Tensor, Tensor]:
    """Warp slices and change their look. Left and right are never exchanged.

    Args:
        images: float32 (B, P, Q) in [0, 1], with a margin around the grid.
        masks: bool (B, V, P, Q).
        is_mr: bool (B,).
        margin: pixels of the margin on each side, which the result has not.
        pixel_mm: float (B,), pixel size in mm.
        generator: source of randomness; its device is that of the tensors.
        strength: 0 cuts out the centre unchanged, 1 is the full augmentation.

    Returns:
        images float32 (B, 1, H, W) in [0, 1], masks bool (B, V, H, W).
    """
    if strength <= 0:
        return without_margin(images, masks, margin)
    count, sides = len(images), torch.tensor(images.shape[-2:], device=images.device)
    shape = (images.shape[-2] - 2 * margin, images.shape[-1] - 2 * margin)
    scale = torch.exp(normal((count,), generator) * 0.08 * strength)[:, None, None, None]
    offsets = plane_coordinates(count, shape, pixel_mm, generator, _WARP * strength)[..., 1:] * scale
    grid = (offsets / pixel_mm[:, None, None, None] * 2 / (sides - 1)).flip(-1)
    warped = F.grid_sample(images[:, None], grid, mode="bilinear", padding_mode="zeros", align_corners=True)
    moved = F.grid_sample(masks.float(), grid, mode="bilinear", padding_mode="zeros", align_corners=True) > 0.5
    return change_look(warped[:, 0], is_mr, generator, strength)[:, None], moved


def without_margin(images: Tensor, masks: Tensor, margin: int) -> tuple[Tensor, Tensor]:
    """Images (B, 1, H, W) and masks (B, V, H, W) of slices with a margin, unchanged."""
    rows, columns = (slice(margin, side - margin) for side in images.shape[-2:])
    return images[:, None, rows, columns], masks[..., rows, columns]


def change_look(images: Tensor, is_mr: Tensor, generator: torch.Generator, strength: float = 1.0) -> Tensor:
    """Window (CT), contrast inversion and bias field (MR), gamma, blur, noise and resolution.

    Args:
        images: float32 (B, H, W) in [0, 1].
        is_mr: bool (B,).
        generator: source of randomness.
        strength: scales every change.

    Returns:
        float32 (B, H, W) in [0, 1].
    """
    b, shape = images.shape[0], (images.shape[1], images.shape[2])
    mr = is_mr[:, None, None]

    def chance(p: float) -> Tensor:
        return uniform((b, 1, 1), 0, 1, generator) < p

    low, width = normal((b, 1, 1), generator) * 0.05 * strength, torch.exp(normal((b, 1, 1), generator) * 0.1 * strength)
    x = torch.where(~mr & chance(0.7), ((images - low) / width).clamp(0, 1), images)
    x = torch.where(mr & chance(0.25 * strength) & (x > 0.05), 1 - x, x)  # the dark surroundings stay dark
    bias = smooth_noise(b, 1, shape, 2, generator)[:, 0] * uniform((b, 1, 1), 0, 0.35 * strength, generator)
    x = torch.where(mr & chance(0.7), (x * torch.exp(bias)).clamp(0, 1), x)
    gamma = torch.exp(normal((b, 1, 1), generator) * torch.where(mr, 0.3, 0.15) * strength)
    x = x.clamp(0, 1) ** gamma
    softer = blur(x[:, None], uniform((b,), 0.2, 0.8, generator) * strength)[:, 0]
    x = torch.where(chance(0.3), softer, x)
    grain = blur(normal((b, 1, *shape), generator), uniform((b,), 0.2, 0.8, generator))[:, 0]
    grain = grain / grain.std((-2, -1), keepdim=True)
    x = x + torch.where(chance(0.6), grain * uniform((b, 1, 1), 0.0, 0.07 * strength, generator), torch.zeros_like(x))
    coarse = F.interpolate(F.avg_pool2d(x[:, None], 2), size=shape, mode="bilinear")[:, 0]
    return torch.where(chance(0.08 * strength), coarse, x).clamp(0, 1)


#: Draws from the slices in memory, per slice that shows a target, before others take their place.
_VISITS = 4
_USEFUL_SHARE = 0.9
NOTHING_SHOWN = (
    "The label maps of the cases to train on are empty, or show nothing large enough to learn from; check the labels."
)


class DatasetBatches:
    """Augmented slices of labelled data sets, drawn patient by patient so that large scans do not decide.

    Stacks are prepared when their turn comes and kept as far as ``cache_mb`` allows; a set that does not fit goes round in
    windows. What is drawn depends on the seed and the number of images drawn before, never on what happened to be in memory,
    so a restored source goes on exactly.

    Args:
        stacks: the stacks to train on.
        card: grid, windows and vocabulary of the model.
        device: where batches are augmented.
        seed: seed of this source.
        strength: strength of the augmentation, 0 to 1.
        cache_mb: memory for prepared slices, in MB; a single stack may exceed it.
        log: told when stacks are read.

    Raises:
        DatasetError: there are no stacks.
    """

    def __init__(
        self,
        stacks: Sequence[Stack],
        card: ModelCard,
        device: torch.device | str = "cpu",
        seed: int = 0,
        strength: float = 1.0,
        cache_mb: float = 1024.0,
        log: Callable[[str], None] | None = None,
    ) -> None:
        if not stacks:
            raise DatasetError("There are no cases to train on; add some, or lower the share that is held out.")
        self.stacks, self.card, self.strength = list(stacks), card, strength
        self._seed, self._budget, self._log = seed, cache_mb * 1e6, log or (lambda line: None)
        self._picker = torch.Generator().manual_seed(seed)
        self._generator = torch.Generator(device=device).manual_seed(seed)
        self._cache: dict[int, PreparedStack | None] = {}
        self._window: list[PreparedStack] = []
        self._round = self._start = self._used = self._quota = self._next = 0
        self._planes: set[str] = set()
        self._shown = False

    def batch(self, count: int) -> TrainingBatch:
        """The next ``count`` slices."""
        self._turn()
        first = self._draw()
        # one batch, one grid: slices of another plane have another shape
        drawn = [first, *(self._draw(first[1].images.shape[1:]) for _ in range(count - 1))]
        self._used += count
        device = self._generator.device
        images, masks, known = (torch.stack(column).to(device) for column in zip(*(d[0] for d in drawn), strict=True))
        is_mr = torch.tensor([stack.is_mr for _, stack in drawn], device=device)
        pixel_mm = torch.tensor([stack.pixel_mm for _, stack in drawn], device=device)
        margin = margin_of(self.card)
        images, masks = augment(images, masks, is_mr, margin, pixel_mm, self._generator, self.strength)
        return TrainingBatch(images, masks, known)

    def state(self) -> Tensor:
        """Place in the sets and generators."""
        place = torch.tensor([self._round, self._start, self._used], dtype=torch.int64).view(torch.uint8)
        return pack_states([place, self._picker.get_state(), self._generator.get_state()])

    def restore(self, state: Tensor) -> None:
        """Continue from a state."""
        place, picker, generator = unpack_states(state)
        self._round, self._start, self._used = place.view(torch.int64).tolist()
        self._picker.set_state(picker)
        self._generator.set_state(generator)
        self._window = []
        self._shown = self._round > 0 or self._start > 0

    def seen_planes(self) -> set[str]:
        """Planes of the slices that were read so far (at least those of the first window)."""
        self._turn()
        return set(self._planes)

    def _draw(self, shape: tuple[int, ...] | None = None) -> tuple[tuple[Tensor, Tensor, Tensor], PreparedStack]:
        """A slice of some stack, of a given shape where one is given."""
        window = [stack for stack in self._window if shape in (None, stack.images.shape[1:])]
        patients = sorted({stack.patient for stack in window})
        patient = patients[self._random(len(patients))]
        own = [stack for stack in window if stack.patient == patient]
        stack = own[self._random(len(own))]
        useful = np.flatnonzero(stack.present.any(1))
        if len(useful) and float(torch.rand(1, generator=self._picker)) < _USEFUL_SHARE:
            index = int(useful[self._random(len(useful))])
        else:
            index = self._random(len(stack))
        return stack.slice(index), stack

    def _random(self, below: int) -> int:
        return int(torch.randint(below, (1,), generator=self._picker))

    # -- what is in memory --

    def _turn(self) -> None:
        """Make sure that the window for the next draws is in memory."""
        if self._window and self._used >= self._quota:
            self._used, self._start = 0, self._next
            if self._start >= len(self.stacks):
                self._round, self._start = self._round + 1, 0
            self._window = []
        if not self._window:
            self._fill()

    def _fill(self) -> None:
        order = np.random.default_rng((self._seed, self._round)).permutation(len(self.stacks)).tolist()
        before, self._cache = self._cache, {}
        used, place = 0, self._start
        while place < len(order):
            index = order[place]
            prepared = before.pop(index) if index in before else self._read(index)
            self._cache[index] = prepared
            size = 0 if prepared is None else prepared.bytes
            if self._window and used + size > self._budget:
                break
            while before and sum(p.bytes for p in before.values() if p) + used + size > self._budget:
                del before[next(iter(before))]
            if prepared is not None:
                self._window.append(prepared)
            used, place = used + size, place + 1
        self._next = place
        self._shown = self._shown or any(bool(stack.present.any()) for stack in self._window)
        if place == len(order) and not self._shown and (self._window or self._start):
            raise DatasetError(NOTHING_SHOWN)
        if not self._window:
            if self._start == 0:
                raise DatasetError("The cases to train on hold no slice that can be used; check their labels.")
            self._round, self._start = self._round + 1, 0
            self._fill()
            return
        self._quota = max(1, _VISITS * sum(int(stack.present.any(1).sum()) for stack in self._window))

    def _read(self, index: int) -> PreparedStack | None:
        if not self._window or len(self._window) % 10 == 0:
            self._log(f"reading labelled images: {len(self._window)} of up to {len(self.stacks)} stacks are in memory")
        prepared = prepare(self.stacks[index], self.card)
        if prepared is not None:
            self._planes.add(prepared.plane)
        return prepared


def split_stacks(stacks: Sequence[Stack], share: float, seed: int = 0) -> tuple[list[Stack], list[Stack]]:
    """Stacks to train on, and stacks of patients that are held out; a patient is never on both sides.

    Raises:
        DatasetError: a share outside [0, 1), or fewer than two patients to divide.
    """
    if share == 0:
        return list(stacks), []
    train, held_out = split_by_patient([stack.patient for stack in stacks], share, seed)
    return [s for s in stacks if s.patient in train], [s for s in stacks if s.patient in held_out]


def validation_batches(
    stacks: Sequence[Stack], card: ModelCard, device: torch.device | str = "cpu", most: int = 24, seed: int = 0
) -> list[TrainingBatch]:
    """A fixed selection of unchanged slices that show targets, spread over the stacks, at most 8 in a batch.

    Args:
        stacks: held-out stacks.
        card: grid, windows and vocabulary of the model.
        device: where the batches go.
        most: slices in all.
        seed: chooses the stacks where there are more than ``most``.
    """
    order = np.random.default_rng(seed).permutation(len(stacks))[:most].tolist()
    share = -(-most // max(len(order), 1))
    rows: dict[tuple[int, ...], list[tuple[Tensor, Tensor, Tensor]]] = {}
    for index in order:
        prepared = prepare(stacks[index], card)
        useful = np.flatnonzero(prepared.present.any(1)) if prepared is not None else np.zeros(0, dtype=int)
        if prepared is None or not len(useful):
            continue
        places = np.linspace(0, len(useful) - 1, min(share, len(useful)) + 2)[1:-1].round().astype(int)
        rows.setdefault(prepared.images.shape[1:], []).extend(prepared.slice(int(i)) for i in useful[places])
    batches: list[TrainingBatch] = []
    margin = margin_of(card)
    for alike in rows.values():
        for start in range(0, len(alike), 8):
            part = alike[start : min(start + 8, start + most - sum(len(b.images) for b in batches))]
            if not part:
                break
            images, masks, known = (torch.stack([row[i] for row in part]).to(device) for i in range(3))
            batches.append(TrainingBatch(*without_margin(images, masks, margin), known))
    return batches


class MixedBatches:
    """Several sources in one batch, by share; where their slices differ in plane and so in shape, a batch is of one source.

    Args:
        sources: the sources; all have the same vocabulary and the grids of one card.
        shares: their shares, positive.
        seed: seed of the mixture.
    """

    def __init__(self, sources: Sequence[BatchSource], shares: Sequence[float], seed: int = 0) -> None:
        self.sources = list(sources)
        self._shares = torch.tensor(list(shares), dtype=torch.float64)
        self._generator = torch.Generator().manual_seed(seed)

    def batch(self, count: int) -> TrainingBatch:
        """The next ``count`` images."""
        which = torch.multinomial(self._shares, count, True, generator=self._generator)
        counts = torch.bincount(which, minlength=len(self.sources)).tolist()
        parts = [source.batch(n) for source, n in zip(self.sources, counts, strict=True) if n]
        if len({part.images.shape[1:] for part in parts}) > 1:
            return self.sources[int(which[0])].batch(count)
        return TrainingBatch(*(torch.cat([getattr(p, name) for p in parts]) for name in ("images", "masks", "known")))

    def state(self) -> Tensor:
        """State of the mixture and of every source."""
        return pack_states([self._generator.get_state(), *(source.state() for source in self.sources)])

    def restore(self, state: Tensor) -> None:
        """Continue from a state."""
        own, *others = unpack_states(state)
        self._generator.set_state(own)
        for source, part in zip(self.sources, others, strict=True):
            source.restore(part)


def pack_states(states: Sequence[Tensor]) -> Tensor:
    """Several uint8 tensors as one: their number, their lengths (int64), their bytes."""
    parts = [state.cpu().reshape(-1) for state in states]
    header = torch.tensor([len(parts), *(len(part) for part in parts)], dtype=torch.int64).view(torch.uint8)
    return torch.cat([header, *parts])


def unpack_states(packed: Tensor) -> list[Tensor]:
    """What :func:`pack_states` put together.

    Raises:
        RuntimeError: the bytes are something else.
    """
    packed = packed.cpu()
    count = int(packed[:8].clone().view(torch.int64)[0]) if len(packed) >= 8 else -1
    if not 0 <= count <= len(packed) // 8 - 1:
        raise RuntimeError("these bytes are no packed states")
    lengths = packed[8 : 8 * (count + 1)].clone().view(torch.int64).tolist()
    body = packed[8 * (count + 1) :]
    if sum(lengths) != len(body):
        raise RuntimeError("these bytes are no packed states")
    return [part.clone() for part in body.split(lengths)]
