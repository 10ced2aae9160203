"""CTK's line for a path with a browse button, and its directory button."""

from __future__ import annotations

from typing import Any, ClassVar

import ctk
import qt
from PySide6.QtCore import Property, Signal

from .stand_ins import kept, stand_in


@stand_in(ctk)
class ctkPathLineEdit(qt.QWidget):
    """An editable combo box of paths with a button that opens a file dialog."""

    currentPathChanged = Signal(str)
    validInputChanged = Signal(bool)
    # the class's own names for QDir's filters
    _flags: ClassVar = {
        "Dirs": 1,
        "Files": 2,
        "Drives": 4,
        "NoSymLinks": 8,
        "Readable": 16,
        "Writable": 32,
        "Executable": 64,
    }

    def __init__(self, parent: Any = None) -> None:
        super().__init__(parent)
        self._combo = qt.QComboBox(self)
        self._combo.setEditable(True)
        self._combo.setInsertPolicy(qt.QComboBox.NoInsert)
        self._combo.setSizePolicy(qt.QSizePolicy.Expanding, qt.QSizePolicy.Fixed)
        self._combo.setMinimumContentsLength(8)
        self._browse = qt.QToolButton(self)
        self._browse.setText("...")
        row = qt.QHBoxLayout(self)
        row.setContentsMargins(0, 0, 0, 0)
        row.addWidget(self._combo, 1)
        row.addWidget(self._browse)
        self._valid = False
        self._combo.editTextChanged.connect(self._on_text)
        self._browse.clicked.connect(lambda: self.browse())

    def _on_text(self, text: str) -> None:
        # CTK's validator is ".+": an empty line is invalid, and currentPathChanged is told for valid ones only
        before, self._valid = self._valid, bool(text)
        if text:
            self.currentPathChanged.emit(text)
        if before != self._valid:
            self.validInputChanged.emit(self._valid)

    filters = kept(int, "filters", 0)
    options = kept(int, "options", 0)
    label = kept(str, "label", "")
    showBrowseButton = Property(
        bool, lambda self: not self._browse.isHidden(), lambda self, shown: self._browse.setVisible(shown)
    )
    currentPath = Property(str, lambda self: self._combo.currentText, lambda self, path: self._combo.setEditText(path))

    def browse(self) -> None:
        """Ask for a path."""
        only_folders = self.filters & 3 == self._flags["Dirs"]
        if only_folders:
            chosen = qt.QFileDialog.getExistingDirectory(self, "Select a directory", self.currentPath)
        else:
            chosen = qt.QFileDialog.getOpenFileName(self, "Select a file", self.currentPath)[0]
        if chosen:
            self.setCurrentPath(chosen)
