"""Interleaved repeats, peaks of memory, and the check that both sides sample the same masks."""

from __future__ import annotations

import ctypes
import gc
import sys
import threading
from collections.abc import Callable, Sequence
from contextlib import suppress
from dataclasses import dataclass, field
from types import TracebackType
from typing import Self

import numpy as np
import torch

from experiments.bench.reference import PipelineReference
from experiments.bench.results import Agreement, Row, Spread
from experiments.bench.scene import SLICES, Scene
from experiments.bench.sides import Sample, Side
from progidiff.proposals.votes import consensus_overlap
from progidiff.sampling.denoise import decode
from progidiff.system import is_out_of_memory, process_memory_mb

Say = Callable[[str], None]
#: Proposals of the check that both sides sample the same; a loop of the slow side need not run through.
CHECKED = 4
_POLL_S = 0.002
_MIB = 1024 * 1024


class PeakMemory:
    """Most memory while a block runs: device memory on CUDA, else the resident memory of this process, polled by a thread.

    Attributes:
        peak_mb: MiB.
        added_mb: MiB above what was taken before the block.
    """

    def __init__(self, device: torch.device) -> None:
        self._cuda = device.type == "cuda"
        self._over = threading.Event()
        self._thread = threading.Thread(target=self._poll, name="memory", daemon=True)
        self.peak_mb = self.added_mb = self._before = 0.0

    def __enter__(self) -> Self:
        release_memory()
        if self._cuda:
            torch.cuda.reset_peak_memory_stats()
            self._before = torch.cuda.memory_allocated() / _MIB
        else:
            self._before = self.peak_mb = process_memory_mb() or 0.0
            self._thread.start()
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None) -> None:
        if self._cuda:
            self.peak_mb = torch.cuda.max_memory_allocated() / _MIB
        else:
            self._over.set()
            self._thread.join()
        self.added_mb = self.peak_mb - self._before

    def _poll(self) -> None:
        while not self._over.wait(_POLL_S):
            self.peak_mb = max(self.peak_mb, process_memory_mb() or 0.0)


def release_memory() -> None:
    """Give freed memory back to the system, so that one side's leavings are not counted for the next."""
    gc.collect()
    if torch.cuda.is_available():
        torch.cuda.empty_cache()
    if sys.platform == "linux":
        with suppress(OSError, AttributeError):  # another C library than glibc
            ctypes.CDLL("libc.so.6").malloc_trim(0)


@dataclass
class _Runs:
    """What was measured of one side."""

    samples: list[Sample] = field(default_factory=list)
    peak_mb: float | None = None
    added_mb: float | None = None
    problem: str | None = None


def measure(scene: Scene, sides: Sequence[Side], proposals: int, repeats: int, say: Say) -> tuple[Row, ...]:
    """Run all sides ``repeats`` times, in an order that rotates, and once more for their memory.

    A side that runs out of memory gets a row that says so. Masks are not kept.

    Args:
        scene: model and image.
        sides: the engine first; speed-ups are relative to it.
        proposals: N.
        repeats: timed runs per side.
        say: told what is being done.
    """
    runs = {side.key: _Runs() for side in sides}
    device = scene.model.device
    for side in sides:
        say(f"warming up: {side.title}")
        with _reported(runs[side.key]):
            side.run(SLICES - 1, repeats, side.warm_proposals)
    for repeat in range(repeats):
        index = repeat % SLICES
        scene.noise(index, repeat, proposals)  # drawn now and kept, so that neither side is charged for the other's
        shift = repeat % len(sides)
        for side in (*sides[shift:], *sides[:shift]):
            if runs[side.key].problem is None:
                say(f"repeat {repeat + 1} of {repeats}: {side.title}")
                with _reported(runs[side.key]):
                    sample = side.run(index, repeat, proposals)
                    runs[side.key].samples.append(_without_masks(sample))
    for side in sides:
        run = runs[side.key]
        if run.problem is None and run.samples[-1].peak_memory_mb is None:
            say(f"memory: {side.title}")
            with _reported(run), PeakMemory(device) as memory:
                side.run(SLICES - 1, repeats + 1, side.warm_proposals)
            run.peak_mb, run.added_mb = memory.peak_mb, memory.added_mb
        elif run.problem is None:
            run.peak_mb = run.samples[-1].peak_memory_mb
    first = runs[sides[0].key].samples
    return tuple(_row(side, runs[side.key], [] if side is sides[0] else first, proposals) for side in sides)


def check_agreement(scene: Scene, engine: Side, reference: PipelineReference, proposals: int, steps: int) -> Agreement:
    """Compare the engine's masks with the pipeline's, of the same noise on the same slice.

    The pipeline's latents are decoded as the engine decodes its own; where that is another decoder than the pipeline's
    autoencoder, the autoencoder's masks are compared as well.
    """
    count = min(proposals, CHECKED)
    ours = engine.run(0, 0, count).masks
    condition, noise = scene.pixels(0), scene.noise(0, 0, count)
    model = scene.model
    latents = [reference.latents(condition, row, steps) for row in noise.split(1)]
    theirs = scene.native_masks(decode(model, torch.cat(latents)))
    others = None
    if model.mask_decoder is not None:
        calls = [scene.native_masks(reference.call(condition, row, steps)) for row in noise.split(1)]
        others = float(np.mean([consensus_overlap(a, b).dice for a, b in zip(ours, np.concatenate(calls), strict=True)]))
    lowest = min(consensus_overlap(a, b).dice for a, b in zip(ours, theirs, strict=True))
    return Agreement(count, float((ours == theirs).mean()), lowest, others)


def _without_masks(sample: Sample) -> Sample:
    return Sample(sample.masks[:0], sample.first_s, sample.total_s, sample.image_s, sample.peak_memory_mb)


class _reported:
    """Turns running out of memory into the row's problem."""

    def __init__(self, run: _Runs) -> None:
        self._run = run

    def __enter__(self) -> None:
        """Nothing to prepare."""

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None) -> bool:
        if error is None or not is_out_of_memory(error):
            return False
        self._run.problem = "not enough memory"
        release_memory()
        return True


def _row(side: Side, run: _Runs, engine: Sequence[Sample], proposals: int) -> Row:
    if run.problem is not None or not run.samples:
        return Row(side.key, side.title, problem=run.problem)
    totals = [sample.total_s for sample in run.samples]
    images = [sample.image_s for sample in run.samples if sample.image_s is not None]
    ratios = [theirs / ours.total_s for theirs, ours in zip(totals, engine, strict=False)]
    return Row(
        key=side.key,
        title=side.title,
        proposals_per_second=Spread.of([proposals / total for total in totals]),
        total_s=Spread.of(totals),
        first_proposal_s=Spread.of([sample.first_s for sample in run.samples]),
        image_s=Spread.of(images) if images else None,
        peak_memory_mb=run.peak_mb,
        working_memory_mb=run.added_mb,
        engine_speedup=Spread.of(ratios) if ratios else None,
    )
