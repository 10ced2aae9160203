"""CTK's buttons, boxes and labels."""

from __future__ import annotations

from typing import Any

import ctk
import qt
from PySide6.QtCore import Property, Signal

from .stand_ins import kept, stand_in


@stand_in(ctk)
class ctkCollapsibleButton(qt.QAbstractButton):
    """A header with an arrow and a title; what its layout holds is shown below it, or not when it is collapsed."""

    contentsCollapsed = Signal(bool)

    def __init__(self, text: Any = "", parent: Any = None) -> None:
        if isinstance(text, qt.QWidget):
            text, parent = "", text
        super().__init__(parent)
        self._collapsed = False
        self._hidden_by_collapsing: list[Any] = []
        self.setText(text or "")
        self.setCheckable(True)
        self.setChecked(True)
        self.setSizePolicy(qt.QSizePolicy.Preferred, qt.QSizePolicy.Preferred)
        self.toggled.connect(self._on_toggled)
        self._make_room()

    flat = kept(bool, "flat", False)

    def _set_collapsed(self, collapsed: bool) -> None:
        if collapsed == self._collapsed:
            return
        self._collapsed = collapsed
        self.setChecked(not collapsed)
        if collapsed:
            self._hidden_by_collapsing = [each for each in self._contents() if not each.isHidden()]
            for each in self._hidden_by_collapsing:
                each.hide()
        else:
            for each in self._hidden_by_collapsing:
                each.show()
            self._hidden_by_collapsing = []
        self.setMaximumHeight(self._header_height() if collapsed else 16777215)
        self.updateGeometry()
        self.contentsCollapsed.emit(collapsed)

    collapsed = Property(bool, lambda self: self._collapsed, _set_collapsed)

    def _contents(self) -> list[Any]:
        return [each for each in self.children() if isinstance(each, qt.QWidget)]

    def _on_toggled(self, checked: bool) -> None:
        self._set_collapsed(not checked)

    def _header_height(self) -> int:
        return self.fontMetrics().height() + 8

    def _make_room(self) -> None:
        self.setContentsMargins(0, self._header_height(), 0, 0)

    def event(self, event: Any) -> bool:
        """A child that is added while collapsed stays out of sight, as in CTK."""
        if event.type() == qt.QEvent.FontChange:
            self._make_room()
        if event.type() == qt.QEvent.ChildPolished and getattr(self, "_collapsed", False):
            child = event.child()
            if isinstance(child, qt.QWidget) and child not in self._hidden_by_collapsing and not child.isHidden():
                self._hidden_by_collapsing.append(child)
                child.hide()
        return super().event(event)

    def hitButton(self, position: Any) -> bool:
        """Only the header is a button."""
        return position.y() < self._header_height()

    def minimumSizeHint(self) -> Any:
        """Room for the header, and for the contents where they are shown."""
        header = qt.QSize(self.fontMetrics().horizontalAdvance(self.text) + 40, self._header_height())
        layout = self.layout()
        if self._collapsed or layout is None:
            return header
        inside = layout.totalMinimumSize()
        return qt.QSize(max(header.width(), inside.width()), max(header.height(), inside.height()))

    def sizeHint(self) -> Any:
        """As ``minimumSizeHint``, with the size that the contents would like."""
        layout = self.layout()
        if self._collapsed or layout is None:
            return self.minimumSizeHint()
        return self.minimumSizeHint().expandedTo(layout.totalSizeHint())

    def paintEvent(self, event: Any) -> None:
        painter = qt.QPainter(self)
        header = qt.QRect(0, 0, self.width, self._header_height())
        if not self.flat:
            option = qt.QStyleOptionButton()
            option.initFrom(self)
            option.rect = header
            option.state |= qt.QStyle.State_Raised
            self.style().drawControl(qt.QStyle.CE_PushButtonBevel, option, painter, self)
        arrow = qt.QStyleOption()
        arrow.initFrom(self)
        arrow.rect = qt.QRect(6, (header.height() - 10) // 2, 10, 10)
        kind = qt.QStyle.PE_IndicatorArrowRight if self._collapsed else qt.QStyle.PE_IndicatorArrowDown
        self.style().drawPrimitive(kind, arrow, painter, self)
        role = qt.QPalette.Disabled if not self.enabled else qt.QPalette.Active
        painter.setPen(self.palette.color(role, qt.QPalette.ButtonText))
        painter.drawText(header.adjusted(22, 0, -6, 0), qt.Qt.AlignLeft | qt.Qt.AlignVCenter, self.text)
        if not self._collapsed and not self.flat:
            painter.setPen(self.palette.color(qt.QPalette.Mid))
            painter.drawRect(0, header.height() - 1, self.width - 1, self.height - header.height())
        painter.end()


@stand_in(ctk)
class ctkCheckBox(qt.QCheckBox):
    """A check box whose indicator can be an icon."""


@stand_in(ctk)
class ctkComboBox(qt.QComboBox):
    """A combo box with a text for the case that nothing is chosen."""


@stand_in(ctk)
class ctkMenuButton(qt.QPushButton):
    """A push button with a menu at its side."""
