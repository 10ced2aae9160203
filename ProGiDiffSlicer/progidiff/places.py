"""Files and folders: where models and bundled data lie, and results that appear complete or not at all.

Standard library only; the module inside Slicer asks here too. What is bundled ships twice: in a checkout it is the folder
``Resources`` of the repository, in a wheel and in the Slicer package it is ``_resources`` of this package.
"""

from __future__ import annotations

import errno
import hashlib
import json
import os
import shutil
import sys
import tempfile
import uuid
from collections.abc import Iterator, Mapping
from contextlib import contextmanager, suppress
from pathlib import Path

from progidiff.errors import InputError, ModelError, OutputError

ENVIRONMENT_VARIABLE = "PROGIDIFF_MODEL"
INDEX_NAME = "model_index.json"
CARD_NAME = "model_card.json"
ADAPTER_CARD_NAME = "adapter_card.json"
ADAPTER_WEIGHTS_NAME = "adapter.safetensors"
# Lists the entries of a result folder, so that a later run can tell them from what the user put beside them.
MARKER = ".progidiff-result.json"
#: How the names of everything begin that is there only while a run writes.
_OURS = ".progidiff-"

# What the system says of a full disk, and of a place where one may not write.
FULL = {errno.ENOSPC, errno.EDQUOT, errno.EFBIG}
DENIED = {errno.EACCES, errno.EPERM, errno.EROFS}
_PACKAGE = Path(__file__).resolve().parent


def default_model_folder() -> Path:
    """Folder of the model to use when the user names none.

    ``$PROGIDIFF_MODEL`` where it is set (whether it exists or not, so that a mistake in it is noticed); otherwise the first
    of these that holds a model: the repository's ``Resources/Models/default``, an installed package's own copy, the module's
    folder and the share folder of a Slicer installation.

    Raises:
        ModelError: there is none.
    """
    if named := os.environ.get(ENVIRONMENT_VARIABLE):
        return Path(named).expanduser()
    for candidate in _default_candidates(_PACKAGE):
        if (candidate / INDEX_NAME).is_file():
            return candidate
    raise ModelError(
        "The bundled model is not installed; reinstall ProGiDiffSlicer, choose a model folder, or set "
        f"{ENVIRONMENT_VARIABLE} to one."
    )


def _default_candidates(package: Path) -> list[Path]:
    """Where the bundled model can be, best first, given the folder of the ``progidiff`` package."""
    # ProGiDiffSlicer/ of the repository, site-packages, or Slicer's qt-scripted-modules
    beside = package.parent
    tail = Path("Models", "default")
    folders = [folder / tail for folder in (*resource_folders(package), beside / "Resources")]
    # <Slicer>/lib/Slicer-X.Y/qt-scripted-modules/progidiff  ->  <Slicer>/share/Slicer-X.Y/...
    if beside.name == "qt-scripted-modules" and len(beside.parents) > 2:
        share = beside.parents[2] / "share" / beside.parent.name
        folders += [share / kind / "ProGiDiffSlicer" / tail for kind in ("qt-scripted-modules", "qt-loadable-modules", ".")]
    return folders


def model_size(folder: Path) -> int:
    """Bytes of all files in a model folder.

    Raises:
        ModelError: there is no such folder.
    """
    if not folder.is_dir():
        raise ModelError(f'There is no model folder "{folder}"; choose an existing one.')
    return sum(path.stat().st_size for path in folder.rglob("*") if path.is_file())


def weights_hash(sha256: Mapping[str, str]) -> str:
    """One SHA-256 over the checksums of a model's weight files, as its card lists them; adapters name their base by it."""
    return hashlib.sha256(json.dumps(sorted(sha256.items())).encode()).hexdigest()


def resource_folders(package: Path = _PACKAGE) -> tuple[Path, Path]:
    """Where bundled files may lie, given the package's folder: in a checkout, in an installation."""
    return package.parents[1] / "Resources", package / "_resources"


