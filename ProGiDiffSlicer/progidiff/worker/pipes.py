"""The worker's streams: two pipes that only the protocol uses, the queue of replies in front of them, and the log."""

from __future__ import annotations

import io
import logging
import os
import sys
import threading
import traceback
from collections import deque
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from pathlib import PurePath
from types import TracebackType

from progidiff.wire.codec import to_frame
from progidiff.wire.frames import encode_frame
from progidiff.wire.messages import Reply

#: Events and shapes; never pixels, file names or prompts.
LOG = logging.getLogger("progidiff.worker")


def start_log(level: str) -> None:
    """Send the worker's log to standard error, if there is one."""
    handler = logging.StreamHandler() if sys.stderr is not None else logging.NullHandler()
    handler.setFormatter(logging.Formatter("%(asctime)s %(levelname)s worker: %(message)s"))
    LOG.addHandler(handler)
    LOG.setLevel(level)
    LOG.propagate = False


def where(error: BaseException) -> str:
    """Type of an exception and the places it passed through, for the log.

    Its message is left out on purpose: it may quote a path, a prompt or a value of the image.
    """
    chain = [describe(error.__traceback__)]
    names = [type(error).__name__]
    cause = error.__cause__
    while cause is not None and len(names) < 5:
        names.append(type(cause).__name__)
        chain.append(describe(cause.__traceback__))
        cause = cause.__cause__
    return "; caused by ".join(f"{name} at {places}" for name, places in zip(names, chain, strict=True))


def describe(trace: TracebackType | None) -> str:
    """``file:line function`` of every frame, innermost last, files without their folders."""
    frames = traceback.extract_tb(trace)[-12:]
    return " > ".join(f"{PurePath(f.filename).name}:{f.lineno} {f.name}" for f in frames) or "an unknown place"


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


BULK_LIMIT = 64 << 20
REPLY_LIMIT = 4 * BULK_LIMIT
_FRAME_OVERHEAD = 1024  # what a small frame costs in the queue


class Outbox:
    """A queue of frames in front of the pipe.

    Posting never waits, or a client that is slow to read could no longer cancel. Whoever produces much waits
    for room first, so that a slow client costs time and not memory: the compute thread at ``BULK_LIMIT``, the
    thread that answers requests only at ``REPLY_LIMIT``, which results alone never reach.
    """

    def __init__(self, pipes: Pipes, on_broken: Callable[[], None]) -> None:
        """``on_broken`` is called, on the writing thread, when nobody reads any more."""
        self._pipes = pipes
        self._on_broken = on_broken
        self._frames: deque[list[bytes]] = deque()
        self._pending = 0
        self._writing = False
        self._broken = False
        self._changed = threading.Condition()
        threading.Thread(target=self._write_all, name="outbox", daemon=True).start()

    @property
    def idle(self) -> bool:
        """Whether nothing waits to be written."""
        with self._changed:
            return not self._frames and not self._writing

    def wait_for_room(self, limit: int) -> None:
        """Wait until at most ``limit`` bytes are pending, or nobody reads any more."""
        with self._changed:
            self._changed.wait_for(lambda: self._broken or self._pending <= limit)

    def post(self, reply: Reply, request_id: int | None) -> None:
        """Queue a reply.

        Arrays are copied, because the engine may use its buffers again at once.

        Raises:
            ProtocolError: the reply holds something that cannot be sent.
        """
        frame = to_frame(reply, request_id)
        buffers = [bytes(buffer) for buffer in encode_frame(frame.header, frame.arrays)]
        with self._changed:
            if self._broken:
                return
            self._frames.append(buffers)
            self._pending += sum(map(len, buffers)) + _FRAME_OVERHEAD
            self._changed.notify_all()

    def flush(self, timeout: float) -> bool:
        """Wait until everything is written; false if that took too long or nobody reads any more."""
        with self._changed:
            done = self._changed.wait_for(lambda: self._broken or (not self._frames and not self._writing), timeout)
            return done and not self._broken

    def _write_all(self) -> None:
        while True:
            with self._changed:
                self._changed.wait_for(lambda: bool(self._frames))
                buffers = self._frames.popleft()
                self._writing = True
            try:
                self._pipes.write(buffers)
            except OSError:
                with self._changed:
                    self._broken = True
                    self._writing = False
                    self._frames.clear()
                    self._changed.notify_all()
                self._on_broken()
                return
            with self._changed:
                self._pending -= sum(map(len, buffers)) + _FRAME_OVERHEAD
                self._writing = False
                self._changed.notify_all()
