"""Replies: what the worker says. Pure functions between dataclasses and frames."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import asdict, dataclass, field
from typing import Any

import numpy as np

from progidiff.errors import ProtocolError
from progidiff.events import (
    DoneEvent,
    Event,
    ImageInfo,
    ProgressEvent,
    RankingEvent,
    SliceEvent,
    WarningEvent,
)
from progidiff.protocol.arrays import Array
from progidiff.protocol.event_frames import EVENT_READERS, EVENT_TYPES, event_to_frame
from progidiff.protocol.fields import MAX_ID, Fields, plain
from progidiff.protocol.frames import Frame
from progidiff.protocol.requests import PROTOCOL_VERSION

_LARGE = 2**53


@dataclass(frozen=True)
class HelloReply:
    """The worker introduces itself; ``heartbeat_s`` lies between heartbeats, ``max_payload`` is in bytes."""

    version: str
    pid: int
    python: str
    capabilities: tuple[str, ...]
    max_payload: int
    heartbeat_s: float


@dataclass(frozen=True)
class Pong:
    """Answer to a ping."""


@dataclass(frozen=True)
class Heartbeat:
    """The process lives, and has worked on request ``running`` for ``running_s`` seconds."""

    running: int | None
    running_s: float


@dataclass(frozen=True)
class StatusReply:
    """``state`` is ``"empty"`` (no model), ``"ready"`` or ``"working"``; memory in MiB.

    ``None`` stands for what is not known or not there.
    """

    state: str
    running: int | None
    model_id: str | None
    device: str | None
    image_key: str | None
    memory_mb: float | None
    device_memory_mb: float | None
    uptime_s: float
    adapter_id: str | None = None


@dataclass(frozen=True)
class Acknowledged:
    """Answer to cancel: whether there was something to cancel, which gets its own final reply."""

    running: bool


@dataclass(frozen=True)
class Loaded:
    """A model is loaded; ``card`` is its model card as JSON."""

    model_id: str
    vocabulary: tuple[str, ...]
    device: str | None
    card: dict[str, Any] = field(default_factory=dict)


@dataclass(frozen=True)
class AdapterLoaded:
    """An adapter is in use; ``card`` is its card as JSON."""

    adapter_id: str
    card: dict[str, Any] = field(default_factory=dict)


@dataclass(frozen=True)
class AdapterUnloaded:
    """The base model is in use."""


@dataclass(frozen=True)
class ImageReply:
    """The image is the current one; ``key`` is its :func:`~progidiff.protocol.requests.image_key`."""

    key: str
    info: ImageInfo


@dataclass(frozen=True, eq=False)
class SegWritten:
    """The content of a DICOM SEG file, uint8."""

    content: Array


@dataclass(frozen=True)
class Accepted:
    """A propose request starts; ``targets`` are what its prompt was understood to mean."""

    targets: tuple[str, ...]


@dataclass(frozen=True)
class Cancelled:
    """Final reply of a request that was cancelled."""


@dataclass(frozen=True)
class Bye:
    """Last frame before a requested end."""


@dataclass(frozen=True)
class ErrorReply:
    """Final reply of a request that failed: a stable code, a sentence for the user, and maybe what to try."""

    code: str
    message: str
    hint: str = ""


Reply = (
    HelloReply
    | Pong
    | Heartbeat
    | StatusReply
    | Acknowledged
    | Loaded
    | AdapterLoaded
    | AdapterUnloaded
    | ImageReply
    | SegWritten
    | Accepted
    | Cancelled
    | Bye
    | ErrorReply
    | Event
)

# The replies after which nothing more is said about their request.
FINAL = (
    HelloReply,
    Pong,
    StatusReply,
    Acknowledged,
    Loaded,
    AdapterLoaded,
    AdapterUnloaded,
    ImageReply,
    SegWritten,
    DoneEvent,
    Cancelled,
    Bye,
    ErrorReply,
)


def reply_to_frame(reply: Reply, request_id: int | None) -> Frame:
    """Frame of a reply or event; ``request_id`` is ``None`` where it answers no request, as a heartbeat."""
    if isinstance(reply, ProgressEvent | SliceEvent | RankingEvent | WarningEvent | DoneEvent):
        return event_to_frame(reply, request_id)
    header = {"type": _NAMES[type(reply)], "v": PROTOCOL_VERSION, "id": request_id}
    if isinstance(reply, SegWritten):
        return Frame(header, {"content": reply.content})
    return Frame(header | plain(asdict(reply)))


def frame_to_reply(frame: Frame) -> tuple[int | None, Reply]:
    """Request id and reply (or event) of a frame. Unknown fields are ignored: a newer worker may say more.

    Raises:
        ProtocolError: the frame is broken, of another version, of unknown type, or breaks the type's schema.
    """
    if frame.problem is not None:
        raise ProtocolError(frame.problem)
    fields = Fields(frame.header, "reply")
    if fields.integer("v", 0, 2**31) != PROTOCOL_VERSION:
        raise ProtocolError("The worker speaks another version of the protocol; install the same version on both sides.")
    request_id: int | None = fields.integer("id", 0, MAX_ID, default=None)
    kind = fields.text("type", longest=64)
    reader = _READERS.get(kind) or EVENT_READERS.get(kind)
    if reader is None:
        raise ProtocolError("The worker sent a reply of an unknown type; install the same version on both sides.")
    return request_id, reader(Fields(frame.header, kind), frame.arrays)


def frame_to_event(frame: Frame) -> Event:
    """Event of a frame.

    Raises:
        ProtocolError: as :func:`frame_to_reply`, or the frame is a reply that is no event.
    """
    _, reply = frame_to_reply(frame)
    if not isinstance(reply, ProgressEvent | SliceEvent | RankingEvent | WarningEvent | DoneEvent):
        raise ProtocolError(f"Not an event but a {_NAMES[type(reply)]} message.")
    return reply


def _read_hello(fields: Fields, arrays: dict[str, Array]) -> HelloReply:
    return HelloReply(
        fields.text("version"),
        fields.integer("pid", 0, _LARGE),
        fields.text("python"),
        fields.texts("capabilities", 1000),
        fields.integer("max_payload", 0, _LARGE),
        fields.number("heartbeat_s"),
    )


def _read_status(fields: Fields, arrays: dict[str, Array]) -> StatusReply:
    return StatusReply(
        fields.text("state"),
        fields.integer("running", 0, _LARGE, default=None),
        fields.text("model_id", default=None),
        fields.text("device", default=None),
        fields.text("image_key", default=None),
        fields.number("memory_mb", default=None),
        fields.number("device_memory_mb", default=None),
        fields.number("uptime_s"),
        fields.text("adapter_id", default=None),
    )


def _read_loaded(fields: Fields, arrays: dict[str, Array]) -> Loaded:
    return Loaded(
        fields.text("model_id"),
        fields.texts("vocabulary", 100_000),
        fields.text("device", default=None),
        fields.mapping("card"),
    )


def _read_image(fields: Fields, arrays: dict[str, Array]) -> ImageReply:
    info = Fields(fields.mapping("info"), "image")
    shape = info.integers("slice_shape", 0, _LARGE)
    spacing = info.numbers("spacing_rc")
    if len(shape) != 2 or len(spacing) != 2:
        raise info.wrong("slice_shape and spacing_rc", "two numbers each")
    return ImageReply(
        fields.text("key"),
        ImageInfo(
            content_hash=info.text("content_hash"),
            plane=info.text("plane"),
            slice_count=info.integer("slice_count", 0, _LARGE),
            slice_shape=(shape[0], shape[1]),
            spacing_rc=(spacing[0], spacing[1]),
            slice_spacing=info.number("slice_spacing"),
        ),
    )


def _read_seg_written(fields: Fields, arrays: dict[str, Array]) -> SegWritten:
    content = arrays.get("content")
    if content is None or content.dtype != np.uint8 or content.ndim != 1:
        raise ProtocolError("A seg_written message needs the array content, uint8 with one axis.")
    return SegWritten(content)


_NAMES: dict[type[Any], str] = {
    HelloReply: "hello",
    Pong: "pong",
    Heartbeat: "heartbeat",
    StatusReply: "status",
    Acknowledged: "acknowledged",
    Loaded: "loaded",
    AdapterLoaded: "adapter_loaded",
    AdapterUnloaded: "adapter_unloaded",
    ImageReply: "image",
    SegWritten: "seg_written",
    Accepted: "accepted",
    Cancelled: "cancelled",
    Bye: "bye",
    ErrorReply: "error",
    **EVENT_TYPES,
}
_READERS: dict[str, Callable[[Fields, dict[str, Array]], Reply]] = {
    "hello": _read_hello,
    "pong": lambda fields, arrays: Pong(),
    "heartbeat": lambda fields, arrays: Heartbeat(
        fields.integer("running", 0, MAX_ID, default=None), fields.number("running_s")
    ),
    "status": _read_status,
    "acknowledged": lambda fields, arrays: Acknowledged(fields.boolean("running")),
    "loaded": _read_loaded,
    "adapter_loaded": lambda fields, arrays: AdapterLoaded(fields.text("adapter_id"), fields.mapping("card")),
    "adapter_unloaded": lambda fields, arrays: AdapterUnloaded(),
    "image": _read_image,
    "seg_written": _read_seg_written,
    "accepted": lambda fields, arrays: Accepted(fields.texts("targets", 1000)),
    "cancelled": lambda fields, arrays: Cancelled(),
    "bye": lambda fields, arrays: Bye(),
    "error": lambda fields, arrays: ErrorReply(fields.text("code"), fields.text("message"), fields.text("hint", default="")),
}
