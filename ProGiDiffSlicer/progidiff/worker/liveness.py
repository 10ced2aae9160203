"""Signs of life to the client, and watching that the client's side lives."""

from __future__ import annotations

import os
import sys
import threading
import time
from collections.abc import Callable

_PARENT_POLL_S = 0.5


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
