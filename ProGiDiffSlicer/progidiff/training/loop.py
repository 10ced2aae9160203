"""One training loop for all stages: EMA, progress, a validation curve, checkpoints that resume exactly, the best weights.

A checkpoint is one safetensors file: weights, averaged weights, optimiser moments, random states. No pickle anywhere.
"""

from __future__ import annotations

import json
import math
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Protocol

import torch
from diffusers.training_utils import EMAModel
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor, nn

from progidiff.errors import CancelledError, ModelError, OutputError
from progidiff.places import replaced_file


def save_checkpoint(
    path: Path, step: int, stage: Stage, parameters: list[nn.Parameter], optimizer: torch.optim.Optimizer, ema: EMAModel
) -> None:
    """Write everything that the next step depends on; the file is replaced in one move.

    Raises:
        OutputError: the file cannot be written; an earlier checkpoint stays as it was.
    """
    tensors = {f"weights.{i}": p.detach().cpu().contiguous() for i, p in enumerate(parameters)}
    tensors |= {f"buffers.{k}": v.detach().cpu().contiguous().clone() for k, v in stage.trainable.named_buffers()}
    tensors |= {f"ema.{i}": p.detach().cpu().contiguous() for i, p in enumerate(ema.shadow_params)}
    for i, p in enumerate(parameters):
        for key, value in optimizer.state.get(p, {}).items():
            tensors[f"adam.{i}.{key}"] = torch.as_tensor(value).detach().cpu().contiguous().clone()
    tensors["random.torch"] = torch.get_rng_state()
    if torch.cuda.is_available():
        tensors["random.cuda"] = torch.cuda.get_rng_state()
    tensors["random.source"] = stage.source_state().cpu()
    metadata = {"stage": stage.name, "step": str(step), "ema_step": str(ema.optimization_step)}
    try:
        with replaced_file(path) as staged:
            save_file(tensors, staged, metadata=metadata)
    except (OSError, SafetensorError) as error:
        raise OutputError(
            f"The checkpoint {path} cannot be written ({error}); make room or choose another folder."
        ) from error


def load_checkpoint(
    path: Path, stage: Stage, parameters: list[nn.Parameter], optimizer: torch.optim.Optimizer, ema: EMAModel
) -> int:
    """Restore a checkpoint if there is one; returns the number of steps done (0 when there is none).

    Raises:
        ModelError: when the file is of another stage or network, or damaged.
    """
    if not path.exists():
        return 0
    try:
        with safe_open(path, framework="pt") as file:
            meta, keys = file.metadata() or {}, set(file.keys())
            if meta.get("stage") != stage.name or f"weights.{len(parameters)}" in keys:
                raise ModelError(f"{path} is a checkpoint of another stage or network; choose another folder or delete it.")
            for i, p in enumerate(parameters):  # copy_ would spread a smaller tensor over a larger one
                if tuple(file.get_slice(f"weights.{i}").get_shape()) != tuple(p.shape):
                    raise ModelError(f"{path} is a checkpoint of another network; choose another folder or delete it.")
            with torch.no_grad():
                for i, p in enumerate(parameters):
                    p.copy_(file.get_tensor(f"weights.{i}"))
                    ema.shadow_params[i].copy_(file.get_tensor(f"ema.{i}"))
                    names = ("step", "exp_avg", "exp_avg_sq")
                    if f"adam.{i}.step" in keys:
                        optimizer.state[p] = {n: file.get_tensor(f"adam.{i}.{n}") for n in names}
                        for n in ("exp_avg", "exp_avg_sq"):
                            optimizer.state[p][n] = optimizer.state[p][n].to(p.device)
                for key, buffer in stage.trainable.named_buffers():
                    buffer.copy_(file.get_tensor(f"buffers.{key}"))
            ema.optimization_step = int(meta["ema_step"])
            torch.set_rng_state(file.get_tensor("random.torch"))
            if "random.cuda" in keys and torch.cuda.is_available():
                torch.cuda.set_rng_state(file.get_tensor("random.cuda"))
            stage.restore_source(file.get_tensor("random.source"))
            return int(meta["step"])
    except (SafetensorError, RuntimeError, KeyError) as error:
        raise ModelError(f"The checkpoint {path} does not fit or is damaged; delete it to start this stage anew.") from error


