"""Small pictures of one slice with a mask on it."""

from __future__ import annotations

from typing import Any

import numpy as np
import qt

from progidiff.proposals.masks import bounding_box

Box = tuple[int, int, int, int]

# Around the masks, as a share of their size, so that a thumbnail shows where it is.
_MARGIN = 0.35
# A tiny structure is not blown up to a few pixels: at least this share of the slice is shown.
_LEAST_SHARE = 0.25
_FILL = 0.35


def common_box(masks: list[np.ndarray], shape_rc: tuple[int, int]) -> Box:
    """A nearly square window (top, bottom, left, right) around all masks with some margin; the whole slice without any.

    Args:
        masks: bool (rows, columns) each, all of the shape ``shape_rc``.
    """
    rows, columns = shape_rc
    anywhere = np.zeros(shape_rc, dtype=bool)
    for mask in masks:
        anywhere |= mask
    found = bounding_box(anywhere)
    if found is None:
        return 0, rows, 0, columns
    down, across = found
    side = max(down.stop - down.start, across.stop - across.start) * (1 + 2 * _MARGIN)
    side = max(side, max(shape_rc) * _LEAST_SHARE)
    top, bottom = _span((down.start + down.stop) / 2, side, rows)
    left, right = _span((across.start + across.stop) / 2, side, columns)
    return top, bottom, left, right


def picture(
    image: np.ndarray,
    mask: np.ndarray | None,
    box: Box,
    size: int,
    levels: tuple[float, float],
    colour: tuple[float, float, float],
    spacing_rc: tuple[float, float] = (1.0, 1.0),
) -> np.ndarray:
    """Colours (size, size, 3) uint8 of a slice with a mask's tint and outline.

    Args:
        image: (rows, columns) numbers in the canonical view.
        mask: bool (rows, columns) or ``None``.
        box: the part that is shown, from :func:`common_box`.
        size: edge of the picture in pixels.
        levels: values shown as black and as white.
        colour: of the mask, 0 to 1.
        spacing_rc: millimetres per row and per column; the picture keeps their ratio.
    """
    rows, columns, inside = _sampling(box, size, spacing_rc)
    low, high = levels
    values = np.asarray(image[np.ix_(rows, columns)], dtype=np.float32)
    grey = np.nan_to_num((values - low) / max(high - low, 1e-6)).clip(0, 1)
    rgb = np.repeat(grey[:, :, None], 3, axis=2)
    if mask is not None:
        shown = mask[np.ix_(rows, columns)] & inside
        tint = np.asarray(colour, dtype=np.float32)
        rgb[shown] = (1 - _FILL) * rgb[shown] + _FILL * tint
        rgb[_border(shown)] = tint
    rgb[~inside] = 0
    return (rgb * 255).astype(np.uint8)


def pixmap(rgb: np.ndarray) -> Any:
    """A QPixmap of colours (rows, columns, 3) uint8.

    It goes through a PPM in memory, because PythonQt and PySide6 disagree about how QImage takes a buffer.
    """
    rows, columns = rgb.shape[:2]
    data = b"P6 %d %d 255\n" % (columns, rows) + np.ascontiguousarray(rgb).tobytes()
    image = qt.QPixmap()
    image.loadFromData(qt.QByteArray(data), "PPM")
    return image


def _span(centre: float, length: float, limit: int) -> tuple[int, int]:
    start = int(max(0, min(centre - length / 2, limit - length)))
    return start, int(min(limit, np.ceil(start + length)))


def _sampling(box: Box, size: int, spacing_rc: tuple[float, float]) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Which row and column each pixel shows, and which pixels lie inside the box."""
    top, bottom, left, right = box
    height, width = (bottom - top) * spacing_rc[0], (right - left) * spacing_rc[1]
    step = max(height, width) / size
    places = (np.arange(size) + 0.5) * step
    rows = top + (places - (size * step - height) / 2) / spacing_rc[0]
    columns = left + (places - (size * step - width) / 2) / spacing_rc[1]
    row_inside = (rows >= top) & (rows < bottom)
    column_inside = (columns >= left) & (columns < right)
    inside = row_inside[:, None] & column_inside[None, :]
    return (
        rows.clip(top, bottom - 1).astype(np.intp),
        columns.clip(left, right - 1).astype(np.intp),
        inside,
    )


def _border(mask: np.ndarray) -> np.ndarray:
    """Pixels of a mask that have a neighbour outside it."""
    padded = np.pad(mask, 1)
    inner = padded[:-2, 1:-1] & padded[2:, 1:-1] & padded[1:-1, :-2] & padded[1:-1, 2:]
    return mask & ~inner
