"""What is said of a proposal, or of an ensemble of all proposals, in a table."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

from slicer.i18n import tr as _

#: Ensembles: masks made of all proposals. The majority is not listed: the consensus is nearer to radiologists' outlines.
CONSENSUS, MEAN, MAJORITY, STAPLE = "consensus", "mean_probability", "majority", "staple"

RowKey = int | str
"""Number of a proposal, from 0, or name of an ensemble."""


@dataclass(frozen=True)
class Row:
    """One proposal or ensemble.

    Attributes:
        kind: ``"proposal"`` or ``"ensemble"``.
        index: number of the proposal from 0, or name of the ensemble (``CONSENSUS``, ``MEAN``, ``MAJORITY``,
            ``STAPLE``).
        rank: place from 1; ``None`` for an ensemble, and while there is no ranking.
        score: in [0, 1], or ``None`` likewise.
        millilitres: volume over the requested slices.
        agreement: mean share of the proposals that contain the voxels of this one, in [0, 1]; 0 for an empty one.
        weight: how many proposals it stands for.
        empty: whether nothing is inside.
        in_top_k: whether it is one of the k that are put forward.
        random_pick: whether it is the one of them that was drawn at random.
    """

    kind: Literal["proposal", "ensemble"]
    index: RowKey
    rank: int | None
    score: float | None
    millilitres: float
    agreement: float
    weight: int
    empty: bool
    in_top_k: bool = False
    random_pick: bool = False

    @property
    def name(self) -> str:
        """What it is called, without its rank."""
        return row_name(self.index)


def row_name(index: RowKey) -> str:
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
