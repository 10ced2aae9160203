"""Pictures: a slice with a mask on it, the slice that is looked at, the curve of a tuning."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from itertools import pairwise
from typing import Any

import numpy as np
import qt
import slicer
import vtk

from progidiff.errors import InputError
from progidiff.proposals.masks import bounding_box
from progidiff.volumes.geometry import Geometry
from progidiff.volumes.slicing import SlicePlan, extract_slice
from ProGiDiffSlicerLib.scene.nodes import nodes_of
from ProGiDiffSlicerLib.scene.volumes import VolumeImage, place_of, shown_point, volume_image
from ProGiDiffSlicerLib.signals import Signal

Box = tuple[int, int, int, int]

# Around the masks, as a share of their size, so that a thumbnail shows where it is.
_MARGIN = 0.35
# A tiny structure is not blown up to a few pixels: at least this share of the slice is shown.
_LEAST_SHARE = 0.25
_FILL = 0.35


Points = Sequence[tuple[int, float]]
LOSS_COLOUR, DICE_COLOUR = (150, 150, 150), (0, 114, 178)
_PAPER, _FRAME, _GRID = 255, 190, 232
_CURVE_MARGIN_PX = 4
# A slice view reports every pixel of a drag; the panel follows at this pace.
_PAUSE_MS = 60


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


@dataclass(frozen=True, eq=False)
class VolumeSlices:
    """A volume cut into slices.

    Attributes:
        image: the volume.
        plan: how it is cut.
    """

    image: VolumeImage
    plan: SlicePlan

    def shown(self, scene: Any) -> int:
        """Index of the slice that the slice views show, or the nearest one; the middle one where no view shows slices."""
        try:
            place = place_of(shown_point(scene, self.image.geometry, self.plan), self.image.geometry, self.plan)
        except InputError:
            return self.plan.count // 2
        return int(np.clip(np.floor(place + 0.5), 0, self.plan.count - 1))

    def pixels(self, index: int) -> np.ndarray:
        """The voxels of a slice (rows, columns) as radiologists read them; a view."""
        return extract_slice(self.image.array_kji, self.plan, index)


def slices_of(node: Any, plan: Callable[[Geometry], SlicePlan]) -> VolumeSlices | None:
    """The slices of a volume node, cut as ``plan`` says; or ``None`` where it cannot be used; a run says why."""
    if node is None:
        return None
    try:
        image = volume_image(node)
    except InputError:
        return None
    return VolumeSlices(image, plan(image.geometry))


def levels_of(node: Any, pixels: np.ndarray) -> tuple[float, float]:
    """Values that are shown black and white: the volume's own window, else the range of ``pixels``."""
    display = node.GetScalarVolumeDisplayNode()
    if display is not None and display.GetWindow() > 0:
        return display.GetLevel() - display.GetWindow() / 2, display.GetLevel() + display.GetWindow() / 2
    low, high = np.percentile(pixels, (1, 99))
    return float(low), float(high)


def curve(losses: Points, dices: Points, steps: int, width: int = 360, height: int = 120) -> np.ndarray:
    """Colours (height, width, 3) uint8.

    The Dice on held-out cases runs from 0 (bottom) to 1 (top), with lines at quarters and a dot at each validation. The
    loss, smoothed, fills the height from its lowest to its highest value.

    Args:
        losses, dices: (step, value).
        steps: the last step on the axis, where more are planned than made.
        width, height: in pixels.
    """
    picture = np.full((height, width, 3), _PAPER, dtype=np.uint8)
    for quarter in range(1, 4):
        picture[_row(quarter / 4, height), _CURVE_MARGIN_PX : width - _CURVE_MARGIN_PX] = _GRID
    last = max([steps, 1, *(step for step, _value in (*losses, *dices))])
    if losses:
        smooth = _smoothed([value for _step, value in losses])
        low, high = min(smooth), max(smooth)
        span = max(high - low, 1e-9)
        places = [
            (_column(step, last, width), _row((value - low) / span, height))
            for (step, _value), value in zip(losses, smooth, strict=True)
        ]
        _line(picture, places, LOSS_COLOUR)
    places = [(_column(step, last, width), _row(value, height)) for step, value in dices]
    _line(picture, places, DICE_COLOUR)
    for x, y in places:
        picture[max(0, y - 2) : y + 3, max(0, x - 2) : x + 3] = DICE_COLOUR
    picture[0], picture[-1], picture[:, 0], picture[:, -1] = _FRAME, _FRAME, _FRAME, _FRAME
    return picture


def _column(step: int, last: int, width: int) -> int:
    return _CURVE_MARGIN_PX + round(step / last * (width - 1 - 2 * _CURVE_MARGIN_PX))


def _row(value: float, height: int) -> int:
    return height - 1 - _CURVE_MARGIN_PX - round(min(max(value, 0.0), 1.0) * (height - 1 - 2 * _CURVE_MARGIN_PX))


def _smoothed(values: Sequence[float], share: float = 0.15) -> list[float]:
    """Running mean: single steps of few images jump too much to be read."""
    found, mean = [], values[0]
    for value in values:
        mean += share * (value - mean)
        found.append(mean)
    return found


def _line(picture: np.ndarray, places: Sequence[tuple[int, int]], colour: tuple[int, int, int]) -> None:
    for (x0, y0), (x1, y1) in pairwise(places):
        count = max(abs(x1 - x0), abs(y1 - y0), 1) + 1
        rows = np.linspace(y0, y1, count).round().astype(int)
        columns = np.linspace(x0, x1, count).round().astype(int)
        picture[rows, columns] = colour
        picture[np.minimum(rows + 1, len(picture) - 1), columns] = colour


class SliceWatch:
    """Watches the slice views.

    Attributes:
        moved: Signal(): a view shows another place.
    """

    def __init__(self, parent: Any) -> None:
        self.moved = Signal()
        self._observed: list[tuple[Any, int]] = []
        self._timer = qt.QTimer(parent)
        self._timer.setSingleShot(True)
        self._timer.setInterval(_PAUSE_MS)
        self._timer.connect("timeout()", self.moved.emit)

    def start(self) -> None:
        """Watch the views that there are now."""
        self.stop()
        for node in nodes_of(slicer.mrmlScene, "vtkMRMLSliceNode"):
            self._observed.append((node, node.AddObserver(vtk.vtkCommand.ModifiedEvent, self._on_modified)))

    def stop(self) -> None:
        """Watch nothing."""
        for node, tag in self._observed:
            node.RemoveObserver(tag)
        self._observed.clear()
        self._timer.stop()

    def cleanup(self) -> None:
        """Watch nothing any more."""
        self.stop()
        self._timer.disconnect("timeout()", self.moved.emit)
        self.moved.clear()

    def _on_modified(self, caller: Any, event: str) -> None:
        if not self._timer.active:
            self._timer.start()
