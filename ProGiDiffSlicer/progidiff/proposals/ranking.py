"""Ranking of proposals without ground truth, near-duplicates, and RandTop-k.

Two scores: the soft Dice confidence of Borges et al. (arXiv 2402.10665) against the mean of the
proposals, and, as a baseline, the mean Dice to the other proposals (whose best one is the medoid). Both
come from the Gram matrix alone.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from progidiff.errors import InputError
from progidiff.proposals.votes import mean_pairwise_dice, pairwise_dice
from progidiff.wire.messages import ProposeRequest, RankingEvent
from progidiff.wire.request import RankingMethod

DUPLICATE_DICE = 0.98
"""Proposals whose Dice is above this look the same to a reader and are shown once."""


@dataclass(frozen=True)
class Ranking:
    """Proposals in the order in which they should be looked at.

    Attributes:
        order: proposal indices, best first; one representative for each group of near-duplicates.
        scores: the score of every proposal, by proposal index, in [0, 1].
        groups: for each entry of ``order`` its group, the representative first.
        empty: whether each proposal is empty, by proposal index.
        method: the score that was used.
    """

    order: tuple[int, ...]
    scores: tuple[float, ...]
    groups: tuple[tuple[int, ...], ...]
    empty: tuple[bool, ...]
    method: RankingMethod

    @property
    def weights(self) -> tuple[int, ...]:
        """How many proposals each entry of ``order`` stands for."""
        return tuple(len(group) for group in self.groups)

    @property
    def empty_share(self) -> float:
        """Share of proposals that contain nothing."""
        return sum(self.empty) / len(self.empty)


@dataclass(frozen=True)
class RandTopK:
    """The k best representatives, best first, and one of them picked at random."""

    best: tuple[int, ...]
    pick: int


def soft_dice_confidence(gram: np.ndarray) -> np.ndarray:
    """Soft Dice confidence of each proposal against the mean p of all: 2 sum(p m) / (sum(p) + sum(m)).

    Empty proposals need a rule of their own, since the formula gives them 0 even where nearly all are
    empty. With e the share of empty proposals, a non-empty one scores (1 - e) times its confidence
    against the mean of the non-empty ones (it is wholly wrong where the organ is absent), and an empty
    one scores e where most are empty, otherwise 0. So the empty answer comes first exactly where it is
    the majority's. Without empty proposals this is the paper's formula.

    Args:
        gram: float64 (N, N), see :func:`progidiff.proposals.votes.gram_matrix`.

    Returns:
        float64 (N,) in [0, 1]; 1 for a single proposal or identical ones.
    """
    gram = np.asarray(gram, dtype=np.float64)
    sizes = np.diagonal(gram)
    full = sizes > 0
    share = 1.0 - full.mean()
    scores = np.full(len(gram), share if share > 0.5 else 0.0)
    if full.any():
        inner = gram[np.ix_(full, full)]
        inner_sizes = sizes[full]
        # With p the mean of n masks: sum(p m_i) = sum_j G_ij / n and sum(p) = sum_j G_jj / n.
        confidence = 2.0 * inner.sum(axis=1) / (inner_sizes.sum() + len(inner) * inner_sizes)
        scores[full] = (1.0 - share) * confidence
    return scores


def medoid_scores(gram: np.ndarray) -> np.ndarray:
    """Mean Dice of each proposal to the others: float64 (N,) in [0, 1]; 1 for a single proposal. Two
    empty masks agree.
    """
    dice = pairwise_dice(gram)
    count = len(dice)
    if count == 1:
        return np.ones(1)
    return np.asarray((dice.sum(axis=1) - 1.0) / (count - 1))


def rank(gram: np.ndarray, method: RankingMethod = "soft_dice", duplicate_dice: float = DUPLICATE_DICE) -> Ranking:
    """Order proposals by their score and fold near-duplicates into their best member.

    Equal scores keep the order of the proposals, so the result does not depend on rounding or on the
    platform. A proposal joins the group of the best-ranked representative to which its Dice is above
    ``duplicate_dice``; groups do not chain.

    Raises:
        InputError: the method is unknown, or there are no proposals.
    """
    gram = np.asarray(gram, dtype=np.float64)
    if gram.size == 0:
        raise InputError("There are no proposals to rank; ask for at least one.")
    if method == "soft_dice":
        scores = soft_dice_confidence(gram)
    elif method == "medoid":
        scores = medoid_scores(gram)
    else:
        raise InputError(f"There is no ranking method '{method}'; choose 'soft_dice' or 'medoid'.")
    dice = pairwise_dice(gram)
    groups: list[list[int]] = []
    for index in np.argsort(-scores.round(12), kind="stable").tolist():
        for group in groups:
            if dice[group[0], index] > duplicate_dice:
                group.append(index)
                break
        else:
            groups.append([index])
    return Ranking(
        order=tuple(group[0] for group in groups),
        scores=tuple(float(score) for score in scores),
        groups=tuple(tuple(group) for group in groups),
        empty=tuple(bool(size == 0) for size in np.diagonal(gram)),
        method=method,
    )


def rand_top_k(ranking: Ranking, k: int, seed: int) -> RandTopK:
    """The k best distinct proposals and a seeded random pick among them, each equally likely.

    Where near-duplicates leave fewer than k, all of them are taken. The same seed gives the same pick.

    Raises:
        InputError: k is below 1.
    """
    if k < 1:
        raise InputError(f"The number of best proposals must be at least 1, not {k}.")
    best = ranking.order[:k]
    return RandTopK(best=best, pick=best[int(np.random.default_rng(seed).integers(len(best)))])


def ranking_event(target: str, gram: np.ndarray, request: ProposeRequest, voxel_ml: float, stop_reason: str) -> RankingEvent:
    """What the engine says of a target's proposals.

    Args:
        target: canonical name.
        gram: overlaps of all proposals, float64 (N, N), in voxels.
        request: says how they are scored, and of how many one is drawn.
        voxel_ml: volume of a voxel.
        stop_reason: why sampling ended, as a sentence.

    Raises:
        InputError: there are no proposals, or the request cannot be served.
    """
    ranking = rank(gram, request.ranking)
    top = rand_top_k(ranking, request.top_k, request.seed)
    return RankingEvent(
        target=target,
        order=list(ranking.order),
        scores=list(ranking.scores),
        groups=[list(group) for group in ranking.groups],
        top_k=list(top.best),
        random_pick=top.pick,
        millilitres=[float(v) for v in np.diagonal(gram) * voxel_ml],
        empty=list(ranking.empty),
        empty_share=ranking.empty_share,
        mean_pairwise_dice=mean_pairwise_dice(gram),
        stop_reason=stop_reason,
    )
