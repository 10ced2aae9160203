"""Masks of whole volumes at one bit per voxel, so that many proposals fit into memory."""

from __future__ import annotations

import numpy as np

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
