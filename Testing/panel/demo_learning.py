"""The second half of the demonstration: corrections become training examples, and the model is asked again."""

from __future__ import annotations

import json
import math
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import SimpleITK as sitk

from progidiff.errors import InputError
from progidiff.events import ProgressEvent
from progidiff.places import ADAPTER_CARD_NAME, sample_volume
from progidiff.volumes.reading import Volume, read_volume
from progidiff.volumes.slicing import plan_slices

from .demo_report import REPORT_NAME, Pair, write_page
from .driver import Driver, qt, slicer

#: What the label map beside the sample volume holds, see Resources/SampleData/README.md.
SAMPLE_LABELS = {
    "liver": 1,
    "spleen": 2,
    "right kidney": 3,
    "left kidney": 4,
    "pancreas": 5,
    "stomach": 6,
    "gallbladder": 7,
    "aorta": 8,
    "inferior vena cava": 9,
}
CORRECTED = 2
EXAMPLES, ADAPTERS, ADAPTER = "training-examples", "adapters", "demo"
# The second run is shorter than the first one: it is there to be compared.
_PROPOSALS, _SLICES = 4, 10
# Strokes of a person who cleans up without knowing better: this far, in voxels, holes and gaps are closed.
_CLOSED = 2


@dataclass(frozen=True, eq=False)
class Correction:
    """An accepted segment before and after it was edited.

    Attributes:
        target: key of the target.
        segment_id: the segment.
        before, after: bool (K, J, I), the accepted proposal and what was saved.
        strokes: how often the segment was painted or erased.
        how: towards what it was edited.
    """

    target: str
    segment_id: str
    before: np.ndarray
    after: np.ndarray
    strokes: int
    how: str

    @property
    def dice(self) -> float:
        """Dice of the accepted proposal to the correction."""
        return dice(self.before, self.after)


