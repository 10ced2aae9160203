"""One conversation with a worker, without input or output: its order, how long silence is borne, and why it ended.

The worker may run on another computer, reached through an ssh that asks nobody anything.
Two drivers carry its bytes: :mod:`progidiff.wire.client` on blocking pipes, ``ProGiDiffSlicerLib.worker`` on those of Qt.
Standard library and numpy only.
"""

from __future__ import annotations

import os
import re
import signal
from collections import deque
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import PurePosixPath, PureWindowsPath
from typing import Any, Literal

from progidiff.errors import ProtocolError
from progidiff.wire.codec import frame_to_reply, to_frame
from progidiff.wire.frames import MAX_PAYLOAD, Frame, FrameDecoder, encode_frame
from progidiff.wire.messages import ErrorReply, HelloReply, Reply, Request

#: Lines of the worker's log that are kept.
MOST_LINES = 200
_DETAIL_LINES = 20
_HEADER_ROOM = 4096
_OUT_OF_MEMORY_CODES = (-9, 137)  # the signal, and how a shell and ssh report it


@dataclass(frozen=True)
class WorkerFailure:
    """Why a call, or the worker itself, failed.

    Attributes:
        kind: ``"start"`` it could not be started or did not say hello, ``"exit"`` it ended on its own, ``"protocol"`` what
            it says cannot be understood, ``"lost"`` it hung and was ended, ``"remote"`` it refused a request and goes on.
        message: one sentence for the user, with the next step.
        details: the last lines of the worker's log.
        code: of a remote failure, stable and machine readable, such as ``"memory"``, ``"prompt"`` or ``"model"``.
        exit_code: of the process, where it has ended; a signal's number is negative.
    """

    kind: Literal["start", "exit", "protocol", "lost", "remote"]
    message: str
    details: str = ""
    code: str = ""
    exit_code: int | None = None


def refused(reply: ErrorReply) -> WorkerFailure:
    """The worker answered with an error and goes on."""
    return WorkerFailure("remote", f"{reply.message} {reply.hint}".strip(), code=reply.code)


class Patience:
    """Says when nothing was heard for too long: time in which this process itself did not run does not count.

    A computer asleep, or a long computation elsewhere in an application, leaves signs of life unread; such a gap counts for
    no more than two ticks.
    """

    def __init__(self, limit_s: float, tick_s: float, now: float) -> None:
        """Begin at ``now``, to be asked every ``tick_s`` seconds."""
        self._limit_s = limit_s
        self._tick_s = tick_s
        self._waited_s = 0.0
        self._last = now

    def reset(self) -> None:
        """There was a sign of life."""
        self._waited_s = 0.0

    def ends(self, now: float) -> bool:
        """Whether it has ended by ``now``."""
        self._waited_s += min(now - self._last, 2 * self._tick_s)
        self._last = now
        return self._waited_s >= self._limit_s


