"""The rules of code for PythonQt: found where they are broken, silent where they are kept, and kept by the module."""

from __future__ import annotations

from pathlib import Path

import pytest

from .pythonqt_lint import findings, plain_setters, product_files, ui_files, ui_findings

BROKEN = [
    (1, "title = self.ui.edit.text()"),
    (1, "if button.checked(): pass"),
    (1, "self._section.setCollapsed(True)"),
    (1, "self.ui.setupSection.setCollapsed(False)"),
    (1, "self.ui.rangeWidget.setMinimum(1)"),
    (1, "box = self.ui.opacitySlider\nbox.setRange(0, 1)"),
    (1, "self.ui.rangeWidget.setRange(1)"),
    (1, "nodes = self.ui.volumeSelector.nodes()"),
    (1, "node = self.ui.volumeSelector.currentNodeChangedTo"),
    (1, "path = self.ui.modelFolderEdit.currentPath()"),
    (1, "first, second = ctk.ctkSliderWidget(), ctk.ctkRangeWidget()\nsecond.setSuffix('mm')"),
    (1, "def begin(editor_widget):\n    editor_widget.setDefaultTerminologyEntry('x')"),
    (1, "name = slicer.app.mainApplicationName()"),
    (1, "slicer.app.setSomething(3)"),
    (2, "self.ui.promptSection.state = 3"),
    (2, "self.ui.rangeWidget.customSpinBoxesLimitsMin = 3"),
    (3, "self.ui.volumeSelector.connect('currentNodeChanged(QObject*)', self.f)"),
    (3, "CONNECTIONS = ((self.ui.modelFolderEdit, 'pathChanged(QString)', self.f),)"),
    (3, "self.ui.volumeSelector.connect('nodeAddedByUserAction(vtkMRMLNode*)', self.f)"),
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
    "self.ui.setupSection.collapsed = True\nbox = qt.QCheckBox('x', parent)\nbox.checked = True",
    "box = self.ui.rangeWidget\nbox.setRange(1, 3)\nbox.minimum = 2\nblocked = box.blockSignals(True)",
    "def f():\n    box = self.ui.rangeWidget\ndef g(box):\n    box.setMinimum(3)",
    "self.ui.volumeSelector.connect('currentNodeChanged(vtkMRMLNode*)', self.f)\nself.ui.setupSection.setEnabled(False)",
    "slicer.app.connect('aboutToQuit()', self.f)\nif slicer.app.testingEnabled(): slicer.app.processEvents()",
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


@pytest.mark.parametrize("path", ui_files(), ids=lambda path: path.name)
def test_the_ui_files_ask_for_what_the_widgets_have(path: Path) -> None:
    assert ui_findings(path) == []


def test_what_a_ui_file_asks_for_in_vain_is_told(tmp_path: Path) -> None:
    text = next(each for each in ui_files() if each.name == "PromptPanel.ui").read_text(encoding="utf-8")
    for before, after, said in (
        ('name="noneEnabled"', 'name="nothingEnabled"', "volumeSelector.nothingEnabled: qMRMLNodeComboBox has no such"),
        ("setMRMLScene(vtkMRMLScene*)", "useScene(vtkMRMLScene*)", "qMRMLNodeComboBox has no slot useScene"),
        ("ctkRangeWidget", "ctkRangeWidgetOfOurs", "ctkRangeWidgetOfOurs is not in the table"),
    ):
        assert before in text
        (tmp_path / "Panel.ui").write_text(text.replace(before, after), encoding="utf-8")
        assert any(each.startswith(said) or said in each for each in ui_findings(tmp_path / "Panel.ui"))


def test_setters_that_nothing_has_are_known() -> None:
    assert {"setCollapsed", "setNoneEnabled", "setHiddenNodeIDs"} <= plain_setters()
    assert not {"setChecked", "setRange", "setCurrentPath", "setMRMLScene"} & plain_setters()


def test_the_module_is_looked_at() -> None:
    assert {"signals.py"} <= {path.name for path in product_files()}