BEST_NAME = "best.safetensors"


class BestWeights:
    """Keeps the weights of the validation with the highest figure.

    Attributes:
        value: its figure; ``None`` before the first validation.
        step: its step.
        since: validations since then.
    """

    def __init__(self, folder: Path) -> None:
        self._path = folder / BEST_NAME
        self.value: float | None = None
        self.step = 0
        self.since = 0

    def resume(self) -> None:
        """Take up what an interrupted run has kept.

        Raises:
            ModelError: the file is damaged.
        """
        if not self._path.exists():
            return
        try:
            with safe_open(self._path, framework="pt") as file:
                found = file.metadata() or {}
            self.value, self.step, self.since = float(found["value"]), int(found["step"]), 0
        except (SafetensorError, OSError, KeyError, ValueError) as error:
            raise ModelError(f"{self._path} is damaged; delete the work folder to start anew.") from error

    def offer(self, value: float, step: int, weights: Sequence[Tensor]) -> bool:
        """Keep the weights if their figure is the highest so far; whether it is. NaN never is.

        Raises:
            OutputError: the file cannot be written.
        """
        if not value > (self.value if self.value is not None else float("-inf")):
            self.since += 1
            return False
        tensors = {str(i): w.detach().cpu().contiguous() for i, w in enumerate(weights)}
        try:
            with replaced_file(self._path) as staged:
                save_file(tensors, staged, metadata={"value": repr(value), "step": str(step)})
        except (OSError, SafetensorError) as error:
            raise OutputError(f"{self._path} cannot be written ({error}); make room or choose another folder.") from error
        self.value, self.step, self.since = value, step, 0
        return True

    def copy_to(self, weights: Sequence[Tensor]) -> None:
        """Put the kept weights into place; nothing happens where none were kept."""
        if self.value is None:
            return
        with safe_open(self._path, framework="pt") as file, torch.no_grad():
            for i, weight in enumerate(weights):
                weight.copy_(file.get_tensor(str(i)))


CHECKPOINT_NAME = "checkpoint.safetensors"
Progress = Callable[[str, int, int], None]
"""Told the stage's name, the steps done and the steps in all."""
Observer = Callable[[str, dict[str, float]], None]
"""Told what happened, ``"step"`` or ``"validation"``, and its figures."""


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
        best: name of the validation figure whose highest value decides which weights are kept; ``None`` keeps the last ones.
            The weights before the first step take part.
        patience: validations without a new best after which training ends early.
        cpu_seconds: ends training when this process has computed for so long in it, validations left out; for comparisons
            on equal terms. The learning rate then follows the time instead of the steps.
        bf16: multiply in bfloat16 on processors that can, in about half of the time; a graphics card always does.
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
    best: str | None = None
    patience: int | None = None
    cpu_seconds: float | None = None
    bf16: bool = False


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


def uses_bf16(asked: bool) -> bool:
    """Whether to multiply in bfloat16: on a graphics card, and where asked for on a processor with AVX-512 BF16."""
    return torch.cuda.is_available() or (asked and bool(torch.cpu._is_avx512_bf16_supported()))


def learning_rate_at(step: int, settings: LoopSettings, share: float | None = None) -> float:
    """Learning rate of a step (0-based): linear warm-up, then a cosine to 2 % of the peak over the steps, or over the time.

    Args:
        step: the step.
        settings: the stage's settings.
        share: share of the time that has passed, where time decides.
    """
    if step < settings.warmup:
        return settings.learning_rate * (step + 1) / settings.warmup
    done = (step - settings.warmup) / max(settings.steps - settings.warmup, 1) if share is None else share
    return settings.learning_rate * (0.02 + 0.98 * 0.5 * (1 + math.cos(math.pi * min(done, 1.0))))


