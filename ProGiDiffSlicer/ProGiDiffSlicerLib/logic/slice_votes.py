"""The proposals of one target on one slice, and what they say together."""

from __future__ import annotations

from typing import NamedTuple

import numpy as np

from ProGiDiffSlicerLib.logic.boxes import Box, hull, moved, pack, votes
from ProGiDiffSlicerLib.logic.rows import MAJORITY, MEAN


class Tally(NamedTuple):
    """Voxels of a mask, and the sum of the shares of proposals that contain them."""

    voxels: int = 0
    agreed: float = 0.0


class SliceVotes:
    """Masks in the axis order of the volume's array.

    Attributes:
        boxes: the mask of each proposal.
        sizes: voxels of each.
        shared: float64, one for each proposal: over its voxels, the sum of the proposals that contain them.
        uncertainty: sum of p (1 - p) over the voxels, p being the share of proposals that contain them.
        histogram: int64, by number of votes, the voxels that so many proposals contain; the first entry means nothing.

    ``shared``, ``uncertainty`` and ``histogram`` hold once it is settled.
    """

    def __init__(self) -> None:
        self.boxes: list[Box | None] = []
        self.sizes: list[int] = []
        self.settled = False
        self.shared = np.zeros(0)
        self.uncertainty = 0.0
        self.histogram = np.zeros(1, np.int64)
        self._counts, self._corner = np.zeros((0, 0), np.uint8), (0, 0)
        self._mean: Box | None = None
        self._has_mean = False
        self._ensembles: dict[str, tuple[Box | None, Tally]] = {}

    def append(self, mask: np.ndarray) -> None:
        """The mask of the next proposal, bool (rows, columns)."""
        self.boxes.append(pack(mask))
        self.sizes.append(int(np.count_nonzero(mask)))
        self.settled = self._has_mean = False

    def set_mean(self, mask: np.ndarray) -> None:
        """Where the mean probability of the proposals so far is above one half."""
        self._mean, self._has_mean = pack(mask), True
        self.settled = False

    def settle(self) -> None:
        """Count the votes."""
        self.settled = True
        count = len(self.boxes)
        self.shared = np.zeros(count)
        self.uncertainty = 0.0
        self.histogram = np.zeros(count + 1, np.int64)
        self._counts, self._corner = np.zeros((0, 0), np.uint8), (0, 0)
        around = hull([*self.boxes, self._mean if self._has_mean else None])
        if around is None:
            self._ensembles = {MAJORITY: (None, Tally()), MEAN: (None, Tally())}
            return
        counts = votes(self.boxes, around)
        top, left = around[:2]
        for number, box in enumerate(self.boxes):
            if box is not None:
                self.shared[number] = _sum_inside(counts, box, top, left)
        self.histogram = np.bincount(counts.ravel(), minlength=count + 1)
        self._counts, self._corner = counts.astype(np.uint8 if count < 256 else np.uint16), (top, left)
        share = counts / count
        self.uncertainty = float((share * (1.0 - share)).sum())
        majority = moved(pack(2 * counts > count), top, left)
        # Proposals of a slice that was not finished have no mean probability; the majority stands in for it.
        mean = self._mean if self._has_mean else majority
        self._ensembles = {
            name: (box, _tally(counts, count, box, top, left)) for name, box in ((MAJORITY, majority), (MEAN, mean))
        }

    def ensemble(self, name: str) -> tuple[Box | None, Tally]:
        """The majority, or the mask of the mean probability; settled first."""
        return self._ensembles[name]

    def at_least(self, votes: int) -> Box | None:
        """The voxels that at least so many proposals contain; settled first."""
        return moved(pack(self._counts >= votes), *self._corner) if self._counts.size else None

    def at_least_tally(self, votes: int) -> Tally:
        """Of :meth:`at_least`, without making the mask."""
        voxels = self.histogram[votes:]
        agreed = (voxels * np.arange(votes, votes + len(voxels))).sum() / max(1, len(self.boxes))
        return Tally(int(voxels.sum()), float(agreed))

    def tally(self, box: Box | None) -> Tally:
        """Of any mask on this slice."""
        around = hull([*self.boxes, box])
        if box is None or around is None:
            return Tally()
        return _tally(votes(self.boxes, around), len(self.boxes), box, *around[:2])


def _tally(counts: np.ndarray, count: int, box: Box | None, top: int, left: int) -> Tally:
    if box is None:
        return Tally()
    return Tally(int(np.count_nonzero(box.mask())), _sum_inside(counts, box, top, left) / count)


def _sum_inside(counts: np.ndarray, box: Box, top: int, left: int) -> int:
    rows, columns = box.window
    part = counts[rows.start - top : rows.stop - top, columns.start - left : columns.stop - left]
    return int(part[box.mask()].sum(dtype=np.int64))
