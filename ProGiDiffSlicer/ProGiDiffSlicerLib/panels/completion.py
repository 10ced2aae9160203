"""The line in which a prompt is typed: completion from the model's vocabulary, earlier prompts."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import qt
from slicer.i18n import tr as _

from progidiff.targets import complete
from ProGiDiffSlicerLib.panels.history import PromptHistory
from ProGiDiffSlicerLib.panels.shortcuts import Shortcuts
from ProGiDiffSlicerLib.signals import Signal

_SEPARATORS = ";,\n"


def completions(typed: str, vocabulary: Sequence[str]) -> list[str]:
    """Whole prompts that what is typed could become; only its last part is completed."""
    cut = max(typed.rfind(mark) for mark in _SEPARATORS) + 1
    before = typed[:cut] + (" " if cut else "")
    if not typed[cut:].strip():
        return []
    return [before + name for name in complete(typed, vocabulary)]


def with_target(prompt: str, name: str) -> str:
    """The prompt with one more target at its end."""
    kept = prompt.strip().rstrip(_SEPARATORS).strip()
    return f"{kept}; {name}" if kept else name


class PromptLine:
    """A QLineEdit with its completer, its history (up and down keys) and a menu of both.

    Attributes:
        historyChanged: a prompt was added to the history.
    """

    def __init__(self, edit: Any, button: Any, vocabulary: Callable[[], Sequence[str]]) -> None:
        self.historyChanged = Signal()
        self._edit = edit
        self._vocabulary = vocabulary
        self._history = PromptHistory()
        self._words = qt.QStringListModel(edit)
        self._completer = qt.QCompleter(edit)
        self._completer.setModel(self._words)
        self._completer.setCompletionMode(qt.QCompleter.UnfilteredPopupCompletion)
        self._completer.setCaseSensitivity(qt.Qt.CaseInsensitive)
        edit.setCompleter(self._completer)
        edit.connect("textEdited(QString)", self._on_edited)
        self._menu = qt.QMenu(button)
        self._names = qt.QMenu(_("Add a structure that the model knows"), self._menu)
        self._choices: list[_Choice] = []
        self._menu.connect("aboutToShow()", self._fill_menu)
        button.setMenu(self._menu)
        self._shortcuts = Shortcuts()
        self._shortcuts.add(edit, "Up", self._on_up)
        self._shortcuts.add(edit, "Down", self._on_down)

    @property
    def text(self) -> str:
        """The prompt without spaces around it."""
        return str(self._edit.text).strip()

    @property
    def history(self) -> list[str]:
        """Earlier prompts, latest last."""
        return self._history.prompts

    def set_history(self, prompts: Sequence[str]) -> None:
        """Take over the prompts that were saved with a scene."""
        self._history = PromptHistory(prompts)

    def remember(self, prompt: str) -> None:
        """Put a prompt at the end of the history."""
        self._history.add(prompt)
        self.historyChanged.emit()

    def install_shortcuts(self) -> None:
        """Make the up and down keys walk through the history."""
        self._shortcuts.install()

    def remove_shortcuts(self) -> None:
        """Give them back."""
        self._shortcuts.remove()

    def cleanup(self) -> None:
        """Let go of the widgets."""
        self.remove_shortcuts()
        self._edit.disconnect("textEdited(QString)", self._on_edited)
        self._menu.disconnect("aboutToShow()", self._fill_menu)
        self._forget_choices()
        self.historyChanged.clear()

    def _on_edited(self, text: str) -> None:
        self._history.typed_anew()
        self._words.setStringList(completions(text, self._vocabulary()))

    def _on_up(self) -> None:
        self._edit.setText(self._history.previous(str(self._edit.text)))

    def _on_down(self) -> None:
        self._edit.setText(self._history.next(str(self._edit.text)))

    def _fill_menu(self) -> None:
        self._forget_choices()
        self._menu.clear()
        self._names.clear()
        for prompt in reversed(self._history.prompts):
            self._add_choice(prompt, self._replace)
        if self._history.prompts:
            self._menu.addSeparator()
        for name in self._vocabulary():
            self._add_choice(name, self._append, self._names)
        self._menu.addMenu(self._names)

    def _add_choice(self, text: str, use: Callable[[str], None], menu: Any = None) -> None:
        # An ampersand in a menu's text would underline the next letter.
        action = (menu or self._menu).addAction(text.replace("&", "&&"))
        self._choices.append(_Choice(action, text, use))

    def _forget_choices(self) -> None:
        for choice in self._choices:
            choice.cleanup()
        self._choices.clear()

    def _replace(self, prompt: str) -> None:
        self._edit.setText(prompt)
        self._edit.setFocus()

    def _append(self, name: str) -> None:
        self._edit.setText(with_target(str(self._edit.text), name))
        self._edit.setFocus()


class _Choice:
    """One entry of the menu; a signal of Qt passes no argument of ours."""

    def __init__(self, action: Any, text: str, use: Callable[[str], None]) -> None:
        self._action = action
        self._text = text
        self._use = use
        action.connect("triggered()", self._on_triggered)

    def cleanup(self) -> None:
        """Let go of the action."""
        self._action.disconnect("triggered()", self._on_triggered)

    def _on_triggered(self) -> None:
        self._use(self._text)
