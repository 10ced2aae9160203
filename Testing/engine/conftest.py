"""Fixtures of the engine's tests: a tiny Stable-Diffusion-shaped folder, and a model built on it."""

from __future__ import annotations

import itertools
import json
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from progidiff.cards import ModelCard, Window
from progidiff.model.build import build_from_stable_diffusion
from progidiff.model.folder import ProGiDiffModel
from progidiff.wire.messages import DoneEvent, Event, ProgressEvent, ProposeRequest, RankingEvent, SliceEvent, WarningEvent

from .worker_pipe import Peer, scripted_command

#: Settings of a training of two steps.
TINY_RUN: dict[str, Any] = {
    "steps": 2, "first_steps": 2, "images": 2, "prompts_per_image": 2, "device": "cpu", "validation_images": 2,
    "checkpoint_every": 1, "log_every": 1, "image_size": 32, "spacing_mm": 11.0,
}  # fmt: skip
TINY_ENCODER = {"stem_patch": 2, "block_out_channels": (8, 16, 16), "feature_channels": 16, "norm_num_groups": 4}


def write_clip_tokenizer(folder: Path) -> int:
    """CLIP's byte-level tokenizer files with a tiny vocabulary, as Stable Diffusion folders have them."""
    folder.mkdir(parents=True)
    letters = [chr(c) for c in range(ord("a"), ord("z") + 1)]
    merges = ["l i", "li v", "liv e", "live r</w>"]
    words = letters + [f"{c}</w>" for c in letters] + [m.replace(" ", "") for m in merges]
    words += ["<|startoftext|>", "<|endoftext|>"]
    (folder / "vocab.json").write_text(json.dumps({word: i for i, word in enumerate(words)}), encoding="utf-8")
    (folder / "merges.txt").write_text("\n".join(["#version: 0.2", *merges]) + "\n", encoding="utf-8")
    special = {"bos_token": "<|startoftext|>", "eos_token": "<|endoftext|>", "unk_token": "<|endoftext|>"}
    config = {**special, "pad_token": "<|endoftext|>", "tokenizer_class": "CLIPTokenizer", "model_max_length": 16}
    (folder / "tokenizer_config.json").write_text(json.dumps(config), encoding="utf-8")
    return len(words)


def write_tiny_sd(folder: Path, *, variant: str | None = None, **unet_settings: Any) -> Path:
    """A tiny text-to-image model in Stable Diffusion's layout: stride 4, 4 latent channels, epsilon, PNDM."""
    import torch
    from diffusers import AutoencoderKL, PNDMScheduler, UNet2DConditionModel
    from transformers import CLIPTextConfig, CLIPTextModel

    torch.manual_seed(1)
    words = write_clip_tokenizer(folder / "tokenizer")
    settings = {
        "sample_size": 8, "block_out_channels": (16, 32), "down_block_types": ("CrossAttnDownBlock2D", "DownBlock2D"),
        "up_block_types": ("UpBlock2D", "CrossAttnUpBlock2D"), "layers_per_block": 1, "cross_attention_dim": 32,
        "attention_head_dim": 2, "norm_num_groups": 8, **unet_settings,
    }  # fmt: skip
    unet = UNet2DConditionModel(**settings)
    vae = AutoencoderKL(
        block_out_channels=(8, 8, 16), down_block_types=("DownEncoderBlock2D",) * 3, latent_channels=4, norm_num_groups=4,
        up_block_types=("UpDecoderBlock2D",) * 3,
    )  # fmt: skip
    config = CLIPTextConfig(
        vocab_size=words, hidden_size=32, intermediate_size=64, num_hidden_layers=2, num_attention_heads=2,
        max_position_embeddings=16, bos_token_id=words - 2, eos_token_id=words - 1, projection_dim=32,
    )  # fmt: skip
    text = CLIPTextModel(config)
    unet.save_pretrained(folder / "unet", variant=variant)
    vae.save_pretrained(folder / "vae", variant=variant)
    text.save_pretrained(folder / "text_encoder", variant=variant)
    PNDMScheduler(
        beta_start=0.00085, beta_end=0.012, beta_schedule="scaled_linear", skip_prk_steps=True, steps_offset=1
    ).save_pretrained(folder / "scheduler")
    names = {
        "unet": "UNet2DConditionModel", "vae": "AutoencoderKL", "scheduler": "PNDMScheduler",
        "text_encoder": "CLIPTextModel", "tokenizer": "CLIPTokenizer",
    }  # fmt: skip
    index: dict[str, Any] = {
        key: ["transformers" if name.startswith("CLIP") else "diffusers", name] for key, name in names.items()
    }
    index["_class_name"] = "StableDiffusionPipeline"
    (folder / "model_index.json").write_text(json.dumps(index), encoding="utf-8")
    return folder


