"""The module from a prompt to accepted segments, without a screen: ``python -m Testing.panel.demo --out FOLDER``.

It opens the module in the host, with the engine's real worker and model, and uses nothing but the module's own widgets. The
results (scene, segmentation, pictures, numbers) appear in the folder together, or not at all.
"""

from __future__ import annotations

import argparse
import dataclasses
import json
import math
import signal
import sys
import time
import traceback
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from progidiff import __version__
from progidiff.errors import InputError, ProGiDiffError
from progidiff.outputs.report import display_window
from progidiff.places import atomic_folder, sample_volume
from progidiff.volumes.reading import read_volume, volume_name
from progidiff.volumes.slicing import plan_slices

try:
    from .bench_stall import StallWatch
    from .demo_learning import EXAMPLES, Learning
    from .driver import Driver, qt, slicer
except ImportError as error:
    raise SystemExit(
        f"The module cannot be shown here ({error}); run make setup, and on Debian or Ubuntu have libegl1, libegl-mesa0 and "
        "libgl1-mesa-dri installed."
    ) from error

PROMPT = "liver; left kidney; pancreas"
SEED = 1
FILES = {
    "*-before-and-after.png": "first-ranked proposals before and after tuning on the corrections",
    f"{EXAMPLES}/": "the corrections, as training examples",
    "scene.mrb": "the scene, for 3D Slicer",
    "segmentation.seg.nrrd": "the accepted segments",
    "panel-*.png": "the panel",
    "slices-*.png": "the slice views",
    "summary.json": "the numbers",
}


class RunFailedError(ProGiDiffError):
    """The run began and did not end well."""


class Demo:
    """One run of the module, and what it leaves in ``folder``."""

    def __init__(self, options: argparse.Namespace, folder: Path) -> None:
        self.options = options
        self.folder = folder
        self.driver = Driver()
        self.watch = StallWatch()
        self.interrupted = False
        self.accepted: dict[str, str] = {}
        self._shown = ("", -1)
        self.driver.session.warned.connect(lambda warning: print(f"Warning: {warning.message}", file=sys.stderr))
        self.driver.session.progressChanged.connect(lambda fraction, text, _eta_s: self.show(fraction, text))

    def run(self) -> dict[str, Any]:
        """Everything, in the order in which a user does it; what is in summary.json."""
        times = [time.monotonic()]
        self.load()
        times.append(time.monotonic())
        self.propose()
        times.append(time.monotonic())
        self.watch.stop()
        request = self.driver.services.session.store.request
        targets = [self.review(number, target) for number, target in enumerate(self.driver.session.store.targets, start=1)]
        undone = bool(self.accepted) and self.undo_and_redo()
        self.show_accepted()
        self.save()
        times.append(time.monotonic())
        learning = None
        if self.accepted and self.options.tuning_steps:
            learn = Learning(self.driver, self.options.input, self.wait, self.show)
            learning = learn.run(self.folder, self.accepted, self.options.tuning_steps)
        phases = ("load the volume", "propose", "review, pictures and saving")
        return {
            "progidiff": __version__,
            "input": self.options.input.name,
            "size_ijk": list(self.driver.volume.GetImageData().GetDimensions()),
            "spacing_mm": [round(value, 4) for value in self.driver.volume.GetSpacing()],
            "prompt": self.driver.session.store.prompt,
            "proposals": request.proposals,
            "steps": request.steps,
            "seed": request.seed,
            "targets": targets,
            "undone_and_done_again": undone,
            "learning": learning,
            "timing_s": {name: round(b - a, 3) for name, a, b in zip(phases, times, times[1:], strict=False)},
            "longest_pause_of_the_window_ms": round(1000 * self.watch.longest_s, 1),
            "most_work_in_one_pause_ms": round(1000 * self.watch.most_work_s, 1),
        }

    def load(self) -> None:
        """The volume, in the module's selector and in the slice views."""
        path = self.options.input
        volume = read_volume(path)
        name = "Synthetic abdomen CT" if path == sample_volume() else volume_name(path)
        if path.is_dir():
            self.driver.add(volume, name)
        else:
            self.driver.load(path, name)
        low, high = display_window(volume.array, volume.modality)
        self.driver.set_window(high - low, (high + low) / 2)

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
        if not driver.complete:
            raise RunFailedError(driver.said or "The run ended without proposals; run it again.")

    def review(self, number: int, target: str) -> dict[str, Any]:
        """Look at the proposals of a target, and accept the first-ranked one."""
        driver = self.driver
        driver.look_at(target)
        driver.save_views(self.folder / f"slices-{number}-{'-'.join(target.split())}-proposals.png")
        if number == 1:
            driver.panel(self.folder / "panel-3-proposals.png")
        store = driver.session.store
        rows = [{"name": row.name, **_plain(row)} for row in (*store.rows(target), *store.ensembles(target))]
        record = {"target": target, "rows": rows, "accepted": None}
        if driver.panels.proposals.selected.empty:
            return {**record, "note": "The first-ranked proposal is empty, so nothing was accepted."}
        driver.press_in_table(qt.Qt.Key_Return)
        driver.settle()
        if driver.accepted() is None:
            raise RunFailedError(driver.said)
        self.accepted[target] = driver.segment_ids()[-1]
        return {**record, "accepted": self.accepted_record(self.accepted[target]), "note": driver.said}

    def accepted_record(self, segment_id: str) -> dict[str, Any]:
        """An accepted segment: its name, size, and everything that its tags say of its origin."""
        from ProGiDiffSlicerLib.scene.provenance import read_provenance

        segment = self.driver.accepted().GetSegmentation().GetSegment(segment_id)
        voxels = int(self.driver.mask(segment_id).sum())
        facts = read_provenance(segment)
        return {
            "segment": segment.GetName(),
            "voxels": voxels,
            "millilitres": voxels * math.prod(self.driver.volume.GetSpacing()) / 1000.0,
            "provenance": None if facts is None else _plain(facts),
        }

    def undo_and_redo(self) -> bool:
        """Take the last accept back and make it again; all segments have to be as they were."""
        before = self.segments()
        self.driver.click(self.driver.panels.review.ui.undoButton)
        self.driver.settle()
        gone = self.segments()
        self.driver.click(self.driver.panels.review.ui.redoButton)
        self.driver.settle()
        if len(gone) != len(before) - 1 or self.segments() != before:
            raise RunFailedError("Undo and redo did not bring back what was there.")
        return True

    def segments(self) -> dict[str, bytes]:
        """The voxels of each accepted segment."""
        return {each: self.driver.mask(each).tobytes() for each in self.driver.segment_ids()}

    def show_accepted(self) -> None:
        """Pictures of what was accepted, without the proposals."""
        self.driver.hide_proposals()
        self.driver.save_views(self.folder / "slices-accepted.png")
        self.driver.panel(self.folder / "panel-4-accepted.png")

    def save(self) -> None:
        """The scene, and the accepted segmentation where there is one."""
        if self.accepted and not slicer.util.saveNode(self.driver.accepted(), str(self.folder / "segmentation.seg.nrrd")):
            raise RunFailedError("The segmentation could not be written; see the messages above.")
        if not slicer.util.saveScene(str(self.folder / "scene.mrb")):
            raise RunFailedError("The scene could not be written; see the messages above.")

    def show(self, fraction: float, text: str) -> None:
        """Progress on standard error: a line for each tenth."""
        shown = (text.partition(",")[0], int(10 * fraction))
        if text and shown != self._shown:
            self._shown = shown
            print(f"{100 * fraction:3.0f} % {text}", file=sys.stderr, flush=True)

    def wait(self, until: Callable[[], object]) -> None:
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


