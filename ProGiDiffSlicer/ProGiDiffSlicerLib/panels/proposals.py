"""The proposals panel: what has arrived, best first, as thumbnails, outlines and a map of agreement."""

from __future__ import annotations

import random
from collections.abc import Collection, Generator, Sequence
from dataclasses import dataclass, field
from typing import Any
from weakref import WeakKeyDictionary

import qt
import slicer
from slicer.i18n import tr as _

from progidiff.proposals.proposals import MaskKey
from ProGiDiffSlicerLib.idle import IdleQueue, Task
from ProGiDiffSlicerLib.panels.panel import Panel, StatusLine, blocked
from ProGiDiffSlicerLib.panels.pictures import SliceWatch, VolumeSlices, common_box, levels_of, picture, pixmap, slices_of
from ProGiDiffSlicerLib.parameters import Parameters
from ProGiDiffSlicerLib.scene.shown import most_uncertain_slice, proposal_color
from ProGiDiffSlicerLib.scene.store import ProposalStore, Row
from ProGiDiffSlicerLib.services import Services
from ProGiDiffSlicerLib.signals import Signal

_DIGITS = 9


# Outlined while there is no ranking that says which are the best.
_SHOWN_EARLY = 3
THUMBNAIL_PX = 56
_SHOW, _PICTURE, _TITLE, _SCORE, _MILLILITRES, _AGREEMENT = range(6)
_MARGIN_PX = 4


@dataclass
class _Look:
    """How the user looks at the proposals of one target: boxes ticked or cleared, lines rejected, the line selected."""

    ticks: dict[MaskKey, bool] = field(default_factory=dict)
    rejected: set[MaskKey] = field(default_factory=set)
    selected: MaskKey | None = None


class ProposalsPanel(Panel):
    """The list of proposals of one target at a time.

    Attributes:
        selectionChanged: Signal(): another proposal, another target or none is selected.
        acceptRequested: Signal(): the user accepts the selected proposal.
    """

    def __init__(self, services: Services, status: StatusLine) -> None:
        super().__init__("ProposalsPanel")
        self.selectionChanged = Signal()
        self.acceptRequested = Signal()
        self._session = session = services.session
        self._idle = services.idle
        self._status = status
        self._watch = SliceWatch(self.widget)
        self._table = ProposalTable(self, self.ui.proposalsTable)
        self._pictures = Pictures(self._table, services.idle)
        self._looks: WeakKeyDictionary[ProposalStore, dict[str, _Look]] = WeakKeyDictionary()
        self._shown_parameters: tuple[Any, ...] = ()
        for place in range(_DIGITS):
            self.keys.add(self.widget, str(place + 1), _Digit(place, self._table).select)
        for keys in ("Return", "Enter"):
            self.keys.add(self.ui.proposalsTable, keys, self.acceptRequested.emit)
        self.keys.add(self.ui.proposalsTable, "Del", self._on_reject)
        self.listen(
            (self.ui.targetComboBox, "currentIndexChanged(int)", self._on_target),
            (self.ui.stapleButton, "clicked()", self._on_staple),
            (self.ui.randomPickButton, "clicked()", self._on_random_pick),
            (self.ui.rejectButton, "clicked()", self._on_reject),
            (self.ui.bringBackButton, "clicked()", self._on_bring_back),
            (self.ui.uncertainButton, "clicked()", self._on_uncertain),
            (session.storeChanged, self._on_store),
            (session.preview, self._on_arrived),
            (session.ranked, self._on_ranked),
            (session.finished, self.refresh),
            (session.failed, self._on_arrived),
            (session.cancelled, self.refresh),
            (self._watch.moved, self._draw_pictures),
            (self._table.selected, self._on_selected),
            (self._table.shownChanged, self._on_ticked),
            (self._table.activated, self.acceptRequested.emit),
        )
        self.refresh()

    # The module's life ----------------------------------------------------------------------------------------------------

    def connectGui(self, parameters: Parameters) -> None:
        """Show parameters and keep them as the user changes them."""
        self._shown_parameters = ()
        super().connectGui(parameters)

    def disconnectGui(self) -> None:
        """Let go of the parameters."""
        super().disconnectGui()
        self._pictures.cancel()

    def enter(self) -> None:
        """The module is shown: its keys work."""
        super().enter()
        self._watch.start()
        self._draw_pictures()

    def exit(self) -> None:
        """Another module is shown."""
        super().exit()
        self._watch.stop()

    def cleanup(self) -> None:
        """Let go of everything outside the panel."""
        super().cleanup()
        self._watch.cleanup()
        self.selectionChanged.clear()
        self.acceptRequested.clear()

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
            seed = store.request.seed
            lines = list_lines([*rows, *store.ensembles(target)], self._look.rejected, blinded, seed)
        self.ui.summaryLabel.setText(text)
        self._table.set_lines(lines, self._look.selected, blinded)
        self._show_buttons()
        self._show_outlines()
        self._draw_pictures()
        self.selectionChanged.emit()

    @property
    def _blinded(self) -> bool:
        return self.parameters is not None and bool(self.parameters.blinded)

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
            with blocked(box):
                box.clear()
                box.addItems(targets)
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
        parameters = self.parameters
        if parameters is not None and parameters.showAgreement and store is not None and target is not None:
            overlay.show(store, target, parameters.agreementOpacity)
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

    def on_parameters(self) -> None:
        now = (self.parameters.blinded, self.parameters.showAgreement, self.parameters.agreementOpacity)
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
        index = most_uncertain_slice(store, target)
        if index is None:
            self._status.say(_("The proposals agree everywhere."))
        else:
            overlay.jump_to_slice(store, index)


