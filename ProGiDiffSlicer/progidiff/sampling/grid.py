"""Between a slice's own pixels and the model's grid: a square of fixed pixel size, or a rectangle laid on the body."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import torch
from scipy import ndimage
from torch import Tensor
from torch.nn import functional as F

from progidiff.cards import ModelCard

#: Share of the grid's rows and columns that the body fills where the grid is laid on it.
BODY_SHARE = 0.95
#: Finest and coarsest pixels of such a grid, mm.
PIXEL_MM = (1.3, 3.2)


@dataclass(frozen=True)
class ModelGrid:
    """The model's grid laid over the slices of one volume.

    Attributes:
        size: rows and columns of the model's grid.
        pixel_mm: its pixel size.
        shape_rc: rows and columns of a slice.
        spacing_rc: pixel size of a slice in mm.
        centre_rc: where the grid's centre lies, in slice pixels.
    """

    size: tuple[int, int]
    pixel_mm: float
    shape_rc: tuple[int, int]
    spacing_rc: tuple[float, float]
    centre_rc: tuple[float, float]

    def to_model(self, image: Tensor) -> Tensor:
        """A slice (H, W) in [0, 1] on the model's grid, float32 (1, 1, rows, columns); outside the slice is 0.

        Finer slices are smoothed first, so that no detail aliases.
        """
        x = image[None, None].float()
        for axis, spacing in ((2, self.spacing_rc[0]), (3, self.spacing_rc[1])):
            x = _smooth(x, 0.4 * self.pixel_mm / spacing if self.pixel_mm > 1.25 * spacing else 0.0, axis)
        rows, cols = (
            centre + (torch.arange(size, device=image.device, dtype=torch.float32) - (size - 1) / 2) * (self.pixel_mm / mm)
            for size, centre, mm in zip(self.size, self.centre_rc, self.spacing_rc, strict=True)
        )
        return _sample(x, rows, cols)

    def from_model(self, values: Tensor, outside: float) -> Tensor:
        """Values (N, rows, columns) on the model's grid at the slice's pixels, float32 (N, H, W); ``outside`` beyond it."""
        rows, cols = (
            (torch.arange(count, device=values.device) - centre) * (spacing / self.pixel_mm) + (size - 1) / 2
            for size, count, spacing, centre in zip(self.size, self.shape_rc, self.spacing_rc, self.centre_rc, strict=True)
        )
        return _sample((values.float() - outside)[None], rows, cols)[0] + outside


def _smooth(x: Tensor, sigma: float, axis: int) -> Tensor:
    if sigma <= 0:
        return x
    radius = max(1, int(3 * sigma + 0.5))
    offsets = torch.arange(-radius, radius + 1, device=x.device, dtype=x.dtype)
    kernel = torch.exp(-0.5 * (offsets / sigma) ** 2)
    kernel = kernel / kernel.sum()
    pad = (0, 0, radius, radius) if axis == 2 else (radius, radius, 0, 0)
    shape = (1, 1, -1, 1) if axis == 2 else (1, 1, 1, -1)
    return F.conv2d(F.pad(x, pad, mode="replicate"), kernel.view(shape))


def _sample(x: Tensor, rows: Tensor, cols: Tensor) -> Tensor:
    """Bilinear samples of (1, C, H, W) at the given pixel rows and columns; 0 outside."""
    h, w = x.shape[-2:]
    gy = (rows * 2 + 1) / h - 1
    gx = (cols * 2 + 1) / w - 1
    grid = torch.stack(torch.meshgrid(gy, gx, indexing="ij")[::-1], -1)[None].to(x.dtype)
    return F.grid_sample(x, grid, mode="bilinear", padding_mode="zeros", align_corners=False)


#: Normalised grey value above which a part of a slice can belong to the body; fat may be black in a narrow window.
_BODY_LEVEL = 0.06
#: Cells that the body is looked for in, in mm; thinner things than two or three (table, sheets, wires) are not the body.
_CELL_MM = 4.0
#: Parts nearer than twice this belong together: where fat is black, nothing joins the organs to the wall around them.
_JOIN_MM = 16.0
#: Widths of arms, mm.
_ARM_MM = (40.0, 130.0)
#: Groups of parts smaller than this share of the largest one (an arm) are not the body; both legs are.
_GROUP_SHARE = 0.3


@dataclass(frozen=True)
class BodyBox:
    """Where the body lies on slices: centre (row, column) in pixels, and height and width in mm."""

    centre_rc: tuple[float, float]
    size_mm: tuple[float, float]


def body_box(slices: list[np.ndarray], spacing_rc: tuple[float, float]) -> BodyBox:
    """The body's bounding box over some normalised slices.

    Neither the table nor an arm beside the body pulls it away, and a display window in which fat is black does not make the
    body fall to pieces. Shoulders or hips on a few slices of many do not widen it: each side is where three quarters of the
    slices have it or less. Falls back to the whole image.

    Args:
        slices: float (H, W) each, in [0, 1].
        spacing_rc: pixel size in mm.
    """
    shape = slices[0].shape
    cell = max(1, round(_CELL_MM / spacing_rc[0])), max(1, round(_CELL_MM / spacing_rc[1]))
    boxes = []
    for image in slices:
        cells = _body_cells(_cell_means(image, cell) > _BODY_LEVEL)
        rows, cols = np.flatnonzero(cells.mean(1) > 0.02), np.flatnonzero(cells.mean(0) > 0.02)
        if len(rows) > 1 and len(cols) > 1:
            boxes.append([-rows[0] * cell[0], (rows[-1] + 1) * cell[0], -cols[0] * cell[1], (cols[-1] + 1) * cell[1]])
    if not boxes:
        boxes = [[0, shape[0], 0, shape[1]]]
    top, bottom, left, right = (float(v) for v in np.quantile(np.array(boxes, float), 0.75, axis=0) * (-1, 1, -1, 1))
    bottom, right = min(bottom, float(shape[0])), min(right, float(shape[1]))
    return BodyBox(
        ((top + bottom - 1) / 2, (left + right - 1) / 2),
        ((bottom - top) * spacing_rc[0], (right - left) * spacing_rc[1]),
    )


def lay_grid(
    card: ModelCard, plane: str, slices: list[np.ndarray], shape_rc: tuple[int, int], spacing_rc: tuple[float, float]
) -> ModelGrid:
    """The grid that a model wants over slices of one volume.

    Args:
        card: the model's card: a square of fixed pixels, or a rectangle that the body's width fills.
        plane: plane of the slices.
        slices: normalised slices, float (H, W) each, on which the body is looked for.
        shape_rc: rows and columns of a slice.
        spacing_rc: pixel size of a slice in mm.
    """
    body = body_box(slices, spacing_rc)
    size = card.grid_size(plane)
    pixel_mm = card.spacing_mm
    if card.body_grids:
        fitting = [mm / (side * BODY_SHARE) for mm, side in zip(body.size_mm, size, strict=True)]
        # a coronal slice goes on above and below: only its width tells the body's size
        pixel_mm = float(np.clip(max(fitting) if plane == "axial" else fitting[1], *PIXEL_MM))
    return ModelGrid(size, pixel_mm, shape_rc, spacing_rc, body.centre_rc)


def _cell_means(image: np.ndarray, cell: tuple[int, int]) -> np.ndarray:
    padded = np.pad(image, [(0, -size % count) for size, count in zip(image.shape, cell, strict=True)], mode="edge")
    return np.asarray(padded.reshape(padded.shape[0] // cell[0], cell[0], -1, cell[1]).mean((1, 3)))


def _body_cells(inside: np.ndarray) -> np.ndarray:
    """The cells of the largest groups of parts, thin parts left out."""
    thick = ndimage.binary_opening(inside, np.ones((3, 3)))
    if not thick.any():
        thick = inside
    near = ndimage.distance_transform_edt(~thick) * _CELL_MM <= _JOIN_MM
    groups, count = ndimage.label(near)
    if count > 1:
        sizes = np.bincount(groups[thick], minlength=count + 1)
        thick = np.asarray((sizes >= _GROUP_SHARE * sizes.max())[groups] & thick)
    return _without_arms(thick)


def _without_arms(cells: np.ndarray) -> np.ndarray:
    """The cells without an outermost part that has the size and the round shape of an arm and lies beside a larger trunk.

    Where fat is black the outermost part of a trunk is its wall, which is thin, or an organ larger than an arm.
    """
    parts, count = ndimage.label(cells)
    out = cells
    places = ndimage.find_objects(parts)
    columns = np.flatnonzero(cells.any(0))
    for number, (rows, cols) in enumerate(places, 1):
        height, width = ((part.stop - part.start) * _CELL_MM for part in (rows, cols))
        outermost = cols.start == columns[0] or cols.stop == columns[-1] + 1
        round_ = 0.5 < width / height < 2
        like_an_arm = outermost and round_ and _ARM_MM[0] <= width <= _ARM_MM[1] and height <= _ARM_MM[1] * 1.3
        part = parts == number
        if count > 1 and like_an_arm and part.sum() < _GROUP_SHARE * cells.sum() and part[rows, cols].mean() > 0.6:
            out = out & ~part
    return out
