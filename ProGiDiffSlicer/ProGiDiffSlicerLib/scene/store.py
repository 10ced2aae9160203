"""The proposals of one run on one volume of the scene, and what is said of each in a table."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

from slicer.i18n import tr as _

from progidiff.proposals.proposals import CONSENSUS, MAJORITY, MEAN, STAPLE, Gathered, MaskKey
from progidiff.volumes.slicing import plan_slices
from progidiff.wire.messages import Event, ProposeRequest
from ProGiDiffSlicerLib.scene.volumes import VolumeImage


@dataclass(frozen=True)
class Row:
    """One proposal or ensemble.

    Attributes:
        kind: ``"proposal"`` or ``"ensemble"``.
        index: number of the proposal from 0, or name of the ensemble.
        rank: place from 1; ``None`` for an ensemble, and while there is no ranking.
        score: in [0, 1], or ``None`` likewise.
        millilitres: volume over the requested slices.
        agreement: mean share of the proposals that contain the voxels of this one, in [0, 1]; 0 for an empty one.
        weight: how many proposals it stands for.
        empty: whether nothing is inside.
        in_top_k: whether it is one of the k that are put forward.
        random_pick: whether it is the one of them that was drawn at random.
        dropped_pieces, dropped_ml: pieces that were dropped since they are not the organ, and their volume.
    """

    kind: Literal["proposal", "ensemble"]
    index: MaskKey
    rank: int | None
    score: float | None
    millilitres: float
    agreement: float
    weight: int
    empty: bool
    in_top_k: bool = False
    random_pick: bool = False
    dropped_pieces: int = 0
    dropped_ml: float = 0.0

    @property
    def name(self) -> str:
        """What it is called, without its rank."""
        return row_name(self.index)


def row_name(index: MaskKey) -> str:
    """What a proposal or an ensemble is called; a proposal keeps its name whatever its rank."""
    names = {
        CONSENSUS: _("Consensus of all"),
        MEAN: _("Mean of all"),
        MAJORITY: _("Majority of all"),
        STAPLE: _("STAPLE of all"),
    }
    if isinstance(index, str):
        return names[index]
    return _("Proposal {number}").format(number=index + 1)


class ProposalStore(Gathered):
    """All proposals of a run on one volume, or on one frame of it.

    Args:
        image: the volume; its voxels are not kept.
        request: what was asked of the engine.
        prompt: in which words.
        plane: in which the volume was cut; ``None`` for what suits it and most models.

    Attributes:
        geometry: grid of the volume in the world.
        local_affine: float64 (4, 4), IJK to RAS without parent transforms.
        fingerprint: by what the volume is known again.
        frame: frame of a sequence, from 0, or ``None``.
        request, prompt, targets: as given.
        model_id, adapter_id: the model that made them and its adapter; "" where not told.
        corrected: whether values that cannot be Hounsfield units were to be taken for what they look like.
        revision: grows with everything that arrives.
    """

    def __init__(
        self,
        image: VolumeImage,
        request: ProposeRequest,
        prompt: str = "",
        plane: str | None = None,
    ) -> None:
        super().__init__(request.targets, plan_slices(image.geometry, plane), request.slices)
        self.volume_id = image.node_id
        self.volume_name = image.name
        self.geometry = image.geometry
        self.local_affine = image.local_affine
        self.fingerprint = image.fingerprint
        self.frame = image.frame
        self.request = request
        self.prompt = prompt
        self.targets = request.targets
        self.model_id = ""
        self.adapter_id = ""
        self.corrected = False
        self.revision = 0

    def add(self, event: Event) -> None:
        """Take in proposals of one slice, or the ranking of a target.

        Raises:
            ProtocolError: they do not belong to this volume and this run.
        """
        super().add(event)
        self.revision += 1

    def rows(self, target: str) -> list[Row]:
        """The proposals of a target, best first, near-duplicates once; in the order of sampling without a ranking."""
        proposals = self[target]
        agreement, ranking = proposals.mean_agreement, proposals.ranking
        if ranking is None:
            return [
                Row("proposal", n, None, None, float(ml), float(agreement[n]), 1, not ml)
                for n, ml in enumerate(proposals.voxels * self.geometry.voxel_volume_ml)
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
                dropped_pieces=ranking.dropped_pieces[n] if ranking.dropped_pieces else 0,
                dropped_ml=ranking.dropped_ml[n] if ranking.dropped_ml else 0.0,
            )
            for place, (n, group) in enumerate(zip(ranking.order, ranking.groups, strict=True), start=1)
        ]

    def ensembles(self, target: str) -> list[Row]:
        """Masks made of all proposals: consensus, mean probability, and STAPLE once it has been computed."""
        proposals, rows = self[target], []
        if not proposals.received:
            return []
        for name in (CONSENSUS, MEAN, *([STAPLE] if proposals.has_staple else [])):
            voxels, agreed = proposals.tally(name)
            agreement, volume = agreed / voxels if voxels else 0.0, voxels * self.geometry.voxel_volume_ml
            rows.append(Row("ensemble", name, None, None, volume, agreement, proposals.count, not voxels))
        return rows
