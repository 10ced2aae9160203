"""What runs show on standard error: a bar in a terminal, a few plain lines in a log file."""

from __future__ import annotations

import sys
import time
from types import TracebackType
from typing import Protocol, Self, TextIO

from rich.console import Console
from rich.progress import (
    BarColumn,
    MofNCompleteColumn,
    Progress,
    TaskID,
    TaskProgressColumn,
    TextColumn,
    TimeElapsedColumn,
    TimeRemainingColumn,
)
from rich.text import Text

from progidiff.wire.messages import ProgressEvent

# Below this share a remaining time would be a guess.
_MIN_FRACTION = 0.03


class ProgressView(Protocol):
    """Where a running command says how far it is."""

    def __enter__(self) -> Self: ...

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None: ...

    def show(self, event: ProgressEvent) -> None:
        """Show where the work is now."""

    def warn(self, message: str) -> None:
        """Say something that does not stop the work."""


def progress_view(stream: TextIO | None = None) -> ProgressView:
    """A bar where ``stream`` (standard error) is a terminal, else plain lines."""
    stream = stream or sys.stderr
    console = Console(file=stream, highlight=False)
    return _Bar(console) if console.is_terminal and not console.is_dumb_terminal else PlainLines(stream)


def remaining(event: ProgressEvent, elapsed_s: float) -> str:
    """``"about 20 s left"``, from the worker's estimate or from the time that this phase took so far; ""
    while unknown.
    """
    eta = event.eta_s
    if eta is None and _MIN_FRACTION <= event.fraction < 1:
        eta = elapsed_s * (1 - event.fraction) / event.fraction
    if eta is None or not 0 < eta < 1e6:
        return ""
    if eta < 100:
        return f"about {max(1, round(eta))} s left"
    return f"about {round(eta / 60)} min left" if eta < 6000 else f"about {eta / 3600:.1f} h left"


def slice_text(event: ProgressEvent) -> str:
    """``"slice 12/80"`` while the twelfth of 80 slices is worked on; "" outside of slices."""
    if event.slices_total <= 0:
        return ""
    return f"slice {min(event.slices_done + 1, event.slices_total)}/{event.slices_total}"


def phase_text(event: ProgressEvent) -> str:
    """``"sampling liver"``."""
    return f"{event.phase} {event.target}" if event.target else event.phase


class _PhaseClock:
    """Seconds since the current phase began."""

    def __init__(self) -> None:
        self._phase = ""
        self._began = time.monotonic()

    def elapsed(self, phase: str) -> float:
        if phase != self._phase:
            self._phase, self._began = phase, time.monotonic()
        return time.monotonic() - self._began


class PlainLines:
    """A line when a phase begins and at every tenth of it: what a log file can bear."""

    def __init__(self, stream: TextIO) -> None:
        self._stream = stream
        self._clock = _PhaseClock()
        self._phase = ""
        self._tenth = -1

    def __enter__(self) -> Self:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None) -> None:
        return None

    def show(self, event: ProgressEvent) -> None:
        """Print a line if there is news."""
        elapsed = self._clock.elapsed(event.phase)
        tenth = int(min(max(event.fraction, 0.0), 1.0) * 10)
        if event.phase == self._phase and tenth <= self._tenth:
            return
        self._phase, self._tenth = event.phase, tenth
        share = f"{100 * event.fraction:.0f} %" if event.fraction > 0 else ""
        parts = [part for part in (slice_text(event), share, remaining(event, elapsed)) if part]
        self._print(f"{phase_text(event)}: {', '.join(parts)}" if parts else phase_text(event))

    def warn(self, message: str) -> None:
        """Print the warning."""
        self._print(f"Warning: {message}")

    def _print(self, line: str) -> None:
        print(line, file=self._stream, flush=True)


class _Bar:
    """One bar that stays on its line and goes away when the work is done."""

    def __init__(self, console: Console) -> None:
        self._progress = Progress(
            TextColumn("{task.description}"),
            BarColumn(bar_width=28),
            TaskProgressColumn(),
            TextColumn("{task.fields[where]}"),
            TextColumn("{task.fields[left]}", style="dim"),
            console=console,
            transient=True,
        )
        self._task = self._progress.add_task("starting", total=1.0, where="", left="")
        self._clock = _PhaseClock()

    def __enter__(self) -> Self:
        self._progress.start()
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None) -> None:
        self._progress.stop()

    def show(self, event: ProgressEvent) -> None:
        """Move the bar."""
        self._progress.update(
            self._task,
            description=phase_text(event),
            completed=min(max(event.fraction, 0.0), 1.0),
            where=slice_text(event),
            left=remaining(event, self._clock.elapsed(event.phase)),
        )

    def warn(self, message: str) -> None:
        """Print the warning above the bar."""
        self._progress.console.print(Text.assemble(("Warning: ", "yellow"), message))


#: Said when a training is asked to stop.
STOPPING = "Stopping: this step is finished and a checkpoint written. Ctrl+C again ends at once."


class TrainingView:
    """Log lines, and in a terminal a bar per stage with the remaining time; on standard error."""

    def __init__(self, stream: TextIO | None = None) -> None:
        self._console = Console(file=stream or sys.stderr, highlight=False, stderr=stream is None)
        self._bars: Progress | None = None
        if self._console.is_terminal and not self._console.is_dumb_terminal:
            self._bars = Progress(
                TextColumn("{task.description}"),
                BarColumn(bar_width=28),
                MofNCompleteColumn(),
                TimeElapsedColumn(),
                TextColumn("left"),
                # a step with a validation takes far longer than the others: judge by several minutes
                TimeRemainingColumn(),
                console=self._console,
                speed_estimate_period=300,
            )
        self._tasks: dict[str, TaskID] = {}

    def __enter__(self) -> Self:
        if self._bars is not None:
            self._bars.start()
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None) -> None:
        if self._bars is not None:
            self._bars.stop()

    def log(self, line: str) -> None:
        """Print a line, with the time of day."""
        self._console.print(Text(f"{time.strftime('%H:%M:%S')} {line}"), soft_wrap=True)

    def progress(self, stage: str, done: int, total: int) -> None:
        """Move the bar of a stage."""
        if self._bars is None:
            return
        if stage not in self._tasks:
            self._tasks[stage] = self._bars.add_task(stage, total=total)
        self._bars.update(self._tasks[stage], completed=done)
