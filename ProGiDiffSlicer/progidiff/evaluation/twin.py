"""What the diffusion model is compared with: segmenters that answer with one mask, trained on the same pictures."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import numpy as np
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor, nn
from torch.nn import functional as F

from progidiff.datasets.slices import LabelledSlice
from progidiff.errors import ModelError
from progidiff.evaluation.presenting import on_grid
from progidiff.model.card import ModelCard
from progidiff.model.networks import ImageEncoder

TWIN_NAME = "image_only_twin.safetensors"


def save_twin(encoder: ImageEncoder, head: nn.Conv2d, path: Path) -> None:
    """Write the twin's weights."""
    tensors = {f"encoder.{k}": v.contiguous() for k, v in encoder.state_dict().items()}
    tensors |= {f"head.{k}": v.contiguous() for k, v in head.state_dict().items()}
    save_file(tensors, path)


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
    """The encoder with its head: images (B, 1, S, S) to logits (B, V, S, S)."""

    def __init__(self, encoder: ImageEncoder, head: nn.Conv2d) -> None:
        super().__init__()
        self.encoder, self.head = encoder, head

    def forward(self, images: Tensor) -> Tensor:
        return F.pixel_shuffle(self.head(self.encoder(images)), self.encoder.config.stride)


class ImageOnlyTwin(PlainSegmenter):
    """The encoder with its head.

    Attributes:
        network: the network itself.

    Args:
        path: file of :func:`save_twin`.
        encoder: an encoder of the same architecture, whose weights are overwritten.
        card: card of the diffusion model.

    Raises:
        ModelError: the file is of another architecture.
    """

    def __init__(self, path: Path, encoder: ImageEncoder, card: ModelCard) -> None:
        tensors = load_file(path)
        weight = tensors.get("head.weight")
        if weight is None or weight.shape[0] != len(card.vocabulary) * encoder.config.stride**2:
            raise ModelError(f"{path} is not the twin of this model; train it with the same recipe.")
        head = nn.Conv2d(weight.shape[1], weight.shape[0], 1)
        head.load_state_dict({"weight": weight, "bias": tensors["head.bias"]})
        encoder.load_state_dict({k[8:]: v for k, v in tensors.items() if k.startswith("encoder.")})
        self.network = TwinNetwork(encoder, head).eval()
        super().__init__(self.network, card)
