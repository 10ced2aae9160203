"""Memory of the process and of its CUDA device."""

from __future__ import annotations

import sys

_MIB = 1024 * 1024


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


#: How torch words it where the exception's type does not say so: host allocator, CUDA runtime, cuBLAS.
_PHRASES = ("allocate memory", "out of memory", "CUBLAS_STATUS_ALLOC_FAILED")


def is_out_of_memory(error: BaseException) -> bool:
    """Whether an exception means that memory ran out, on the host or on the device."""
    if isinstance(error, MemoryError) or any(base.__name__ == "OutOfMemoryError" for base in type(error).__mro__):
        return True
    return isinstance(error, RuntimeError) and any(phrase in str(error) for phrase in _PHRASES)
