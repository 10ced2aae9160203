"""``python -m experiments bench``: speed and memory beside diffusers' own ControlNet pipeline."""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Annotated

import typer

from progidiff.cli.common import DeviceName


def register(app: typer.Typer) -> None:
    """Add the command."""
    app.command("bench")(bench)


def bench(
    model: Annotated[Path | None, typer.Option(metavar="DIR", help="Model folder (default: the bundled model).")] = None,
    device: Annotated[DeviceName, typer.Option(help="Where the networks run.")] = DeviceName.AUTO,
    proposals: Annotated[int, typer.Option(help="Proposals per run.")] = 16,
    steps: Annotated[int, typer.Option(help="Denoising steps.")] = 4,
    repeats: Annotated[int, typer.Option(help="Timed runs of each side.")] = 3,
    sd15: Annotated[
        bool,
        typer.Option(
            "--sd15",
            help="Also the Stable Diffusion 1.5 size with random weights (slow without CUDA, where it is measured anyway).",
        ),
    ] = False,
    as_json: Annotated[bool, typer.Option("--json", help="Print one JSON object.")] = False,
) -> None:
    """Compare the engine's speed with a loop over diffusers' StableDiffusionControlNetPipeline, side by side in one run.

    Both sample the same proposals of one slice with the same weights, image size, noise and steps.
    """
    from experiments.bench import BenchSettings, as_text, run_bench

    settings = BenchSettings(model, device.value, proposals, steps, repeats, sd15)
    report = run_bench(settings, _announce)
    print(json.dumps(report.as_dict(), indent=2, ensure_ascii=False) if as_json else as_text(report))


def _announce(line: str) -> None:
    print(f"{line} ...", file=sys.stderr, flush=True)
