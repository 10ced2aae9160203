"""One sentence about how things stand, and the button that starts the worker again. Nothing pops up."""

from __future__ import annotations

from typing import Any

from ProGiDiffSlicerLib.signals import Signal


class StatusLine:
    """The line between the prompt and the proposals.

    Attributes:
        restartRequested: the user wants the worker to be started again.
    """

    def __init__(self, label: Any, button: Any) -> None:
        self.restartRequested = Signal()
        self._label = label
        self._button = button
        self._button.connect("clicked()", self._on_restart)
        self.clear()

    @property
    def text(self) -> str:
        """What the line says."""
        return str(self._label.text)

    def say(self, sentence: str, details: str = "") -> None:
        """Show a sentence; ``details`` for who points at it."""
        self._show(sentence, False)
        self._label.setToolTip(details)

    def say_failure(self, sentence: str, details: str = "") -> None:
        """Show what went wrong, with the offer to start the worker again; ``details`` for who points at the sentence."""
        self._show(sentence, True)
        self._label.setToolTip(details)

    def clear(self) -> None:
        """Say nothing."""
        self._show("", False)

    def cleanup(self) -> None:
        """Let go of the button."""
        self._button.disconnect("clicked()", self._on_restart)
        self.restartRequested.clear()

    def _show(self, sentence: str, restart: bool) -> None:
        self._label.setText(sentence)
        self._label.setToolTip("")
        self._label.setVisible(bool(sentence))
        self._button.setVisible(restart)

    def _on_restart(self) -> None:
        self.clear()
        self.restartRequested.emit()
