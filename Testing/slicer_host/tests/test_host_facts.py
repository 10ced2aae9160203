"""The stand-ins offer what Slicer's Python can reach of their classes, in Slicer 5.10 and 5.13, and nothing else."""

from __future__ import annotations

import inspect
from typing import Any

import ctk
import pytest
import qt
import slicer
from PySide6.QtCore import Property

from .. import __name__ as PACKAGE
from .. import as_version, facts, ui_loader

pytestmark = pytest.mark.usefixtures("app")
_OF_THE_HOST = frozenset({"stand_in", "staticMetaObject"})


def stand_ins() -> dict[str, type]:
    """Every stand-in under the name of its class."""
    from .. import application, file_io, layout, loading  # noqa: F401 - they register themselves
    from ..stand_ins import others

    return {**ui_loader.registry, **{name: cls for cls, name in others.items()}}


def own_members(cls: type) -> dict[str, Any]:
    """What a stand-in has beside what Qt gives it."""
    qt_base = next((base for base in cls.__mro__ if base.__module__.startswith("PySide6")), object)
    ours = [base for base in cls.__mro__[:-1] if base.__module__.startswith(PACKAGE)]
    members = {name: value for base in reversed(ours) for name, value in vars(base).items()}
    return {
        name: value
        for name, value in members.items()
        if not name.startswith("_") and name not in _OF_THE_HOST and not (callable(value) and hasattr(qt_base, name))
    }


@pytest.mark.parametrize("name", sorted(stand_ins()))
def test_every_member_of_a_stand_in_is_in_the_table(name: str, slicer_version: str) -> None:
    reach, wrong = facts.of(name), []
    for member, value in own_members(stand_ins()[name]).items():
        if isinstance(value, Property):
            writable = value.fset is not None
            if member not in reach.properties or (writable and not reach.properties[member]):
                wrong.append(f"property {member}")
        elif type(value).__name__ == "Signal":
            if member not in reach.signals:
                wrong.append(f"signal {member}")
        elif callable(value):
            if member not in reach.methods or not _takes_all(value, reach.methods[member]):
                wrong.append(f"method {member}")
        elif member not in reach.properties:
            wrong.append(f"attribute {member}")
    assert wrong == []


def _takes_all(method: Any, overloads: tuple[str, ...]) -> bool:
    """Whether the stand-in's method can be called with the arguments that the real one takes at most."""
    signature = inspect.signature(method)
    most = max(each.count(",") + 1 if each else 0 for each in overloads)
    try:
        signature.bind(None, *[None] * most)
    except TypeError:
        return False
    return True


@pytest.mark.parametrize("name", sorted(ui_loader.registry))
def test_a_stand_in_inherits_from_the_real_base(name: str) -> None:
    qt_base = next(base for base in stand_ins()[name].__mro__ if base.__module__.startswith("PySide6"))
    assert qt_base.__name__ == facts.of(name).qt_base


@pytest.mark.parametrize(
    ("make", "name"),
    [
        (lambda: ctk.ctkCollapsibleButton(), "setCollapsed"),
        (lambda: ctk.ctkPathLineEdit(), "setFilters"),
        (lambda: ctk.ctkSliderWidget(), "setRange"),
        (lambda: ctk.ctkSliderWidget(), "setSingleStep"),
        (lambda: ctk.ctkDoubleSpinBox(), "setMinimum"),
        (lambda: slicer.qMRMLNodeComboBox(), "setNoneEnabled"),
        (lambda: slicer.qMRMLNodeComboBox(), "nodes"),
        (lambda: slicer.app, "setTestingEnabled"),
    ],
)
def test_what_python_cannot_reach_is_refused_as_pythonqt_does(make: Any, name: str) -> None:
    with pytest.raises(AttributeError, match=f"has no attribute named '{name}'"):
        getattr(make(), name)
    assert not hasattr(make(), name)


def test_what_is_in_slicer_and_not_in_the_host_says_so() -> None:
    with pytest.raises(NotImplementedError, match="add it to its stand-in"):
        slicer.qMRMLSegmentEditorWidget().rotateSliceViewsToSegmentation()


def test_setters_that_are_slots_and_attributes_both_write() -> None:
    box, section, widget = ctk.ctkSliderWidget(), ctk.ctkCollapsibleButton(), ctk.ctkRangeWidget()
    box.setDecimals(1)
    box.maximum, box.singleStep = 7, 0.5
    section.collapsed = True
    widget.setRange(0, 9)
    widget.minimumValue = 3
    assert (box.decimals, box.maximum, section.collapsed, widget.minimumValue) == (1, 7, True, 3)


def test_the_versions_differ_where_slicers_do(slicer_version: str) -> None:
    box = slicer.qMRMLNodeComboBox()
    assert (slicer.app.majorVersion, slicer.app.minorVersion) == tuple(map(int, slicer_version.split(".")))
    if slicer_version == "5.10":
        with pytest.raises(ValueError, match="no signal"):
            box.connect("nodeAddedByUserAction(vtkMRMLNode*)", print)
        with pytest.raises(ImportError):
            __import__("slicer.packaging")
        assert callable(slicer.util.pip_install)
    else:
        with pytest.raises(NotImplementedError):
            box.connect("nodeAddedByUserAction(vtkMRMLNode*)", print)
        assert __import__("slicer.packaging")


def test_a_signal_is_connected_by_the_signature_of_the_header() -> None:
    box = slicer.qMRMLNodeComboBox()
    assert box.connect("currentNodeChanged(vtkMRMLNode*)", print)
    for wrong in ("currentNodeChanged(PyObject)", "currentNodeChanged(QObject*)", "nodeChanged()"):
        with pytest.raises(ValueError, match="no signal"):
            box.connect(wrong, print)
    assert qt.QLineEdit().connect("textChanged(QString)", print)


def test_an_unknown_version_is_refused() -> None:
    with pytest.raises(ValueError, match=r"5\.10 or 5\.13"), as_version("4.11"):
        pass
