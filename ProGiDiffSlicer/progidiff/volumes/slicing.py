"""A volume as a stack of slices, each in the orientation in which radiologists read it.

The canonical view of a slice has rows from anterior to posterior and columns from the patient's right to left
(axial), rows from superior to inferior and columns from right to left (coronal) or from anterior to posterior
(sagittal). Turning a slice into that view and back only permutes and flips axes, so no voxel is ever
resampled.
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal, get_args

import numpy as np

from progidiff.errors import InputError
from progidiff.volumes.geometry import Geometry, nearest_axes

Plane = Literal["axial", "coronal", "sagittal"]

# By plane, in RAS axes (0 R, 1 A, 2 S): the axis of the slices, then axis and sign of growing rows and
# columns.
_VIEWS: dict[Plane, tuple[int, tuple[int, int], tuple[int, int]]] = {
    "axial": (2, (1, -1), (0, -1)),
    "coronal": (1, (2, -1), (0, -1)),
    "sagittal": (0, (2, -1), (1, -1)),
}

#: Planes of a model that does not say otherwise.
USUAL_PLANES: tuple[Plane, ...] = ("axial",)
#: A volume is clearly acquired along an axis where its slices lie at least so many pixels apart; 0.8 x 0.8 x 0.5 mm is
#: a stack of axial slices, reconstructed finely.
CLEARLY_APART = 1.5


@dataclass(frozen=True)
class SlicePlan:
    """How a volume is cut into slices.

    Attributes:
        axis: axis of the (K, J, I) array along which slices are counted.
        plane: name of the nearest anatomical plane.
        count: number of slices.
        shape_rc: rows and columns of a canonical slice.
        spacing_rc: millimetres between its rows and between its columns.
        slice_spacing: millimetres between slices.
        transpose, flip_rows, flip_cols: what turns an array slice into the canonical view, in this order.
    """

    axis: int
    plane: Plane
    count: int
    shape_rc: tuple[int, int]
    spacing_rc: tuple[float, float]
    slice_spacing: float
    transpose: bool
    flip_rows: bool
    flip_cols: bool

    @property
    def shape_kji(self) -> tuple[int, int, int]:
        """Shape of the volume's array."""
        shape = list(self.shape_rc[::-1] if self.transpose else self.shape_rc)
        shape.insert(self.axis, self.count)
        return (shape[0], shape[1], shape[2])


def plan_slices(geometry: Geometry, plane: str | None = None, known: Sequence[str] = USUAL_PLANES) -> SlicePlan:
    """Plan the slices of a volume in ``plane``, or in the plane in which a model should see it.

    That is the first one that the model knows, unless the volume is clearly acquired in another: it has one voxel across
    that plane, or its spacing across is at least ``CLEARLY_APART`` times the spacings within.

    Args:
        geometry: grid of the volume.
        plane: a plane to take whatever the volume looks like.
        known: the planes of the model's card.

    Raises:
        InputError: ``plane`` is not "axial", "coronal" or "sagittal".
    """
    nearest = nearest_axes(geometry.affine)
    ijk_of_ras = {ras: ijk for ijk, (ras, _) in enumerate(nearest)}
    signs = [sign for _, sign in nearest]

    if plane is None:
        chosen = _best_plane(geometry, ijk_of_ras, known)
    elif plane in _VIEWS:
        chosen = plane
    else:
        raise InputError(f"There is no plane named '{plane}'; choose one of {', '.join(get_args(Plane))}.")

    slice_ras, (row_ras, row_sign), (col_ras, col_sign) = _VIEWS[chosen]
    slice_ijk, row_ijk, col_ijk = ijk_of_ras[slice_ras], ijk_of_ras[row_ras], ijk_of_ras[col_ras]
    return SlicePlan(
        axis=2 - slice_ijk,
        plane=chosen,
        count=geometry.shape_ijk[slice_ijk],
        shape_rc=(geometry.shape_ijk[row_ijk], geometry.shape_ijk[col_ijk]),
        spacing_rc=(geometry.spacing[row_ijk], geometry.spacing[col_ijk]),
        slice_spacing=geometry.spacing[slice_ijk],
        transpose=row_ijk < col_ijk,  # array axes run k, j, i: rows come first when theirs is the larger index
        flip_rows=signs[row_ijk] != row_sign,
        flip_cols=signs[col_ijk] != col_sign,
    )


def _best_plane(geometry: Geometry, ijk_of_ras: dict[int, int], known: Sequence[str]) -> Plane:
    across = {p: ijk_of_ras[_VIEWS[p][0]] for p in _VIEWS}
    single = [p for p in _VIEWS if geometry.shape_ijk[across[p]] == 1]
    if len(single) == 1:
        return single[0]
    for plane, axis in across.items():
        pixel = max(s for n, s in enumerate(geometry.spacing) if n != axis)
        if geometry.spacing[axis] >= CLEARLY_APART * pixel * (1 - 1e-6):
            return plane
    return next((p for p in _VIEWS if p == next(iter(known), None)), USUAL_PLANES[0])


def extract_slice(array_kji: np.ndarray, plan: SlicePlan, index: int) -> np.ndarray:
    """Canonical view (rows, columns) of slice ``index`` of an array (K, J, I); shares the array's memory."""
    _check_index(plan, index)
    view = array_kji[(slice(None),) * plan.axis + (index,)]
    if plan.transpose:
        view = view.T
    return view[:: -1 if plan.flip_rows else 1, :: -1 if plan.flip_cols else 1]


