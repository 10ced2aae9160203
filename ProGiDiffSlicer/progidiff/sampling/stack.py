"""What is known so far of one target: overlaps and volumes of its proposals. It does not grow with the number of slices."""

from __future__ import annotations

from dataclasses import dataclass, field

import numpy as np

from progidiff.events import ProposeRequest, RankingEvent
from progidiff.ranking.gram import GramAccumulator, mean_pairwise_dice
from progidiff.ranking.ranking import rand_top_k, rank
from progidiff.ranking.stopping import Overlap, consensus_overlap


@dataclass
class OpenSlice:
    """A slice of one target whose proposals are still being sampled, at the image's own resolution.

    Attributes:
        masks: bool arrays (n, H, W) in order of the proposals; one per finished block, then those of the running one.
        probability: float32 (H, W), sum of the proposals' probabilities.
        counted: proposals whose overlaps have been counted.
    """

    masks: list[np.ndarray] = field(default_factory=list)
    probability: np.ndarray | None = None
    counted: int = 0

    def add(self, masks: np.ndarray, probabilities: np.ndarray) -> None:
        """New proposals (m, H, W) and their probabilities."""
        self.masks.append(masks)
        total = probabilities.sum(0)
        self.probability = total if self.probability is None else self.probability + total

    @property
    def count(self) -> int:
        """Proposals so far."""
        return sum(len(m) for m in self.masks)

    def agreement(self) -> np.ndarray:
        """Share of proposals that contain each pixel, float32 (H, W)."""
        return np.asarray(sum(m.sum(0, dtype=np.float32) for m in self.masks) / self.count, np.float32)

    def mean_probability(self) -> np.ndarray:
        """Mean probability of the proposals, float32 (H, W)."""
        assert self.probability is not None
        return np.asarray(self.probability / self.count, np.float32)


class TargetStack:
    """Running totals of one target over the slices done so far."""

    def __init__(self, target: str) -> None:
        self.target = target
        self._gram = GramAccumulator()
        self._change = Overlap()

    @property
    def gram(self) -> np.ndarray:
        """Overlaps of all proposals so far, float64 (N, N), in pixels."""
        return self._gram.matrix

    def close_block(self, piece: OpenSlice) -> None:
        """Count the overlaps of a slice's new proposals with each other and with its earlier ones."""
        everything = np.concatenate(piece.masks)
        known, new = everything[: piece.counted], everything[piece.counted :]
        self._gram.grow(known, new)
        if len(known):
            self._change += consensus_overlap(known.mean(0), everything.mean(0))
        piece.masks, piece.counted = [everything], len(everything)

    def consensus_change(self) -> float | None:
        """Dice of the consensus before and after the last block over all slices, and a fresh start for the next block."""
        change, self._change = self._change, Overlap()
        return change.dice

    def ranking(self, request: ProposeRequest, voxel_ml: float, reason: str) -> RankingEvent:
        """The target's proposals, ranked over all slices."""
        ranking = rank(self.gram, request.ranking)
        top = rand_top_k(ranking, request.top_k, request.seed)
        return RankingEvent(
            target=self.target,
            order=list(ranking.order),
            scores=list(ranking.scores),
            groups=[list(group) for group in ranking.groups],
            top_k=list(top.best),
            random_pick=top.pick,
            millilitres=[float(v) for v in np.diagonal(self.gram) * voxel_ml],
            empty=list(ranking.empty),
            empty_share=ranking.empty_share,
            mean_pairwise_dice=mean_pairwise_dice(self.gram),
            stop_reason=reason,
        )
