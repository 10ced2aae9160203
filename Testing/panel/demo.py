"""The module from a prompt to accepted segments, without a screen: ``python -m Testing.panel.demo --out FOLDER``.

It opens the module in the host, with the engine's real worker and model, and uses nothing but the module's own widgets. The
results (scene, segmentation, pictures, numbers, the engine's report) appear in the folder together, or not at all.
"""

from __future__ import annotations

import argparse
import json
import signal
import sys
import time
import traceback
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from progidiff.cli.progress import ProgressView, progress_view
from progidiff.errors import InputError, ProGiDiffError
from progidiff.outputs.figures import display_window
from progidiff.places import atomic_folder, sample_volume
from progidiff.volumes.geometry import Geometry
from progidiff.volumes.reading import Volume, read_volume, volume_name
from progidiff.volumes.slicing import plan_slices

try:
    from .demo_learning import Learning
    from .demo_record import Recorder, about, accepted_record, target_record, told
    from .driver import Driver, qt, slicer
    from .stall import StallWatch
except ImportError as error:
    raise SystemExit(
        f"The module cannot be shown here ({error}); run make setup, and on Debian or Ubuntu have libegl1, libegl-mesa0 and "
        "libgl1-mesa-dri installed."
    ) from error

PROMPT = "liver; left kidney; pancreas"
SEED = 1
SAMPLE_NAME = "Synthetic abdomen CT"


class RunFailedError(ProGiDiffError):
    """The run began and did not end well."""


