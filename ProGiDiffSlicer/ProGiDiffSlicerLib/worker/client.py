"""The worker as the module uses it: calls that run one after another, states, and failures told apart."""

from __future__ import annotations

from collections.abc import Callable
from enum import Enum
from functools import partial
from typing import Any

import qt
from slicer.i18n import tr as _

from progidiff.errors import InputError, ProtocolError
from progidiff.wire.conversation import WorkerFailure, refused
from progidiff.wire.messages import (
    FINAL,
    AdapterLoaded,
    AdapterUnloaded,
    Cancel,
    Cancelled,
    Device,
    DoneEvent,
    ErrorReply,
    HelloReply,
    ImageReply,
    Load,
    LoadAdapter,
    Loaded,
    ProgressEvent,
    ProposeRequest,
    Reply,
    Request,
    SegWritten,
    UnloadAdapter,
    WriteSeg,
)
from ProGiDiffSlicerLib.idle import IdleQueue
from ProGiDiffSlicerLib.signals import Signal
from ProGiDiffSlicerLib.worker.calls import Array, Call, Image, Job, Jobs, run_all
from ProGiDiffSlicerLib.worker.command import WorkerCommand
from ProGiDiffSlicerLib.worker.link import Link
from ProGiDiffSlicerLib.worker.process import PatientTimer, ProcessFactory, QtProcess

SENDING = "sending the image"
_PROGRESS_STEP = 0.02


class WorkerState(Enum):
    """Where the worker stands."""

    STOPPED = "stopped"
    STARTING = "starting"
    READY = "ready"
    BUSY = "busy"
    CANCELLING = "cancelling"
    CRASHED = "crashed"


