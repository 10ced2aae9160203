"""The host's Qt behaves as PythonQt does: what Slicer refuses is refused here too."""

from __future__ import annotations

import sys
import threading
from collections.abc import Callable
from typing import Any

import ctk
import pytest
import qt
import slicer
import vtk

from .. import collected_exceptions, spin

pytestmark = pytest.mark.usefixtures("app")


def test_properties_are_attributes_and_setters_stay_methods() -> None:
    edit = qt.QLineEdit()
    edit.setText("liver")
    assert edit.text == "liver"
    with pytest.raises(TypeError, match="not callable"):
        edit.text()
    edit.text = "spleen"
    assert edit.displayText == "spleen"


@pytest.mark.parametrize(
    ("make", "name", "expected"),
    [
        (lambda: qt.QCheckBox("a"), "checked", False),
        (lambda: qt.QSpinBox(), "maximum", 99),
        (lambda: qt.QComboBox(), "count", 0),
        (lambda: qt.QProgressBar(), "textVisible", True),
        (lambda: qt.QTableWidget(3, 2), "rowCount", 3),
        (lambda: qt.QTimer(), "singleShot", False),
        (lambda: qt.QTimer(), "active", False),
        (lambda: qt.QVBoxLayout(), "spacing", -1),
        (lambda: qt.QItemSelectionModel(), "hasSelection", False),
        (lambda: qt.QGroupBox("Prompt"), "title", "Prompt"),
    ],
)
def test_properties_of_many_classes(make: Any, name: str, expected: object) -> None:
    assert getattr(make(), name) == expected


def test_a_static_method_of_the_same_name_stays(spin: Any) -> None:
    shots: list[int] = []
    qt.QTimer.singleShot(0, lambda: shots.append(1))
    spin(lambda: shots)
    timer = qt.QTimer()
    timer.setSingleShot(True)
    assert timer.singleShot


def test_new_attributes_on_cpp_objects_are_refused() -> None:
    button = qt.QPushButton("Propose")
    with pytest.raises(AttributeError, match="creating new attributes on C\\+\\+ objects is not allowed"):
        button.proposals = 8
    with pytest.raises(AttributeError, match="can not be overwritten"):
        button.click = lambda: None
    with pytest.raises(AttributeError, match="not writable"):
        qt.QComboBox().count = 3


@pytest.mark.parametrize("wrong", [None, 3, __import__("pathlib").Path("x"), __import__("numpy").str_("x")])
def test_a_text_property_takes_texts_only(wrong: object) -> None:
    with pytest.raises(AttributeError, match="does not accept"):
        qt.QLineEdit().text = wrong


def test_connect_by_signature_passes_as_many_arguments_as_are_wanted() -> None:
    box, got = qt.QComboBox(), []
    box.addItems(["a", "b", "c"])

    def without() -> None:
        got.append("called")

    box.connect("currentIndexChanged(int)", got.append)
    box.connect("currentIndexChanged(int)", without)
    box.currentIndex = 2
    assert got == [2, "called"]
    assert box.disconnect("currentIndexChanged(int)", without)
    assert not box.disconnect("currentIndexChanged(int)", without)
    box.currentIndex = 1
    assert got == [2, "called", 1]


def test_a_bound_method_is_called_without_the_checked_state_it_does_not_take() -> None:
    class Panel:
        clicks = 0

        def on_click(self) -> None:
            self.clicks += 1

    panel, button = Panel(), qt.QPushButton("x")
    button.connect("clicked()", panel.on_click)
    button.clicked.connect(panel.on_click)
    button.click()
    assert panel.clicks == 2


@pytest.mark.parametrize("signature", ["clicked", "clicked(int)", "pressedTwice()", "clicked(bool, bool)"])
def test_a_wrong_signature_is_refused(signature: str) -> None:
    with pytest.raises(ValueError, match="signa"):
        qt.QPushButton("x").connect(signature, lambda: None)


