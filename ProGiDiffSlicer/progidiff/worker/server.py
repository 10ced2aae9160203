"""The worker process: reads requests, answers them, and ends when its client does."""

from __future__ import annotations

import argparse
import faulthandler
import logging
import os
import platform
import sys
import threading
import time
from collections.abc import Callable, Sequence
from typing import Any, NoReturn

from progidiff import __version__
from progidiff.system import device_memory_mb, process_memory_mb
from progidiff.wire.codec import RequestError, frame_to_request
from progidiff.wire.frames import MAX_PAYLOAD, Frame, FrameDecoder
from progidiff.wire.messages import (
    Acknowledged,
    AdaptRequest,
    Bye,
    Cancel,
    CountCases,
    ErrorReply,
    Heartbeat,
    Hello,
    HelloReply,
    KeepCase,
    Load,
    LoadAdapter,
    NextRequest,
    ProposeRequest,
    Reply,
    Request,
    SetImage,
    Shutdown,
    Status,
    StatusReply,
    SwapCases,
    UnloadAdapter,
    WriteSeg,
)
from progidiff.worker import tasks
from progidiff.worker.pipes import LOG, REPLY_LIMIT, Outbox, Pipes, claim_standard_streams, start_log, where
from progidiff.worker.session import Compute, EngineFactory, RequestRun, Session, load_engine, write_seg

EXIT_OK = 0
EXIT_USAGE = 2
EXIT_PROTOCOL = 3
EXIT_CRASH = 4

HEARTBEAT_S = 1.0
_GRACE_S = 3.0  # for a cancelled request to end
#: Seconds for those that still write when their client has gone.
_LAST_S: dict[type[Request], float] = {KeepCase: 60.0, SwapCases: 60.0, AdaptRequest: 600.0}
#: What has arrived of these is finished without their client, not cancelled.
_FINISHED = (KeepCase, SwapCases)
_FLUSH_S = 2.0  # for the last replies to be read
_PARENT_POLL_S = 0.5


class Server:
    """Answers the requests of one client over two pipes."""

    def __init__(
        self,
        pipes: Pipes,
        engine_factory: EngineFactory,
        max_payload: int,
        heartbeat_s: float,
    ) -> None:
        self._pipes = pipes
        self._max_payload = max_payload
        self._heartbeat_s = heartbeat_s
        self._start = time.monotonic()
        self._ending = threading.Lock()
        self._outbox = Outbox(pipes, on_broken=lambda: self.end(EXIT_OK, "nobody reads the replies"))
        self._compute = Compute(self._outbox)
        self._session = session = Session(engine_factory)
        self._work: dict[type[Request], Callable[[Any, RequestRun], Reply]] = {
            Load: session.load,
            LoadAdapter: session.load_adapter,
            UnloadAdapter: session.unload_adapter,
            SetImage: session.set_image,
            ProposeRequest: session.propose,
            WriteSeg: write_seg,
            CountCases: tasks.count_cases,
            KeepCase: tasks.keep_case,
            SwapCases: tasks.swap_cases,
            NextRequest: tasks.find_next,
            AdaptRequest: tasks.adapt,
        }

    def run(self) -> NoReturn:
        """Answer requests until the client goes, asks for the end, or breaks the protocol."""
        every(self._heartbeat_s, self._beat, "heartbeat")
        watch_parent(lambda: self.end(EXIT_OK, "the parent process is gone"))
        decoder = FrameDecoder(max_payload=self._max_payload)
        while True:
            data = self._pipes.read()
            for frame in decoder.feed(data) if data else decoder.finish():
                self._answer(frame)
                self._outbox.wait_for_room(REPLY_LIMIT)
            if not data:
                self.end(EXIT_OK, "the requests ended")

    def end(self, code: int, reason: str, bye: int | None = None) -> NoReturn:
        """Cancel or finish what runs, let the last replies be read, and end the process, from whatever thread."""
        if not self._ending.acquire(blocking=False):
            threading.Event().wait()
        LOG.info("ending: %s", reason)
        run = self._compute.run
        grace = _GRACE_S if run is None else _LAST_S.get(type(run.request), _GRACE_S)
        # Should a native library hold the interpreter lock from here on, this still ends the process.
        # Descriptor 1 is a second name of the log by now (see claim_standard_streams).
        faulthandler.dump_traceback_later(grace + _FLUSH_S + 2, exit=True, file=1)
        if run is not None and not isinstance(run.request, _FINISHED):
            run.cancel()
        self._compute.wait_idle(grace)
        if bye is not None:
            self._outbox.post(Bye(), bye)
        self._outbox.flush(_FLUSH_S)
        logging.shutdown()
        # Not sys.exit: it would wait for, or tear down under, threads that are inside torch.
        os._exit(code)

    def _answer(self, frame: Frame) -> None:
        try:
            request_id, request = frame_to_request(frame)
        except RequestError as error:
            LOG.warning("unreadable request (%s)", error.code)
            self._outbox.post(ErrorReply(error.code, str(error)), error.request_id)
            if frame.fatal:
                self.end(EXIT_PROTOCOL, "the stream of requests is broken")
            return
        if isinstance(request, Shutdown):
            self.end(EXIT_OK, "asked to", bye=request_id)
        self._handle(request_id, request)

    def _handle(self, request_id: int, request: Request) -> None:
        post = self._outbox.post
        if isinstance(request, Hello):
            post(self._hello(), request_id)
        elif isinstance(request, Status):
            post(self._status(), request_id)
        elif isinstance(request, Cancel):
            post(Acknowledged(self._compute.cancel(request.request)), request_id)
        else:
            work = self._work[type(request)]
            if not self._compute.submit(request_id, request, lambda run: work(request, run)):
                busy = ErrorReply("busy", "The worker is busy with another request.", "Wait for it, or cancel it.")
                post(busy, request_id)

    def _hello(self) -> HelloReply:
        return HelloReply(
            version=__version__,
            pid=os.getpid(),
            python=platform.python_version(),
            max_payload=self._max_payload,
            heartbeat_s=self._heartbeat_s,
        )

    def _status(self) -> StatusReply:
        run, session = self._compute.run, self._session
        model_id = session.model_id
        return StatusReply(
            state="working" if run else "ready" if model_id else "empty",
            running=run.request_id if run else None,
            model_id=model_id,
            device=session.device,
            image_key=session.image_key,
            memory_mb=process_memory_mb(),
            device_memory_mb=device_memory_mb(),
            uptime_s=time.monotonic() - self._start,
            adapter_id=session.adapter_id,
        )

    def _beat(self) -> None:
        # A frame that waits to be read is sign of life enough.
        if self._outbox.idle:
            run = self._compute.run
            beat = Heartbeat(run.request_id, run.seconds) if run else Heartbeat(None, 0.0)
            self._outbox.post(beat, None)


