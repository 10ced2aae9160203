"""What proposals say together: their overlaps as one small matrix, ensembles of them, and when further ones change nothing.

The Gram matrix ``G[i, j] = |mask_i and mask_j|`` holds all that the rankings need (sizes are on its
diagonal), it adds up over slices, and it costs N x N numbers however large the volume is.
"""

from __future__ import annotations

from collections.abc import Generator, Mapping, Sequence
from dataclasses import dataclass
from typing import TypeVar

import numpy as np

from progidiff.errors import InputError
from progidiff.proposals.masks import Box, Window, cut, hull, pack

# float32 counts exactly up to 2**24, so chunks this long are exact, and 50 proposals take 52 MB.
_CHUNK = 1 << 18
_Z95 = 1.959963984540054
_MOST_ITERATIONS = 100
#: Change of the weights of STAPLE below which the estimate has settled, as in ITK.
_SETTLED = 1e-14
_START = 0.99999

_T = TypeVar("_T")


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


def grow_gram(gram: np.ndarray, known: np.ndarray, new: np.ndarray) -> np.ndarray:
    """The Gram matrix of a stack with further proposals on one of its slices.

    Call it once per slice and block: overlaps among the known ones were counted when those were new.

    Args:
        gram: float64 (N, N) so far, of all slices; (0, 0) to begin with.
        known: bool (n, ...), the earlier proposals on this slice.
        new: bool (m, ...), which follow them.

    Returns:
        float64, at least (n + m, n + m); what was counted on other slices is in it.
    """
    first, last = len(known), len(known) + len(new)
    gram = np.pad(gram, ((0, max(0, last - len(gram))),) * 2)
    cross = _intersections(known, new)
    gram[:first, first:last] += cross
    gram[first:last, :first] += cross.T
    gram[first:last, first:last] += gram_matrix(new)
    return gram


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


def agreement(masks: np.ndarray) -> np.ndarray:
    """Share of proposals that contain each voxel: bool (N, ...) -> float32 (...) in [0, 1]."""
    masks = _bool_stack(masks)
    return (np.count_nonzero(masks, axis=0) / len(masks)).astype(np.float32)


def majority(masks: np.ndarray) -> np.ndarray:
    """Voxels that more than half of the proposals contain: bool (N, ...) -> bool (...); an even split is
    background.
    """
    masks = _bool_stack(masks)
    return np.asarray(2 * np.count_nonzero(masks, axis=0) > len(masks))


def consensus_level(histogram: np.ndarray, filled: int) -> int:
    """How many of N proposals have to contain a voxel, so that the mask of these voxels has the highest expected Dice.

    A cut at half of the votes has the fewest wrong voxels. It is not the best one for Dice: that lies at half of the
    Dice that can be reached (Lipton et al., arXiv 1402.1892), so the less the proposals agree, the fewer votes are needed.
    Here ``2 A(L) / (N V(L) + A(1))`` is maximised, A(L) being the votes and V(L) the number of voxels with at least L
    votes: the Dice of the mask with a proposal, with numerator and denominator averaged over the proposals.

    Args:
        histogram: int (N + 1,), voxels by number of votes; the first entry does not count.
        filled: how many of the proposals are not empty.

    Returns:
        L in 1 to N, the highest where several are best; N + 1 where more than half of the proposals are empty, since most of
        them say then that the organ is not there.
    """
    if 2 * filled < len(histogram) - 1:
        return len(histogram)
    votes = np.arange(1, len(histogram))
    counts = np.asarray(histogram[1:], dtype=np.float64)
    voxels = np.cumsum(counts[::-1])[::-1]
    agreed = np.cumsum((counts * votes)[::-1])[::-1]
    if not len(votes) or not agreed[0]:
        return 1
    expected = 2 * agreed / (len(votes) * voxels + agreed[0])
    return int(votes[len(votes) - 1 - np.argmax(expected[::-1])])


def consensus(masks: np.ndarray) -> np.ndarray:
    """Voxels in enough proposals for the highest expected Dice: bool (N, ...) -> bool (...), see :func:`consensus_level`."""
    masks = _bool_stack(masks)
    votes = np.count_nonzero(masks, axis=0)
    filled = int(masks.reshape(len(masks), -1).any(axis=1).sum())
    return np.asarray(votes >= consensus_level(np.bincount(votes.ravel(), minlength=len(masks) + 1), filled))


def staple(masks: np.ndarray) -> np.ndarray:
    """Consensus of STAPLE, see :func:`staple_steps`: bool (N, rows, columns) or (N, slices, rows, columns) -> bool."""
    masks = _bool_stack(masks)
    rows, columns = masks.shape[-2:]
    stack = masks.reshape(len(masks), -1, rows, columns)
    boxes = {index: [pack(mask) for mask in stack[:, index]] for index in range(stack.shape[1])}
    found = finished(staple_steps(boxes))
    whole = (0, 0, rows, columns)
    return np.stack([cut(found[index], whole) for index in range(stack.shape[1])]).reshape(masks.shape[1:])


def finished(steps: Generator[None, None, _T]) -> _T:
    """What work in small steps returns, done at one go."""
    while True:
        try:
            next(steps)
        except StopIteration as end:
            return end.value  # type: ignore[no-any-return]


