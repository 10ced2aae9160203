"""The two pipes of the worker, taken away from everybody else in the process."""

from __future__ import annotations

import io
import os
import sys
from collections.abc import Iterable
from dataclasses import dataclass

_CHUNK = 1 << 18
_STDIN, _STDOUT, _STDERR = 0, 1, 2


@dataclass(frozen=True)
class Pipes:
    """File descriptors that only the protocol uses."""

    source: int
    sink: int

    def read(self) -> bytes:
        """What has arrived, at least one byte; nothing at the end of the stream."""
        return os.read(self.source, _CHUNK)

    def write(self, buffers: Iterable[bytes]) -> None:
        """Write everything, without joining it first.

        Raises:
            OSError: nobody reads any more.
        """
        for buffer in buffers:
            view = memoryview(buffer)
            while len(view):
                view = view[os.write(self.sink, view[:_CHUNK]) :]


def claim_standard_streams() -> Pipes:
    """Move standard input and output to private descriptors.

    From then on a stray ``print``, also one in native code, lands in the log (standard error) instead of in
    the middle of a frame, and a stray ``input`` finds an empty stream. Child processes inherit neither pipe,
    and on Windows a library that looks at its standard input while it is loaded does not get stuck behind
    the read that waits for the next request.

    Raises:
        OSError: the process was started without standard input or output.
    """
    pipes = Pipes(os.dup(_STDIN), os.dup(_STDOUT))
    null = os.open(os.devnull, os.O_RDWR)
    os.dup2(null, _STDIN)
    try:
        os.dup2(_STDERR, _STDOUT)
    except OSError:
        # Started without standard error (pythonw): stray output goes nowhere.
        os.dup2(null, _STDOUT)
    os.close(null)
    # Stray prints belong to the log line by line: the process may end without flushing Python's own buffer.
    if isinstance(sys.stdout, io.TextIOWrapper):
        sys.stdout.reconfigure(line_buffering=True)
    if sys.platform == "win32":
        import msvcrt

        msvcrt.setmode(pipes.source, os.O_BINARY)
        msvcrt.setmode(pipes.sink, os.O_BINARY)
    else:
        # Whoever made the pipes may have left them non-blocking.
        os.set_blocking(pipes.source, True)
        os.set_blocking(pipes.sink, True)
    return pipes
