"""The worker's log on standard error: events and shapes; never pixels, file names or prompts."""

from __future__ import annotations

import logging
import sys
import traceback
from pathlib import PurePath
from types import TracebackType

LOG = logging.getLogger("progidiff.worker")


def start_log(level: str) -> None:
    """Send the worker's log to standard error, if there is one."""
    handler = logging.StreamHandler() if sys.stderr is not None else logging.NullHandler()
    handler.setFormatter(logging.Formatter("%(asctime)s %(levelname)s worker: %(message)s"))
    LOG.addHandler(handler)
    LOG.setLevel(level)
    LOG.propagate = False


def where(error: BaseException) -> str:
    """Type of an exception and the places it passed through, for the log.

    Its message is left out on purpose: it may quote a path, a prompt or a value of the image.
    """
    chain = [describe(error.__traceback__)]
    names = [type(error).__name__]
    cause = error.__cause__
    while cause is not None and len(names) < 5:
        names.append(type(cause).__name__)
        chain.append(describe(cause.__traceback__))
        cause = cause.__cause__
    return "; caused by ".join(f"{name} at {places}" for name, places in zip(names, chain, strict=True))


def describe(trace: TracebackType | None) -> str:
    """``file:line function`` of every frame, innermost last, files without their folders."""
    frames = traceback.extract_tb(trace)[-12:]
    return " > ".join(f"{PurePath(f.filename).name}:{f.lineno} {f.name}" for f in frames) or "an unknown place"
