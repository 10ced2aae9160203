"""What the table of proposals says: its lines, their order and their words."""

from __future__ import annotations

import random
from collections.abc import Collection, Sequence
from dataclasses import dataclass

from slicer.i18n import tr as _

from progidiff.proposals.proposals import MaskKey
from ProGiDiffSlicerLib.logic.store import Row

# Outlined while there is no ranking that says which are the best.
_SHOWN_EARLY = 3


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
        return _("{title}, {count} alike").format(title=title, count=row.weight)
    return title


def _millilitres(row: Row) -> str:
    return f"{row.millilitres:.1f}" if row.millilitres < 100 else f"{row.millilitres:.0f}"
