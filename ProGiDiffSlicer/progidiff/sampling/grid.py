"""Between a slice's own pixels and the model's square grid of fixed pixel size."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import torch
from scipy import ndimage
from torch import Tensor
from torch.nn import functional as F


@dataclass(frozen=True)
class ModelGrid:
    """The model's grid laid over the slices of one volume.

    Attributes:
        size: pixels per side of the model's grid.
        pixel_mm: its pixel size.
        shape_rc: rows and columns of a slice.
        spacing_rc: pixel size of a slice in mm.
        centre_rc: where the grid's centre lies, in slice pixels.
    """

    size: int
    pixel_mm: float
    shape_rc: tuple[int, int]
    spacing_rc: tuple[float, float]
    centre_rc: tuple[float, float]

    def to_model(self, image: Tensor) -> Tensor:
        """A slice (H, W) in [0, 1] on the model's grid, float32 (1, 1, size, size); outside the slice is 0.

        Finer slices are smoothed first, so that no detail aliases.
        """
        x = image[None, None].float()
        for axis, spacing in ((2, self.spacing_rc[0]), (3, self.spacing_rc[1])):
            x = _smooth(x, 0.4 * self.pixel_mm / spacing if self.pixel_mm > 1.25 * spacing else 0.0, axis)
        offsets = (torch.arange(self.size, device=image.device, dtype=torch.float32) - (self.size - 1) / 2) * self.pixel_mm
        rows = self.centre_rc[0] + offsets / self.spacing_rc[0]
        cols = self.centre_rc[1] + offsets / self.spacing_rc[1]
        return _sample(x, rows, cols)

    def from_model(self, values: Tensor, outside: float) -> Tensor:
        """Values (N, size, size) on the model's grid at the slice's pixels, float32 (N, H, W); ``outside`` beyond it."""
        rows, cols = (
            (torch.arange(count, device=values.device) - centre) * (spacing / self.pixel_mm) + (self.size - 1) / 2
            for count, spacing, centre in zip(self.shape_rc, self.spacing_rc, self.centre_rc, strict=True)
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
#: Groups of parts smaller than this share of the largest one (an arm) are not the body; both legs are.
_GROUP_SHARE = 0.3


def body_centre(slices: list[np.ndarray], spacing_rc: tuple[float, float]) -> tuple[float, float]:
    """Centre (row, column) of the body's bounding box over some normalised slices, in pixels.

    Neither the table nor an arm beside the body pulls the centre away, and a display window in which fat is black does not
    make the body fall to pieces. Falls back to the image's centre.

    Args:
        slices: float (H, W) each, in [0, 1].
        spacing_rc: pixel size in mm.
    """
    shape = slices[0].shape
    cell = max(1, round(_CELL_MM / spacing_rc[0])), max(1, round(_CELL_MM / spacing_rc[1]))
    found = [_body_cells(_cell_means(image, cell) > _BODY_LEVEL) for image in slices]
    rows = np.max([cells.mean(1) for cells in found], axis=0)
    cols = np.max([cells.mean(0) for cells in found], axis=0)
    r, c = np.flatnonzero(rows > 0.02), np.flatnonzero(cols > 0.02)
    if len(r) < 2 or len(c) < 2:
        return (shape[0] - 1) / 2, (shape[1] - 1) / 2
    return float(r[0] + r[-1] + 1) / 2 * cell[0] - 0.5, float(c[0] + c[-1] + 1) / 2 * cell[1] - 0.5


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
    if count < 2:
        return thick
    sizes = np.bincount(groups[thick], minlength=count + 1)
    return np.asarray((sizes >= _GROUP_SHARE * sizes.max())[groups] & thick)
