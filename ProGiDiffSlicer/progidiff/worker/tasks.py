"""What a worker of its own does beside the one that proposes: keeping examples, looking for the next case, tuning."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import fields
from pathlib import Path
from typing import TYPE_CHECKING, Any

from progidiff.errors import OutputError
from progidiff.wire.messages import (
    AdaptDone,
    AdaptRequest,
    CountCases,
    CuratedCases,
    Event,
    KeepCase,
    NextDone,
    NextRequest,
    SwapCases,
)
from progidiff.worker.pipes import LOG

if TYPE_CHECKING:
    from progidiff.curation import CuratedSet
    from progidiff.worker.session import RequestRun


def count_cases(request: CountCases, run: RequestRun) -> CuratedCases:
    """What a curated set holds; looking makes no folder."""
    with _opened(request.folder) as kept:
        return _contents(kept) if kept.folder.is_dir() else CuratedCases(0, {}, ())


def keep_case(request: KeepCase, run: RequestRun) -> CuratedCases:
    """Save a case, and take out the one whose place it takes."""
    from progidiff.curation import NewCase

    names = {entry.name for entry in fields(NewCase)} - {"masks"}
    case = NewCase(masks={request.target: request.mask}, **{name: getattr(request, name) for name in names})
    with _opened(request.folder) as kept:
        identifier = kept.add(case, run.check)
        replaced = ""
        if request.replaces and request.replaces in {each.id for each in kept.list()}:
            replaced = request.replaces
            kept.remove(replaced)
        return _contents(kept, identifier, replaced)


def swap_cases(request: SwapCases, run: RequestRun) -> CuratedCases:
    """Restore and remove, in this order, so that at no moment there is less than before."""
    with _opened(request.folder) as kept:
        for identifier in request.restore:
            kept.restore(identifier)
        for identifier in {each.id for each in kept.list()}.intersection(request.remove):
            kept.remove(identifier)
        return _contents(kept)


def find_next(request: NextRequest, run: RequestRun) -> NextDone:
    """Rank the volumes of a folder with an engine of its own; what was measured is kept."""
    from progidiff.active.search import search

    tell = _Told(run)
    search(request, tell, run.cancelled)
    return tell.final


def adapt(request: AdaptRequest, run: RequestRun) -> AdaptDone:
    """Tune on own cases; a cancelled tuning keeps the best so far."""
    from progidiff.training.adapt import adapt as tune
    from progidiff.training.run import Watch

    tell = _Told(run)
    tune(request, Watch(log=LOG.info, cancelled=run.cancelled), tell)
    return tell.final


class _Told:
    """Sends events on; the final reply is sent last, when it is sure that nothing fails or follows."""

    final: Any = None

    def __init__(self, run: RequestRun) -> None:
        self._run = run

    def __call__(self, message: Event | AdaptDone | NextDone) -> None:
        if isinstance(message, AdaptDone | NextDone):
            self.final = message
        else:
            self._run.emit(message)


@contextmanager
def _opened(folder: str) -> Iterator[CuratedSet]:
    from progidiff.curation import CuratedSet

    try:
        yield CuratedSet(Path(folder).expanduser())
    except (OSError, MemoryError) as error:
        reason = getattr(error, "strerror", None) or "not enough memory"
        raise OutputError(
            f"The folder of training examples cannot be used ({reason}); choose another one or free some space."
        ) from error


def _contents(kept: CuratedSet, identifier: str = "", replaced: str = "") -> CuratedCases:
    cases = kept.list()
    modalities = tuple(sorted({case.modality for case in cases}))
    return CuratedCases(len(cases), kept.counts(cases), modalities, identifier, replaced)
