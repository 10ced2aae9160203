"""The prompt panel: what to outline, where, how many proposals; Propose and Cancel."""

from __future__ import annotations

import random
from collections.abc import Callable, Iterable, Sequence
from dataclasses import replace
from typing import Any

import qt
import slicer
from slicer.i18n import tr as _

from progidiff.errors import ProGiDiffError
from progidiff.targets import complete
from progidiff.volumes.slicing import SlicePlan
from ProGiDiffSlicerLib.panels.panel import Panel, StatusLine, blocked, remaining, show_progress
from ProGiDiffSlicerLib.panels.pictures import slices_of
from ProGiDiffSlicerLib.parameters import LARGEST_SEED, Parameters, Plane
from ProGiDiffSlicerLib.scene.volumes import Extent, frames
from ProGiDiffSlicerLib.services import Services
from ProGiDiffSlicerLib.session import RunRequest, SessionState

_SEPARATORS = ";,\n"
MOST_KEPT = 20


class PromptPanel(Panel):
    """What to outline and where.

    It starts and cancels the session's runs and shows how far they are. The prompt stays in its line and in the
    parameters whatever happens to a run.

    Attributes:
        line: the line in which the prompt is typed.
    """

    def __init__(self, services: Services, status: StatusLine, scope: Any) -> None:
        """``scope`` is the widget within which Ctrl+Enter starts a run: the whole module."""
        super().__init__("PromptPanel")
        self.line = PromptLine(self, services.session.vocabulary)
        self._session = session = services.session
        self._settings = services.settings
        self._status = status
        # The range of slices as it is shown; the parameters may still hold another volume's.
        self._range: tuple[int, int] | None = None
        for keys in ("Ctrl+Return", "Ctrl+Enter"):
            self.keys.add(scope, keys, self.propose)
        self.listen(
            (self.ui.proposeButton, "clicked()", self._on_button),
            (self.ui.rangeWidget, "valuesChanged(double,double)", self._on_range),
            (session.stateChanged, self._on_state),
            (session.progressChanged, self._on_progress),
            (session.failed, self._on_failed),
            (session.cancelled, self._on_cancelled),
            (session.dropped, self._on_dropped),
            (session.warned, status.warn),
            (self._settings.changed, self._on_setting),
        )
        self._on_state()

    def connectGui(self, parameters: Parameters) -> None:
        """Show parameters and keep them as the user changes them."""
        self.line.set_history(parameters.promptHistory)
        super().connectGui(parameters)

    def enter(self) -> None:
        """The module is shown: its keys work."""
        super().enter()
        self.on_parameters()

    def cleanup(self) -> None:
        """Let go of everything outside the panel."""
        super().cleanup()
        self.line.cleanup()

    def propose(self) -> None:
        """Start a run with what the panel says; what stands in the way is told in the status line."""
        if not self._session.running:
            self._start()

    def correct_values(self, wanted: bool) -> None:
        """Start again, with values of the volume that cannot be Hounsfield units taken for what they look like or not."""
        if self.parameters is not None:
            self.parameters.correctedVolume = self.parameters.inputVolume if wanted else None
            self._start()

    def _start(self) -> None:
        parameters = self.parameters
        if parameters is None:
            return
        prompt = self.line.text
        self._status.clear()
        seed = parameters.seed if parameters.seedLocked else random.randint(0, LARGEST_SEED)
        try:
            self._session.start(self._request(prompt, seed))
        except ProGiDiffError as error:
            self._status.say(str(error))
            return
        parameters.seed = seed
        self.line.remember(prompt)
        parameters.promptHistory = self.line.history

    def _request(self, prompt: str, seed: int) -> RunRequest:
        parameters = self.parameters
        volume = parameters.inputVolume
        top_k = min(parameters.topK, parameters.proposals)
        return RunRequest(
            volume_node_id="" if volume is None else volume.GetID(),
            prompt=prompt,
            request=replace(parameters.request(), seed=seed, top_k=top_k, slices=self._range),
            extent=parameters.extent,
            plane=parameters.plane.value or None,
            correct_values=volume is not None and _same(parameters.correctedVolume, volume),
            frames=parameters.frames,
            model_folder=self._settings.modelFolder or None,
            device=self._settings.device,
            adapter_folder=parameters.adapterFolder or None,
            adapter_even_if_worse=parameters.adapterEvenIfWorse,
        )

    def _on_button(self) -> None:
        if self._session.running:
            self._session.cancel()
        else:
            self.propose()

    def on_parameters(self) -> None:
        """Follow the volume and the extent: which rows there are, how far the range goes."""
        if self.parameters is None:
            return
        node = self.parameters.inputVolume
        is_sequence = frames(node) is not None
        for widget in (self.ui.framesLabel, self.ui.framesComboBox):
            widget.setVisible(is_sequence)
        plane = self.parameters.plane.value
        slices = slices_of(node, lambda geometry: self._session.plan(geometry, plane))
        self._show_plane(None if slices is None else slices.plan)
        self._range = None
        has_range = self.parameters.extent is Extent.RANGE and slices is not None
        for widget in (self.ui.rangeLabel, self.ui.rangeWidget):
            widget.setVisible(has_range)
        if slices is not None:
            self._show_range(slices.plan.count)

    def _on_setting(self, name: str) -> None:
        if name == "modelFolder":
            self.on_parameters()  # another model may know other planes

    def _show_plane(self, plan: SlicePlan | None) -> None:
        """Say how the volume is cut, and whether the model has seen such slices."""
        text = ""
        if plan is not None:
            text = _("{plane}, {count} slices").format(plane=Plane(plan.plane).label(), count=plan.count)
            if plan.plane not in self._session.planes():
                text += _("; the model was not trained on such slices")
        self.ui.planeNote.setText(text)

    def _show_range(self, count: int) -> None:
        """People count slices from 1 and include the last; the parameters count from 0 and leave it out."""
        start, stop = self.parameters.rangeStart, self.parameters.rangeStop
        if not 0 <= start < stop <= count:
            start, stop = 0, count
        self._range = (start, stop)
        with blocked(self.ui.rangeWidget):
            self.ui.rangeWidget.setRange(1, count)
            self.ui.rangeWidget.setValues(start + 1, stop)

    def _on_range(self, first: float, last: float) -> None:
        parameters = self.parameters
        if parameters is not None:
            with slicer.util.NodeModify(parameters):  # one change: a range of which half is old is shown to nobody
                parameters.rangeStart = round(first) - 1
                parameters.rangeStop = round(last)

    def _on_state(self, *_state: Any) -> None:
        running = self._session.running
        cancelling = self._session.state is SessionState.CANCELLING
        self.ui.proposeButton.setText(_("Cancelling") if cancelling else _("Cancel") if running else _("Propose"))
        self.ui.proposeButton.setEnabled(not cancelling)
        self.ui.progressBar.setVisible(running)
        if not running:
            self.ui.progressBar.setValue(0)

    def _on_progress(self, fraction: float, text: str, eta_s: float | None) -> None:
        left = remaining(eta_s)
        show_progress(self.ui.progressBar, fraction, f"{text}, {left}" if text and left else text or left)

    def _on_failed(self, sentence: str) -> None:
        failure = self._session.failure
        if failure is None or failure.kind == "remote":
            # The worker answered and is well; starting it again would not help.
            self._status.say(sentence)
        else:
            self._status.say_failure(sentence, failure.details)

    def _on_dropped(self, sentence: str) -> None:
        self._status.clear()
        self._status.say(sentence)

    def _on_cancelled(self) -> None:
        self._status.say(_("Cancelled. What had arrived is kept below."))


