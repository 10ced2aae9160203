"""A worker process whose scripted engine stops half way: ``python pausing_worker.py``.

It sends the first half of the slices and then waits, until it is cancelled or killed.
"""

from __future__ import annotations

import sys
import time
from collections.abc import Callable
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1] / "engine"))

from scripted_worker import ScriptedEngine

from progidiff.errors import CancelledError
from progidiff.wire.messages import Event, ProposeRequest, SliceEvent
from progidiff.worker.server import serve


class PausingEngine(ScriptedEngine):
    """Waits before the middle slice, where the model folder is named "pause"."""

    def _pause(self, request: ProposeRequest, emit: Callable[[Event], None], cancelled: Callable[[], bool]) -> None:
        assert self.image is not None
        middle = self.image.shape[0] // 2

        def emit_or_wait(event: Event) -> None:
            if isinstance(event, SliceEvent) and event.slice_index == middle:
                while not cancelled():
                    time.sleep(0.01)
                raise CancelledError("cancelled")
            emit(event)

        self._work(request, emit_or_wait, cancelled)


def load(folder: Path | None, device: str, progress: Callable[[str, float], None]) -> ScriptedEngine:
    return PausingEngine("work" if folder is None else folder.name)


if __name__ == "__main__":
    serve(load)
