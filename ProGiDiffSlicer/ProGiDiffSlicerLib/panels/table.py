"""The table of proposals: one line each, with a thumbnail and a box that outlines it in the slice views."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import qt
from slicer.i18n import tr as _

from progidiff.proposals.proposals import MaskKey
from ProGiDiffSlicerLib.panels.listing import Line
from ProGiDiffSlicerLib.signals import Signal

THUMBNAIL_PX = 56
_SHOW, _PICTURE, _TITLE, _SCORE, _MILLILITRES, _AGREEMENT = range(6)
_MARGIN_PX = 4


class ProposalTable:
    """Lines of proposals in a QTableWidget.

    Attributes:
        selected: Signal(): another line is selected, or none.
        shownChanged: Signal(MaskKey, bool): the user ticked or cleared a line's box.
        activated: Signal(): a line was double-clicked.
    """

    def __init__(self, table: Any) -> None:
        self.selected = Signal()
        self.shownChanged = Signal()
        self.activated = Signal()
        self._table = table
        self._lines: list[Line] = []
        labels = [_("Show"), _("Slice"), _("Proposal"), _("Score"), _("mL"), _("Agreement")]
        table.setColumnCount(len(labels))
        table.setHorizontalHeaderLabels(labels)
        table.setIconSize(qt.QSize(THUMBNAIL_PX, THUMBNAIL_PX))
        table.verticalHeader().setVisible(False)
        table.verticalHeader().setDefaultSectionSize(THUMBNAIL_PX + 2 * _MARGIN_PX)
        header = table.horizontalHeader()
        # By the lines in sight: each cell that is written makes Qt measure its column again.
        header.setResizeContentsPrecision(0)
        for column in range(len(labels)):
            header.setSectionResizeMode(column, qt.QHeaderView.ResizeToContents)
        header.setSectionResizeMode(_TITLE, qt.QHeaderView.Stretch)
        header.setSectionResizeMode(_PICTURE, qt.QHeaderView.Fixed)
        table.setColumnWidth(_PICTURE, THUMBNAIL_PX + 3 * _MARGIN_PX)
        table.connect("itemSelectionChanged()", self._on_selection)
        table.connect("itemChanged(QTableWidgetItem*)", self._on_changed)
        table.connect("cellDoubleClicked(int,int)", self._on_double_click)

    @property
    def lines(self) -> list[Line]:
        """The lines from top to bottom."""
        return list(self._lines)

    def current(self) -> Line | None:
        """The selected line."""
        row = self._table.currentRow()
        return self._lines[row] if 0 <= row < len(self._lines) else None

    def set_lines(self, lines: Sequence[Line], selected: MaskKey | None, blinded: bool) -> None:
        """Show these lines and select one of them, the first where ``selected`` is not among them."""
        blocked = self._table.blockSignals(True)
        before, self._lines = self._lines, list(lines)
        same = [line.key for line in lines] == [line.key for line in before]
        self._table.setRowCount(len(lines))
        for column in (_SCORE, _AGREEMENT):
            self._table.setColumnHidden(column, blinded)
        for row, line in enumerate(lines):
            if not same:
                self._new_row(row)
            # A cell that says the same is left alone: many lines are refreshed each second while slices arrive.
            known = _texts(before[row]) if same else {}
            for column, text in _texts(line).items():
                if known.get(column) != text:
                    self._table.item(row, column).setText(text)
        keys = [line.key for line in lines]
        if lines:
            self._table.setCurrentCell(keys.index(selected) if selected in keys else 0, _TITLE)
        self._table.blockSignals(blocked)

    def select(self, position: int) -> None:
        """Select the line at a position from 0; one that is not there is passed over."""
        if 0 <= position < len(self._lines):
            self._table.setCurrentCell(position, _TITLE)

    def select_key(self, key: MaskKey) -> None:
        """Select a proposal where it is listed."""
        keys = [line.key for line in self._lines]
        if key in keys:
            self.select(keys.index(key))

    def set_shown(self, shown: set[MaskKey]) -> None:
        """Tick the boxes of these proposals and clear the others."""
        blocked = self._table.blockSignals(True)
        for row, line in enumerate(self._lines):
            state = qt.Qt.Checked if line.key in shown else qt.Qt.Unchecked
            self._table.item(row, _SHOW).setCheckState(state)
        self._table.blockSignals(blocked)

    def set_picture(self, key: MaskKey, pixmap: Any) -> None:
        """Put a thumbnail in a proposal's line, if it is still listed."""
        icon = qt.QIcon(pixmap)
        # The selected line's picture keeps its colours too.
        icon.addPixmap(pixmap, qt.QIcon.Selected)
        for row, line in enumerate(self._lines):
            if line.key == key:
                blocked = self._table.blockSignals(True)
                self._table.item(row, _PICTURE).setIcon(icon)
                self._table.blockSignals(blocked)

    def focus(self) -> None:
        """Give the table the keyboard."""
        self._table.setFocus()

    def cleanup(self) -> None:
        """Let go of the widget."""
        self._table.disconnect("itemSelectionChanged()", self._on_selection)
        self._table.disconnect("itemChanged(QTableWidgetItem*)", self._on_changed)
        self._table.disconnect("cellDoubleClicked(int,int)", self._on_double_click)
        for signal in (self.selected, self.shownChanged, self.activated):
            signal.clear()

    def _new_row(self, row: int) -> None:
        plain = qt.Qt.ItemIsEnabled | qt.Qt.ItemIsSelectable
        for column in range(self._table.columnCount):
            item = qt.QTableWidgetItem()
            item.setFlags(plain | qt.Qt.ItemIsUserCheckable if column == _SHOW else plain)
            if column in (_SCORE, _MILLILITRES, _AGREEMENT):
                item.setTextAlignment(qt.Qt.AlignRight | qt.Qt.AlignVCenter)
            self._table.setItem(row, column, item)
        self._table.item(row, _SHOW).setCheckState(qt.Qt.Unchecked)

    def _on_selection(self) -> None:
        self.selected.emit()

    def _on_changed(self, item: Any) -> None:
        row = item.row()
        if item.column() == _SHOW and row < len(self._lines):
            self.shownChanged.emit(self._lines[row].key, item.checkState() == qt.Qt.Checked)

    def _on_double_click(self, row: int, column: int) -> None:
        self.activated.emit()


def _texts(line: Line) -> dict[int, str]:
    """What the cells of a line say, by column."""
    return {_TITLE: line.title, _SCORE: line.score, _MILLILITRES: line.millilitres, _AGREEMENT: line.agreement}
