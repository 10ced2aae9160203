"""Collects the proposals of a whole volume as they stream in, one bit per voxel and proposal."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass, field

import numpy as np

from progidiff.errors import ProtocolError
from progidiff.ranking.ensembles import consensus_level, staple
from progidiff.volumes.packed import Bounds, PackedMask
from progidiff.volumes.slicing import SlicePlan
from progidiff.wire.messages import DoneEvent, Event, RankingEvent, SliceEvent, WarningEvent

# STAPLE holds all proposals of the organ's box as bytes, and iterates over them; beyond this it would take
# minutes.
STAPLE_LIMIT_BYTES = 250_000_000
# The mask of a mean probability, as in progidiff.ranking.ensembles.mean_probability.
_THRESHOLD = 0.5


@dataclass(frozen=True)
class Votes:
    """How the proposals of one target vote.

    Attributes:
        agreement: float32 (K, J, I), share of proposals that contain the voxel; 0 outside the requested
            slices.
        majority_voxels: voxels in more than half of the proposals.
        consensus_share: share of proposals that have to contain a voxel of the consensus; above 1 where it is empty.
    """

    agreement: np.ndarray
    majority_voxels: int
    consensus_share: float

    def consensus(self) -> np.ndarray:
        """Voxels in enough proposals for the highest expected Dice, uint8 (K, J, I); see
        :func:`progidiff.ranking.ensembles.consensus`.
        """
        return (self.agreement >= self.consensus_share).astype(np.uint8)


class GatheredTarget:
    """All proposals of one target.

    Attributes:
        masks: one packed mask (K, J, I) per proposal.
        ensemble: the voxels whose mean probability is above one half.
        ranking: the worker's ranking, once it has come.
    """

    def __init__(self, plan: SlicePlan, shape_kji: tuple[int, int, int]) -> None:
        self.masks: list[PackedMask] = []
        self.ensemble = PackedMask(shape_kji)
        self.ranking: RankingEvent | None = None
        self._plan = plan
        self._shape = shape_kji
        self._seen: dict[int, set[int]] = {}
        self._averaged: set[int] = set()

    def add(self, event: SliceEvent) -> None:
        """Take in the masks of one slice.

        Raises:
            ProtocolError: the slice is not one of this image.
        """
        if event.masks.shape[1:] != self._plan.shape_rc or not 0 <= event.slice_index < self._plan.count:
            raise ProtocolError(
                "The worker sent a slice that does not fit the image; install the same version on both sides."
            )
        for number, mask in enumerate(event.masks, start=event.first_proposal):
            while len(self.masks) <= number:
                self.masks.append(PackedMask(self._shape))
            self.masks[number].set_slice(self._plan, event.slice_index, mask)
            self._seen.setdefault(number, set()).add(event.slice_index)
        if event.mean_probability is not None:
            self.ensemble.set_slice(self._plan, event.slice_index, event.mean_probability > _THRESHOLD)
            self._averaged.add(event.slice_index)

    def check(self, slices: range) -> RankingEvent:
        """The ranking, once everything has come.

        Raises:
            ProtocolError: a ranking, a slice of a proposal or a mean probability is missing.
        """
        wanted = set(slices)
        ranking = self.ranking
        complete = (
            ranking is not None
            and bool(ranking.order)
            and len(self.masks) == len(ranking.scores) == len(ranking.millilitres) == len(ranking.empty)
            and all(self._seen.get(number) == wanted for number in range(len(self.masks)))
            and self._averaged >= wanted
        )
        if ranking is None or not complete:
            raise ProtocolError("The worker left out a part of the result; install the same version on both sides.")
        return ranking

    def votes(self) -> Votes:
        """Agreement map, majority and consensus, made plane by plane."""
        agreement = np.zeros(self._shape, dtype=np.float32)
        majority, count = 0, len(self.masks)
        histogram = np.zeros(count + 1, dtype=np.int64)
        bounds = self._union()
        if bounds is not None:
            for k in range(bounds[0][0], bounds[0][1] + 1):
                votes = np.zeros(self._shape[1:], dtype=np.uint16)
                for mask in self.masks:
                    votes += mask.plane(k)
                agreement[k] = votes / count
                majority += int(np.count_nonzero(2 * votes > count))
                histogram += np.bincount(votes.ravel(), minlength=count + 1)
        level = consensus_level(histogram, sum(mask.count() > 0 for mask in self.masks))
        # half a vote less, so that rounding decides nothing
        return Votes(agreement, majority, (level - 0.5) / max(count, 1))

    def staple_voxels(self) -> int | None:
        """Voxels of the STAPLE consensus; ``None`` where the organ is too large to compute it in reasonable
        time.
        """
        bounds = self._union()
        if bounds is None:
            return 0
        (k0, k1), (j0, j1), (i0, i1) = bounds
        box = (k1 - k0 + 1, j1 - j0 + 1, i1 - i0 + 1)
        if len(self.masks) * int(np.prod(box, dtype=np.int64)) > STAPLE_LIMIT_BYTES:
            return None
        stack = np.zeros((len(self.masks), *box), dtype=bool)
        for number, mask in enumerate(self.masks):
            for k in range(k0, k1 + 1):
                stack[number, k - k0] = mask.plane(k)[j0 : j1 + 1, i0 : i1 + 1]
        return int(np.count_nonzero(staple(stack).mask))

    def mask_slice(self, number: int, index: int) -> np.ndarray:
        """Canonical view, bool (rows, columns), of slice ``index`` of one proposal."""
        return canonical_slice(self.masks[number], self._plan, index)

    def _union(self) -> Bounds | None:
        """Bounding box of all proposals together."""
        boxes = [box for mask in self.masks if (box := mask.bounds()) is not None]
        if not boxes:
            return None
        k, j, i = ((min(box[a][0] for box in boxes), max(box[a][1] for box in boxes)) for a in range(3))
        return (k, j, i)


def canonical_slice(mask: PackedMask, plan: SlicePlan, index: int) -> np.ndarray:
    """Canonical view, bool (rows, columns), of a slice of a packed mask, without unpacking the rest along
    K.
    """
    if plan.axis == 0:
        raw = mask.plane(index)
    else:
        raw = np.stack([mask.plane(k)[index] if plan.axis == 1 else mask.plane(k)[:, index] for k in range(mask.shape[0])])
    if plan.transpose:
        raw = raw.T
    return raw[:: -1 if plan.flip_rows else 1, :: -1 if plan.flip_cols else 1]


@dataclass
class Gathered:
    """Everything one request brought."""

    targets: dict[str, GatheredTarget]
    warnings: list[WarningEvent] = field(default_factory=list)
    done: DoneEvent | None = None

    @classmethod
    def start(cls, targets: Iterable[str], plan: SlicePlan, shape_kji: tuple[int, int, int]) -> Gathered:
        """Nothing gathered yet, for these targets."""
        return cls({target: GatheredTarget(plan, shape_kji) for target in targets})

    def take(self, event: Event) -> None:
        """Take in one event; progress is passed over.

        Raises:
            ProtocolError: the event is about a target that was not asked for, or does not fit the image.
        """
        if isinstance(event, WarningEvent):
            self.warnings.append(event)
        elif isinstance(event, DoneEvent):
            self.done = event
        elif isinstance(event, SliceEvent | RankingEvent):
            gathered = self.targets.get(event.target)
            if gathered is None:
                raise ProtocolError(
                    f'The worker sent the target "{event.target}", which was not asked for; '
                    "install the same version on both sides."
                )
            if isinstance(event, SliceEvent):
                gathered.add(event)
            else:
                gathered.ranking = event

    def finished(self) -> DoneEvent:
        """The final event.

        Raises:
            ProtocolError: there was none.
        """
        if self.done is None:
            raise ProtocolError("The worker ended the request without a result; run it again.")
        return self.done