def build_tiny(sd_folder: Path, out: Path, **settings: Any) -> ProGiDiffModel:
    """The tiny folder made into a ProGiDiff model."""
    return build_from_stable_diffusion(
        sd_folder, out, **{"image_size": 32, "image_encoder": TINY_ENCODER, "vocabulary": ["liver"], **settings}
    )


def tiny_card(**changes: Any) -> ModelCard:
    """A card of a model for CT and MR, with 32 pixels of 8 mm and three targets."""
    fields: dict[str, Any] = {
        "model_id": "tiny", "name": "tiny", "licence": "none", "modalities": ["CT", "MR"],
        "vocabulary": ["liver", "spleen", "left kidney"], "image_size": 32, "spacing_mm": 8.0,
        "windows": {"CT": Window(kind="hu", low=-160, high=240), "MR": Window(kind="percentile", low=1, high=99)},
        "latent_shift": [0.0] * 4, "latent_scale": [1.0] * 4, "trainable_parameters": 0,
    }  # fmt: skip
    return ModelCard(**fields | changes)


@pytest.fixture
def cpu_clock(monkeypatch: pytest.MonkeyPatch) -> None:
    """Every reading of the CPU clock finds it one second later, so that a training's steps do not hang on the machine."""
    seconds = itertools.count()
    monkeypatch.setattr(time, "process_time", lambda: float(next(seconds)))


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


