"""The best weights so far, kept on disk beside the checkpoint, so that neither more training nor a cancel can lose them."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor

from progidiff.errors import ModelError, OutputError
from progidiff.places import replaced_file

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
