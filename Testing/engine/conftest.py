"""Fixtures of the engine's tests: a tiny Stable-Diffusion-shaped folder, and a model built on it."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from progidiff.model.build import build_from_stable_diffusion
from progidiff.model.folder import ProGiDiffModel

TINY_ENCODER = {
    "stem_patch": 2,
    "block_out_channels": (8, 16, 16),
    "feature_channels": 16,
    "norm_num_groups": 4,
}


def write_clip_tokenizer(folder: Path) -> int:
    """CLIP's byte-level tokenizer files with a tiny vocabulary, as Stable Diffusion folders have them."""
    folder.mkdir(parents=True)
    letters = [chr(c) for c in range(ord("a"), ord("z") + 1)]
    merges = ["l i", "li v", "liv e", "live r</w>"]
    words = letters + [f"{c}</w>" for c in letters] + [m.replace(" ", "") for m in merges]
    words += ["<|startoftext|>", "<|endoftext|>"]
    (folder / "vocab.json").write_text(
        json.dumps({word: i for i, word in enumerate(words)}), encoding="utf-8"
    )
    (folder / "merges.txt").write_text("\n".join(["#version: 0.2", *merges]) + "\n", encoding="utf-8")
    special = {"bos_token": "<|startoftext|>", "eos_token": "<|endoftext|>", "unk_token": "<|endoftext|>"}
    config = {
        **special,
        "pad_token": "<|endoftext|>",
        "tokenizer_class": "CLIPTokenizer",
        "model_max_length": 16,
    }
    (folder / "tokenizer_config.json").write_text(json.dumps(config), encoding="utf-8")
    return len(words)


def write_tiny_sd(folder: Path, *, variant: str | None = None, **unet_settings: Any) -> Path:
    """A tiny text-to-image model in Stable Diffusion's layout: stride 4, 4 latent channels, epsilon, PNDM."""
    import torch
    from diffusers import AutoencoderKL, PNDMScheduler, UNet2DConditionModel
    from transformers import CLIPTextConfig, CLIPTextModel

    torch.manual_seed(1)
    words = write_clip_tokenizer(folder / "tokenizer")
    unet = UNet2DConditionModel(
        **{
            "sample_size": 8,
            "block_out_channels": (16, 32),
            "down_block_types": ("CrossAttnDownBlock2D", "DownBlock2D"),
            "up_block_types": ("UpBlock2D", "CrossAttnUpBlock2D"),
            "layers_per_block": 1,
            "cross_attention_dim": 32,
            "attention_head_dim": 2,
            "norm_num_groups": 8,
            **unet_settings,
        }
    )
    vae = AutoencoderKL(
        block_out_channels=(8, 8, 16),
        down_block_types=("DownEncoderBlock2D",) * 3,
        up_block_types=("UpDecoderBlock2D",) * 3,
        latent_channels=4,
        norm_num_groups=4,
    )
    text = CLIPTextModel(
        CLIPTextConfig(
            vocab_size=words,
            hidden_size=32,
            intermediate_size=64,
            num_hidden_layers=2,
            num_attention_heads=2,
            max_position_embeddings=16,
            bos_token_id=words - 2,
            eos_token_id=words - 1,
            projection_dim=32,
        )
    )
    unet.save_pretrained(folder / "unet", variant=variant)
    vae.save_pretrained(folder / "vae", variant=variant)
    text.save_pretrained(folder / "text_encoder", variant=variant)
    PNDMScheduler(
        beta_start=0.00085, beta_end=0.012, beta_schedule="scaled_linear", skip_prk_steps=True, steps_offset=1
    ).save_pretrained(folder / "scheduler")
    index = {
        "_class_name": "StableDiffusionPipeline",
        "unet": ["diffusers", "UNet2DConditionModel"],
        "vae": ["diffusers", "AutoencoderKL"],
        "text_encoder": ["transformers", "CLIPTextModel"],
        "tokenizer": ["transformers", "CLIPTokenizer"],
        "scheduler": ["diffusers", "PNDMScheduler"],
    }
    (folder / "model_index.json").write_text(json.dumps(index), encoding="utf-8")
    return folder


def build_tiny(sd_folder: Path, out: Path, **settings: Any) -> ProGiDiffModel:
    """The tiny folder made into a ProGiDiff model."""
    return build_from_stable_diffusion(
        sd_folder,
        out,
        **{"image_size": 32, "image_encoder": TINY_ENCODER, "vocabulary": ["liver"], **settings},
    )


@pytest.fixture(scope="session")
def make_tiny_sd() -> Callable[..., Path]:
    """``write_tiny_sd(folder, variant=None, **unet_settings)``."""
    return write_tiny_sd


@pytest.fixture(scope="session")
def make_tiny_model() -> Callable[..., ProGiDiffModel]:
    """``build_tiny(sd_folder, out, **settings)``."""
    return build_tiny


@pytest.fixture(scope="session")
def tiny_sd(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A tiny Stable Diffusion folder; not to be written to."""
    return write_tiny_sd(tmp_path_factory.mktemp("tiny") / "sd")


@pytest.fixture(scope="session")
def tiny_model_folder(tiny_sd: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """An untrained tiny model (32 pixels, stride 4, "liver"); read-only, at a non-ASCII path."""
    folder = tmp_path_factory.mktemp("modèle Größe") / "model"
    build_tiny(tiny_sd, folder)
    return folder
