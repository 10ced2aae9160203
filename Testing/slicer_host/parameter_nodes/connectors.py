"""Which widget can show which type of parameter: the same pairs as in Slicer, and no others."""

from __future__ import annotations

import enum
import pathlib
from collections.abc import Callable
from typing import Any

import ctk
import qt
import slicer

from .annotations import (
    Choice,
    Decimals,
    Maximum,
    Minimum,
    RangeBounds,
    SingleStep,
    WithinRange,
    findFirstAnnotation,
    members_of_union,
    splitAnnotations,
)
from .packs import FloatRange


class GuiConnector:
    """One widget that shows one parameter, and the signal that says that the user changed it."""

    def __init__(self, widget: Any, signal: str | None, read: Callable[[], Any], write: Callable[[Any], None]) -> None:
        self._widget = widget
        self._signal = signal
        self.read = read
        self.write = write
        self._callback: Callable[[], None] | None = None

    def widget(self) -> Any:
        """The widget."""
        return self._widget

    def onChanged(self, callback: Callable[[], None] | None) -> None:
        """Call ``callback`` when the user changes the value; None: no more."""
        if self._signal is not None:
            signal = getattr(self._widget, self._signal)
            if self._callback is not None:
                signal.disconnect(self.changed)
            if callback is not None:
                signal.connect(self.changed)
        self._callback = callback

    def changed(self) -> None:
        """Pass the change on."""
        if self._callback is not None:
            self._callback()


def _by_property(
    widget: Any, signal: str | None, name: str, kind: Callable[[Any], Any] = lambda value: value
) -> GuiConnector:
    return GuiConnector(widget, signal, lambda: kind(getattr(widget, name)), lambda value: setattr(widget, name, value))


def createGuiConnector(widget: Any, datatype: Any) -> GuiConnector:
    """The connector for a parameter of ``datatype`` in ``widget``.

    Raises:
        RuntimeError: Slicer has none for that pair, or the widget needs a range or choices that the annotations do not give.
    """
    bare, annotations = splitAnnotations(datatype)
    cls = type(widget)
    if bare is bool and cls in (qt.QCheckBox, ctk.ctkCheckBox):
        return _by_property(widget, "stateChanged", "checked")
    if bare is bool and cls in (qt.QPushButton, ctk.ctkCheckablePushButton):
        widget.checkable = True
        return _by_property(widget, "toggled", "checked")
    if bare is int and cls in (qt.QSlider, qt.QSpinBox):
        _set_step_and_range(widget, annotations, (-(2**31), 2**31 - 1), cls is qt.QSlider)
        return _by_property(widget, "valueChanged", "value", int)
    if bare in (int, float) and cls in _number_widgets():
        _set_decimals(widget, annotations, bare)
        bounded = cls in (ctk.ctkSliderWidget, slicer.qMRMLSliderWidget)
        _set_step_and_range(widget, annotations, (float("-inf"), float("inf")), bounded)
        return _by_property(widget, "valueChanged", "value", bare)
    if cls in (qt.QComboBox, ctk.ctkComboBox):
        return _combo_box(widget, datatype, bare, annotations)
    if bare is str and cls is qt.QLineEdit:
        # Only when it differs: writing moves the cursor to the end.
        return GuiConnector(widget, "textChanged", lambda: widget.text, lambda text: _set_text_if_other(widget, text))
    if bare is str and cls is qt.QLabel:
        return _by_property(widget, None, "text")
    if bare is str and cls is qt.QTextEdit:
        return GuiConnector(widget, "textChanged", lambda: widget.toPlainText(), lambda text: widget.setPlainText(text))
    if bare is FloatRange and cls in (ctk.ctkRangeWidget, ctk.ctkDoubleRangeSlider, slicer.qMRMLRangeWidget):
        return _range(widget, annotations)
    if (
        isinstance(bare, type)
        and issubclass(bare, pathlib.PurePath)
        and cls in (ctk.ctkPathLineEdit, ctk.ctkDirectoryButton)
    ):
        name = "currentPath" if cls is ctk.ctkPathLineEdit else "directory"
        return GuiConnector(
            widget, f"{name}Changed", lambda: bare(getattr(widget, name)), lambda path: setattr(widget, name, str(path))
        )
    node_types = _node_types(bare)
    if cls is slicer.qMRMLNodeComboBox and node_types:
        widget.nodeTypes = node_types
        return GuiConnector(widget, "currentNodeChanged", widget.currentNode, widget.setCurrentNode)
    raise RuntimeError(f"Unable to create GUI connector from datatype '{datatype}' to widget type '{cls}'.")


