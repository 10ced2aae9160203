"""What the commands share: options, the wish to stop, and how they end.

Exit codes that scripts can rely on. 0: done; 1: something is missing or damaged, as the command's help says; 2: the input,
the request or the place for results cannot be used; 130: cancelled.
"""

from __future__ import annotations

import os
import shlex
import signal
import stat
import sys
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from enum import StrEnum
from pathlib import Path
from types import FrameType
from typing import Annotated, TextIO

import typer

from progidiff.errors import InputError

EXIT_PROBLEM = 1
EXIT_BAD_INPUT = 2
EXIT_CANCELLED = 130


class DeviceName(StrEnum):
    """Where the networks run."""

    AUTO = "auto"
    CPU = "cpu"
    CUDA = "cuda"


class ModalityName(StrEnum):
    """Kinds of images."""

    CT = "CT"
    MR = "MR"


class PlaneName(StrEnum):
    """Planes to cut slices in."""

    AXIAL = "axial"
    CORONAL = "coronal"
    SAGITTAL = "sagittal"


PlaneOption = Annotated[
    PlaneName | None,
    typer.Option(help="Plane to cut volumes in (default: one of the model's, unless clearly acquired in another)."),
]
CorrectOption = Annotated[
    bool,
    typer.Option("--correct-values", help="Take values of a CT that cannot be Hounsfield units for what they look like."),
]

ModelOption = Annotated[Path | None, typer.Option(metavar="DIR", help="Model folder; the bundled one by default.")]
AdapterOption = Annotated[Path | None, typer.Option(metavar="DIR", help="Adapter to use on the model.")]
EvenIfWorseOption = Annotated[
    bool, typer.Option("--even-if-worse", help="Use an adapter that was not better than its base.")
]
ProposalStepsOption = Annotated[int, typer.Option(min=1, max=100, help="Denoising steps.")]
OverwriteOption = Annotated[bool, typer.Option("--overwrite", help="Write into a folder that holds other files.")]
JsonOption = Annotated[bool, typer.Option("--json", help="Print one JSON object.")]


def split_command(command: str | None) -> list[str] | None:
    """A worker's command line as a list of arguments; ``None`` for this machine's own worker.

    Raises:
        InputError: quotes that are not closed, or an empty command.
    """
    if command is None:
        return None
    try:
        # on Windows the backslash separates folders and cannot protect characters
        parts = shlex.split(command, posix=os.name != "nt")
    except ValueError as error:
        raise InputError(f"The worker command cannot be read ({error}); check its quotes.") from None
    if not parts:
        raise InputError("The worker command is empty; leave it out to use this machine.")
    return [part.strip('"') for part in parts] if os.name == "nt" else parts


def one_line(text: str) -> str:
    """The sentence on one line, without control characters (a file name may hold them).

    Of lines that follow the sentence, such as the end of a worker's log, the last one is kept: it names the
    cause.
    """
    lines = [cleaned for line in text.splitlines() if (cleaned := _printable(line))]
    return f"{lines[0]} [{lines[-1]}]" if len(lines) > 1 else "".join(lines)


def _printable(text: str) -> str:
    return " ".join("".join(c if c.isprintable() else " " for c in text).split())


class StopWord:
    """Listens on a pipe for the line "stop", or for its end: whoever started this has gone then.

    Anything but a pipe is not listened to: an empty standard input, as batch systems give, is no wish to stop.

    Attributes:
        heard: whether one of them came.
    """

    def __init__(self, stream: TextIO | None) -> None:
        self.heard = False
        if stream is not None and _is_pipe(stream):
            threading.Thread(target=self._listen, args=(stream.readline,), name="stop word", daemon=True).start()

    def _listen(self, readline: Callable[[], str]) -> None:
        while (line := readline()) and line.strip() != "stop":
            pass
        self.heard = True


def _is_pipe(stream: TextIO) -> bool:
    try:
        mode = os.fstat(stream.fileno()).st_mode
    except (OSError, ValueError):
        return False
    return stat.S_ISFIFO(mode) or stat.S_ISSOCK(mode)


@contextmanager
def interruptible(sentence: str, tell: Callable[[str], None] | None = None) -> Iterator[Callable[[], bool]]:
    """Turn the first Ctrl+C (or a request to terminate) into a wish to stop, and say ``sentence``; a second one interrupts.

    ``tell`` says it; by default it is printed on standard error.

    Yields a function that tells whether stopping was asked for. Outside the main thread, where signals cannot be handled,
    it never turns true.
    """
    asked = threading.Event()

    def ask(number: int, frame: FrameType | None) -> None:
        if asked.is_set():
            raise KeyboardInterrupt
        asked.set()
        if tell is None:
            print(sentence, file=sys.stderr, flush=True)
        else:
            tell(sentence)

    if threading.current_thread() is not threading.main_thread():
        yield asked.is_set
        return
    before = {number: signal.signal(number, ask) for number in (signal.SIGINT, signal.SIGTERM)}
    try:
        yield asked.is_set
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)
