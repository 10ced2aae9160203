"""The rules of code for PythonQt: found where they are broken, silent where they are kept."""

from __future__ import annotations

from pathlib import Path

import pytest

from ..pythonqt_lint import Finding, findings, main, plain_setters, ui_findings, widget_classes

# What the names hold in the examples below, and what must not be imported there.
HELD = {
    "ui.modelFolderEdit": "ctkPathLineEdit",
    "ui.opacitySlider": "ctkSliderWidget",
    "ui.promptSection": "ctkCollapsibleButton",
    "ui.rangeWidget": "ctkRangeWidget",
    "ui.setupSection": "ctkCollapsibleButton",
    "ui.volumeSelector": "qMRMLNodeComboBox",
    "editor_widget": "qMRMLSegmentEditorWidget",
}
FORBIDDEN = {"diffusers", "torch"}
UI = """<?xml version="1.0" encoding="UTF-8"?>
<ui version="4.0"><class>Panel</class>
<widget class="qMRMLWidget" name="Panel">
 <widget class="qMRMLNodeComboBox" name="volumeSelector"><property name="noneEnabled"><bool>true</bool></property></widget>
 <widget class="ctkRangeWidget" name="rangeWidget"><property name="maximum"><double>9.0</double></property></widget>
</widget>
<connections><connection><sender>Panel</sender><signal>mrmlSceneChanged(vtkMRMLScene*)</signal>
 <receiver>volumeSelector</receiver><slot>setMRMLScene(vtkMRMLScene*)</slot></connection></connections></ui>
"""


def found_in(source: str) -> list[Finding]:
    return findings(source, HELD, FORBIDDEN)


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
    assert rule in {each.rule for each in found_in(source)}


@pytest.mark.parametrize("source", KEPT)
def test_code_that_keeps_the_rules_passes(source: str) -> None:
    assert found_in(source) == []


def test_the_line_is_told() -> None:
    assert [each.line for each in found_in("a = 1\n\nimport torch\n")] == [3]


def test_what_a_ui_file_asks_for_in_vain_is_told(tmp_path: Path) -> None:
    path = tmp_path / "Panel.ui"
    path.write_text(UI, encoding="utf-8")
    assert ui_findings(path) == []
    for before, after, said in (
        ('name="noneEnabled"', 'name="nothingEnabled"', "volumeSelector.nothingEnabled: qMRMLNodeComboBox has no such"),
        ("setMRMLScene(vtkMRMLScene*)", "useScene(vtkMRMLScene*)", "qMRMLNodeComboBox has no slot useScene"),
        ("ctkRangeWidget", "ctkRangeWidgetOfOurs", "ctkRangeWidgetOfOurs is not in the table"),
    ):
        assert before in UI
        path.write_text(UI.replace(before, after), encoding="utf-8")
        assert any(each.startswith(said) or said in each for each in ui_findings(path))


def test_one_name_is_one_class(tmp_path: Path) -> None:
    first, second = tmp_path / "First.ui", tmp_path / "Second.ui"
    first.write_text(UI, encoding="utf-8")
    second.write_text(UI.replace("ctkRangeWidget", "ctkSliderWidget"), encoding="utf-8")
    assert widget_classes([first])["ui.rangeWidget"] == "ctkRangeWidget"
    with pytest.raises(ValueError, match=r"ui\.rangeWidget is a ctkRangeWidget and a ctkSliderWidget"):
        widget_classes([first, second])


def test_files_and_folders_are_listed_with_their_lines(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    module, panel = tmp_path / "Module.py", tmp_path / "UI" / "Panel.ui"
    panel.parent.mkdir()
    panel.write_text(UI, encoding="utf-8")
    module.write_text("def go(self):\n    self.ui.rangeWidget.minimum = 1\n", encoding="utf-8")
    assert main([str(module), str(panel.parent)]) == 0
    assert capsys.readouterr().out == ""
    module.write_text("import torch\nself.ui.rangeWidget.setMinimum(1)\neditor.setNoSuch(1)\n", encoding="utf-8")
    panel.write_text(UI.replace("noneEnabled", "nothingEnabled"), encoding="utf-8")
    more = ["--held", "editor=qMRMLSegmentEditorWidget", "--forbid", "torch"]
    assert main([str(tmp_path), *more]) == 1
    told = capsys.readouterr().out.splitlines()
    assert {each.split(": ")[0].removeprefix(str(tmp_path)) for each in told} == {
        "/Module.py:1", "/Module.py:2", "/Module.py:3", "/UI/Panel.ui",
    }  # fmt: skip


def test_setters_that_nothing_has_are_known() -> None:
    assert {"setCollapsed", "setNoneEnabled", "setHiddenNodeIDs"} <= plain_setters()
    assert not {"setChecked", "setRange", "setCurrentPath", "setMRMLScene"} & plain_setters()
