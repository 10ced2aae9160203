"""What the Segment Editor looks like: selectors, table, effect buttons, masking, undo."""

from __future__ import annotations

from typing import Any

import qt
import slicer

from .stand_ins import forwarded, kept

EFFECTS = (
    "Threshold", "Paint", "Draw", "Erase", "Level tracing", "Grow from seeds", "Fill between slices", "Margin", "Hollow",
    "Smoothing", "Scissors", "Islands", "Logical operators", "Mask volume",
)  # fmt: skip
_SEGMENTATION_NODE = slicer.vtkMRMLSegmentationNode
_MASK_MODES = (
    (_SEGMENTATION_NODE.EditAllowedEverywhere, "Everywhere"),
    (_SEGMENTATION_NODE.EditAllowedInsideAllSegments, "Inside all segments"),
    (_SEGMENTATION_NODE.EditAllowedInsideVisibleSegments, "Inside all visible segments"),
    (_SEGMENTATION_NODE.EditAllowedOutsideAllSegments, "Outside all segments"),
    (_SEGMENTATION_NODE.EditAllowedOutsideVisibleSegments, "Outside all visible segments"),
)
_OVERWRITE = ("All segments", "Visible segments", "None")


class SegmentEditorLook(slicer.qMRMLWidget):
    """The widgets of the Segment Editor and which of them are shown."""

    def __init__(self, parent: Any = None) -> None:
        super().__init__(parent)
        self._segmentations = slicer.qMRMLNodeComboBox(self)
        self._segmentations.nodeTypes = ["vtkMRMLSegmentationNode"]
        self._segmentations.noneEnabled = True
        self._volumes = slicer.qMRMLNodeComboBox(self)
        self._volumes.nodeTypes = ["vtkMRMLScalarVolumeNode"]
        self._volumes.hideChildNodeTypes = ["vtkMRMLLabelMapVolumeNode"]
        self._volumes.addEnabled = False
        self._volumes.noneEnabled = True
        self._table = slicer.qMRMLSegmentsTableView(self)
        self._effects = qt.QButtonGroup(self)
        self._build()

    effectColumnCount = kept(int, "columns", 2, None, lambda self, _count: self._place_effects())
    segmentationNodeSelectorVisible = kept(
        bool, "segmentationSelector", True, None, lambda self, on: self._form.setRowVisible(self._segmentations, on)
    )
    sourceVolumeNodeSelectorVisible = kept(
        bool, "volumeSelector", True, None, lambda self, on: self._form.setRowVisible(self._volumes, on)
    )
    jumpToSelectedSegmentEnabled = forwarded(bool, "jumpToSelectedSegmentEnabled", "_table")

    def _build(self) -> None:
        column = qt.QVBoxLayout(self)
        column.setContentsMargins(0, 0, 0, 0)
        self._form = qt.QFormLayout()
        self._form.addRow("Segmentation:", self._segmentations)
        self._form.addRow("Source volume:", self._volumes)
        column.addLayout(self._form)
        row = qt.QHBoxLayout()
        self._add, self._remove = qt.QPushButton("Add", self), qt.QPushButton("Remove", self)
        self._show_3d = slicer.qMRMLSegmentationShow3DButton(self)
        for each in (self._add, self._remove, self._show_3d):
            row.addWidget(each)
        row.addStretch(1)
        column.addLayout(row)
        self._table.setMinimumHeight(90)
        column.addWidget(self._table)
        column.addWidget(self._effect_box())
        column.addWidget(self._masking_box())
        row = qt.QHBoxLayout()
        self._undo, self._redo = qt.QPushButton("Undo", self), qt.QPushButton("Redo", self)
        row.addWidget(self._undo)
        row.addWidget(self._redo)
        column.addLayout(row)

    def _effect_box(self) -> Any:
        box = qt.QGroupBox("Effects", self)
        self._grid = qt.QGridLayout(box)
        self._grid.setSpacing(2)
        for index, name in enumerate(("None", *EFFECTS)):
            button = qt.QToolButton(box)
            button.setText(name)
            button.setCheckable(True)
            button.setObjectName("" if name == "None" else name)
            button.setSizePolicy(qt.QSizePolicy.Expanding, qt.QSizePolicy.Fixed)
            self._effects.addButton(button, index)
        self._place_effects()
        return box

    def _masking_box(self) -> Any:
        self._masking = qt.QGroupBox("Masking", self)
        rows = qt.QFormLayout(self._masking)
        self._mask_mode, self._overwrite = qt.QComboBox(self), qt.QComboBox(self)
        for mode, text in _MASK_MODES:
            self._mask_mode.addItem(text, mode)
        self._overwrite.addItems(list(_OVERWRITE))
        rows.addRow("Editable area:", self._mask_mode)
        rows.addRow("Modify other segments:", self._overwrite)
        return self._masking

    def _place_effects(self) -> None:
        columns = max(1, self.effectColumnCount) * 2
        for button in self._effects.buttons():
            self._grid.removeWidget(button)
            button.setVisible(False)
        for place, name in enumerate(["", *EFFECTS]):
            button = next(each for each in self._effects.buttons() if each.name == name)
            self._grid.addWidget(button, place // columns, place % columns)
            button.setVisible(True)
