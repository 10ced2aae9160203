"""The public Stable Diffusion sizes, written out, so that they can be counted without their weights."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

# "367.13M trainable parameters": ProGiDiff, arXiv 2601.16060.
PAPER_TRAINABLE_PARAMETERS = 367_130_000

# The paper does not publish its image encoder. A control branch without its stock hint block leaves room for
# 6.94 M parameters with SD 1.5 (3.99 M with SD 2.1); this U-shaped encoder down to stride 32 fills it.
SD_IMAGE_ENCODER: Mapping[str, Any] = {
    "in_channels": 1,
    "stride": 8,
    "stem_patch": 2,
    "block_out_channels": (64, 128, 192, 256, 256),
    "feature_channels": 176,
    "norm_num_groups": 16,
}

_UNET: Mapping[str, Any] = {
    "act_fn": "silu",
    "block_out_channels": (320, 640, 1280, 1280),
    "center_input_sample": False,
    "down_block_types": (
        "CrossAttnDownBlock2D",
        "CrossAttnDownBlock2D",
        "CrossAttnDownBlock2D",
        "DownBlock2D",
    ),
    "downsample_padding": 1,
    "flip_sin_to_cos": True,
    "freq_shift": 0,
    "in_channels": 4,
    "layers_per_block": 2,
    "mid_block_scale_factor": 1,
    "norm_eps": 1e-05,
    "norm_num_groups": 32,
    "out_channels": 4,
    "up_block_types": ("UpBlock2D", "CrossAttnUpBlock2D", "CrossAttnUpBlock2D", "CrossAttnUpBlock2D"),
}
_VAE: Mapping[str, Any] = {
    "act_fn": "silu",
    "block_out_channels": (128, 256, 512, 512),
    "down_block_types": ("DownEncoderBlock2D",) * 4,
    "in_channels": 3,
    "latent_channels": 4,
    "layers_per_block": 2,
    "norm_num_groups": 32,
    "out_channels": 3,
    "up_block_types": ("UpDecoderBlock2D",) * 4,
}
_TEXT: Mapping[str, Any] = {
    "attention_dropout": 0.0,
    "bos_token_id": 0,
    "eos_token_id": 2,
    "layer_norm_eps": 1e-05,
    "max_position_embeddings": 77,
    "pad_token_id": 1,
    "vocab_size": 49408,
}


@dataclass(frozen=True)
class Backbone:
    """Constructor arguments of one published backbone, by component."""

    title: str
    unet: Mapping[str, Any]
    vae: Mapping[str, Any]
    text_encoder: Mapping[str, Any]
    image_encoder: Mapping[str, Any]


BACKBONES: Mapping[str, Backbone] = {
    "sd15": Backbone(
        title="Stable Diffusion 1.5",
        unet={**_UNET, "attention_head_dim": 8, "cross_attention_dim": 768, "sample_size": 64},
        vae={**_VAE, "sample_size": 512},
        text_encoder={  # CLIP ViT-L/14
            **_TEXT,
            "hidden_act": "quick_gelu",
            "hidden_size": 768,
            "intermediate_size": 3072,
            "num_attention_heads": 12,
            "num_hidden_layers": 12,
            "projection_dim": 768,
        },
        image_encoder=SD_IMAGE_ENCODER,
    ),
    "sd21": Backbone(
        title="Stable Diffusion 2.1",
        unet={
            **_UNET,
            "attention_head_dim": (5, 10, 20, 20),
            "cross_attention_dim": 1024,
            "dual_cross_attention": False,
            "num_class_embeds": None,
            "only_cross_attention": False,
            "sample_size": 96,
            "upcast_attention": True,
            "use_linear_projection": True,
        },
        vae={**_VAE, "sample_size": 768},
        text_encoder={  # OpenCLIP ViT-H/14 without its last layer
            **_TEXT,
            "hidden_act": "gelu",
            "hidden_size": 1024,
            "intermediate_size": 4096,
            "num_attention_heads": 16,
            "num_hidden_layers": 23,
            "projection_dim": 512,
        },
        image_encoder=SD_IMAGE_ENCODER,
    ),
}


def backbone_name(unet_config: Mapping[str, Any]) -> str | None:
    """Which published backbone a UNet's config is: ``"sd15"`` (as all SD 1.x), ``"sd21"`` or ``None``."""
    for name, backbone in BACKBONES.items():
        same = ("cross_attention_dim", "block_out_channels", "in_channels")
        if all(_plain(unet_config.get(key)) == _plain(backbone.unet[key]) for key in same):
            return name
    return None


def _plain(value: Any) -> Any:
    return list(value) if isinstance(value, tuple) else value
