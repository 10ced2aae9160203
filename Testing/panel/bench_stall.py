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
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import numpy as np
import psutil
import SimpleITK as sitk

from progidiff.places import sample_volume

from .driver import ROOT, Driver, qt, slicer
from .stall import StallWatch

LARGE_IJK = (512, 512, 100)
AIM_MS = 50
_ELLIPSOIDS = (
    f"import sys; sys.path.insert(0, {str(ROOT)!r}); from Testing.panel.bench_fifty import serve_ellipsoids as s; s()"
)


def main(arguments: Sequence[str] | None = None) -> None:
    """Run the cases that are named, or all; print a table, then where the longest pauses were spent."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("cases", nargs="*", metavar="CASE", help="default: all")
    parser.add_argument("--proposals", type=int, default=8, help="of the real worker (8)")
    parser.add_argument("--steps", type=int, default=1, help="of the real worker (1: only the worker needs longer for more)")
    chosen = parser.parse_args(arguments)
    if unknown := [case for case in chosen.cases if case not in _CASES]:
        parser.error(f"there is no case {unknown[0]}, only {', '.join(_CASES)}")
    driver = Driver()
    print(
        f"{'case':<8}{'proposals':>10}{'time':>9}{'longest pause':>16}{'its work':>10}{'most work':>11}{'memory':>10}",
        flush=True,
    )
    watches = []
    try:
        for case in chosen.cases or _CASES:
            watches.append((case, _CASES[case](driver, chosen)))
    finally:
        driver.close()
    print(f"\nWhere it was spent (the aim is below {AIM_MS} ms; work is processor time of the window's own thread):")
    for case, watch in watches:
        print(f"{case}:\n{watch.report(3) or '  nothing took longer than 20 ms'}")


def sample(driver: Driver, chosen: argparse.Namespace) -> StallWatch:
    """The bundled sample volume, as it is."""
    driver.load(sample_volume(), "sample")
    return _measure(driver, "sample", chosen.proposals, chosen.steps)


def large(driver: Driver, chosen: argparse.Namespace) -> StallWatch:
    """The bundled sample volume with many more voxels."""
    driver.choose(_large_volume())
    return _measure(driver, "large", chosen.proposals, chosen.steps)


def fifty(driver: Driver, chosen: argparse.Namespace) -> StallWatch:
    """Fifty proposals, faster than any model makes them."""
    driver.choose(_large_volume())
    with _ellipsoids(driver):
        return _measure(driver, "fifty", 50, 1)


def save(driver: Driver, chosen: argparse.Namespace) -> StallWatch:
    """A large volume saved whole as a training example."""
    driver.choose(_large_volume())
    review = driver.panels.review
    with _ellipsoids(driver), tempfile.TemporaryDirectory() as folder:
        driver.ask("liver", 2, 1, seed=1)
        driver.wait(lambda: driver.settled)
        driver.press_in_table(qt.Qt.Key_Return)
        review.ui.examplesSection.collapsed = False
        ui, curating = review.curating.ui, review.curating.curating
        ui.examplesFolderEdit.setCurrentPath(folder)
        driver.wait(lambda: not review.curating.looking)
        ui.exampleSlicesComboBox.setCurrentIndex(ui.exampleSlicesComboBox.count - 1)
        driver.settle()
        watch, me = StallWatch(), psutil.Process()
        before, began = me.memory_info().rss, time.perf_counter()
        driver.click(ui.saveExampleButton)
        driver.wait(lambda: not curating.busy)
        spent = time.perf_counter() - began
        watch.stop()
        if curating.contents is None or curating.contents.cases != 1:
            sys.exit(f"The example was not saved: {driver.said}")
        driver.services.settings.curatedFolder = ""
    _print("save", 0, spent, watch, me.memory_info().rss - before)
    return watch


@contextmanager
def _ellipsoids(driver: Driver) -> Iterator[None]:
    """The worker that is faster than any model, for a while."""
    driver.open_sections("setup", "prompt", "proposals", "review")
    ui = driver.panels.setup.ui
    ui.workerKindComboBox.setCurrentIndex(2)
    ui.commandEdit.setText(shlex.join([sys.executable, "-c", _ELLIPSOIDS]))
    driver.press(ui.commandEdit, qt.Qt.Key_Return)
    yield
    ui.workerKindComboBox.setCurrentIndex(0)


_CASES = {"sample": sample, "large": large, "fifty": fifty, "save": save}


def _measure(driver: Driver, case: str, proposals: int, steps: int) -> StallWatch:
    """From the click to the last segment shown; prints a line."""
    driver.set_window(400, 40)
    for name in ("Red", "Yellow", "Green"):
        driver.view(name)
    driver.panels.proposals.ui.agreementCheckBox.setChecked(True)
    driver.fill("liver", proposals, steps, seed=1)
    driver.settle()
    me = psutil.Process()
    before, most = me.memory_info().rss, [0]
    watch = StallWatch()
    began = time.perf_counter()
    driver.propose()
    sampled = [began]

    def over() -> bool:
        now = time.perf_counter()
        if now - sampled[0] > 0.1:
            sampled[0], most[0] = now, max(most[0], me.memory_info().rss)
        return bool(driver.settled)

    driver.wait(over, 3600)
    spent = time.perf_counter() - began
    watch.stop()
    store = driver.session.store
    if driver.session.failure is not None or store is None or not store.ranked("liver"):
        sys.exit(f"The run did not finish: {driver.said}")
    _print(case, store.count("liver"), spent, watch, max(most[0], me.memory_info().rss) - before)
    return watch


def _print(case: str, proposals: int, spent: float, watch: StallWatch, grown: float) -> None:
    longest = max(watch.stalls, key=lambda stall: stall.wall_s, default=None)
    work = 0.0 if longest is None else longest.work_s
    print(
        f"{case:<8}{proposals:>10}{spent:>7.1f} s{1000 * watch.longest_s:>13.0f} ms{1000 * work:>7.0f} ms"
        f"{1000 * watch.most_work_s:>8.0f} ms{grown / 2**20:>+6.0f} MiB",
        flush=True,
    )


def _large_volume() -> Any:
    """The sample volume resampled to ``LARGE_IJK``, in the scene."""
    image = sitk.ReadImage(str(sample_volume()))
    spacing = [size * step / count for size, step, count in zip(image.GetSize(), image.GetSpacing(), LARGE_IJK, strict=True)]
    fine = sitk.Resample(
        image, LARGE_IJK, sitk.Transform(), sitk.sitkLinear, image.GetOrigin(), spacing, image.GetDirection(), -1000
    )
    direction = np.array(image.GetDirection()).reshape(3, 3) @ np.diag(spacing)
    affine = np.eye(4)
    affine[:3, :3] = np.diag([-1.0, -1.0, 1.0]) @ direction
    affine[:3, 3] = np.array([-1.0, -1.0, 1.0]) * image.GetOrigin()
    node = slicer.vtkMRMLScalarVolumeNode()
    node.SetName("large")
    node.SetIJKToRASMatrix(slicer.util.vtkMatrixFromArray(affine))
    slicer.util.updateVolumeFromArray(node, sitk.GetArrayFromImage(fine))
    slicer.mrmlScene.AddNode(node)
    node.CreateDefaultDisplayNodes()
    return node


if __name__ == "__main__":
    main()