def _plain(record: Any) -> dict[str, Any]:
    """The fields of a dataclass for JSON, which knows no NaN."""
    values = dataclasses.asdict(record)
    return {name: None if isinstance(value, float) and not math.isfinite(value) else value for name, value in values.items()}


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
    count = plan_slices(read_volume(options.input).geometry).count
    if options.slices is not None and not 1 <= options.slices[0] <= options.slices[1] <= count:
        raise InputError(f"The slices reach beyond the image; it has {count}, counted from 1.")
    with atomic_folder(options.out) as folder, slot_errors() as raised:
        demo = Demo(options, folder)
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


def told(summary: dict[str, Any], out: Path) -> str:
    """A few lines for people."""
    size, seconds = " x ".join(map(str, summary["size_ijk"])), summary["timing_s"]["propose"]
    lines = [f"{summary['input']} ({size} voxels): {summary['proposals']} proposals of each target in {seconds:.0f} s."]
    for target in summary["targets"]:
        accepted = target["accepted"]
        if accepted is None:
            lines.append(f"  {target['target']}: not accepted. {target['note']}")
        else:
            facts = accepted["provenance"]
            lines.append(
                f"  {target['target']}: proposal {facts['proposal'] + 1} (rank {facts['rank']}, score {facts['score']:.2f}) "
                f"accepted as {accepted['segment']}, {accepted['millilitres']:.1f} mL"
            )
    if summary["undone_and_done_again"]:
        lines.append("Undo and redo brought back exactly the same voxels.")
    if learning := summary["learning"]:
        adapter, spent = learning["adapter"], learning["timing_s"]["tune"]
        lines.append(f"Corrected and saved as training examples: {learning['set']}.")
        lines.append(f"Tuned for {adapter['steps']} steps in {spent:.0f} s. {adapter['reason']}")
        lines.append("First-ranked proposal of the same prompt, Dice to the correction (on the slices that were tuned on):")
        for each in learning["dice_to_the_correction"]:
            lines.append(f"  {each['target']}: {each['before']:.3f} before, {each['after']:.3f} after")
    pause, work = summary["longest_pause_of_the_window_ms"], summary["most_work_in_one_pause_ms"]
    lines.append(f"Longest pause of the window while proposing: {pause:.0f} ms (at most {work:.0f} ms of work of its own).")
    lines += [f"{out / name}: {text}" for name, text in FILES.items() if any(out.glob(name))]
    return "\n".join(lines)


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
