"""The client side of the worker: start it, ask it, tell its failures apart. Standard library and numpy."""

from __future__ import annotations

from progidiff.client.client import ClientState, WorkerClient
from progidiff.client.errors import (
    RemoteError,
    WorkerExitedError,
    WorkerLostError,
    WorkerProtocolError,
    WorkerStartError,
    WorkerStateError,
)
from progidiff.client.process import default_command
from progidiff.client.stream import EventStream

__all__ = [
    "ClientState",
    "EventStream",
    "RemoteError",
    "WorkerClient",
    "WorkerExitedError",
    "WorkerLostError",
    "WorkerProtocolError",
    "WorkerStartError",
    "WorkerStateError",
    "default_command",
]
