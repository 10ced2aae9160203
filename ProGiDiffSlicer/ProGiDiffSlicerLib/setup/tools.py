"""What an installation does to Slicer: ask a person, run pip, call the PyTorch extension, restart."""

from __future__ import annotations

import contextlib
import importlib.util
import io
import logging
import sys
from collections.abc import Callable, Iterator
from subprocess import CalledProcessError
from typing import Any, TextIO

import slicer

TORCH_EXTENSION = "PyTorch"

OnLine = Callable[[str], None]
OnEnd = Callable[[int], None]


class Tools:
    """What changes packages in the running Slicer: 5.12 and later by ``slicer.packaging``, 5.10 by ``slicer.util``."""

    def __init__(self) -> None:
        try:
            import slicer.packaging as packaging
        except ImportError:
            packaging = None
        self._packaging: Any = packaging

    def ask(self, title: str, text: str, details: str) -> bool:
        """One question; whether the answer was yes."""
        if slicer.app.testingEnabled():
            # Slicer's dialogs answer "yes" for nobody there, and a test run must not change its Python.
            logging.info("Testing mode is enabled: nothing is installed or removed")
            return False
        return bool(slicer.util.confirmOkCancelDisplay(text, title, detailedText=details))

    def pip_install(self, arguments: list[str], on_line: OnLine, on_end: OnEnd) -> None:
        """Run ``pip install`` and tell its lines and exit code, at once or later; raises nothing."""
        self._pip("pip_install", arguments, on_line, on_end, show_progress=False)

    def pip_uninstall(self, names: list[str], on_line: OnLine, on_end: OnEnd) -> None:
        """Run ``pip uninstall`` in the same manner."""
        self._pip("pip_uninstall", names, on_line, on_end)

    def _pip(self, function: str, arguments: list[str], on_line: OnLine, on_end: OnEnd, **options: Any) -> None:
        try:
            # In testing mode Slicer runs pip at once and calls nobody back.
            if self._packaging is not None and not slicer.app.testingEnabled():
                run = getattr(self._packaging, function)
                run(arguments, blocking=False, logCallback=on_line, completedCallback=on_end, **options)
                return
            with lines_of_stdout(on_line):
                getattr(slicer.util, function)(arguments)
        except CalledProcessError as error:
            on_end(error.returncode or 1)
        except (OSError, RuntimeError) as error:  # pip could not be started, or is running for somebody else
            on_line(str(error))
            on_end(1)
        else:
            on_end(0)

    def torch_extension_loaded(self) -> bool:
        """Whether the PyTorch extension can be called."""
        # Slicer has loaded its modules by itself, and find_spec stumbles over one that was loaded without a spec.
        return "PyTorchUtils" in sys.modules or importlib.util.find_spec("PyTorchUtils") is not None

    def torch_extension_waits(self) -> bool:
        """Whether it is installed and only a restart is missing."""
        model = self._extensions()
        return model is not None and bool(model.isExtensionInstalled(TORCH_EXTENSION))

    def install_torch_extension(self) -> bool:
        """Install it from Slicer's extension server; whether that worked. It is there after a restart."""
        model = self._extensions()
        if model is None:
            return False
        was_interactive = model.interactive
        model.interactive = False  # the one question has been asked
        try:
            return bool(model.installExtensionFromServer(TORCH_EXTENSION, False))
        finally:
            model.interactive = was_interactive

    def install_torch(self, window: str, on_line: OnLine) -> None:
        """Let it install torch in a version of ``window``; blocks, and raises whatever it raises."""
        from PyTorchUtils import PyTorchUtilsLogic

        with lines_of_stdout(on_line):
            PyTorchUtilsLogic().installTorch(askConfirmation=False, torchVersionRequirement=window)

    def restart(self) -> None:
        """Restart Slicer."""
        slicer.util.restart()

    def _extensions(self) -> Any:
        """The extensions manager; a Slicer can be built without one."""
        model = getattr(slicer.app, "extensionsManagerModel", None)
        return model() if callable(model) else None


@contextlib.contextmanager
def lines_of_stdout(on_line: OnLine) -> Iterator[None]:
    """Tell every line that is printed meanwhile, and print it as before."""
    tee = _Tee(sys.stdout, on_line)
    try:
        with contextlib.redirect_stdout(tee):
            yield
    finally:
        tee.end()


class _Tee(io.TextIOBase):
    """Passes text on and tells its lines."""

    def __init__(self, stream: TextIO | None, on_line: OnLine) -> None:
        self._stream = stream
        self._on_line = on_line
        self._rest = ""

    def writable(self) -> bool:
        return True

    def write(self, text: str) -> int:
        if self._stream is not None:  # a windowed Slicer can run without one
            self._stream.write(text)
        *lines, self._rest = (self._rest + text).split("\n")
        for line in lines:
            self._on_line(line.rstrip("\r"))
        return len(text)

    def flush(self) -> None:
        if self._stream is not None:
            self._stream.flush()

    def end(self) -> None:
        """Tell what was printed without an end of line."""
        if self._rest:
            self._on_line(self._rest)
            self._rest = ""
