"""What the worker has to say, in order, written by one thread of its own."""

from __future__ import annotations

import threading
from collections import deque
from collections.abc import Callable

from progidiff.wire.frames import encode_frame
from progidiff.wire.messages import Reply, to_frame
from progidiff.worker.pipes import Pipes

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
