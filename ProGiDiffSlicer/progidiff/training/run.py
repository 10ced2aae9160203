"""Training runs from data to model folder: the text-to-mask backbone, and the control branch on it."""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any, Literal

import torch
from diffusers import AutoencoderTiny

from progidiff.cards import ModelCard, TrainingStage, Window, load_card
from progidiff.errors import ModelError, OutputError
from progidiff.model.folder import ProGiDiffModel, load_model, save_model
from progidiff.model.networks import MaskDecoder, tokenize
from progidiff.places import CARD_NAME, holds_files
from progidiff.training import small
from progidiff.training.batches import BatchSource, TrainingBatch
from progidiff.training.diffusion import BaseStage, ControlStage
from progidiff.training.loop import LoopSettings, Progress, Stage, run_stage, stage_clock
from progidiff.training.sources import (
    OpenData,
    TrainingData,
    choose_vocabulary,
    make_source,
    make_validation,
    open_data,
    planes_of,
)
from progidiff.training.stages import AutoencoderStage, EncoderStage

RUN_NAME = "run.json"
_LATENTS_NAME = "latents.json"
#: Peak learning rates: of networks of the small size, and of networks that start from a full-size pre-trained backbone.
_RATES = {"autoencoder": (2e-3, 5e-4), "base": (8e-4, 1e-5), "encoder": (1.5e-3, 1e-4), "control": (8e-4, 2e-5)}
_SMALL_PARAMETERS = 50_000_000
#: Steps of the stage before the main one.
_FIRST_STEPS = {"base": 500, "control": 1000}


@dataclass(frozen=True)
class RunSettings:
    """Settings of a training run.

    Attributes:
        steps: optimiser steps of the run's main stage.
        images: images per step.
        learning_rate: peak learning rate of the main stage; ``None`` chooses by the network's size.
        first_steps: steps of the stage before it (the mask autoencoder before the backbone, the encoder's pre-training
            before the control branch); ``None`` for 500 or 1000 of them, or for none where the encoder is trained.
        prompts_per_image: prompts per image of a step.
        seed: seed of weights, data, split and noise.
        device: ``"auto"``, ``"cpu"`` or ``"cuda"``.
        cache_mb: memory for prepared slices of data sets.
        checkpoint_every, validate_every, log_every: steps between them.
        validation_images: slices that the validation curve is measured on.
        image_size, spacing_mm: grid of a new model, pixels and mm; an existing model keeps its own.
    """

    steps: int = 4000
    images: int = 4
    learning_rate: float | None = None
    first_steps: int | None = None
    prompts_per_image: int = 4
    seed: int = 0
    device: str = "auto"
    cache_mb: float = 1024.0
    checkpoint_every: int = 250
    validate_every: int = 500
    log_every: int = 50
    validation_images: int = 24
    image_size: int = 160
    spacing_mm: float = 2.4


@dataclass(frozen=True)
class Watch:
    """How a run is followed and ended.

    Attributes:
        log: receives one line per report; no names of patients or files.
        progress: told stage, steps done and steps in all.
        cancelled: asked after each step.
    """

    log: Callable[[str], None] = print
    progress: Progress | None = None
    cancelled: Callable[[], bool] = lambda: False


