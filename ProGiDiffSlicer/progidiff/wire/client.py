"""A typed client of the worker, for any number of threads. It imports neither torch nor diffusers."""

from __future__ import annotations

import threading
import time
from collections import deque
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from enum import Enum
from pathlib import Path
from queue import SimpleQueue
from types import TracebackType
from typing import Any, Self, TypeVar

import numpy as np

from progidiff.errors import CancelledError, InputError, WorkerError
from progidiff.wire.conversation import Conversation, Patience, WorkerFailure, refused
from progidiff.wire.frames import MAX_PAYLOAD, Array
from progidiff.wire.messages import (
    FINAL,
    AdapterLoaded,
    AdapterUnloaded,
    Cancel,
    Cancelled,
    Device,
    DoneEvent,
    ErrorReply,
    Event,
    Hello,
    HelloReply,
    ImageInfo,
    ImageReply,
    Load,
    LoadAdapter,
    Loaded,
    ProgressEvent,
    ProposeRequest,
    RankingEvent,
    Reply,
    Request,
    SetImage,
    Shutdown,
    SliceEvent,
    Status,
    StatusReply,
    TidiedEvent,
    UnloadAdapter,
    WarningEvent,
    image_key,
)
from progidiff.wire.process import WorkerProcess, default_command

AnyReply = TypeVar("AnyReply", bound=Any)

_SHOWN_LINES = 5
_WAIT_S = 0.5
_END_WAIT_S = 3.0
# Replies that wait to be taken; beyond that the worker is not read any further, and so waits as well.
_MOST_WAITING_BYTES = 64 << 20


class WorkerFailedError(WorkerError):
    """The worker could not be started, ended, fell silent or cannot be understood; a new client is needed.

    Attributes:
        failure: why; its ``kind`` tells these apart.
    """

    def __init__(self, failure: WorkerFailure) -> None:
        last = failure.details.splitlines()[-_SHOWN_LINES:]
        super().__init__("\n".join([failure.message, *("  " + line for line in last)]))
        self.failure = failure


class WorkerStateError(WorkerError):
    """The client was used out of turn: not started, busy, or closed."""


class RemoteError(WorkerError):
    """The worker answered a request with an error; it goes on.

    Attributes:
        code: stable and machine readable, e.g. ``"prompt"``, ``"model"``, ``"memory"``, ``"busy"``.
        hint: what to try, may be empty.
    """

    def __init__(self, reply: ErrorReply) -> None:
        super().__init__(refused(reply).message)
        self.code = reply.code
        self.message = reply.message
        self.hint = reply.hint


@dataclass
class _Mailbox:
    """Replies to one request, and the bytes of their arrays."""

    replies: deque[tuple[Reply, int]] = field(default_factory=deque)
    nbytes: int = 0


class Connection:
    """Threads that write and read the pipes of a worker, and the replies until somebody takes them."""

    def __init__(self, process: WorkerProcess, conversation: Conversation, heartbeat_timeout: float) -> None:
        self.conversation = conversation
        self._process = process
        self._heartbeat_timeout = heartbeat_timeout
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
        with self._changed:
            if self._failure is not None:
                raise self._failure
            request_id, buffers = self.conversation.send(request)
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
        silence, seen = Patience(limit, _WAIT_S, time.monotonic()), self._signs_of_life
        with self._changed:
            while not silence.ends(time.monotonic()):
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
                if seen != self._signs_of_life:
                    silence, seen = Patience(limit, _WAIT_S, time.monotonic()), self._signs_of_life
        raise self.fail(self.conversation.silent(limit))

    def expect(self, reply: Reply, wanted: type[AnyReply]) -> AnyReply:
        """``reply`` as what it has to be.

        Raises:
            CancelledError, RemoteError: the request was cancelled, or failed.
            WorkerFailedError: it is something else altogether.
        """
        if isinstance(reply, wanted):
            return reply
        if isinstance(reply, Cancelled):
            raise CancelledError("The request was cancelled.")
        if isinstance(reply, ErrorReply):
            raise RemoteError(reply)
        raise self.fail(self.conversation.out_of_turn(reply, wanted))

    def forget(self, request_id: int) -> None:
        """Drop what came and comes for a request."""
        with self._changed:
            self._boxes.pop(request_id, None)
            self._changed.notify_all()

    def fail(self, failure: WorkerFailure | WorkerError) -> WorkerError:
        """End the connection and the process, and return the reason: the first one counts."""
        with self._changed:
            if self._failure is None:
                self._failure = WorkerFailedError(failure) if isinstance(failure, WorkerFailure) else failure
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
        try:
            while self._failure is None and (data := self._process.read()):
                self._signs_of_life += 1
                self.conversation.receive(data)
                while reply := self.conversation.next_reply():
                    self._deliver(*reply)
                if self.conversation.failure is not None:
                    self.fail(self.conversation.failure)
        except (OSError, ValueError):
            pass  # the pipe was closed: there is an end to be told
        if self._failure is None:
            self.fail(self._ended())

    def _deliver(self, request_id: int, reply: Reply) -> None:
        nbytes = sum(value.nbytes for value in vars(reply).values() if isinstance(value, np.ndarray))
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

    def _ended(self) -> WorkerFailure:
        code = self._process.wait(_END_WAIT_S)
        self._process.read_log_to_its_end(1.0)
        return self.conversation.ended(code)


