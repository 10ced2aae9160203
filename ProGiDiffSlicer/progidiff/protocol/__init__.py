"""The worker protocol: frames, requests and replies. No input or output of its own.

Standard library and numpy only. A client writes ``encode_frame(frame.header, frame.arrays)`` of
``request_to_frame(...)`` to the worker's standard input and feeds whatever it reads from the worker's
standard output to a :class:`FrameDecoder`; ``frame_to_reply`` says what came. Every request gets exactly one
final reply (:data:`FINAL`) with its id; events may come before it, heartbeats at any time.
"""

from __future__ import annotations

from progidiff.protocol.arrays import MAX_PAYLOAD, Array
from progidiff.protocol.event_frames import event_to_frame
from progidiff.protocol.frames import MAX_HEADER, Frame, FrameDecoder, encode_frame
from progidiff.protocol.replies import (
    FINAL,
    Accepted,
    Acknowledged,
    AdapterLoaded,
    AdapterUnloaded,
    Bye,
    Cancelled,
    ErrorReply,
    Heartbeat,
    HelloReply,
    ImageReply,
    Loaded,
    Pong,
    Reply,
    StatusReply,
    frame_to_event,
    frame_to_reply,
    reply_to_frame,
)
from progidiff.protocol.requests import (
    CAPABILITIES,
    PROTOCOL_VERSION,
    Cancel,
    Device,
    Hello,
    Load,
    LoadAdapter,
    Ping,
    Propose,
    Request,
    RequestError,
    SetImage,
    Shutdown,
    Status,
    UnloadAdapter,
    frame_to_request,
    image_digest,
    image_key,
    request_to_frame,
)

__all__ = [
    "CAPABILITIES",
    "FINAL",
    "MAX_HEADER",
    "MAX_PAYLOAD",
    "PROTOCOL_VERSION",
    "Accepted",
    "Acknowledged",
    "AdapterLoaded",
    "AdapterUnloaded",
    "Array",
    "Bye",
    "Cancel",
    "Cancelled",
    "Device",
    "ErrorReply",
    "Frame",
    "FrameDecoder",
    "Heartbeat",
    "Hello",
    "HelloReply",
    "ImageReply",
    "Load",
    "LoadAdapter",
    "Loaded",
    "Ping",
    "Pong",
    "Propose",
    "Reply",
    "Request",
    "RequestError",
    "SetImage",
    "Shutdown",
    "Status",
    "StatusReply",
    "UnloadAdapter",
    "encode_frame",
    "event_to_frame",
    "frame_to_event",
    "frame_to_reply",
    "frame_to_request",
    "image_digest",
    "image_key",
    "reply_to_frame",
    "request_to_frame",
]
