"""Looks at an installation for a support person: packages, devices, and whether the model loads.

Nothing heavy is imported into this process: packages are looked up by their metadata, torch is asked in a
process of its own (a broken CUDA library may end the process that imports it), and the model is loaded by the
worker that a request would use.
"""

from __future__ import annotations

import json
import os
import platform
import shutil
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict, dataclass, field
from importlib import metadata
from pathlib import Path
from typing import Any, Literal

from progidiff import PYTHON_WINDOW, __version__
from progidiff.cards import load_card
from progidiff.errors import ModelError, ProGiDiffError, WorkerError
from progidiff.places import default_model_folder, model_size
from progidiff.wire.client import WorkerClient
from progidiff.wire.messages import Device

Status = Literal["ok", "warning", "missing"]

REQUIRED_PACKAGES = (
    "numpy",
    "SimpleITK",
    "nibabel",
    "pydantic",
    "matplotlib",
    "jinja2",
    "typer",
    "rich",
    "safetensors",
    "torch",
    "diffusers",
    "transformers",
)
# What is lost without them.
OPTIONAL_PACKAGES = {
    "highdicom": "DICOM SEG",
    "peft": "adapters",
    "monai": "surface distances in accuracy figures",
    "scipy": "training on synthetic images",
    "psutil": "memory figures",
}
LITTLE_MEMORY = 2 << 30
LITTLE_DISK = 1 << 30
_TORCH_TIMEOUT_S = 180.0
_TORCH_PROBE = """
import json, torch
count = torch.cuda.device_count() if torch.cuda.is_available() else 0
devices = [torch.cuda.get_device_properties(i) for i in range(count)]
print(json.dumps({
    "version": torch.__version__, "cuda_build": torch.version.cuda, "threads": torch.get_num_threads(),
    "cuda_devices": [{"name": d.name, "memory_mb": d.total_memory // 2**20} for d in devices],
}))
"""


@dataclass(frozen=True)
class Check:
    """One finding.

    Attributes:
        name: what was looked at.
        status: ``"missing"`` means that proposals cannot be made until ``advice`` is followed.
        detail: what was found, one line.
        advice: what to do, or "".
        data: the same for programs.
    """

    name: str
    status: Status
    detail: str
    advice: str = ""
    data: dict[str, Any] = field(default_factory=dict)


@dataclass(frozen=True)
class Diagnosis:
    """All findings, in the order in which they were made."""

    checks: tuple[Check, ...]

    @property
    def ok(self) -> bool:
        """Whether nothing needed is missing."""
        return all(check.status != "missing" for check in self.checks)

    def as_dict(self) -> dict[str, Any]:
        """Plain JSON values."""
        return {"ok": self.ok, "checks": [asdict(check) for check in self.checks]}


def examine(
    model: str | None = None,
    device: Device = "auto",
    worker_command: Sequence[str] | None = None,
    on_check: Callable[[str], None] = lambda name: None,
) -> Diagnosis:
    """Look at this installation.

    Args:
        model: model folder, or ``None`` for the bundled one.
        device: device to load it on.
        worker_command: the worker to ask, or ``None`` for this machine's own.
        on_check: is told what is looked at next; some of it takes seconds.
    """
    checks: list[Check] = []
    on_check("Python and packages")
    checks += [_program(), _python(), _system(), *_packages()]
    on_check("torch and its devices")
    checks.append(check_torch())
    on_check("memory and disk")
    checks += [_memory(), *_disks()]
    on_check("the model folder")
    local = worker_command is None
    if local:
        checks.append(check_model_folder(model))
    on_check("the worker and loading the model")
    checks += check_worker(model, device, worker_command)
    return Diagnosis(tuple(checks))


def _program() -> Check:
    folder = str(Path(__file__).resolve().parent)
    return Check("ProGiDiff", "ok", f"{__version__} in {folder}", data={"version": __version__, "folder": folder})


def _python() -> Check:
    version = platform.python_version()
    low, end = PYTHON_WINDOW
    fits = low <= sys.version_info[:2] < end
    detail = f"{version} ({sys.executable})"
    data = {"version": version, "executable": sys.executable}
    if fits:
        return Check("Python", "ok", detail, data=data)
    wanted = f"{low[0]}.{low[1]} to {end[0]}.{end[1] - 1}"
    return Check("Python", "missing", detail, f"Use Python {wanted}.", data)


def _system() -> Check:
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    data = {"platform": platform.platform(), "machine": platform.machine(), "cores": cores}
    return Check("System", "ok", f"{data['platform']}, {cores} CPU cores", data=data)


def _packages() -> Iterator[Check]:
    for name in REQUIRED_PACKAGES:
        yield check_package(name)
    for name, purpose in OPTIONAL_PACKAGES.items():
        yield check_package(name, purpose)


def check_package(name: str, optional_for: str | None = None) -> Check:
    """Whether a package is installed, and its version; ``optional_for`` says what is lost without an
    optional one.
    """
    try:
        version = metadata.version(name)
    except metadata.PackageNotFoundError:
        if optional_for is not None:
            detail = f"not installed; only needed for {optional_for}"
            return Check(name, "warning", detail, data={"version": None})
        advice = f"Install it into this Python: {sys.executable} -m pip install {name}"
        return Check(name, "missing", "not installed", advice, {"version": None})
    return Check(name, "ok", version, data={"version": version})


