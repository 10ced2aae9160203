"""The proposals panel: what has arrived, best first, as thumbnails, outlines and a map of agreement."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any
from weakref import WeakKeyDictionary

import slicer
from slicer.i18n import tr as _

from progidiff.proposals.proposals import MaskKey
from ProGiDiffSlicerLib.logic.proposal_node import proposal_color
from ProGiDiffSlicerLib.logic.store import ProposalStore, Row
from ProGiDiffSlicerLib.panels.binding import Binding
from ProGiDiffSlicerLib.panels.listing import Line, list_lines, summary
from ProGiDiffSlicerLib.panels.loading import load_panel
from ProGiDiffSlicerLib.panels.pictures import Pictures
from ProGiDiffSlicerLib.panels.shortcuts import Numbered, Shortcuts
from ProGiDiffSlicerLib.panels.slice_watch import SliceWatch
from ProGiDiffSlicerLib.panels.status_line import StatusLine
from ProGiDiffSlicerLib.panels.table import ProposalTable
from ProGiDiffSlicerLib.panels.volume_slices import slices_of
from ProGiDiffSlicerLib.parameters import Parameters
from ProGiDiffSlicerLib.services import Services
from ProGiDiffSlicerLib.signals import Signal

_DIGITS = 9


@dataclass
class _Look:
    """How the user looks at the proposals of one target: boxes ticked or cleared, lines rejected, the line selected."""

    ticks: dict[MaskKey, bool] = field(default_factory=dict)
    rejected: set[MaskKey] = field(default_factory=set)
    selected: MaskKey | None = None


class ProposalsPanel:
    """The list of proposals of one target at a time.

    Attributes:
        widget: the panel, to be placed in a layout.
        selectionChanged: Signal(): another proposal, another target or none is selected.
        acceptRequested: Signal(): the user accepts the selected proposal.
    """

    def __init__(self, services: Services, status: StatusLine, watch: SliceWatch) -> None:
        self.selectionChanged = Signal()
        self.acceptRequested = Signal()
        self.widget, self.ui = load_panel("ProposalsPanel")
        self._session = session = services.session
        self._workflow = services.workflow
        self._idle = services.idle
        self._status = status
        self._watch = watch
        self._table = ProposalTable(self.ui.proposalsTable)
        self._pictures = Pictures(self._table, services.idle, proposal_color)
        self._looks: WeakKeyDictionary[ProposalStore, dict[str, _Look]] = WeakKeyDictionary()
        self._binding = Binding(self.widget, self._on_parameters)
        self._shown_parameters: tuple[Any, ...] = ()
        self._shortcuts = Shortcuts()
        for place in range(_DIGITS):
            self._shortcuts.add(self.widget, str(place + 1), Numbered(place, self._table.select).call)
        for keys in ("Return", "Enter"):
            self._shortcuts.add(self.ui.proposalsTable, keys, self.acceptRequested.emit)
        self._shortcuts.add(self.ui.proposalsTable, "Del", self._on_reject)
        self._connections = (
            (self.ui.targetComboBox, "currentIndexChanged(int)", self._on_target),
            (self.ui.stapleButton, "clicked()", self._on_staple),
            (self.ui.randomPickButton, "clicked()", self._on_random_pick),
            (self.ui.rejectButton, "clicked()", self._on_reject),
            (self.ui.bringBackButton, "clicked()", self._on_bring_back),
            (self.ui.uncertainButton, "clicked()", self._on_uncertain),
        )
        for widget, signature, slot in self._connections:
            widget.connect(signature, slot)
        self._listeners = (
            (session.storeChanged, self._on_store),
            (session.preview, self._on_arrived),
            (session.ranked, self._on_ranked),
            (session.finished, self.refresh),
            (session.failed, self._on_arrived),
            (session.cancelled, self.refresh),
            (watch.moved, self._draw_pictures),
            (self._table.selected, self._on_selected),
            (self._table.shownChanged, self._on_ticked),
            (self._table.activated, self.acceptRequested.emit),
        )
        for signal, listener in self._listeners:
            signal.connect(listener)
        self.refresh()

    # The module's life ----------------------------------------------------------------------------------------------------

    def connectGui(self, parameters: Parameters) -> None:
        """Show parameters and keep them as the user changes them."""
        self._shown_parameters = ()
        self._binding.bind(parameters)

    def disconnectGui(self) -> None:
        """Let go of the parameters."""
        self._binding.release()
        self._pictures.cancel()

    def enter(self) -> None:
        """The module is shown: its keys work."""
        self._shortcuts.install()
        self._draw_pictures()

    def exit(self) -> None:
        """Another module is shown."""
        self._shortcuts.remove()

    def cleanup(self) -> None:
        """Let go of everything outside the panel."""
        self.exit()
        self.disconnectGui()
        for signal, listener in self._listeners:
            signal.disconnect(listener)
        for widget, signature, slot in self._connections:
            widget.disconnect(signature, slot)
        self._table.cleanup()
        self.selectionChanged.clear()
        self.acceptRequested.clear()
        self.widget.setMRMLScene(None)

    def focus(self) -> None:
        """Give the list the keyboard."""
        self._table.focus()

    # What is selected -----------------------------------------------------------------------------------------------------

    @property
    def target(self) -> str | None:
        """The target that is listed."""
        store, index = self._session.store, self.ui.targetComboBox.currentIndex
        return store.targets[index] if store is not None and 0 <= index < len(store.targets) else None

    @property
    def selected(self) -> Row | None:
        """The selected proposal or ensemble."""
        line = self._table.current()
        return None if line is None else line.row

    def refresh(self) -> None:
        """Show what the session has now."""
        store = self._session.store
        self._fill_targets([] if store is None else list(store.targets))
        target, blinded = self.target, self._blinded
        lines: list[Line] = []
        text = _("No proposals yet: say what to outline and press Propose.")
        if store is not None and target is not None:
            rows = store.rows(target)
            text = summary(rows, store[target].ranked, blinded, self._session.running)
            origin = self._workflow.origin
            seed = 0 if origin is None else origin.request.seed
            lines = list_lines([*rows, *store.ensembles(target)], self._look.rejected, blinded, seed)
        self.ui.summaryLabel.setText(text)
        self._table.set_lines(lines, self._look.selected, blinded)
        self._show_buttons()
        self._show_outlines()
        self._draw_pictures()
        self.selectionChanged.emit()

    @property
    def _blinded(self) -> bool:
        return self._binding.parameters is not None and bool(self._binding.parameters.blinded)

    @property
    def _look(self) -> _Look:
        store, target = self._session.store, self.target
        if store is None or target is None:
            return _Look()
        return self._looks.setdefault(store, {}).setdefault(target, _Look())

    # What is shown --------------------------------------------------------------------------------------------------------

    def _fill_targets(self, targets: list[str]) -> None:
        box = self.ui.targetComboBox
        if [box.itemText(number) for number in range(box.count)] != targets:
            blocked = box.blockSignals(True)
            box.clear()
            box.addItems(targets)
            box.blockSignals(blocked)
        box.setVisible(len(targets) > 1)

    def _show_buttons(self) -> None:
        store, target, look = self._session.store, self.target, self._look
        lines = self._table.lines
        ranked = store is not None and target is not None and store[target].ranked
        self.ui.randomPickButton.setEnabled(any(line.row.random_pick for line in lines))
        self.ui.stapleButton.setEnabled(ranked and not self._blinded)
        self.ui.uncertainButton.setEnabled(bool(lines))
        self.ui.rejectButton.setEnabled(bool(lines))
        self.ui.bringBackButton.setEnabled(bool(look.rejected))
        count = len(look.rejected)
        self.ui.bringBackButton.setText(_("Bring back {count}").format(count=count) if count else _("Bring back"))

    def _show_outlines(self) -> None:
        """Outline the ticked lines and the selected one, which is filled as well, unless its box was cleared."""
        store, target, look, current = self._session.store, self.target, self._look, self._table.current()
        if store is None or target is None:
            return
        shown = {line.key for line in self._table.lines if look.ticks.get(line.key, line.shown)}
        selected = None
        if current is not None and look.ticks.get(current.key, True):
            selected = current.key
            shown.add(selected)
        self._table.set_shown(shown)
        order = [line.key for line in self._table.lines if line.key in shown]
        self._session.proposals.show(store, target, order, selected)

    def _show_agreement(self) -> None:
        store, target, overlay = self._session.store, self.target, self._session.overlay
        if (
            self._binding.parameters is not None
            and self._binding.parameters.showAgreement
            and store is not None
            and target is not None
        ):
            overlay.show(store, target, self._binding.parameters.agreementOpacity)
        else:
            overlay.hide()

    def _draw_pictures(self) -> None:
        store, target = self._session.store, self.target
        node = None if store is None else slicer.mrmlScene.GetNodeByID(store.volume_id)
        slices = None if store is None else slices_of(node, lambda _geometry: store.plan)
        if store is not None and target is not None and slices is not None and self._session.stale() is None:
            # Where the slice that is looked at has no masks (yet), the nearest one that has.
            looked_at = slices.shown(slicer.mrmlScene)
            index = min(store[target].uncertainty, key=lambda other: abs(other - looked_at), default=looked_at)
            self._pictures.draw(store, target, node, slices, index)

    # What happens ---------------------------------------------------------------------------------------------------------

    def _on_parameters(self) -> None:
        now = (
            self._binding.parameters.blinded,
            self._binding.parameters.showAgreement,
            self._binding.parameters.agreementOpacity,
        )
        before, self._shown_parameters = self._shown_parameters, now
        if now[:1] != before[:1]:
            self.refresh()
        if now[1:] != before[1:]:
            self._show_agreement()

    def _on_store(self) -> None:
        self.refresh()
        self._show_agreement()

    def _on_arrived(self, _what: str) -> None:
        self.refresh()

    def _on_ranked(self, target: str) -> None:
        if target == self.target:
            # What was looked at while slices arrived was only the first of them; now the best is.
            self._look.selected = None
            self.refresh()
            self._show_agreement()

    def _on_target(self, index: int) -> None:
        self.refresh()
        self._show_agreement()

    def _on_selected(self) -> None:
        line, look = self._table.current(), self._look
        if line is None:
            return
        look.selected = line.key
        if not look.ticks.get(line.key, True):
            del look.ticks[line.key]
        self._show_outlines()
        self.selectionChanged.emit()

    def _on_ticked(self, key: MaskKey, shown: bool) -> None:
        self._look.ticks[key] = shown
        self._show_outlines()

    def _on_reject(self) -> None:
        line, lines, look = self._table.current(), self._table.lines, self._look
        if line is None:
            return
        place = lines.index(line)
        left = [other for other in lines if other is not line]
        look.rejected.add(line.key)
        look.selected = left[min(place, len(left) - 1)].key if left else None
        self.refresh()

    def _on_bring_back(self) -> None:
        self._look.rejected.clear()
        self.refresh()

    def _on_random_pick(self) -> None:
        for line in self._table.lines:
            if line.row.random_pick:
                self._table.select_key(line.key)
                self._table.focus()

    def _on_staple(self) -> None:
        store, target = self._session.store, self.target
        if store is not None and target is not None:
            self._idle.submit(store[target].staple_steps(), self._on_staple_done)

    def _on_staple_done(self, _result: Any) -> None:
        self.refresh()

    def _on_uncertain(self) -> None:
        store, target, overlay = self._session.store, self.target, self._session.overlay
        if store is None or target is None:
            return
        index = overlay.most_uncertain_slice(store, target)
        if index is None:
            self._status.say(_("The proposals agree everywhere."))
        else:
            overlay.jump_to_slice(store, index)
