"""Where an accepted segment comes from, kept in its tags so that it travels with every ``.seg.nrrd`` and ``.mrb``."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable, Mapping
from contextlib import suppress
from dataclasses import dataclass, replace
from datetime import UTC, datetime
from typing import Any, get_type_hints

import numpy as np
import vtk

from progidiff.outputs.segmentation import escape_tag, tag_text, unescape_tag
from progidiff.proposals.votes import Overlap
from progidiff.volumes.slicing import PackedMask
from progidiff.wire.messages import ProposeRequest
from ProGiDiffSlicerLib.scene.labelmaps import Index, overlap, segment_mask

PREFIX = "ProGiDiff."

# What the accepted mask was, so that a later session can still tell an edited segment from an untouched one.
MASK_TAG = PREFIX + "mask"
# Provenance of what was in the segment before more was added to it, oldest first.
EARLIER_TAG = PREFIX + "earlier"


@dataclass(frozen=True)
class Provenance:
    """The facts of one accepted proposal.

    Attributes:
        prompt: what the user typed, exactly.
        target: key of the target, e.g. ``"left kidney"``.
        proposal: index of the proposal in the run; -1 for an ensemble.
        request: what was asked for in the run; its ``proposals`` are those that there were.
        rank: place in the order, from 1; ``None`` where the proposals were not ranked.
        score: score of the ranking; ``None`` where the proposals were not ranked.
        dropped_pieces, dropped_ml: pieces of this one that were dropped as not the organ's, and their volume.
        model_id: identity of the model.
        adapter_id: identity of the adapter; "" for none.
        plane: in which the volume was cut; "" where an earlier version did not write it down.
        corrected: whether values that cannot be Hounsfield units were taken for what they look like.
        ensemble: name of the ensemble, e.g. ``"mean"``; "" for a single proposal.
        edited: whether the segment was changed after it was accepted.
        dice_to_proposal: Dice between what was accepted and the segment as it is now, 0-1; ``None`` where the accepted
            mask is not known any more, as after a scene was loaded and then edited.
        created: time of acceptance, UTC, ISO 8601.
    """

    prompt: str
    target: str
    proposal: int
    request: ProposeRequest
    rank: int | None = None
    score: float | None = None
    dropped_pieces: int = 0
    dropped_ml: float = 0.0
    model_id: str = ""
    adapter_id: str = ""
    plane: str = ""
    corrected: bool = False
    ensemble: str = ""
    edited: bool = False
    dice_to_proposal: float | None = None
    created: str = ""

    def stamped(self) -> Provenance:
        """The same facts with the present time as ``created``, where none is given."""
        return self if self.created else replace(self, created=datetime.now(UTC).isoformat(timespec="seconds"))


# Names of the tags; those that the command line writes too have the names that it gives them.
_TAGS = {"model_id": "model", "adapter_id": "adapter", "dice_to_proposal": "dice"}


def tag_name(field: str) -> str:
    """The tag that holds a field of ``Provenance``."""
    return PREFIX + _TAGS.get(field, field)


# The fields of the facts and of their request, with their types. No two have the same name.
_OWN = {name: hint for name, hint in get_type_hints(Provenance).items() if name != "request"}
_ASKED = get_type_hints(ProposeRequest)
# A run of which nothing was written down; what an earlier version could not be asked for has its default.
_UNTOLD = {"targets": (), "proposals": 1, "steps": 0, "scheduler": ""}

PROVENANCE_TAGS = (*(tag_name(name) for name in (*_OWN, *_ASKED)), MASK_TAG, EARLIER_TAG)
# These follow from the voxels; they change without anybody having done anything.
DERIVED_TAGS = (tag_name("edited"), tag_name("dice_to_proposal"))


def get_tag(segment: Any, name: str) -> str | None:
    """A tag's text as it was set; ``None`` where the segment has no such tag."""
    value = vtk.reference("")
    return unescape_tag(str(value)) if segment.GetTag(name, value) else None


def set_tag(segment: Any, name: str, text: str) -> None:
    """Set a tag to any text; one that has it already is left alone, so that nothing counts as modified."""
    escaped = escape_tag(text)
    value = vtk.reference("")
    if not segment.GetTag(name, value) or str(value) != escaped:
        segment.SetTag(name, escaped)


def write_provenance(segment: Any, facts: Provenance) -> None:
    """Write the facts into the tags of a vtkSegment."""
    for name, text in _texts(facts).items():
        set_tag(segment, tag_name(name), text)


