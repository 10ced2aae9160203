"""A typed client of the worker, for any number of threads. It imports neither torch nor diffusers."""

from __future__ import annotations

import re
import threading
from collections.abc import Callable, Mapping, Sequence
from enum import Enum
from pathlib import Path
from types import TracebackType
from typing import Self

import numpy as np

from progidiff.client.connection import AnyReply, Connection
from progidiff.client.errors import (
    RemoteError,
    WorkerExitedError,
    WorkerStartError,
    WorkerStateError,
)
from progidiff.client.process import WorkerProcess, default_command
from progidiff.client.stream import EventStream
from progidiff.errors import InputError, WorkerError
from progidiff.remote import meaning_of_end
from progidiff.wire.frames import MAX_PAYLOAD, Array
from progidiff.wire.messages import (
    AdapterLoaded,
    AdapterUnloaded,
    Cancel,
    Device,
    Hello,
    HelloReply,
    ImageInfo,
    ImageReply,
    Load,
    LoadAdapter,
    Loaded,
    ProgressEvent,
    ProposeRequest,
    Request,
    SetImage,
    Shutdown,
    Status,
    StatusReply,
    UnloadAdapter,
    image_key,
)


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
            WorkerStartError: it cannot be run, ended, or did not answer in time.
            WorkerProtocolError: what runs is no worker of this version.
        """
        with self._lock:
            if self._state is not ClientState.NEW:
                raise WorkerStateError("A worker client can be started once; make a new one.")
            self._state = ClientState.STARTING
        try:
            process = WorkerProcess(self._command, self._env, self._on_log)
        except WorkerStartError:
            self._state = ClientState.FAILED
            raise
        self._connection = connection = Connection(process, self._heartbeat_timeout, self._max_payload)
        try:
            wait = self._start_timeout
            reply = connection.receive(connection.send(Hello()), wait, patience=2 * wait)
        except WorkerExitedError as error:
            message = meaning_of_end(error.exit_code, error.stderr_tail)
            missing = re.findall(r"No module named ['\"]?([\w.]+)", error.stderr_tail)
            if missing:
                message = f'The worker did not start: its Python has no package "{missing[-1]}"; install it there.'
            message = message or (
                f"The worker did not start (exit code {error.exit_code}); check the command and its Python."
            )
            raise WorkerStartError(message, error.exit_code, error.stderr_tail) from error
        except TimeoutError as error:
            tail = process.stderr_tail()
            message = f"The worker did not answer within {self._start_timeout:g} s; check the command."
            late = WorkerStartError(message, None, tail)
            connection.fail(late)
            raise late from error
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
        if self.hello is not None and array.nbytes + 4096 > self.hello.max_payload:
            raise InputError(
                f"The image of {array.nbytes / 2**20:.0f} MB is larger than the worker takes "
                f"({self.hello.max_payload / 2**20:.0f} MB); crop it or start the worker with --max-payload."
            )
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