@dataclass(frozen=True)
class Line:
    """One line of the table.

    Attributes:
        row: the proposal or ensemble.
        title, score, millilitres, agreement: what its cells say.
        shown: whether it is outlined unless the user says otherwise.
    """

    row: Row
    title: str
    score: str
    millilitres: str
    agreement: str
    shown: bool

    @property
    def key(self) -> MaskKey:
        """The same proposal or ensemble keeps its key when the order changes."""
        return self.row.index


def list_lines(rows: Sequence[Row], rejected: Collection[MaskKey], blinded: bool, seed: int) -> list[Line]:
    """Lines in the order in which they are listed: best first, ensembles last.

    Blinded lines come in an order that only ``seed`` decides, without rank, score and agreement, without the ensembles
    (which would show the consensus) and with none outlined in advance.
    """
    left = [row for row in rows if row.index not in rejected]
    if not blinded:
        return [_line(row, place) for place, row in enumerate(left)]
    drawn = [row for row in left if row.kind == "proposal"]
    drawn.sort(key=_number)
    random.Random(seed).shuffle(drawn)
    return [Line(row, row.name, "", _millilitres(row), "", False) for row in drawn]


def summary(rows: Sequence[Row], ranked: bool, blinded: bool, running: bool = False) -> str:
    """One sentence about the proposals of a target; ``running``: more may arrive."""
    proposals = [row for row in rows if row.kind == "proposal"]
    if not proposals:
        return _("Nothing has arrived yet.")
    if not ranked and running:
        return _("{count} received, not ranked yet.").format(count=len(proposals))
    if not ranked:
        return _("{count} received before the run ended, not ranked.").format(count=len(proposals))
    made = sum(row.weight for row in proposals)
    if all(row.empty for row in proposals):
        return _(
            "All {made} proposals are empty: the model does not see it here. To see its guess all the same, tick"
            ' "Draw also where it seems to be absent" and propose again.'
        ).format(made=made)
    if blinded:
        return _("{count} distinct of {made}, in random order.").format(count=len(proposals), made=made)
    return _("{count} distinct of {made}, best first.").format(count=len(proposals), made=made)


def _number(row: Row) -> int:
    return int(row.index)


