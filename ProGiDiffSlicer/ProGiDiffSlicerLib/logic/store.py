"""The proposals of one run on one volume, as they arrive from the worker.

Nothing that has arrived is lost: a run that is cancelled, or whose worker ends, leaves usable proposals without a rank.
"""

from __future__ import annotations

from collections.abc import Generator
from typing import TYPE_CHECKING

import numpy as np
from slicer.i18n import tr as _

from progidiff.errors import ProtocolError
from progidiff.ranking.ensembles import consensus_level
from progidiff.volumes.slicing import SlicePlan, extract_slice, plan_slices, restore_slice
from progidiff.wire.messages import RankingEvent, SliceEvent
from ProGiDiffSlicerLib.logic.boxes import Box, Crop, assemble, hull, unpack, votes
from ProGiDiffSlicerLib.logic.rows import CONSENSUS, MAJORITY, MEAN, STAPLE, Row, RowKey
from ProGiDiffSlicerLib.logic.slice_votes import SliceVotes, Tally
from ProGiDiffSlicerLib.logic.staple import staple_steps
from ProGiDiffSlicerLib.logic.volumes import VolumeImage

if TYPE_CHECKING:
    from ProGiDiffSlicerLib.logic.run import RunRequest

__all__ = ["CONSENSUS", "MAJORITY", "MEAN", "STAPLE", "Crop", "ProposalStore", "Row", "RowKey"]


