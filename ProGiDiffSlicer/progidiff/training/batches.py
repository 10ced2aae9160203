"""Training batches: images with masks per target, and which targets are known. Unknown is never background."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Protocol

import torch
from torch import Tensor
from torch.nn import functional as F

from progidiff.cards import ModelCard
from progidiff.synthesis.fields import Shape, normal
from progidiff.synthesis.labelmaps import LabelVolume
from progidiff.synthesis.source import BODY_GRIDS, Plane, SyntheticBatch, SyntheticSource
from progidiff.synthesis.tissues import VOCABULARY


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
