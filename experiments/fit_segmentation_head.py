"""Fit a segmentation head on a model's image encoder, for a model that was trained without one.

The encoder and everything else stay as they are, bit for bit; the head, a 1x1 convolution, learns on pictures as those of
``progidiff train default`` what the encoder's features say about every target. Models that are trained now have their head
from the training itself.

    python -m experiments.fit_segmentation_head DATA MODEL OUT MINUTES [SEED]
"""

from __future__ import annotations

import sys
import tempfile
import time
from dataclasses import replace
from pathlib import Path

import torch

from experiments.matched import one_thread
from progidiff.cards import TrainingStage
from progidiff.model.folder import load_model, save_model
from progidiff.synthesis.labelmaps import load_permissive
from progidiff.training.batches import painted_batches
from progidiff.training.loop import LoopSettings, run_stage
from progidiff.training.stages import EncoderStage

_NEVER = 10**6


def main(data: Path, folder: Path, out: Path, minutes: float, seed: int = 0) -> None:
    model = load_model(folder)
    card, encoder = model.card, model.image_encoder
    torch.manual_seed(seed)
    encoder.learn_classes(len(card.vocabulary))
    stage = EncoderStage(encoder, painted_batches(load_permissive(data), card, "cpu", 7 + seed), [])
    encoder.requires_grad_(False)
    encoder.segmentation_head.requires_grad_(True)
    settings = LoopSettings(
        steps=_NEVER, images=8, learning_rate=3e-3, warmup=10, checkpoint_every=_NEVER, validate_every=_NEVER,
        log_every=100, seed=seed, cpu_seconds=minutes * 60,
    )  # fmt: skip
    began, steps = time.monotonic(), 0

    def count(event: str, figures: dict[str, float]) -> None:
        nonlocal steps
        steps = int(figures["step"])

    with one_thread(), tempfile.TemporaryDirectory() as work:
        run_stage(stage, settings, Path(work), print, observe=count)
    encoder.eval().requires_grad_(False)
    made = TrainingStage(
        stage="segmentation head", steps=steps, seconds=round(time.monotonic() - began, 1), device="cpu", seeds=[seed]
    )
    model.card = replace(card, training=[*card.training, made])
    save_model(model, out, torch.float16)


if __name__ == "__main__":
    data, folder, out, minutes, *seed = sys.argv[1:]
    main(Path(data), Path(folder), Path(out), float(minutes), *map(int, seed))
