"""One training loop for all stages: accelerate, EMA, progress with ETA, a validation curve, checkpoints that resume exactly."""

from __future__ import annotations

import json
import math
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Protocol

import torch
from accelerate import Accelerator
from diffusers.training_utils import EMAModel
from torch import Tensor, nn

from progidiff.training.checkpoint import load_checkpoint, save_checkpoint


@dataclass(frozen=True)
class LoopSettings:
    """Settings of one stage.

    Attributes:
        steps: optimiser steps.
        images: images per step.
        learning_rate: peak learning rate (linear warm-up, cosine decay to 2 %).
        warmup: warm-up steps.
        weight_decay: AdamW's weight decay.
        ema: decay of the averaged weights.
        checkpoint_every: steps between checkpoints.
        validate_every: steps between validations.
        log_every: steps between log lines.
        seed: seed of everything random in the stage.
    """

    steps: int
    images: int = 4
    learning_rate: float = 6e-4
    warmup: int = 60
    weight_decay: float = 1e-4
    ema: float = 0.998
    checkpoint_every: int = 250
    validate_every: int = 500
    log_every: int = 50
    seed: int = 0


class Stage(Protocol):
    """What the loop needs of a stage."""

    name: str
    trainable: nn.ModuleDict

    def loss(self, count: int) -> tuple[Tensor, dict[str, float]]:
        """Loss on ``count`` new images, and numbers to log."""
        ...

    def validate(self) -> dict[str, float]:
        """Validation figures with the averaged weights in place."""
        ...

    def source_state(self) -> Tensor:
        """State of the data source."""
        ...

    def restore_source(self, state: Tensor) -> None:
        """Continue the data source."""
        ...


def learning_rate_at(step: int, settings: LoopSettings) -> float:
    """Learning rate of a step (0-based): linear warm-up, then a cosine to 2 % of the peak."""
    if step < settings.warmup:
        return settings.learning_rate * (step + 1) / settings.warmup
    done = (step - settings.warmup) / max(settings.steps - settings.warmup, 1)
    return settings.learning_rate * (0.02 + 0.98 * 0.5 * (1 + math.cos(math.pi * min(done, 1.0))))


def run_stage(
    stage: Stage,
    settings: LoopSettings,
    folder: Path,
    log: Callable[[str], None] = print,
    cancelled: Callable[[], bool] = lambda: False,
) -> list[dict[str, float]]:
    """Train a stage to its last step, resuming from ``folder`` if it holds a checkpoint of this stage.

    On return the stage's modules hold the averaged (EMA) weights.

    Args:
        stage: the stage.
        settings: its settings.
        folder: where checkpoints, ``curve.json`` and ``curve.png`` go.
        log: receives one line per report.
        cancelled: asked after each step; when true a checkpoint is written and the function returns early.

    Returns:
        The validation curve: one dictionary per validation, with ``step``.
    """
    folder.mkdir(parents=True, exist_ok=True)
    accelerator = Accelerator(mixed_precision="bf16" if torch.cuda.is_available() else "no")
    parameters = [p for p in stage.trainable.parameters() if p.requires_grad]
    optimizer = torch.optim.AdamW(parameters, lr=settings.learning_rate, weight_decay=settings.weight_decay)
    ema = EMAModel(parameters, decay=settings.ema, use_ema_warmup=True, inv_gamma=1.0, power=0.75)
    torch.manual_seed(settings.seed)
    curve: list[dict[str, float]] = []
    start = load_checkpoint(folder / "checkpoint.safetensors", stage, parameters, optimizer, ema)
    if start:
        curve = json.loads((folder / "curve.json").read_text()) if (folder / "curve.json").exists() else []
        log(f"{stage.name}: resumed at step {start} of {settings.steps}")
    (folder / "settings.json").write_text(json.dumps(asdict(settings), indent=1))
    recent: dict[str, list[float]] = {}
    began, last = time.monotonic(), start
    stage.trainable.train()
    for step in range(start, settings.steps):
        for group in optimizer.param_groups:
            group["lr"] = learning_rate_at(step, settings)
        with accelerator.autocast():
            loss, numbers = stage.loss(settings.images)
        optimizer.zero_grad(set_to_none=True)
        accelerator.backward(loss)
        torch.nn.utils.clip_grad_norm_(parameters, 1.0)
        optimizer.step()
        ema.step(parameters)
        for key, value in {"loss": float(loss.detach()), **numbers}.items():
            recent.setdefault(key, []).append(value)
        done = step + 1
        if done % settings.log_every == 0:
            pace = (time.monotonic() - began) / (done - last)
            shown = "  ".join(f"{k} {sum(v) / len(v):.4f}" for k, v in recent.items())
            log(f"{stage.name} {done}/{settings.steps}  {shown}  {pace:.2f} s/step  ETA {(settings.steps - done) * pace / 60:.1f} min")
            recent.clear()
        stop = cancelled()
        if done % settings.validate_every == 0 or done == settings.steps:
            curve.append({"step": float(done), **validate_averaged(stage, ema, parameters)})
            (folder / "curve.json").write_text(json.dumps(curve, indent=1))
            log(f"{stage.name} {done} validation  " + "  ".join(f"{k} {v:.3f}" for k, v in curve[-1].items() if k != "step"))
        if done % settings.checkpoint_every == 0 or done == settings.steps or stop:
            save_checkpoint(folder / "checkpoint.safetensors", done, stage, parameters, optimizer, ema)
        if stop:
            break
    ema.copy_to(parameters)
    stage.trainable.eval()
    draw_curve(curve, folder / "curve.png", stage.name)
    return curve


def validate_averaged(stage: Stage, ema: EMAModel, parameters: list[nn.Parameter]) -> dict[str, float]:
    """Validation figures of the averaged weights; random number streams and training weights are left as they were."""
    random = torch.get_rng_state()
    ema.store(parameters)
    ema.copy_to(parameters)
    stage.trainable.eval()
    with torch.no_grad():
        figures = stage.validate()
    ema.restore(parameters)
    stage.trainable.train()
    torch.set_rng_state(random)
    return figures


def draw_curve(curve: list[dict[str, float]], path: Path, title: str) -> None:
    """Validation curve as PNG."""
    if not curve:
        return
    from matplotlib.figure import Figure

    figure = Figure(figsize=(7, 4), layout="constrained")
    axes = figure.add_subplot()
    for key in (k for k in curve[0] if k != "step"):
        axes.plot([c["step"] for c in curve], [c[key] for c in curve], marker="o", markersize=3, label=key)
    axes.set(xlabel="step", ylabel="validation", title=title, ylim=(0, 1))
    axes.grid(alpha=0.3)
    axes.legend(fontsize=7, ncols=2)
    figure.savefig(path, dpi=110)
