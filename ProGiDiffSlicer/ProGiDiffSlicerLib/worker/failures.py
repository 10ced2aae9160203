"""The ways in which a worker fails, told apart; each is one sentence that says what to do."""

from __future__ import annotations

import os
import re
import signal
from dataclasses import dataclass
from typing import Literal

from slicer.i18n import tr as _

from progidiff.remote import meaning_of_end
from progidiff.wire.messages import ErrorReply

Kind = Literal["start", "exit", "protocol", "lost", "remote"]

_DETAIL_LINES = 20
_OUT_OF_MEMORY_CODES = (137,)  # how a shell and ssh report signal 9


@dataclass(frozen=True)
class WorkerFailure:
    """Why a call, or the worker itself, failed.

    Attributes:
        kind: ``"start"`` it could not be started or did not say hello, ``"exit"`` it ended on its own, ``"protocol"`` what
            it says cannot be understood, ``"lost"`` it hung and was ended, ``"remote"`` it refused a request and goes on.
        message: one sentence for the user, with the next step.
        details: the last lines of the worker's log.
        code: of a remote failure, stable and machine readable, such as ``"memory"``, ``"prompt"`` or ``"model"``.
    """

    kind: Kind
    message: str
    details: str = ""
    code: str = ""


def last_lines(log: str) -> str:
    """The end of a log, as far as it helps to understand a failure."""
    return "\n".join(log.strip().splitlines()[-_DETAIL_LINES:])


def not_found(program: str, reason: str) -> WorkerFailure:
    """The program cannot be run."""
    message = _('The worker could not be started with "{program}" ({reason}); check the worker command in Setup.')
    return WorkerFailure("start", message.format(program=program, reason=reason.strip().rstrip(".")))


def bad_command(problem: str) -> WorkerFailure:
    """There is no command that could be run; ``problem`` is a sentence."""
    return WorkerFailure("start", problem)


def did_not_start(code: int, crashed: bool, log: str) -> WorkerFailure:
    """The process ended before it said hello."""
    missing = re.findall(r"No module named ['\"]?([\w.]+)", log)
    if missing:
        message = _(
            'The worker did not start: its Python has no package "{package}"; install it, or choose another Python in Setup.'
        )
        return WorkerFailure("start", message.format(package=missing[-1]), last_lines(log))
    text = _("The worker did not start ({cause}); check the worker command in Setup and its Python.")
    message = _meaning(code, crashed, log) or text.format(cause=cause_of(code, crashed))
    return WorkerFailure("start", message, last_lines(log))


def no_answer(seconds: float, log: str) -> WorkerFailure:
    """The process runs but never said hello."""
    message = _("The worker did not answer within {seconds} s; check the worker command in Setup.")
    return WorkerFailure("start", message.format(seconds=f"{seconds:g}"), last_lines(log))


def ended(code: int, crashed: bool, log: str) -> WorkerFailure:
    """The process ended although nobody had asked it to."""
    text = _("The worker ended unexpectedly ({cause}); start it again.")
    message = _meaning(code, crashed, log) or text.format(cause=cause_of(code, crashed))
    return WorkerFailure("exit", message, last_lines(log))


def unreadable(problem: str, log: str) -> WorkerFailure:
    """What the worker sends cannot be read; ``problem`` is a sentence that quotes none of it."""
    message = _(
        "The worker's output cannot be read: {problem} Look for a login script or a wrapper that prints to standard output, "
        "and install the same version on both sides."
    )
    return WorkerFailure("protocol", message.format(problem=problem), last_lines(log))


def unread(problem: str, log: str) -> WorkerFailure:
    """The worker could not read what was sent."""
    message = _(
        "The worker could not read a request: {problem} Install the same version on both sides, then start it again."
    )
    return WorkerFailure("protocol", message.format(problem=problem), last_lines(log))


def out_of_turn(kind: str, due: str, log: str) -> WorkerFailure:
    """A reply of one type came where another was due."""
    message = _("The worker sent a {kind} message where a {due} was due; install the same version on both sides.")
    return WorkerFailure("protocol", message.format(kind=kind, due=due), last_lines(log))


def silent(seconds: float, log: str) -> WorkerFailure:
    """No sign of life; the worker was ended."""
    message = _("The worker gave no sign of life for {seconds} s and was ended; start it again.")
    return WorkerFailure("lost", message.format(seconds=f"{seconds:g}"), last_lines(log))


def did_not_stop(seconds: float, log: str) -> WorkerFailure:
    """It did not stop what was cancelled; the worker was ended."""
    message = _("The worker did not stop within {seconds} s and was ended; start it again.")
    return WorkerFailure("lost", message.format(seconds=f"{seconds:g}"), last_lines(log))


def refused(reply: ErrorReply) -> WorkerFailure:
    """The worker answered with an error and goes on."""
    return WorkerFailure("remote", f"{reply.message} {reply.hint}".strip(), code=reply.code)


def too_large(size_mb: float, limit_mb: float) -> WorkerFailure:
    """An image that the worker does not take."""
    message = _(
        "The volume of {size} MB is larger than the worker takes ({limit} MB); crop it, or start the worker with a larger "
        "--max-payload."
    )
    return WorkerFailure("remote", message.format(size=f"{size_mb:.0f}", limit=f"{limit_mb:.0f}"), code="input")


def not_prepared(error: Exception) -> WorkerFailure:
    """The image could not be copied, or the request not be put into words."""
    if isinstance(error, MemoryError):
        message = _("There is not enough memory to copy the volume; close other programs or crop the volume.")
        return WorkerFailure("remote", message, code="memory")
    message = _("The request could not be sent ({reason}); change it and try again.")
    return WorkerFailure("remote", message.format(reason=str(error).rstrip(".") or type(error).__name__), code="input")


def _meaning(code: int, crashed: bool, log: str) -> str:
    return meaning_of_end(None if crashed else code, log)


def cause_of(code: int, crashed: bool) -> str:
    """Why a process ended, in a few words; ``code`` is a signal's number where it crashed on Linux or macOS."""
    if (crashed and code == 9 and os.name != "nt") or code in _OUT_OF_MEMORY_CODES:
        return _("it was killed, perhaps because the computer ran out of memory")
    if not crashed:
        return _("exit code {code}").format(code=code)
    if os.name == "nt":
        return _("it crashed, code {code}").format(code=f"0x{code & 0xFFFFFFFF:08X}")
    try:
        name = signal.Signals(code).name
    except ValueError:
        name = str(code)
    return _("signal {name}").format(name=name)
