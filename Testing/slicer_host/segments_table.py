"""The table of segments: eye, colour, opacity, name."""

from __future__ import annotations

from typing import Any

import ctk
import qt
import slicer
import vtk
from PySide6.QtCore import Property, Signal

from .observers import Observers
from .stand_ins import kept, stand_in

_EYE, _COLOUR, _OPACITY, _NAME, _STATUS = range(5)
_STATUS_NAMES = ("Not started", "In progress", "Completed", "Flagged")


def eye_icon(open_: bool, colour: Any) -> Any:
    """An eye, open or closed."""
    picture = qt.QPixmap(18, 18)
    picture.fill(qt.QColor(0, 0, 0, 0))
    painter = qt.QPainter(picture)
    painter.setRenderHint(qt.QPainter.Antialiasing)
    pen = qt.QPen(colour)
    pen.setWidthF(1.5)
    painter.setPen(pen)
    if open_:
        painter.drawEllipse(qt.QRectF(1.5, 4.5, 15, 9))
        painter.setBrush(colour)
        painter.drawEllipse(qt.QRectF(6.5, 6.5, 5, 5))
    else:
        painter.drawArc(qt.QRectF(1.5, 2.5, 15, 10), 180 * 16, 180 * 16)
    painter.end()
    return qt.QIcon(picture)