class Conversation:
    """What is said to one worker, and what it answers.

    Every failure ends it; the first one counts. ``say`` translates a sentence before its numbers are filled in.

    Args:
        place: where the user chooses what is run, such as " in Setup".

    Attributes:
        hello: what the worker said of itself, once it has.
        failure: why it is over, once it is.
        log: the last lines of the worker's log.
    """

    def __init__(
        self,
        place: str = "",
        say: Callable[[str], str] = str,
        max_payload: int = MAX_PAYLOAD,
    ) -> None:
        self.hello: HelloReply | None = None
        self.failure: WorkerFailure | None = None
        self.log: deque[str] = deque(maxlen=MOST_LINES)
        self._place = place
        self._say = say
        self._last_id = 0
        self._decoder = FrameDecoder(max_payload=max_payload)
        self._frames: deque[Frame] = deque()

    @property
    def log_text(self) -> str:
        """The last lines of the worker's log."""
        return "\n".join(list(self.log))

    def send(self, request: Request) -> tuple[int, list[bytes | memoryview]]:
        """Id of a request, and the buffers to be written; its arrays must not change until they are.

        Raises:
            ProtocolError: it holds something that cannot be sent.
        """
        self._last_id += 1
        frame = to_frame(request, self._last_id)
        return self._last_id, encode_frame(frame.header, frame.arrays)

    def receive(self, data: bytes) -> None:
        """Take what the worker has written; :meth:`next_reply` says what it means."""
        self._frames.extend(self._decoder.feed(data))

    def next_reply(self) -> tuple[int, Reply] | None:
        """The next reply with the id of its request; ``None`` where none has arrived, or the conversation is over."""
        while self._frames and self.failure is None:
            try:
                request_id, reply = frame_to_reply(self._frames.popleft())
            except ProtocolError as error:
                self._fail(
                    "protocol",
                    "The worker's output cannot be read: {problem} Look for a login script or a wrapper that prints to "
                    "standard output, and install the same version on both sides.",
                    problem=error,
                )
                break
            if isinstance(reply, HelloReply) and self.hello is None:
                self.hello = reply
            if request_id is not None:
                return request_id, reply
            if isinstance(reply, ErrorReply):
                self._fail(
                    "protocol",
                    "The worker could not read a request: {problem} Install the same version on both sides, then start it "
                    "again.",
                    problem=reply.message,
                )
        return None

    def not_found(self, program: str, reason: str) -> WorkerFailure:
        """The program cannot be run."""
        text = 'The worker could not be started with "{program}" ({reason}); check the worker command{place}.'
        return self._fail("start", text, program=program, reason=reason.strip().rstrip("."))

    def no_answer(self, seconds: float) -> WorkerFailure:
        """The process runs but never said hello."""
        text = "The worker did not answer within {seconds:g} s; check the worker command{place}."
        return self._fail("start", text, seconds=seconds)

    def ended(self, code: int | None, crashed: bool = False) -> WorkerFailure:
        """The process ended; nobody had asked it to.

        Args:
            code: its exit code, negative for a signal; ``None`` where it is not known.
            crashed: Windows ended it.
        """
        kind: Literal["start", "exit"] = "exit" if self.hello else "start"
        missing = re.findall(r"No module named ['\"]?([\w.]+)", self.log_text)
        text = "The worker ended unexpectedly ({cause}); start it again."
        if self.hello is None and missing:
            text = 'The worker did not start: its Python has no package "{package}"; install it, or choose another Python'
            text += "{place}."
        elif told := meaning_of_end(code, self.log_text):
            text = told.replace("{", "{{").replace("}", "}}")
        elif self.hello is None:
            text = "The worker did not start ({cause}); check the worker command{place} and its Python."
        package = missing[-1] if missing else ""
        return self._fail(kind, text, code, cause=self._cause(code, crashed), package=package)

    def silent(self, seconds: float) -> WorkerFailure:
        """No sign of life; the worker was ended."""
        return self._fail(
            "lost", "The worker gave no sign of life for {seconds:g} s and was ended; start it again.", seconds=seconds
        )

    def did_not_stop(self, seconds: float) -> WorkerFailure:
        """It did not stop what was cancelled; the worker was ended."""
        return self._fail(
            "lost", "The worker did not stop within {seconds:g} s and was ended; start it again.", seconds=seconds
        )

    def out_of_turn(self, reply: Reply, due: type[Any]) -> WorkerFailure:
        """A reply of one type came where another was due."""
        text = "The worker sent a {came} message where a {due} was due; install the same version on both sides."
        return self._fail("protocol", text, came=type(reply).__name__, due=due.__name__)

    def too_large(self, nbytes: int) -> WorkerFailure | None:
        """A volume of so many bytes is more than the worker takes; the conversation goes on."""
        limit = nbytes + _HEADER_ROOM if self.hello is None else self.hello.max_payload
        if nbytes + _HEADER_ROOM <= limit:
            return None
        text = self._say(
            "The volume of {size:.0f} MB is larger than the worker takes ({limit:.0f} MB); crop it, or start the worker "
            "with a larger --max-payload."
        )
        return WorkerFailure("remote", text.format(size=nbytes / 2**20, limit=limit / 2**20), code="input")

    def _fail(
        self, kind: Literal["start", "exit", "protocol", "lost"], text: str, exit_code: int | None = None, **values: Any
    ) -> WorkerFailure:
        if self.failure is None:
            details = "\n".join(self.log_text.strip().splitlines()[-_DETAIL_LINES:])
            message = self._say(text).format(place=self._place, **values)
            self.failure = WorkerFailure(kind, message, details, exit_code=exit_code)
        return self.failure

    def _cause(self, code: int | None, crashed: bool) -> str:
        """Why a process ended, in a few words."""
        if code is None:
            return self._say("it closed its pipes")
        if code in _OUT_OF_MEMORY_CODES and os.name != "nt":
            return self._say("it was killed, perhaps because the computer ran out of memory")
        if crashed and os.name == "nt":
            return self._say("it crashed, code {code}").format(code=f"0x{code & 0xFFFFFFFF:08X}")
        if code >= 0:
            return self._say("exit code {code}").format(code=code)
        try:
            name = signal.Signals(-code).name
        except ValueError:
            name = str(-code)
        return self._say("signal {name}").format(name=name)