class ProposalStore:
    """All proposals of a run on one volume, or on one frame of it.

    Args:
        image: the volume; its voxels are not kept.
        targets: canonical names of what was asked for.
        prompt: how it was asked for.
        slices: half-open range of slices that was asked for; ``None`` for all.
        plane: in which the volume was cut; ``None`` for what suits it and most models.

    Attributes:
        geometry: grid of the volume in the world.
        local_affine: float64 (4, 4), IJK to RAS without parent transforms.
        fingerprint: by what the volume is known again.
        frame: frame of a sequence, from 0, or ``None``.
        plan: how the volume is cut into slices.
        targets, prompt: as given.
        slices: the slices that were asked for.
        request, model_id, adapter_id: the run that made them, its model and adapter; ``None`` and "" where not told.
        revision: grows with everything that arrives.
    """

    def __init__(
        self,
        image: VolumeImage,
        targets: tuple[str, ...],
        prompt: str = "",
        slices: tuple[int, int] | None = None,
        plane: str | None = None,
    ) -> None:
        self.volume_id = image.node_id
        self.volume_name = image.name
        self.geometry = image.geometry
        self.local_affine = image.local_affine
        self.fingerprint = image.fingerprint
        self.frame = image.frame
        self.plan: SlicePlan = plan_slices(self.geometry, plane)
        self.targets = targets
        self.prompt = prompt
        self.slices = range(*(slices or (0, self.plan.count)))
        self.request: RunRequest | None = None
        self.model_id = ""
        self.adapter_id = ""
        self.revision = 0
        self._slices: dict[str, dict[int, SliceVotes]] = {target: {} for target in targets}
        self._rankings: dict[str, RankingEvent] = {}
        self._staple: dict[str, dict[int, tuple[Box | None, Tally]]] = {}

    # What arrives ---------------------------------------------------------------------------------------------------------

    def add(self, event: SliceEvent) -> None:
        """Take in proposals of one slice. Masks of a slice that come again take the place of the earlier ones.

        Raises:
            ProtocolError: they do not belong to this volume and this run.
        """
        self._check(event)
        pieces = self._slices[event.target]
        piece = pieces.get(event.slice_index)
        if piece is None or event.first_proposal < len(piece.boxes):
            if event.first_proposal:
                raise _left_out()
            piece = pieces[event.slice_index] = SliceVotes()
        elif event.first_proposal > len(piece.boxes):
            raise _left_out()
        for mask in np.asarray(event.masks, np.bool_):
            piece.append(restore_slice(mask, self.plan))
        if event.mean_probability is not None:
            piece.set_mean(restore_slice(np.asarray(event.mean_probability) > 0.5, self.plan))
            piece.settle()
        self._staple.pop(event.target, None)
        self.revision += 1

    def rank(self, event: RankingEvent) -> None:
        """Take in the ranking of a target.

        Raises:
            ProtocolError: it does not fit the proposals that have arrived.
        """
        count = self.count(event.target) if event.target in self._slices else 0
        numbers = {*event.order, *event.top_k, event.random_pick, *(n for group in event.groups for n in group)}
        lengths = {len(event.scores), len(event.millilitres), len(event.empty)}
        if not count or lengths != {count} or not numbers <= set(range(count)) or len(event.groups) != len(event.order):
            raise _left_out()
        self._rankings[event.target] = event
        self.revision += 1

    def _check(self, event: SliceEvent) -> None:
        known = self._slices.get(event.target) is not None and event.slice_index in self.slices
        if not known or event.masks.ndim != 3 or event.masks.shape[1:] != self.plan.shape_rc:
            raise ProtocolError(
                _("The worker sent a slice that does not belong to this volume; install the same version on both sides.")
            )
        probability = event.mean_probability
        if probability is not None and probability.shape != self.plan.shape_rc:
            raise _left_out()

    # How much there is ----------------------------------------------------------------------------------------------------

    def count(self, target: str) -> int:
        """Number of proposals of a target so far."""
        return max((len(piece.boxes) for piece in self._slices[target].values()), default=0)

    def received(self, target: str) -> int:
        """Number of slices of a target of which something has arrived."""
        return len(self._slices[target])

    def ranked(self, target: str) -> bool:
        """Whether its ranking has arrived; otherwise its run was not, or is not yet, completed."""
        return target in self._rankings

    def ranking(self, target: str) -> RankingEvent | None:
        """The ranking of a target."""
        return self._rankings.get(target)

    @property
    def empty(self) -> bool:
        """Whether nothing has arrived."""
        return not any(self._slices.values())

    @property
    def memory_bytes(self) -> int:
        """Bytes of all masks."""
        found = (box for pieces in self._slices.values() for piece in pieces.values() for box in piece.boxes)
        return sum(box.bits.nbytes for box in found if box is not None)

    # Masks ----------------------------------------------------------------------------------------------------------------

    def masks(self, target: str, index: RowKey) -> Crop:
        """The mask of a proposal (by number) or an ensemble (by name), cut out of the volume.

        Raises:
            KeyError: no such target, or an ensemble that has not been computed.
        """
        return assemble(self._boxes(target, index), self.plan.axis)

    def slice_mask(self, target: str, index: RowKey, slice_index: int) -> np.ndarray:
        """Canonical view, bool (rows, columns), of one slice of a mask."""
        piece = self._slices[target].get(slice_index)
        if index == CONSENSUS and piece is not None:  # without making those of the other slices
            box = piece.at_least(self._consensus_votes(target)[slice_index])
        else:
            box = self._boxes(target, index).get(slice_index)
        return self._canonical(unpack(box, self._raw_shape))

    def agreement_slice(self, target: str, slice_index: int) -> np.ndarray:
        """Share of proposals that contain each voxel, in per cent, uint8, in the axis order of the volume's array.

        Where some proposals do and others do not it lies from 1 to 99.
        """
        full = np.zeros(self._raw_shape, np.uint8)
        piece = self._slices[target].get(slice_index)
        around = None if piece is None else hull(piece.boxes)
        if piece is not None and around is not None:
            top, left, bottom, right = around
            counts, count = votes(piece.boxes, around), len(piece.boxes)
            percent = np.rint(counts * (100.0 / count)).astype(np.uint8)
            some = (counts > 0) & (counts < count)
            percent[some] = percent[some].clip(1, 99)
            full[top:bottom, left:right] = percent
        return full

    def agreement(self, target: str) -> np.ndarray:
        """Share of proposals that contain each voxel, in per cent: uint8 (K, J, I)."""
        volume = np.zeros(self.geometry.shape_kji, np.uint8)
        for index in self._slices[target]:
            volume[(slice(None),) * self.plan.axis + (index,)] = self.agreement_slice(target, index)
        return volume

    def uncertainty(self, target: str) -> dict[int, float]:
        """Disagreement on each slice that has arrived: the sum of p (1 - p) over its voxels, p being their agreement."""
        return {index: piece.uncertainty for index, piece in sorted(self._settled(target).items())}

    def _boxes(self, target: str, index: RowKey) -> dict[int, Box | None]:
        pieces = self._slices[target]
        if index == STAPLE:
            return {number: box for number, (box, _tally) in self._staple[target].items()}
        if index == CONSENSUS:
            return {number: pieces[number].at_least(votes) for number, votes in self._consensus_votes(target).items()}
        if isinstance(index, str):
            settled = self._settled(target)
            # A slice that the worker did not finish has no mean probability; the majority stands in for it.
            return {number: piece.ensemble(index)[0] for number, piece in settled.items()}
        return {number: piece.boxes[index] for number, piece in pieces.items() if index < len(piece.boxes)}

    def _consensus_votes(self, target: str) -> dict[int, int]:
        """By slice, how many of its proposals have to contain a voxel of the consensus; more than all where it is empty."""
        pieces, count = self._settled(target), self.count(target)
        filled, histogram = np.zeros(count, bool), np.zeros(count + 1, np.int64)
        for piece in pieces.values():
            known = len(piece.boxes)
            filled[:known] |= np.asarray(piece.sizes, bool)
            # A slice that was not finished has fewer proposals; its votes count by their share.
            np.add.at(histogram, np.arange(known + 1) * count // max(1, known), piece.histogram)
        level = consensus_level(histogram, int(filled.sum()))
        return {number: -(-level * len(piece.boxes) // count) for number, piece in pieces.items()}

    def _settled(self, target: str) -> dict[int, SliceVotes]:
        for piece in self._slices[target].values():
            if not piece.settled:
                piece.settle()
        return self._slices[target]

    @property
    def _raw_shape(self) -> tuple[int, int]:
        rows, columns = self.plan.shape_rc
        return (columns, rows) if self.plan.transpose else (rows, columns)

    def _canonical(self, raw: np.ndarray) -> np.ndarray:
        return extract_slice(np.expand_dims(raw, self.plan.axis), self.plan, 0)

    # Rows -----------------------------------------------------------------------------------------------------------------

    def rows(self, target: str) -> list[Row]:
        """The proposals of a target, best first, near-duplicates once; in the order of sampling without a ranking."""
        pieces, count = self._settled(target), self.count(target)
        voxels, shared, voters = np.zeros(count), np.zeros(count), np.zeros(count)
        for piece in pieces.values():
            known = len(piece.boxes)
            voxels[:known] += piece.sizes
            shared[:known] += piece.shared
            voters[:known] += known * np.asarray(piece.sizes)
        agreement = np.divide(shared, voters, out=np.zeros(count), where=voters > 0)
        volumes = voxels * self.geometry.voxel_volume_ml
        ranking = self._rankings.get(target)
        if ranking is None:
            return [
                Row("proposal", n, None, None, float(volumes[n]), float(agreement[n]), 1, not voxels[n])
                for n in range(count)
            ]
        return [
            Row(
                kind="proposal",
                index=n,
                rank=place,
                score=ranking.scores[n],
                millilitres=ranking.millilitres[n],
                agreement=float(agreement[n]),
                weight=len(group),
                empty=ranking.empty[n],
                in_top_k=n in ranking.top_k,
                random_pick=n == ranking.random_pick,
            )
            for place, (n, group) in enumerate(zip(ranking.order, ranking.groups, strict=True), start=1)
        ]

    def ensembles(self, target: str) -> list[Row]:
        """Masks made of all proposals: consensus, mean probability, and STAPLE once it has been computed."""
        if not self._slices[target]:
            return []
        names = [CONSENSUS, MEAN, *([STAPLE] if target in self._staple else [])]
        return [self._ensemble_row(target, name) for name in names]

    def staple_steps(self, target: str) -> Generator[None, None, Row]:
        """Compute STAPLE in small steps, for an idle queue; returns its row, which :meth:`ensembles` then lists as well."""
        revision, count = self.revision, self.count(target)
        slices = {
            number: [*piece.boxes, *[None] * (count - len(piece.boxes))] for number, piece in self._slices[target].items()
        }
        result = yield from staple_steps(slices, self._raw_shape)
        if revision != self.revision:  # more proposals have arrived meanwhile
            return (yield from self.staple_steps(target))
        self._staple[target] = {}
        for number, box in result.items():
            self._staple[target][number] = (box, self._slices[target][number].tally(box))
            yield
        return self._ensemble_row(target, STAPLE)

    def _ensemble_row(self, target: str, name: str) -> Row:
        if name == STAPLE:
            tallies = [tally for _box, tally in self._staple[target].values()]
        elif name == CONSENSUS:
            votes = self._consensus_votes(target)
            tallies = [piece.at_least_tally(votes[number]) for number, piece in self._slices[target].items()]
        else:
            tallies = [piece.ensemble(name)[1] for piece in self._settled(target).values()]
        voxels = sum(tally.voxels for tally in tallies)
        agreement = sum(tally.agreed for tally in tallies) / voxels if voxels else 0.0
        volume = voxels * self.geometry.voxel_volume_ml
        return Row("ensemble", name, None, None, volume, agreement, self.count(target), not voxels)


def _left_out() -> ProtocolError:
    return ProtocolError(_("The worker left out a part of the result; install the same version on both sides."))
