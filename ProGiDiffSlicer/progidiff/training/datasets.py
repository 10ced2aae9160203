"""Training batches from labelled data sets, with bounded memory, and from several sources at once."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import numpy as np
import torch
from torch import Tensor

from progidiff.cards import ModelCard
from progidiff.datasets.split import split_by_patient
from progidiff.errors import DatasetError
from progidiff.training.augment import augment, without_margin
from progidiff.training.batches import BatchSource, TrainingBatch
from progidiff.training.stacks import PreparedStack, Stack, margin_of, prepare

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
