"""Masks of slices as packed bits of their bounding boxes, so that many proposals of a large volume fit into memory."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import NamedTuple

import numpy as np

from progidiff.volumes.slicing import SlicePlan

Window = tuple[int, int, int, int]
"""A part of a slice: top, left, bottom and right; the last two are not included."""


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

    def mask(self) -> np.ndarray:
        """bool (rows, columns)."""
        return np.unpackbits(self.bits, count=self.rows * self.columns).reshape(self.rows, self.columns).view(np.bool_)

    def within(self, part: np.ndarray, window: Window) -> np.ndarray:
        """View of the array of a window that holds the box."""
        top, left = self.top - window[0], self.left - window[1]
        return part[top : top + self.rows, left : left + self.columns]


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

    def whole(self, shape_kji: tuple[int, int, int]) -> np.ndarray:
        """The mask of the volume, uint8 (K, J, I)."""
        volume = np.zeros(shape_kji, np.uint8)
        volume[tuple(slice(o, o + n) for o, n in zip(self.origin_kji, self.array.shape, strict=True))] = self.array
        return volume


def bounding_box(mask: np.ndarray, *margins: int) -> tuple[slice, ...] | None:
    """The part of an array that holds what is true, and margins around it; ``None`` where nothing is true.

    Args:
        mask: bool, any number of axes.
        margins: elements on both sides, by axis; the part ends where the array does.
    """
    box: tuple[slice, ...] = ()
    for axis in range(mask.ndim):
        part = mask[box]  # what the earlier axes leave, so that the later ones cost little
        used = np.flatnonzero(part.any(axis=tuple(other for other in range(mask.ndim) if other != axis)))
        if not used.size:
            return None
        box += (slice(int(used[0]), int(used[-1]) + 1),)
    if not margins:
        return box
    around = zip(box, margins, mask.shape, strict=True)
    return tuple(slice(max(side.start - more, 0), min(side.stop + more, end)) for side, more, end in around)


def pack(mask: np.ndarray, top: int = 0, left: int = 0) -> Box | None:
    """The box around a mask, bool (rows, columns), that lies at ``top`` and ``left``; ``None`` for an empty one."""
    found = bounding_box(mask)
    if found is None:
        return None
    rows, columns = found
    part = mask[found]
    return Box(top + rows.start, left + columns.start, part.shape[0], part.shape[1], np.packbits(part))


def hull(boxes: Iterable[Box | None]) -> Window | None:
    """The window of all boxes together; ``None`` where all are empty."""
    found = [box for box in boxes if box is not None]
    if not found:
        return None
    return (
        min(box.top for box in found),
        min(box.left for box in found),
        max(box.top + box.rows for box in found),
        max(box.left + box.columns for box in found),
    )


def cut(box: Box | None, window: Window) -> np.ndarray:
    """What of a mask lies in a window: bool of the window's size."""
    top, left, bottom, right = window
    part = np.zeros((bottom - top, right - left), np.bool_)
    if box is not None:
        r0, r1 = max(top, box.top), min(bottom, box.top + box.rows)
        c0, c1 = max(left, box.left), min(right, box.left + box.columns)
        if r0 < r1 and c0 < c1:
            inside = box.mask()[r0 - box.top : r1 - box.top, c0 - box.left : c1 - box.left]
            part[r0 - top : r1 - top, c0 - left : c1 - left] = inside
    return part


def count_votes(boxes: Iterable[Box | None], window: Window) -> np.ndarray:
    """How many masks contain each pixel of a window (as of :func:`hull`): int16."""
    top, left, bottom, right = window
    counts = np.zeros((bottom - top, right - left), np.int16)
    for box in boxes:
        if box is not None:
            part = box.within(counts, window)
            part += box.mask()
    return counts


def assemble(boxes: Mapping[int, Box | None], plan: SlicePlan) -> Crop:
    """The volume's mask of its canonical slices, in the axis order of the volume's array."""
    inside = {index: box for index, box in boxes.items() if box is not None}
    window = hull(inside.values())
    if window is None:
        return Crop(np.zeros((0, 0, 0), np.uint8), (0, 0, 0))
    top, left, bottom, right = window
    first, last = min(inside), max(inside)
    stack = np.zeros((last - first + 1, bottom - top, right - left), np.uint8)
    for index, box in inside.items():
        box.within(stack[index - first], window)[:] = box.mask()
    if plan.flip_rows:
        stack, top = stack[:, ::-1], plan.shape_rc[0] - bottom
    if plan.flip_cols:
        stack, left = stack[:, :, ::-1], plan.shape_rc[1] - right
    if plan.transpose:
        stack, top, left = stack.transpose(0, 2, 1), left, top
    origin = [top, left]
    origin.insert(plan.axis, first)
    return Crop(np.ascontiguousarray(np.moveaxis(stack, 0, plan.axis)), (origin[0], origin[1], origin[2]))