class Demo:
    """One run of the module, and what it leaves in ``folder``."""

    def __init__(self, options: argparse.Namespace, view: ProgressView, folder: Path) -> None:
        self.options = options
        self.folder = folder
        self.view = view
        self.driver = Driver()
        self.recorder = Recorder(self.driver.services, view)
        self.watch = StallWatch()
        self.interrupted = False
        self.accepted: dict[str, str] = {}

    def run(self) -> dict[str, Any]:
        """Everything, in the order in which a user does it; what is in summary.json."""
        began = time.monotonic()
        self.load()
        loaded = time.monotonic()
        self.propose()
        done = time.monotonic()
        self.watch.stop()
        targets = [self.review(number, target) for number, target in enumerate(self.driver.session.store.targets, start=1)]
        accepted = [target["accepted"] for target in targets if target["accepted"]]
        undone = bool(accepted) and self.undo_and_redo()
        self.show_accepted()
        self.save(bool(accepted))
        reviewed = time.monotonic()
        self.recorder.write_report(self.folder / "report", self.options.prompt, self.options.input.name)
        request = self.driver.services.workflow.origin.request
        return {
            "learning": self.learn(),
            **about(self.driver.volume, self.options.input.name),
            "prompt": request.prompt,
            "proposals": request.proposals,
            "steps": request.steps,
            "seed": request.seed,
            "targets": targets,
            "undone_and_done_again": undone,
            "timing_s": {
                "load the volume": round(loaded - began, 3),
                **{f"propose: {what}": seconds for what, seconds in self.recorder.times.items()},
                "propose": round(done - loaded, 3),
                "review, pictures and saving": round(reviewed - done, 3),
            },
            "longest_pause_of_the_window_ms": round(1000 * self.watch.longest_s, 1),
            "most_work_in_one_pause_ms": round(1000 * self.watch.most_work_s, 1),
        }

    def learn(self) -> dict[str, Any] | None:
        """Corrections, a short tuning on them, and proposals before and after; ``None`` where that is left out."""
        if not self.accepted or not self.options.tuning_steps:
            return None
        learning = Learning(self.driver, self.options.input, self.wait, self.view.show)
        assert self.recorder.volume is not None
        return learning.run(self.folder, self.recorder.volume, self.accepted, self.options.tuning_steps)

    def load(self) -> None:
        """The volume, in the module's selector and in the slice views."""
        path = self.options.input
        volume = read_volume(path)
        name = SAMPLE_NAME if path == sample_volume() else volume_name(path)
        node = self.driver.add(volume, name) if path.is_dir() else self.driver.load(path, name)
        low, high = display_window(volume.array, volume.modality)
        self.driver.set_window(high - low, (high + low) / 2)
        matrix = slicer.util.arrayFromVTKMatrix(_ijk_to_ras(node))
        # As the module sends it: Slicer's reader may have turned the axes of the file.
        geometry = Geometry(tuple(node.GetImageData().GetDimensions()), matrix)
        self.recorder.start(Volume(slicer.util.arrayFromVolume(node), geometry, volume.modality, volume.name))

    def propose(self) -> None:
        """From the click to the last segment shown."""
        driver, options = self.driver, self.options
        driver.fill(options.prompt, options.proposals, options.steps, options.seed, options.slices)
        driver.panel(self.folder / "panel-1-ready.png")
        self.watch.restart()
        driver.propose()
        if not driver.session.running:
            raise InputError(driver.said)
        self.wait(lambda: driver.session.store is not None or not driver.session.running)
        with self.watch.paused():
            driver.panel(self.folder / "panel-2-proposing.png")
        self.wait(lambda: driver.settled)
        store = driver.session.store
        if driver.session.failure is not None or store is None or not all(store.ranked(each) for each in store.targets):
            raise RunFailedError(driver.said or "The run ended without proposals; run it again.")

    def review(self, number: int, target: str) -> dict[str, Any]:
        """Look at the proposals of a target, and accept the first-ranked one."""
        driver = self.driver
        if len(driver.session.store.targets) > 1:
            driver.choose_target(target)
        driver.go_to_middle(target)
        driver.panels.proposals.ui.agreementCheckBox.setChecked(True)
        driver.settle()
        stem = "-".join(target.split())
        driver.save_views(self.folder / f"slices-{number}-{stem}-proposals.png")
        if number == 1:
            driver.panel(self.folder / "panel-3-proposals.png")
        record = target_record(driver, target)
        first = driver.panels.proposals.selected
        if first.empty:
            return {**record, "accepted": None, "note": "The first-ranked proposal is empty, so nothing was accepted."}
        driver.press_in_table(qt.Qt.Key_Return)
        driver.settle()
        node = driver.accepted()
        if node is None:
            raise RunFailedError(driver.said)
        segment_id = driver.panels.review._binding.parameters.targetSegment
        self.accepted[target] = segment_id
        return {**record, "accepted": accepted_record(driver, driver.volume, segment_id), "note": driver.said}

    def undo_and_redo(self) -> bool:
        """Take the last accept back and make it again; whether all segments are as they were."""
        review = self.driver.panels.review.ui
        before = self.segments()
        self.driver.click(review.undoButton)
        self.driver.settle()
        gone = self.segments()
        self.driver.click(review.redoButton)
        self.driver.settle()
        if len(gone) != len(before) - 1 or self.segments() != before:
            raise RunFailedError("Undo and redo did not bring back what was there.")
        return True

    def segments(self) -> dict[str, int]:
        """Voxels of each accepted segment."""
        node = self.driver.accepted()
        if node is None:
            return {}
        ids = [node.GetSegmentation().GetNthSegmentID(n) for n in range(node.GetSegmentation().GetNumberOfSegments())]
        arrays = {each: slicer.util.arrayFromSegmentBinaryLabelmap(node, each, self.driver.volume) for each in ids}
        return {each: int((array > 0).sum()) for each, array in arrays.items()}

    def show_accepted(self) -> None:
        """Pictures of what was accepted, with the boxes of all proposals cleared."""
        driver = self.driver
        driver.panels.proposals.ui.agreementCheckBox.setChecked(False)
        driver.clear_boxes()
        driver.settle()
        driver.save_views(self.folder / "slices-accepted.png")
        driver.panel(self.folder / "panel-4-accepted.png")

    def save(self, accepted: bool) -> None:
        """The scene, and the accepted segmentation where there is one."""
        if accepted and not slicer.util.saveNode(self.driver.accepted(), str(self.folder / "segmentation.seg.nrrd")):
            raise RunFailedError("The segmentation could not be written; see the messages above.")
        if not slicer.util.saveScene(str(self.folder / "scene.mrb")):
            raise RunFailedError("The scene could not be written; see the messages above.")

    def wait(self, until: Any) -> None:
        """Run the event loop until something holds, or until Ctrl+C."""
        self.driver.wait(lambda: self.interrupted or until(), 24 * 3600)
        if self.interrupted:
            raise KeyboardInterrupt

    def on_signal(self, _number: int, _frame: Any) -> None:
        """Qt would swallow an exception here."""
        self.interrupted = True

    def close(self) -> None:
        """End the worker."""
        self.watch.stop()
        self.driver.close()


