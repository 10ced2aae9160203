"""One request while it runs: what it wants, how far it is, and how it is stopped."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager

import numpy as np

from progidiff.errors import CancelledError, ModelError
from progidiff.proposals.proposals import Proposals
from progidiff.volumes.slicing import SlicePlan
from progidiff.wire.messages import Event, ProgressEvent, ProposeRequest, WarningEvent

Emit = Callable[[Event], None]


class Run:
    """Bookkeeping of one request. A *row* is one proposal of one target on one slice.

    Args:
        request: the checked request.
        plan: how the image is cut into slices.
        slices: slice indices, in the order in which they are sampled.
        batch: most rows in one network call, to begin with.
        emit: receives the events.
        cancelled: asked often; true ends the request.

    Attributes:
        proposals: what has been sampled, by target.
        probabilities: of slices in the making, by slice and target: the sum over the proposals, float32 (rows, columns).
    """

    def __init__(
        self,
        request: ProposeRequest,
        plan: SlicePlan,
        slices: list[int],
        batch: int,
        emit: Emit,
        cancelled: Callable[[], bool],
    ) -> None:
        self.request = request
        self.slices = slices
        self.batch = batch
        self.emit = emit
        self.proposals = {target: Proposals(target, plan, range(plan.count)) for target in request.targets}
        self.probabilities: dict[tuple[int, str], np.ndarray] = {}
        self.rows_total = len(slices) * len(request.targets) * request.proposals
        self.slices_done = 0
        self._cancelled = cancelled
        self._began = time.monotonic()
        self._first: float | None = None
        self._rows_done = 0
        self._timing = {"encode_s": 0.0, "denoise_s": 0.0, "decode_s": 0.0}

    @property
    def rows_done(self) -> int:
        """Rows that have been sent."""
        return self._rows_done

    def check(self) -> None:
        """End the request if the user wants it.

        Raises:
            CancelledError: they do.
        """
        if self._cancelled():
            raise CancelledError("The request was cancelled.")

    def after_step(self, rows: int, share: float, index: int, target: str) -> bool:
        """Report that ``share`` of the steps of a batch of ``rows`` are done; returns whether the request is cancelled."""
        self.progress("sampling", index, target, rows * share)
        return self._cancelled()

    def sent(self, rows: int) -> None:
        """Count rows whose masks have been sent."""
        if self._first is None:
            self._first = time.monotonic() - self._began
        self._rows_done += rows

    def progress(self, phase: str, index: int | None = None, target: str | None = None, running: float = 0.0) -> None:
        """Report how far the request is, ``running`` rows of the current batch included, and the time left at this pace."""
        share = min((self._rows_done + running) / self.rows_total, 1.0)
        spent = time.monotonic() - self._began
        eta = spent * (1 - share) / share if share > 0 else None
        self.emit(ProgressEvent(phase, share, index, self.slices_done, len(self.slices), target, eta))

    def halve(self, rows: int) -> None:
        """Go on with half of the ``rows`` for which memory was too small.

        Raises:
            ModelError: it was too small for a single one.
        """
        if rows == 1:
            raise ModelError(
                "There is not enough memory for a single sample; "
                "close other programs, choose the device cpu, or take a smaller model."
            )
        self.batch = rows // 2
        few = "1 sample" if self.batch == 1 else f"{self.batch} samples"
        self.emit(WarningEvent("memory", f"Memory ran out; going on with {few} at a time."))

    @contextmanager
    def timed(self, part: str) -> Iterator[None]:
        """Add the time of a block to a part of the timing."""
        began = time.monotonic()
        try:
            yield
        finally:
            self._timing[part] += time.monotonic() - began

    def timing(self) -> dict[str, float]:
        """Seconds by part, to the first proposal and in all."""
        return {**self._timing, "first_proposal_s": self._first or 0.0, "total_s": time.monotonic() - self._began}
