"""The process in which sets of training examples are read and written.

Compressing a volume takes seconds, and a folder on a network may not answer at all: neither may happen in the window's own
process. The voxels travel through a pipe and are written nowhere but into the set.
"""

from __future__ import annotations

import json
import os
from collections import deque
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import qt
from slicer.i18n import tr as _

from progidiff.errors import InputError, ProtocolError
from progidiff.wire.frames import encode_frame
from ProGiDiffSlicerLib.worker.command import WorkerCommand, own_python, worker_environment
from ProGiDiffSlicerLib.worker.process import Process, ProcessFactory, QtProcess

_ARGUMENTS = ("-P", "-m", "ProGiDiffSlicerLib.learning.curating_child")
# What waits in the pipe at most, and is handed to it at once.
_PENDING = 1 << 20
_PORTION = 256 << 10
_READ = 1 << 16
# A case that is being written when the module is closed is finished within this time, or not at all.
_LAST_WAIT_MS = 10_000
# A process that has nothing to do waits this long for more: starting one takes longer than most of what is asked.
LINGER_MS = 30_000

Reply = dict[str, Any]


@dataclass(eq=False)
class Request:
    """Something that was asked for.

    Attributes:
        header: what is asked, JSON.
        arrays: voxels; they must not change until the request has ended.
        done: called with the reply.
        failed: called with a sentence.
        begun: whether it was given to a process.
        ended: whether one of these was called, or the request was dropped.
    """

    header: Mapping[str, Any]
    arrays: Mapping[str, np.ndarray[Any, Any]]
    done: Callable[[Reply], None]
    failed: Callable[[str], None]
    begun: bool = False
    ended: bool = False
    outgoing: deque[memoryview] = field(default_factory=deque)


def keeper_command() -> WorkerCommand:
    """Slicer's own Python, with this library on its path.

    Raises:
        InputError: it cannot be found.
    """
    return WorkerCommand(own_python(), _ARGUMENTS, worker_environment(dict(os.environ)))


class Keeper:
    """Does one request after the other in a process, which ends when nothing is asked for a while.

    Args:
        parent: Qt parent of the processes and of a timer.
        process_factory, command: how they are made.
    """

    def __init__(
        self,
        parent: Any,
        process_factory: ProcessFactory = QtProcess,
        command: Callable[[], WorkerCommand] = keeper_command,
    ) -> None:
        self._parent = parent
        self._factory = process_factory
        self._command = command
        self._requests: deque[Request] = deque()
        self._process: Process | None = None
        self._leaving: list[Process] = []
        self._said = b""
        self._log: deque[str] = deque(maxlen=40)
        self._linger = qt.QTimer(parent)
        self._linger.setSingleShot(True)
        self._linger.setInterval(LINGER_MS)
        self._linger.connect("timeout()", self._retire)

    @property
    def log_text(self) -> str:
        """The last lines that a process wrote to its log."""
        return "\n".join(self._log)

    def ask(
        self,
        header: Mapping[str, Any],
        done: Callable[[Reply], None],
        failed: Callable[[str], None],
        arrays: Mapping[str, np.ndarray[Any, Any]] | None = None,
    ) -> Request:
        """Queue a request; ``failed`` may be called before this returns."""
        request = Request(header, arrays or {}, done, failed)
        self._requests.append(request)
        self._begin()
        return request

    def drop(self, request: Request) -> None:
        """Forget a request and call nobody back; one that is under way is ended with its process."""
        if request.ended:
            return
        request.ended = True
        running = bool(self._requests) and self._requests[0] is request
        self._requests.remove(request)
        if running:
            self._abandon()
            self._begin()

    def close(self) -> None:
        """End everything; what is under way gets a moment to finish."""
        process, running = self._process, self._requests[0] if self._requests else None
        self._requests.clear()
        self._linger.stop()
        self._linger.disconnect("timeout()", self._retire)
        if process is not None:
            # Voxels that have not all left this process are of no use to the other one.
            if running is not None and not running.outgoing:
                process.close_input()
                process.wait(_LAST_WAIT_MS)
            self._abandon()
        for leaving in list(self._leaving):
            leaving.wait(_LAST_WAIT_MS)

    def _begin(self) -> None:
        """Send the first request that waits; without one the process may end soon."""
        if not self._requests:
            if self._process is not None:
                self._linger.start()
            return
        self._linger.stop()
        request = self._requests[0]
        if request.begun:
            return
        request.begun = True
        try:
            request.outgoing = deque(memoryview(part).cast("B") for part in encode_frame(request.header, request.arrays))
            if self._process is None:
                self._launch()
        except (InputError, ProtocolError, MemoryError) as error:
            self._end(request.failed, str(error) or _("There is not enough memory to save this; close other volumes."))
            return
        self._write()

    def _launch(self) -> None:
        command = self._command()
        self._said = b""
        process = self._factory(self._parent)
        self._process = process
        # Each listener knows its process, so that one that was left cannot speak for the next one.
        process.readable.connect(lambda: self._on_readable(process))
        process.written.connect(lambda: self._on_written(process))
        process.log_line.connect(self._log.append)
        process.failed_to_start.connect(lambda reason: self._on_gone(process))
        process.finished.connect(lambda code, crashed: self._on_gone(process))
        process.start(command)

    def _write(self) -> None:
        process = self._process
        if process is None or not self._requests:
            return
        outgoing = self._requests[0].outgoing
        while outgoing and process.pending < _PENDING:
            part = outgoing.popleft()
            process.write(bytes(part[:_PORTION]))
            if len(part) > _PORTION:
                outgoing.appendleft(part[_PORTION:])

    def _on_written(self, process: Process) -> None:
        if process is self._process:
            self._write()

    def _on_readable(self, process: Process) -> None:
        if process is not self._process:
            return
        while data := process.read(_READ):
            self._said += data
        while b"\n" in self._said and process is self._process and self._requests:
            line, self._said = self._said.split(b"\n", 1)
            self._on_line(line)

    def _on_line(self, line: bytes) -> None:
        request = self._requests[0]
        try:
            reply = json.loads(line)
            failed = reply.get("error")
        except (ValueError, AttributeError):
            return  # somebody else's output
        if failed is None:
            self._end(request.done, reply)
        else:
            self._end(request.failed, str(failed))

    def _on_gone(self, process: Process) -> None:
        if process in self._leaving:
            self._leaving.remove(process)
            process.release()
            return
        if process is not self._process:
            return
        self._on_readable(process)
        if process is not self._process:
            self._on_gone(process)
            return
        self._process = None
        process.release()
        if self._requests:
            text = _("The process that keeps the training examples ended unexpectedly; nothing was changed, try again.")
            self._end(self._requests[0].failed, text)

    def _end(self, callback: Callable[[Any], None], value: Any) -> None:
        request = self._requests.popleft()
        request.ended = True
        request.outgoing.clear()
        request.arrays = {}
        try:
            callback(value)
        finally:
            self._begin()

    def _retire(self) -> None:
        if self._process is not None and not self._requests:
            self._process.close_input()
            self._leave()

    def _leave(self) -> None:
        if self._process is not None:
            self._leaving.append(self._process)
            self._process = None

    def _abandon(self) -> None:
        process = self._process
        self._leave()
        if process is not None:
            process.kill_tree()
