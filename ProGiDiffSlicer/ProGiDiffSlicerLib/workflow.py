"""From a request to an accepted segment: what joins the session of proposals to acceptance."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from slicer.i18n import tr as _

from progidiff.errors import InputError
from progidiff.targets import target_for
from ProGiDiffSlicerLib.logic.accept import Acceptance, Accepted, Mode
from ProGiDiffSlicerLib.logic.provenance import Provenance
from ProGiDiffSlicerLib.logic.run import RunRequest
from ProGiDiffSlicerLib.logic.session import ProposalSession
from ProGiDiffSlicerLib.logic.store import ProposalStore, Row
from ProGiDiffSlicerLib.logic.writing import Overwrite


@dataclass(frozen=True)
class Origin:
    """Where the proposals of a store come from.

    Attributes:
        request: what was asked for.
        model_id, adapter_id: identity of the model that made them, and of its adapter ("" for none).
    """

    request: RunRequest
    model_id: str
    adapter_id: str = ""


class Workflow:
    """Starts runs and accepts what they bring, with every fact of the run that made it."""

    def __init__(self, scene: Any, session: ProposalSession, acceptance: Acceptance) -> None:
        self._scene = scene
        self._session = session
        self._acceptance = acceptance

    @property
    def origin(self) -> Origin | None:
        """Where the proposals that are looked at come from."""
        store = self._session.store
        return None if store is None or store.request is None else Origin(store.request, store.model_id, store.adapter_id)

    def start(self, request: RunRequest) -> None:
        """Ask for proposals.

        Raises:
            ProGiDiffError: the volume, the slices or the prompt cannot be used.
        """
        self._session.start(request)

    def accept(
        self,
        target: str,
        row: Row,
        segmentation_node: Any | None,
        mode: Mode,
        segment_id: str | None,
        overwrite: Overwrite,
    ) -> Accepted:
        """Make a proposal or an ensemble of the shown store a segment.

        Raises:
            InputError: there is nothing to accept, the volume has changed since, or the mask cannot go there.
        """
        store, origin = self._session.store, self.origin
        if store is None or origin is None:
            raise InputError(_("There is nothing to accept: ask for proposals first."))
        volume = self._scene.GetNodeByID(store.volume_id)
        if self._session.stale() is not None or volume is None:
            raise InputError(
                _("{name} was changed after these proposals were made; ask for them again.").format(name=store.volume_name)
            )
        if row.empty:
            raise InputError(_("This proposal is empty; select another one."))
        return self._acceptance.accept(
            store[target].mask(row.index),
            volume,
            target_for(target),
            _facts(store, origin, target, row),
            segmentation_node,
            mode,
            segment_id,
            overwrite,
        )


def _facts(store: ProposalStore, origin: Origin, target: str, row: Row) -> Provenance:
    request = origin.request
    is_whole = len(store.slices) == store.plan.count
    return Provenance(
        prompt=request.prompt,
        target=target,
        seed=request.seed,
        proposal=row.index if isinstance(row.index, int) else -1,
        rank=row.rank,
        score=row.score,
        proposals=store[target].count,
        steps=request.steps,
        scheduler=request.scheduler,
        everywhere=request.everywhere,
        model_id=origin.model_id,
        adapter_id=origin.adapter_id,
        plane=store.plan.plane,
        corrected=request.correct_values,
        slices="" if is_whole else f"{store.slices.start + 1}-{store.slices.stop}",
        ensemble=row.index if isinstance(row.index, str) else "",
    )
