"""What ``progidiff train`` shows while it runs, and how it is stopped."""

from __future__ import annotations

import sys
import time
from types import TracebackType
from typing import Self, TextIO

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TaskID, TextColumn, TimeElapsedColumn, TimeRemainingColumn
from rich.text import Text

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
