"""Results that appear complete or not at all, whatever fails while they are written."""

from __future__ import annotations

import errno
import json
import os
import shutil
import sys
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

from progidiff.errors import OutputError

# Lists the entries of a result folder, so that a later run can tell them from what the user put beside them.
MARKER = ".progidiff-result.json"
#: How the names of everything begin that is there only while a run writes.
_OURS = ".progidiff-"

_FULL = {errno.ENOSPC, errno.EDQUOT, errno.EFBIG}
_DENIED = {errno.EACCES, errno.EPERM, errno.EROFS}


@contextmanager
def atomic_file(path: Path) -> Iterator[Path]:
    """Yield a path of the same name to write to; it becomes ``path`` when the block succeeds.

    An existing file is replaced. When the block fails, it stays as it was and nothing new is left behind.

    Raises:
        OutputError: the folder is missing or read-only, the disk is full, or the file could not be written.
    """
    path = Path(path)
    with _explained(path):
        folder = Path(tempfile.mkdtemp(prefix=_OURS, dir=path.parent))
    try:
        # Same name in a folder of its own: writers choose the format by the endings.
        staged = folder / path.name
        with _explained(path, folder):
            yield staged
            _flush(staged)
            os.replace(staged, path)
    finally:
        shutil.rmtree(folder, ignore_errors=True)


@contextmanager
def atomic_folder(out: Path, *, overwrite: bool = False) -> Iterator[Path]:
    """Yield an empty folder to fill with results; they appear in ``out`` together when the block succeeds.

    A result of an earlier run in ``out`` is replaced. When the block fails, ``out`` stays as it was. Other
    files in ``out`` are never removed.

    Args:
        out: the folder for the results; it and its parents are made where they do not exist.
        overwrite: write into a folder that holds other files; of those, only files named like a result are
            replaced.

    Raises:
        OutputError: ``out`` is a file, holds other files (unless ``overwrite``), is read-only, or the disk is
            full.
    """
    out = Path(out)
    with _explained(out):
        if out.exists() and not out.is_dir():
            raise OutputError(f"{out} is a file, not a folder; give another folder for the results.")
        existed = out.is_dir()
        foreign = _foreign_entries(out) if existed else []
        if foreign and not overwrite:
            raise OutputError(
                f"The folder {out} already holds other files (such as {foreign[0]}); "
                "give an empty or new folder, or allow overwriting."
            )
        made = _make_parents(out)
        # Inside an existing folder, because that one may be a mount point, a link or not ours to rename; else
        # beside.
        stage = Path(tempfile.mkdtemp(prefix=_OURS, dir=out if existed else out.parent))
    try:
        with _explained(out, stage):
            results = stage / "results"
            results.mkdir()
            yield results
            names = sorted(entry.name for entry in results.iterdir())
            (results / MARKER).write_text(json.dumps({"results": names}, ensure_ascii=False), encoding="utf-8")
            for file in results.rglob("*"):
                _flush(file)
            if existed:
                _swap_entries(results, out, stage / "replaced")
            else:
                os.rename(results, out)
        made = []
    finally:
        shutil.rmtree(stage, ignore_errors=True)
        for folder in reversed(made):
            with suppress(OSError):  # somebody else put a file there meanwhile
                folder.rmdir()


@contextmanager
def claimed(out: Path) -> Iterator[None]:
    """Keep other runs away from the place of a result as long as the block runs.

    The operating system locks a hidden file beside ``out`` (in it, where only that can be written to) and lets go of it when
    the process ends, however it ends. On a file system that knows no locks nobody is kept away.

    Raises:
        OutputError: another run is writing there, or its folder cannot be made.
    """
    out = Path(out).resolve()
    with _explained(out):
        made = _make_parents(out)
    beside, inside = out.parent / f"{_OURS}{out.name}.lock", out / f"{_OURS}run.lock"
    path = beside if os.access(out.parent, os.W_OK) or not out.is_dir() else inside
    descriptor = None
    try:
        descriptor = _locked(path)
        if descriptor == -1:
            raise OutputError(f"Another run is writing to {out}; let it end, or give another place for the results.")
        yield
    finally:
        if descriptor not in (None, -1):
            assert descriptor is not None
            if os.name == "nt":  # where no open file can be removed
                os.close(descriptor)
            # elsewhere it is gone before it is free: whoever opens it after that makes a new one
            with suppress(OSError):
                path.unlink()
            if os.name != "nt":
                os.close(descriptor)
        for folder in reversed(made):
            with suppress(OSError):
                folder.rmdir()


