"""What has arrived, by frame, and which of it is looked at."""

from __future__ import annotations

import time
from typing import Any

import vtk

from ProGiDiffSlicerLib.logic.agreement import AgreementOverlay
from ProGiDiffSlicerLib.logic.proposal_node import ProposalSegmentation
from ProGiDiffSlicerLib.logic.sequences import frames
from ProGiDiffSlicerLib.logic.store import ProposalStore
from ProGiDiffSlicerLib.signals import Signal

#: Seconds between two looks at what has arrived, and how many proposals such a look shows.
_LOOK_S = 1.0
_LOOK_COUNT = 3


class Shelf:
    """Keeps the stores of one volume, and shows the one that belongs to what is looked at.

    Args:
        scene: vtkMRMLScene.
        proposals: shows proposals.
        overlay: shows agreement.

    Attributes:
        stores: by frame; ``None`` for a volume that is no frame of a sequence.
        current: the store of the frame that is shown, or of the volume.
        changed: Signal(): ``current`` is another one.
    """

    def __init__(self, scene: Any, proposals: ProposalSegmentation, overlay: AgreementOverlay) -> None:
        self.stores: dict[int | None, ProposalStore] = {}
        self.current: ProposalStore | None = None
        self.changed = Signal()
        self._scene = scene
        self._proposals = proposals
        self._overlay = overlay
        self._looked = 0.0
        self._browser: Any = None
        self._browser_tag = 0

    @property
    def volume_ids(self) -> set[str]:
        """MRML ids of the volumes to which the proposals belong."""
        return {store.volume_id for store in self.stores.values()}

    def keep(self, store: ProposalStore) -> None:
        """Let a store take the place of the earlier one of its frame; proposals of other volumes go."""
        if self.stores.get(store.frame) is store:
            return
        if store.frame is None or any(other.volume_id != store.volume_id for other in self.stores.values()):
            self.stores.clear()
        self.stores.pop(None, None)
        self.stores[store.frame] = store
        self._looked = 0.0
        self._watch(store)
        self._choose()

    def clear(self) -> None:
        """Give everything up."""
        self.stores.clear()
        self._unwatch()
        self._choose()

    def look(self, store: ProposalStore) -> bool:
        """Show what has arrived so far: at once for the first time, then now and then; whether it did."""
        now = time.monotonic()
        if store is not self.current or (self._looked and (self._proposals.busy or now - self._looked < _LOOK_S)):
            return False
        self._looked = now
        self.show(store)
        return True

    def show(self, store: ProposalStore) -> None:
        """Show the best proposals of the first target, or the first ones where there is no ranking."""
        target = store.targets[0]
        ranking, count = store[target].ranking, store[target].count
        if ranking is not None:
            self._proposals.show(store, target, ranking.top_k, ranking.order[0])
        elif count:
            self._proposals.show(store, target, range(min(count, _LOOK_COUNT)), 0)

    def _choose(self) -> None:
        chosen = next(iter(self.stores.values()), None)
        if chosen is not None and chosen.frame is not None:
            playing = frames(self._scene.GetNodeByID(chosen.volume_id))
            chosen = None if playing is None else self.stores.get(playing.index)
        if chosen is self.current:
            return
        self.current = chosen
        self._overlay.hide()
        self._proposals.set_hidden(chosen is None)
        if chosen is not None:
            self.show(chosen)
        self.changed.emit()

    def _watch(self, store: ProposalStore) -> None:
        playing = frames(self._scene.GetNodeByID(store.volume_id))
        browser = None if playing is None else playing.browser
        if browser is not self._browser:
            self._unwatch()
            if browser is not None:
                self._browser = browser
                self._browser_tag = browser.AddObserver(vtk.vtkCommand.ModifiedEvent, self._on_browser)

    def _unwatch(self) -> None:
        if self._browser is not None:
            self._browser.RemoveObserver(self._browser_tag)
            self._browser = None

    def _on_browser(self, _caller: Any, _event: str) -> None:
        self._choose()
