"""Pictures of widgets, and of a panel beside its slice views, as a person would see them."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import qt

from .event_loop import spin


def grab(widget: Any, path: str | Path | None = None, width: int = 420, height: int | None = None) -> Any:
    """The widget as a ``QImage``, as wide as Slicer's module panel and (without ``height``) as high as it needs to be.

    ``path``: the picture is also written there.

    Raises:
        OSError: the picture cannot be written.
    """
    shown_before = widget.visible
    widget.resize(width, widget.height)
    widget.show()
    spin()
    wanted = height or max(widget.sizeHint().height(), widget.minimumSizeHint().height())
    if height is None and widget.layout() is not None and widget.layout().hasHeightForWidth():
        wanted = max(wanted, widget.layout().totalHeightForWidth(width))
    widget.resize(width, wanted)
    spin()
    image = widget.grab().toImage()
    if not shown_before:
        widget.hide()
    if path is not None and not image.save(str(path)):
        raise OSError(f"cannot write the picture {path}")
    return image


def beside(panel: Any, views: Sequence[np.ndarray[Any, np.dtype[np.uint8]]], path: str | Path) -> Path:
    """Write ``panel`` (a ``QImage``) with slice views (uint8 RGB, shape (H, W, 3)) to its right, one below the other."""
    pictures = [_image(each) for each in views]
    width = panel.width() + max((each.width() for each in pictures), default=0)
    height = max(panel.height(), sum(each.height() for each in pictures))
    canvas = qt.QImage(width, height, qt.QImage.Format_RGB32)
    canvas.fill(qt.QColor(40, 40, 40))
    painter = qt.QPainter(canvas)
    painter.drawImage(0, 0, panel)
    top = 0
    for each in pictures:
        painter.drawImage(panel.width(), top, each)
        top += each.height()
    painter.end()
    if not canvas.save(str(path)):
        raise OSError(f"cannot write the picture {path}")
    return Path(path)


def _image(pixels: np.ndarray[Any, np.dtype[np.uint8]]) -> Any:
    height, width, _ = pixels.shape
    return qt.QImage(np.ascontiguousarray(pixels).tobytes(), width, height, 3 * width, qt.QImage.Format_RGB888).copy()
