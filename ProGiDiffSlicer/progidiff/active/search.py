"""From a folder to a ranking: every volume once, whatever interrupts it."""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from progidiff.active.finding import Candidate, find_volumes, fingerprint
from progidiff.active.measuring import NextSettings, measure
from progidiff.active.record import Failure, Item, NextDocument, Settings, read_or_begin
from progidiff.errors import CancelledError, InputError, why_left_out
from progidiff.sampling.engine import Engine, weights_key
from progidiff.volumes.reading import read_volume

Tell = Callable[[dict[str, Any]], None]
"""Receives the events of the command's JSON lines, as dictionaries."""


def rank_folder(
    engine: Engine,
    folder: Path,
    targets: Sequence[str],
    out: Path,
    settings: NextSettings,
    tell: Tell = lambda event: None,
    cancelled: Callable[[], bool] = lambda: False,
    progress: Callable[[float], None] = lambda share: None,
) -> NextDocument:
    """Measure the volumes of a folder and rank them by how much their proposals disagree.

    The file ``out`` is written after every volume. Volumes whose content it knows are not measured again, also where they
    were moved or renamed; those that are gone are left out.

    Args:
        engine: loaded engine, its adapter in use.
        folder: folder with volumes, also in folders below it.
        targets: targets of the model's vocabulary.
        out: the result file.
        settings: how much to sample.
        tell: told ``start``, ``volume`` for each new one, and ``done``.
        cancelled: asked at every denoising step; what was measured is kept.
        progress: told the share of the running volume that is done.

    Returns:
        The document as written; ``complete`` is false where it was cancelled.

    Raises:
        InputError: no such folder, or no volume in it.
        OutputError: the result file is something else, or cannot be written.
    """
    if settings.proposals < 2:
        raise InputError("Disagreement needs at least 2 proposals for each target.")
    found = find_volumes(folder)
    document, sentence = read_or_begin(out, _identity(engine, targets, settings))
    # a write now: a place that cannot be written to is better known before the first volume than after it
    known, waiting, failures = _sort(found, document.volumes)
    document.volumes, document.failures, document.complete = known, failures, False
    document.write(out)
    tell({"event": "start", "volumes": len(found), "known": len(known), "message": sentence})
    done, spent = len(known) + len(failures), []
    for failure in failures:
        tell(_news(failure, done, len(found), None))
    for candidate, mark in waiting:
        began = time.monotonic()
        try:
            result = _measured(engine, candidate, mark, targets, settings, cancelled, progress)
        except CancelledError:
            break
        if isinstance(result, Item):
            document.volumes.append(result)
            spent.append(time.monotonic() - began)
        else:
            document.failures.append(result)
        done += 1
        document.write(out)
        eta = sum(spent) / len(spent) * (len(found) - done) if spent else None
        tell(_news(result, done, len(found), eta))
    else:
        document.complete = True
        document.write(out)
    ranking = [item.model_dump(exclude={"fingerprint", "seconds"}) for item in document.ranked()]
    failed = [failure.model_dump() for failure in document.failures]
    tell({"event": "done", "ranking": ranking, "failures": failed, "cancelled": not document.complete})
    return document


def _identity(engine: Engine, targets: Sequence[str], settings: NextSettings) -> Settings:
    return Settings(
        model_id=engine.card.model_id,
        weights=weights_key(engine),
        adapter_id=engine.adapter.adapter_id if engine.adapter else None,
        targets=list(targets),
        proposals=settings.proposals,
        steps=settings.steps,
        slices=settings.slices,
        closer=settings.closer,
        seed=settings.seed,
        modality=settings.modality,
        plane=settings.plane or "automatic",
        correct_values=settings.correct_values,
    )


def _sort(
    found: Sequence[Candidate], before: Sequence[Item]
) -> tuple[list[Item], list[tuple[Candidate, str]], list[Failure]]:
    """What is known by its content, what is to be measured (with its fingerprint), and what cannot be opened."""
    by_content = {item.fingerprint: item for item in before}
    known: list[Item] = []
    waiting: list[tuple[Candidate, str]] = []
    failures: list[Failure] = []
    for candidate in found:
        try:
            mark = fingerprint(candidate.path)
        except Exception as error:
            failures.append(Failure(path=candidate.name, reason=why_left_out(candidate.name, error)))
            continue
        item = by_content.get(mark)
        if item is None:
            waiting.append((candidate, mark))
        else:
            known.append(item.model_copy(update={"path": candidate.name}))
    return known, waiting, failures


def _measured(
    engine: Engine,
    candidate: Candidate,
    mark: str,
    targets: Sequence[str],
    settings: NextSettings,
    cancelled: Callable[[], bool],
    progress: Callable[[float], None],
) -> Item | Failure:
    began = time.monotonic()
    try:
        volume = read_volume(candidate.path)
        item = measure(engine, volume, targets, settings, cancelled, progress)
    except CancelledError:
        raise
    except Exception as error:  # one volume among many; the next one may be sound
        return Failure(path=candidate.name, reason=why_left_out(candidate.name, error))
    return item.model_copy(update={"path": candidate.name, "fingerprint": mark, "seconds": time.monotonic() - began})


def _news(result: Item | Failure, done: int, volumes: int, eta: float | None) -> dict[str, Any]:
    left = {"fingerprint", "seconds"} if isinstance(result, Item) else set()
    item = result.model_dump(exclude=left)
    return {"event": "volume", "done": done, "volumes": volumes, "eta_s": eta, "item": item}
