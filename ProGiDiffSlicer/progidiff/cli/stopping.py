"""How commands that take long are asked to stop: Ctrl+C, or a word on standard input from the program that started them."""

from __future__ import annotations

import os
import signal
import stat
import sys
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from types import FrameType
from typing import TextIO


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
