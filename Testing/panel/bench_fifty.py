"""Fifty proposals of a large volume, from a worker process to the views: time, memory, and stalls of the event loop.

``python -m Testing.panel.bench_fifty [--size 512] [--slices 100] [--proposals 50]`` in the repository's folder. The worker's
proposals are liver-sized ellipsoids, sent as fast as the pipe takes them, which is far faster than any model.
"""

from __future__ import annotations

import argparse
import sys
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from progidiff.events import DoneEvent, Event, ImageInfo, ProgressEvent, ProposeRequest, SliceEvent

_BLOCK = 8


class EllipsoidEngine:
    """Proposes ellipsoids in the middle of an axial LPS volume, which differ in size and place."""

    device = "cpu"

    def __init__(self) -> None:
        self.shape = (0, 0, 0)

    @property
    def card(self) -> Any:
        return _Card()

    def set_image(
        self, array_kji: np.ndarray, affine: np.ndarray, modality: str | None, plane: str | None, correct_values: bool
    ) -> ImageInfo:
        spacing = np.linalg.norm(affine[:3, :3], axis=0)
        k, j, i = self.shape = array_kji.shape
        return ImageInfo("ellipsoids", "axial", k, (j, i), (float(spacing[1]), float(spacing[0])), float(spacing[2]))

    def propose(self, request: ProposeRequest, emit: Callable[[Event], None], cancelled: Callable[[], bool]) -> None:
        from progidiff.ranking.gram import GramAccumulator
        from progidiff.sampling.stack import TargetStack

        stack, gram = TargetStack("liver"), GramAccumulator()
        for index in range(self.shape[0]):
            masks = ellipsoids(self.shape, request.proposals, index)
            gram.add(masks)
            for first in range(0, len(masks), _BLOCK):
                last = first + _BLOCK >= len(masks)
                mean = masks.mean(0, dtype=np.float32) if last else None
                emit(SliceEvent("liver", index, first, masks[first : first + _BLOCK], mean, mean))
            emit(ProgressEvent("sampling", (index + 1) / self.shape[0], index, index + 1, self.shape[0], "liver", 0.0))
        stack._gram = gram
        emit(stack.ranking(request, 0.001, "All that were asked for."))
        emit(DoneEvent("ellipsoids", request.proposals))


class _Card:
    model_id = "ellipsoids"
    vocabulary = ("liver",)

    def to_dict(self) -> dict[str, Any]:
        return {"model_id": self.model_id, "vocabulary": list(self.vocabulary)}


def ellipsoids(shape: tuple[int, int, int], count: int, index: int) -> np.ndarray:
    """Slice ``index`` of the proposals: bool (N, rows, columns)."""
    depth, rows, columns = shape
    numbers = np.arange(count)[:, None, None]
    row, column = np.ogrid[:rows, :columns]
    radius = 0.22 + 0.06 * numbers / count
    flat = ((row / rows - 0.5 - 0.02 * np.sin(numbers)) / radius) ** 2 + ((column / columns - 0.4) / radius) ** 2
    return np.asarray(flat + ((index / depth - 0.5) / 0.4) ** 2 < 1)


def serve_ellipsoids() -> None:
    """What the worker process runs."""
    from progidiff.worker.server import serve

    serve(lambda folder, device, progress: EllipsoidEngine(), lambda text, vocabulary: ("liver",))


def main(arguments: Sequence[str] | None = None) -> None:
    """Run the benchmark and print what it found."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--size", type=int, default=512, help="rows and columns")
    parser.add_argument("--slices", type=int, default=100)
    parser.add_argument("--proposals", type=int, default=50)
    chosen = parser.parse_args(arguments)

    from .. import slicer_host as host

    host.install()
    host.start()
    measure((chosen.slices, chosen.size, chosen.size), chosen.proposals)


def measure(shape: tuple[int, int, int], count: int) -> None:
    """Propose, rank, show, map and combine; one printed line for each."""
    import psutil
    import qt
    import slicer

    from progidiff.volumes.geometry import Geometry
    from ProGiDiffSlicerLib.idle import IdleQueue
    from ProGiDiffSlicerLib.logic.run import RunRequest
    from ProGiDiffSlicerLib.logic.session import ProposalSession

    from .. import slicer_host as host
    from .session_support import add_volume
    from .worker_support import Pulse, run_python, worker

    scene, me = slicer.mrmlScene, psutil.Process()
    geometry = Geometry(shape[::-1], np.diag([-0.8, -0.8, 2.0, 1.0]))
    volume = add_volume(scene, geometry, "volume", np.zeros(shape, np.int16))
    code = "import sys; sys.path.insert(0, sys.argv[1]); from Testing.panel.bench_fifty import serve_ellipsoids as s; s()"
    print(f"{count} proposals of {shape[1]} x {shape[2]} x {shape[0]} voxels")
    parent = qt.QObject()
    with worker(run_python("-c", code, str(Path(__file__).resolve().parents[2]))) as client:
        session = ProposalSession(scene, client, IdleQueue(parent))
        over: list[str] = []
        session.finished.connect(lambda: over.append("finished"))
        session.failed.connect(over.append)
        before = me.memory_info().rss
        pulse = Pulse(parent)

        def timed(what: str, until: Callable[[], bool]) -> None:
            pulse.restart()
            began = time.perf_counter()
            host.spin(until, 900)
            spent, grown = time.perf_counter() - began, (me.memory_info().rss - before) / 2**20
            stall = 1000 * pulse.longest_s
            print(f"  {what:<34}{spent:7.1f} s   longest stall {stall:5.0f} ms   memory +{grown:.0f} MiB", flush=True)

        session.start(RunRequest(volume.GetID(), "liver", proposals=count))
        timed("worker started, volume sent", lambda: session.store is not None or bool(over))
        timed("all slices received and ranked", lambda: bool(over))
        store = session.store
        if over != ["finished"] or store is None:
            sys.exit(f"The run did not finish: {over}")
        print(
            f"  masks in memory: {store.memory_bytes / 2**20:.0f} MiB (as bytes: {count * np.prod(shape) / 2**20:.0f} MiB)"
        )
        rows = store.rows("liver")
        print(f"  {len(rows)} rows, {sum(row.weight for row in rows)} proposals")
        session.proposals.show(store, "liver", range(count), rows[0].index)
        timed("all proposals as segments", lambda: not session.proposals.busy)
        filled: list[bool] = []
        session.overlay.filled.connect(lambda: filled.append(True))
        session.overlay.show(store, "liver")
        timed("map of agreement", lambda: bool(filled))
        combined: list[Any] = []
        IdleQueue(parent).submit(store.staple_steps("liver"), combined.append)
        timed("STAPLE", lambda: bool(combined))
        pulse.stop()
        session.cleanup()
    scene.RemoveNode(volume)


if __name__ == "__main__":
    main()
