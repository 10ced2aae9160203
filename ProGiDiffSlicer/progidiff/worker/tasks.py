"""What a worker of its own does beside the one that proposes: keeping training examples."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import fields
from pathlib import Path
from typing import TYPE_CHECKING

from progidiff.errors import OutputError
from progidiff.wire.messages import CountCases, CuratedCases, KeepCase, SwapCases

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
        replaced = request.replaces if request.replaces in {each.id for each in kept.list()} else ""
        if replaced:
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
    return CuratedCases(len(cases), kept.counts(), modalities, identifier, replaced)
