"""CTK's slider with two handles, alone and between two spin boxes."""

from __future__ import annotations

from typing import Any

import ctk
import qt
from PySide6.QtCore import Property, Signal

from .stand_ins import kept, stand_in

_HANDLE = 12


@stand_in(ctk)
class ctkDoubleRangeSlider(qt.QWidget):
    """A groove with a handle for the lower and one for the upper value."""

    valuesChanged = Signal(float, float)
    minimumValueChanged = Signal(float)
    maximumValueChanged = Signal(float)
    rangeChanged = Signal(float, float)

    def __init__(self, orientation: Any = qt.Qt.Horizontal, parent: Any = None) -> None:
        if isinstance(orientation, qt.QWidget):
            orientation, parent = qt.Qt.Horizontal, orientation
        super().__init__(parent)
        self._range = (0.0, 99.0)
        self._values = (0.0, 99.0)
        self._dragged: int | None = None
        self.setMinimumHeight(22)
        self.setSizePolicy(qt.QSizePolicy.Expanding, qt.QSizePolicy.Fixed)

    singleStep = kept(float, "singleStep", 1.0)
    orientation = kept(int, "orientation", 1)
    tracking = kept(bool, "tracking", True)

    def setRange(self, minimum: float, maximum: float) -> None:
        """Set both ends; the values are kept inside."""
        self._range = (float(minimum), max(float(minimum), float(maximum)))
        self.rangeChanged.emit(*self._range)
        self.setValues(*self._values)
        self.update()

    def setValues(self, lower: float, upper: float) -> None:
        """Set both values, in order and kept inside the range."""
        low, high = self._range
        lower, upper = sorted((min(max(float(lower), low), high), min(max(float(upper), low), high)))
        before, self._values = self._values, (lower, upper)
        if before[0] != lower:
            self.minimumValueChanged.emit(lower)
        if before[1] != upper:
            self.maximumValueChanged.emit(upper)
        if before != self._values:
            self.valuesChanged.emit(lower, upper)
            self.update()

    minimum = Property(float, lambda self: self._range[0], lambda self, new: self.setRange(new, max(new, self._range[1])))
    maximum = Property(float, lambda self: self._range[1], lambda self, new: self.setRange(min(new, self._range[0]), new))
    minimumValue = Property(
        float, lambda self: self._values[0], lambda self, new: self.setValues(new, max(new, self._values[1]))
    )
    maximumValue = Property(
        float, lambda self: self._values[1], lambda self, new: self.setValues(min(new, self._values[0]), new)
    )

    def _position(self, number: float) -> int:
        low, high = self._range
        share = (number - low) / (high - low) if high > low else 0.0
        return round(_HANDLE / 2 + share * (self.width - _HANDLE))

    def _number(self, position: float) -> float:
        low, high = self._range
        share = min(max((position - _HANDLE / 2) / max(1, self.width - _HANDLE), 0.0), 1.0)
        number = low + share * (high - low)
        return low + round((number - low) / self.singleStep) * self.singleStep if self.singleStep > 0 else number

    def mousePressEvent(self, event: Any) -> None:
        at = event.position().x()
        self._dragged = min((0, 1), key=lambda handle: abs(self._position(self._values[handle]) - at))

    def mouseMoveEvent(self, event: Any) -> None:
        if self._dragged is not None:
            new = self._number(event.position().x())
            lower, upper = self._values
            self.setValues(*((min(new, upper), upper) if self._dragged == 0 else (lower, max(new, lower))))

    def mouseReleaseEvent(self, event: Any) -> None:
        self._dragged = None

    def paintEvent(self, event: Any) -> None:
        painter = qt.QPainter(self)
        painter.setRenderHint(qt.QPainter.Antialiasing)
        colours, middle = self.palette, self.height // 2
        first, last = (self._position(each) for each in self._values)
        painter.setPen(colours.color(qt.QPalette.Mid))
        painter.setBrush(colours.color(qt.QPalette.Base))
        painter.drawRoundedRect(_HANDLE // 2, middle - 3, self.width - _HANDLE, 6, 3, 3)
        shade = colours.color(qt.QPalette.Active if self.enabled else qt.QPalette.Disabled, qt.QPalette.Highlight)
        painter.setBrush(shade)
        painter.drawRoundedRect(first, middle - 3, max(1, last - first), 6, 3, 3)
        painter.setBrush(colours.color(qt.QPalette.Button))
        for centre in (first, last):
            painter.drawRoundedRect(centre - _HANDLE // 2, middle - 8, _HANDLE, 16, 3, 3)
        painter.end()


@stand_in(ctk)
class ctkRangeWidget(qt.QWidget):
    """The slider with two handles between two spin boxes."""

    valuesChanged = Signal(float, float)
    minimumValueChanged = Signal(float)
    maximumValueChanged = Signal(float)
    rangeChanged = Signal(float, float)

    def __init__(self, parent: Any = None) -> None:
        super().__init__(parent)
        self._low, self._high = ctk.ctkDoubleSpinBox(self), ctk.ctkDoubleSpinBox(self)
        self._slider = ctkDoubleRangeSlider(qt.Qt.Horizontal, self)
        row = qt.QHBoxLayout(self)
        row.setContentsMargins(0, 0, 0, 0)
        row.addWidget(self._low)
        row.addWidget(self._slider, 1)
        row.addWidget(self._high)
        self._updating = False
        self._slider.valuesChanged.connect(self._on_slider)
        self._low.valueChanged.connect(self._on_boxes)
        self._high.valueChanged.connect(self._on_boxes)
        self.setRange(0.0, 99.0)
        self.setValues(0.0, 99.0)

    singleStep = kept(float, "singleStep", 1.0, None, lambda self, step: self._set_step(step))
    tracking = kept(bool, "tracking", True)
    minimum = Property(
        float, lambda self: self._slider.minimum, lambda self, new: self.setRange(new, max(new, self.maximum))
    )
    maximum = Property(
        float, lambda self: self._slider.maximum, lambda self, new: self.setRange(min(new, self.minimum), new)
    )
    decimals = Property(int, lambda self: self._low.decimals, lambda self, count: self._set_decimals(count))
    suffix = Property(str, lambda self: self._low.suffix, lambda self, text: self._set_suffix(text))
    minimumValue = Property(
        float, lambda self: self._slider.minimumValue, lambda self, new: self.setValues(new, max(new, self.maximumValue))
    )
    maximumValue = Property(
        float, lambda self: self._slider.maximumValue, lambda self, new: self.setValues(min(new, self.minimumValue), new)
    )

    def _set_step(self, step: float) -> None:
        for part in (self._low, self._high, self._slider):
            part.singleStep = step

    def _set_decimals(self, count: int) -> None:
        for part in (self._low, self._high):
            part.setDecimals(count)

    def _set_suffix(self, text: str) -> None:
        for part in (self._low, self._high):
            part.suffix = text

    def setRange(self, minimum: float, maximum: float) -> None:
        """Set both ends; the values are kept inside."""
        self._updating = True
        for part in (self._low, self._high):
            part._box.setRange(minimum, maximum)
        self._updating = False
        self._slider.setRange(minimum, maximum)
        self._show()
        self.rangeChanged.emit(self.minimum, self.maximum)

    def setValues(self, lower: float, upper: float) -> None:
        """Set both values, in order and kept inside the range."""
        self._slider.setValues(lower, upper)
        self._show()

    def _show(self) -> None:
        self._updating = True
        self._low.setValue(self._slider.minimumValue)
        self._high.setValue(self._slider.maximumValue)
        self._updating = False

    def _on_slider(self, lower: float, upper: float) -> None:
        self._show()
        self.minimumValueChanged.emit(lower)
        self.maximumValueChanged.emit(upper)
        self.valuesChanged.emit(lower, upper)

    def _on_boxes(self, _new: float) -> None:
        if not self._updating:
            self._slider.setValues(self._low.value, self._high.value)
            self._show()
