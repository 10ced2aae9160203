"""Training runs from data to model folder: the text-to-mask backbone, and the control branch on it."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import torch
from diffusers import AutoencoderTiny

from progidiff.cards import ModelCard, Window, load_card
from progidiff.errors import ModelError
from progidiff.model.folder import ProGiDiffModel, load_model
from progidiff.model.networks import MaskDecoder
from progidiff.training import small
from progidiff.training.diffusion import BaseStage, ControlStage
from progidiff.training.session import RunSettings, TrainingRun, Watch
from progidiff.training.sources import TrainingData, choose_vocabulary
from progidiff.training.stages import AutoencoderStage, EncoderStage

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
