"""Steps on a shared folder that are whole or not there: nothing is overwritten, and what is told as done is on the disk.

Neither locks nor links are needed, which network file systems often lack. Names are random, so that nobody meets anybody.
"""

from __future__ import annotations

import errno
import hashlib
import json
import os
import time
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from progidiff.errors import OutputError
from progidiff.places import DENIED, FULL

_TRIES, _PAUSE_S = 20, 0.05


@contextmanager
def explained(folder: Path) -> Iterator[None]:
    """Turn the system's complaint into one sentence.

    Raises:
        OutputError: the folder is full, read-only or gone.
    """
    try:
        yield
    except OSError as error:
        if error.errno in FULL:
            reason = "there is not enough space; free some"
        elif error.errno in DENIED:
            reason = "you may not write there; ask for the permission or choose another folder"
        else:
            reason = f"{error.strerror or error}; check that it can be reached"
        raise OutputError(f'The set of training examples in "{folder}" cannot be changed: {reason}.') from error


def write_json(path: Path, content: Mapping[str, Any]) -> None:
    """Write a new file and have the system write it out."""
    with path.open("x", encoding="utf-8") as stream:
        json.dump(content, stream, indent=1, ensure_ascii=False, sort_keys=True)
        stream.write("\n")
        stream.flush()
        os.fsync(stream.fileno())


def sync_folder(path: Path) -> None:
    """Have the system write a folder's entries out, where it can be told to (Windows does so itself)."""
    try:
        descriptor = os.open(path, os.O_RDONLY)
    except OSError:
        return
    try:
        os.fsync(descriptor)
    except OSError:  # some network file systems cannot
        return
    finally:
        os.close(descriptor)


def move(source: Path, place: Path) -> None:
    """Move a file to a name that nobody has.

    Raises:
        FileExistsError: somebody has it.
    """
    if place.exists():
        raise FileExistsError(errno.EEXIST, "there is such a file already", str(place))
    _patiently(source, place)


def replace(source: Path, place: Path) -> None:
    """Put a file in another one's place; waits a little while somebody reads that one, as Windows demands."""
    _patiently(source, place)


def _patiently(source: Path, place: Path) -> None:
    for attempt in range(_TRIES):
        try:
            os.replace(source, place)
        except PermissionError:
            if attempt == _TRIES - 1:
                raise
            time.sleep(_PAUSE_S)
        else:
            return


def digest(path: Path) -> str:
    """SHA-256 of a file, hex."""
    with path.open("rb") as stream:
        return hashlib.file_digest(stream, "sha256").hexdigest()
