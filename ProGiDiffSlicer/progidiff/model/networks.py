"""The networks that ProGiDiff adds to diffusers: custom image encoder, control branch that takes its hint, mask decoder.

And prompts as the networks read them.
"""

from __future__ import annotations

import inspect
from collections.abc import Sequence
from typing import Any

import torch
from diffusers import ConfigMixin, ControlNetModel, ModelMixin, UNet2DConditionModel
from diffusers.configuration_utils import register_to_config
from torch import Tensor, nn
from torch.nn import functional as F
from transformers import CLIPTextModel


class ConvBlock(nn.Module):
    """Residual block of two normalised 3x3 convolutions."""

    def __init__(self, in_channels: int, out_channels: int, groups: int) -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(in_channels, out_channels, 3, padding=1)
        self.norm1 = nn.GroupNorm(groups, out_channels)
        self.conv2 = nn.Conv2d(out_channels, out_channels, 3, padding=1)
        self.norm2 = nn.GroupNorm(groups, out_channels)
        self.shortcut = nn.Conv2d(in_channels, out_channels, 1) if in_channels != out_channels else nn.Identity()

    def forward(self, x: Tensor) -> Tensor:
        h = F.silu(self.norm1(self.conv1(x)))
        return F.silu(self.norm2(self.conv2(h)) + self.shortcut(x))