class EventStream(Iterator[Event]):
    """Events of one propose request, ending with a :class:`DoneEvent`; also a context manager.

    Iterating raises ``CancelledError`` where the request was cancelled and ``RemoteError`` where it failed.
    """

    def __init__(self, connection: Connection, request_id: int, on_end: Callable[[], None]) -> None:
        self._connection = connection
        self._request_id = request_id
        self._on_end = on_end
        self._finished = False

    def __enter__(self) -> Self:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None) -> None:
        self.close()

    def __next__(self) -> Event:
        if self._finished:
            raise StopIteration
        return self._next(None)

    def cancel(self) -> None:
        """Cancel the request, from any thread, without waiting; iterating then raises ``CancelledError``."""
        if not self._finished:
            self._connection.send(Cancel(self._request_id), expect_reply=False)

    def close(self, timeout: float = 10.0) -> None:
        """Cancel and drop what is left. A worker that does not stop within ``timeout`` seconds is ended."""
        deadline = time.monotonic() + timeout
        try:
            self.cancel()
            while not self._finished:
                self._next(max(0.0, deadline - time.monotonic()))
        except TimeoutError:
            self._finish()
            self._connection.fail(self._connection.conversation.did_not_stop(timeout))
        except (CancelledError, WorkerError):
            # Cancelled is what was asked for; of a failure the next use of the client speaks.
            self._finish()

    def _next(self, timeout: float | None) -> Event:
        try:
            reply = self._connection.receive(self._request_id, timeout)
            if isinstance(reply, ProgressEvent | SliceEvent | TidiedEvent | RankingEvent | WarningEvent):
                return reply
            done = self._connection.expect(reply, DoneEvent)
        except (CancelledError, WorkerError):
            self._finish()
            raise
        self._finish()
        return done

    def _finish(self) -> None:
        if not self._finished:
            self._finished = True
            self._on_end()


class ClientState(Enum):
    """Where a client stands."""

    NEW = "new"
    STARTING = "starting"
    READY = "ready"
    BUSY = "busy"
    FAILED = "failed"
    CLOSED = "closed"


