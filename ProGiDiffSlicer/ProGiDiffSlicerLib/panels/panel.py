"""What all panels do alike: their .ui file, connections, the scene's parameters, keys, progress."""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import qt
import slicer
import vtk
from slicer.i18n import tr as _

from progidiff.wire.messages import IMAGE_WARNINGS, WarningEvent
from ProGiDiffSlicerLib.parameters import Parameters
from ProGiDiffSlicerLib.signals import Signal

_RESOURCES = os.path.join(os.path.dirname(os.path.dirname(os.path.dirname(os.path.abspath(__file__)))), "Resources")
# The length of the progress bars in the .ui files.
_PROGRESS_STEPS = 1000
# Below this an estimate in seconds would flicker.
_SOON_S = 3
_MINUTE_S = 60
# Lines of warnings; of a sequence with many frames the others are for who points at them.
_MOST_LINES = 6


class Panel:
    """A panel from ``Resources/UI/<name>.ui``.

    Attributes:
        widget: the panel, to be placed in a layout.
        ui: its children as attributes by their names.
        parameters: the :class:`~ProGiDiffSlicerLib.parameters.Parameters` that are shown, or ``None``.
        keys: shortcuts that work while the module is shown.
    """

    def __init__(self, name: str) -> None:
        self.widget = slicer.util.loadUI(os.path.join(_RESOURCES, "UI", f"{name}.ui"))
        self.ui = slicer.util.childWidgetVariables(self.widget)
        self.parameters: Any = None
        self.keys = Shortcuts()
        self._connections: list[tuple[Any, ...]] = []
        self._gui_tag: Any = None
        self._observer: Any = None

    def listen(self, *connections: tuple[Any, ...]) -> None:
        """Make connections that :meth:`cleanup` ends: (widget, signature of its signal, slot), or (signal of ours, slot)."""
        for sender, *signature, slot in connections:
            sender.connect(*signature, slot)
        self._connections.extend(connections)

    def connectGui(self, parameters: Parameters) -> None:
        """Show parameters instead of others, and keep them as the user changes them."""
        self._release()
        self.parameters = parameters
        self._gui_tag = self.parameters.connectGui(self.widget)
        self._observer = parameters.AddObserver(vtk.vtkCommand.ModifiedEvent, self._on_modified)
        self.on_parameters()

    def disconnectGui(self) -> None:
        """Let go of the parameters."""
        self._release()

    def on_parameters(self) -> None:
        """Parameters are shown, or one of them has changed."""

    def enter(self) -> None:
        """The module is shown: its keys work."""
        self.keys.install()

    def exit(self) -> None:
        """Another module is shown."""
        self.keys.remove()

    def cleanup(self) -> None:
        """Let go of everything outside the panel."""
        self.exit()
        self.disconnectGui()
        for sender, *signature, slot in self._connections:
            sender.disconnect(*signature, slot)
        self._connections.clear()
        self.widget.setMRMLScene(None)

    def _release(self) -> None:
        if self.parameters is not None:
            self.parameters.disconnectGui(self._gui_tag)
            self.parameters.RemoveObserver(self._observer)
        self.parameters = None

    def _on_modified(self, _caller: Any, _event: str) -> None:
        if self.parameters is not None:
            self.on_parameters()


@contextmanager
def blocked(widget: Any) -> Iterator[None]:
    """Change a widget while it tells nobody."""
    before = widget.blockSignals(True)
    try:
        yield
    finally:
        widget.blockSignals(before)


def show_progress(bar: Any, fraction: float, words: str) -> None:
    """Let a progress bar stand at ``fraction`` and say something."""
    bar.setValue(int(fraction * _PROGRESS_STEPS))
    bar.setFormat(words)


def remaining(seconds: float | None) -> str:
    """How long something will still take, or nothing where that is not known."""
    if seconds is None or seconds < 0:
        return ""
    if seconds < _SOON_S:
        return _("a few seconds left")
    if seconds < 1.5 * _MINUTE_S:
        return _("about {seconds} s left").format(seconds=5 * max(1, round(seconds / 5)))
    return _("about {minutes} min left").format(minutes=round(seconds / _MINUTE_S))