def run_stage(
    stage: Stage,
    settings: LoopSettings,
    folder: Path,
    log: Callable[[str], None] = print,
    cancelled: Callable[[], bool] = lambda: False,
    progress: Progress | None = None,
    observe: Observer | None = None,
) -> list[dict[str, float]]:
    """Train a stage to its last step, resuming from ``folder`` if it holds a checkpoint of this stage.

    On return the stage's modules hold the averaged (EMA) weights: the best ones if the settings say by what, else the last.

    Args:
        stage: the stage.
        settings: its settings.
        folder: where checkpoints, ``curve.json`` and ``curve.png`` go.
        log: receives one line per report.
        cancelled: asked after each step; when true a checkpoint is written and training ends.
        progress: told the stage's name, the steps done and the steps in all, at the start and after each step.
        observe: told ``"step"`` with its figures after each step, and ``"validation"`` with its figures and whether they are
            the best (1.0 or 0.0).

    Returns:
        The validation curve: one dictionary per validation, with ``step``.

    Raises:
        CancelledError: it was cancelled before its last step; the checkpoint is written, and the modules hold the
            averaged weights, the best ones where the settings say by what.
        ModelError: the checkpoint in ``folder`` is of another stage or network, or damaged.
        OutputError: a checkpoint cannot be written.
    """
    folder.mkdir(parents=True, exist_ok=True)
    device = "cuda" if torch.cuda.is_available() else "cpu"
    parameters = [p for p in stage.trainable.parameters() if p.requires_grad]
    optimizer = torch.optim.AdamW(parameters, lr=settings.learning_rate, weight_decay=settings.weight_decay)
    ema = EMAModel(parameters, decay=settings.ema, use_ema_warmup=True, inv_gamma=1.0, power=0.75)
    torch.manual_seed(settings.seed)
    curve: list[dict[str, float]] = []
    start = load_checkpoint(folder / CHECKPOINT_NAME, stage, parameters, optimizer, ema)
    if start:
        curve = read_curve(folder, start)
        log(f"{stage.name}: resumed at step {start} of {settings.steps}")
    (folder / "settings.json").write_text(json.dumps(asdict(settings), indent=1))
    recent: dict[str, list[float]] = {}
    best = BestWeights(folder)
    if start:
        best.resume()
    computed = 0.0

    def validated(done: int) -> None:
        figures = validate_averaged(stage, ema, parameters)
        curve.append({"step": float(done), **figures})
        (folder / "curve.json").write_text(json.dumps(curve, indent=1))
        log(f"{stage.name} {done} validation  " + "  ".join(f"{k} {v:.3f}" for k, v in figures.items()))
        new_best = settings.best is not None and best.offer(figures.get(settings.best, math.nan), done, ema.shadow_params)
        if observe is not None:
            observe("validation", {**curve[-1], "best": float(new_best)})

    if settings.best is not None and not start:
        validated(0)
    began, last = time.monotonic(), start
    stage.trainable.train()
    if progress is not None:
        progress(stage.name, start, settings.steps)
    for step in range(start, settings.steps):
        clock = time.process_time()
        share = None if settings.cpu_seconds is None else min(computed / settings.cpu_seconds, 1.0)
        for group in optimizer.param_groups:
            group["lr"] = learning_rate_at(step, settings, share)
        with torch.autocast(device, torch.bfloat16, enabled=uses_bf16(settings.bf16)):
            loss, numbers = stage.loss(settings.images)
        optimizer.zero_grad(set_to_none=True)
        loss.backward()
        torch.nn.utils.clip_grad_norm_(parameters, 1.0)
        optimizer.step()
        ema.step(parameters)
        shown_now = {"loss": float(loss.detach()), **numbers}
        for key, value in shown_now.items():
            recent.setdefault(key, []).append(value)
        done = step + 1
        computed += time.process_time() - clock
        spent = settings.cpu_seconds is not None and computed >= settings.cpu_seconds
        if observe is not None:
            observe("step", {"step": float(done), **shown_now})
        if done % settings.log_every == 0:
            pace = (time.monotonic() - began) / (done - last)
            shown = "  ".join(f"{k} {sum(v) / len(v):.4f}" for k, v in recent.items())
            left = (settings.steps - done) * pace / 60
            log(f"{stage.name} {done}/{settings.steps}  {shown}  {pace:.2f} s/step  ETA {left:.1f} min")
            recent.clear()
        if progress is not None:
            progress(stage.name, done, settings.steps)
        stop = cancelled() and done < settings.steps
        if done % settings.validate_every == 0 or done == settings.steps or spent:
            validated(done)
        tired = settings.patience is not None and best.since >= settings.patience
        if done % settings.checkpoint_every == 0 or done == settings.steps or stop:
            save_checkpoint(folder / CHECKPOINT_NAME, done, stage, parameters, optimizer, ema)
        if stop:
            ema.copy_to(parameters)
            best.copy_to(parameters)
            raise CancelledError(
                f"Stopped at step {done} of {settings.steps} of the stage {stage.name}; the checkpoint is kept."
            )
        if spent or tired:
            log(f"{stage.name}: ended at step {done}, " + ("the time is spent" if spent else "no better for a while"))
            break
    ema.copy_to(parameters)
    best.copy_to(parameters)
    stage.trainable.eval()
    draw_curve(curve, folder / "curve.png", stage.name)
    return curve


