"""The proposals of one run on one volume, as they arrive: the only place where they are gathered.

Nothing that has arrived is lost: a run that is cancelled, or whose worker ends, leaves usable proposals without a rank.
"""

from __future__ import annotations

from collections.abc import Callable, Generator, Iterable, Iterator
from dataclasses import replace
from typing import NamedTuple

import numpy as np

from progidiff.errors import ProtocolError
from progidiff.proposals.masks import Box, Crop, Window, assemble, count_votes, cut, hull, pack
from progidiff.proposals.pieces import Tidied, tidy
from progidiff.proposals.ranking import ranking_event
from progidiff.proposals.votes import Overlap, consensus_level, consensus_overlap, finished, grow_gram, staple_steps
from progidiff.targets import target_for
from progidiff.volumes.slicing import SlicePlan, insert_slice
from progidiff.wire.messages import DoneEvent, Event, ProposeRequest, RankingEvent, SliceEvent, TidiedEvent, WarningEvent

#: Ensembles: masks made of all proposals. The consensus has the highest expected Dice (:func:`.votes.consensus_level`) and
#: is nearer to radiologists' outlines than the majority.
CONSENSUS, MEAN, MAJORITY, STAPLE = "consensus", "mean_probability", "majority", "staple"

MaskKey = int | str
"""Number of a proposal, from 0, or name of an ensemble."""


class Tally(NamedTuple):
    """Voxels of a mask, and the sum of the shares of proposals that contain them."""

    voxels: int = 0
    agreed: float = 0.0


