"""Masks of slices as packed bits of their bounding boxes, so that many proposals of a large volume fit into memory."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import NamedTuple

import numpy as np


class Box(NamedTuple):
    """The inside of a mask on one slice.

    Attributes:
        top, left: first row and column inside.
        rows, columns: size.
        bits: uint8, ``rows`` x ``columns`` packed bits.
    """

    top: int
    left: int
    rows: int
    columns: int
    bits: np.ndarray

    @property
    def window(self) -> tuple[slice, slice]:
        """Where it lies on its slice."""
        return slice(self.top, self.top + self.rows), slice(self.left, self.left + self.columns)

    def mask(self) -> np.ndarray:
        """bool (rows, columns)."""
        return np.unpackbits(self.bits, count=self.rows * self.columns).reshape(self.rows, self.columns).view(np.bool_)


@dataclass(frozen=True, eq=False)
class Crop:
    """A mask of a volume, cut out.

    Attributes:
        array: uint8 (k, j, i), 1 inside; of size 0 for an empty mask.
        origin_kji: voxel of the volume at which ``array[0, 0, 0]`` lies.
    """

    array: np.ndarray
    origin_kji: tuple[int, int, int]

    @property
    def empty(self) -> bool:
        """Whether nothing is inside."""
        return self.array.size == 0


def pack(mask: np.ndarray) -> Box | None:
    """The box around a mask, bool (rows, columns); ``None`` for an empty one."""
    lines = np.flatnonzero(mask.any(axis=1))
    if not lines.size:
        return None
    top, bottom = int(lines[0]), int(lines[-1]) + 1
    places = np.flatnonzero(mask[top:bottom].any(axis=0))
    left, right = int(places[0]), int(places[-1]) + 1
    return Box(top, left, bottom - top, right - left, np.packbits(mask[top:bottom, left:right]))


def moved(box: Box | None, down: int, right: int) -> Box | None:
    """The same mask further down and to the right."""
    return None if box is None else box._replace(top=box.top + down, left=box.left + right)


def unpack(box: Box | None, shape: tuple[int, int]) -> np.ndarray:
    """bool ``shape``."""
    full = np.zeros(shape, np.bool_)
    if box is not None:
        full[box.window] = box.mask()
    return full


def hull(boxes: Iterable[Box | None]) -> tuple[int, int, int, int] | None:
    """Top, left, bottom and right (not included) of all boxes together; ``None`` where all are empty."""
    found = [box for box in boxes if box is not None]
    if not found:
        return None
    return (
        min(box.top for box in found),
        min(box.left for box in found),
        max(box.top + box.rows for box in found),
        max(box.left + box.columns for box in found),
    )


def votes(boxes: Iterable[Box | None], around: tuple[int, int, int, int]) -> np.ndarray:
    """How many masks contain each pixel of the part ``around`` (as of :func:`hull`): int16."""
    top, left, bottom, right = around
    counts = np.zeros((bottom - top, right - left), np.int16)
    for box in boxes:
        if box is not None:
            part = counts[box.top - top : box.top - top + box.rows, box.left - left : box.left - left + box.columns]
            part += box.mask()
    return counts


def assemble(boxes: Mapping[int, Box | None], axis: int) -> Crop:
    """The volume's mask of its slices along ``axis`` of the array (K, J, I)."""
    inside = {index: box for index, box in boxes.items() if box is not None}
    around = hull(inside.values())
    if around is None:
        return Crop(np.zeros((0, 0, 0), np.uint8), (0, 0, 0))
    top, left, bottom, right = around
    first, last = min(inside), max(inside)
    # Slice by slice in memory order of the result, whatever the axis.
    stack = np.zeros((last - first + 1, bottom - top, right - left), np.uint8)
    for index, box in inside.items():
        stack[index - first, box.top - top : box.top - top + box.rows, box.left - left : box.left - left + box.columns] = (
            box.mask()
        )
    origin = [top, left]
    origin.insert(axis, first)
    return Crop(np.ascontiguousarray(np.moveaxis(stack, 0, axis)), (origin[0], origin[1], origin[2]))
