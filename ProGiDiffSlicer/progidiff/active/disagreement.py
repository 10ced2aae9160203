"""How much the proposals of one target disagree, as one number.

The number is ``presence x (d + h) / 2``, in [0, 1]:

``d``
    1 minus the mean Dice over all pairs of proposals (Roy et al., Bayesian QuickNAT, arXiv 1811.09800, whose structure-wise
    uncertainty is the same pairwise Dice between Monte Carlo samples), over all slices that were looked at.
``h``
    Mean binary entropy, in bits, of the agreement map over the pixels that at least one proposal contains. It tells a seam
    of doubt along an outline from proposals that lie in different places, where few pairs decide ``d``.
``presence``
    How likely the organ is there at all: the mean probability of the 50 mm² that most likely belong to it, on the slice
    where that is highest. Where an organ is absent, proposals are empty (``d`` is 0) or scattered specks that overlap
    nowhere (``d`` is near 1). The specks of N proposals leave every pixel a mean probability of about 1/N, so that such
    volumes do not come out as the most uncertain ones.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from progidiff.proposals.votes import grow_gram, mean_pairwise_dice
from progidiff.sampling.presence import PRESENCE_MM2

#: Mean probability from which something counts as found on a slice.
FOUND = 0.5


@dataclass(frozen=True)
class Disagreement:
    """The number and its parts, all in [0, 1]; ``empty_share`` is the share of proposals without a pixel."""

    value: float
    presence: float
    pairwise: float
    entropy: float
    empty_share: float


@dataclass(frozen=True)
class SliceDoubt:
    """One target on one slice.

    Attributes:
        index: slice index.
        presence: see the module's text, on this slice alone.
        pixels: pixels that at least one proposal contains.
        entropy: sum of their binary entropies, in bits.
        weight: presence x entropy x pixel area in mm²: where a correction would change most.
        centre_rc: centre of the entropy in canonical rows and columns, or ``None`` where the proposals agree.
    """

    index: int
    presence: float
    pixels: int
    entropy: float
    weight: float
    centre_rc: tuple[float, float] | None


class TargetDoubt:
    """Collects the slices of one target and sums them up.

    Args:
        pixel_mm2: area of a pixel.
    """

    def __init__(self, pixel_mm2: float) -> None:
        self._pixel_mm2 = pixel_mm2
        self._gram = np.zeros((0, 0))
        self.slices: list[SliceDoubt] = []

    def add(self, index: int, masks: np.ndarray, mean_probability: np.ndarray) -> None:
        """Add a slice: masks bool (N, rows, columns) and their mean probability float (rows, columns)."""
        self._gram = grow_gram(self._gram, masks[:0], masks)
        entropy = binary_entropy(masks.mean(axis=0, dtype=np.float64))
        presence = likely_presence(mean_probability, self._pixel_mm2)
        total = float(entropy.sum())
        self.slices.append(
            SliceDoubt(
                index=index,
                presence=presence,
                pixels=int(np.count_nonzero(masks.any(axis=0))),
                entropy=total,
                weight=presence * total * self._pixel_mm2,
                centre_rc=_centre(entropy),
            )
        )

    @property
    def looked_at(self) -> list[int]:
        """Indices of the slices so far, ascending."""
        return sorted(s.index for s in self.slices)

    def found_on(self) -> list[int]:
        """Slices on which the organ is more likely there than not, ascending."""
        return sorted(s.index for s in self.slices if s.presence >= FOUND)

    def likeliest(self) -> SliceDoubt:
        """The slice on which the organ is most likely."""
        return max(self.slices, key=lambda s: s.presence)

    def most_uncertain(self) -> SliceDoubt:
        """The slice on which a correction would change most; the likeliest one where the proposals agree everywhere."""
        chosen = max(self.slices, key=lambda s: s.weight)
        return chosen if chosen.weight > 0 else self.likeliest()

    def disagreement(self) -> Disagreement:
        """The number over all slices so far."""
        pixels = sum(s.pixels for s in self.slices)
        pairwise = 1.0 - mean_pairwise_dice(self._gram)
        entropy = sum(s.entropy for s in self.slices) / pixels if pixels else 0.0
        presence = max(s.presence for s in self.slices)
        value = presence * (pairwise + entropy) / 2
        return Disagreement(value, presence, pairwise, entropy, float(np.mean(np.diagonal(self._gram) == 0)))


def binary_entropy(share: np.ndarray) -> np.ndarray:
    """Entropy in bits of a yes with probability ``share``: float64, same shape, in [0, 1]."""
    p = np.clip(np.asarray(share, np.float64), 0.0, 1.0)
    inside = (p > 0) & (p < 1)
    entropy = np.zeros_like(p)
    q = p[inside]
    entropy[inside] = -q * np.log2(q) - (1 - q) * np.log2(1 - q)
    return entropy


def likely_presence(mean_probability: np.ndarray, pixel_mm2: float) -> float:
    """Mean of the ``PRESENCE_MM2`` of highest probability on a slice, at least one pixel."""
    flat = np.asarray(mean_probability).reshape(-1)
    count = min(max(1, round(PRESENCE_MM2 / pixel_mm2)), flat.size)
    return float(np.partition(flat, flat.size - count)[flat.size - count :].mean(dtype=np.float64))


def _centre(entropy: np.ndarray) -> tuple[float, float] | None:
    total = entropy.sum()
    if total <= 0:
        return None
    rows, columns = np.indices(entropy.shape)
    return float((rows * entropy).sum() / total), float((columns * entropy).sum() / total)