class WorkerClient:
    """Starts a worker process and asks it for proposals.

    One of ``load``, ``set_image`` and ``propose`` at a time; ``cancel``, ``status`` and ``close``
    at any time from any thread. Every method may raise a :class:`~progidiff.errors.WorkerError`: after a
    :class:`RemoteError` or a :class:`WorkerStateError` the client goes on, after the others it has failed and
    a new one is needed.

    Args:
        command: what to run, e.g. ``["ssh", "gpu-host", "python", "-m", "progidiff", "worker"]``; this
            machine's Python by default.
        env: environment variables to add.
        on_log: called with every line of the worker's log, on a thread of the client.
        start_timeout: seconds until the first answer.
        heartbeat_timeout: seconds without any sign of life after which the worker is ended.
    """

    def __init__(
        self,
        command: Sequence[str] | None = None,
        *,
        env: Mapping[str, str] | None = None,
        on_log: Callable[[str], None] | None = None,
        start_timeout: float = 60.0,
        heartbeat_timeout: float = 60.0,
        max_payload: int = MAX_PAYLOAD,
    ) -> None:
        self._command = list(default_command() if command is None else command)
        self._env = env
        self._on_log = on_log
        self._start_timeout = start_timeout
        self._heartbeat_timeout = heartbeat_timeout
        self._max_payload = max_payload
        self._lock = threading.Lock()
        self._state = ClientState.NEW
        self._connection: Connection | None = None
        self._running: int | None = None
        self._image_key: str | None = None
        self.hello: HelloReply | None = None

    def __enter__(self) -> Self:
        self.start()
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None) -> None:
        self.close()

    @property
    def state(self) -> ClientState:
        """Where the client stands; ``FAILED`` as soon as the worker has ended on its own."""
        failed = self._connection is not None and self._connection.failure is not None
        return ClientState.FAILED if failed and self._state is not ClientState.CLOSED else self._state

    def start(self) -> HelloReply:
        """Start the process and wait for its hello.

        Raises:
            WorkerFailedError: it cannot be run, ended, did not answer in time, or is no worker of this version.
        """
        with self._lock:
            if self._state is not ClientState.NEW:
                raise WorkerStateError("A worker client can be started once; make a new one.")
            self._state = ClientState.STARTING
        conversation = Conversation(max_payload=self._max_payload)
        try:
            process = WorkerProcess(self._command, conversation, self._env, self._on_log)
        except OSError as error:
            self._state = ClientState.FAILED
            reason = error.strerror or str(error)
            raise WorkerFailedError(conversation.not_found(self._command[0], reason)) from error
        self._connection = connection = Connection(process, conversation, self._heartbeat_timeout)
        try:
            wait = self._start_timeout
            reply = connection.receive(connection.send(Hello()), wait, patience=2 * wait)
        except TimeoutError as error:
            raise connection.fail(conversation.no_answer(self._start_timeout)) from error
        except BaseException:
            connection.fail(WorkerStateError("The start of the worker was interrupted; make a new client."))
            raise
        self.hello = connection.expect(reply, HelloReply)
        with self._lock:
            if self._state is ClientState.STARTING:
                self._state = ClientState.READY
        return self.hello

    def load(
        self,
        folder: Path | str | None = None,
        device: Device = "auto",
        on_progress: Callable[[ProgressEvent], None] | None = None,
    ) -> Loaded:
        """Load a model folder (of the worker's machine; ``None``: the bundled model).

        Raises:
            RemoteError: the model cannot be used.
            CancelledError: cancelled from another thread.
        """
        request = Load(None if folder is None else str(folder), device)
        return self._converse(request, Loaded, on_progress)

    def load_adapter(self, folder: Path | str, even_if_worse: bool = False) -> AdapterLoaded:
        """Use a LoRA adapter on the loaded model, in place of the one in use.

        Args:
            folder: the adapter's folder, of the worker's machine.
            even_if_worse: also one that was not better than its base on its held-out cases.

        Raises:
            RemoteError: it cannot be used (code ``"adapter"``), or it is worse (``"adapter_worse"``); what was in use stays.
        """
        return self._converse(LoadAdapter(str(folder), even_if_worse), AdapterLoaded)

    def unload_adapter(self) -> None:
        """Go back to the base model."""
        self._converse(UnloadAdapter(), AdapterUnloaded)

    def set_image(
        self,
        array: Array,
        affine: Array,
        modality: str | None = None,
        plane: str | None = None,
        correct_values: bool = False,
    ) -> ImageInfo:
        """Make a volume the current image; its pixels are only sent if the worker does not hold them.

        Args:
            array: (K, J, I) integers or floats; must not change during the call.
            affine: 4x4, IJK -> RAS in mm.
            modality: ``"CT"``, ``"MR"``, or ``None`` if not known.
            plane: of the slices, or ``None``: what suits volume and model.
            correct_values: take values of a CT that cannot be Hounsfield units for what they look like.

        Raises:
            InputError: not such an array, or larger than the worker takes.
            RemoteError: the engine cannot use the image.
        """
        array, affine = np.asarray(array), np.asarray(affine, dtype=np.float64)
        if array.ndim != 3 or array.dtype.kind not in "iuf" or array.dtype.itemsize > 8:
            raise InputError("The image must be a volume of plain numbers with three axes; convert it first.")
        if self._connection is not None and (too_large := self._connection.conversation.too_large(array.nbytes)):
            raise InputError(too_large.message)
        key = image_key(array, affine, modality, plane, correct_values)
        if key == self._image_key:
            try:
                return self._send_image(SetImage(None, None, modality, plane, key, correct_values))
            except RemoteError as error:
                if error.code != "unknown_image":
                    raise
        return self._send_image(SetImage(array, affine, modality, plane, key, correct_values))

    def propose(self, request: ProposeRequest) -> EventStream:
        """Start proposals. The stream must be read to its end or closed; it says whether the worker refused them."""
        connection, request_id = self._begin(request)
        return EventStream(connection, request_id, lambda: self._end(request_id))

    def cancel(self) -> bool:
        """Cancel what runs, from any thread, without waiting; whether something ran."""
        running, connection = self._running, self._connection
        if running is None or connection is None:
            return False
        try:
            connection.send(Cancel(running), expect_reply=False)
        except WorkerError:
            return False  # it is over already, and whoever waits for it is told why
        return True

    def status(self, timeout: float | None = None) -> StatusReply:
        """State and memory of the worker; ``TimeoutError`` after ``timeout`` seconds."""
        return self._ask(Status(), StatusReply, timeout)

    def close(self, timeout: float = 8.0) -> None:
        """End the worker: ask, wait ``timeout`` seconds, then kill it with all that it started; never hangs."""
        with self._lock:
            if self._state is ClientState.CLOSED:
                return
            self._state = ClientState.CLOSED
        connection = self._connection
        if connection is None:
            return
        try:
            connection.send(Shutdown(), expect_reply=False)
        except WorkerError:
            timeout = 0.0  # it has failed: there is nobody to wait for
        connection.close(WorkerStateError("The worker was closed."), timeout)

    def _send_image(self, request: SetImage) -> ImageInfo:
        self._image_key = None
        image = self._converse(request, ImageReply)
        self._image_key = image.key
        return image.info

    def _converse(
        self,
        request: Request,
        wanted: type[AnyReply],
        on_progress: Callable[[ProgressEvent], None] | None = None,
    ) -> AnyReply:
        """Final reply to a request."""
        connection, request_id = self._begin(request)
        try:
            while isinstance(reply := connection.receive(request_id), ProgressEvent):
                if on_progress is not None:
                    on_progress(reply)
            return connection.expect(reply, wanted)
        except BaseException:
            # Whatever interrupted the wait (a callback, Ctrl-C): nobody waits for the rest any more.
            self.cancel()
            raise
        finally:
            self._end(request_id)

    def _ask(self, request: Request, wanted: type[AnyReply], timeout: float | None) -> AnyReply:
        connection = self._usable()
        request_id = connection.send(request)
        try:
            return connection.expect(connection.receive(request_id, timeout), wanted)
        finally:
            connection.forget(request_id)

    def _usable(self) -> Connection:
        if self._connection is None or self._state is ClientState.STARTING:
            raise WorkerStateError("The worker is not started; start it first.")
        if self._state is ClientState.CLOSED:
            raise WorkerStateError("The worker was closed; make a new client.")
        if self._connection.failure is not None:
            raise self._connection.failure
        return self._connection

    def _begin(self, request: Request) -> tuple[Connection, int]:
        with self._lock:
            connection = self._usable()
            if self._state is ClientState.BUSY:
                raise WorkerStateError("The worker is busy; wait for its result, or cancel it and close its stream.")
            self._running = request_id = connection.send(request)
            self._state = ClientState.BUSY
        return connection, request_id

    def _end(self, request_id: int) -> None:
        """Called when the conversation about a request is over."""
        with self._lock:
            if self._connection is not None:
                self._connection.forget(request_id)
            if self._running == request_id:
                self._running = None
                if self._state is ClientState.BUSY:
                    self._state = ClientState.READY
