"""The command line in the tests' own process, with a scripted worker and small images."""

from __future__ import annotations

import json
import os
import shlex
import sys
from pathlib import Path
from typing import Any

import numpy as np
from typer.testing import CliRunner, Result

import progidiff
from progidiff.cli.app import app

from ..volume_examples import oriented, write_nifti

ORGANS_WORKER = Path(__file__).with_name("organs_worker.py")
#: For a Python of its own.
ENVIRONMENT = {
    **os.environ,
    "PYTHONPATH": str(Path(progidiff.__file__).parents[1]),
    "PYTHONUTF8": "1",
    "PYTHONDONTWRITEBYTECODE": "1",
}


def organs(**script: Any) -> str:
    """Command line of a worker that invents organs, with its script."""
    return shlex.join([sys.executable, str(ORGANS_WORKER), json.dumps(script)])


def invoke(*arguments: object) -> Result:
    """Run ``progidiff`` with these arguments."""
    return CliRunner().invoke(app, [str(argument) for argument in arguments])


def propose(image: Path, out: Path, *arguments: object, **script: Any) -> Result:
    """Run ``progidiff propose`` with the worker that invents organs, unless the arguments name another one."""
    worker = () if "--worker-command" in arguments else ("--worker-command", organs(**script))
    return invoke("propose", image, "--out", out, *worker, *arguments)


def ct(path: Path) -> Path:
    """Write a small CT of noise, 24 x 20 x 6 voxels."""
    array = np.random.default_rng(0).normal(40, 20, (6, 20, 24)).astype(np.float32)
    return write_nifti(path, oriented("RAS", (24, 20, 6), (2.0, 2.0, 5.0)), array)


def listing(folder: Path) -> list[str]:
    """All that is in a folder, with what is below."""
    return sorted(str(path.relative_to(folder)) for path in folder.rglob("*"))
