"""What the operating system tells of memory, and ends: a process with all that it started.

Standard library, and psutil where it is there: the module inside Slicer asks here before that is installed.
"""

from __future__ import annotations

import contextlib
import os
import signal
import subprocess
import sys
from pathlib import Path

_MIB = 1024 * 1024
_WAIT_S = 2.0
#: How torch words it where the exception's type does not say so: host allocator, CUDA runtime, cuBLAS.
_PHRASES = ("allocate memory", "out of memory", "CUBLAS_STATUS_ALLOC_FAILED")


def process_memory_mb() -> float | None:
    """Resident memory of this process in MiB."""
    try:
        import psutil
    except ImportError:
        return None
    return float(psutil.Process().memory_info().rss) / _MIB


def peak_memory_mb() -> float:
    """Largest resident memory of this process so far, plus the peak of its CUDA memory, in MiB."""
    if sys.platform == "win32":
        peak = process_memory_mb() or 0.0
    else:
        import resource

        unit = _MIB if sys.platform == "darwin" else 1024  # ru_maxrss counts bytes on macOS, KiB elsewhere
        peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / unit
    torch = sys.modules.get("torch")
    if torch is not None and torch.cuda.is_available() and torch.cuda.is_initialized():
        peak += float(torch.cuda.max_memory_allocated()) / _MIB
    return peak


def device_memory_mb() -> float | None:
    """CUDA memory reserved by torch in MiB; ``None`` without torch or CUDA. Never imports torch itself."""
    torch = sys.modules.get("torch")
    cuda = getattr(torch, "cuda", None)
    # While another thread is importing torch the module is there, but not all of it.
    if cuda is None or not hasattr(cuda, "is_initialized") or not cuda.is_initialized():
        return None
    return float(cuda.memory_reserved()) / _MIB


def is_out_of_memory(error: BaseException) -> bool:
    """Whether an exception means that memory ran out, on the host or on the device."""
    if isinstance(error, MemoryError) or any(base.__name__ == "OutOfMemoryError" for base in type(error).__mro__):
        return True
    return isinstance(error, RuntimeError) and any(phrase in str(error) for phrase in _PHRASES)


def kill_tree(pid: int) -> None:
    """Kill the process ``pid`` and its descendants, and do not wait for their end. One that is gone is passed over.

    psutil comes with the engine; without it the operating system's own means are used. Those of Windows are a program, for
    which this waits, two seconds at most: it finds the descendants through the process that its caller kills next.
    """
    try:
        import psutil
    except ImportError:
        _kill_without_psutil(pid)
        return
    try:
        root = psutil.Process(pid)
        family = [*root.children(recursive=True), root]
    except psutil.Error:
        family = []
    for member in family:
        with contextlib.suppress(psutil.Error):
            member.kill()


def _kill_without_psutil(pid: int) -> None:
    if sys.platform == "win32":
        taskkill = ["taskkill", "/T", "/F", "/PID", str(pid)]
        with contextlib.suppress(OSError, subprocess.SubprocessError):
            subprocess.run(
                taskkill,
                stdin=subprocess.DEVNULL,
                stdout=subprocess.DEVNULL,
                stderr=subprocess.DEVNULL,
                creationflags=subprocess.CREATE_NO_WINDOW,
                timeout=_WAIT_S,
                check=False,
            )
    else:
        for member in [*descendants(pid), pid]:
            with contextlib.suppress(ProcessLookupError, PermissionError):
                os.kill(member, signal.SIGKILL)


def descendants(pid: int) -> list[int]:
    """Children, grandchildren and so on of a process on Linux or macOS."""
    children: dict[int, list[int]] = {}
    for child, parent in _parents():
        children.setdefault(parent, []).append(child)
    found: list[int] = []
    generation = [pid]
    while generation:
        generation = [child for parent in generation for child in children.get(parent, [])]
        found += generation
    return found


def _parents() -> list[tuple[int, int]]:
    """(process, its parent) of every process."""
    if Path("/proc/self/stat").exists():
        pairs = []
        for entry in Path("/proc").iterdir():
            if entry.name.isdigit():
                # A process may end between being listed and being read.
                with contextlib.suppress(OSError):
                    # The name, in parentheses, may hold anything.
                    fields = (entry / "stat").read_text(errors="replace").rpartition(")")[2].split()
                    pairs.append((int(entry.name), int(fields[1])))
        return pairs
    listing = ["ps", "-A", "-o", "pid=,ppid="]
    try:
        run = subprocess.run(listing, capture_output=True, text=True, timeout=_WAIT_S, check=True)
    except (OSError, subprocess.SubprocessError):
        return []
    return [(int(child), int(parent)) for child, parent in (line.split() for line in run.stdout.splitlines() if line)]