def _locked(path: Path) -> int | None:
    """Descriptor of a locked file; -1 where another process has it, ``None`` where it cannot be locked at all."""
    while True:
        try:
            descriptor = os.open(path, os.O_RDWR | os.O_CREAT, 0o600)
        except OSError:
            return None
        try:
            _lock(descriptor)
            if os.name == "nt" or os.path.samestat(os.fstat(descriptor), path.stat()):
                return descriptor
        except FileNotFoundError:
            pass  # the run that had it has just ended and taken its file along
        except OSError as error:
            os.close(descriptor)
            return -1 if error.errno in (errno.EAGAIN, errno.EACCES, errno.EDEADLK) else None
        os.close(descriptor)


def _lock(descriptor: int) -> None:
    if sys.platform == "win32":
        import msvcrt

        msvcrt.locking(descriptor, msvcrt.LK_NBLCK, 1)
    else:
        import fcntl

        fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)


def holds_files(folder: Path) -> bool:
    """Whether there is anything in a folder beside what a run keeps there while it writes."""
    return any(not entry.name.startswith(_OURS) for entry in folder.iterdir())


def _foreign_entries(out: Path) -> list[str]:
    """Entries of a folder that no earlier run of ours has written."""
    ours = {MARKER, *_earlier_results(out)}
    return sorted(e.name for e in out.iterdir() if e.name not in ours and not e.name.startswith(_OURS))


def _earlier_results(out: Path) -> list[str]:
    try:
        listed = json.loads((out / MARKER).read_text(encoding="utf-8"))["results"]
    except (OSError, ValueError, KeyError, TypeError):
        return []
    # A marker is only a file: it must not reach outside its folder.
    return [n for n in listed if isinstance(n, str) and n not in ("", ".", "..") and Path(n).name == n]


def _make_parents(out: Path) -> list[Path]:
    """Make the missing parents of ``out``; returns those made, outermost first."""
    missing = []
    folder = out.parent
    while not folder.exists():
        missing.append(folder)
        folder = folder.parent
    made: list[Path] = []
    try:
        for folder in reversed(missing):
            folder.mkdir()
            made.append(folder)
    except OSError:
        for folder in reversed(made):
            folder.rmdir()
        raise
    return made


def _swap_entries(results: Path, out: Path, aside: Path) -> None:
    """Move new results into ``out`` and earlier ones aside; on failure everything is moved back.

    All moves are renames within one file system, which need neither space nor time.
    """
    aside.mkdir()
    moved: list[tuple[Path, Path]] = []
    new = sorted(e.name for e in results.iterdir())
    try:
        for name in sorted({*_earlier_results(out), *new}):
            if os.path.lexists(out / name):
                os.rename(out / name, aside / name)
                moved.append((aside / name, out / name))
        for name in new:
            os.rename(results / name, out / name)
            moved.append((out / name, results / name))
    except OSError:
        for now, before in reversed(moved):
            os.rename(now, before)
        raise


def _flush(path: Path) -> None:
    """Make the system write a file out, so that a disk that is full says so now and not after the rename."""
    if path.is_file():
        with path.open("rb+") as stream:
            os.fsync(stream.fileno())


def _is_below(name: str, *folders: Path) -> bool:
    return any(Path(name) == folder or folder in Path(name).parents for folder in folders)


@contextmanager
def _explained(out: Path, stage: Path | None = None) -> Iterator[None]:
    """Turn the system's complaint about writing to ``out`` into one sentence; other errors pass unchanged."""
    try:
        yield
    except OSError as error:
        ours = stage is None or (bool(error.filename) and _is_below(str(error.filename), out, stage))
        unnamed = not error.filename and error.errno in (errno.EIO, errno.EROFS)
        if error.errno in _FULL:
            raise OutputError(
                f"There is not enough space for the results in {out}; free some or choose another place."
            ) from error
        if not ours and not unnamed:
            raise
        if error.errno in _DENIED:
            raise OutputError(
                f"The results cannot be written to {out} (read-only); choose a folder that you may write to."
            ) from error
        raise OutputError(
            f"The results cannot be written to {out} ({error.strerror or error}); choose another folder."
        ) from error
