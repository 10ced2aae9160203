"""Training batches: images with masks per target, and which targets are known. Unknown is never background."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Protocol

import torch
from torch import Tensor

from progidiff.synthesis.source import SyntheticSource
from progidiff.synthesis.tissues import ORGANS, VOCABULARY


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


class SyntheticBatches:
    """Synthetic slices as training batches.

    Args:
        source: the painted slices.
        vocabulary: target names: organs of the source, "kidneys" (the union of both), or others, which stay unknown.
    """

    def __init__(self, source: SyntheticSource, vocabulary: Sequence[str]) -> None:
        self.source = source
        self.vocabulary = tuple(vocabulary)
        self._known = torch.tensor([name in VOCABULARY for name in self.vocabulary])

    def batch(self, count: int) -> TrainingBatch:
        """``count`` painted slices; every target that is painted is known."""
        made = self.source.batch(count)
        masks = torch.stack([self._mask(made.organs, name) for name in self.vocabulary], 1)
        known = self._known.to(masks.device).expand(count, -1)
        return TrainingBatch(made.images, masks, known)

    @staticmethod
    def _mask(organs: Tensor, name: str) -> Tensor:
        if name == "kidneys":
            return (organs == ORGANS.index("left kidney") + 1) | (organs == ORGANS.index("right kidney") + 1)
        return organs == ORGANS.index(name) + 1 if name in ORGANS else torch.zeros_like(organs, dtype=torch.bool)

    def state(self) -> Tensor:
        """State of the source's generator."""
        return self.source.state()

    def restore(self, state: Tensor) -> None:
        """Continue from a state."""
        self.source.restore(state)


def pick_prompts(batch: TrainingBatch, per_image: int, absent_share: float = 0.3) -> tuple[Tensor, Tensor]:
    """Which targets are asked for on which image.

    Present targets (more than 15 pixels) are drawn evenly, whatever their size; now and then an absent one, whose right
    answer is an empty mask. Targets that are not known on an image are never asked for.

    Args:
        batch: the batch.
        per_image: prompts per image.
        absent_share: chance that a prompt names an absent target.

    Returns:
        image index and target index of each prompt, both int64 (B * per_image,); fewer where an image has nothing known.
    """
    present = (batch.masks.flatten(2).sum(-1) > 15) & batch.known
    absent = ~present & batch.known
    noise = torch.rand(present.shape, device=present.device)
    is_absent = torch.rand(present.shape[0], per_image, device=present.device) < absent_share
    order_present = torch.where(present, noise, noise - 2).argsort(1, descending=True)
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