def validate_averaged(stage: Stage, ema: EMAModel, parameters: list[nn.Parameter]) -> dict[str, float]:
    """Validation figures of the averaged weights; random number streams and training weights are left as they were."""
    random, on_device = torch.get_rng_state(), torch.cuda.get_rng_state() if torch.cuda.is_available() else None
    ema.store(parameters)
    ema.copy_to(parameters)
    stage.trainable.eval()
    with torch.no_grad():
        figures = stage.validate()
    ema.restore(parameters)
    stage.trainable.train()
    torch.set_rng_state(random)
    if on_device is not None:
        torch.cuda.set_rng_state(on_device)
    return figures


@contextmanager
def stage_clock(folder: Path) -> Iterator[None]:
    """Add the wall time of what runs inside to ``folder/seconds.json``, whether it ends or is cancelled."""
    began = time.monotonic()
    try:
        yield
    finally:
        path = folder / "seconds.json"
        before = json.loads(path.read_text()) if path.exists() else 0.0
        folder.mkdir(parents=True, exist_ok=True)
        path.write_text(json.dumps(before + time.monotonic() - began))


def read_curve(folder: Path, start: int) -> list[dict[str, float]]:
    """The validation curve up to the checkpoint's step; what an interrupted run added after it is measured again."""
    path = folder / "curve.json"
    if not path.exists():
        return []
    return [point for point in json.loads(path.read_text()) if point["step"] <= start]


def draw_curve(curve: list[dict[str, float]], path: Path, title: str) -> None:
    """Validation curve as PNG."""
    names = list(dict.fromkeys(key for point in curve for key in point if key != "step"))
    if not names:
        return
    from matplotlib.figure import Figure

    figure = Figure(figsize=(7, 4), layout="constrained")
    axes = figure.add_subplot()
    for key in names:
        points = [(c["step"], c[key]) for c in curve if key in c]
        axes.plot(*zip(*points, strict=True), marker="o", markersize=3, label=key)
    axes.set(xlabel="step", ylabel="validation", title=title, ylim=(0, 1))
    axes.grid(alpha=0.3)
    axes.legend(fontsize=7, ncols=2)
    figure.savefig(path, dpi=110)
