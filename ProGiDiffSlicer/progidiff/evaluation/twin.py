"""What the diffusion model is compared with: segmenters that answer with one mask, trained on the same pictures."""

from __future__ import annotations

from collections.abc import Callable
from copy import deepcopy

import numpy as np
import torch
from torch import Tensor, nn

from progidiff.cards import ModelCard
from progidiff.datasets.slices import LabelledSlice
from progidiff.evaluation.presenting import on_grid
from progidiff.model.folder import ProGiDiffModel
from progidiff.model.networks import ImageEncoder


class PlainSegmenter:
    """A network without prompt, noise or sampling, asked as the diffusion model is: same grid, window and vocabulary.

    Args:
        logits: float images (1, 1, S, S) in [0, 1] to logits (1, V, S, S), V as the card's vocabulary.
        card: card of the diffusion model that it is compared with.
    """

    def __init__(self, logits: Callable[[Tensor], Tensor], card: ModelCard) -> None:
        self._logits, self._card = logits, card
        self._last: tuple[LabelledSlice, np.ndarray] | None = None

    @torch.inference_mode()
    def __call__(self, item: LabelledSlice, target: str) -> np.ndarray:
        """Mask bool (H, W) of a target on a slice, at the slice's own pixels."""
        if self._last is None or self._last[0] is not item:
            grid, pixels = on_grid(item, self._card)
            logits = self._logits(pixels)[0]
            self._last = item, (grid.from_model(logits, outside=-20.0) > 0).numpy()
        return self._last[1][self._card.vocabulary.index(target)]


class TwinNetwork(nn.Module):
    """The image-only twin: the encoder with its segmentation head, images (B, 1, S, S) to logits (B, V, S, S)."""

    def __init__(self, encoder: ImageEncoder) -> None:
        super().__init__()
        self.encoder = encoder

    def forward(self, images: Tensor) -> Tensor:
        return self.encoder.segment(self.encoder(images))


def image_only_twin(model: ProGiDiffModel) -> TwinNetwork | None:
    """A model's image-only twin, float32 on the CPU, with weights of its own; ``None`` without a segmentation head."""
    encoder = model.image_encoder
    return TwinNetwork(deepcopy(encoder).float().cpu()).eval() if encoder.config.classes else None
