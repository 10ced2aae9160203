"""The rules of code for PythonQt: found where they are broken, silent where they are kept, and kept by the module."""

from __future__ import annotations

from pathlib import Path

import pytest

from .pythonqt_lint import findings, product_files

BROKEN = [
    (1, "title = self.ui.edit.text()"),
    (1, "if button.checked(): pass"),
    (2, "self.button = qt.QPushButton('x', parent)\nself.button.state_of_mine = 3"),
    (2, "self.ui.table.rows_of_mine = []"),
    (3, "button.connect('clicked', self.onClick)"),
    (3, "button.clicked.connect(lambda checked=False, row=3: self.go(row))"),
    (3, "button.clicked.connect(functools.partial(self.go, 3))"),
    (4, "label.setAlignment(qt.Qt.AlignmentFlag.AlignLeft)"),
    (4, "if process.state() == qt.QProcess.ProcessState.Running: pass"),
    (4, "code = qt.Qt.AlignLeft.value"),
    (4, "code = process.state().value"),
    (5, "text = process.readAllStandardOutput().decode()"),
    (5, "line = bytes(process.readAllStandardError())"),
    (5, "self.ui.path.setCurrentPath(Path('x'))"),
    (5, "self.ui.slider.setValue(np.float32(3))"),
    (6, "label = qt.QLabel(text='x', parent=self)"),
    (6, "self.timer = qt.QTimer()"),
    (6, "qt.QTimer(self.parent)"),
    (7, "done = qt.Signal(int)"),
    (7, "self.thread = qt.QThread(parent)"),
    (7, "class Rows(qt.QAbstractTableModel):\n    pass"),
    (7, "import torch"),
    (7, "from diffusers import UNet2DModel"),
    (8, "slicer.app.layoutManager().resetSliceViews()"),
    (8, "slicer.util.mainWindow().show()"),
    (8, "dialog.exec()"),
    (8, "class A:\n    def go(self, node):\n        self.tag = node.AddObserver('ModifiedEvent', self.go)"),
    (9, "key = qt.QShortcut(qt.QKeySequence('1'), widget)"),
    (9, "key.setContext(qt.Qt.ApplicationShortcut)"),
]
KEPT = [
    "title = self.ui.edit.text",
    "name = table.item(0, 1).text()\nother = tableItem.text()",
    "self.ui.edit.setText('liver')\nself.ui.box.setChecked(True)",
    "self.ui.section.collapsed = True\nbox = qt.QCheckBox('x', parent)\nbox.checked = True",
    "setting = settings.value('ProGiDiff/device')",
    "self.value = 3\nrow.text = 'x'",
    "button.connect('clicked()', self.onClick)\nbutton.clicked.connect(self.onClick)",
    "button.clicked.connect(lambda: self.go(3))",
    "label.setAlignment(qt.Qt.AlignLeft | qt.Qt.AlignVCenter)\nok = state == qt.QProcess.Running",
    "data = bytes(process.readAllStandardOutput().data())",
    "self.ui.path.setCurrentPath(str(Path('x')))\nself.ui.slider.setValue(float(3))",
    "self.timer = qt.QTimer(self.parent)\nlabel = qt.QLabel('x', parent)",
    "manager = slicer.app.layoutManager()\nif manager is not None:\n    manager.resetSliceViews()",
    "dialog.exec_()",
    "class A:\n    def a(self, n):\n        self.t = n.AddObserver('e', self.a)\n"
    "    def b(self, n):\n        n.RemoveObserver(self.t)",
    "def f(w):\n    k = qt.QShortcut(qt.QKeySequence('1'), w)\n"
    "    k.setContext(qt.Qt.WidgetWithChildrenShortcut)\n    return k",
    "from ProGiDiffSlicerLib.signals import Signal\nimport numpy as np",
]


@pytest.mark.parametrize(("rule", "source"), BROKEN)
def test_a_broken_rule_is_found(rule: int, source: str) -> None:
    assert rule in {each.rule for each in findings(source)}


@pytest.mark.parametrize("source", KEPT)
def test_code_that_keeps_the_rules_passes(source: str) -> None:
    assert findings(source) == []


def test_the_line_is_told() -> None:
    assert [each.line for each in findings("a = 1\n\nimport torch\n")] == [3]


@pytest.mark.parametrize("path", product_files(), ids=lambda path: path.name)
def test_the_module_keeps_the_rules(path: Path) -> None:
    found = findings(path.read_text(encoding="utf-8"))
    assert not found, "\n".join(f"line {each.line}: rule {each.rule}: {each.message}" for each in found)


def test_the_module_is_looked_at() -> None:
    assert {"signals.py"} <= {path.name for path in product_files()}
