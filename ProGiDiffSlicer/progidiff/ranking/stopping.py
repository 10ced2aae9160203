"""When further proposals no longer change the answer."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from progidiff.errors import InputError
from progidiff.ranking.gram import mean_pairwise_dice, pairwise_dice

_Z95 = 1.959963984540054


@dataclass(frozen=True)
class StopDecision:
    """Whether to stop, and why, as a sentence for the user.

    Attributes:
        stop: whether sampling should end.
        reason: one sentence.
        proposals: number of proposals so far.
        mean_dice: their mean pairwise Dice.
        half_width: half the width of its 95 % confidence interval; infinite below three proposals.
        consensus_dice: Dice of the last two consensus masks, or ``None`` at the first block.
    """

    stop: bool
    reason: str
    proposals: int
    mean_dice: float
    half_width: float
    consensus_dice: float | None


@dataclass(frozen=True)
class Overlap:
    """Voxel counts of two consensus masks and of their intersection; they add up over slices."""

    intersection: int = 0
    before: int = 0
    after: int = 0

    def __add__(self, other: Overlap) -> Overlap:
        return Overlap(self.intersection + other.intersection, self.before + other.before, self.after + other.after)

    @property
    def dice(self) -> float:
        """Dice of the two masks; two empty ones agree (1)."""
        total = self.before + self.after
        return 2.0 * self.intersection / total if total else 1.0


def consensus_overlap(before: np.ndarray, after: np.ndarray) -> Overlap:
    """Overlap of two consensus masks, bool (...)."""
    a, b = np.asarray(before, dtype=bool), np.asarray(after, dtype=bool)
    return Overlap(int(np.count_nonzero(a & b)), int(np.count_nonzero(a)), int(np.count_nonzero(b)))


def mean_dice_half_width(gram: np.ndarray) -> float:
    """Half the width of the 95 % confidence interval of the mean pairwise Dice.

    Pairs share proposals and are not independent, so the variance is the jackknife over proposals (the
    usual one for a U-statistic: Arvesen, Ann. Math. Stat. 1969). Infinite below three proposals, where
    nothing can be said.
    """
    dice = pairwise_dice(gram)
    count = len(dice)
    if count < 3:
        return float("inf")
    rows = dice.sum(axis=1) - 1.0
    without = (rows.sum() - 2.0 * rows) / ((count - 1) * (count - 2))
    variance = (count - 1) / count * float(((without - without.mean()) ** 2).sum())
    return _Z95 * float(np.sqrt(variance))


class AdaptiveStopping:
    """Sample in blocks until the consensus has settled.

    Stops when there are at least ``minimum`` proposals and the consensus mask (of highest expected Dice, see
    :func:`progidiff.ranking.ensembles.consensus`) changed by less than ``1 - consensus`` (Dice) in ``settled``
    blocks in a row; or at ``maximum`` proposals. A block that moves the consensus starts the count again.

    Args:
        block: proposals per block.
        minimum: proposals below which sampling goes on in any case.
        maximum: proposals at which sampling ends in any case.
        consensus: wanted Dice of the consensus masks before and after a block.
        settled: how many blocks in a row must leave the consensus as it is.

    Raises:
        InputError: numbers that can never be met.
    """

    def __init__(
        self,
        block: int = 4,
        minimum: int = 8,
        maximum: int = 32,
        consensus: float = 0.98,
        settled: int = 2,
    ) -> None:
        if block < 1 or settled < 1 or not 1 <= minimum <= maximum:
            raise InputError(
                "Adaptive sampling needs blocks of at least 1 and 1 <= minimum <= maximum, "
                f"not blocks of {block} between {minimum} and {maximum}."
            )
        self.block = block
        self.minimum = minimum
        self.maximum = maximum
        self.consensus = consensus
        self.settled = settled
        self._quiet = 0

    def next_block(self, proposals: int) -> int:
        """How many proposals to sample next, never beyond ``maximum``; 0 at the maximum."""
        return max(0, min(self.block, self.maximum - proposals))

    def update(self, gram: np.ndarray, consensus_dice: float | None) -> StopDecision:
        """Decide after a block.

        Args:
            gram: Gram matrix of all proposals so far, (N, N).
            consensus_dice: Dice of the consensus before and after this block, ``None`` for the first
                block; over a volume add :class:`Overlap` of its slices.
        """
        count = len(gram)
        mean, width = mean_pairwise_dice(gram), mean_dice_half_width(gram)
        steady = consensus_dice is not None and consensus_dice > self.consensus
        self._quiet = self._quiet + 1 if steady else 0

        def decide(stop: bool, reason: str) -> StopDecision:
            return StopDecision(stop, reason, count, mean, width, consensus_dice)

        if count >= self.minimum and self._quiet >= self.settled:
            return decide(
                True,
                f"Stopped at {count} proposals: the consensus has settled (Dice {consensus_dice:.3f} to the "
                f"previous one, mean pairwise Dice {mean:.3f} ± {width:.3f}).",
            )
        if count >= self.maximum:
            return decide(
                True,
                f"Stopped at the maximum of {self.maximum} proposals: they had not settled before "
                f"(mean pairwise Dice {mean:.3f} ± {width:.3f}).",
            )
        if count < self.minimum:
            return decide(False, f"Going on: {count} of at least {self.minimum} proposals.")
        return decide(False, f"Going on: the consensus was steady in {self._quiet} of {self.settled} blocks in a row.")
