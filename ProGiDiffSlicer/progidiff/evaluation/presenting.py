"""Labelled slices as the engine takes images: one-slice volumes with a geometry and scanner values."""

from __future__ import annotations

import numpy as np
import torch
from torch import Tensor

from progidiff.cards import ModelCard
from progidiff.datasets.slices import LabelledSlice
from progidiff.sampling.grid import ModelGrid, lay_grid
from progidiff.sampling.intensity import normaliser

#: Direction (RAS) of growing columns, rows and slices for a canonical view of each plane.
_DIRECTIONS: dict[str, tuple[tuple[int, int, int], tuple[int, int, int], tuple[int, int, int]]] = {
    "axial": ((-1, 0, 0), (0, -1, 0), (0, 0, 1)),
    "coronal": ((-1, 0, 0), (0, 0, -1), (0, 1, 0)),
    "sagittal": ((0, -1, 0), (0, 0, -1), (1, 0, 0)),
}


def as_volume(item: LabelledSlice, card: ModelCard) -> tuple[np.ndarray, np.ndarray]:
    """A slice as a volume of one slice.

    An already windowed CT slice is brought back to Hounsfield units by the model's own window, so that it passes through
    the same code as a scan; what the window cut off stays cut off.

    Args:
        item: the slice.
        card: card of the model that will see it.

    Returns:
        float32 array (1, rows, columns) and affine (4, 4), IJK to RAS in mm.
    """
    pixels = item.image.astype(np.float32)
    if item.window == "display" and item.modality == "CT":
        window = card.window("CT")
        pixels = pixels * (window.high - window.low) + window.low
    affine = np.eye(4)
    steps = (item.spacing_rc[1], item.spacing_rc[0], 5.0)
    for axis, (direction, step) in enumerate(zip(_DIRECTIONS[item.plane], steps, strict=True)):
        affine[:3, axis] = np.array(direction) * step
    return pixels[None], affine


def on_grid(item: LabelledSlice, card: ModelCard) -> tuple[ModelGrid, Tensor]:
    """A slice as the networks see it: the model's grid, and the pixels on it, float32 (1, 1, S, S) in [0, 1] on the CPU."""
    array, _ = as_volume(item, card)
    image = normaliser(array, card, item.modality)(array[0])
    shape = (image.shape[0], image.shape[1])
    grid = lay_grid(card, item.plane, [image], shape, item.spacing_rc)
    return grid, grid.to_model(torch.from_numpy(image))
