"""Runs the benchmark for one or two models."""

from __future__ import annotations

import os
import platform
from collections.abc import Callable
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path

import diffusers
import torch

from experiments.bench.measuring import check_agreement, measure, release_memory
from experiments.bench.random_sd import memory_problem, random_model
from experiments.bench.reference import PipelineReference
from experiments.bench.results import BenchReport, ModelResult
from experiments.bench.scene import SLICES, Scene
from experiments.bench.sides import EngineSide, PipelineBatch, PipelineLoop, Side, WorkerSide
from progidiff import __version__
from progidiff.errors import InputError
from progidiff.places import default_model_folder
from progidiff.sampling.denoise import MAX_STEPS
from progidiff.sampling.engine import Engine
from progidiff.wire.client import WorkerClient
from progidiff.wire.messages import Device

Say = Callable[[str], None]
#: diffusers' default ``guidance_scale``.
DEFAULT_GUIDANCE = 7.5
MAX_PROPOSALS = 200


@dataclass(frozen=True)
class BenchSettings:
    """What to measure.

    Attributes:
        model: model folder, or ``None`` for the bundled model.
        device: ``"auto"``, ``"cpu"`` or ``"cuda"``.
        proposals: N, 1 to 200.
        steps: denoising steps, 1 to 100.
        repeats: timed runs per contestant.
        sd15: also the Stable Diffusion 1.5 size with random weights; on CUDA it is measured anyway where it fits.
        slice_size: pixels per side of the phantom's slices.
        worker: whether the worker process takes part.
    """

    model: Path | None = None
    device: Device = "auto"
    proposals: int = 16
    steps: int = 4
    repeats: int = 3
    sd15: bool = False
    slice_size: int = 512
    worker: bool = True


def run_bench(settings: BenchSettings, say: Say = lambda line: None) -> BenchReport:
    """Measure; see :mod:`experiments.bench` for what is compared.

    Args:
        settings: what to measure.
        say: told what is being done, a line at a time.

    Raises:
        InputError: numbers out of range, or too little memory for ``sd15``.
        ModelError: the model cannot be used.
        WorkerError: the worker process failed.
    """
    for name, value, most in (("proposals", settings.proposals, MAX_PROPOSALS), ("steps", settings.steps, MAX_STEPS)):
        if not 1 <= value <= most:
            raise InputError(f"The number of {name} must be from 1 to {most}, not {value}.")
    if settings.repeats < 1:
        raise InputError(f"The number of repeats must be at least 1, not {settings.repeats}.")
    load = _load_average()
    say("loading the model")
    folder = default_model_folder() if settings.model is None else settings.model
    engine = Engine.load(folder, settings.device)
    device, dtype = engine.model.device, engine.model.dtype
    cuda = device.type == "cuda"
    notes = _notes(settings, load, cuda)
    if settings.sd15 and (problem := memory_problem("sd15", device, settings.proposals)):
        raise InputError(problem)  # before the minutes that the first model takes
    models = [_measure_model(engine, settings, say, folder if settings.worker else None)]
    if settings.sd15 or cuda:
        del engine
        release_memory()
        if problem := memory_problem("sd15", device, settings.proposals):
            notes.append(f"The Stable Diffusion 1.5 size was left out: {problem}")
        else:
            say("making random weights of Stable Diffusion 1.5's size")
            engine = Engine(random_model("sd15", device, dtype, settings.proposals))
            models.append(_measure_model(engine, settings, say, None))
            notes.append("The Stable Diffusion 1.5 size has random weights: its times are real, its masks mean nothing.")
    counts = settings.proposals, settings.steps, settings.repeats
    return BenchReport(_machine(device, load), *counts, tuple(models), tuple(notes))


def _measure_model(engine: Engine, settings: BenchSettings, say: Say, worker_folder: Path | None) -> ModelResult:
    """All contestants on one model; the worker takes part when its folder is given."""
    scene = Scene.make(engine.model, settings.slice_size)
    model, steps, proposals = engine.model, settings.steps, settings.proposals
    reference = PipelineReference(model, scene.prompt)
    ours = EngineSide(scene, engine, steps, proposals)
    sides: list[Side] = [
        ours,
        PipelineLoop(scene, reference, steps),
        PipelineLoop(scene, reference, steps, DEFAULT_GUIDANCE),
        PipelineLoop(scene, reference, steps, hint_once=True),
        PipelineBatch(scene, reference, steps, proposals),
    ]
    with ExitStack() as stack:
        if worker_folder is not None:
            say("starting a worker process")
            client = stack.enter_context(WorkerClient())
            client.load(worker_folder.absolute(), settings.device)
            sides.insert(1, WorkerSide(scene, steps, proposals, client))
        rows = measure(scene, sides, proposals, settings.repeats, say)
    say("checking that both sides sample the same masks")
    agreement = check_agreement(scene, ours, reference, proposals, steps)
    return ModelResult(
        model_id=engine.card.model_id,
        parameters=sum(model.parameter_counts().values()),
        image_size=engine.card.image_size,
        slice_shape=(settings.slice_size, settings.slice_size),
        target=scene.target,
        dtype=str(model.dtype).removeprefix("torch."),
        decoder="autoencoder" if model.mask_decoder is None else "mask decoder",
        rows=rows,
        agreement=agreement,
    )


def _load_average() -> float | None:
    """Processes that wanted to run in the last minute; ``None`` where the system does not tell."""
    try:
        return os.getloadavg()[0]
    except (AttributeError, OSError):
        return None


def _machine(device: torch.device, load: float | None) -> dict[str, str | int | float]:
    machine: dict[str, str | int | float] = {
        "device": torch.cuda.get_device_name() if device.type == "cuda" else f"cpu ({platform.machine()})",
        "cores": os.cpu_count() or 0,
        "threads": torch.get_num_threads(),
        "instructions": torch.backends.cpu.get_cpu_capability(),
        "progidiff": __version__,
        "torch": torch.__version__,
        "diffusers": diffusers.__version__,
        "python": platform.python_version(),
    }
    return machine if load is None else {**machine, "load_before": round(load, 2)}


def _notes(settings: BenchSettings, load: float | None, cuda: bool) -> list[str]:
    first, worker = "the first mask at the slice's own pixels, with everything warm and the volume set", ""
    if settings.worker:
        worker = f"; the worker gets a new volume of {SLICES} slices before each run, which is timed on its own"
    notes = [
        (
            "Every side samples the same proposals: same weights, slice, prompt, noise, DDIM schedule, steps and threads."
            " The engine's time includes encoding the slice and ranking; the pipeline's includes its text encoder, its"
            " condition image at every step and its autoencoder. Loading and setting the volume are not included."
        ),
        (
            '"pipeline" is StableDiffusionControlNetPipeline.__call__; "loop" is one call per proposal without guidance'
            " (guidance_scale=1); the model's image encoder stands in place of ControlNet's hint block. Guidance 7.5 is the"
            ' pipeline\'s default and samples other masks. "hint encoded once" is more than the stock pipeline offers.'
        ),
        f"First: seconds until {first}{worker}.",
        (
            "Memory: most device memory allocated"
            if cuda
            else "Memory: most resident memory of the process, measured in runs of their own (a loop's with one proposal)"
        )
        + "; in brackets what the run added to the loaded models. The worker is a process of its own: its resident memory,"
        " libraries and all.",
    ]
    cores = os.cpu_count() or 1
    if load is not None and load > 0.5 * cores:
        notes.append(
            f"The machine was busy before the start (load {load:.1f} on {cores} cores): times are longer than on an idle"
            " one, and the ratios less certain."
        )
    return notes