# A worker on another computer -------------------------------------------------------------------------------------------

_SSH_FAILED = 255  # ssh's own failures; any other code is that of the command over there
_NOT_FOUND = (126, 127)  # how a shell says that there is no such program

# In OpenSSH's words, which no language setting changes; the first that is found counts.
_TROUBLES = (
    (
        r"REMOTE HOST IDENTIFICATION HAS CHANGED",
        "The other computer shows another host key than the one that is known of it: it was installed anew, or somebody is "
        "in between; ask who runs it, then remove the old key with ssh-keygen -R and connect once in a terminal.",
    ),
    (
        r"Host key verification failed|host key is known for",
        "The host key of the other computer is not known here; connect to it once in a terminal and accept its key.",
    ),
    (
        r"Permission denied \(|Too many authentication failures",
        "The other computer lets nobody in without a password; set up a key for ssh until ssh -o BatchMode=yes enters it.",
    ),
    (
        r"Could not resolve hostname",
        "There is no computer of the name in the worker command; correct it, or connect to the network that knows it.",
    ),
    (
        r"ssh: connect to host",
        "The other computer cannot be reached; see that it is switched on and takes ssh, and that the network is there.",
    ),
    (
        r"[Cc]onnection (to .* )?(closed|reset|timed out)|Broken pipe|Timeout, server|Read from remote host",
        "The connection to the other computer was lost; see that the network is there, then try again.",
    ),
)


def unattended(command: Sequence[str]) -> list[str]:
    """A worker's command in which ssh fails where it would ask for a password or a host key.

    Nobody would see the question: the worker has no terminal, or one in which nobody looks. A command that says
    something of ``BatchMode`` itself, or that is not ssh, is left as it is.
    """
    words = list(command)
    name = PureWindowsPath(PurePosixPath(words[0]).name).name.lower().removesuffix(".exe")
    if name != "ssh" or any("batchmode" in word.lower() for word in words):
        return words
    return [words[0], "-o", "BatchMode=yes", *words[1:]]


def meaning_of_end(exit_code: int | None, log: str) -> str:
    """What the end of a worker's process means, with the next step; "" where neither code nor log tell.

    Args:
        exit_code: of the process, ``None`` where it is not known.
        log: what it wrote on standard error.
    """
    if exit_code in _NOT_FOUND:
        return (
            "The program that the worker command names was not found where it was looked for; give its whole path, such as "
            "/opt/progidiff/bin/python."
        )
    if exit_code != _SSH_FAILED:
        return ""
    return next((sentence for words, sentence in _TROUBLES if re.search(words, log)), "")
