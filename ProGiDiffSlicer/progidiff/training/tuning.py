"""Tuning the conditioning on a few labelled cases: LoRA (peft); to compare with, full fine-tuning and training from scratch.

The paper moves its model from CT to MR with LoRA on the trained conditioning, and compares that with training the same
parameters from scratch (arXiv 2601.16060). The frozen backbone is never touched.
"""

from __future__ import annotations

import time
from collections.abc import Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any, Literal

import torch
from torch import Tensor

from progidiff.cards import Layers, Modality
from progidiff.errors import CancelledError, DatasetError, ModelError
from progidiff.model.adapter import add_lora
from progidiff.model.folder import ProGiDiffModel
from progidiff.model.networks import ControlBranch, tokenize
from progidiff.sampling.conditioning import presence_of, presence_threshold
from progidiff.sampling.denoise import denoise, make_scheduler
from progidiff.training.batches import (
    BatchSource,
    DatasetBatches,
    MixedBatches,
    TrainingBatch,
    painted_batches,
    validation_batches,
)
from progidiff.training.diffusion import ControlStage
from progidiff.training.loop import LoopSettings, Observer, read_curve, run_stage
from progidiff.training.run import Watch
from progidiff.training.stacks import Stack

Method = Literal["lora", "full", "scratch"]

#: Peak learning rates by method, for networks of the small size and for full-size ones.
RATES: dict[Method, tuple[float, float]] = {"lora": (3e-3, 1e-4), "full": (3e-4, 1e-5), "scratch": (8e-4, 2e-5)}
_SMALL_PARAMETERS = 50_000_000
#: Samples per slice and target of a validation, and their denoising steps.
_SAMPLES, _STEPS = 4, 4


@dataclass(frozen=True)
class TuneSettings:
    """Settings of a tuning.

    Attributes:
        method: ``"lora"``, ``"full"`` (all weights of control branch and image encoder) or ``"scratch"`` (the same, from
            fresh weights).
        steps: most optimiser steps.
        rank, alpha, layers: of LoRA; ``alpha`` ``None`` for the rank itself.
        learning_rate: peak; ``None`` chooses by method and size.
        images, prompts_per_image: of a step.
        replay_share: share of synthetic phantoms among the images, against forgetting.
        strength: strength of the augmentation, 0 to 1.
        validate_every, patience: steps between validations, and validations without a new best that end it.
        validation_images: held-out slices that the curve is measured on.
        cpu_seconds: ends the training after so much computing; for comparisons on equal terms.
        seed: of data, noise and fresh weights.
        cache_mb: memory for prepared slices.
    """

    method: Method = "lora"
    steps: int = 150
    rank: int = 8
    alpha: float | None = None
    layers: Layers = "all"
    learning_rate: float | None = None
    images: int = 4
    prompts_per_image: int = 2
    replay_share: float = 0.25
    strength: float = 1.0
    validate_every: int = 25
    patience: int | None = 4
    validation_images: int = 12
    cpu_seconds: float | None = None
    seed: int = 0
    cache_mb: float = 1024.0


@dataclass(frozen=True)
class Tuned:
    """What a tuning came to.

    Attributes:
        curve: validations, each with ``step`` and ``dice``; empty where nobody was held out.
        steps: steps that were made.
        best_step: the step whose weights were kept.
        seconds: wall time.
        cancelled: whether it was cancelled; the model then holds the best weights so far.
    """

    curve: list[dict[str, float]]
    steps: int
    best_step: int
    seconds: float
    cancelled: bool = False


class TuneStage(ControlStage):
    """The control stage on few cases: validation asks only for what is labelled, with a few samples each.

    Args:
        method: what is trained.
        pixel_mm: pixel size of the model's grid.
    """

    name = "tuning"

    def __init__(self, method: Method, pixel_mm: float, *args: Any, **kwargs: Any) -> None:
        # On a few cases a head that shapes the features costs the proposals more than it gives them.
        super().__init__(*args, head_follows=True, hint_weight=0.0, **kwargs)
        self.pixel_mm = pixel_mm
        if method == "lora":
            for name, parameter in self.trainable.named_parameters():
                parameter.requires_grad_(".lora_" in name)

    @torch.no_grad()
    def samples(self, images: Tensor, image: Tensor, target: Tensor, seed: int = 0) -> Tensor:
        """Sampled masks, bool (samples, R, S, S), of R rows: a target each on one of the images (B, 1, S, S).

        As with proposals, some or all of them are empty where the segmentation head finds the target unlikely.
        """
        features = self.encoder(images)
        presence = torch.ones(len(image))
        if self.segmentation_weight:
            found = torch.stack([presence_of(one, self.pixel_mm) for one in self.encoder.segment(features)])
            presence = found[image.cpu(), target.cpu()]
        hint = self.encoder.hint(features[image], self.pooled[target])
        masks = []
        shape = (self.unet.config.in_channels, *hint.shape[-2:])
        for sample in range(_SAMPLES):
            # the same noise for every row and at every validation, so that the curve shows the weights alone
            noise = torch.randn(shape, generator=torch.Generator().manual_seed(seed + sample)).to(images.device)
            solver = make_scheduler(self.schedule, "ddim", _STEPS)
            velocity = partial(self.velocity, hint=hint, target=target)
            z = denoise(velocity, noise.expand(len(image), *shape), solver)
            shown = (presence > presence_threshold(sample)).to(images.device)
            masks.append((self.decode(z)[:, 0] > 0) & shown[:, None, None])
        return torch.stack(masks)

    def validate(self) -> dict[str, float]:
        """Mean Dice of single samples over targets, and each target's, on the slices that show them.

        The mean mask of the samples would be smoother, but a target on whose place the samples do not agree yet has none.
        """
        found: dict[int, list[float]] = {}
        for batch in self.validation:
            image, target = torch.nonzero((batch.masks.flatten(2).sum(-1) > 15) & batch.known, as_tuple=True)
            if not len(image):
                continue
            masks = self.samples(batch.images, image, target)
            truth = batch.masks[image, target]
            sizes = (masks.flatten(2).sum(2) + truth.flatten(1).sum(1)).clamp_min(1)
            dice = (2 * (masks & truth).flatten(2).sum(2) / sizes).mean(0)
            for v, value in zip(target.tolist(), dice.tolist(), strict=True):
                found.setdefault(v, []).append(value)
        if not found:
            return {}
        means = {v: sum(values) / len(values) for v, values in sorted(found.items())}
        return {"dice": sum(means.values()) / len(means), **{self.names[v]: value for v, value in means.items()}}

    names: Sequence[str] = ()
    """Target names of the vocabulary."""