def read_provenance(segment: Any) -> Provenance | None:
    """The facts in a segment's tags; ``None`` for a segment that was not accepted from a proposal.

    A tag that is missing or damaged, as one that another program changed, gives the default of its field.
    """
    if get_tag(segment, tag_name("prompt")) is None:
        return None
    return _facts({name: get_tag(segment, tag_name(name)) for name in (*_OWN, *_ASKED)})


def earlier_provenance(segment: Any) -> list[Provenance]:
    """What was in the segment before more was added to it, oldest first."""
    try:
        entries = json.loads(get_tag(segment, EARLIER_TAG) or "[]")
        return [_facts({str(name): str(text) for name, text in entry.items()}) for entry in entries]
    except (ValueError, AttributeError, TypeError):
        return []


def keep_earlier(segment: Any) -> None:
    """Move the facts of a segment to the earlier ones, before those of an addition take their place."""
    facts = read_provenance(segment)
    if facts is None:
        return
    kept = [*earlier_provenance(segment), facts]
    set_tag(segment, EARLIER_TAG, json.dumps([_texts(old) for old in kept], ensure_ascii=False))


def update_after_edit(segmentation: Any, segment_id: str, proposal: tuple[PackedMask, Index] | None) -> Provenance | None:
    """Bring "edited" and Dice of a segment up to date with its voxels.

    Args:
        segmentation: the vtkMRMLSegmentationNode.
        segment_id: the segment.
        proposal: the mask that was accepted and its place on the segment's grid; ``None`` where it is not known any more.

    Returns:
        The facts as they are now; ``None`` for a segment that is gone or was not accepted from a proposal.
    """
    segment = segmentation.GetSegmentation().GetSegment(segment_id)
    facts = read_provenance(segment) if segment is not None else None
    if facts is None:
        return None
    now = segment_mask(segment)
    accepted = get_tag(segment, MASK_TAG)
    edited = accepted is not None and mask_identity(*now) != accepted
    dice: float | None = None
    if not edited:
        dice = 1.0
    elif proposal is not None:
        dice = dice_of(now, (proposal[0].to_array(), proposal[1]))
    facts = replace(facts, edited=edited, dice_to_proposal=dice)
    for name in ("edited", "dice_to_proposal"):
        set_tag(segment, tag_name(name), tag_text(getattr(facts, name)))
    return facts


def dice_of(a: tuple[np.ndarray, Index], b: tuple[np.ndarray, Index]) -> float:
    """Dice of two masks (array, origin) on one grid; two empty masks are equal, which is 1."""
    return Overlap(overlap(a, b), int(np.count_nonzero(a[0])), int(np.count_nonzero(b[0]))).dice


def mask_identity(mask: np.ndarray, origin_kji: Index) -> str:
    """A text that is the same for the same voxels of a grid, and for no others.

    ``mask`` (k, j, i) must be cropped to the voxels inside it, see ``tight``.
    """
    digest = hashlib.sha256(repr((mask.shape, origin_kji if mask.size else None)).encode())
    for plane in mask:
        digest.update(np.packbits(plane != 0).tobytes())
    return digest.hexdigest()[:32]


def _texts(facts: Provenance) -> dict[str, str]:
    """Every fact by the name of its field, those of the request among them."""
    values = {**vars(facts), **vars(facts.request)}
    return {name: tag_text(values[name]) for name in (*_OWN, *_ASKED)}


def _facts(texts: Mapping[str, str | None]) -> Provenance:
    values: dict[str, Any] = {"prompt": "", "target": "", "proposal": 0, **_read(_OWN, texts)}
    asked: dict[str, Any] = {**_UNTOLD, **_read(_ASKED, texts)}
    return Provenance(**values, request=ProposeRequest(**asked))


def _read(hints: Mapping[str, Any], texts: Mapping[str, str | None]) -> dict[str, Any]:
    found = {}
    for name, hint in hints.items():
        text = texts.get(name)
        if text is not None:
            with suppress(ValueError):
                found[name] = _PARSERS.get(hint, str)(text)
    return found


def _slices(text: str) -> tuple[int, int] | None:
    first, last = (int(part) for part in text.split("-")) if text else (1, 0)
    return (first - 1, last) if 1 <= first <= last else None


_PARSERS: dict[Any, Callable[[str], Any]] = {
    int: int,
    float: float,
    bool: lambda text: text == "1",
    int | None: lambda text: int(text) if text else None,
    float | None: lambda text: float(text) if text else None,
    tuple[str, ...]: lambda text: tuple(text.split("; ")) if text else (),
    tuple[int, int] | None: _slices,
}
