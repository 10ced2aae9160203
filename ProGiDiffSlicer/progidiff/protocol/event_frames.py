"""The engine's events as frames. Masks travel as bits; a number that does not exist (NaN) travels as null."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import asdict
from dataclasses import fields as dataclass_fields
from typing import Any

import numpy as np

from progidiff.errors import ProtocolError
from progidiff.events import DoneEvent, Event, ProgressEvent, RankingEvent, SliceEvent, WarningEvent
from progidiff.protocol.arrays import Array
from progidiff.protocol.fields import Fields, plain
from progidiff.protocol.frames import Frame
from progidiff.protocol.requests import PROTOCOL_VERSION

_LARGE = 2**31

EVENT_TYPES: dict[type[Any], str] = {
    ProgressEvent: "progress",
    SliceEvent: "slice",
    RankingEvent: "ranking",
    WarningEvent: "warning",
    DoneEvent: "done",
}
_SLICE_ARRAYS = ("masks", "agreement", "mean_probability")


def event_to_frame(event: Event, request_id: int | None) -> Frame:
    """Frame of an event; the arrays of a :class:`SliceEvent` are not copied here."""
    header: dict[str, Any] = {"type": EVENT_TYPES[type(event)], "v": PROTOCOL_VERSION, "id": request_id}
    if not isinstance(event, SliceEvent):
        return Frame(header | plain(asdict(event)))
    arrays: dict[str, Array] = {}
    for entry in dataclass_fields(event):
        value = getattr(event, entry.name)
        if entry.name not in _SLICE_ARRAYS:
            header[entry.name] = plain(value)
        elif value is not None:
            arrays[entry.name] = np.asarray(value, dtype=np.bool_ if entry.name == "masks" else np.float32)
    return Frame(header, arrays)


def _read_progress(fields: Fields, arrays: dict[str, Array]) -> ProgressEvent:
    return ProgressEvent(
        phase=fields.text("phase"),
        fraction=_number_or_nan(fields, "fraction"),
        slice_index=fields.integer("slice_index", 0, _LARGE, default=None),
        slices_done=fields.integer("slices_done", 0, _LARGE),
        slices_total=fields.integer("slices_total", 0, _LARGE),
        target=fields.text("target", default=None),
        eta_s=fields.number("eta_s", default=None),
    )


def _read_slice(fields: Fields, arrays: dict[str, Array]) -> SliceEvent:
    masks = arrays.get("masks")
    if masks is None or masks.dtype != np.bool_ or masks.ndim != 3:
        raise ProtocolError("A slice message needs the array masks, bool with three axes.")
    for name in _SLICE_ARRAYS[1:]:
        shared = arrays.get(name)
        if shared is not None and (shared.dtype != np.float32 or shared.shape != masks.shape[1:]):
            raise ProtocolError(f"The array {name} of a slice message must be float32 and of the masks' size.")
    return SliceEvent(
        target=fields.text("target"),
        slice_index=fields.integer("slice_index", 0, _LARGE),
        first_proposal=fields.integer("first_proposal", 0, _LARGE),
        masks=masks,
        agreement=arrays.get("agreement"),
        mean_probability=arrays.get("mean_probability"),
        preview=fields.boolean("preview"),
    )


def _read_ranking(fields: Fields, arrays: dict[str, Array]) -> RankingEvent:
    groups = fields.anything("groups")
    flags = fields.anything("empty")
    if not isinstance(groups, list) or not all(
        isinstance(group, list) and all(type(i) is int and 0 <= i < _LARGE for i in group) for group in groups
    ):
        raise fields.wrong("groups", "lists of whole numbers")
    if not isinstance(flags, list) or not all(isinstance(flag, bool) for flag in flags):
        raise fields.wrong("empty", "a list of true or false")
    return RankingEvent(
        target=fields.text("target"),
        order=fields.integers("order", 0, _LARGE),
        scores=fields.numbers("scores"),
        groups=groups,
        top_k=fields.integers("top_k", 0, _LARGE),
        random_pick=fields.integer("random_pick", -_LARGE, _LARGE),
        millilitres=fields.numbers("millilitres"),
        empty=flags,
        empty_share=_number_or_nan(fields, "empty_share"),
        mean_pairwise_dice=_number_or_nan(fields, "mean_pairwise_dice"),
        stop_reason=fields.text("stop_reason"),
    )


def _read_done(fields: Fields, arrays: dict[str, Array]) -> DoneEvent:
    timing = Fields(fields.mapping("timing"), "timing")
    return DoneEvent(
        model_id=fields.text("model_id"),
        proposals=fields.integer("proposals", 0, _LARGE),
        timing={name: _number_or_nan(timing, name) for name in fields.mapping("timing")},
        peak_memory_mb=_number_or_nan(fields, "peak_memory_mb"),
        adapter_id=fields.text("adapter_id", default=None),
    )


def _number_or_nan(fields: Fields, name: str) -> float:
    value = fields.number(name, default=None)
    return math.nan if value is None else float(value)


EVENT_READERS: dict[str, Callable[[Fields, dict[str, Array]], Event]] = {
    "progress": _read_progress,
    "slice": _read_slice,
    "ranking": _read_ranking,
    "warning": lambda fields, arrays: WarningEvent(fields.text("code"), fields.text("message")),
    "done": _read_done,
}