def every(seconds: float, action: Callable[[], None], name: str) -> None:
    """Call ``action`` every ``seconds`` on a thread of its own, for as long as the process lives."""

    def loop() -> None:
        while True:
            time.sleep(seconds)
            action()

    threading.Thread(target=loop, name=name, daemon=True).start()


def watch_parent(gone: Callable[[], None]) -> None:
    """Call ``gone`` when the parent process has ended.

    The end of standard input says so too, but not while another process holds the pipe's other end, as a
    sibling that was forked at a bad moment does.
    """
    if sys.platform == "win32":
        threading.Thread(target=_wait_for_windows_parent, args=(gone,), name="parent", daemon=True).start()
        return
    parent = os.getppid()

    def poll() -> None:
        # An orphan is adopted by another process.
        if os.getppid() != parent:
            gone()

    every(_PARENT_POLL_S, poll, "parent")


def _wait_for_windows_parent(gone: Callable[[], None]) -> None:
    if sys.platform == "win32":
        import ctypes

        synchronize, infinite = 0x0010_0000, 0xFFFF_FFFF
        kernel = ctypes.WinDLL("kernel32")
        kernel.OpenProcess.restype = ctypes.c_void_p
        kernel.WaitForSingleObject.argtypes = [ctypes.c_void_p, ctypes.c_uint32]
        handle = kernel.OpenProcess(synchronize, False, os.getppid())
        # Without the right to wait for the parent the end of standard input remains.
        if handle:
            kernel.WaitForSingleObject(handle, infinite)
            gone()


def serve(
    engine_factory: EngineFactory = load_engine,
    *,
    max_payload: int = MAX_PAYLOAD,
    heartbeat_s: float = HEARTBEAT_S,
    log_level: str = "INFO",
) -> NoReturn:
    """Be the worker on this process's standard streams. Never returns.

    Exit codes: 0 the client ended or asked for the end, 2 started wrongly, 3 the stream of requests broke the
    protocol, 4 the worker itself failed.
    """
    start_log(log_level)
    try:
        pipes = claim_standard_streams()
    except OSError:
        LOG.error("standard input and output must be pipes")
        sys.exit(EXIT_USAGE)
    faulthandler.enable(file=1)
    threading.excepthook = lambda args: _crash(args.exc_value)
    try:
        Server(pipes, engine_factory, max_payload, heartbeat_s).run()
    except KeyboardInterrupt:
        LOG.info("interrupted")
        os._exit(EXIT_OK)
    except BaseException as error:
        _crash(error)


def _crash(error: BaseException | None) -> NoReturn:
    LOG.critical("the worker failed: %s", "unknown" if error is None else where(error))
    logging.shutdown()
    os._exit(EXIT_CRASH)


def main(argv: Sequence[str] | None = None) -> NoReturn:
    """``progidiff worker``: serve with the real engine."""
    parser = argparse.ArgumentParser(
        prog="progidiff worker",
        description="Answer ProGiDiff requests on standard input and output; the log goes to standard error.",
        allow_abbrev=False,
    )
    parser.add_argument("--max-payload", type=int, default=MAX_PAYLOAD, help="largest message in bytes")
    parser.add_argument("--heartbeat", type=float, default=HEARTBEAT_S, help="seconds between signs of life")
    parser.add_argument("--log-level", default="INFO", choices=["DEBUG", "INFO", "WARNING", "ERROR"])
    options = parser.parse_args(argv)
    if options.max_payload < 1 or not 0.01 <= options.heartbeat <= 3600:
        parser.error("the largest message is at least 1 byte, the heartbeat between 0.01 and 3600 seconds")
    if sys.stdin is not None and sys.stdin.isatty():
        parser.error("this command is started by a program and talks to it through pipes, not to a terminal")
    # Models are local folders: nothing here may ask the network, whatever the machine's settings.
    os.environ["HF_HUB_OFFLINE"] = "1"
    os.environ["HF_HUB_DISABLE_TELEMETRY"] = "1"
    serve(max_payload=options.max_payload, heartbeat_s=options.heartbeat, log_level=options.log_level)