@stand_in(slicer)
class qMRMLSegmentsTableView(slicer.qMRMLWidget):
    """Shows the segments of a segmentation node and follows it."""

    mrmlSceneChanged = Signal(object)
    selectionChanged = Signal(object, object)
    segmentAboutToBeModified = Signal(str)

    def __init__(self, parent: Any = None) -> None:
        super().__init__(parent)
        self._node: Any = None
        self._observers = Observers(self)
        self._ids: list[str] = []
        self._filling = False
        self._filter = qt.QLineEdit(self)
        self._filter.setPlaceholderText("Filter segments...")
        self._filter.setVisible(False)
        self._table = qt.QTableWidget(0, 5, self)
        self._table.setHorizontalHeaderLabels(["", "", "Opacity", "Name", "Status"])
        self._table.verticalHeader().setVisible(False)
        self._table.setSelectionBehavior(qt.QAbstractItemView.SelectRows)
        self._table.setSelectionMode(qt.QAbstractItemView.ExtendedSelection)
        header = self._table.horizontalHeader()
        for column in (_EYE, _COLOUR, _OPACITY, _STATUS):
            header.setSectionResizeMode(column, qt.QHeaderView.ResizeToContents)
        header.setSectionResizeMode(_NAME, qt.QHeaderView.Stretch)
        column = qt.QVBoxLayout(self)
        column.setContentsMargins(0, 0, 0, 0)
        column.addWidget(self._filter)
        column.addWidget(self._table)
        self._table.setColumnHidden(_STATUS, True)
        self._table.itemSelectionChanged.connect(self._on_selection)
        self._table.cellClicked.connect(self._on_cell)
        self._table.itemChanged.connect(self._on_item)
        self._filter.textChanged.connect(lambda _text: self._refresh())

    filterBarVisible = kept(bool, "filterBar", False, None, lambda self, on: self._filter.setVisible(on))
    readOnly = kept(bool, "readOnly", False, None, lambda self, _on: self._refresh())
    jumpToSelectedSegmentEnabled = kept(bool, "jump", False)
    selectionMode = kept(
        int,
        "selectionMode",
        3,
        None,
        lambda self, mode: self._table.setSelectionMode(qt.QAbstractItemView.SelectionMode(mode)),
    )
    textFilter = Property(str, lambda self: self._filter.text, lambda self, text: self._filter.setText(text))
    segmentCount = Property(int, lambda self: len(self._ids))

    def segmentationNode(self) -> Any:
        """The node, or None."""
        return self._node

    def setSegmentationNode(self, node: Any) -> None:
        """Show this node."""
        self._observers.clear()
        self._node = node
        events = (
            (vtk.vtkCommand.ModifiedEvent, slicer.vtkMRMLDisplayableNode.DisplayModifiedEvent,
             slicer.vtkSegmentation.SegmentAdded, slicer.vtkSegmentation.SegmentRemoved,
             slicer.vtkSegmentation.SegmentModified, slicer.vtkSegmentation.SegmentsOrderModified)
            if node is not None else ()
        )  # fmt: skip
        for event in events:
            self._observers.add(node, event, self._refresh)
        self._refresh()

    def rowForSegmentID(self, segmentID: str) -> int:
        """Its row, or -1."""
        return self._ids.index(segmentID) if segmentID in self._ids else -1

    def selectedSegmentIDs(self) -> list[str]:
        """What is selected."""
        return [self._ids[index.row()] for index in self._table.selectionModel().selectedRows()]

    def setSelectedSegmentIDs(self, segmentIDs: Any) -> None:
        """Select these."""
        model, flags = self._table.selectionModel(), qt.QItemSelectionModel.Select | qt.QItemSelectionModel.Rows
        self._table.clearSelection()
        for row in (self.rowForSegmentID(str(each)) for each in segmentIDs):
            if row >= 0:
                model.select(self._table.model().index(row, _NAME), flags)

    def clearSelection(self) -> None:
        """Select nothing."""
        self._table.clearSelection()

    # -- the table ----------------------------------------------------------------------------------------------------

    def _refresh(self) -> None:
        selected = self.selectedSegmentIDs() if self._ids else []
        self._filling = True
        segmentation = self._node.GetSegmentation() if self._node is not None else None
        count = segmentation.GetNumberOfSegments() if segmentation is not None else 0
        ids = [segmentation.GetNthSegmentID(index) for index in range(count)]
        wanted = self._filter.text.casefold()
        self._ids = [each for each in ids if wanted in segmentation.GetSegment(each).GetName().casefold()]
        self._table.setRowCount(len(self._ids))
        for row, segment_id in enumerate(self._ids):
            self._fill_row(row, segment_id, segmentation.GetSegment(segment_id))
        self.setSelectedSegmentIDs(selected)
        self._filling = False

    def _fill_row(self, row: int, segment_id: str, segment: Any) -> None:
        display = self._node.GetDisplayNode()
        shown = bool(display.GetSegmentVisibility(segment_id)) if display is not None else True
        opacity = display.GetSegmentOpacity3D(segment_id) if display is not None else 1.0
        ink = self._table.palette.color(qt.QPalette.Text)
        eye, colour = qt.QTableWidgetItem(), qt.QTableWidgetItem()
        eye.setIcon(eye_icon(shown, ink))
        swatch = qt.QPixmap(16, 16)
        swatch.fill(qt.QColor.fromRgbF(*segment.GetColor()))
        colour.setIcon(qt.QIcon(swatch))
        number, name = qt.QTableWidgetItem(f"{opacity:.2f}"), qt.QTableWidgetItem(segment.GetName())
        status = qt.QTableWidgetItem(_STATUS_NAMES[slicer.vtkSlicerSegmentationsModuleLogic.GetSegmentStatus(segment)])
        fixed = qt.Qt.ItemIsEnabled | qt.Qt.ItemIsSelectable
        for column, item in enumerate((eye, colour, number, name, status)):
            editable = column == _NAME and not self.readOnly
            item.setFlags(fixed | qt.Qt.ItemIsEditable if editable else fixed)
            self._table.setItem(row, column, item)

    def _on_selection(self) -> None:
        if not self._filling:
            self.selectionChanged.emit(self._table.selectionModel().selection, qt.QItemSelection())

    def _on_cell(self, row: int, column: int) -> None:
        display = self._node.GetDisplayNode() if self._node is not None else None
        if column == _EYE and display is not None:
            segment_id = self._ids[row]
            display.SetSegmentVisibility(segment_id, not display.GetSegmentVisibility(segment_id))

    def _on_item(self, item: Any) -> None:
        if not self._filling and item.column() == _NAME:
            segment_id = self._ids[item.row()]
            self.segmentAboutToBeModified.emit(segment_id)
            self._node.GetSegmentation().GetSegment(segment_id).SetName(item.text())


@stand_in(slicer)
class qMRMLSegmentationShow3DButton(ctk.ctkMenuButton):
    """Shows the segmentation in 3D while it is pressed."""

    def __init__(self, parent: Any = None) -> None:
        super().__init__(parent)
        self._node: Any = None
        self.setText("Show 3D")
        self.setCheckable(True)
        self.toggled.connect(self._on_toggled)

    locked = kept(bool, "locked", False, None, lambda self, on: self.setEnabled(not on))

    def segmentationNode(self) -> Any:
        """The node, or None."""
        return self._node

    def setSegmentationNode(self, node: Any) -> None:
        """Act on this node."""
        self._node = node
        self.setEnabled(node is not None)

    def _on_toggled(self, on: bool) -> None:
        display = self._node.GetDisplayNode() if self._node is not None else None
        if on and self._node is not None:
            self._node.CreateClosedSurfaceRepresentation()
        if display is not None:
            display.SetVisibility3D(on)
