"""How things stand, what the user should know of the latest run, and buttons that help. Nothing pops up."""

from __future__ import annotations

from typing import Any

from slicer.i18n import tr as _

from progidiff.wire.messages import IMAGE_WARNINGS, WarningEvent
from ProGiDiffSlicerLib.signals import Signal

# Lines of warnings; of a sequence with many frames the others are for who points at them.
_MOST_LINES = 6


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
