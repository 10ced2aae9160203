"""The panel that tunes the model on the training examples, and chooses which adapter the next run uses."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import qt
from slicer.i18n import tr as _

from progidiff.errors import ProGiDiffError
from progidiff.targets import target_for
from ProGiDiffSlicerLib.logic.adapters import (
    Adapter,
    base_hash,
    delete_adapter,
    list_adapters,
    restore_adapter,
)
from ProGiDiffSlicerLib.logic.curating import Contents
from ProGiDiffSlicerLib.logic.tuning import Tuning, TuningOptions
from ProGiDiffSlicerLib.panels.binding import Binding
from ProGiDiffSlicerLib.panels.curve import curve
from ProGiDiffSlicerLib.panels.loading import load_panel
from ProGiDiffSlicerLib.panels.next_case import NextCasePart
from ProGiDiffSlicerLib.panels.progress import remaining
from ProGiDiffSlicerLib.panels.status_line import StatusLine
from ProGiDiffSlicerLib.panels.thumbnails import pixmap
from ProGiDiffSlicerLib.parameters import Parameters
from ProGiDiffSlicerLib.services import Services
from ProGiDiffSlicerLib.worker.lines import LineProcess

_PROGRESS_STEPS = 1000
_PICTURE_WIDTH = 360


class TuningPanel:
    """Adapter chooser, tuning with its curve and pictures, and the search for the next case.

    Attributes:
        widget: the panel, to be placed in a layout.
        tuning: the training in its process.
        next: the part that looks for the next case.
    """

    def __init__(
        self, services: Services, status: StatusLine, contents: Callable[[], Contents | None], prompt: Callable[[], str]
    ) -> None:
        """``contents`` says what the curated set holds, ``prompt`` what is typed under Prompt."""
        self.widget, self.ui = load_panel("TuningPanel")
        self._settings = services.settings
        self._session = services.session
        self._status = status
        self._contents = contents
        self._adapters: list[Adapter] = []
        self._targets: list[str] = []
        self._deleted: list[tuple[str, str]] = []
        self._pictures: Any = None
        self._binding = Binding(self.widget, self.refresh)
        self.tuning = Tuning(services.settings, LineProcess(services.owner))
        self.next = NextCasePart(self.ui, services, status, prompt, self._chosen)
        self.ui.adaptersFolderEdit.setCurrentPath(self._settings.adaptersFolder)
        self._connections = (
            (self.ui.adaptersFolderEdit, "currentPathChanged(QString)", self._on_folder),
            (self.ui.adaptersFolderEdit, "validInputChanged(bool)", self._on_folder),
            (self.ui.adapterComboBox, "currentIndexChanged(int)", self._on_adapter),
            (self.ui.worseCheckBox, "toggled(bool)", self._on_worse),
            (self.ui.deleteAdapterButton, "clicked()", self.delete),
            (self.ui.undoDeleteButton, "clicked()", self.undo_delete),
            (self.ui.tuneButton, "clicked()", self._on_button),
            (self.ui.pictureComboBox, "currentIndexChanged(int)", self._show_picture),
        )
        for widget, signature, slot in self._connections:
            widget.connect(signature, slot)
        self.tuning.changed.connect(self._show_tuning)
        self.tuning.finished.connect(self._on_finished)
        self.tuning.failed.connect(self._on_failed)
        self.look()
        self._show_tuning()

    def connectGui(self, parameters: Parameters) -> None:
        """Show parameters and keep them as the user changes them."""
        self._binding.bind(parameters)

    def disconnectGui(self) -> None:
        """Let go of the parameters."""
        self._binding.release()

    def enter(self) -> None:
        """The module is shown."""
        self.look()

    def cleanup(self) -> None:
        """Let go of everything outside the panel; a training ends, its checkpoint stays."""
        self.disconnectGui()
        for widget, signature, slot in self._connections:
            widget.disconnect(signature, slot)
        self.next.cleanup()
        self.tuning.close()
        self.widget.setMRMLScene(None)

    # The adapter that is used ---------------------------------------------------------------------------------------------

    def look(self) -> None:
        """Look up which adapters there are."""
        self._adapters = list_adapters(self._settings.adaptersFolder) if self._settings.adaptersFolder else []
        base = base_hash(self._settings.modelFolder or None)
        box = self.ui.adapterComboBox
        blocked = box.blockSignals(True)
        box.clear()
        box.addItem(_("Base model (no adapter)"))
        for number, adapter in enumerate(self._adapters, 1):
            note = (
                _("another model's") if adapter.misfit(base) else "" if adapter.card.better else _("not shown to be better")
            )
            box.addItem(f"{adapter.card.name} ({note})" if note else adapter.card.name)
            box.setItemData(number, adapter.summary(), qt.Qt.ToolTipRole)
        box.blockSignals(blocked)
        self.refresh()

    def use(self, folder: str, even_if_worse: bool = False) -> None:
        """Let the next run use an adapter; "" for the base model."""
        parameters = self._binding.parameters
        if parameters is not None:
            parameters.adapterEvenIfWorse = even_if_worse
            parameters.adapterFolder = folder

    def refresh(self) -> None:
        """Show which adapter is chosen, and what the training examples are."""
        parameters = self._binding.parameters
        folder = "" if parameters is None else parameters.adapterFolder
        number = next((n for n, adapter in enumerate(self._adapters, 1) if adapter.folder == folder), 0)
        box = self.ui.adapterComboBox
        blocked = box.blockSignals(True)
        box.setCurrentIndex(number)
        box.blockSignals(blocked)
        adapter = self._adapters[number - 1] if number else None
        self.ui.adapterLabel.setText(self._adapter_text(adapter, folder))
        self.ui.adapterLabel.setVisible(bool(self.ui.adapterLabel.text))
        check = self.ui.worseCheckBox
        blocked = check.blockSignals(True)
        check.setChecked(parameters is not None and parameters.adapterEvenIfWorse)
        check.blockSignals(blocked)
        check.setVisible(adapter is not None and not adapter.card.better)
        self.ui.deleteAdapterButton.setEnabled(adapter is not None)
        self.ui.undoDeleteButton.setEnabled(bool(self._deleted))
        self.show_cases()

    def delete(self) -> None:
        """Put the chosen adapter away; the base model is used then."""
        adapter = self._adapter()
        if adapter is None:
            return
        try:
            self._deleted.append((delete_adapter(adapter), adapter.folder))
        except ProGiDiffError as error:
            self._status.say(str(error))
            return
        self.use("")
        self.look()
        text = _("The adapter {name} was put away; the next run uses the base model.")
        self._status.say(text.format(name=adapter.card.name))

    def undo_delete(self) -> None:
        """Bring the adapter back that was deleted last."""
        if not self._deleted:
            return
        kept, folder = self._deleted[-1]
        try:
            restore_adapter(kept, folder)
        except ProGiDiffError as error:
            self._status.say(str(error))
            return
        self._deleted.pop()
        self.look()
        self.use(folder)

    def _adapter(self) -> Adapter | None:
        number = self.ui.adapterComboBox.currentIndex
        return self._adapters[number - 1] if 0 < number <= len(self._adapters) else None

    def _chosen(self) -> tuple[str, bool]:
        parameters = self._binding.parameters
        return ("", False) if parameters is None else (parameters.adapterFolder, parameters.adapterEvenIfWorse)

    def _adapter_text(self, adapter: Adapter | None, folder: str) -> str:
        if adapter is None:
            return _("The chosen adapter is not in the folder any more; choose another one.") if folder else ""
        misfit = adapter.misfit(base_hash(self._settings.modelFolder or None))
        return misfit or adapter.summary()

    def _on_adapter(self, _number: int) -> None:
        adapter = self._adapter()
        self.use("" if adapter is None else adapter.folder)
        self.refresh()

    def _on_worse(self, checked: bool) -> None:
        if self._binding.parameters is not None:
            self._binding.parameters.adapterEvenIfWorse = checked

    def _on_folder(self, _told: str | bool) -> None:
        self._settings.adaptersFolder = self.ui.adaptersFolderEdit.currentPath
        self.look()

    # Tuning ---------------------------------------------------------------------------------------------------------------

    def show_cases(self) -> None:
        """Show what the curated set holds; what there is to tune follows it."""
        contents = self._contents()
        counts = {} if contents is None else contents.counts
        if contents is None or not contents.cases:
            self.ui.casesLabel.setText(_("No training examples yet: save some under Review."))
        else:
            each = ", ".join(f"{target_for(target).name('en')} {count}" for target, count in counts.items())
            text = _("Training examples: {each} ({modalities})")
            self.ui.casesLabel.setText(text.format(each=each, modalities=", ".join(contents.modalities)))
        if self._targets != [*counts]:
            self._targets = [*counts]
            box = self.ui.tuningTargetComboBox
            box.clear()
            box.addItem(_("All"))
            box.addItems([target_for(target).name("en") for target in self._targets])

    def start(self) -> None:
        """Start the tuning with what the panel says; what stands in the way is told in the status line."""
        number = self.ui.tuningTargetComboBox.currentIndex
        options = TuningOptions(
            name=self.ui.adapterNameEdit.text,
            target=self._targets[number - 1] if 0 < number <= len(self._targets) else "",
            steps=self.ui.tuningStepsSpinBox.value or None,
            rank=self.ui.rankSpinBox.value or None,
        )
        try:
            self.tuning.start(options)
        except ProGiDiffError as error:
            self._status.say(str(error))
            return
        if self._session.running:
            self._status.say(_("Proposing and tuning at the same time: both take longer."))

    def _on_button(self) -> None:
        if self.tuning.running:
            self.tuning.stop()
        else:
            self.start()

    def _show_tuning(self) -> None:
        tuning = self.tuning
        running = tuning.running
        text = _("End at once") if tuning.stopping else _("Stop and keep the best") if running else _("Start tuning")
        self.ui.tuneButton.setText(text)
        bar = self.ui.tuningProgressBar
        bar.setVisible(running)
        bar.setValue(int(tuning.fraction * _PROGRESS_STEPS))
        left = remaining(tuning.eta_s)
        bar.setFormat(left or "%p%")
        self.ui.tuningLabel.setText(tuning.message)
        self.ui.tuningLabel.setVisible(bool(tuning.message))
        has_curve = bool(tuning.losses or tuning.dices)
        self.ui.curveLabel.setVisible(has_curve)
        if has_curve:
            self.ui.curveLabel.setPixmap(pixmap(curve(tuning.losses, tuning.dices, tuning.steps)))
        if self._pictures is not tuning.pictures:
            self._pictures = tuning.pictures
            self._list_pictures()

    def _list_pictures(self) -> None:
        box = self.ui.pictureComboBox
        blocked = box.blockSignals(True)
        box.clear()
        for picture in self.tuning.pictures:
            name = target_for(picture.target).name("en")
            box.addItem(f"{name}  {picture.before:.2f} → {picture.after:.2f}")
        box.blockSignals(blocked)
        for widget in (box, self.ui.pictureLabel):
            widget.setVisible(bool(self.tuning.pictures))
        self._show_picture(0)

    def _show_picture(self, number: int) -> None:
        if not 0 <= number < len(self.tuning.pictures):
            return
        image = qt.QPixmap()
        image.loadFromData(qt.QByteArray(self.tuning.pictures[number].png), "PNG")
        self.ui.pictureLabel.setPixmap(image.scaledToWidth(_PICTURE_WIDTH, qt.Qt.SmoothTransformation))

    def _on_finished(self, folder: str, better: bool) -> None:
        self.look()
        if better:
            self.use(folder)
            self._status.say(_("The new adapter is better on the held-out cases; the next run uses it."))
        else:
            self._status.say(_("The new adapter is in the list, but it is not used: nothing shows that it is better."))
        self.refresh()

    def _on_failed(self, sentence: str) -> None:
        self._status.say(sentence, self.tuning.log_text)
