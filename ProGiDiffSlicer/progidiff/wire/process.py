"""The worker as an operating system process: started out of sight, ended with all that it started."""

from __future__ import annotations

import contextlib
import io
import os
import signal
import subprocess
import sys
import threading
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import cast

from progidiff.system import kill_tree
from progidiff.wire.conversation import Conversation, unattended

_LONGEST_LINE = 2000
_TERM_WAIT_S = 1.0
_KILL_WAIT_S = 5.0

if sys.platform == "win32":
    _WINDOWS_FLAGS = subprocess.CREATE_NO_WINDOW | subprocess.CREATE_NEW_PROCESS_GROUP
else:
    _WINDOWS_FLAGS = 0


def default_command() -> list[str]:
    """The worker on this machine's Python; ``-P`` keeps files of the current folder from being imported."""
    return [sys.executable, "-P", "-m", "progidiff", "worker"]


def _environment(extra: Mapping[str, str] | None) -> dict[str, str]:
    env = {**os.environ, **(extra or {})}
    # A worker on this machine runs the very code of its client, installed or not.
    home = str(Path(__file__).resolve().parents[2])
    env["PYTHONPATH"] = os.pathsep.join(filter(None, [home, env.get("PYTHONPATH", "")]))
    return env


class WorkerProcess:
    """A child process with three pipes; its log is collected in the background."""

    def __init__(
        self,
        command: Sequence[str],
        conversation: Conversation,
        env: Mapping[str, str] | None = None,
        on_log: Callable[[str], None] | None = None,
    ) -> None:
        """Start the process.

        Raises:
            OSError: there is no such program, or it may not be run.
        """
        self._on_log = on_log
        self._log = conversation.log
        try:
            self._process = subprocess.Popen(
                unattended(command),
                stdin=subprocess.PIPE,
                stdout=subprocess.PIPE,
                stderr=subprocess.PIPE,
                bufsize=0,
                env=_environment(env),
                # A group of its own: Ctrl-C in a terminal is the client's affair, and the group can be ended.
                start_new_session=True,
                creationflags=_WINDOWS_FLAGS,
            )
        except ValueError as error:  # a zero byte in the command
            raise OSError(str(error)) from error
        self._logger = threading.Thread(target=self._collect_log, name="worker-log", daemon=True)
        self._logger.start()

    def read_log_to_its_end(self, wait_s: float) -> None:
        """Wait for the end of the log, ``wait_s`` seconds at most."""
        self._logger.join(wait_s)

    def read(self) -> bytes:
        """What has arrived on standard output; nothing at its end."""
        stdout = self._process.stdout
        return b"" if stdout is None else stdout.read(1 << 18) or b""

    def write(self, buffer: bytes | memoryview) -> None:
        """Write everything.

        Raises:
            OSError: the worker does not read any more.
        """
        stdin = self._process.stdin
        view = memoryview(buffer)
        while stdin is not None and len(view):
            view = view[stdin.write(view[: 1 << 18]) or 0 :]

    def close_input(self) -> None:
        """Close the worker's standard input, which tells it to end."""
        if self._process.stdin is not None:
            with contextlib.suppress(OSError):
                self._process.stdin.close()

    def close_pipes(self) -> None:
        """Release the pipes; only when no other thread uses them any more."""
        for pipe in (self._process.stdin, self._process.stdout):
            if pipe is not None:
                with contextlib.suppress(OSError):
                    pipe.close()

    def wait(self, timeout: float) -> int | None:
        """Exit code, or ``None`` if it still runs after ``timeout`` seconds."""
        try:
            return self._process.wait(timeout)
        except subprocess.TimeoutExpired:
            return None

    def kill(self) -> None:
        """End the process and all that it started, politely first. Returns after a few seconds at most."""
        if sys.platform == "win32":
            # Only while the parent lives can its children be found.
            if self._process.poll() is None:
                kill_tree(self._process.pid)
                self._process.kill()
        elif self._process.poll() is None:
            self._signal_group(signal.SIGTERM)
            self.wait(_TERM_WAIT_S)
            self._signal_group(signal.SIGKILL)
        self.wait(_KILL_WAIT_S)

    def _signal_group(self, number: int) -> None:
        if sys.platform != "win32":
            with contextlib.suppress(ProcessLookupError, PermissionError):
                os.killpg(self._process.pid, number)

    def _collect_log(self) -> None:
        stderr = self._process.stderr
        if stderr is None:
            return
        with io.BufferedReader(cast(io.RawIOBase, stderr)) as lines:
            while line := lines.readline(_LONGEST_LINE):
                text = line.decode("utf-8", "replace").rstrip()
                self._log.append(text)
                self._tell(text)

    def _tell(self, line: str) -> None:
        if self._on_log is not None:
            try:
                self._on_log(line)
            except Exception as error:  # the log must be drained in any case, or the worker would block
                self._on_log = None
                self._log.append(f"(the log is not shown any more: {type(error).__name__})")