def _line(row: Row, place: int) -> Line:
    unranked = row.kind == "proposal" and row.rank is None
    return Line(
        row=row,
        title=_title(row),
        score="" if row.score is None else f"{row.score:.2f}",
        millilitres=_millilitres(row),
        agreement="" if row.empty else f"{100 * row.agreement:.0f} %",
        shown=place < _SHOWN_EARLY if unranked else row.in_top_k,
    )


def _title(row: Row) -> str:
    title = row.name if row.rank is None else f"#{row.rank}  {row.name}"
    if row.empty:
        return _("{title}, empty").format(title=title)
    if row.kind == "proposal" and row.weight > 1:
        title = _("{title}, {count} alike").format(title=title, count=row.weight)
    if row.dropped_pieces:
        title = _("{title}, pieces dropped: {count}").format(title=title, count=row.dropped_pieces)
    return title


def _millilitres(row: Row) -> str:
    return f"{row.millilitres:.1f}" if row.millilitres < 100 else f"{row.millilitres:.0f}"


class _Digit:
    """A bound method for one line, since a shortcut passes no argument."""

    def __init__(self, place: int, table: ProposalTable) -> None:
        self._place = place
        self._table = table

    def select(self) -> None:
        """Select the line."""
        self._table.select(self._place)


class ProposalTable:
    """Lines of proposals in a QTableWidget.

    Attributes:
        selected: Signal(): another line is selected, or none.
        shownChanged: Signal(MaskKey, bool): the user ticked or cleared a line's box.
        activated: Signal(): a line was double-clicked.
    """

    def __init__(self, panel: Panel, table: Any) -> None:
        self.selected = Signal()
        self.shownChanged = Signal()
        self.activated = Signal()
        self._table = table
        self._lines: list[Line] = []
        labels = [_("Show"), _("Slice"), _("Proposal"), _("Score"), _("mL"), _("Agreement")]
        table.setColumnCount(len(labels))
        table.setHorizontalHeaderLabels(labels)
        table.setIconSize(qt.QSize(THUMBNAIL_PX, THUMBNAIL_PX))
        table.verticalHeader().setVisible(False)
        table.verticalHeader().setDefaultSectionSize(THUMBNAIL_PX + 2 * _MARGIN_PX)
        header = table.horizontalHeader()
        # By the lines in sight: each cell that is written makes Qt measure its column again.
        header.setResizeContentsPrecision(0)
        for column in range(len(labels)):
            header.setSectionResizeMode(column, qt.QHeaderView.ResizeToContents)
        header.setSectionResizeMode(_TITLE, qt.QHeaderView.Stretch)
        header.setSectionResizeMode(_PICTURE, qt.QHeaderView.Fixed)
        table.setColumnWidth(_PICTURE, THUMBNAIL_PX + 3 * _MARGIN_PX)
        panel.listen(
            (table, "itemSelectionChanged()", self.selected.emit),
            (table, "itemChanged(QTableWidgetItem*)", self._on_changed),
            (table, "cellDoubleClicked(int,int)", self._on_double_click),
        )

    @property
    def lines(self) -> list[Line]:
        """The lines from top to bottom."""
        return list(self._lines)

    def current(self) -> Line | None:
        """The selected line."""
        row = self._table.currentRow()
        return self._lines[row] if 0 <= row < len(self._lines) else None

    def set_lines(self, lines: Sequence[Line], selected: MaskKey | None, blinded: bool) -> None:
        """Show these lines and select one of them, the first where ``selected`` is not among them."""
        before, self._lines = self._lines, list(lines)
        keys = [line.key for line in lines]
        same = keys == [line.key for line in before]
        with blocked(self._table):
            self._table.setRowCount(len(lines))
            for column in (_SCORE, _AGREEMENT):
                self._table.setColumnHidden(column, blinded)
            for row, line in enumerate(lines):
                if not same:
                    self._new_row(row)
                # A cell that says the same is left alone: many lines are refreshed each second while slices arrive.
                known = _texts(before[row]) if same else {}
                for column, text in _texts(line).items():
                    if known.get(column) != text:
                        self._table.item(row, column).setText(text)
            if lines:
                self._table.setCurrentCell(keys.index(selected) if selected in keys else 0, _TITLE)

    def select(self, position: int) -> None:
        """Select the line at a position from 0; one that is not there is passed over."""
        if 0 <= position < len(self._lines):
            self._table.setCurrentCell(position, _TITLE)

    def select_key(self, key: MaskKey) -> None:
        """Select a proposal where it is listed."""
        keys = [line.key for line in self._lines]
        if key in keys:
            self.select(keys.index(key))

    def set_shown(self, shown: set[MaskKey]) -> None:
        """Tick the boxes of these proposals and clear the others."""
        with blocked(self._table):
            for row, line in enumerate(self._lines):
                state = qt.Qt.Checked if line.key in shown else qt.Qt.Unchecked
                self._table.item(row, _SHOW).setCheckState(state)

    def set_picture(self, key: MaskKey, pixmap: Any) -> None:
        """Put a thumbnail in a proposal's line, if it is still listed."""
        icon = qt.QIcon(pixmap)
        # The selected line's picture keeps its colours too.
        icon.addPixmap(pixmap, qt.QIcon.Selected)
        for row, line in enumerate(self._lines):
            if line.key == key:
                with blocked(self._table):
                    self._table.item(row, _PICTURE).setIcon(icon)

    def focus(self) -> None:
        """Give the table the keyboard."""
        self._table.setFocus()

    def _new_row(self, row: int) -> None:
        plain = qt.Qt.ItemIsEnabled | qt.Qt.ItemIsSelectable
        for column in range(self._table.columnCount):
            item = qt.QTableWidgetItem()
            item.setFlags(plain | qt.Qt.ItemIsUserCheckable if column == _SHOW else plain)
            if column in (_SCORE, _MILLILITRES, _AGREEMENT):
                item.setTextAlignment(qt.Qt.AlignRight | qt.Qt.AlignVCenter)
            self._table.setItem(row, column, item)
        self._table.item(row, _SHOW).setCheckState(qt.Qt.Unchecked)

    def _on_changed(self, item: Any) -> None:
        row = item.row()
        if item.column() == _SHOW and row < len(self._lines):
            self.shownChanged.emit(self._lines[row].key, item.checkState() == qt.Qt.Checked)

    def _on_double_click(self, row: int, column: int) -> None:
        self.activated.emit()


