"""From a request to an accepted segment: what joins the session of proposals to acceptance."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any
from weakref import WeakKeyDictionary

from slicer.i18n import tr as _

from progidiff.errors import InputError
from progidiff.targets import target_for
from ProGiDiffSlicerLib.logic.accept import Acceptance, Accepted, Mode
from ProGiDiffSlicerLib.logic.provenance import Provenance
from ProGiDiffSlicerLib.logic.rows import Row
from ProGiDiffSlicerLib.logic.run import RunRequest
from ProGiDiffSlicerLib.logic.session import ProposalSession
from ProGiDiffSlicerLib.logic.store import ProposalStore
from ProGiDiffSlicerLib.logic.writing import Overwrite
from ProGiDiffSlicerLib.worker.client import WorkerClient


@dataclass(frozen=True)
class Origin:
    """Where the proposals of a store come from.

    Attributes:
        request: what was asked for.
        model_id: identity of the model that made them.
    """

    request: RunRequest
    model_id: str


class Workflow:
    """Starts runs and accepts what they bring, with every fact of the run that made it."""

    def __init__(self, scene: Any, session: ProposalSession, client: WorkerClient, acceptance: Acceptance) -> None:
        self._scene = scene
        self._session = session
        self._client = client
        self._acceptance = acceptance
        self._request: RunRequest | None = None
        self._origins: WeakKeyDictionary[ProposalStore, Origin] = WeakKeyDictionary()
        session.storeChanged.connect(self._on_store)

    @property
    def origin(self) -> Origin | None:
        """Where the proposals that are looked at come from."""
        store = self._session.store
        return None if store is None else self._origins.get(store)

    def start(self, request: RunRequest) -> None:
        """Ask for proposals.

        Raises:
            ProGiDiffError: the volume, the slices or the prompt cannot be used.
        """
        before, self._request = self._request, request
        try:
            self._session.start(request)
        except BaseException:
            self._request = before
            raise

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
            store.masks(target, row.index),
            volume,
            target_for(target),
            _facts(store, origin, target, row),
            segmentation_node,
            mode,
            segment_id,
            overwrite,
        )

    def cleanup(self) -> None:
        """Let go of the session."""
        self._session.storeChanged.disconnect(self._on_store)
        self._origins.clear()

    def _on_store(self) -> None:
        """Stores that have come since the last start belong to it: a run that was replaced brings no more."""
        loaded = self._client.loaded
        for store in self._session.stores.values():
            if store not in self._origins and self._request is not None:
                self._origins[store] = Origin(self._request, "" if loaded is None else loaded.model_id)


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
        proposals=store.count(target),
        steps=request.steps,
        scheduler=request.scheduler,
        model_id=origin.model_id,
        slices="" if is_whole else f"{store.slices.start + 1}-{store.slices.stop}",
        ensemble=row.index if isinstance(row.index, str) else "",
    )
