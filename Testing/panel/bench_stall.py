"""How long the window stands still while a whole volume is proposed, or saved: ``python -m Testing.panel.bench_stall``.

The module is driven through its own widgets, with the agreement map on, from the click on Propose to the last segment shown.
A timer in the event loop measures the longest pause; where one is longer than 20 ms, a thread notes in which lines it was
spent. The painting of slice views is not part of it: off screen it happens only when a picture is taken.

Cases: ``sample`` (the bundled sample volume and model), ``large`` (the same, resampled to 512 x 512 x 100), ``fifty`` (50
proposals in that volume, from a worker that sends liver-sized ellipsoids as fast as the pipe takes them), ``save`` (the
whole large volume is saved as a training example, with a proposal of that worker; from the click to the case on the disk).
"""

from __future__ import annotations

import argparse
import shlex
import sys
import tempfile
import threading
import time
import traceback
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

import psutil
import SimpleITK as sitk

from progidiff.places import sample_volume
from progidiff.volumes.geometry import Geometry
from progidiff.volumes.reading import Volume

from .driver import VIEWS, Driver, qt

LARGE_IJK = (512, 512, 100)
AIM_MS = 50
#: A tick of the timer that is later than this is looked at.
LATE_S = 0.020
_TICK_MS, _LOOK_S, _KEPT = 1, 0.004, 12


@dataclass
class Stall:
    """A time in which no event was handled.

    Attributes:
        wall_s: how long.
        work_s: processor time of the main thread in it; the rest was spent waiting, or the machine was busy elsewhere.
        stacks: where the main thread was, innermost line last, each with the number of times that it was seen there.
    """

    wall_s: float
    work_s: float
    stacks: Counter[str]


class StallWatch:
    """A timer that ticks while the event loop is free, and a thread that looks at the main thread when a tick is late.

    Attributes:
        stalls: the ones with most work, most first.
        longest_s: wall time of the longest one.
        most_work_s: processor time of the main thread in the one with most of it.
    """

    def __init__(self) -> None:
        self.restart()
        self._main = threading.get_ident()
        self._ending = threading.Event()
        self._timer = qt.QTimer()
        self._timer.setTimerType(qt.Qt.PreciseTimer)
        self._timer.setInterval(_TICK_MS)
        self._timer.connect("timeout()", self._tick)
        self._timer.start()
        self._thread = threading.Thread(target=self._look, name="stall watch", daemon=True)
        self._thread.start()

    def stop(self) -> None:
        """Watch no longer; calling it again changes nothing."""
        if not self._ending.is_set():
            self._tick()
            self._timer.stop()
            self._ending.set()
            self._thread.join()

    def restart(self) -> None:
        """Forget what was seen so far."""
        self.stalls: list[Stall] = []
        self.longest_s = self.most_work_s = 0.0
        self._begin()

    @contextmanager
    def paused(self) -> Iterator[None]:
        """Leave out a time in which the watcher itself keeps the main thread busy, as with a picture."""
        self._tick()
        try:
            yield
        finally:
            self._begin()

    def report(self, most: int) -> str:
        """The longest stalls with the lines in which they were spent."""
        lines = []
        for stall in self.stalls[:most]:
            lines.append(f"{1000 * stall.wall_s:.0f} ms, of which {1000 * stall.work_s:.0f} ms of work")
            for stack, count in stall.stacks.most_common(2):
                lines += [f"  seen {count} times in", *(f"    {line}" for line in stack.splitlines())]
        return "\n".join(lines)

    def _begin(self) -> None:
        self._last, self._worked, self._seen = time.perf_counter(), time.thread_time(), Counter[str]()

    def _tick(self) -> None:
        stall = Stall(time.perf_counter() - self._last, time.thread_time() - self._worked, self._seen)
        self.longest_s, self.most_work_s = max(self.longest_s, stall.wall_s), max(self.most_work_s, stall.work_s)
        if stall.wall_s > LATE_S:
            self.stalls = sorted([*self.stalls, stall], key=lambda each: -each.work_s)[:_KEPT]
        self._begin()

    def _look(self) -> None:
        while not self._ending.wait(_LOOK_S):
            if time.perf_counter() - self._last > LATE_S:
                entries = traceback.extract_stack(sys._current_frames()[self._main])[-6:]
                lines = [f"{'/'.join(Path(e.filename).parts[-2:])}:{e.lineno} {e.name}" for e in entries]
                self._seen["\n".join(lines)] += 1


