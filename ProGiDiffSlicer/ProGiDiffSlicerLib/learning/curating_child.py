"""``python -m ProGiDiffSlicerLib.learning.curating_child``: keeps a set of training examples for the module.

It runs outside of Slicer's process and imports nothing of Slicer. Frames come in on standard input, one line of JSON for
each goes out on standard output; it ends with its input.
"""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Any, BinaryIO, TextIO

from progidiff.curation import CuratedSet, NewCase
from progidiff.errors import ProGiDiffError
from progidiff.wire.frames import Frame, FrameDecoder

_READ = 1 << 18


def serve(source: BinaryIO, out: TextIO) -> None:
    """Answer frames until the input ends."""
    decoder = FrameDecoder()
    while data := source.read1(_READ) if hasattr(source, "read1") else source.read(_READ):
        for frame in decoder.feed(data):
            out.write(json.dumps(answer(frame)) + "\n")
            out.flush()


def answer(frame: Frame) -> dict[str, Any]:
    """The reply to one request: ``{"error": sentence}`` where it cannot be done.

    Requests are ``counts``, ``add`` (a case, which may take the place of another one) and ``swap`` (cases that leave the set
    and cases that come back).
    """
    if frame.problem is not None:
        return {"error": frame.problem}
    header = frame.header
    try:
        folder = Path(header["folder"]).expanduser()
        if header["request"] == "counts":
            return _counts(folder)
        kept = CuratedSet(folder)
        if header["request"] == "add":
            return {"case": _add(kept, frame), **_told(kept)}
        _swap(kept, header["remove"], header["restore"])
        return _told(kept)
    except ProGiDiffError as error:
        return {"error": str(error)}
    except (OSError, MemoryError) as error:
        reason = getattr(error, "strerror", None) or "not enough memory"
        return {
            "error": f"The folder of training examples cannot be used ({reason}); choose another one or free some space."
        }


def _counts(folder: Path) -> dict[str, Any]:
    # Looking makes no folder.
    if not folder.is_dir():
        return {"cases": 0, "counts": {}, "modalities": []}
    return _told(CuratedSet(folder))


def _told(kept: CuratedSet) -> dict[str, Any]:
    cases = kept.list()
    return {"cases": len(cases), "counts": kept.counts(), "modalities": sorted({case.modality for case in cases})}


def _add(kept: CuratedSet, frame: Frame) -> dict[str, Any]:
    header = frame.header
    fields = dict(header["case"])
    target = fields.pop("target")
    identifier = kept.add(
        NewCase(image=frame.arrays["image"], affine=frame.arrays["affine"], masks={target: frame.arrays["mask"]}, **fields)
    )
    former = header["replaces"]
    replaced = bool(former) and former in {case.id for case in kept.list()}
    if replaced:
        kept.remove(former)
    return {"id": identifier, "replaced": former if replaced else None}


def _swap(kept: CuratedSet, remove: list[str], restore: list[str]) -> None:
    # First what comes back, so that at no moment there is less than before.
    for identifier in restore:
        kept.restore(identifier)
    present = {case.id for case in kept.list()}
    for identifier in remove:
        if identifier in present:
            kept.remove(identifier)


if __name__ == "__main__":
    sys.stdout.reconfigure(encoding="utf-8")  # type: ignore[union-attr]
    serve(sys.stdin.buffer, sys.stdout)
