"""The events of one propose request, as an iterator."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator
from types import TracebackType
from typing import Self

from progidiff.client.connection import Connection
from progidiff.client.errors import WorkerLostError
from progidiff.errors import CancelledError, WorkerError
from progidiff.wire.messages import Cancel, DoneEvent, Event, ProgressEvent, RankingEvent, SliceEvent, WarningEvent


class EventStream(Iterator[Event]):
    """Events of one propose request, ending with a :class:`DoneEvent`; also a context manager.

    Iterating raises ``CancelledError`` where the request was cancelled and ``RemoteError`` where it failed.
    """

    def __init__(self, connection: Connection, request_id: int, on_end: Callable[[], None]) -> None:
        self._connection = connection
        self._request_id = request_id
        self._on_end = on_end
        self._finished = False

    def __enter__(self) -> Self:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None) -> None:
        self.close()

    def __next__(self) -> Event:
        if self._finished:
            raise StopIteration
        return self._next(None)

    def cancel(self) -> None:
        """Cancel the request, from any thread, without waiting; iterating then raises ``CancelledError``."""
        if not self._finished:
            self._connection.send(Cancel(self._request_id), expect_reply=False)

    def close(self, timeout: float = 10.0) -> None:
        """Cancel and drop what is left. A worker that does not stop within ``timeout`` seconds is ended."""
        deadline = time.monotonic() + timeout
        try:
            self.cancel()
            while not self._finished:
                self._next(max(0.0, deadline - time.monotonic()))
        except TimeoutError:
            self._finish()
            self._connection.fail(
                WorkerLostError(f"The worker did not stop within {timeout:g} s and was ended; start it again.")
            )
        except (CancelledError, WorkerError):
            # Cancelled is what was asked for; of a failure the next use of the client speaks.
            self._finish()

    def _next(self, timeout: float | None) -> Event:
        try:
            reply = self._connection.receive(self._request_id, timeout)
            if isinstance(reply, ProgressEvent | SliceEvent | RankingEvent | WarningEvent):
                return reply
            done = self._connection.expect(reply, DoneEvent)
        except (CancelledError, WorkerError):
            self._finish()
            raise
        self._finish()
        return done

    def _finish(self) -> None:
        if not self._finished:
            self._finished = True
            self._on_end()