def _ijk_to_ras(node: Any) -> Any:
    import vtk

    matrix = vtk.vtkMatrix4x4()
    node.GetIJKToRASMatrix(matrix)
    return matrix


@contextmanager
def slot_errors() -> Iterator[list[str]]:
    """Exceptions that Qt and VTK would print and forget."""
    raised: list[str] = []
    before = sys.excepthook
    sys.excepthook = lambda kind, error, trace: raised.append("".join(traceback.format_exception(kind, error, trace)))
    try:
        yield raised
    finally:
        sys.excepthook = before


def demonstrate(options: argparse.Namespace) -> dict[str, Any]:
    """Run the module and write ``options.out``; what is in its summary.json.

    Raises:
        ProGiDiffError: the input, the prompt or the folder cannot be used, or the run failed; nothing was written then.
    """
    plan = plan_slices(read_volume(options.input).geometry)
    if options.slices is not None and not 1 <= options.slices[0] <= options.slices[1] <= plan.count:
        raise InputError(f"The slices reach beyond the image; it has {plan.count}, counted from 1.")
    with atomic_folder(options.out) as folder, progress_view() as view, slot_errors() as raised:
        demo = Demo(options, view, folder)
        before = [(number, signal.signal(number, demo.on_signal)) for number in (signal.SIGINT, signal.SIGTERM)]
        try:
            summary = demo.run()
        finally:
            demo.close()
            for number, handler in before:
                signal.signal(number, handler)
        if raised:
            raise RunFailedError("Something went wrong inside the module:\n" + "\n".join(raised))
        text = json.dumps(summary, indent=2, ensure_ascii=False)
        (folder / "summary.json").write_text(text + "\n", encoding="utf-8")
    return summary


def _slices(text: str) -> tuple[int, int]:
    first, last = (int(part) for part in text.split("-"))
    return first, last


def main(arguments: list[str] | None = None) -> int:
    """The command; returns the exit code: 2 for what the caller has to change, 1 for what failed, 130 for Ctrl+C."""
    parser = argparse.ArgumentParser(prog="demo", description=__doc__)
    parser.add_argument("--input", type=Path, metavar="FILE", help="volume (default: the bundled sample)")
    parser.add_argument("--prompt", default=PROMPT, metavar="TEXT", help=f"what to outline (default: {PROMPT})")
    parser.add_argument("--out", type=Path, required=True, metavar="FOLDER", help="where the results appear")
    parser.add_argument("--proposals", type=int, default=8, metavar="N", help="proposals of each target (8)")
    parser.add_argument("--steps", type=int, default=4, metavar="S", help="denoising steps (4)")
    parser.add_argument("--seed", type=int, default=SEED, help=f"the same seed gives the same masks ({SEED})")
    parser.add_argument("--slices", type=_slices, metavar="A-B", help="first and last slice, counted from 1 (all)")
    parser.add_argument(
        "--tuning-steps", type=int, default=30, metavar="N", help="training steps on two corrections; 0: no tuning (30)"
    )
    options = parser.parse_args(arguments)
    try:
        options.input = sample_volume() if options.input is None else options.input
        summary = demonstrate(options)
    except KeyboardInterrupt:
        print("Cancelled; nothing was written.", file=sys.stderr)
        return 130
    except ProGiDiffError as error:
        print(str(error), file=sys.stderr)
        return 1 if isinstance(error, RunFailedError) else 2
    print(told(summary, options.out))
    return 0


if __name__ == "__main__":
    sys.exit(main())
