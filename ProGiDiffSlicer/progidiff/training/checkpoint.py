"""Checkpoints as one safetensors file: weights, averaged weights, optimiser moments, random states. No pickle anywhere."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

import torch
from diffusers.training_utils import EMAModel
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import nn

from progidiff.errors import ModelError, OutputError
from progidiff.places import replaced_file

if TYPE_CHECKING:
    from progidiff.training.loop import Stage


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
