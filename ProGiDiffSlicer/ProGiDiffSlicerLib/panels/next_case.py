"""The part of the Tuning panel that looks for the volume to correct next."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import qt
import slicer
from slicer.i18n import tr as _

from progidiff.errors import ProGiDiffError
from progidiff.targets import target_for
from ProGiDiffSlicerLib.logic.next_case import NextCase, NextItem
from ProGiDiffSlicerLib.panels.progress import remaining
from ProGiDiffSlicerLib.panels.status_line import StatusLine
from ProGiDiffSlicerLib.services import Services
from ProGiDiffSlicerLib.signals import Signal
from ProGiDiffSlicerLib.worker.lines import LineProcess

_PROGRESS_STEPS = 1000


class NextCasePart:
    """Folder, search, and the list of volumes.

    Attributes:
        search: the search in its process.
        loaded: Signal(volume node): the user has loaded a volume of the list.
    """

    def __init__(
        self,
        ui: Any,
        services: Services,
        status: StatusLine,
        prompt: Callable[[], str],
        adapter: Callable[[], tuple[str, bool]],
    ) -> None:
        """``prompt`` says what to look for, ``adapter`` with which adapter (folder, even if it is worse)."""
        self.ui = ui
        self.search = NextCase(services.settings, LineProcess(services.owner))
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
        self._connections = (
            (ui.nextButton, "clicked()", self._on_button),
            (ui.loadNextButton, "clicked()", self.load),
            (table, "cellDoubleClicked(int,int)", self._on_double_click),
            (table, "itemSelectionChanged()", self._on_selection),
        )
        for widget, signature, slot in self._connections:
            widget.connect(signature, slot)
        self.search.changed.connect(self.refresh)
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
            volume = slicer.util.loadVolume(item.path, {})
        except Exception as error:  # the readers of Slicer raise bare RuntimeError and others
            text = _("{volume} could not be loaded ({reason}); load it with Add Data or the DICOM module.")
            self._status.say(text.format(volume=item.label, reason=error))
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
        bar.setValue(int(_PROGRESS_STEPS * search.done / search.volumes) if search.volumes else 0)
        bar.setFormat(remaining(search.eta_s) or "%p%")
        table = self.ui.nextTable
        chosen = self._selected()
        self._shown = list(search.items)
        table.setRowCount(len(search.items))
        for row, item in enumerate(search.items):
            label = f"{item.label} *" if item.notes else item.label
            cells = (label, target_for(item.target).name("en"), f"{item.disagreement:.3f}")
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
        for widget, signature, slot in self._connections:
            widget.disconnect(signature, slot)
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