def staple_steps(slices: Mapping[int, Sequence[Box | None]]) -> Generator[None, None, dict[int, Box | None]]:
    """STAPLE (Warfield et al., IEEE TMI 2004), which weights proposals by how well they fit their consensus, in small steps.

    It runs inside the bounding box of all proposals: its prior is the share of foreground, and a large agreed background
    would push every specificity to 1 and so the consensus towards the union. Voxels on which the proposals vote alike are
    alike to it, so it iterates over the different patterns of votes and how often each occurs; there are far fewer of them
    than voxels.

    Args:
        slices: the masks of all proposals (equally many) on every slice.

    Returns:
        The consensus on every slice: voxels of a probability of at least one half. Yields between portions of work of a few
        milliseconds.
    """
    around = hull(box for boxes in slices.values() for box in boxes)
    filled = [index for index, boxes in slices.items() if any(box is not None for box in boxes)]
    if around is None:
        return dict.fromkeys(slices)
    count = len(slices[filled[0]])
    found = {bytes((count + 7) // 8): 0}
    windows: dict[int, Window] = {}
    codes: dict[int, np.ndarray] = {}
    for index in filled:
        window = windows[index] = hull(slices[index]) or around
        patterns = _patterns(slices[index], window)
        yield
        distinct, inverse = np.unique(patterns, return_inverse=True)
        numbers = np.array([found.setdefault(bytes(pattern), len(found)) for pattern in distinct])
        codes[index] = numbers.astype(np.min_scalar_type(len(found)))[inverse.reshape(-1)]
        yield
    counts = np.sum([np.bincount(code, minlength=len(found)) for code in codes.values()], axis=0)
    # Slices without a mask between others, and the box around a slice's own masks, are background in the same way.
    top, left, bottom, right = around
    counts[0] += (max(filled) - min(filled) + 1) * (bottom - top) * (right - left) - counts.sum()
    seen = counts > 0
    table = np.frombuffer(b"".join(found), np.uint8).reshape(len(found), -1)
    ballots = np.unpackbits(table, axis=1, count=count).astype(np.float64)
    weights = np.zeros(len(found))
    weights[seen] = yield from staple_probability(ballots[seen], counts[seen].astype(np.float64))
    result: dict[int, Box | None] = dict.fromkeys(slices)
    for index, code in codes.items():
        top, left, bottom, right = windows[index]
        result[index] = pack((weights >= 0.5)[code].reshape(bottom - top, right - left), top, left)
        yield
    return result


def _patterns(boxes: Sequence[Box | None], window: Window) -> np.ndarray:
    """How the proposals vote on each pixel: packed bits as one fixed-size byte string for each."""
    top, left, bottom, right = window
    width = (len(boxes) + 7) // 8
    packed = np.zeros((bottom - top, right - left, width), np.uint8)
    for number, box in enumerate(boxes):
        if box is not None:
            part = box.within(packed, window)[..., number // 8]
            part |= box.mask().astype(np.uint8) << (7 - number % 8)
    return packed.reshape(-1, width).view(f"V{width}").reshape(-1)


def staple_probability(ballots: np.ndarray, counts: np.ndarray) -> Generator[None, None, np.ndarray]:
    """Probability of the foreground for each pattern of votes; expectation maximisation in small steps.

    Args:
        ballots: float64 (patterns, N), 1 where the proposal contains the voxel.
        counts: float64 (patterns,), voxels of each.

    Returns:
        float64 (patterns,).
    """
    if (ballots == ballots[:, :1]).all():
        return ballots[:, 0]  # one proposal, or all alike: nothing to weigh
    prior = float(counts @ ballots.mean(axis=1) / counts.sum())
    sensitivity = np.full(ballots.shape[1], _START)
    specificity = np.full(ballots.shape[1], _START)
    weights = np.zeros(len(ballots))
    against = 1.0 - ballots
    for _ in range(_MOST_ITERATIONS):
        with np.errstate(divide="ignore"):
            inside = np.log(prior) + ballots @ np.log(sensitivity) + against @ np.log1p(-sensitivity)
            outside = np.log1p(-prior) + ballots @ np.log1p(-specificity) + against @ np.log(specificity)
        before, weights = weights, 1.0 / (1.0 + np.exp(np.clip(outside - inside, -700, 700)))
        yield
        if counts @ (weights - before) ** 2 < _SETTLED:
            break
        heavy, light = counts * weights, counts * (1.0 - weights)
        sensitivity = np.clip(heavy @ ballots / max(heavy.sum(), 1e-300), 1e-12, 1 - 1e-12)
        specificity = np.clip(light @ against / max(light.sum(), 1e-300), 1e-12, 1 - 1e-12)
        yield
    return weights


def _bool_stack(masks: np.ndarray) -> np.ndarray:
    masks = np.asarray(masks)
    if masks.ndim < 2 or not len(masks):
        raise ValueError("Masks need the shape (proposals, ...) with at least one proposal.")
    return masks if masks.dtype == np.bool_ else masks != 0


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
    :func:`consensus`) changed by less than ``1 - consensus`` (Dice) in ``settled``
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
