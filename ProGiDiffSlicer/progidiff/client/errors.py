"""The ways in which a worker fails its client, told apart."""

from __future__ import annotations

from progidiff.errors import WorkerError
from progidiff.wire.messages import ErrorReply

_SHOWN_LINES = 5


class WorkerStartError(WorkerError):
    """The worker could not be started, ended before it said hello, or did not say it in time.

    Attributes:
        exit_code: of the process, ``None`` if it never ran or still runs.
        stderr_tail: last lines of its log.
    """

    def __init__(self, message: str, exit_code: int | None = None, stderr_tail: str = "") -> None:
        super().__init__(_with_tail(message, stderr_tail))
        self.exit_code = exit_code
        self.stderr_tail = stderr_tail


class WorkerExitedError(WorkerError):
    """The worker ended on its own; attributes as of :class:`WorkerStartError`."""

    def __init__(self, message: str, exit_code: int | None, stderr_tail: str) -> None:
        super().__init__(_with_tail(message, stderr_tail))
        self.exit_code = exit_code
        self.stderr_tail = stderr_tail


class WorkerProtocolError(WorkerError):
    """What came over the pipe is not the protocol, or the worker could not read what was sent."""


class WorkerLostError(WorkerError):
    """The worker runs but gave no sign of life for too long; it was killed."""


class WorkerStateError(WorkerError):
    """The client was used out of turn: not started, busy, or closed."""


class RemoteError(WorkerError):
    """The worker answered a request with an error; it goes on.

    Attributes:
        code: stable and machine readable, e.g. ``"prompt"``, ``"model"``, ``"memory"``, ``"busy"``.
        hint: what to try, may be empty.
    """

    def __init__(self, reply: ErrorReply) -> None:
        super().__init__(f"{reply.message} {reply.hint}".strip())
        self.code = reply.code
        self.message = reply.message
        self.hint = reply.hint


def _with_tail(message: str, tail: str) -> str:
    lines = tail.strip().splitlines()[-_SHOWN_LINES:]
    return "\n".join([message, *("  " + line for line in lines)]) if lines else message
