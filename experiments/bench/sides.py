"""The contestants: each samples the same proposals of one slice and says how long it took."""

from __future__ import annotations

import time
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Protocol

import numpy as np

from experiments.bench.reference import PipelineReference
from experiments.bench.scene import PLANE, Scene
from progidiff.proposals.proposals import Gathered
from progidiff.sampling.engine import Engine
from progidiff.wire.client import WorkerClient
from progidiff.wire.messages import DoneEvent, Event, ProposeRequest, SliceEvent


@dataclass(frozen=True)
class Sample:
    """What one run gave.

    Attributes:
        masks: bool (N, H, W) at the slice's own pixels, in order of the proposals.
        first_s: seconds until the first mask.
        total_s: seconds until everything was there.
        image_s: seconds to hand over a new image beforehand, where that was measured.
        peak_memory_mb: peak of the process, where the run happened in one of its own.
    """

    masks: np.ndarray
    first_s: float
    total_s: float
    image_s: float | None = None
    peak_memory_mb: float | None = None


class Side(Protocol):
    """One contestant.

    Attributes:
        key: name in the JSON output.
        title: name in the table.
        warm_proposals: proposals that bring it to full speed, and show its full use of memory.
    """

    key: str
    title: str
    warm_proposals: int

    def run(self, index: int, seed: int, proposals: int) -> Sample:
        """Sample ``proposals`` masks of slice ``index``."""


class EngineSide:
    """One request to an engine in this process."""

    key, title = "engine", "ProGiDiff engine"

    def __init__(self, scene: Scene, engine: Engine, steps: int, proposals: int) -> None:
        self._scene, self._engine, self._steps, self.warm_proposals = scene, engine, steps, proposals

    def run(self, index: int, seed: int, proposals: int) -> Sample:
        """Sample; the slice is encoded within the time, the volume was set before."""
        self._engine.set_image(self._scene.new_volume(), self._scene.affine, self._scene.modality, PLANE)
        events: list[tuple[float, Event]] = []
        began = time.perf_counter()
        self._engine.propose(
            _request(self._scene, self._steps, index, seed, proposals),
            lambda event: events.append((time.perf_counter(), event)),
            lambda: False,
        )
        return _gathered(self._scene, index, events, began)


class WorkerSide:
    """One request to a warm worker process; a volume of new content is sent before each."""

    key, title = "worker", "ProGiDiff worker process"

    def __init__(self, scene: Scene, steps: int, proposals: int, client: WorkerClient) -> None:
        self._scene, self._steps, self.warm_proposals = scene, steps, proposals
        self._client = client

    def run(self, index: int, seed: int, proposals: int) -> Sample:
        """Sample; ``first_s`` and ``total_s`` begin when the image is there, ``image_s`` is what it took to get it there."""
        array = self._scene.new_volume()
        asked = time.perf_counter()
        self._client.set_image(array, self._scene.affine, self._scene.modality, PLANE)
        began = time.perf_counter()
        with self._client.propose(_request(self._scene, self._steps, index, seed, proposals)) as stream:
            events = [(time.perf_counter(), event) for event in stream]
        peaks = [event.peak_memory_mb for _, event in events if isinstance(event, DoneEvent)]
        return replace(
            _gathered(self._scene, index, events, began), image_s=began - asked, peak_memory_mb=peaks[-1] if peaks else None
        )


class PipelineLoop:
    """``StableDiffusionControlNetPipeline.__call__`` once per proposal.

    Args:
        scene: the image.
        reference: the pipeline.
        steps: denoising steps.
        guidance: the pipeline's ``guidance_scale``.
        hint_once: whether the hint is encoded once per run instead of at every step.
    """

    warm_proposals = 1

    def __init__(
        self, scene: Scene, reference: PipelineReference, steps: int, guidance: float = 1.0, *, hint_once: bool = False
    ) -> None:
        self._scene, self._reference, self._steps = scene, reference, steps
        self._guidance, self._hint_once = guidance, hint_once
        self.key = "pipeline_loop_hint_once" if hint_once else "pipeline_loop"
        self.title = "pipeline, loop, hint encoded once" if hint_once else "pipeline, loop"
        if guidance != 1.0:
            self.key += "_guidance"
            self.title += f", guidance {guidance:g}"

    def run(self, index: int, seed: int, proposals: int) -> Sample:
        """Sample, one call per proposal."""
        noise = self._scene.noise(index, seed, proposals)
        first, masks = 0.0, []
        began = time.perf_counter()
        condition = self._scene.pixels(index)
        if self._hint_once:
            condition = self._reference.hint(condition)
        for row in noise.split(1):
            logits = self._reference.call(condition, row, self._steps, self._guidance, ready=self._hint_once)
            masks.append(self._scene.native_masks(logits))
            first = first or time.perf_counter() - began
        return Sample(np.concatenate(masks), first, time.perf_counter() - began)


class PipelineBatch:
    """``StableDiffusionControlNetPipeline.__call__`` once with ``num_images_per_prompt``."""

    key = "pipeline_batch"

    def __init__(self, scene: Scene, reference: PipelineReference, steps: int, proposals: int) -> None:
        self._scene, self._reference, self._steps, self.warm_proposals = scene, reference, steps, proposals
        self.title = f"pipeline, one call with num_images_per_prompt={proposals}"

    def run(self, index: int, seed: int, proposals: int) -> Sample:
        """Sample; all masks come at once."""
        noise = self._scene.noise(index, seed, proposals)
        began = time.perf_counter()
        masks = self._scene.native_masks(self._reference.call(self._scene.pixels(index), noise, self._steps))
        spent = time.perf_counter() - began
        return Sample(masks, spent, spent)


def _request(scene: Scene, steps: int, index: int, seed: int, proposals: int) -> ProposeRequest:
    return ProposeRequest((scene.target,), proposals=proposals, steps=steps, seed=seed, slices=(index, index + 1))


def _gathered(scene: Scene, index: int, events: Sequence[tuple[float, Event]], began: float) -> Sample:
    gathered = Gathered([scene.target], scene.image.plan)
    for _, event in events:
        gathered.add(event)
    first = next(moment for moment, event in events if isinstance(event, SliceEvent))
    return Sample(gathered[scene.target].slice_masks(index), first - began, events[-1][0] - began)