def tune(
    model: ProGiDiffModel,
    train: Sequence[Stack],
    held_out: Sequence[Stack],
    work: Path,
    settings: TuneSettings | None = None,
    watch: Watch | None = None,
    modality: Modality | None = None,
    observe: Observer | None = None,
) -> Tuned:
    """Tune a loaded float32 model in place; with LoRA the low-rank layers stay in it.

    Args:
        model: the model; nothing of its backbone is changed.
        train: stacks to train on.
        held_out: stacks of other patients; where there are any, the best weights by their Dice are kept.
        work: folder for checkpoints; a tuning that was interrupted there goes on.
        settings: see :class:`TuneSettings`.
        watch: log, progress and cancellation.
        modality: of the prompt, where the model's prompts name it.
        observe: told each step's and validation's figures.

    Raises:
        DatasetError: nothing to train on.
        ModelError: settings that cannot be used, or the work folder is of another tuning.
    """
    settings, watch, began = settings or TuneSettings(), watch or Watch(), time.monotonic()
    if not train:
        raise DatasetError("There are no cases to train on; save some training examples first.")
    if settings.steps < 1 or settings.images < 1 or settings.rank < 1 or not 0 <= settings.replay_share < 1:
        raise ModelError("Tuning needs at least one step, one image per step and rank 1, and a replay share below 1.")
    torch.manual_seed(settings.seed)
    if settings.method == "scratch":
        model.controlnet = ControlBranch.from_unet(model.unet).to(model.device)
        model.image_encoder = type(model.image_encoder).from_config(model.image_encoder.config).to(model.device)
    stage = _stage(model, train, held_out, settings, modality, watch)
    stage.names = model.card.vocabulary
    if settings.method == "lora":
        stage.trainable.train()
    rate = settings.learning_rate or RATES[settings.method][model.trainable_parameters() > _SMALL_PARAMETERS]
    steps = settings.steps if settings.cpu_seconds is None else 10**6
    loop = LoopSettings(
        steps=steps,
        images=settings.images,
        learning_rate=rate,
        warmup=max(1, min(10, steps // 10)),
        ema=0.98,
        checkpoint_every=settings.validate_every,
        validate_every=settings.validate_every if stage.validation else 10**9,
        seed=settings.seed,
        best="dice" if stage.validation else None,
        patience=settings.patience if stage.validation else None,
        cpu_seconds=settings.cpu_seconds,
    )
    made = 0
    curve: list[dict[str, float]] = []

    def follow(event: str, figures: dict[str, float]) -> None:
        nonlocal made
        made = int(figures["step"])
        if observe is not None:
            observe(event, figures)

    cancelled = False
    try:
        curve = run_stage(stage, loop, work, watch.log, watch.cancelled, watch.progress, follow)
    except CancelledError:
        cancelled = True
        curve = read_curve(work, made)
    finally:
        stage.trainable.eval()
        stage.trainable.requires_grad_(False)
    made = made or int(max((point["step"] for point in curve), default=0))
    curve = [point for point in curve if "dice" in point]
    best = max(curve, key=lambda point: (point["dice"], -point["step"]))["step"] if curve else made
    return Tuned(curve, made, int(best), time.monotonic() - began, cancelled)


def _stage(
    model: ProGiDiffModel,
    train: Sequence[Stack],
    held_out: Sequence[Stack],
    settings: TuneSettings,
    modality: Modality | None,
    watch: Watch,
) -> TuneStage:
    card, device = model.card, model.device
    if settings.method == "lora":
        add_lora(model, settings.rank, settings.alpha or float(settings.rank), settings.layers)
    validation: list[TrainingBatch] = []
    if held_out:
        validation = validation_batches(held_out, card, device, settings.validation_images, settings.seed)
    prompts = [card.prompt(target, modality) for target in card.vocabulary]
    return TuneStage(
        settings.method,
        card.spacing_mm,
        model.controlnet,
        model.image_encoder,
        vae=model.vae,
        unet=model.unet,
        decoder=model.mask_decoder,
        schedule=model.scheduler,
        tokens=tokenize(model.tokenizer, prompts, device),
        text_encoder=model.text_encoder,
        latent_shift=card.latent_shift,
        latent_scale=card.latent_scale,
        source=_source(model, train, settings, watch),
        validation=validation,
        prompts_per_image=settings.prompts_per_image,
    )


def _source(model: ProGiDiffModel, train: Sequence[Stack], settings: TuneSettings, watch: Watch) -> BatchSource:
    card, device = model.card, model.device
    own = DatasetBatches(train, card, device, settings.seed, settings.strength, settings.cache_mb, watch.log)
    if not settings.replay_share:
        return own
    phantoms = painted_batches([], card, device, settings.seed + 1)
    return MixedBatches([own, phantoms], [1 - settings.replay_share, settings.replay_share], settings.seed)