def _number_widgets() -> tuple[type, ...]:
    return (
        qt.QDoubleSpinBox, ctk.ctkSliderWidget, slicer.qMRMLSliderWidget, ctk.ctkDoubleSlider, ctk.ctkDoubleSpinBox,
        slicer.qMRMLSpinBox,
    )  # fmt: skip


def _set_text_if_other(widget: Any, text: str) -> None:
    if widget.text != text:
        widget.text = text


def _set_decimals(widget: Any, annotations: tuple[Any, ...], bare: type) -> None:
    decimals = findFirstAnnotation(annotations, Decimals)
    if isinstance(widget, ctk.ctkDoubleSlider):
        return
    if bare is int:
        widget.decimals = 0
    elif decimals is not None:
        widget.decimals = decimals.value


def _set_step_and_range(
    widget: Any, annotations: tuple[Any, ...], unbounded: tuple[Any, Any], must_be_bounded: bool
) -> None:
    step = findFirstAnnotation(annotations, SingleStep)
    if step is not None:
        widget.singleStep = step.value
    within = findFirstAnnotation(annotations, WithinRange)
    lower = findFirstAnnotation(annotations, Minimum) if within is None else within
    upper = findFirstAnnotation(annotations, Maximum) if within is None else within
    if must_be_bounded and (lower is None or upper is None):
        raise RuntimeError(f"Cannot have a connection to {type(widget).__name__} where the type is unbounded.")
    widget.minimum = unbounded[0] if lower is None else lower.minimum
    widget.maximum = unbounded[1] if upper is None else upper.maximum


def _combo_box(widget: Any, datatype: Any, bare: Any, annotations: tuple[Any, ...]) -> GuiConnector:
    if isinstance(bare, type) and issubclass(bare, enum.Enum):
        label = getattr(bare, "label", lambda value: value.name)
        choices, labels = list(bare), [label(each) for each in bare]
        current = widget.currentIndex
    elif bare in (int, float, str, bool):
        choice = findFirstAnnotation(annotations, Choice)
        if choice is None:
            raise RuntimeError("ComboBoxToStringableConnector requires the Choice annotation to be used.")
        choices, labels, current = list(choice.choices), [str(each) for each in choice.choices], 0
    else:
        raise RuntimeError(f"Unable to create GUI connector from datatype '{datatype}' to widget type '{type(widget)}'.")
    widget.clear()  # what the .ui file listed is lost in Slicer too
    for text in labels:
        widget.addItem(text)
    widget.currentIndex = max(0, min(current, len(choices) - 1))

    def write(value: Any) -> None:
        if value not in choices:
            raise ValueError(f"Unable to find value {value} in choices {choices}")
        widget.currentIndex = choices.index(value)

    return GuiConnector(widget, "currentIndexChanged", lambda: choices[widget.currentIndex], write)


def _range(widget: Any, annotations: tuple[Any, ...]) -> GuiConnector:
    bounds = findFirstAnnotation(annotations, RangeBounds)
    decimals = findFirstAnnotation(annotations, Decimals)
    step = findFirstAnnotation(annotations, SingleStep)
    if bounds is None:
        raise RuntimeError(
            "Cannot have a connection to a range widget where the float is unbounded. Add a RangeBounds annotation."
        )
    if decimals is not None and not isinstance(widget, ctk.ctkDoubleRangeSlider):
        widget.decimals = decimals.value
    if step is not None:
        widget.singleStep = step.value
    widget.setRange(bounds.minimum, bounds.maximum)
    return GuiConnector(
        widget,
        "valuesChanged",
        lambda: FloatRange(widget.minimumValue, widget.maximumValue),
        lambda value: widget.setValues(value.minimum, value.maximum),
    )


def _node_types(bare: Any) -> list[str]:
    """Class names of a node type, or of a union of node types (and None); empty for anything else."""
    members = [each for each in members_of_union(bare) or (bare,) if each is not type(None)]
    if members and all(isinstance(each, type) and issubclass(each, slicer.vtkMRMLNode) for each in members):
        return [each().GetClassName() for each in members]
    return []
