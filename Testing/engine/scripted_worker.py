"""A worker process with a scripted engine: ``python scripted_worker.py [serve option=value ...]``.

The model folder of a load request says how the engine behaves, e.g. ``crash``; see ``ScriptedEngine``.
"""

from __future__ import annotations

import os
import sys
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from progidiff.errors import CancelledError, InputError, ModelError, PromptError
from progidiff.wire.messages import (
    DoneEvent,
    Event,
    ImageInfo,
    ProgressEvent,
    ProposeRequest,
    RankingEvent,
    SliceEvent,
    WarningEvent,
)
from progidiff.worker.server import serve

SECRET = "DOE_JANE_19500101"


@dataclass(frozen=True)
class Card:
    model_id: str = "scripted"
    vocabulary: Sequence[str] = ("liver", "spleen")

    def to_dict(self) -> dict[str, Any]:
        return {"model_id": self.model_id, "vocabulary": list(self.vocabulary)}


class OutOfMemoryError(RuntimeError):
    """Named as torch's."""


class ScriptedEngine:
    """Thresholds the image; every ``mode`` is one way to work or to fail."""

    device = "cpu"
    adapter = None

    def __init__(self, mode: str) -> None:
        self.mode = mode
        self.card = Card()
        self.image: np.ndarray | None = None
        self.images_set = 0

    def set_image(
        self,
        array_kji: np.ndarray,
        affine: np.ndarray,
        modality: str | None,
        plane: str | None = None,
        correct_values: bool = False,
    ) -> ImageInfo:
        if self.mode == "refuse_image":
            raise InputError(f"The image {SECRET} is uniform; choose another.")
        self.images_set += 1
        self.image = array_kji
        spacing = np.sqrt((affine[:3, :3] ** 2).sum(axis=0))
        return ImageInfo(
            content_hash=f"engine-{self.images_set}",
            plane=plane or "axial",
            slice_count=array_kji.shape[0],
            slice_shape=(array_kji.shape[1], array_kji.shape[2]),
            spacing_rc=(float(spacing[1]), float(spacing[0])),
            slice_spacing=float(spacing[2]),
        )

    def propose(self, request: ProposeRequest, emit: Callable[[Event], None], cancelled: Callable[[], bool]) -> None:
        getattr(self, f"_{self.mode}", self._work)(request, emit, cancelled)

    def _work(self, request: ProposeRequest, emit: Callable[[Event], None], cancelled: Callable[[], bool]) -> None:
        count = self.image.shape[0]
        for target in request.targets:
            if target not in self.card.vocabulary:
                raise PromptError(f'"{target}" is not known; the nearest is liver.')
            for k in range(count):
                levels = np.linspace(0.2, 0.8, request.proposals) * float(self.image.max())
                masks = self.image[k] > levels[:, None, None]
                emit(ProgressEvent("sampling", k / count, k, k, count, target, 1.5))
                emit(SliceEvent(target, k, 0, masks, masks.mean(0, dtype=np.float32)))
            n = request.proposals
            emit(
                RankingEvent(
                    target=target,
                    order=list(range(n)),
                    scores=[1.0] * (n - 1) + [float("nan")],
                    groups=[[i] for i in range(n)],
                    top_k=[0],
                    random_pick=0,
                    millilitres=list(np.linspace(1, 2, n)),  # type: ignore[arg-type]
                    empty=[False] * n,
                    empty_share=0.0,
                    mean_pairwise_dice=float("nan"),
                    stop_reason="the maximum was reached",
                )
            )
        emit(WarningEvent("batch_halved", "The batch was halved."))
        emit(DoneEvent("scripted", request.proposals, {"total": 0.5}, 12.0))

    def _slow(self, request: ProposeRequest, emit: Callable[[Event], None], cancelled: Callable[[], bool]) -> None:
        for step in range(6000):
            if cancelled():
                raise CancelledError("cancelled")
            emit(ProgressEvent("sampling", step / 6000))
            time.sleep(0.01)

    def _deaf(self, request: ProposeRequest, emit: Callable[[Event], None], cancelled: Callable[[], bool]) -> None:
        emit(ProgressEvent("sampling", 0.0))
        time.sleep(600)

    def _hog(self, request: ProposeRequest, emit: Callable[[Event], None], cancelled: Callable[[], bool]) -> None:
        """Holds the interpreter lock for long stretches during at least two seconds and says nothing."""
        began, stretches = time.monotonic(), 0
        while stretches < 4 or time.monotonic() - began < 2.0:
            10 ** (800_000 + int(cancelled()))
            stretches += 1
        emit(DoneEvent("scripted", 1))

    def _flood(self, request: ProposeRequest, emit: Callable[[Event], None], cancelled: Callable[[], bool]) -> None:
        """Far more than any queue on the way holds; the buffer is used again and again."""
        masks = np.zeros((56, 256, 256), bool)
        mean = np.ones((256, 256), np.float32)
        for k in range(request.seed):
            masks[0] = False
            masks[0].flat[k] = True
            emit(SliceEvent("liver", k, 0, masks, mean))
        emit(DoneEvent("scripted", 8))

    def _noisy(self, request: ProposeRequest, emit: Callable[[Event], None], cancelled: Callable[[], bool]) -> None:
        print("stray print of a library")
        os.write(1, b"stray bytes of native code\n")
        os.system("echo stray output of a child process")
        emit(ProgressEvent(f"input said {sys.stdin.read()!r}", 0.5))
        self._work(request, emit, cancelled)

    def _crash(self, request: ProposeRequest, emit: Callable[[Event], None], cancelled: Callable[[], bool]) -> None:
        emit(ProgressEvent("sampling", 0.1))
        raise ValueError(f"bad value in /home/{SECRET}/scan.nii.gz")

    def _exit(self, request: ProposeRequest, emit: Callable[[Event], None], cancelled: Callable[[], bool]) -> None:
        sys.exit(7)

    def _die(self, request: ProposeRequest, emit: Callable[[Event], None], cancelled: Callable[[], bool]) -> None:
        print("the last line of the log", file=sys.stderr, flush=True)
        os._exit(42)

    def _memory(self, request: ProposeRequest, emit: Callable[[Event], None], cancelled: Callable[[], bool]) -> None:
        raise MemoryError

    def _cuda_memory(self, request: ProposeRequest, emit: Callable[[Event], None], cancelled: Callable[[], bool]) -> None:
        raise OutOfMemoryError("CUDA out of memory")

    def _unfinished(self, request: ProposeRequest, emit: Callable[[Event], None], cancelled: Callable[[], bool]) -> None:
        emit(ProgressEvent("sampling", 1.0))

    def _foreign_event(self, request: ProposeRequest, emit: Callable[[Event], None], cancelled: Callable[[], bool]) -> None:
        emit({"type": "done"})  # type: ignore[arg-type]


def load(folder: Path | None, device: str, progress: Callable[[str, float], None]) -> ScriptedEngine:
    mode = "work" if folder is None else folder.name
    if mode == "missing":
        raise ModelError(f"The folder {SECRET} has no model card; choose a model folder.")
    if mode == "slow_load":
        for step in range(6000):
            progress("reading weights", step / 6000)
            time.sleep(0.01)
    progress("reading weights", 0.5)
    return ScriptedEngine(mode)


if __name__ == "__main__":
    options: dict[str, Any] = {}
    for argument in sys.argv[1:]:
        name, _, value = argument.partition("=")
        options[name] = float(value) if name == "heartbeat_s" else int(value)
    serve(load, **options)