def _same(node: Any, other: Any) -> bool:
    return node is not None and node.GetID() == other.GetID()


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
    """A QLineEdit with its completer, its history (up and down keys) and a menu of both."""

    def __init__(self, panel: Panel, vocabulary: Callable[[], Sequence[str]]) -> None:
        """``panel`` holds the line."""
        self._edit = edit = panel.ui.promptEdit
        self._vocabulary = vocabulary
        self._history = PromptHistory()
        self._words = qt.QStringListModel(edit)
        self._completer = qt.QCompleter(edit)
        self._completer.setModel(self._words)
        self._completer.setCompletionMode(qt.QCompleter.UnfilteredPopupCompletion)
        self._completer.setCaseSensitivity(qt.Qt.CaseInsensitive)
        edit.setCompleter(self._completer)
        self._menu = qt.QMenu(panel.ui.historyButton)
        self._names = qt.QMenu(_("Add a structure that the model knows"), self._menu)
        self._choices: list[_Choice] = []
        panel.ui.historyButton.setMenu(self._menu)
        panel.listen((edit, "textEdited(QString)", self._on_edited), (self._menu, "aboutToShow()", self._fill_menu))
        panel.keys.add(edit, "Up", self._on_up)
        panel.keys.add(edit, "Down", self._on_down)

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

    def cleanup(self) -> None:
        """Let go of the menu's entries."""
        self._forget_choices()

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


class PromptHistory:
    """Prompts in the order of their last use, and a place in that order for the up and down keys."""

    def __init__(self, prompts: Iterable[str] = ()) -> None:
        self._prompts: list[str] = []
        self._draft = ""
        self._position = 0
        for prompt in prompts:
            self.add(prompt)

    @property
    def prompts(self) -> list[str]:
        """Latest last."""
        return list(self._prompts)

    def add(self, prompt: str) -> None:
        """Remember a prompt as the latest; an empty one is passed over."""
        prompt = prompt.strip()
        if prompt:
            self._prompts = [*(known for known in self._prompts if known != prompt), prompt][-MOST_KEPT:]
        self._position = len(self._prompts)

    def previous(self, typed: str) -> str:
        """The prompt before the present place; ``typed`` is kept as a draft to come back to."""
        if self._position == len(self._prompts):
            self._draft = typed
        if not self._prompts:
            return typed
        self._position = max(self._position - 1, 0)
        return self._prompts[self._position]

    def next(self, typed: str) -> str:
        """The prompt after the present place, in the end what had been typed."""
        if self._position >= len(self._prompts):
            return typed
        self._position += 1
        return self._draft if self._position == len(self._prompts) else self._prompts[self._position]

    def typed_anew(self) -> None:
        """The user typed something: the up key starts from the latest prompt again."""
        self._position = len(self._prompts)
