"""What the demonstration keeps of a run: the engine's own report, and a summary for programs."""

from __future__ import annotations

import dataclasses
import math
import time
from pathlib import Path
from typing import Any

from progidiff import __version__
from progidiff.cli.gathering import Gathered
from progidiff.cli.progress import ProgressView
from progidiff.cli.proposing import understand
from progidiff.cli.writing import Job, model_record, write_results
from progidiff.volumes.reading import Volume
from progidiff.volumes.slicing import plan_slices
from progidiff.wire.messages import Event, ProgressEvent, ProposeRequest, WarningEvent

from .demo_learning import EXAMPLES
from .demo_report import REPORT_NAME


class Recorder:
    """Listens to what the worker sends to the module, so that the engine's report is about the very same proposals.

    Attributes:
        times: seconds since the first event of the run was expected, by what happened.
    """

    def __init__(self, services: Any, view: ProgressView) -> None:
        self.times: dict[str, float] = {}
        self._services = services
        self._view = view
        self._began = time.monotonic()
        self._request: ProposeRequest | None = None
        self._gathered: Gathered | None = None
        self._volume: Volume | None = None
        self._propose = services.client.propose
        services.client.propose = self._listen
        services.session.warned.connect(lambda warning: view.warn(warning.message))
        services.session.preview.connect(self._on_preview)

    @property
    def volume(self) -> Volume | None:
        """The volume of the latest run."""
        return self._volume

    def start(self, volume: Volume) -> None:
        """A run on this volume is about to start."""
        self._volume = volume
        self._began = time.monotonic()

    def mark(self, what: str) -> None:
        """Note the time at which something happened, the first time it does."""
        self.times.setdefault(what, round(time.monotonic() - self._began, 3))

    def write_report(self, folder: Path, prompt: str, source_name: str) -> None:
        """Write the engine's result folder, as ``progidiff propose`` does."""
        client, request, volume, gathered = self._services.client, self._request, self._volume, self._gathered
        assert request is not None
        assert volume is not None
        assert gathered is not None
        plan = plan_slices(volume.geometry)
        job = Job(
            source_name=source_name,
            volume=volume,
            modality=volume.modality,
            plan=plan,
            slices=range(*(request.slices or (0, plan.count))),
            image=client.image.info,
            prompts=(prompt,),
            wanted=understand((prompt,), client.loaded.vocabulary),
            request=request,
            model=model_record(client.loaded.model_id, client.loaded.card, client.loaded.device),
            began=self._began,
        )
        folder.mkdir()
        write_results(folder, job, gathered)

    def _listen(self, request: ProposeRequest) -> Any:
        assert self._volume is not None
        self.mark("model loaded and volume sent")
        geometry = self._volume.geometry
        self._request = request
        self._gathered = Gathered.start(request.targets, plan_slices(geometry), geometry.shape_kji)
        call = self._propose(request)
        call.event.connect(self._on_event)
        call.succeeded.connect(self._on_event)
        return call

    def _on_event(self, event: Event) -> None:
        if isinstance(event, ProgressEvent):
            self._view.show(event)
        elif not isinstance(event, WarningEvent):
            # Packing masks takes its time: not in the middle of what the panel does with the same event.
            self._services.idle.submit(self._take(event))

    def _take(self, event: Event) -> Any:
        assert self._gathered is not None
        self._gathered.take(event)
        yield

    def _on_preview(self, _target: str) -> None:
        self.mark("first preview")


def target_record(driver: Any, target: str) -> dict[str, Any]:
    """What the list of proposals says of a target, in numbers."""
    store = driver.session.store
    rows = [*store.rows(target), *store.ensembles(target)]
    return {"target": target, "rows": [{"name": row.name, **_finite(dataclasses.asdict(row))} for row in rows]}


def accepted_record(driver: Any, volume: Any, segment_id: str) -> dict[str, Any]:
    """An accepted segment: its name, size in mL, colour, code, and everything that its tags say of its origin."""
    import slicer

    from ProGiDiffSlicerLib.logic.provenance import read_provenance

    node = driver.accepted()
    segment = node.GetSegmentation().GetSegment(segment_id)
    voxels = int((slicer.util.arrayFromSegmentBinaryLabelmap(node, segment_id, volume) > 0).sum())
    facts = read_provenance(segment)
    return {
        "segment": segment.GetName(),
        "segmentation": node.GetName(),
        "voxels": voxels,
        "millilitres": voxels * math.prod(volume.GetSpacing()) / 1000.0,
        "color": [round(value, 3) for value in segment.GetColor()],
        "provenance": None if facts is None else _finite(dataclasses.asdict(facts)),
    }


def about(volume: Any, source_name: str) -> dict[str, Any]:
    """The version, the machine-independent facts of the input."""
    return {
        "progidiff": __version__,
        "input": source_name,
        "size_ijk": list(volume.GetImageData().GetDimensions()),
        "spacing_mm": [round(value, 4) for value in volume.GetSpacing()],
    }


def told(summary: dict[str, Any], out: Path) -> str:
    """A few lines for people."""
    size = " x ".join(str(length) for length in summary["size_ijk"])
    seconds = summary["timing_s"]["propose"]
    lines = [f"{summary['input']} ({size} voxels): {summary['proposals']} proposals of each target in {seconds:.0f} s."]
    for target in summary["targets"]:
        accepted = target["accepted"]
        if accepted is None:
            lines.append(f"  {target['target']}: not accepted. {target['note']}")
            continue
        facts = accepted["provenance"]
        lines.append(
            f"  {target['target']}: proposal {facts['proposal'] + 1} (rank {facts['rank']}, score {facts['score']:.2f}) "
            f"accepted as {accepted['segment']}, {accepted['millilitres']:.1f} mL"
        )
    if summary["undone_and_done_again"]:
        lines.append("Undo and redo brought back exactly the same voxels.")
    lines += told_of_learning(summary["learning"])
    pause, work = summary["longest_pause_of_the_window_ms"], summary["most_work_in_one_pause_ms"]
    lines.append(f"Longest pause of the window while proposing: {pause:.0f} ms (at most {work:.0f} ms of work of its own).")
    for name, text in (
        ("report/report.html", "all proposals, for a browser"),
        (REPORT_NAME, "proposals before and after tuning on the corrections"),
        (f"{EXAMPLES}/", "the corrections, as training examples"),
        ("scene.mrb", "the scene, for 3D Slicer"),
        ("segmentation.seg.nrrd", "the accepted segments"),
        ("panel-*.png, slices-*.png", "what the user sees"),
        ("summary.json", "the numbers"),
    ):
        if "*" in name or (out / name).exists():
            lines.append(f"{out / name}: {text}")
    return "\n".join(lines)


def told_of_learning(learning: dict[str, Any] | None) -> list[str]:
    """The corrections and what came of them."""
    if learning is None:
        return []
    adapter, times = learning["adapter"], learning["timing_s"]
    lines = [f"Corrected and saved as training examples: {learning['set']}."]
    lines.append(f"Tuned for {adapter['steps']} steps in {times['tune']:.0f} s. {adapter['reason']}")
    lines.append("First-ranked proposal of the same prompt, Dice to the correction (on the slices that were tuned on):")
    lines += [
        f"  {each['target']}: {each['before']:.3f} before, {each['after']:.3f} after"
        for each in learning["dice_to_the_correction"]
    ]
    return lines


def _finite(values: dict[str, Any]) -> dict[str, Any]:
    """JSON knows no NaN."""
    return {name: None if isinstance(value, float) and not math.isfinite(value) else value for name, value in values.items()}