def sample_volume(package: Path = _PACKAGE) -> Path:
    """The bundled sample volume (``SampleData/*.nii.gz``; the first by name where there are several).

    Raises:
        InputError: this installation has none.
    """
    for folder in resource_folders(package):
        for sample in sorted((folder / "SampleData").glob("*.nii.gz")):
            return sample
    raise InputError("This installation has no sample volume; name an image of your own.")


@contextmanager
def replaced_file(path: Path) -> Iterator[Path]:
    """Yield a path of the same name to write to; it becomes ``path`` when the block succeeds, with the system's own errors.

    An existing file is replaced. When the block fails, it stays as it was and nothing new is left behind.
    """
    # Same name in a folder of its own: writers choose the format by the endings.
    folder = Path(tempfile.mkdtemp(prefix=_OURS, dir=path.parent))
    try:
        staged = folder / path.name
        yield staged
        flush(staged)
        os.replace(staged, path)
    finally:
        shutil.rmtree(folder, ignore_errors=True)


@contextmanager
def atomic_file(path: Path) -> Iterator[Path]:
    """A :func:`replaced_file` for results.

    Raises:
        OutputError: the folder is missing or read-only, the disk is full, or the file could not be written.
    """
    path = Path(path)
    with _explained(path, ours_only=True), replaced_file(path) as staged:
        yield staged


@contextmanager
def replaced_folder(folder: Path, what: str, errors: tuple[type[Exception], ...] = (OSError,)) -> Iterator[Path]:
    """A sibling folder to write into that takes ``folder``'s place at the end, or vanishes on an error.

    Args:
        folder: a new or empty folder, or one whose content may be replaced; the caller has made sure of that.
        what: what is written, for the message, e.g. ``"model"``.
        errors: what is raised where it cannot be written; safetensors has an error of its own.

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
    except errors as error:
        reason = getattr(error, "strerror", None) or error
        raise OutputError(
            f'The {what} cannot be written to "{folder}" ({reason}); check its disk and permissions.'
        ) from error
    finally:
        if old.exists() and not folder.exists():
            old.rename(folder)
        shutil.rmtree(fresh, ignore_errors=True)
        shutil.rmtree(old, ignore_errors=True)


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
        with _explained(out, ours_only=True):
            results = stage / "results"
            results.mkdir()
            yield results
            names = sorted(entry.name for entry in results.iterdir())
            (results / MARKER).write_text(json.dumps({"results": names}, ensure_ascii=False), encoding="utf-8")
            for file in results.rglob("*"):
                flush(file)
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


def flush(path: Path) -> None:
    """Make the system write a file out, so that a disk that is full says so now and not after the rename."""
    if path.is_file():
        with path.open("rb+") as stream:
            os.fsync(stream.fileno())


def _is_ours(name: str, out: Path) -> bool:
    """Whether a file is ``out``, below it, or in the folder beside it that it is written to first."""
    beside = Path(name).parts[len(out.parent.parts) :]
    return Path(name).is_relative_to(out.parent) and bool(beside) and (beside[0] == out.name or beside[0].startswith(_OURS))


@contextmanager
def _explained(out: Path, *, ours_only: bool = False) -> Iterator[None]:
    """Turn the system's complaint about writing to ``out`` into one sentence; other errors pass unchanged.

    With ``ours_only`` that is a complaint about a file of ours, since the block may read others.
    """
    try:
        yield
    except OSError as error:
        ours = not ours_only or (bool(error.filename) and _is_ours(str(error.filename), out))
        unnamed = not error.filename and error.errno in (errno.EIO, errno.EROFS)
        if error.errno in FULL:
            raise OutputError(
                f"There is not enough space for the results in {out}; free some or choose another place."
            ) from error
        if not ours and not unnamed:
            raise
        if error.errno in DENIED:
            raise OutputError(
                f"The results cannot be written to {out} (read-only); choose a folder that you may write to."
            ) from error
        raise OutputError(
            f"The results cannot be written to {out} ({error.strerror or error}); choose another folder."
        ) from error