def _texts(line: Line) -> dict[int, str]:
    """What the cells of a line say, by column."""
    return {_TITLE: line.title, _SCORE: line.score, _MILLILITRES: line.millilitres, _AGREEMENT: line.agreement}


class Pictures:
    """Draws the thumbnails of a table; a new drawing takes the place of one that is under way."""

    def __init__(self, table: ProposalTable, idle: IdleQueue) -> None:
        self._table = table
        self._idle = idle
        self._task: Task | None = None

    def draw(self, store: ProposalStore, target: str, node: Any, slices: VolumeSlices, index: int) -> None:
        """Draw slice ``index`` of the volume ``node`` with the mask of each listed proposal."""
        self.cancel()
        keys = [line.key for line in self._table.lines]
        if keys:
            self._task = self._idle.submit(self._steps(store, target, node, slices, index, keys))

    def cancel(self) -> None:
        """Draw no more."""
        if self._task is not None:
            self._task.cancel()
            self._task = None

    def _steps(
        self, store: ProposalStore, target: str, node: Any, slices: VolumeSlices, index: int, keys: Sequence[MaskKey]
    ) -> Generator[None, None, None]:
        masks = []
        for key in keys:
            masks.append(store[target].slice_mask(key, index))
            yield
        pixels = slices.pixels(index)
        levels = levels_of(node, pixels)
        box = common_box(masks, slices.plan.shape_rc)
        yield
        for key, mask in zip(keys, masks, strict=True):
            colours = picture(pixels, mask, box, THUMBNAIL_PX, levels, proposal_color(key), slices.plan.spacing_rc)
            self._table.set_picture(key, pixmap(colours))
            yield
