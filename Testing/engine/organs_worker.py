"""A worker process that invents organs: real pipes, protocol, ranking and geometry, for tests of the command line.

Run as ``python organs_worker.py [JSON]``. The script may hold ``absent`` (targets of which every proposal but the last is
empty), ``never`` (every proposal is empty), ``speck`` (so many proposals have an island), ``block`` (proposals per block,
as in adaptive sampling), ``pause`` (seconds per slice), ``note`` (a file that says ``sampling``, and later ``cancelled`` if
that happened), ``crash_after`` (slices after which the process dies), ``skip_slice`` (a slice that is left out),
``fail_load`` (a message).
"""

from __future__ import annotations

import json
import os
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np

from progidiff.errors import CancelledError, ModelError
from progidiff.proposals.proposals import Proposals
from progidiff.volumes.geometry import Geometry
from progidiff.volumes.slicing import plan_slices
from progidiff.wire.messages import DoneEvent, Event, ImageInfo, ProgressEvent, ProposeRequest, SliceEvent, WarningEvent
from progidiff.worker.server import serve

SCRIPT: dict[str, Any] = json.loads(sys.argv[1]) if len(sys.argv) > 1 else {}
# Centre (row, column) and radius as shares of the slice, roughly where the organs lie in an axial view.
PLACES = {
    "liver": (0.42, 0.32, 0.17),
    "spleen": (0.55, 0.75, 0.08),
    "left kidney": (0.62, 0.66, 0.07),
    "right kidney": (0.62, 0.36, 0.07),
    "pancreas": (0.45, 0.52, 0.05),
}


class Card(SimpleNamespace):
    """What the worker needs of a model card."""

    def to_dict(self) -> dict[str, Any]:
        return {"model_id": self.model_id, "name": "Organs <model>", "licence": "CC0", "modalities": ["CT"]}


class OrganEngine:
    """Discs that grow and shrink along the slices, each proposal a little elsewhere."""

    device = "cpu"
    adapter = None

    def __init__(self, folder: Path | None, device: str, progress: Callable[[str, float], None]) -> None:
        if message := SCRIPT.get("fail_load"):
            raise ModelError(message)
        progress("loading the model", 0.0)
        progress("loading the model", 1.0)
        self.card = Card(model_id="organs-1", vocabulary=tuple(PLACES))

    def set_image(
        self,
        array_kji: np.ndarray,
        affine: np.ndarray,
        modality: str | None,
        plane: str | None = None,
        correct_values: bool = False,
    ) -> ImageInfo:
        k, j, i = array_kji.shape
        self.geometry = Geometry((i, j, k), affine)
        self.plan = plan = plan_slices(self.geometry, plane)
        return ImageInfo("0123abcd", plan.plane, plan.count, plan.shape_rc, plan.spacing_rc, plan.slice_spacing)

    def propose(self, request: ProposeRequest, emit: Callable[[Event], None], cancelled: Callable[[], bool]) -> None:
        try:
            self._propose(request, emit, cancelled)
        except CancelledError:  # noticed here, or by the worker when it is given an event
            if note := SCRIPT.get("note"):
                Path(note).write_text("cancelled\n", encoding="utf-8")
            raise

    def _propose(self, request: ProposeRequest, emit: Callable[[Event], None], cancelled: Callable[[], bool]) -> None:
        began = time.monotonic()
        slices = range(*(request.slices or (0, self.plan.count)))
        emit(WarningEvent("invented", "These proposals are <b>invented</b>."))
        note = SCRIPT.get("note")
        if note:
            Path(note).write_text("sampling\n", encoding="utf-8")
        done = 0
        for target in request.targets:
            masks = {index: self._masks(target, index, slices, request) for index in slices}
            proposals = Proposals(target, self.plan, slices)
            for index in slices:
                if cancelled():
                    raise CancelledError("The request was cancelled.")
                if done == SCRIPT.get("crash_after"):
                    print("RuntimeError: the scripted end", file=sys.stderr, flush=True)
                    os._exit(9)
                fraction = done / (len(slices) * len(request.targets))
                emit(ProgressEvent("sampling", fraction, index, index - slices.start, len(slices), target, 1.5))
                time.sleep(SCRIPT.get("pause", 0))
                if index != SCRIPT.get("skip_slice"):
                    for event in self._slice_events(target, index, masks[index]):
                        proposals.add(event)
                        emit(event)
                done += 1
            for tidied in () if request.keep_pieces else proposals.tidy():
                emit(tidied)
            reason = f"All {request.proposals} proposals were sampled."
            ranking = proposals.rank(request, self.geometry.voxel_volume_ml, reason)
            emit(ranking)
            if ranking.empty_share >= 0.5:
                emit(WarningEvent("empty", f"{target}: {ranking.empty_share:.0%} of the proposals are empty."))
        emit(DoneEvent("organs-1", request.proposals, {"sampling": time.monotonic() - began}, 12.5))

    def _masks(self, target: str, index: int, slices: range, request: ProposeRequest) -> np.ndarray:
        rows, cols = self.plan.shape_rc
        row, col, radius = PLACES[target]
        y, x = np.mgrid[:rows, :cols]
        along = np.sin(np.pi * (index - slices.start + 0.5) / len(slices))
        masks = []
        for number in range(request.proposals):
            rng = np.random.default_rng((request.seed, number))
            dy, dx, size = rng.normal(0, 0.012), rng.normal(0, 0.012), rng.normal(1, 0.06)
            distance = np.hypot((y / rows - row - dy), (x / cols - col - dx))
            masks.append(distance < radius * along * size)
        stack = np.array(masks)
        if target in SCRIPT.get("absent", []):
            stack[:-1] = False
        if target in SCRIPT.get("never", []):
            stack[:] = False
        if index == slices.start + 1:
            stack[: SCRIPT.get("speck", 0), 3:5, 3:6] = True
        return stack

    def _slice_events(self, target: str, index: int, masks: np.ndarray) -> Iterator[SliceEvent]:
        block = SCRIPT.get("block", len(masks))
        for first in range(0, len(masks), block):
            part = masks[first : first + block]
            mean = masks.mean(axis=0, dtype=np.float32) if first + block >= len(masks) else None
            yield SliceEvent(target, index, first, part, mean)


if __name__ == "__main__":
    serve(engine_factory=OrganEngine)