def main(arguments: Sequence[str] | None = None) -> None:
    """Run the cases that are named, or all; print a table, then where the longest pauses were spent."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("cases", nargs="*", metavar="CASE", help="default: all")
    parser.add_argument("--proposals", type=int, default=8, help="of the real worker (8)")
    parser.add_argument("--steps", type=int, default=1, help="of the real worker (1: only the worker needs longer for more)")
    chosen = parser.parse_args(arguments)
    cases: dict[str, Callable[[], StallWatch]] = {
        "sample": lambda: propose(driver, "sample", chosen.proposals, chosen.steps),
        "large": lambda: propose(driver, "large", chosen.proposals, chosen.steps),
        "fifty": lambda: propose(driver, "fifty", 50, 1),
        "save": lambda: save(driver),
    }
    if unknown := [case for case in chosen.cases if case not in cases]:
        parser.error(f"there is no case {unknown[0]}, only {', '.join(cases)}")
    driver = Driver()
    print(
        f"{'case':<8}{'proposals':>10}{'time':>9}{'longest pause':>16}{'its work':>10}{'most work':>11}{'memory':>10}",
        flush=True,
    )
    try:
        watches = {case: cases[case]() for case in chosen.cases or cases}
    finally:
        driver.close()
    print(f"\nWhere it was spent (the aim is below {AIM_MS} ms; work is processor time of the window's own thread):")
    for case, watch in watches.items():
        print(f"{case}:\n{watch.report(3) or '  nothing took longer than 20 ms'}")


def propose(driver: Driver, case: str, proposals: int, steps: int) -> StallWatch:
    """From the click to the last segment shown; prints a line."""
    if case == "sample":
        driver.load(sample_volume(), "sample")
    else:
        driver.add(large_volume(), "large")
    with ellipsoids(driver, case == "fifty"):
        driver.set_window(400, 40)
        for name in VIEWS:
            driver.view(name)
        driver.panels.proposals.ui.agreementCheckBox.setChecked(True)
        driver.fill("liver", proposals, steps, seed=1)
        driver.settle()
        with measured(driver, case, proposals) as watch:
            driver.propose()
            driver.wait(lambda: driver.settled, 3600)
        if not driver.complete:
            sys.exit(f"The run did not finish: {driver.said}")
    return watch


def save(driver: Driver) -> StallWatch:
    """A large volume saved whole as a training example; prints a line."""
    driver.add(large_volume(), "large")
    review = driver.panels.review
    with ellipsoids(driver), tempfile.TemporaryDirectory() as folder:
        driver.ask("liver", 2, 1, seed=1)
        driver.wait(lambda: driver.settled)
        driver.press_in_table(qt.Qt.Key_Return)
        review.ui.examplesSection.collapsed = False
        ui, curating = review.curating.ui, review.curating.curating
        ui.examplesFolderEdit.setCurrentPath(folder)
        driver.wait(lambda: not review.curating.looking)
        ui.exampleSlicesComboBox.setCurrentIndex(ui.exampleSlicesComboBox.count - 1)
        driver.settle()
        with measured(driver, "save", 0) as watch:
            driver.click(ui.saveExampleButton)
            driver.wait(lambda: not curating.busy)
        if curating.contents is None or curating.contents.cases != 1:
            sys.exit(f"The example was not saved: {driver.said}")
        driver.services.settings.curatedFolder = ""
    return watch


@contextmanager
def measured(driver: Driver, case: str, proposals: int) -> Iterator[StallWatch]:
    """Watch the window and its memory, and print a line of the table."""
    me, most = psutil.Process(), [0]
    before, began, watch, timer = me.memory_info().rss, time.perf_counter(), StallWatch(), qt.QTimer()
    timer.connect("timeout()", lambda: most.append(me.memory_info().rss))
    timer.start(100)
    yield watch
    spent = time.perf_counter() - began
    watch.stop()
    timer.stop()
    longest = max(watch.stalls, key=lambda stall: stall.wall_s, default=None)
    work = 0.0 if longest is None else longest.work_s
    print(
        f"{case:<8}{proposals:>10}{spent:>7.1f} s{1000 * watch.longest_s:>13.0f} ms{1000 * work:>7.0f} ms"
        f"{1000 * watch.most_work_s:>8.0f} ms{(max(*most, me.memory_info().rss) - before) / 2**20:>+6.0f} MiB",
        flush=True,
    )


@contextmanager
def ellipsoids(driver: Driver, wanted: bool = True) -> Iterator[None]:
    """The worker that is faster than any model, for a while."""
    driver.open_sections("setup", "prompt", "proposals", "review")
    ui = driver.panels.setup.ui
    if wanted:
        ui.workerKindComboBox.setCurrentIndex(2)
        ui.commandEdit.setText(shlex.join([sys.executable, str(Path(__file__).with_name("bench_fifty.py"))]))
        driver.press(ui.commandEdit, qt.Qt.Key_Return)
    yield
    ui.workerKindComboBox.setCurrentIndex(0)


def large_volume() -> Volume:
    """The sample volume resampled to ``LARGE_IJK``."""
    image = sitk.ReadImage(str(sample_volume()))
    spacing = [size * step / count for size, step, count in zip(image.GetSize(), image.GetSpacing(), LARGE_IJK, strict=True)]
    fine = sitk.Resample(
        image, LARGE_IJK, sitk.Transform(), sitk.sitkLinear, image.GetOrigin(), spacing, image.GetDirection(), -1000
    )
    return Volume(sitk.GetArrayFromImage(fine), Geometry.from_sitk(fine), "CT", "large")


if __name__ == "__main__":
    main()
