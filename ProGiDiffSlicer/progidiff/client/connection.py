"""One worker process, spoken to from any number of threads; replies are sorted by request."""

from __future__ import annotations

import itertools
import signal
import threading
import time
from collections import deque
from dataclasses import dataclass, field
from queue import SimpleQueue
from typing import Any, TypeVar

from progidiff.client.errors import RemoteError, WorkerExitedError, WorkerLostError, WorkerProtocolError
from progidiff.client.process import WorkerProcess
from progidiff.errors import CancelledError, ProtocolError, WorkerError
from progidiff.remote import meaning_of_end
from progidiff.wire.frames import Frame, FrameDecoder, encode_frame
from progidiff.wire.messages import FINAL, Cancelled, ErrorReply, Heartbeat, Reply, Request, frame_to_reply, to_frame

AnyReply = TypeVar("AnyReply", bound=Any)

_WAIT_S = 0.5
_END_WAIT_S = 3.0
# Replies that wait to be taken; beyond that the worker is not read any further, and so waits as well.
_MOST_WAITING_BYTES = 64 << 20


@dataclass
class _Mailbox:
    """Replies to one request, and the bytes of their arrays."""

    replies: deque[tuple[Reply, int]] = field(default_factory=deque)
    nbytes: int = 0


class Connection:
    """Threads that write and read the pipes of a worker, and the replies until somebody takes them."""

    def __init__(self, process: WorkerProcess, heartbeat_timeout: float, max_payload: int) -> None:
        self._process = process
        self._heartbeat_timeout = heartbeat_timeout
        self._max_payload = max_payload
        self._ids = itertools.count(1)
        self._outgoing: SimpleQueue[list[bytes | memoryview] | None] = SimpleQueue()
        self._changed = threading.Condition()
        self._boxes: dict[int, _Mailbox] = {}
        self._hungry: set[int] = set()
        self._signs_of_life = 0
        self._failure: WorkerError | None = None
        self._reader = threading.Thread(target=self._read_all, name="worker-reader", daemon=True)
        self._writer = threading.Thread(target=self._write_all, name="worker-writer", daemon=True)
        self._reader.start()
        self._writer.start()

    @property
    def failure(self) -> WorkerError | None:
        """Why the connection is over, if it is."""
        return self._failure

    def send(self, request: Request, *, expect_reply: bool = True) -> int:
        """Queue a request and return its id; replies to a request without ``expect_reply`` are dropped.

        Arrays are not copied: they must not change before the reply.

        Raises:
            ProtocolError: the request holds something that cannot be sent.
            WorkerError: the connection is over.
        """
        request_id = next(self._ids)
        frame = to_frame(request, request_id)
        buffers = encode_frame(frame.header, frame.arrays)
        with self._changed:
            if self._failure is not None:
                raise self._failure
            if expect_reply:
                self._boxes[request_id] = _Mailbox()
        self._outgoing.put(buffers)
        return request_id

    def receive(self, request_id: int, timeout: float | None = None, *, patience: float | None = None) -> Reply:
        """The next reply to a request; after the final one nothing more can be received for it.

        ``patience`` is how many seconds without a sign of life are borne, if not the heartbeat's.

        Raises:
            TimeoutError: nothing came in ``timeout`` seconds; the request goes on.
            WorkerError: the connection is over, or was ended here for want of a sign of life.
        """
        deadline = None if timeout is None else time.monotonic() + timeout
        limit = self._heartbeat_timeout if patience is None else patience
        silence, seen = 0.0, self._signs_of_life
        with self._changed:
            while silence <= limit:
                box = self._boxes[request_id]
                if box.replies:
                    return self._take(request_id, box)
                if self._failure is not None:
                    raise self._failure
                before = time.monotonic()
                if deadline is not None and before >= deadline:
                    raise TimeoutError(f"no reply in {timeout:g} s")
                wait = _WAIT_S if deadline is None else min(_WAIT_S, deadline - before)
                self._wait_hungry(request_id, wait)
                # Time in which this process did not run either (a laptop asleep) does not count.
                silence += min(time.monotonic() - before, 2 * _WAIT_S)
                if seen != self._signs_of_life:
                    silence, seen = 0.0, self._signs_of_life
        raise self.fail(WorkerLostError(f"The worker gave no sign of life for {limit:g} s; start it again."))

    def expect(self, reply: Reply, wanted: type[AnyReply]) -> AnyReply:
        """``reply`` as what it has to be.

        Raises:
            CancelledError, RemoteError: the request was cancelled, or failed.
            WorkerProtocolError: it is something else altogether.
        """
        if isinstance(reply, wanted):
            return reply
        if isinstance(reply, Cancelled):
            raise CancelledError("The request was cancelled.")
        if isinstance(reply, ErrorReply):
            raise RemoteError(reply)
        kind, due = type(reply).__name__, wanted.__name__
        raise self.fail(WorkerProtocolError(f"The worker sent a {kind} message where a {due} was due."))

    def forget(self, request_id: int) -> None:
        """Drop what came and comes for a request."""
        with self._changed:
            self._boxes.pop(request_id, None)
            self._changed.notify_all()

    def fail(self, error: WorkerError) -> WorkerError:
        """End the connection and the process, and return the reason: the first one counts."""
        with self._changed:
            if self._failure is None:
                self._failure = error
            self._changed.notify_all()
        self._outgoing.put(None)
        self._process.kill()
        return self._failure

    def close(self, reason: WorkerError, timeout: float) -> None:
        """Close the worker's input and wait for its end; kill it after ``timeout`` seconds."""
        self._outgoing.put(None)
        self._process.wait(timeout)
        self.fail(reason)
        for thread in (self._reader, self._writer):
            if thread is not threading.current_thread():
                thread.join(1.0)
        if not self._reader.is_alive() and not self._writer.is_alive():
            self._process.close_pipes()

    def _take(self, request_id: int, box: _Mailbox) -> Reply:
        reply, nbytes = box.replies.popleft()
        box.nbytes -= nbytes
        if isinstance(reply, FINAL):
            del self._boxes[request_id]
        self._changed.notify_all()
        return reply

    def _wait_hungry(self, request_id: int, timeout: float) -> None:
        self._hungry.add(request_id)
        self._changed.notify_all()
        try:
            self._changed.wait(timeout)
        finally:
            self._hungry.discard(request_id)

    def _read_all(self) -> None:
        decoder = FrameDecoder(max_payload=self._max_payload)
        try:
            while self._failure is None and (data := self._process.read()):
                self._signs_of_life += 1
                for frame in decoder.feed(data):
                    self._deliver(frame)
            if self._failure is None:
                self.fail(self._ended())
        except ProtocolError as error:
            self.fail(
                WorkerProtocolError(
                    f"The worker's output cannot be read: {error} Look for a login script or a wrapper that "
                    "prints to standard output, and install the same version on both sides."
                )
            )
        except (OSError, ValueError):
            self.fail(self._ended())

    def _deliver(self, frame: Frame) -> None:
        request_id, reply = frame_to_reply(frame)
        if isinstance(reply, Heartbeat):
            return
        if request_id is None:
            if isinstance(reply, ErrorReply):
                self.fail(WorkerProtocolError(f"The worker could not read a request: {reply.message}"))
            return
        nbytes = sum(array.nbytes for array in frame.arrays.values())
        with self._changed:
            box = self._boxes.get(request_id)
            if box is None:
                return
            box.replies.append((reply, nbytes))
            box.nbytes += nbytes
            self._changed.notify_all()
            # Unless somebody waits for another answer, which can only come after this one is out of the way.
            self._changed.wait_for(
                lambda: (
                    box.nbytes <= _MOST_WAITING_BYTES
                    or bool(self._hungry - {request_id})
                    or request_id not in self._boxes
                    or self._failure is not None
                )
            )

    def _write_all(self) -> None:
        while (buffers := self._outgoing.get()) is not None:
            try:
                for buffer in buffers:
                    self._process.write(buffer)
            except (OSError, ValueError):
                # The reader knows more: there may be last words, or an exit code.
                self._reader.join(_END_WAIT_S)
                self.fail(self._ended())
                return
            # A large image must not stay alive until the next request.
            del buffers
        self._process.close_input()

    def _ended(self) -> WorkerExitedError:
        code = self._process.wait(_END_WAIT_S)
        tail = self._process.stderr_tail(1.0)
        message = meaning_of_end(code, tail) or f"The worker ended unexpectedly ({_cause(code)}); start it again."
        return WorkerExitedError(message, code, tail)


def _cause(code: int | None) -> str:
    if code is None:
        return "it closed its pipes"
    if code in (-9, 137):
        return "it was killed, perhaps because the computer ran out of memory"
    if code < 0:
        try:
            return f"signal {signal.Signals(-code).name}"
        except ValueError:
            return f"signal {-code}"
    return f"exit code {code}"
