"""The panel that tunes the model on the training examples, and chooses which adapter the next run uses."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import qt
import slicer
from slicer.i18n import tr as _

from progidiff.errors import ProGiDiffError
from progidiff.targets import target_for
from progidiff.wire.messages import CuratedCases, NextItem
from ProGiDiffSlicerLib.learning.adapters import (
    Adapter,
    base_hash,
    delete_adapter,
    list_adapters,
    restore_adapter,
)
from ProGiDiffSlicerLib.learning.tuning import NextCase, Tuning
from ProGiDiffSlicerLib.panels.panel import Panel, StatusLine, blocked, remaining, show_progress
from ProGiDiffSlicerLib.panels.pictures import curve, pixmap
from ProGiDiffSlicerLib.services import Services
from ProGiDiffSlicerLib.signals import Signal
from ProGiDiffSlicerLib.worker.client import WorkerClient

_PICTURE_WIDTH = 360
# A worker that was asked to stop finishes its step, measures and writes what it has; then it is ended.
_STOP_S = 180.0
# One that computes for minutes on a computer with too little memory may be late with a sign of life.
_SILENCE_S = 120.0


def own_worker(services: Services) -> WorkerClient:
    """A worker beside the one that proposes, on this computer, for one long request; it ends with it."""
    return WorkerClient(
        services.settings.command_here,
        parent=services.owner,
        heartbeat_timeout_s=_SILENCE_S,
        cancel_timeout_s=_STOP_S,
        linger_s=0.0,
    )


class TuningPanel(Panel):
    """Adapter chooser, tuning with its curve and pictures, and the search for the next case.

    Attributes:
        tuning: the training in its process.
        next: the part that looks for the next case.
    """

    def __init__(
        self, services: Services, status: StatusLine, contents: Callable[[], CuratedCases | None], prompt: Callable[[], str]
    ) -> None:
        """``contents`` says what the curated set holds, ``prompt`` what is typed under Prompt."""
        super().__init__("TuningPanel")
        self._settings = services.settings
        self._session = services.session
        self._status = status
        self._contents = contents
        self._adapters: list[Adapter] = []
        self._targets: list[str] = []
        self._deleted: list[tuple[str, str]] = []
        self._pictures: Any = None
        self.tuning = Tuning(services.settings, own_worker(services))
        self.next = NextCasePart(self, services, status, prompt, self._chosen)
        self.ui.adaptersFolderEdit.setCurrentPath(self._settings.adaptersFolder)
        self.listen(
            (self.ui.adaptersFolderEdit, "currentPathChanged(QString)", self._on_folder),
            (self.ui.adaptersFolderEdit, "validInputChanged(bool)", self._on_folder),
            (self.ui.adapterComboBox, "currentIndexChanged(int)", self._on_adapter),
            (self.ui.worseCheckBox, "toggled(bool)", self._on_worse),
            (self.ui.deleteAdapterButton, "clicked()", self.delete),
            (self.ui.undoDeleteButton, "clicked()", self.undo_delete),
            (self.ui.tuneButton, "clicked()", self._on_button),
            (self.ui.pictureComboBox, "currentIndexChanged(int)", self._show_picture),
            (self.tuning.changed, self._show_tuning),
            (self.tuning.finished, self._on_finished),
            (self.tuning.failed, self._on_failed),
        )
        self.look()
        self._show_tuning()

    def on_parameters(self) -> None:
        """Another adapter is chosen."""
        self.refresh()

    def enter(self) -> None:
        """The module is shown: adapters may have come or gone."""
        super().enter()
        self.look()

    def cleanup(self) -> None:
        """Let go of everything outside the panel; a training ends, its checkpoint stays."""
        super().cleanup()
        self.next.cleanup()
        self.tuning.close()

    # The adapter that is used ---------------------------------------------------------------------------------------------

    def look(self) -> None:
        """Look up which adapters there are."""
        self._adapters = list_adapters(self._settings.adaptersFolder) if self._settings.adaptersFolder else []
        base = base_hash(self._settings.modelFolder or None)
        box = self.ui.adapterComboBox
        with blocked(box):
            box.clear()
            box.addItem(_("Base model (no adapter)"))
            for number, adapter in enumerate(self._adapters, 1):
                note = "" if adapter.card.better else _("not shown to be better")
                note = _("another model's") if adapter.misfit(base) else note
                box.addItem(f"{adapter.card.name} ({note})" if note else adapter.card.name)
                box.setItemData(number, adapter.summary(), qt.Qt.ToolTipRole)
        self.refresh()

    def use(self, folder: str, even_if_worse: bool = False) -> None:
        """Let the next run use an adapter; "" for the base model."""
        parameters = self.parameters
        if parameters is not None:
            parameters.adapterEvenIfWorse = even_if_worse
            parameters.adapterFolder = folder

    def refresh(self) -> None:
        """Show which adapter is chosen, and what the training examples are."""
        parameters = self.parameters
        folder = "" if parameters is None else parameters.adapterFolder
        number = next((n for n, adapter in enumerate(self._adapters, 1) if adapter.folder == folder), 0)
        with blocked(self.ui.adapterComboBox):
            self.ui.adapterComboBox.setCurrentIndex(number)
        adapter = self._adapters[number - 1] if number else None
        self.ui.adapterLabel.setText(self._adapter_text(adapter, folder))
        self.ui.adapterLabel.setVisible(bool(self.ui.adapterLabel.text))
        check = self.ui.worseCheckBox
        with blocked(check):
            check.setChecked(parameters is not None and parameters.adapterEvenIfWorse)
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
        parameters = self.parameters
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
        if self.parameters is not None:
            self.parameters.adapterEvenIfWorse = checked

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
        target = self._targets[number - 1] if 0 < number <= len(self._targets) else ""
        steps, rank = self.ui.tuningStepsSpinBox.value, self.ui.rankSpinBox.value
        try:
            self.tuning.start(self.ui.adapterNameEdit.text, target, steps, rank)
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
        show_progress(bar, tuning.fraction, remaining(tuning.eta_s) or "%p%")
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
        with blocked(box):
            box.clear()
            for picture in self.tuning.pictures:
                name = target_for(picture.target).name("en")
                box.addItem(f"{name}  {picture.before:.2f} → {picture.after:.2f}")
        for widget in (box, self.ui.pictureLabel):
            widget.setVisible(bool(self.tuning.pictures))
        self._show_picture(0)

    def _show_picture(self, number: int) -> None:
        if not 0 <= number < len(self.tuning.pictures):
            return
        image = qt.QPixmap()
        image.loadFromData(qt.QByteArray(self.tuning.pictures[number].png.tobytes()), "PNG")
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


class NextCasePart:
    """Folder, search, and the list of volumes.

    Attributes:
        search: the search in its process.
        loaded: Signal(volume node): the user has loaded a volume of the list.
    """

    def __init__(
        self,
        panel: Panel,
        services: Services,
        status: StatusLine,
        prompt: Callable[[], str],
        adapter: Callable[[], tuple[str, bool]],
    ) -> None:
        """``prompt`` says what to look for, ``adapter`` with which adapter (folder, even if it is worse)."""
        self.ui = ui = panel.ui
        self.search = NextCase(services.settings, own_worker(services))
        self.loaded = Signal()
        self._status = status
        self._prompt = prompt
        self._adapter = adapter
        self._shown: list[NextItem] = []
        table = ui.nextTable
        table.setColumnCount(3)
        table.setHorizontalHeaderLabels([_("Volume"), _("Target"), _("Disagreement")])
        table.verticalHeader().setVisible(False)
        table.setSelectionBehavior(qt.QAbstractItemView.SelectRows)
        table.setEditTriggers(qt.QAbstractItemView.NoEditTriggers)
        panel.listen(
            (ui.nextButton, "clicked()", self._on_button),
            (ui.loadNextButton, "clicked()", self.load),
            (table, "cellDoubleClicked(int,int)", self._on_double_click),
            (table, "itemSelectionChanged()", self._on_selection),
            (self.search.changed, self.refresh),
        )
        self.refresh()

    def start(self) -> None:
        """Search the chosen folder for the prompt."""
        folder, even_if_worse = self._adapter()
        try:
            self.search.start(self.ui.nextFolderEdit.currentPath, self._prompt(), folder, even_if_worse)
        except ProGiDiffError as error:
            self._status.say(str(error))

    def load(self) -> None:
        """Load the selected volume and go to the place that the proposals disagree on most."""
        item = self._selected()
        if item is None:
            return
        try:
            volume = slicer.util.loadVolume(self.search.place(item), {})
        except Exception as error:  # the readers of Slicer raise bare RuntimeError and others
            text = _("{volume} could not be loaded ({reason}); load it with Add Data or the DICOM module.")
            self._status.say(text.format(volume=item.path, reason=error))
            return
        if item.ras is not None:
            slicer.modules.markups.logic().JumpSlicesToLocation(*item.ras, True)
        self.loaded.emit(volume)

    def refresh(self) -> None:
        """Show the search and its list."""
        search = self.search
        self.ui.nextButton.setText(_("Stop") if search.running else _("Find the next case"))
        self.ui.nextLabel.setText(search.message)
        self.ui.nextLabel.setVisible(bool(search.message))
        bar = self.ui.nextProgressBar
        bar.setVisible(search.running)
        done = search.done / search.volumes if search.volumes else 0.0
        show_progress(bar, done, remaining(search.eta_s) or "%p%")
        table = self.ui.nextTable
        chosen = self._selected()
        self._shown = list(search.items)
        table.setRowCount(len(search.items))
        for row, item in enumerate(search.items):
            label = f"{item.path} *" if item.notes else item.path
            cells = (label, target_for(item.target).name("en"), f"{item.disagreement or 0.0:.3f}")
            for column, text in enumerate(cells):
                cell = qt.QTableWidgetItem(text)
                cell.setToolTip("\n".join(item.notes))
                table.setItem(row, column, cell)
            if chosen is not None and item.path == chosen.path:
                table.selectRow(row)
        table.setVisible(bool(search.items))
        table.horizontalHeader().setStretchLastSection(True)
        self._on_selection()

    def cleanup(self) -> None:
        """Let go of everything outside; a search ends, what it has measured stays."""
        self.search.close()
        self.loaded.clear()

    def _selected(self) -> NextItem | None:
        row = self.ui.nextTable.currentRow()
        return self._shown[row] if 0 <= row < len(self._shown) else None

    def _on_selection(self) -> None:
        self.ui.loadNextButton.setEnabled(self._selected() is not None)

    def _on_button(self) -> None:
        if self.search.running:
            self.search.stop()
        else:
            self.start()

    def _on_double_click(self, _row: int, _column: int) -> None:
        self.load()