class WorkerClient:
    """Starts a worker when it is needed and asks it for proposals.

    ``load``, ``load_adapter``, ``set_image`` and ``propose`` return at once; their calls run in order, so that a whole run
    can be submitted at a time. Where a call fails, the calls behind it fail with it, because they build on it; calls
    submitted while it was being cancelled are a new run and stay. A worker that ended takes all calls along, but for those
    that only waited and build on nothing; the next call starts a new one.

    Attributes:
        state: a :class:`WorkerState`.
        hello, loaded, image: the worker's last replies of these kinds, ``None`` while a running worker has none.
        loaded_from: (folder, device) of the call that loaded the model.
        adapter, adapter_from: the adapter in use and its folder, ``None`` for the base model.
        failure: why the state is ``CRASHED``.
        stateChanged: Signal(WorkerState).
        failed: Signal(WorkerFailure): the worker itself failed, not only a call.
    """

    def __init__(
        self,
        command: Callable[[], WorkerCommand],
        process_factory: ProcessFactory = QtProcess,
        parent: Any = None,
        heartbeat_timeout_s: float = 30.0,
        start_timeout_s: float = 60.0,
        cancel_timeout_s: float = 10.0,
        stop_grace_s: float = 3.0,
        linger_s: float | None = None,
    ) -> None:
        """``linger_s``: a worker that has had nothing to do for so long is ended; ``None``: it stays."""
        self.state = WorkerState.STOPPED
        self.failure: WorkerFailure | None = None
        self.hello: HelloReply | None = None
        self.loaded: Loaded | None = None
        self.loaded_from: tuple[str | None, str] | None = None
        self.adapter: AdapterLoaded | None = None
        self.adapter_from: str | None = None
        self.image: ImageReply | None = None
        self.stateChanged = Signal()
        self.failed = Signal()
        self._command = command
        self._process_factory = process_factory
        self._parent = parent
        self._heartbeat_timeout_s = heartbeat_timeout_s
        self._start_timeout_s = start_timeout_s
        self._cancel_timeout_s = cancel_timeout_s
        self._stop_grace_s = stop_grace_s
        self._link: Link | None = None
        self._log: Link | None = None
        self._leaving: list[Link] = []
        self._jobs = Jobs()
        self._idle = IdleQueue(parent)
        self._cancelling = PatientTimer(parent, self._cancel_expired)
        # Whatever a call leads to happens in a later turn of the event loop: first its listeners can connect.
        self._wake = qt.QTimer(parent)
        self._wake.setSingleShot(True)
        self._wake.setInterval(0)
        self._wake.connect("timeout()", self._advance)
        self._lingering: Any = None
        if linger_s is not None:
            self._lingering = qt.QTimer(parent)
            self._lingering.setSingleShot(True)
            self._lingering.setInterval(int(1000 * linger_s))
            self._lingering.connect("timeout()", self.stop)

    def log_tail(self) -> str:
        """The last lines of the log of the current worker, or of the last one."""
        return "" if self._log is None else self._log.conversation.log_text

    def start(self) -> None:
        """Start the worker, if none runs."""
        if self.state in (WorkerState.STOPPED, WorkerState.CRASHED):
            self.failure = None
            self._wake.start()
            self._set_state(WorkerState.STARTING)

    def stop(self, wait: bool = False, at_once: bool = False) -> None:
        """End the worker; every call ends as cancelled.

        It is asked first and killed after a few seconds, or ``at_once``; meanwhile the event loop goes on. With ``wait``
        (the end of the application, where no event loop will follow) this returns when no process is left.
        """
        link = self._link
        ended = self._give_up()
        self._wake.stop()
        self._linger(False)
        if link is not None:
            link.close(0.0 if at_once else self._stop_grace_s)
        if wait:
            for leaving in list(self._leaving):
                leaving.wait(self._stop_grace_s)
        run_all(lambda: self._set_state(WorkerState.STOPPED), *(job.call.end_cancelled for job in ended))

    def restart(self) -> None:
        """End the worker and start another one; every call ends as cancelled."""
        self.stop()
        self.start()

    def load(self, folder: str | None, device: Device = "auto") -> Call:
        """Load a model folder of the worker's machine (``None``: the bundled model); succeeds with ``Loaded``."""
        return self._submit(Job(Call("load", self._cancel_call), Loaded, Load(folder, device)))

    def load_adapter(self, folder: str, even_if_worse: bool = False) -> Call:
        """Use an adapter's folder of the worker's machine on the loaded model; succeeds with ``AdapterLoaded``.

        Where it is refused, what was in use stays in use.
        """
        return self._submit(Job(Call("load_adapter", self._cancel_call), AdapterLoaded, LoadAdapter(folder, even_if_worse)))

    def unload_adapter(self) -> Call:
        """Go back to the base model; succeeds with ``AdapterUnloaded``."""
        return self._submit(Job(Call("unload_adapter", self._cancel_call), AdapterUnloaded, UnloadAdapter()))

    def set_image(
        self,
        array_kji: Array,
        affine: Array,
        modality: str | None = None,
        plane: str | None = None,
        correct_values: bool = False,
    ) -> Call:
        """Make a volume the worker's image; succeeds with ``ImageReply``.

        The voxels are copied between the events of the application, and sent unless the worker holds them already.

        Args:
            array_kji: (K, J, I) integers or floats.
            affine: (4, 4), IJK -> RAS in mm.
            modality: ``"CT"``, ``"MR"`` or another code of DICOM, or ``None`` if not known.
            plane: of the slices, or ``None``: what suits volume and model.
            correct_values: take values of a CT that cannot be Hounsfield units for what they look like.

        Raises:
            InputError: not such a volume.
        """
        image = Image(array_kji, affine, modality, plane, correct_values)
        job = Job(Call("set_image", self._cancel_call), ImageReply, image=image)
        job.copying = self._idle.submit(
            image.prepare(), lambda result: self._wake.start(), lambda error: self._not_copied(job, error)
        )
        return self._submit(job)

    def propose(self, request: ProposeRequest) -> Call:
        """Proposals on the image; succeeds with ``DoneEvent``."""
        return self._submit(Job(Call("propose", self._cancel_call), DoneEvent, request))

    def write_seg(self, request: WriteSeg) -> Call:
        """Segments as DICOM SEG; needs no model and no image. Succeeds with ``SegWritten``; nothing builds on it."""
        return self._submit(Job(Call("write_seg", self._cancel_call), SegWritten, request, alone=True))

    def ask(self, request: Request, expects: type[Any]) -> Call:
        """A request that needs neither model nor image, nor anything asked before; succeeds with ``expects``.

        Cancelled, it still succeeds where the worker did it all the same. It may wait for another worker.
        """
        return self._submit(Job(Call(type(request).__name__, self._cancel_call), expects, request, alone=True, told=True))

    def cancel(self) -> bool:
        """Cancel the running call and those behind it; whether there were any.

        They all end as cancelled. A worker that does not stop in time is ended; its end is then told by ``failed``.
        """
        waiting = self._jobs.take_waiting()
        running = self._jobs.running
        first = [] if running is None else [lambda: self._cancel_running(running)]
        run_all(*first, *(job.call.end_cancelled for job in waiting))
        return running is not None or bool(waiting)

    def _submit(self, job: Job) -> Call:
        self.start()
        self._linger(False)
        self._jobs.add(job)
        self._wake.start()
        return job.call

    def _advance(self) -> None:
        """Do whatever can be done next."""
        if self.state is WorkerState.STARTING and self._link is None:
            self._launch()
        link = self._link
        if link is None or link.hello is None:
            return
        job = self._jobs.next()
        if job is None:
            self._linger(True)
        if job is None or job.request_id is not None:
            return
        if job.image is None or job.image.ready:
            self._begin(link, job)
        else:
            self._set_state(WorkerState.BUSY)

    def _launch(self) -> None:
        self._log = None
        try:
            command = self._command()
        except InputError as error:
            self._on_broken(WorkerFailure("start", str(error)))
            return
        link = Link(self._process_factory, self._parent, self._start_timeout_s, self._heartbeat_timeout_s)
        link.opened.connect(self._on_opened)
        link.replied.connect(self._on_reply)
        link.sent.connect(self._on_sent)
        link.broken.connect(self._on_broken)
        link.gone.connect(self._on_gone)
        self._link = self._log = link
        link.start(command)

    def _begin(self, link: Link, job: Job) -> None:
        request = job.request
        if job.image is not None:
            if too_large := link.conversation.too_large(job.image.nbytes):
                self._fail(job, too_large)
                return
            job.by_key = self.image is not None and self.image.key == job.image.key
            request = job.image.by_key() if job.by_key else job.image.with_voxels()
            # Until the worker has answered, nobody knows which one it holds.
            self.image = None
        elif isinstance(request, Load):
            self.loaded = self.loaded_from = self.adapter = self.adapter_from = None
        if request is not None and self._send(link, job, request):
            self._set_state(WorkerState.BUSY)

    def _send(self, link: Link, job: Job, request: Request) -> bool:
        try:
            job.request_id = link.send(request)
        except (ProtocolError, MemoryError) as error:
            self._fail(job, _not_prepared(error))
            return False
        link.expect_signs(True)
        return True

    def _on_opened(self, hello: HelloReply) -> None:
        self.hello = hello
        self._wake.start()
        self._set_state(WorkerState.READY)

    def _on_reply(self, request_id: int, reply: Reply) -> None:
        job, link = self._jobs.running, self._link
        if job is None or link is None or request_id != job.request_id:
            return  # the acknowledgement of a cancel, or the rest of a call that is over
        if not isinstance(reply, FINAL):
            job.call.event.emit(reply)
        elif isinstance(reply, job.expects):
            self._keep(job, reply)
            dropped = job.cancelling and not job.told
            self._finish(job.call.end_cancelled if dropped else lambda: job.call.succeed(reply))
        elif isinstance(reply, Cancelled) or (isinstance(reply, ErrorReply) and job.cancelling):
            self._finish(job.call.end_cancelled)
        elif not isinstance(reply, ErrorReply):
            link.fail(link.conversation.out_of_turn(reply, job.expects))
        elif reply.code == "unknown_image" and job.by_key and job.image is not None:
            job.by_key = False
            self._send(link, job, job.image.with_voxels())
        else:
            self._fail(job, refused(reply))

    def _on_sent(self) -> None:
        # Its answer to a cancel cannot come before all that was sent before has arrived.
        self._cancelling.reset()
        job, link = self._jobs.running, self._link
        if job is None or link is None or job.image is None or job.by_key or job.request_id is None or job.shown >= 1:
            return
        fraction = 1 - min(1.0, link.unsent / job.image.nbytes)
        if fraction >= min(1.0, job.shown + _PROGRESS_STEP):
            job.shown = fraction
            job.call.event.emit(ProgressEvent(SENDING, fraction))

    def _on_broken(self, failure: WorkerFailure) -> None:
        ended = self._give_up()
        self.failure = failure
        # Only where the worker was lost over another job: one that loses none would be started for ever.
        lost = any(job.request_id is not None for job in ended)
        kept = [job for job in ended if lost and job.told and job.request_id is None]
        ended = [job for job in ended if job not in kept]
        run_all(
            lambda: self._set_state(WorkerState.CRASHED),
            lambda: self.failed.emit(failure),
            *(partial(self._submit, job) for job in kept),
            *(job.call.end_cancelled for job in ended if job.cancelling),
            *(_failing(job.call, failure) for job in ended if not job.cancelling),
        )

    def _on_gone(self, link: Link) -> None:
        if link in self._leaving:
            self._leaving.remove(link)

    def _give_up(self) -> list[Job]:
        """Part with the worker; the jobs that have not ended, in order."""
        link, self._link = self._link, None
        ended = self._jobs.take_all()
        self._cancelling.stop()
        self._forget()
        if link is not None:
            for signal in (link.opened, link.replied, link.sent, link.broken):
                signal.clear()
            if not link.released:
                self._leaving.append(link)
        return ended

    def _keep(self, job: Job, reply: Any) -> None:
        if isinstance(reply, Loaded) and isinstance(job.request, Load):
            self.loaded, self.loaded_from = reply, (job.request.folder, job.request.device)
        elif isinstance(reply, AdapterLoaded) and isinstance(job.request, LoadAdapter):
            self.adapter, self.adapter_from = reply, job.request.folder
        elif isinstance(reply, AdapterUnloaded):
            self.adapter = self.adapter_from = None
        elif isinstance(reply, ImageReply):
            self.image = reply

    def _finish(self, *ends: Callable[[], None]) -> None:
        """The running call is over: told last, so that whoever hears it finds a client that is ready for the next one."""
        self._jobs.end_running()
        self._cancelling.stop()
        if self._link is not None:
            self._link.expect_signs(False)
        waiting = self._jobs.waiting
        if waiting:
            self._wake.start()
        self._linger(not waiting)
        run_all(lambda: self._set_state(WorkerState.BUSY if waiting else WorkerState.READY), *ends)

    def _fail(self, job: Job, failure: WorkerFailure) -> None:
        """A call and those behind it fail; the worker goes on."""
        was_running = job is self._jobs.running
        ends = [_failing(other.call, failure) for other in self._jobs.take_from(job)]
        if was_running:
            self._finish(*ends)
        else:
            run_all(*ends)

    def _not_copied(self, job: Job, error: Exception) -> None:
        self._fail(job, _not_prepared(error))

    def _cancel_call(self, call: Call) -> None:
        running = self._jobs.running
        if running is not None and running.call is call:
            self._cancel_running(running)
        elif self._jobs.take(call) is not None:
            call.end_cancelled()

    def _cancel_running(self, job: Job) -> None:
        if job.cancelling:
            return
        job.cancelling = True
        if job.request_id is None or self._link is None:
            self._finish(job.call.end_cancelled)
            return
        self._link.send(Cancel(job.request_id))
        self._cancelling.start(self._cancel_timeout_s)
        self._set_state(WorkerState.CANCELLING)

    def _cancel_expired(self) -> None:
        if self._link is not None:
            self._link.fail(self._link.conversation.did_not_stop(self._cancel_timeout_s))

    def _linger(self, wanted: bool) -> None:
        """Whether there is nothing to do from now on."""
        if self._lingering is not None:
            self._lingering.start() if wanted else self._lingering.stop()

    def _forget(self) -> None:
        self.hello = self.loaded = self.loaded_from = self.image = None
        self.adapter = self.adapter_from = None

    def _set_state(self, state: WorkerState) -> None:
        if state is not self.state:
            self.state = state
            self.stateChanged.emit(state)


def _failing(call: Call, failure: WorkerFailure) -> Callable[[], None]:
    return lambda: call.fail(failure)


def _not_prepared(error: Exception) -> WorkerFailure:
    """The image could not be copied, or the request not be put into words."""
    if isinstance(error, MemoryError):
        message = _("There is not enough memory to copy the volume; close other programs or crop the volume.")
        return WorkerFailure("remote", message, code="memory")
    message = _("The request could not be sent ({reason}); change it and try again.")
    return WorkerFailure("remote", message.format(reason=str(error).rstrip(".") or type(error).__name__), code="input")
