"""CTK's slider with a spin box at its side, and its parts."""

from __future__ import annotations

from typing import Any

import ctk
import qt
from PySide6.QtCore import Property, Signal

from .stand_ins import forwarded, kept, stand_in

_STEPS = 10_000  # the integer slider below has this many positions over the range


@stand_in(ctk)
class ctkDoubleSpinBox(qt.QWidget):
    """A widget around a spin box for numbers."""

    valueChanged = Signal(float)
    editingFinished = Signal()

    def __init__(self, parent: Any = None) -> None:
        super().__init__(parent)
        self._box = qt.QDoubleSpinBox(self)
        row = qt.QHBoxLayout(self)
        row.setContentsMargins(0, 0, 0, 0)
        row.addWidget(self._box)
        self._box.valueChanged.connect(self.valueChanged.emit)
        self._box.editingFinished.connect(self.editingFinished.emit)

    value = forwarded(float, "value", "_box")
    minimum = forwarded(float, "minimum", "_box")
    maximum = forwarded(float, "maximum", "_box")
    singleStep = forwarded(float, "singleStep", "_box")
    decimals = forwarded(int, "decimals", "_box")
    prefix = forwarded(str, "prefix", "_box")
    suffix = forwarded(str, "suffix", "_box")
    readOnly = forwarded(bool, "readOnly", "_box")


@stand_in(ctk)
class ctkDoubleSlider(qt.QWidget):
    """A slider whose positions are numbers."""

    valueChanged = Signal(float)
    rangeChanged = Signal(float, float)
    sliderMoved = Signal(float)
    sliderPressed = Signal()
    sliderReleased = Signal()

    def __init__(self, orientation: Any = qt.Qt.Vertical, parent: Any = None) -> None:
        if isinstance(orientation, qt.QWidget):
            orientation, parent = qt.Qt.Vertical, orientation
        super().__init__(parent)
        self._minimum, self._maximum, self._value, self._placing = 0.0, 99.0, 0.0, False
        self._slider = qt.QSlider(orientation or qt.Qt.Vertical, self)
        self._slider.setRange(0, _STEPS)
        box = qt.QHBoxLayout(self)
        box.setContentsMargins(0, 0, 0, 0)
        box.addWidget(self._slider)
        self._slider.valueChanged.connect(self._on_position)
        self._slider.sliderPressed.connect(self.sliderPressed.emit)
        self._slider.sliderReleased.connect(self.sliderReleased.emit)

    singleStep = kept(float, "singleStep", 1.0)
    pageStep = kept(float, "pageStep", 10.0)
    tickInterval = kept(float, "tickInterval", 0.0)
    tracking = kept(bool, "tracking", True)
    orientation = forwarded(qt.Qt.Orientation, "orientation", "_slider")

    def _set_value(self, new: float) -> None:
        new = min(max(float(new), self._minimum), self._maximum)
        if new != self._value:
            self._value = new
            self._place()
            self.valueChanged.emit(new)
        else:
            self._place()

    def _set_range(self, minimum: float, maximum: float) -> None:
        """Set both ends; the value is kept inside."""
        self._minimum, self._maximum = float(minimum), max(float(minimum), float(maximum))
        self.rangeChanged.emit(self._minimum, self._maximum)
        self._set_value(self._value)

    value = Property(float, lambda self: self._value, _set_value)
    minimum = Property(float, lambda self: self._minimum, lambda self, new: self._set_range(new, max(new, self._maximum)))
    maximum = Property(float, lambda self: self._maximum, lambda self, new: self._set_range(min(new, self._minimum), new))

    def _place(self) -> None:
        width = self._maximum - self._minimum
        self._placing = True
        finite = 0 < width < float("inf")
        self._slider.setValue(round((self._value - self._minimum) / width * _STEPS) if finite else 0)
        self._placing = False

    def _on_position(self, position: int) -> None:
        if not self._placing:
            new = self._minimum + (self._maximum - self._minimum) * position / _STEPS
            self._value = new
            self.sliderMoved.emit(new)
            self.valueChanged.emit(new)


@stand_in(ctk)
class ctkSliderWidget(qt.QWidget):
    """A horizontal slider with a spin box."""

    valueChanged = Signal(float)
    valueIsChanging = Signal(float)

    def __init__(self, parent: Any = None) -> None:
        super().__init__(parent)
        self._slider = ctkDoubleSlider(qt.Qt.Horizontal, self)
        self._box = ctkDoubleSpinBox(self)
        row = qt.QHBoxLayout(self)
        row.setContentsMargins(0, 0, 0, 0)
        row.addWidget(self._slider, 1)
        row.addWidget(self._box, 0)
        self._set_range(0.0, 99.0)
        self._box.valueChanged.connect(self._on_box)
        self._slider.valueChanged.connect(self._on_slider)

    def _on_box(self, new: float) -> None:
        self._slider.setValue(new)
        self.valueIsChanging.emit(new)
        self.valueChanged.emit(new)

    def _on_slider(self, new: float) -> None:
        if abs(new - self._box.value) > 10.0**-self._box.decimals / 2:
            self._box.setValue(new)  # comes back through _on_box, rounded to the decimals

    def _set_range(self, minimum: float, maximum: float) -> None:
        """Set both ends; the value is kept inside."""
        self._box._box.setRange(minimum, maximum)
        self._slider._set_range(minimum, maximum)

    value = forwarded(float, "value", "_box")
    minimum = Property(
        float, lambda self: self._box.minimum, lambda self, new: self._set_range(new, max(new, self._box.maximum))
    )
    maximum = Property(
        float, lambda self: self._box.maximum, lambda self, new: self._set_range(min(new, self._box.minimum), new)
    )
    singleStep = forwarded(float, "singleStep", "_box")
    decimals = forwarded(int, "decimals", "_box")
    prefix = forwarded(str, "prefix", "_box")
    suffix = forwarded(str, "suffix", "_box")
    pageStep = forwarded(float, "pageStep", "_slider")
    tickInterval = forwarded(float, "tickInterval", "_slider")
    tracking = kept(bool, "tracking", True)

    def reset(self) -> None:
        """Go to the middle, as far as it can be said."""
        self.setValue(0.0)