class _Slice:
    """The proposals of one target on one slice, in the canonical view.

    Attributes:
        boxes: the mask of each proposal; none where they were let go of.
        sizes: pixels of each.
        window: what of the slice they cover.
        counts: proposals that contain each pixel of the window.
        histogram: int64, by number of votes, the pixels that so many proposals contain; the first entry means nothing.
        shared: int64, one for each proposal: over its pixels, the sum of the proposals that contain them.
        mean, mean_tally: where the mean probability is above one half; the majority on a slice that was not finished.
        complete: whether the last block is.
        compared: proposals whose overlaps are in the Gram matrix.
        agreed_on: the consensus when it was last asked how that has changed, in a tuple; empty before.

    What is counted holds after :meth:`count_votes`.
    """

    def __init__(self) -> None:
        self.boxes: list[Box | None] = []
        self.sizes: list[int] = []
        self.window: Window = (0, 0, 0, 0)
        self.counts = np.zeros((0, 0), np.uint8)
        self.histogram = np.zeros(1, np.int64)
        self.shared = np.zeros(0, np.int64)
        self.mean: Box | None = None
        self.mean_tally = Tally()
        self.complete = False
        self.compared = 0
        self.agreed_on: tuple[Box | None, ...] = ()
        self._counted = False

    def add(self, masks: np.ndarray, mean: np.ndarray | None) -> None:
        """Further proposals, bool (n, rows, columns), and, with the last of a block, the mean probability."""
        for mask in np.asarray(masks, np.bool_):
            self.boxes.append(pack(mask))
            self.sizes.append(int(np.count_nonzero(mask)))
        self._counted = False
        self.complete = mean is not None
        if mean is not None:
            self.mean = pack(np.asarray(mean) > 0.5)
            self.count_votes()

    @classmethod
    def tidied(cls, masks: np.ndarray, corner: tuple[int, int]) -> _Slice:
        """A complete one, of masks, bool (N + 1, rows, columns), that lie at a corner; the last one is the mean's."""
        piece = cls()
        *piece.boxes, piece.mean = (pack(mask, *corner) for mask in masks)
        piece.sizes = [int(np.count_nonzero(mask)) for mask in masks[:-1]]
        piece.complete = True
        return piece.count_votes()

    def count_votes(self) -> _Slice:
        """Count the votes, where that is not done."""
        if self._counted:
            return self
        self._counted = True
        count = len(self.sizes)
        self.window = hull(self.boxes) or (0, 0, 0, 0)
        counts = count_votes(self.boxes, self.window)
        self.counts = counts.astype(np.uint8 if count < 256 else np.uint16)
        self.histogram = np.bincount(counts.ravel(), minlength=count + 1)
        self.shared = np.array([0 if box is None else self._votes_inside(box) for box in self.boxes], np.int64)
        if not self.complete:
            self.mean = self.at_least(count // 2 + 1)
        self.mean_tally = self.tally(self.mean)
        return self

    def at_least(self, votes: int) -> Box | None:
        """The pixels that at least so many proposals (one or more) contain."""
        return pack(self.counts >= votes, *self.window[:2])

    def at_least_tally(self, votes: int) -> Tally:
        """Of :meth:`at_least`, without making the mask."""
        pixels = self.histogram[votes:]
        agreed = (pixels * np.arange(votes, votes + len(pixels))).sum() / max(1, len(self.sizes))
        return Tally(int(pixels.sum()), float(agreed))

    def tally(self, box: Box | None) -> Tally:
        """Of any mask on this slice."""
        if box is None:
            return Tally()
        agreed = self.counts[cut(box, self.window)].sum(dtype=np.int64) / len(self.sizes)
        return Tally(int(np.count_nonzero(box.mask())), float(agreed))

    def _votes_inside(self, box: Box) -> int:
        return int(box.within(self.counts, self.window)[box.mask()].sum(dtype=np.int64))

    def masks(self, window: Window, first: int, last: int) -> np.ndarray:
        """Proposals ``first`` to ``last`` (not included) within a window: bool (n, rows, columns)."""
        found = [cut(box, window) for box in self.boxes[first:last]]
        return np.stack(found) if found else np.zeros((0, window[2] - window[0], window[3] - window[1]), np.bool_)


class Proposals:
    """All proposals of one target, on the slices of one volume.

    Args:
        target: canonical name.
        plan: how the volume is cut into slices.
        slices: the slices that were asked for.

    Attributes:
        target, plan, slices: as given.
        ranking: the engine's ranking; ``None`` until the run is completed.
    """

    def __init__(self, target: str, plan: SlicePlan, slices: range) -> None:
        self.target = target
        self.plan = plan
        self.slices = slices
        self.ranking: RankingEvent | None = None
        self._slices: dict[int, _Slice] = {}
        self._gram = np.zeros((0, 0))
        self._staple: dict[int, tuple[Box | None, Tally]] | None = None
        self._changes: list[Tidied] = []

    # What arrives ---------------------------------------------------------------------------------------------------------

    def add(self, event: SliceEvent | TidiedEvent | RankingEvent) -> None:
        """Take in proposals of one slice, or the ranking. Masks of a slice that come again replace the earlier ones.

        Raises:
            ProtocolError: they do not belong to this volume and this run, or do not fit what has arrived.
        """
        if isinstance(event, RankingEvent):
            self._add_ranking(event)
            return
        if isinstance(event, TidiedEvent):
            self._add_tidied(event)
            return
        if event.slice_index not in self.slices or event.masks.ndim != 3 or event.masks.shape[1:] != self.plan.shape_rc:
            raise ProtocolError(
                "The worker sent a slice that does not belong to this volume; install the same version on both sides."
            )
        mean = event.mean_probability
        if mean is not None and mean.shape != self.plan.shape_rc:
            raise _left_out()
        piece = self._slices.get(event.slice_index)
        known = 0 if piece is None else len(piece.sizes)
        if event.first_proposal not in (0, known):
            raise _left_out()
        if piece is None or not event.first_proposal:
            if piece is not None and piece.compared:
                self._count_overlaps_anew()
            piece = self._slices[event.slice_index] = _Slice()
        piece.add(event.masks, mean)
        self._staple = None

    def _add_tidied(self, event: TidiedEvent) -> None:
        piece = self._slices.get(event.slice_index)
        ends = np.add(event.corner, event.masks.shape[1:])
        if piece is None or not piece.complete or len(event.masks) != len(piece.sizes) + 1 or any(ends > self.plan.shape_rc):
            raise _left_out()
        if piece.compared:
            self._count_overlaps_anew()
        self._slices[event.slice_index] = _Slice.tidied(event.masks, event.corner)
        self._staple = None

    def _add_ranking(self, event: RankingEvent) -> None:
        count = self.count
        numbers = {*event.order, *event.top_k, event.random_pick, *(n for group in event.groups for n in group)}
        lengths = {len(event.scores), len(event.millilitres), len(event.empty)}
        lengths |= {len(each) or count for each in (event.dropped_pieces, event.dropped_ml, event.filled_ml)}
        if not count or not event.order or lengths != {count} or len(event.groups) != len(event.order):
            raise _left_out()
        if not numbers <= set(range(count)):
            raise _left_out()
        self.ranking = event

    def checked(self) -> RankingEvent:
        """The ranking, once everything has come.

        Raises:
            ProtocolError: a ranking, a slice or a proposal on a slice is missing.
        """
        complete = {index for index, piece in self._slices.items() if piece.complete and len(piece.sizes) == self.count}
        if self.ranking is None or complete != set(self.slices):
            raise _left_out()
        return self.ranking

    def let_go(self, index: int) -> None:
        """Forget the masks of a slice; what was counted stays, so that memory does not grow with the number of slices."""
        piece = self._slices[index]
        self._compare(piece)
        piece.boxes, piece.counts, piece.agreed_on = [], np.zeros((0, 0), np.uint8), ()

    def tidy(self, check: Callable[[], None] = lambda: None) -> Iterator[TidiedEvent]:
        """Drop pieces of complete proposals that are not the organ, and fill holes, see :func:`.pieces.tidy`.

        The mean probability's mask loses the voxels that most of their proposals have lost.

        Args:
            check: called between proposals; what it raises ends the work.

        Yields:
            The slices that have changed, for those who gather the same proposals.
        """
        order, target = sorted(self._slices), target_for(self.target)
        pieces = [self._slices[index].count_votes() for index in order]
        window = hull(box for piece in pieces for box in piece.boxes)
        if window is None:
            return
        top, left, bottom, right = window
        votes = np.zeros((len(order), bottom - top, right - left), pieces[0].counts.dtype)
        for part, piece in zip(votes, pieces, strict=True):
            first, start, last, stop = piece.window
            part[first - top : last - top, start - left : stop - left] = piece.counts
        rows, columns = self.plan.shape_rc
        ends = np.array([[True, True], [top == 0, bottom == rows], [left == 0, right == columns]])
        spacing = (self.plan.slice_spacing, *self.plan.spacing_rc)
        boxes: list[list[Box | None]] = [[] for _ in order]
        changed, left_votes = np.zeros(len(order), bool), np.zeros_like(votes)
        for number in range(self.count):
            check()
            before = np.stack([cut(piece.boxes[number], window) for piece in pieces])
            after, change = tidy(before, votes, self.count, target, spacing, ends)
            self._changes.append(change)
            left_votes += after
            changed |= (after != before).any(axis=(1, 2))
            for found, mask in zip(boxes, after, strict=True):
                found.append(pack(mask, top, left))
        for found, piece, was, now in zip(boxes, pieces, votes, left_votes, strict=True):
            found.append(pack(cut(piece.mean, window) & (2 * now.astype(np.uint16) >= was), top, left))
        for place in np.flatnonzero(changed):
            around = hull(boxes[place]) or (0, 0, 0, 0)
            masks = np.stack([cut(box, around) for box in boxes[place]])
            event = TidiedEvent(self.target, order[place], around[:2], masks)
            self.add(event)
            yield event

    # How much there is ----------------------------------------------------------------------------------------------------

    @property
    def count(self) -> int:
        """Number of proposals so far."""
        return max((len(piece.sizes) for piece in self._slices.values()), default=0)

    @property
    def received(self) -> int:
        """Number of slices of which something has arrived."""
        return len(self._slices)

    @property
    def ranked(self) -> bool:
        """Whether the ranking has arrived; otherwise the run was not, or is not yet, completed."""
        return self.ranking is not None

    @property
    def memory_bytes(self) -> int:
        """Bytes of all masks."""
        return sum(box.bits.nbytes for piece in self._slices.values() for box in piece.boxes if box is not None)

    @property
    def voxels(self) -> np.ndarray:
        """Voxels of each proposal, int64 (N,)."""
        return self._sum_by_proposal([piece.sizes for piece in self._slices.values()])

    @property
    def mean_agreement(self) -> np.ndarray:
        """Mean share of the proposals that contain the voxels of each, float64 (N,); 0 for an empty one."""
        pieces = self._counted().values()
        shared = self._sum_by_proposal([piece.shared for piece in pieces])
        voters = self._sum_by_proposal([len(piece.sizes) * np.asarray(piece.sizes) for piece in pieces])
        return np.divide(shared, voters, out=np.zeros(self.count), where=voters > 0)

    def _sum_by_proposal(self, parts: Iterable[Iterable[int]]) -> np.ndarray:
        total = np.zeros(self.count, np.int64)
        for part in parts:
            numbers = np.asarray(part, np.int64)
            total[: len(numbers)] += numbers
        return total

    # Masks ----------------------------------------------------------------------------------------------------------------

    def mask(self, key: MaskKey) -> Crop:
        """A proposal or an ensemble, cut out of the volume, in the axis order of its array.

        Raises:
            KeyError: STAPLE, where it has not been computed.
        """
        return assemble(self._boxes(key), self.plan)

    def slice_mask(self, key: MaskKey, index: int) -> np.ndarray:
        """One slice of :meth:`mask` in the canonical view, bool (rows, columns)."""
        return cut(self._boxes(key, index).get(index), (0, 0, *self.plan.shape_rc))

    def volume(self, key: MaskKey) -> np.ndarray:
        """The whole of :meth:`mask`, bool (K, J, I)."""
        return self.mask(key).whole(self.plan.shape_kji).view(np.bool_)

    def slice_masks(self, index: int) -> np.ndarray:
        """All proposals on one slice in the canonical view, bool (N, rows, columns)."""
        return self._slices[index].masks((0, 0, *self.plan.shape_rc), 0, self.count)

    def _boxes(self, key: MaskKey, index: int | None = None) -> dict[int, Box | None]:
        """Of all slices, or of one."""
        if key == STAPLE:
            if self._staple is None:
                raise KeyError(key)
            return {number: box for number, (box, _tally) in self._staple.items()}
        if isinstance(key, int):
            return {number: piece.boxes[key] for number, piece in self._slices.items() if key < len(piece.boxes)}
        pieces, needed = self._counted(), self._votes_needed(key)
        chosen = pieces.keys() if index is None else pieces.keys() & {index}
        return {n: pieces[n].mean if key == MEAN else pieces[n].at_least(needed[n]) for n in chosen}

    def _counted(self) -> dict[int, _Slice]:
        return {index: piece.count_votes() for index, piece in self._slices.items()}

    # Votes ----------------------------------------------------------------------------------------------------------------

    def votes(self, index: int) -> tuple[np.ndarray, int]:
        """Proposals that contain each pixel of a slice, unsigned int (rows, columns), and how many proposals it has."""
        piece = self._slices.get(index)
        if piece is None:
            return np.zeros(self.plan.shape_rc, np.uint8), 0
        top, left, bottom, right = piece.count_votes().window
        counts = np.zeros(self.plan.shape_rc, piece.counts.dtype)
        counts[top:bottom, left:right] = piece.counts
        return counts, len(piece.sizes)

    def agreement_slice(self, index: int) -> np.ndarray:
        """Share of proposals that contain each pixel of a slice, float32 (rows, columns); 0 where nothing has arrived."""
        counts, count = self.votes(index)
        return (counts / max(1, count)).astype(np.float32)

    def agreement(self) -> np.ndarray:
        """Share of proposals that contain each voxel of the volume, float32 (K, J, I)."""
        volume = np.zeros(self.plan.shape_kji, np.float32)
        for index in self._slices:
            insert_slice(volume, self.plan, index, self.agreement_slice(index))
        return volume

    @property
    def uncertainty(self) -> dict[int, float]:
        """Disagreement on each slice that has arrived: the sum of p (1 - p) over its pixels, p being their agreement."""
        found = {}
        for index, piece in sorted(self._counted().items()):
            share = np.arange(len(piece.histogram)) / max(1, len(piece.sizes))
            found[index] = float((piece.histogram * share * (1.0 - share)).sum())
        return found

    def tally(self, name: str) -> Tally:
        """Voxels of an ensemble, and the sum of the shares of proposals that contain them."""
        pieces = self._counted()
        if name == STAPLE:
            tallies = [] if self._staple is None else [tally for _box, tally in self._staple.values()]
        elif name == MEAN:
            tallies = [piece.mean_tally for piece in pieces.values()]
        else:
            needed = self._votes_needed(name)
            tallies = [piece.at_least_tally(needed[index]) for index, piece in pieces.items()]
        return Tally(sum(each.voxels for each in tallies), sum(each.agreed for each in tallies))

    def _votes_needed(self, name: str) -> dict[int, int]:
        """By slice, how many of its proposals have to contain a voxel of the majority, or of the consensus.

        Of an empty consensus they are more than all.
        """
        pieces, count = self._counted(), self.count
        if name != CONSENSUS:
            return {index: len(piece.sizes) // 2 + 1 for index, piece in pieces.items()}
        histogram = np.zeros(count + 1, np.int64)
        for piece in pieces.values():
            known = len(piece.sizes)
            # A slice that was not finished has fewer proposals; its votes count by their share.
            np.add.at(histogram, np.arange(known + 1) * count // max(1, known), piece.histogram)
        level = consensus_level(histogram, int(np.count_nonzero(self.voxels)))
        return {index: -(-level * len(piece.sizes) // max(1, count)) for index, piece in pieces.items()}

    @property
    def has_staple(self) -> bool:
        """Whether STAPLE has been computed of the proposals that are here now."""
        return self._staple is not None

    def staple_steps(self) -> Generator[None, None, None]:
        """Compute STAPLE in small steps, for an idle queue; begins again when proposals arrive meanwhile."""
        while True:
            before, count = [(n, piece, len(piece.sizes)) for n, piece in self._slices.items()], self.count
            found = yield from staple_steps(
                {n: [*piece.boxes, *[None] * (count - len(piece.boxes))] for n, piece, _ in before}
            )
            tallies = {}
            for number, piece, _ in before:
                tallies[number] = (found[number], piece.count_votes().tally(found[number]))
                yield
            if before == [(n, piece, len(piece.sizes)) for n, piece in self._slices.items()]:
                self._staple = tallies
                return

    def staple(self) -> Tally:
        """Compute STAPLE at one go."""
        finished(self.staple_steps())
        return self.tally(STAPLE)

    # Overlaps -------------------------------------------------------------------------------------------------------------

    @property
    def gram(self) -> np.ndarray:
        """Overlaps of all proposals so far, float64 (N, N), in voxels; see :mod:`progidiff.proposals.votes`."""
        for piece in self._slices.values():
            self._compare(piece)
        return self._gram.copy()

    def rank(self, request: ProposeRequest, voxel_ml: float, stop_reason: str) -> RankingEvent:
        """Rank the proposals over all slices, see :func:`progidiff.proposals.ranking.ranking_event`."""
        event = ranking_event(self.target, self.gram, request, voxel_ml, stop_reason)
        return replace(
            event,
            dropped_pieces=[change.pieces for change in self._changes],
            dropped_ml=[change.dropped * voxel_ml for change in self._changes],
            filled_ml=[change.filled * voxel_ml for change in self._changes],
        )

    def consensus_change(self) -> float:
        """Dice of the consensus of each slice, now and at the last call, over all slices; 1 at the first."""
        change = Overlap()
        for piece in self._slices.values():
            window = piece.count_votes().window
            level = consensus_level(piece.histogram, int(np.count_nonzero(piece.sizes)))
            before, now = piece.agreed_on, piece.at_least(level)
            piece.agreed_on = (now,)
            if before:
                change += consensus_overlap(cut(before[0], window), cut(now, window))
        return change.dice

    def _compare(self, piece: _Slice) -> None:
        """Count the overlaps of a slice's new proposals with each other and with its earlier ones."""
        known, count = piece.compared, len(piece.sizes)
        if known < count:
            window = piece.count_votes().window
            self._gram = grow_gram(self._gram, piece.masks(window, 0, known), piece.masks(window, known, count))
            piece.compared = count

    def _count_overlaps_anew(self) -> None:
        self._gram = np.zeros((0, 0))
        for piece in self._slices.values():
            piece.compared = 0


class Gathered:
    """Everything that one request brings.

    Args:
        targets: canonical names of what was asked for.
        plan: how the volume is cut into slices.
        slices: half-open range of slices that was asked for; ``None`` for all.

    Attributes:
        plan: as given.
        slices: the slices that were asked for.
        proposals: by target.
        warnings: what the user should know, in the order of arrival.
        done: the final event, once it has come.
    """

    def __init__(self, targets: Iterable[str], plan: SlicePlan, slices: tuple[int, int] | None = None) -> None:
        self.plan = plan
        self.slices = range(*(slices or (0, plan.count)))
        self.proposals = {target: Proposals(target, plan, self.slices) for target in targets}
        self.warnings: list[WarningEvent] = []
        self.done: DoneEvent | None = None

    def __getitem__(self, target: str) -> Proposals:
        return self.proposals[target]

    def add(self, event: Event) -> None:
        """Take in one event; progress is passed over.

        Raises:
            ProtocolError: the event is about a target that was not asked for, or does not fit the volume or the run.
        """
        if isinstance(event, WarningEvent):
            self.warnings.append(event)
        elif isinstance(event, DoneEvent):
            self.done = event
        elif isinstance(event, SliceEvent | TidiedEvent | RankingEvent):
            if event.target not in self.proposals:
                raise ProtocolError(
                    f'The worker sent the target "{event.target}", which was not asked for; '
                    "install the same version on both sides."
                )
            self.proposals[event.target].add(event)

    def finished(self) -> DoneEvent:
        """The final event.

        Raises:
            ProtocolError: there was none.
        """
        if self.done is None:
            raise ProtocolError("The worker ended the request without a result; run it again.")
        return self.done


def _left_out() -> ProtocolError:
    return ProtocolError("The worker left out a part of the result; install the same version on both sides.")
