"""Folders of a model or an adapter that appear as a whole, in the place of an earlier one."""

from __future__ import annotations

import shutil
import uuid
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from safetensors import SafetensorError

from progidiff.errors import OutputError


@contextmanager
def replacing(folder: Path, what: str) -> Iterator[Path]:
    """A sibling folder to write into that takes ``folder``'s place at the end, or vanishes on an error.

    Args:
        folder: a new or empty folder, or one whose content may be replaced; the caller has made sure of that.
        what: what is written, for the message, e.g. ``"model"``.

    Raises:
        OutputError: it cannot be written.
    """
    fresh, old = (folder.with_name(f".{folder.name}-{uuid.uuid4().hex}.{kind}") for kind in ("part", "old"))
    try:
        fresh.mkdir(parents=True)
        yield fresh
        if folder.exists():
            folder.rename(old)
        fresh.rename(folder)
    except (OSError, SafetensorError) as error:
        reason = getattr(error, "strerror", None) or error
        raise OutputError(
            f'The {what} cannot be written to "{folder}" ({reason}); check its disk and permissions.'
        ) from error
    finally:
        if old.exists() and not folder.exists():
            old.rename(folder)
        shutil.rmtree(fresh, ignore_errors=True)
        shutil.rmtree(old, ignore_errors=True)