def check_torch(command: Sequence[str] | None = None) -> Check:
    """Import torch in a process of its own and list its devices; ``command`` replaces that process in
    tests.
    """
    command = command or [sys.executable, "-c", _TORCH_PROBE]
    advice = "Install torch again, in the version that fits this machine (see pytorch.org)."
    try:
        ran = subprocess.run(
            command, capture_output=True, text=True, errors="replace", timeout=_TORCH_TIMEOUT_S, check=False
        )
    except subprocess.TimeoutExpired:
        return Check("torch devices", "missing", f"torch did not answer in {_TORCH_TIMEOUT_S:.0f} s", advice)
    except OSError as error:
        return Check("torch devices", "missing", f"Python could not be started again ({error.strerror})", advice)
    lines = ran.stdout.strip().splitlines()
    if ran.returncode != 0 or not lines:
        cause = (ran.stderr.strip().splitlines() or [f"exit code {ran.returncode}"])[-1]
        return Check("torch devices", "missing", f"torch cannot be imported: {cause}", advice)
    data = json.loads(lines[-1])
    names = [f"{gpu['name']} ({gpu['memory_mb'] / 1024:.0f} GiB)" for gpu in data["cuda_devices"]]
    if names:
        return Check("torch devices", "ok", "CUDA: " + ", ".join(names), data=data)
    build = f"built for CUDA {data['cuda_build']}" if data["cuda_build"] else "a CPU build"
    return Check("torch devices", "ok", f"CPU only, {data['threads']} threads ({build})", data=data)


def _memory() -> Check:
    total, free = _memory_bytes()
    if total is None or free is None:
        return Check("Memory", "warning", "unknown; install psutil to see it")
    data = {"total_mb": total >> 20, "available_mb": free >> 20}
    detail = f"{free / 2**30:.1f} of {total / 2**30:.1f} GiB available"
    if free < LITTLE_MEMORY:
        return Check("Memory", "warning", detail, "Close other programs before large volumes are read.", data)
    return Check("Memory", "ok", detail, data=data)


def _memory_bytes() -> tuple[int | None, int | None]:
    try:
        import psutil
    except ImportError:
        return None, None
    memory = psutil.virtual_memory()
    return int(memory.total), int(memory.available)


def _disks() -> Iterator[Check]:
    for name, folder in (
        ("Disk, current folder", Path.cwd()),
        ("Disk, temporary files", Path(tempfile.gettempdir())),
    ):
        free = shutil.disk_usage(folder).free
        data = {"folder": str(folder), "free_mb": free >> 20}
        detail = f"{free / 2**30:.1f} GiB free in {folder}"
        little = free < LITTLE_DISK
        yield Check(name, "warning" if little else "ok", detail, "Free some space." if little else "", data)


def check_model_folder(model: str | None) -> Check:
    """Whether the model folder is there and its card is sound; its weights are checked by loading them."""
    name = "Model folder"
    try:
        folder = default_model_folder() if model is None else Path(model)
        size = model_size(folder)
        card = load_card(folder)
    except ModelError as error:
        return Check(name, "missing", str(error), "Choose a complete model folder with --model.")
    detail = f"{card.name} ({card.model_id}, {', '.join(card.modalities)}, {size / 2**20:.1f} MiB) in {folder}"
    summary = {name: value for name, value in card.to_dict().items() if name != "sha256"}
    return Check(name, "ok", detail, data={"folder": str(folder), "bytes": size, "card": summary})


def check_worker(model: str | None, device: Device, command: Sequence[str] | None) -> Iterator[Check]:
    """Start the worker as a request would, and load the model in it."""
    began = time.monotonic()
    try:
        with WorkerClient(command) as client:
            hello = client.hello
            if hello is None:
                raise WorkerError("The worker did not introduce itself; try again.")
            wait = time.monotonic() - began
            data = {"version": hello.version, "python": hello.python, "seconds": round(wait, 3)}
            detail = f"{hello.version} on Python {hello.python} answered after {wait:.2f} s"
            if hello.version != __version__:
                advice = f"Install version {__version__} there, or use that version here."
                yield Check("Worker", "warning", detail, advice, data)
            else:
                yield Check("Worker", "ok", detail, data=data)
            yield _loading(client, model, device)
    except ProGiDiffError as error:
        yield Check("Worker", "missing", str(error), "Try the worker's command in a terminal to see its log.")


def _loading(client: WorkerClient, model: str | None, device: Device) -> Check:
    began = time.monotonic()
    try:
        loaded = client.load(model, device)
        memory = client.status().memory_mb
    except ProGiDiffError as error:
        return Check("Loading the model", "missing", str(error), "Follow the message, then look again.")
    wait = time.monotonic() - began
    data = {
        "model_id": loaded.model_id,
        "device": loaded.device,
        "vocabulary": list(loaded.vocabulary),
        "seconds": round(wait, 3),
        "worker_memory_mb": memory,
    }
    used = f", {memory:,.0f} MiB" if memory else ""
    where = loaded.device or "an unknown device"
    detail = f"{loaded.model_id} on {where} after {wait:.1f} s{used}; knows {len(loaded.vocabulary)} targets"
    return Check("Loading the model", "ok", detail, data=data)