class Shortcuts:
    """Shortcuts of widgets, installed together and removed together.

    They are never on the main window, where they would take keys from Slicer's own views and editors.
    """

    def __init__(self) -> None:
        self._wanted: list[tuple[Any, str, Callable[[], Any]]] = []
        self._installed: list[tuple[Any, Callable[[], Any]]] = []

    def add(self, widget: Any, keys: str, action: Callable[[], Any]) -> None:
        """Call ``action``, a bound method, when ``keys`` are pressed in ``widget`` or in one of its children."""
        self._wanted.append((widget, keys, action))

    def install(self) -> None:
        """Make the keys work; they work once, however often this is called."""
        if self._installed:
            return
        for widget, keys, action in self._wanted:
            shortcut = qt.QShortcut(widget)
            shortcut.setKey(qt.QKeySequence(keys))
            shortcut.setContext(qt.Qt.WidgetWithChildrenShortcut)
            shortcut.connect("activated()", action)
            self._installed.append((shortcut, action))

    def remove(self) -> None:
        """Give the keys back."""
        for shortcut, action in self._installed:
            shortcut.disconnect("activated()", action)
            shortcut.setEnabled(False)
            shortcut.deleteLater()
        self._installed.clear()


class StatusLine:
    """The lines between the prompt and the proposals: a sentence, and below it the warnings of the latest run.

    Attributes:
        restartRequested: Signal(): the user wants the worker to be started again.
        correctRequested: Signal(bool): values that cannot be Hounsfield units are to be corrected, or taken as they are.
    """

    def __init__(self, label: Any, button: Any, correct: Any) -> None:
        self.restartRequested, self.correctRequested = Signal(), Signal()
        self._label = label
        self._button = button
        self._correct = correct
        self._sentence = self._details = ""
        self._warnings: list[WarningEvent] = []
        self._button.connect("clicked()", self._on_restart)
        self._correct.connect("clicked()", self._on_correct)
        self.clear()

    @property
    def text(self) -> str:
        """What the line says."""
        return str(self._label.text)

    def say(self, sentence: str, details: str = "") -> None:
        """Show a sentence; ``details`` for who points at it."""
        self._show(sentence, details, False)

    def say_failure(self, sentence: str, details: str = "") -> None:
        """Show what went wrong, with the offer to start the worker again; ``details`` for who points at the sentence."""
        self._show(sentence, details, True)

    def warn(self, warning: WarningEvent) -> None:
        """Add a warning to the others, the most important first; they stay until the next run."""
        if warning not in self._warnings:
            self._warnings.append(warning)
            self._warnings.sort(key=lambda each: _weight(each.code))
        self._write()

    def clear(self) -> None:
        """Say nothing."""
        self._warnings = []
        self._show("", "", False)

    def cleanup(self) -> None:
        """Let go of the buttons."""
        self._button.disconnect("clicked()", self._on_restart)
        self._correct.disconnect("clicked()", self._on_correct)
        self.restartRequested.clear()
        self.correctRequested.clear()

    def _show(self, sentence: str, details: str, restart: bool) -> None:
        self._sentence, self._details = sentence, details
        self._button.setVisible(restart)
        self._write()

    def _write(self) -> None:
        warnings = [warning.message for warning in self._warnings]
        shown = warnings if len(warnings) <= _MOST_LINES else warnings[: _MOST_LINES - 1]
        lines = [self._sentence, *shown] if self._sentence else list(shown)
        if len(shown) < len(warnings):
            lines.append(_("{count} more; point here to read them.").format(count=len(warnings) - len(shown)))
        self._label.setText("\n".join(lines))
        self._label.setToolTip("\n".join(text for text in (self._details, *warnings[len(shown) :]) if text))
        self._label.setVisible(bool(lines))
        codes = {warning.code for warning in self._warnings}
        self._correct.setVisible(bool(codes & {"values", "values_corrected"}))
        self._correct.setText(_("Take the values as they are") if "values_corrected" in codes else _("Correct the values"))

    def _on_correct(self) -> None:
        self.correctRequested.emit("values" in {warning.code for warning in self._warnings})

    def _on_restart(self) -> None:
        self.clear()
        self.restartRequested.emit()


def _weight(code: str) -> int:
    return IMAGE_WARNINGS.index(code) if code in IMAGE_WARNINGS else len(IMAGE_WARNINGS)
