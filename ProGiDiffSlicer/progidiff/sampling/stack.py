"""What is known so far of one target: overlaps and volumes of its proposals. It does not grow with the number of slices."""

from __future__ import annotations

import numpy as np

from progidiff.ranking.ensembles import consensus_of_votes
from progidiff.ranking.gram import GramAccumulator, mean_pairwise_dice
from progidiff.ranking.ranking import rand_top_k, rank
from progidiff.ranking.stopping import Overlap, consensus_overlap
from progidiff.wire.messages import ProposeRequest, RankingEvent


class OpenSlice:
    """A slice of one target whose proposals are still being sampled, at the image's own resolution."""

    def __init__(self) -> None:
        self._fresh: list[np.ndarray] = []  # bool (m, H, W), the running block
        self._settled: list[np.ndarray] = []  # packed bits of the closed blocks, along W
        self._votes: np.ndarray | None = None  # int32 (H, W)
        self._filled = 0  # proposals that are not empty
        self.consensus: np.ndarray | None = None  # of the closed blocks, bool (H, W)
        self.majority_pixels = 0  # in more than half of the proposals of the closed blocks
        self._probability: np.ndarray | None = None
        self.count = 0

    def add(self, masks: np.ndarray, probability: np.ndarray) -> None:
        """New proposals, bool (m, H, W), and the sum of their probabilities, float32 (H, W)."""
        votes = masks.sum(0, dtype=np.int32)
        self._fresh.append(masks)
        self._votes = votes if self._votes is None else self._votes + votes
        self._probability = probability if self._probability is None else self._probability + probability
        self._filled += int(masks.any(axis=(1, 2)).sum())
        self.count += len(masks)

    def mean_probability(self) -> np.ndarray:
        """Mean probability of the proposals, float32 (H, W)."""
        assert self._probability is not None
        return np.asarray(self._probability / self.count, np.float32)

    def close_block(self) -> tuple[np.ndarray, np.ndarray]:
        """Proposals of the closed blocks and of the running one, bool (n, H, W) and (m, H, W); closes the latter.

        Closed blocks are kept as bits: a few slices with all targets and proposals would otherwise take gigabytes.
        """
        new = np.concatenate(self._fresh)
        width = new.shape[2]
        known = np.concatenate([new[:0], *(np.unpackbits(bits, axis=-1, count=width).view(bool) for bits in self._settled)])
        self._settled.append(np.packbits(new, axis=-1))
        self._fresh = []
        assert self._votes is not None
        self.consensus = consensus_of_votes(self._votes, self.count, self._filled)
        self.majority_pixels = int(np.count_nonzero(2 * self._votes > self.count))
        return known, new


class TargetStack:
    """Running totals of one target over the slices done so far."""

    def __init__(self, target: str) -> None:
        self.target = target
        self._gram = GramAccumulator()
        self._change = Overlap()
        self.majority_pixels = 0  # in more than half of the proposals

    @property
    def gram(self) -> np.ndarray:
        """Overlaps of all proposals so far, float64 (N, N), in pixels."""
        return self._gram.matrix

    @property
    def count(self) -> int:
        """Proposals so far."""
        return self._gram.count

    def close_block(self, piece: OpenSlice) -> None:
        """Count the overlaps of a slice's new proposals with each other and with its earlier ones."""
        before, pixels = piece.consensus, piece.majority_pixels
        self._gram.grow(*piece.close_block())
        self.majority_pixels += piece.majority_pixels - pixels
        if before is not None and piece.consensus is not None:
            self._change += consensus_overlap(before, piece.consensus)

    def consensus_change(self) -> float:
        """Dice of the consensus before and after the last block over all slices, and a fresh start for the next block."""
        change, self._change = self._change, Overlap()
        return change.dice

    def ranking(self, request: ProposeRequest, voxel_ml: float, reason: str) -> RankingEvent:
        """The target's proposals, ranked over all slices."""
        gram = self.gram
        ranking = rank(gram, request.ranking)
        top = rand_top_k(ranking, request.top_k, request.seed)
        return RankingEvent(
            target=self.target,
            order=list(ranking.order),
            scores=list(ranking.scores),
            groups=[list(group) for group in ranking.groups],
            top_k=list(top.best),
            random_pick=top.pick,
            millilitres=[float(v) for v in np.diagonal(gram) * voxel_ml],
            empty=list(ranking.empty),
            empty_share=ranking.empty_share,
            mean_pairwise_dice=mean_pairwise_dice(gram),
            stop_reason=reason,
        )