@pytest.fixture(scope="session")
def trained_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A small backbone, trained for two steps on phantoms; read-only."""
    from progidiff.training.run import RunSettings, TrainingData, Watch, train_base

    folder, quiet = tmp_path_factory.mktemp("trained"), Watch(log=lambda line: None)
    train_base(TrainingData(synthetic="phantoms"), folder / "model", folder / "work", RunSettings(**TINY_RUN), quiet)
    return folder / "model"


@pytest.fixture
def peer() -> Iterator[Peer]:
    """A worker with a scripted engine, seen through bare pipes."""
    with Peer(scripted_command()) as started:
        yield started


@dataclass
class Recording:
    """Everything that one request emitted."""

    events: list[Event] = field(default_factory=list)

    def of(self, kind: type[Any]) -> list[Any]:
        return [event for event in self.events if isinstance(event, kind)]

    @property
    def slices(self) -> list[SliceEvent]:
        return self.of(SliceEvent)

    @property
    def progress(self) -> list[ProgressEvent]:
        return self.of(ProgressEvent)

    @property
    def warnings(self) -> list[WarningEvent]:
        return self.of(WarningEvent)

    @property
    def rankings(self) -> dict[str, RankingEvent]:
        return {event.target: event for event in self.of(RankingEvent)}

    @property
    def done(self) -> DoneEvent:
        (event,) = self.of(DoneEvent)
        return event  # type: ignore[no-any-return]

    def masks(self, target: str) -> dict[int, np.ndarray]:
        """bool (N, rows, columns) by slice; fails unless every proposal comes exactly once and in order."""
        parts: dict[int, list[np.ndarray]] = {}
        for event in self.slices:
            if event.target == target:
                known = parts.setdefault(event.slice_index, [])
                assert event.first_proposal == sum(len(part) for part in known)
                assert event.masks.dtype == np.bool_
                known.append(event.masks)
        return {index: np.concatenate(known) for index, known in parts.items()}


def sample(engine: Any, *targets: str, cancelled: Callable[[], bool] = lambda: False, **request: Any) -> Recording:
    """Run one request to its end."""
    recording = Recording()
    settings = {"proposals": 4, "steps": 2, "keep_pieces": True, **request}
    engine.propose(ProposeRequest(targets or ("liver",), **settings), recording.events.append, cancelled)
    return recording


def phantom(slices: int = 4) -> tuple[np.ndarray, np.ndarray]:
    """A small CT (K, J, I) in HU, without any symmetry and different on every slice, and its affine (axes R, A, S)."""
    y, x = np.mgrid[:30, :34]
    rng = np.random.default_rng(5)
    volume = np.full((slices, 30, 34), -1000.0, np.float32)
    for k, plane in enumerate(volume):
        plane[((y - 15) / 13) ** 2 + ((x - 16) / 15) ** 2 < 1] = 20
        plane[((y - 11 - k / 2) / 5) ** 2 + ((x - 10) / 6) ** 2 < 1] = 110
        plane[((y - 20) / 3) ** 2 + ((x - 23 + k / 2) / 4) ** 2 < 1] = 190
        plane += rng.normal(0, 15, plane.shape)
    affine = np.diag([3.5, 4.0, 7.0, 1.0])
    affine[:3, 3] = -60, 35, 102
    return volume, affine


@pytest.fixture(scope="session")
def make_phantom() -> Callable[..., tuple[np.ndarray, np.ndarray]]:
    """``phantom(slices=4)``."""
    return phantom


@pytest.fixture(scope="session")
def responsive_folder(tiny_sd: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A tiny model with three targets whose masks depend on noise, image and prompt; read-only.

    In an untrained model the control branch's zero convolutions hide the image; here they hold random numbers.
    """
    import torch

    from progidiff.model.folder import save_model

    folder = tmp_path_factory.mktemp("responsive")
    model = build_tiny(
        tiny_sd, folder / "silent", vocabulary=["liver", "spleen", "left kidney"], spacing_mm=4.0, modalities=["CT", "MR"]
    )
    generator = torch.Generator().manual_seed(2)
    for module in (*model.controlnet.controlnet_down_blocks, model.controlnet.controlnet_mid_block):
        for parameter in module.parameters():
            parameter.data = torch.randn(parameter.shape, generator=generator)
    save_model(model, folder / "model")
    return folder / "model"


@pytest.fixture(scope="session")
def headed_folder(responsive_folder: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The responsive model with a segmentation head that finds the liver on every pixel, the spleen nowhere and the left
    kidney with a probability of 0.15; read-only."""
    import torch

    from progidiff.model.folder import load_model, save_model

    folder = tmp_path_factory.mktemp("headed") / "model"
    model = load_model(responsive_folder)
    encoder = model.image_encoder
    encoder.learn_classes(3)
    encoder.segmentation_head.requires_grad_(False)
    encoder.segmentation_head.weight.zero_()
    odds = torch.logit(torch.tensor([0.99, 1e-4, 0.15]))
    encoder.segmentation_head.bias.copy_(odds.repeat_interleave(encoder.config.stride**2))
    save_model(model, folder)
    return folder


@pytest.fixture
def own_engine(responsive_folder: Path) -> Any:
    """An engine for a test that changes the model, with the phantom as its image."""
    from progidiff.sampling.engine import Engine

    loaded = Engine.load(responsive_folder, "cpu")
    loaded.set_image(*phantom(), "CT")
    return loaded


@pytest.fixture(scope="session")
def _model(responsive_folder: Path) -> ProGiDiffModel:
    from progidiff.sampling.engine import Engine

    return Engine.load(responsive_folder, "cpu").model


@pytest.fixture
def engine(_model: ProGiDiffModel) -> Any:
    """An engine with the phantom as its image; its model is every test's, and stays as it is."""
    from progidiff.sampling.engine import Engine

    engine = Engine(_model)
    engine.set_image(*phantom(), "CT")
    return engine
