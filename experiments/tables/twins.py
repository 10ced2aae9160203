"""What tables compare the model with that has seen the synthetic pictures too: a U-Net, and the image-only twin."""

from __future__ import annotations

from collections.abc import Sequence
from functools import cached_property

from torch import nn

from experiments.matched import pretrained_unet
from experiments.tables.setup import TableSetup
from progidiff.evaluation.accuracy import TwinNetwork, image_only_twin
from progidiff.model.folder import ProGiDiffModel
from progidiff.sampling.engine import Engine, weights_key

#: Methods of tables: the U-Net, and the twin, that go on from what they know of the synthetic pictures.
UNET_TUNED, TWIN_TUNED = "unet-tuned", "twin-tuned"
#: What the twin is, for notes.
TWIN_IS = "the model's own image encoder with its segmentation head"


class Pretrained:
    """Networks with one mask that know the synthetic pictures, made when they are asked for.

    Args:
        setup: data, work folder and options.
        model: the model that they are compared with.
    """

    def __init__(self, setup: TableSetup, model: ProGiDiffModel) -> None:
        self._setup, self._card = setup, model.card
        network = image_only_twin(model)
        self.twin: tuple[TwinNetwork, str] | None = None
        """The image-only twin and its key; ``None`` for a model without a segmentation head."""
        if network is not None:
            self.twin = network, weights_key(Engine(model))

    @cached_property
    def unet(self) -> tuple[nn.Module, str, str]:
        """The U-Net, its key, and what it was trained with."""
        return pretrained_unet(self._setup, self._card)

    def possible(self, methods: Sequence[str]) -> list[str]:
        """Methods without the tuned twin where there is none."""
        return [method for method in methods if method != TWIN_TUNED or self.twin is not None]

    def start_of(self, method: str) -> tuple[nn.Module | None, str]:
        """The network that a method's training begins with, and its key; none for one that begins from scratch."""
        if method == TWIN_TUNED and self.twin is not None:
            return self.twin
        return self.unet[:2] if method == UNET_TUNED else (None, "")