def restore_slice(canonical: np.ndarray, plan: SlicePlan) -> np.ndarray:
    """A canonical slice (rows, columns) in the axis order of the array; it shares the slice's memory."""
    if canonical.shape != plan.shape_rc:
        raise ValueError(f"slice of shape {canonical.shape} does not fit slices of shape {plan.shape_rc}")
    view = canonical[:: -1 if plan.flip_rows else 1, :: -1 if plan.flip_cols else 1]
    return view.T if plan.transpose else view


def insert_slice(array_kji: np.ndarray, plan: SlicePlan, index: int, canonical: np.ndarray) -> None:
    """Write a canonical slice (rows, columns) into slice ``index`` of an array (K, J, I)."""
    _check_index(plan, index)
    array_kji[(slice(None),) * plan.axis + (index,)] = restore_slice(canonical, plan)


def _check_index(plan: SlicePlan, index: int) -> None:
    if not 0 <= index < plan.count:
        raise IndexError(f"slice {index} of {plan.count}")


def parse_slice_range(text: str, count: int) -> range:
    """Slices named by ``"all"``, ``"40"`` or ``"a:b"`` (b not included; both may be left out).

    Raises:
        InputError: the text is none of these, names no slice, or reaches beyond the ``count`` slices.
    """
    stated = f"this image has {count} slice{'s' if count != 1 else ''}, 0 to {count - 1}"
    cleaned = text.strip().lower()
    if cleaned == "all":
        return range(count)
    match = re.fullmatch(r"(\d{1,9})|(\d{0,9})\s*:\s*(\d{0,9})", cleaned, flags=re.ASCII)
    if match is None:
        raise InputError(f"'{text}' is not a range of slices; give 'all', one slice such as 40, or 30:50 ({stated}).")
    single, first, last = match.groups()
    if single is not None:
        start, stop = int(single), int(single) + 1
    else:
        start, stop = int(first or 0), int(last) if last else count
    if stop > count or start >= count:
        raise InputError(f"The slices {text.strip()} reach beyond the image: {stated}; give a range within them.")
    if start >= stop:
        raise InputError(f"The range of slices {text.strip()} is empty; the second number must be larger ({stated}).")
    return range(start, stop)


Bounds = tuple[tuple[int, int], tuple[int, int], tuple[int, int]]


class PackedMask:
    """A mask of shape (K, J, I) packed along I.

    Memory of slices that were never filled is not touched, so an organ costs about an eighth of a byte for
    each voxel of the slices it lies in.
    """

    def __init__(self, shape_kji: tuple[int, int, int]) -> None:
        self.shape = shape_kji
        self._bits = np.zeros((shape_kji[0], shape_kji[1], (shape_kji[2] + 7) // 8), dtype=np.uint8)

    @classmethod
    def from_array(cls, mask: np.ndarray) -> PackedMask:
        """Pack a mask (K, J, I) of bool, or of integers where anything but 0 is inside."""
        k, j, i = mask.shape
        packed = cls((k, j, i))
        for index in range(k):
            if mask[index].any():
                packed._bits[index] = np.packbits(mask[index] != 0, axis=-1)
        return packed

    @classmethod
    def from_bits(cls, bits: np.ndarray, columns: int) -> PackedMask:
        """The mask whose bits along I are ``bits``, uint8 (K, J, ``columns`` / 8 rounded up); a view of them."""
        packed = cls((bits.shape[0], bits.shape[1], columns))
        packed._bits = bits
        return packed

    def plane(self, k: int) -> np.ndarray:
        """Plane ``k`` of the array as bool (J, I)."""
        return np.unpackbits(self._bits[k], axis=-1, count=self.shape[2]).astype(bool)

    def to_array(self) -> np.ndarray:
        """The whole mask as bool (K, J, I)."""
        return np.unpackbits(self._bits, axis=-1, count=self.shape[2]).astype(bool)

    def count(self) -> int:
        """Number of voxels inside the mask."""
        return sum(int(np.unpackbits(self._bits[k]).sum()) for k in range(self.shape[0]))

    def bounds(self) -> Bounds | None:
        """First and last (inclusive) index inside the mask along K, J and I; ``None`` for an empty mask."""
        rows: np.ndarray = np.any(self._bits, axis=2)
        if not rows.any():
            return None
        in_i = np.unpackbits(np.bitwise_or.reduce(self._bits, axis=(0, 1)), count=self.shape[2])
        k, j, i = (_first_last(line) for line in (np.any(rows, axis=1), np.any(rows, axis=0), in_i))
        return (k, j, i)

    def overlaps(self, other: PackedMask) -> bool:
        """Whether any voxel is inside both masks."""
        if self.shape != other.shape:
            raise ValueError(f"masks of shapes {self.shape} and {other.shape} are not on one grid")
        return any(bool((self._bits[k] & other._bits[k]).any()) for k in range(self.shape[0]))


def _first_last(line: np.ndarray) -> tuple[int, int]:
    inside = np.flatnonzero(line)
    return (int(inside[0]), int(inside[-1]))
