"""Pairwise overlaps of proposals as one small matrix.

The Gram matrix ``G[i, j] = |mask_i and mask_j|`` holds all that the rankings need (sizes are on its
diagonal), it adds up over slices, and it costs N x N numbers however large the volume is.
"""

from __future__ import annotations

import numpy as np

# float32 counts exactly up to 2**24, so chunks this long are exact, and 50 proposals take 52 MB.
_CHUNK = 1 << 18


def gram_matrix(masks: np.ndarray) -> np.ndarray:
    """Intersections of all pairs of masks.

    Args:
        masks: bool (N, ...); anything but a bool array is compared with zero.

    Returns:
        float64 (N, N), symmetric, whole numbers; (0, 0) for no masks.

    Raises:
        ValueError: ``masks`` has no proposal axis.
    """
    return _intersections(masks, masks)


def pairwise_dice(gram: np.ndarray) -> np.ndarray:
    """Dice of all pairs: float64 (N, N) in [0, 1]; two empty masks agree (1), an empty and a non-empty
    one do not (0).
    """
    gram = _checked(gram)
    sizes = np.diagonal(gram)
    total = sizes[:, None] + sizes[None, :]
    return np.divide(2.0 * gram, total, out=np.ones_like(gram), where=total > 0)


def mean_pairwise_dice(gram: np.ndarray) -> float:
    """Mean Dice over the pairs of different proposals: the lower, the more diverse; 1 for a single
    proposal.
    """
    count = len(_checked(gram))
    if count < 2:
        return 1.0
    return float((pairwise_dice(gram).sum() - count) / (count * (count - 1)))


class GramAccumulator:
    """Gram matrix of a stack, built slice by slice and block by block.

    ``add`` takes the masks of all proposals on one slice. Where more proposals are sampled later,
    ``grow`` takes them together with the earlier ones, again slice by slice. The result is the same as
    :func:`gram_matrix` on the whole stack.
    """

    def __init__(self) -> None:
        self._gram = np.zeros((0, 0), dtype=np.float64)

    @property
    def count(self) -> int:
        """Number of proposals seen."""
        return len(self._gram)

    @property
    def matrix(self) -> np.ndarray:
        """float64 (N, N), a copy."""
        return self._gram.copy()

    def add(self, masks: np.ndarray) -> None:
        """Add one slice (or any part) of all proposals: bool (N, ...).

        Raises:
            ValueError: a different number of proposals than before; later proposals come through
                :meth:`grow`.
        """
        if self.count not in (0, len(masks)):
            raise ValueError(f"Expected {self.count} masks, one per proposal, but got {len(masks)}; use grow for new ones.")
        self._enlarge(len(masks))
        self._gram += gram_matrix(masks)

    def grow(self, known: np.ndarray, new: np.ndarray) -> None:
        """Add further proposals on one slice: ``known`` bool (n, ...) are the earlier ones there, ``new``
        (m, ...) follow them.

        Call it once per slice; the overlaps among the known ones were counted by :meth:`add` and are not
        counted again.

        Raises:
            ValueError: the numbers of masks do not fit those of earlier calls.
        """
        first, last = len(known), len(known) + len(new)
        if first > self.count or self.count not in (first, last):
            raise ValueError(f"{first} known and {len(new)} new masks do not follow {self.count} proposals.")
        self._enlarge(last)
        cross = _intersections(known, new)
        self._gram[:first, first:] += cross
        self._gram[first:, :first] += cross.T
        self._gram[first:, first:] += gram_matrix(new)

    def _enlarge(self, count: int) -> None:
        extra = count - self.count
        if extra > 0:
            self._gram = np.pad(self._gram, ((0, extra), (0, extra)))


def _intersections(a: np.ndarray, b: np.ndarray) -> np.ndarray:
    a, b = _flat(a), _flat(b)
    if len(a) and len(b) and a.shape[1] != b.shape[1]:
        raise ValueError(f"Masks of {a.shape[1]} and of {b.shape[1]} voxels cannot be compared.")
    result = np.zeros((len(a), len(b)), dtype=np.float64)
    if not result.size:
        return result
    for start in range(0, a.shape[1], _CHUNK):
        part_a, part_b = a[:, start : start + _CHUNK], b[:, start : start + _CHUNK]
        # Organs cover a few per cent of an image: only voxels that some mask of each side contains can count.
        used = part_a.any(axis=0) & part_b.any(axis=0)
        if used.any():
            result += part_a[:, used].astype(np.float32) @ part_b[:, used].astype(np.float32).T
    return result


def _flat(masks: np.ndarray) -> np.ndarray:
    masks = np.asarray(masks)
    if masks.ndim < 2:
        raise ValueError("Masks need the shape (proposals, ...).")
    if masks.dtype != np.bool_:
        masks = masks != 0
    size = int(np.prod(masks.shape[1:]))
    return masks.reshape(len(masks), size)


def _checked(gram: np.ndarray) -> np.ndarray:
    gram = np.asarray(gram, dtype=np.float64)
    if gram.ndim != 2 or gram.shape[0] != gram.shape[1] or not len(gram):
        raise ValueError(f"A Gram matrix is square and not empty, not of shape {gram.shape}.")
    return gram
