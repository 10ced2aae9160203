"""ControlNet's stock hint block in the place of ProGiDiff's image encoder, to compare the two."""

from __future__ import annotations

from collections.abc import Sequence

from diffusers import ConfigMixin, ModelMixin
from diffusers.configuration_utils import register_to_config
from diffusers.models.controlnets.controlnet import ControlNetConditioningEmbedding
from torch import Tensor


class StockHint(ModelMixin, ConfigMixin):
    """diffusers' ``ControlNetConditioningEmbedding`` (Zhang et al., arXiv 2302.05543) with the image encoder's interface.

    A plain stack of 3x3 convolutions whose last one starts at zero. It sees the image alone, not the prompt, and little
    around each token. The stock block shrinks by 8; at a latent of stride 4 the last halving is left out and the widths
    stay as they are.

    Args:
        in_channels: image channels.
        stride: image pixels per latent token (4 or 8).
        hint_channels: channels that the control branch's first layer expects.
        block_out_channels: widths.
        classes: targets of a segmentation head, which the stock block does not have: 0.
    """

    @register_to_config
    def __init__(
        self,
        in_channels: int = 1,
        stride: int = 4,
        hint_channels: int = 32,
        block_out_channels: Sequence[int] = (16, 32, 96, 256),
        classes: int = 0,
    ) -> None:
        super().__init__()
        self.embedding = ControlNetConditioningEmbedding(hint_channels, in_channels, tuple(block_out_channels))
        surplus = 2 ** (len(block_out_channels) - 1) // stride
        strided = [conv for conv in self.embedding.blocks if conv.stride != (1, 1)]
        if surplus < 1 or surplus * stride != 2 ** (len(block_out_channels) - 1):
            raise ValueError("stride must be a power of two that the block's widths reach")
        for conv in strided[len(strided) - (surplus.bit_length() - 1) :]:
            conv.stride = (1, 1)

    def forward(self, image: Tensor) -> Tensor:
        """Hint of a slice: float (B, in_channels, H, W) in [0, 1] to (B, hint_channels, H / stride, W / stride)."""
        hint: Tensor = self.embedding(image)
        return hint

    def hint(self, features: Tensor, pooled_text: Tensor) -> Tensor:
        """The features as they are: the stock block does not know the prompt."""
        return features