class Learning:
    """Corrects and saves, through the module's own widgets and Slicer's own editing logic."""

    def __init__(
        self,
        driver: Driver,
        source: Path,
        wait: Callable[[Callable[[], object]], None],
        show: Callable[[ProgressEvent], None] = lambda event: None,
    ) -> None:
        """``source``: the file of the volume; ``wait``: runs the event loop until something holds; ``show``: progress."""
        self.driver = driver
        self._show = show
        self._source = source
        self._wait = wait

    def run(self, folder: Path, volume: Volume, accepted: dict[str, str], steps: int) -> dict[str, Any]:
        """Correct, save, tune for some steps, and ask again; what is in summary.json.

        Args:
            folder: where the set, the adapter and the page go.
            volume: as the module sees it.
            accepted: identifiers of accepted segments by target, not empty.
            steps: training steps.
        """
        times = {}
        began = time.monotonic()
        origin = self.driver.services.workflow.origin.request
        corrections = self.correct(accepted)
        shown = self.save(corrections, folder / EXAMPLES)
        self.driver.panel(folder / "panel-5-saved.png")
        times["correct and save"] = time.monotonic() - began
        began = time.monotonic()
        adapter = self.tune(folder / ADAPTERS, steps)
        self.driver.panel(folder / "panel-6-tuned.png")
        times["tune"] = time.monotonic() - began
        began = time.monotonic()
        pairs = self.compare(corrections, origin.seed, origin.steps)
        self.driver.panel(folder / "panel-7-proposed-again.png")
        times["propose again"] = time.monotonic() - began
        facts = {
            "training examples": shown,
            "steps": str(adapter["steps"]),
            "seconds": f"{adapter['seconds']:.0f}",
            "held-out patients": "none" if not adapter["after"] else str(adapter["patients"]["validation"]),
            "what its card says": adapter["reason"],
        }
        write_page(folder / REPORT_NAME, volume, pairs, facts)
        return {
            "examples": [
                {"target": each.target, "strokes": each.strokes, "how": each.how, "dice_of_the_proposal": each.dice}
                for each in corrections
            ],
            "set": shown,
            "adapter": adapter,
            "note": "before and after are of the slices that were tuned on: they say nothing about other patients",
            "dice_to_the_correction": [
                {"target": pair.target, "before": pair.before, "after": pair.after} for pair in pairs
            ],
            "timing_s": {name: round(seconds, 1) for name, seconds in times.items()},
        }

    def tune(self, folder: Path, steps: int) -> dict[str, Any]:
        """Tune on the set with the Tuning panel, and choose the adapter; what its card says."""
        panel = self.driver.panels.tuning
        self.driver.panels.ui.tuningSection.collapsed = False
        panel.ui.adaptersFolderEdit.setCurrentPath(str(folder))
        panel.ui.adapterNameEdit.setText(ADAPTER)
        panel.ui.tuningStepsSpinBox.setValue(steps)
        self.driver.settle()
        tuning = panel.tuning

        def show() -> None:
            self._show(ProgressEvent(phase="tuning", fraction=tuning.fraction, eta_s=tuning.eta_s))

        tuning.changed.connect(show)
        self.driver.click(panel.ui.tuneButton)
        self._wait(lambda: not tuning.running)
        tuning.changed.disconnect(show)
        self.driver.settle()
        if not panel.tuning.folder:
            raise InputError(panel.tuning.message)
        box = panel.ui.adapterComboBox
        names = [box.itemText(number) for number in range(box.count)]
        box.setCurrentIndex(next(number for number, name in enumerate(names) if name.startswith(ADAPTER)))
        if not panel.tuning.better:
            # With the examples of one volume nobody is held out, so nothing shows that it is better: that is up to the user.
            panel.ui.worseCheckBox.setChecked(True)
        self.driver.settle()
        return dict(json.loads((Path(panel.tuning.folder) / ADAPTER_CARD_NAME).read_text(encoding="utf-8")))

    def compare(self, corrections: list[Correction], seed: int, steps: int) -> list[Pair]:
        """Ask for the corrected targets again, on the slices in the middle of what was corrected."""
        store = self.driver.session.store
        plan = plan_slices(store.geometry)
        others = tuple(axis for axis in range(3) if axis != plan.axis)
        proposed = range(store.slices.start, store.slices.stop)
        filled = [index for index in proposed if any(each.after.any(axis=others)[index] for each in corrections)]
        # Only where the base model was asked too.
        first = max(filled[0], filled[len(filled) // 2] - _SLICES // 2)
        stop = min(filled[-1] + 1, first + _SLICES)
        worker = self.driver.services.client.hello.pid
        prompt = "; ".join(each.target for each in corrections)
        self.driver.ask(prompt, _PROPOSALS, steps, seed, (first + 1, stop))
        self._wait(lambda: self.driver.settled)
        if self.driver.session.failure is not None:
            raise InputError(self.driver.said)
        store = self.driver.session.store
        assert self.driver.services.client.hello.pid == worker, "the adapter goes into the worker that was running"
        assert store.adapter_id, "the proposals were made with the adapter"
        inside = np.zeros_like(corrections[0].after)
        inside[(slice(None),) * plan.axis + (slice(first, stop),)] = True
        pairs = []
        for each in corrections:
            base, tuned, wanted = (mask & inside for mask in (each.before, self.proposal(each.target), each.after))
            pairs.append(Pair(each.target, wanted, base, tuned, dice(base, wanted), dice(tuned, wanted)))
        return pairs

    def correct(self, accepted: dict[str, str]) -> list[Correction]:
        """Edit accepted segments, the first two of ``accepted`` (target: segment identifier)."""
        return [self._correct(target, accepted[target]) for target in list(accepted)[:CORRECTED]]

    def save(self, corrections: list[Correction], folder: Path) -> str:
        """Save corrected segments as training examples; what the panel says of the set."""
        review = self.driver.panels.review
        ui = review.curating.ui
        review.ui.examplesSection.collapsed = False
        ui.examplesFolderEdit.setCurrentPath(str(folder))
        for correction in corrections:
            self._choose(correction.segment_id)
            self.driver.click(ui.saveExampleButton)
            self._wait(lambda: not review.curating.curating.busy)
            if not self.driver.said.startswith("Saved"):
                raise InputError(self.driver.said)
        self._wait(lambda: not review.curating.looking)
        return str(ui.examplesLabel.text)

    def mask(self, segment_id: str) -> np.ndarray:
        """A segment on the voxels of the volume, bool (K, J, I)."""
        node = self.driver.accepted()
        return np.asarray(slicer.util.arrayFromSegmentBinaryLabelmap(node, segment_id, self.driver.volume)) > 0

    def proposal(self, target: str) -> np.ndarray:
        """The first-ranked proposal of the run that is shown, bool (K, J, I)."""
        store = self.driver.session.store
        first = next(row for row in store.rows(target) if row.rank == 1)
        return np.asarray(store_mask(store, target, first.index))

    def _correct(self, target: str, segment_id: str) -> Correction:
        self._choose(segment_id)
        before = self.mask(segment_id)
        wanted, how = self._wanted(target, before)
        self.driver.click(self.driver.panels.review.ui.editButton)
        strokes = self._paint(segment_id, before, wanted)
        self.driver.panels.review.ui.editorSection.collapsed = True
        self.driver.settle()
        return Correction(target, segment_id, before, self.mask(segment_id), strokes, how)

    def _choose(self, segment_id: str) -> None:
        box = self.driver.panels.review.ui.segmentComboBox
        segmentation = self.driver.accepted().GetSegmentation()
        ids = [segmentation.GetNthSegmentID(number) for number in range(segmentation.GetNumberOfSegments())]
        box.setCurrentIndex(ids.index(segment_id))
        self.driver.settle()

    def _wanted(self, target: str, before: np.ndarray) -> tuple[np.ndarray, str]:
        """What the segment is edited towards."""
        if self._source != sample_volume() or target not in SAMPLE_LABELS:
            return cleaned(before), "islands removed and gaps closed"
        (labels,) = (self._source.parent / "labels").glob("*.nii.gz")
        known = read_volume(labels).array == SAMPLE_LABELS[target]
        # Only in the slices that were proposed for, as the example holds no others.
        store = self.driver.session.store
        place = [slice(None)] * 3
        place[store.plan.axis] = slice(store.slices.start, store.slices.stop)
        wanted = before.copy()
        wanted[tuple(place)] = known[tuple(place)]
        return wanted, "painted and erased towards the known organ"

    def _paint(self, segment_id: str, before: np.ndarray, wanted: np.ndarray) -> int:
        """Paint and erase slice by slice with the logic of Slicer's Segment Editor; the number of strokes."""
        from ProGiDiffSlicerLib.logic.labelmaps import labelmap_of, volume_grid

        logic = slicer.vtkSlicerSegmentEditorLogic()
        logic.SetMRMLScene(slicer.mrmlScene)
        logic.SetSegmentEditorNode(self.driver.panels.review.ui.segmentEditor.mrmlSegmentEditorNode())
        node, grid = self.driver.accepted(), volume_grid(self.driver.volume)
        strokes = 0
        for changed, how in (
            (wanted & ~before, logic.ModificationModeAdd),
            (before & ~wanted, logic.ModificationModeRemove),
        ):
            for k in np.flatnonzero(changed.any(axis=(1, 2))):
                stroke = labelmap_of(changed[k : k + 1], (int(k), 0, 0), grid)
                logic.ModifySegmentByLabelmap(node, segment_id, stroke, how, False, False)
                strokes += 1
                qt.QApplication.processEvents()
        return strokes


def cleaned(mask: np.ndarray) -> np.ndarray:
    """The largest island of a mask with its gaps closed."""
    image = sitk.GetImageFromArray(mask.astype(np.uint8))
    islands = sitk.RelabelComponent(sitk.ConnectedComponent(image))
    closed = sitk.BinaryMorphologicalClosing(islands == 1, [_CLOSED, _CLOSED, 0])
    return np.asarray(sitk.GetArrayFromImage(closed)) > 0


def store_mask(store: Any, target: str, index: int) -> np.ndarray:
    """A proposal on the voxels of the volume, bool (K, J, I)."""
    crop = store.masks(target, index)
    whole = np.zeros(store.geometry.shape_kji, bool)
    place = tuple(slice(start, start + size) for start, size in zip(crop.origin_kji, crop.array.shape, strict=True))
    whole[place] = np.asarray(crop.array) != 0
    return whole


def dice(a: np.ndarray, b: np.ndarray) -> float:
    """Dice of two masks; NaN for two empty ones."""
    total = int(a.sum()) + int(b.sum())
    return 2.0 * int((a & b).sum()) / total if total else math.nan