def test_enumerations_without_scope_on_class_and_object() -> None:
    label = qt.QLabel("x")
    label.setAlignment(qt.Qt.AlignRight | qt.Qt.AlignVCenter)
    assert label.alignment == qt.Qt.AlignRight | qt.Qt.AlignVCenter
    process = qt.QProcess()
    assert process.state() == process.NotRunning == qt.QProcess.NotRunning


def test_names_that_pythonqt_adds_and_that_it_lacks() -> None:
    widget = qt.QWidget()
    widget.name = "panel"
    assert widget.objectName == "panel"
    assert widget.className() == "QWidget"
    assert callable(qt.QDialog().exec_)
    for missing in ("Signal", "Slot", "Property"):
        assert not hasattr(qt, missing)


def breaks(*_arguments: Any) -> None:
    raise ZeroDivisionError


class Breaking:
    def __del__(self) -> None:
        breaks()


class BreakingWidget(qt.QWidget):
    def paintEvent(self, _event: Any) -> None:
        breaks()


def by_observer() -> None:
    where = vtk.vtkObject()
    where.AddObserver("ModifiedEvent", breaks)
    where.Modified()


def by_observer_with_data() -> None:
    scene = slicer.vtkMRMLScene()

    @vtk.calldata_type(vtk.VTK_OBJECT)
    def added(_caller: Any, _event: str, _node: Any) -> None:
        breaks()

    scene.AddObserver(scene.NodeAddedEvent, added)
    scene.AddNode(slicer.vtkMRMLScalarVolumeNode())


def by_signal_of_a_stand_in() -> None:
    line = ctk.ctkPathLineEdit()
    line.connect("currentPathChanged(QString)", breaks)
    line.setCurrentPath("x")


def by_property_of_a_stand_in() -> None:
    box = ctk.ctkCollapsibleButton()
    box.connect("contentsCollapsed(bool)", breaks)
    box.collapsed = True


def by_click(signature: bool) -> None:
    button = qt.QPushButton("x")
    if signature:
        button.connect("clicked()", breaks)
    else:
        button.clicked.connect(breaks)
    button.click()


def by_process() -> None:
    process, ends = qt.QProcess(), []
    process.connect("finished(int,QProcess::ExitStatus)", breaks)
    process.connect("finished(int,QProcess::ExitStatus)", lambda *values: ends.append(values))
    process.start(sys.executable, ["-c", ""])
    spin(lambda: ends)


def by_timer() -> None:
    ends: list[int] = []
    qt.QTimer.singleShot(0, breaks)
    qt.QTimer.singleShot(1, lambda: ends.append(1))
    spin(lambda: ends)


def by_thread() -> None:
    thread = threading.Thread(target=breaks)
    thread.start()
    thread.join()


@pytest.mark.parametrize(
    "way",
    [
        pytest.param(lambda: by_click(True), id="slot by signature"),
        pytest.param(lambda: by_click(False), id="slot"),
        pytest.param(by_signal_of_a_stand_in, id="signal of a stand-in"),
        pytest.param(by_property_of_a_stand_in, id="property of a stand-in"),
        pytest.param(by_observer, id="observer"),
        pytest.param(by_observer_with_data, id="observer with a node"),
        pytest.param(by_process, id="process"),
        pytest.param(by_timer, id="timer"),
        pytest.param(lambda: BreakingWidget().grab(), id="painting"),
        pytest.param(lambda: Breaking() and None, id="deletion"),
        pytest.param(by_thread, id="thread"),
    ],
)
def test_an_exception_fails_the_test_wherever_it_is_raised(way: Callable[[], Any], monkeypatch: pytest.MonkeyPatch) -> None:
    """Qt, VTK and Python print it and go on, which ``collected_exceptions`` sees, or it comes out of the event loop."""
    with collected_exceptions(monkeypatch) as raised:
        try:
            way()
        except ZeroDivisionError as error:
            raised.append(repr(error))
    assert len(raised) == 1
    assert "ZeroDivisionError" in raised[0]
