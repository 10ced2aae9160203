"""What to run as the worker: Slicer's own Python, another one, or a command such as ssh."""

from __future__ import annotations

import os
import shlex
import shutil
import sys
from dataclasses import dataclass, field
from pathlib import Path

from slicer.i18n import tr as _

import progidiff
from progidiff.errors import InputError

# -P keeps files of the current folder from being imported in place of the engine.
_WORKER = ("-P", "-m", "progidiff", "worker")


@dataclass(frozen=True)
class WorkerCommand:
    """A program, its arguments, and the whole environment that it gets."""

    program: str
    arguments: tuple[str, ...] = ()
    environment: dict[str, str] = field(default_factory=dict)


def local_command(python: str | None = None) -> WorkerCommand:
    """The worker on this machine.

    Args:
        python: an interpreter of another environment; ``None`` is Slicer's own.

    Raises:
        InputError: no such interpreter.
    """
    if python is None:
        # Slicer's Python needs the libraries of Slicer, so it gets the environment as it is now.
        return WorkerCommand(own_python(), _WORKER, worker_environment(dict(os.environ)))
    program = os.path.expanduser(python.strip())
    if not program:
        raise InputError(_("No Python is chosen for the worker; choose one in Setup."))
    if not shutil.which(program):
        raise InputError(_('There is no Python at "{path}"; choose another one in Setup.').format(path=program))
    return WorkerCommand(program, _WORKER, worker_environment(startup_environment()))


def parse_command(text: str, windows: bool | None = None) -> WorkerCommand:
    """The command that a person typed, e.g. ``ssh gpu-host python -m progidiff worker``; no shell ever sees it.

    Args:
        text: program and arguments; parts that hold spaces stand in quotes.
        windows: whether backslashes separate folders and apostrophes are letters; by default as on this machine.

    Raises:
        InputError: not a command.
    """
    if any(ord(letter) < 32 and letter != "\t" for letter in text):
        raise InputError(_("The worker command must be a single line; remove the line break from it."))
    lexer = shlex.shlex(text, posix=True, punctuation_chars=False)
    lexer.whitespace_split = True
    lexer.commenters = ""
    if os.name == "nt" if windows is None else windows:
        lexer.escape = ""
        lexer.quotes = '"'
    try:
        words = list(lexer)
    except ValueError:
        raise InputError(_("A quotation mark in the worker command is not closed; close it.")) from None
    if not words or not words[0]:
        raise InputError(_("The worker command is empty; type one, or choose this computer's Python in Setup."))
    if words[0].startswith("-"):
        raise InputError(_("The worker command must begin with a program, for example ssh or python; add it."))
    program = os.path.expanduser(words[0])
    return WorkerCommand(program, tuple(words[1:]), worker_environment(startup_environment()))


def own_python() -> str:
    """Slicer's interpreter; outside of Slicer the running one.

    Raises:
        InputError: it cannot be found.
    """
    # Within Slicer sys.executable may be the application itself on some systems; PythonSlicer is on its PATH.
    program = shutil.which("PythonSlicer") or sys.executable
    if not program:
        raise InputError(_("Slicer's Python was not found; choose a Python for the worker in Setup."))
    return program


def startup_environment() -> dict[str, str]:
    """The environment in which Slicer was started: without its library paths, which break other programs."""
    try:
        from slicer.util import startupEnvironment

        return {str(name): str(value) for name, value in startupEnvironment().items()}
    except (ImportError, AttributeError):  # not inside the application
        return dict(os.environ)


def worker_environment(base: dict[str, str]) -> dict[str, str]:
    """``base`` with what a worker needs: the very engine that lies beside this module, and UTF-8 without buffers."""
    home = str(Path(progidiff.__file__).resolve().parents[1])
    paths = [home, *(path for path in base.get("PYTHONPATH", "").split(os.pathsep) if path and path != home)]
    return {**base, "PYTHONPATH": os.pathsep.join(paths), "PYTHONIOENCODING": "utf-8", "PYTHONUNBUFFERED": "1"}