class ImageEncoder(ModelMixin, ConfigMixin):
    """Custom image encoder in place of ControlNet's stock hint block (ProGiDiff, arXiv 2601.16060).

    A U-shaped encoder: it looks at the whole slice and answers at the latent's resolution, so that each latent token knows
    what lies beneath it and around it. It runs in two parts with different lifetimes: :meth:`forward` once per slice,
    :meth:`hint` once per slice and prompt; neither depends on the noisy state, so neither runs per step.

    Args:
        in_channels: image channels (1).
        stride: image pixels per latent token (4 or 8).
        stem_patch: pixels folded into channels before the first convolution (no information is lost).
        block_out_channels: channels per level; level i has stride ``stem_patch * 2**i``.
        feature_channels: channels of the per-slice features.
        hint_channels: channels that the control branch's first layer expects (the UNet's first block).
        text_dim: width of the text encoder's hidden states.
        norm_num_groups: groups of every normalisation.
        classes: targets of the segmentation head, in the order of the model's vocabulary; 0 for no head.
        coordinates: give each pixel its place in the grid (row and column, -1 to 1) beside its grey value; for grids that
            are laid on the body, where that is a place in the body.
    """

    @register_to_config
    def __init__(
        self,
        in_channels: int = 1,
        stride: int = 4,
        stem_patch: int = 2,
        block_out_channels: Sequence[int] = (32, 64, 128, 192),
        feature_channels: int = 96,
        hint_channels: int = 32,
        text_dim: int = 64,
        norm_num_groups: int = 8,
        classes: int = 0,
        coordinates: bool = False,
    ) -> None:
        super().__init__()
        channels = list(block_out_channels)
        in_channels += 2 * coordinates
        target = (stride // stem_patch).bit_length() - 1  # level whose stride is the latent's
        if stem_patch * 2**target != stride or not 0 <= target < len(channels):
            raise ValueError("stride must be stem_patch times a power of two that the levels reach")
        self.stem = nn.Conv2d(in_channels * stem_patch**2, channels[0], 3, padding=1)
        self.down_blocks = nn.ModuleList(
            [ConvBlock(channels[max(i - 1, 0)], c, norm_num_groups) for i, c in enumerate(channels)]
        )
        self.up_blocks = nn.ModuleList()
        wide = channels[-1]
        for level in range(len(channels) - 2, target - 1, -1):
            out = feature_channels if level == target else channels[level]
            self.up_blocks.append(ConvBlock(wide + channels[level], out, norm_num_groups))
            wide = out
        self.text_scale_shift = nn.Linear(text_dim, 2 * feature_channels)
        self.hint_norm = nn.GroupNorm(norm_num_groups, feature_channels)
        self.hint_in = nn.Conv2d(feature_channels, feature_channels, 1)
        self.hint_out = nn.Conv2d(feature_channels, hint_channels, 3, padding=1)
        if classes:
            self.learn_classes(classes)

    def learn_classes(self, classes: int) -> None:
        """Give the encoder a fresh segmentation head for so many targets, in place of the one it may have."""
        self.register_to_config(classes=classes)
        head = nn.Conv2d(self.config.feature_channels, classes * self.config.stride**2, 1)
        self.segmentation_head = head.to(self.stem.weight)

    def forward(self, image: Tensor) -> Tensor:
        """Features of a slice, independent of the prompt.

        Args:
            image: float (B, in_channels, H, W) in [0, 1]; H and W are multiples of the deepest level's stride.

        Returns:
            float (B, feature_channels, H / stride, W / stride).
        """
        x = image * 2 - 1
        if self.config.coordinates:
            rows, columns = (torch.linspace(-1, 1, side, device=x.device, dtype=x.dtype) for side in x.shape[-2:])
            places = torch.stack(torch.meshgrid(rows, columns, indexing="ij"))
            x = torch.cat([x, places.expand(len(x), -1, -1, -1)], 1)
        x = self.stem(F.pixel_unshuffle(x, self.config.stem_patch))
        skips = []
        for i, block in enumerate(self.down_blocks):
            x = block(x if i == 0 else F.avg_pool2d(x, 2))
            skips.append(x)
        for i, block in enumerate(self.up_blocks):
            skip = skips[len(skips) - 2 - i]
            x = block(torch.cat([F.interpolate(x, scale_factor=2.0, mode="nearest"), skip], 1))
        return x

    def hint(self, features: Tensor, pooled_text: Tensor) -> Tensor:
        """Hint of a slice for a prompt: the features, modulated by the prompt (FiLM, arXiv 1709.07871).

        Args:
            features: float (B, feature_channels, h, w) from :meth:`forward`.
            pooled_text: float (B, text_dim), mean of the prompt's hidden states.

        Returns:
            float (B, hint_channels, h, w), added to the control branch's first layer.
        """
        scale, shift = self.text_scale_shift(pooled_text)[:, :, None, None].chunk(2, 1)
        h = F.silu(self.hint_in(self.hint_norm(features)) * (1 + scale) + shift)
        return self.hint_out(h)

    def segment(self, features: Tensor) -> Tensor:
        """Plain segmentation of all targets at once, for an encoder with a segmentation head.

        It takes no part in the denoising: in training it keeps the features about organs, and in sampling it tells on which
        slices a target is likely there at all.

        Args:
            features: float (B, feature_channels, h, w) from :meth:`forward`.

        Returns:
            logits, float (B, classes, h * stride, w * stride).
        """
        return F.pixel_shuffle(self.segmentation_head(features), self.config.stride)


class ControlBranch(ControlNetModel):
    """diffusers' ControlNet without its stock hint block: it receives the image encoder's hint as its condition."""

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self.controlnet_cond_embedding = nn.Identity()

    # register_to_config wraps the parent's __init__; the signature must stay readable for from_config().
    __init__.__signature__ = inspect.signature(ControlNetModel.__init__)  # type: ignore[attr-defined]

    @classmethod
    def from_unet(cls, unet: UNet2DConditionModel, **kwargs: Any) -> ControlBranch:
        """A control branch with the UNet's encoder weights and zero convolutions (Zhang et al., arXiv 2302.05543).

        Unlike diffusers' method it passes on every configuration value that both classes know.
        """
        known = set(inspect.signature(ControlNetModel.__init__).parameters) - {"self"}
        config = {key: value for key, value in unet.config.items() if key in known}
        mid = unet.config.mid_block_type or "UNetMidBlock2DCrossAttn"
        branch = cls(**{**config, "mid_block_type": mid, **kwargs})
        for name in (
            "conv_in",
            "time_proj",
            "time_embedding",
            "class_embedding",
            "add_embedding",
            "down_blocks",
            "mid_block",
        ):
            source, mine = getattr(unet, name, None), getattr(branch, name, None)
            if source is not None and mine is not None:
                mine.load_state_dict(source.state_dict())
        return branch


class MaskDecoder(ModelMixin, ConfigMixin):
    """Small decoder from latents to mask logits at image resolution.

    Stable Diffusion's VAE decoder takes 1257 GMAC at 512², three times its UNet's step; a mask needs a fraction.

    Args:
        latent_channels: channels of the latent.
        stride: image pixels per latent token.
        hidden_channels: width.
    """

    @register_to_config
    def __init__(self, latent_channels: int = 4, stride: int = 4, hidden_channels: int = 48) -> None:
        super().__init__()
        self.conv_in = nn.Conv2d(latent_channels, hidden_channels, 3, padding=1)
        self.conv_mid = nn.Conv2d(hidden_channels, hidden_channels, 3, padding=1)
        self.conv_out = nn.Conv2d(hidden_channels, stride * stride, 3, padding=1)

    def forward(self, latents: Tensor) -> Tensor:
        """Mask logits (B, 1, H, W) of raw (unscaled) latents (B, latent_channels, H / stride, W / stride)."""
        h = F.silu(self.conv_in(latents))
        h = F.silu(self.conv_mid(h)) + h
        return F.pixel_shuffle(self.conv_out(h), self.config.stride)


def tokenize(tokenizer: Any, texts: Sequence[str], device: torch.device) -> tuple[Tensor, Tensor]:
    """Token ids and attention mask, int64 (B, L), padded to the tokenizer's maximum length."""
    length = tokenizer.model_max_length
    out = tokenizer(list(texts), padding="max_length", truncation=True, max_length=length, return_tensors="pt")
    return out.input_ids.to(device), out.attention_mask.to(device)


def encode_text(text_encoder: CLIPTextModel, ids: Tensor, mask: Tensor) -> tuple[Tensor, Tensor]:
    """Hidden states (B, L, D) of prompts, and their mean over real tokens (B, D)."""
    states = text_encoder(input_ids=ids, attention_mask=mask).last_hidden_state
    weight = mask[:, :, None].to(states.dtype)
    return states, (states * weight).sum(1) / weight.sum(1).clamp_min(1)
