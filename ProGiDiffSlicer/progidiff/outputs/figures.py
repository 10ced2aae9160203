"""Pictures of slices for the report, as PNG bytes.

Drawn with matplotlib's Agg canvas: no display, no global state. It is imported at the first picture, since that
takes time. Masks and images are canonical 2-D slice views.
"""

from __future__ import annotations

import io
from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np

from progidiff.outputs.colours import OUTLINES, Outline

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

# A slice is drawn this wide at most; 2-D slices are small, and a report of many slices must stay mailable.
LONGEST_SIDE_INCHES = 4.2
DPI = 110
AGREEMENT_COLOURS = "viridis"
# Halo under each outline, so that it stays visible on bright bone and on black air alike.
_HALO = (0.0, 0.0, 0.0, 0.55)


@dataclass(frozen=True)
class Frame:
    """One slice to draw on: ``image`` float (R, C) in [0, 1], pixel spacing in mm (row, column)."""

    image: np.ndarray
    spacing_rc: tuple[float, float]


def display_window(array: np.ndarray, modality: str | None) -> tuple[float, float]:
    """Grey values drawn black and white: the abdominal window for CT, else the 1st and 99.5th percentile.

    Files that do not name their modality count as CT when they hold the Hounsfield units of air.
    """
    if modality == "CT" or (modality is None and float(array.min()) <= -500):
        return -160.0, 240.0
    # every n-th voxel is enough for a display window, and keeps large volumes quick
    sample = np.asarray(array).reshape(-1)[:: max(1, array.size // 500_000)]
    low, high = (float(v) for v in np.percentile(sample, (1.0, 99.5)))
    return (low, high) if high > low else (low, low + 1.0)


def windowed(slice2d: np.ndarray, window: tuple[float, float]) -> np.ndarray:
    """float32 (R, C) in [0, 1]."""
    low, high = window
    scaled = (np.asarray(slice2d, np.float32) - low) / (high - low)
    return np.clip(scaled, 0.0, 1.0)


def outlines_png(frame: Frame, masks: Sequence[np.ndarray], outlines: Sequence[Outline] = OUTLINES) -> bytes:
    """Slice with the outline of each mask (bool (R, C)); the first mask is drawn last, on top."""
    figure, axes = _canvas(frame)
    for place in reversed(range(len(masks))):
        mask = np.asarray(masks[place])
        if not mask.any():
            continue
        # zero padding closes the outline of a mask that touches the picture's edge
        padded = np.pad(mask, 1).astype(np.float32)
        rows, cols = np.arange(-1, mask.shape[0] + 1), np.arange(-1, mask.shape[1] + 1)
        style = outlines[place % len(outlines)]
        width = 1.9 if place == 0 else 1.4
        axes.contour(cols, rows, padded, levels=[0.5], colors=[_HALO], linewidths=[width + 1.4])
        axes.contour(
            cols,
            rows,
            padded,
            levels=[0.5],
            colors=[style.colour],
            linewidths=[width],
            linestyles=[style.line],
        )
    return _png(figure)


def agreement_png(frame: Frame, agreement: np.ndarray) -> bytes:
    """Slice under the share of proposals (float (R, C) in [0, 1]) that contain each pixel; nothing is drawn
    where it is 0.
    """
    figure, axes = _canvas(frame)
    shares = np.ma.masked_less_equal(np.asarray(agreement, np.float32), 0.0)
    axes.imshow(shares, cmap=AGREEMENT_COLOURS, vmin=0.0, vmax=1.0, alpha=0.65, interpolation="nearest", aspect="auto")
    return _png(figure)


def agreement_gradient() -> str:
    """CSS colour stops of the agreement map from 0 to 100 %."""
    from matplotlib import colormaps

    stops = colormaps[AGREEMENT_COLOURS](np.linspace(0.0, 1.0, 9))
    return ", ".join("#" + "".join(f"{round(float(c) * 255):02x}" for c in stop[:3]) for stop in stops)


def _canvas(frame: Frame) -> tuple[Figure, Axes]:
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    rows, cols = frame.image.shape
    height, width = rows * frame.spacing_rc[0], cols * frame.spacing_rc[1]
    # a stack of a few thick slices seen from the side would be a thread: no picture is flatter than 1:6
    scale = LONGEST_SIDE_INCHES / max(height, width)
    size = (max(width * scale, LONGEST_SIDE_INCHES / 6), max(height * scale, LONGEST_SIDE_INCHES / 6))
    figure = Figure(figsize=size, dpi=DPI, facecolor="black")
    FigureCanvasAgg(figure)
    axes = figure.add_axes((0.0, 0.0, 1.0, 1.0))
    axes.set_axis_off()
    axes.imshow(frame.image, cmap="gray", vmin=0.0, vmax=1.0, interpolation="bilinear", aspect="auto")
    axes.set_xlim(-0.5, cols - 0.5)
    axes.set_ylim(rows - 0.5, -0.5)
    axes.set_autoscale_on(False)
    return figure, axes


def _png(figure: Figure) -> bytes:
    buffer = io.BytesIO()
    # no software or time stamps: the same result gives the same bytes
    figure.savefig(buffer, format="png", dpi=DPI, metadata={"Software": None})
    return buffer.getvalue()
