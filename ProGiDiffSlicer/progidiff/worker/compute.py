"""The compute thread: one request at a time, cancellable, and no way for it to fail without a reply."""

from __future__ import annotations

import threading
import time
from collections.abc import Callable

from progidiff.errors import CancelledError, ProGiDiffError, ProtocolError
from progidiff.system import is_out_of_memory
from progidiff.wire.messages import Cancelled, ErrorReply, Event, Reply
from progidiff.worker.log import LOG, where
from progidiff.worker.outbox import BULK_LIMIT, Outbox

_LONGEST_DETAIL = 500


class RequestFailed(Exception):
    """A request that cannot be carried out; becomes an error reply."""

    def __init__(self, code: str, message: str, hint: str = "") -> None:
        super().__init__(message)
        self.reply = ErrorReply(code, message, hint)


class Run:
    """One request at work."""

    def __init__(self, request_id: int, name: str, outbox: Outbox) -> None:
        self.request_id = request_id
        self.name = name
        self._outbox = outbox
        self._cancelled = threading.Event()
        self._start = time.monotonic()

    @property
    def seconds(self) -> float:
        return time.monotonic() - self._start

    def cancel(self) -> None:
        self._cancelled.set()

    def cancelled(self) -> bool:
        return self._cancelled.is_set()

    def check(self) -> None:
        """Raise ``CancelledError`` if the request was cancelled."""
        if self._cancelled.is_set():
            raise CancelledError("The request was cancelled.")

    def emit(self, event: Event) -> None:
        """Send an event; waits while the client is far behind."""
        self._outbox.wait_for_room(BULK_LIMIT)
        self._outbox.post(event, self.request_id)


Work = Callable[[Run], Reply]


class Compute:
    """Runs work on one long-lived thread (torch keeps its thread pools per calling thread)."""

    def __init__(self, outbox: Outbox) -> None:
        self._outbox = outbox
        self._changed = threading.Condition()
        self._run: Run | None = None
        self._work: Work | None = None
        threading.Thread(target=self._loop, name="compute", daemon=True).start()

    @property
    def run(self) -> Run | None:
        """The request at work."""
        return self._run

    def submit(self, request_id: int, name: str, work: Work) -> bool:
        """Start ``work``, whose result is the final reply; false while another request is at work."""
        with self._changed:
            if self._run is not None:
                return False
            self._run = Run(request_id, name, self._outbox)
            self._work = work
            self._changed.notify_all()
            return True

    def cancel(self, request_id: int | None) -> bool:
        """Cancel the request at work (only if it is ``request_id``, when given); whether there was one."""
        with self._changed:
            if self._run is None or request_id not in (None, self._run.request_id):
                return False
            self._run.cancel()
            return True

    def wait_idle(self, timeout: float) -> bool:
        """Wait until nothing is at work and the last reply is posted."""
        with self._changed:
            return self._changed.wait_for(lambda: self._run is None, timeout)

    def _loop(self) -> None:
        while True:
            with self._changed:
                self._changed.wait_for(lambda: self._work is not None)
                run, work = self._run, self._work
                self._work = None
            if run is not None and work is not None:
                self._carry_out(run, work)

    def _carry_out(self, run: Run, work: Work) -> None:
        LOG.info("request %d: %s", run.request_id, run.name)
        reply = _reply_of(run, work)
        outcome = f"error {reply.code}" if isinstance(reply, ErrorReply) else type(reply).__name__.lower()
        LOG.info("request %d: %s after %.2f s", run.request_id, outcome, run.seconds)
        with self._changed:
            # Idle first: a client that has the final reply may ask for the next thing at once.
            self._run = None
            try:
                self._outbox.post(reply, run.request_id)
            except ProtocolError as error:
                self._outbox.post(ErrorReply("internal", str(error)), run.request_id)
            self._changed.notify_all()


def _reply_of(run: Run, work: Work) -> Reply:
    try:
        return work(run)
    except CancelledError:
        return Cancelled()
    except RequestFailed as failure:
        return failure.reply
    except ProGiDiffError as error:
        return ErrorReply(error.code, str(error))
    except BaseException as error:  # the worker outlives whatever the engine does, a SystemExit too
        LOG.error("request %d: %s", run.request_id, where(error))
        if is_out_of_memory(error):
            return ErrorReply(
                "memory",
                "There was not enough memory for this request.",
                "Ask for fewer proposals or a smaller batch, or close other programs, then try again.",
            )
        return ErrorReply(
            "internal",
            f"The engine failed ({type(error).__name__}: {str(error)[:_LONGEST_DETAIL]}).",
            "Try again; if it happens again, report it with the log.",
        )