@dataclass
class TrainingRun:
    """One training run.

    Attributes:
        kind: name of the main stage.
        data, out, work, settings, watch: what the caller asked for.
        done: finished stages, for the card.
        device: where it trains.
        opened: the opened data.
        card: card of the model in training, from :meth:`open` on.
        validation: held-out slices, from :meth:`open` on.

    Raises:
        DatasetError, ModelError, OutputError: the data, the settings or a folder cannot be used.
    """

    kind: Literal["base", "control"]
    data: TrainingData
    out: Path
    work: Path
    settings: RunSettings
    watch: Watch
    done: list[TrainingStage] = field(default_factory=list)

    def __post_init__(self) -> None:
        if self.settings.steps < 1 or self.settings.images < 1:
            raise ModelError("A training run needs at least one step and one image per step.")
        self.device = training_device(self.settings.device)
        _check_out(self.out)
        self.opened: OpenData = open_data(self.data, self.settings.seed, self.watch.log)
        self.validation: list[TrainingBatch] = []
        torch.manual_seed(self.settings.seed)

    def adopt(self, parts: ProGiDiffModel, vocabulary: list[str]) -> None:
        """Give a loaded model the run's vocabulary, and a fresh segmentation head where it differs; say what is lost."""
        lost = [t for t in parts.card.vocabulary if t not in vocabulary]
        if lost:
            self.watch.log(f"The data do not label {', '.join(lost)}; the new model cannot be asked for them.")
        ignored = sorted(self.opened.labelled.difference(vocabulary))
        if ignored:
            self.watch.log(f"The model has no words for {', '.join(ignored)}; these labels are left out.")
        if vocabulary != parts.card.vocabulary or not parts.image_encoder.config.classes:
            parts.image_encoder.learn_classes(len(vocabulary))
        parts.card = replace(parts.card, vocabulary=vocabulary)

    def open(self, parts: ProGiDiffModel) -> None:
        """Claim the work folder and lay out the validation slices; call when the model's grid and vocabulary are known."""
        self.card = parts.card
        for modality in self.opened.stored_modalities:
            self.card.window(modality)
        claim(
            self.work,
            {
                "kind": self.kind,
                "model": [parts.card.model_id, sorted(parts.card.sha256.values())],
                "vocabulary": parts.card.vocabulary,
                "grid": [parts.card.image_size, parts.card.spacing_mm],
                "data": self.opened.fingerprint(),
                "images per step": self.settings.images,
                "steps before the main stage": self.settings.first_steps,
                "seed": self.settings.seed,
            },
        )
        self.validation = make_validation(
            self.opened, self.card, self.device, self.settings.validation_images, self.settings.seed
        )
        if not self.validation:
            self.watch.log("Nobody is held out, so there is no validation curve.")

    def source(self, number: int) -> BatchSource:
        """The stream of batches of one stage."""
        seed = self.settings.seed * 10 + number
        return make_source(self.opened, self.card, self.device, seed, self.settings.cache_mb, self.watch.log)

    def first_steps(self, default: bool) -> int:
        """Steps of the stage before the main one."""
        steps = self.settings.first_steps
        return steps if steps is not None else _FIRST_STEPS[self.kind] if default else 0

    def train(self, stage: Stage, steps: int, number: int) -> None:
        """Run or resume a stage."""
        main = stage.name == self.kind
        s = self.settings
        count = sum(p.numel() for p in stage.trainable.parameters())
        rate = _RATES[stage.name][count > _SMALL_PARAMETERS]
        folder = self.work / stage.name
        settings = LoopSettings(
            steps=steps,
            images=s.images,
            learning_rate=s.learning_rate if main and s.learning_rate is not None else rate,
            warmup=max(1, min(60, steps // 10)),
            checkpoint_every=s.checkpoint_every,
            validate_every=s.validate_every,
            log_every=s.log_every,
            seed=s.seed * 10 + number,
        )
        if steps == 0:
            return
        with stage_clock(folder):
            run_stage(stage, settings, folder, self.watch.log, self.watch.cancelled, self.watch.progress)
        seconds = json.loads((folder / "seconds.json").read_text())
        device = torch.cuda.get_device_name(self.device) if self.device.type == "cuda" else "CPU"
        seeds = [settings.seed]
        self.done.append(TrainingStage(stage=stage.name, steps=steps, seconds=seconds, device=device, seeds=seeds))

    def latents(self, stage: AutoencoderStage) -> tuple[list[float], list[float]]:
        """Shift and scale of the mask latents, measured once: later stages depend on them."""
        path = self.work / _LATENTS_NAME
        if not path.exists():
            path.write_text(json.dumps(stage.latent_statistics()))
        shift, scale = json.loads(path.read_text())
        return shift, scale

    def diffusion(self, parts: ProGiDiffModel, source: BatchSource) -> dict[str, Any]:
        """Arguments that both diffusion stages take."""
        prompts = [parts.card.prompt(target) for target in parts.card.vocabulary]
        return {
            "vae": parts.vae,
            "unet": parts.unet,
            "decoder": parts.mask_decoder,
            "schedule": parts.scheduler,
            "tokens": tokenize(parts.tokenizer, prompts, self.device),
            "text_encoder": parts.text_encoder,
            "latent_shift": parts.card.latent_shift,
            "latent_scale": parts.card.latent_scale,
            "source": source,
            "validation": self.validation,
            "prompts_per_image": self.settings.prompts_per_image,
        }

    def save(self, parts: ProGiDiffModel, source: BatchSource, note: str, keep_sources: bool) -> ModelCard:
        """Write the new model folder."""
        card = parts.card
        before = [s for s in card.trained_on if keep_sources]
        sources = [*before, *(s for s in self.opened.provenance() if s not in before)]
        control = self.kind == "control"  # a backbone sees masks only
        modalities = [m for m in card.windows if m in self.opened.modalities] if control else card.modalities
        planes = planes_of(source, self.opened) if control or self.data.plane else card.planes
        parts.card = ModelCard.read(
            {
                **{name: value for name, value in card.to_dict().items() if name not in {"created", "accuracy", "sha256"}},
                "model_id": f"{slug(self.out.name)}-{self.kind}",
                "name": f"ProGiDiff {self.out.name}",
                "modalities": modalities,
                "planes": planes,
                "trained_on": sources,
                "training": [*card.training, *self.done],
                "notes": " ".join(t for t in (note, "Accuracy was not measured. For research, not for diagnosis.") if t),
            }
        )
        for network in parts.networks.values():
            network.eval().requires_grad_(False)
        return save_model(parts, self.out, torch.float16)


def training_device(name: str) -> torch.device:
    """The device to train on.

    Raises:
        ModelError: CUDA was asked for and is not there.
    """
    if name == "cuda" and not torch.cuda.is_available():
        raise ModelError("There is no CUDA device that torch can use; choose the device cpu or auto.")
    return torch.device(("cuda" if torch.cuda.is_available() else "cpu") if name == "auto" else name)


def _check_out(out: Path) -> None:
    """Refuse a place for the result before hours of training, not after."""
    if out.is_dir() and (not holds_files(out) or (out / CARD_NAME).is_file()):
        return
    if out.exists():
        raise OutputError(f'"{out}" holds something that is not a model; choose a new or empty folder for the model.')


def claim(work: Path, run: dict[str, Any]) -> None:
    """Mark a work folder as this run's; a folder of another run is refused, because its checkpoints would not fit.

    Raises:
        ModelError: the folder belongs to another run.
        OutputError: it cannot be written.
    """
    path = work / RUN_NAME
    try:
        work.mkdir(parents=True, exist_ok=True)
        if not path.exists():
            path.write_text(json.dumps(run, indent=1), encoding="utf-8")
            return
        found = json.loads(path.read_text(encoding="utf-8"))
    except OSError as error:
        raise OutputError(f"The work folder '{work}' cannot be used ({error.strerror}); choose another one.") from error
    except ValueError:
        found = {}
    different = [key for key in run if found.get(key) != run[key]]
    if different:
        raise ModelError(
            f"The work folder '{work}' belongs to another training run (another {different[0]}); choose another or empty it."
        )


def slug(name: str) -> str:
    return "".join(c if c.isalnum() else "-" for c in name.lower()).strip("-") or "model"


__all__ = ["RunSettings", "TrainingData", "Watch", "train_base", "train_control"]

#: Pixels of the coarsest level of the small networks.
_COARSEST = 16


def train_base(
    data: TrainingData,
    out: Path,
    work: Path,
    settings: RunSettings | None = None,
    watch: Watch | None = None,
    model: Path | None = None,
) -> ModelCard:
    """Train a text-to-mask backbone: mask autoencoder (or mask decoder), scale of its latents, UNet and text encoder.

    The control branch of the result is a fresh copy of the new backbone, to be trained by :func:`train_control`.

    Args:
        data: what to train on; only the masks count.
        out: the new model folder.
        work: checkpoints and curves; the same call with the same folder goes on where it ended.
        settings: settings of the run.
        watch: log, progress and cancellation.
        model: model folder to go on from; the small architecture from scratch by default. An autoencoder for pictures, as
            Stable Diffusion's, stays as it is and gets a small mask decoder beside it.

    Returns:
        the card as written.

    Raises:
        CancelledError: cancelled; a checkpoint is in ``work``.
        DatasetError, ModelError, OutputError: the data, the model or a folder cannot be used.
    """
    if model is not None:
        data = replace(data, known=tuple(load_card(model).planes))
    run = TrainingRun("base", data, out, work, settings or RunSettings(), watch or Watch())
    if model is None:
        parts = _small_model(run)
    else:
        parts = load_model(model, run.device)
        run.adopt(parts, choose_vocabulary(run.opened.labelled, parts.card.vocabulary, parts.tokenizer))
    pictures = not isinstance(parts.vae, AutoencoderTiny)
    if parts.mask_decoder is None:
        decoder = MaskDecoder(latent_channels=parts.vae.config.latent_channels, stride=parts.stride)
        parts.mask_decoder = decoder.to(run.device)
    run.open(parts)
    first = AutoencoderStage(parts.vae, parts.mask_decoder, run.source(1), run.validation, frozen=pictures)
    run.train(first, run.first_steps(default=True), 1)
    shift, scale = run.latents(first)
    parts.card = replace(parts.card, latent_shift=shift, latent_scale=scale)
    source = run.source(2)
    run.train(BaseStage(**run.diffusion(parts, source)), run.settings.steps, 2)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(run.settings.seed)
        parts.controlnet = small.make_control(parts.unet).to(run.device)
    note = "The control branch is a fresh copy of the backbone: train it before use."
    return run.save(parts, source, note, keep_sources=model is not None)


def train_control(
    model: Path | None,
    data: TrainingData,
    out: Path,
    work: Path,
    settings: RunSettings | None = None,
    watch: Watch | None = None,
) -> ModelCard:
    """Train the control branch and the image encoder against a model folder's frozen backbone (arXiv 2601.16060).

    An encoder that was never trained learns to segment first. The result knows the targets that the data label.

    Args:
        model: model folder to start from, as written by :func:`train_base` or built from Stable Diffusion; by default the
            bundled one.
        data, out, work, settings, watch: as for :func:`train_base`.

    Returns:
        the card as written.

    Raises:
        CancelledError: cancelled; a checkpoint is in ``work``.
        DatasetError, ModelError, OutputError: the data, the model or a folder cannot be used.
    """
    data = replace(data, known=tuple(load_card(model).planes))
    run = TrainingRun("control", data, out, work, settings or RunSettings(), watch or Watch())
    parts = load_model(model, run.device)
    trained = any(stage.stage == "control" for stage in parts.card.training)
    run.adopt(parts, choose_vocabulary(run.opened.labelled, parts.card.vocabulary, parts.tokenizer))
    run.open(parts)
    encoder = parts.image_encoder
    run.train(EncoderStage(encoder, run.source(3), run.validation), run.first_steps(default=not trained), 3)
    source = run.source(4)
    stage = ControlStage(parts.controlnet, encoder, **run.diffusion(parts, source))
    run.train(stage, run.settings.steps, 4)
    return run.save(parts, source, "", keep_sources=True)


def _small_model(run: TrainingRun) -> ProGiDiffModel:
    """The small architecture with fresh weights."""
    vocabulary = choose_vocabulary(run.opened.labelled, (), None)
    tokenizer = small.make_tokenizer(vocabulary)
    size = run.settings.image_size
    if size % _COARSEST or size <= 0:
        raise ModelError(f"The image size {size} is not a multiple of {_COARSEST}; choose one that is.")
    model = small.make_model(
        size,
        tokenizer,
        ModelCard(
            model_id="untrained",
            name="untrained",
            licence="Apache-2.0" if not run.opened.datasets else "as the data sets under trained_on allow",
            modalities=["CT", "MR"],
            vocabulary=vocabulary,
            windows={"CT": Window(kind="hu", low=-160, high=240), "MR": Window(kind="percentile", low=1, high=99)},
            image_size=size,
            spacing_mm=run.settings.spacing_mm,
            latent_shift=[0.0] * small.LATENT_CHANNELS,
            latent_scale=[1.0] * small.LATENT_CHANNELS,
            trainable_parameters=0,
        ),
    )
    return model.to(run.device)
