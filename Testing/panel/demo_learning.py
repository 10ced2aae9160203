"""The second half of the demonstration: corrections become training examples, and the model is asked again."""

from __future__ import annotations

import io
import json
import math
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import SimpleITK as sitk
from PIL import Image

from progidiff.errors import InputError
from progidiff.outputs.report import Backdrop, Outline, display_window, outlines_png, windowed
from progidiff.places import ADAPTER_CARD_NAME, sample_volume
from progidiff.volumes.reading import read_volume
from progidiff.volumes.slicing import extract_slice

from .driver import Driver, qt, slicer

#: What the labels 1, 2, ... of the label map beside the sample volume are, see Resources/SampleData/README.md.
SAMPLE_LABELS = (
    "liver", "spleen", "right kidney", "left kidney", "pancreas",
    "stomach", "gallbladder", "aorta", "inferior vena cava",
)  # fmt: skip
CORRECTED = 2
EXAMPLES, ADAPTERS, ADAPTER = "training-examples", "adapters", "demo"
# The second run is shorter than the first one: it is there to be compared.
_PROPOSALS, _SLICES = 4, 10
# Strokes of a person who cleans up without knowing better: this far, in voxels, holes and gaps are closed.
_CLOSED = 2
_STYLES = (Outline("#e69f00", "solid", "solid"), Outline("#ffffff", "dashed", "dashed"))


@dataclass(frozen=True, eq=False)
class Correction:
    """An accepted segment before and after it was edited.

    Attributes:
        target: key of the target.
        segment_id: the segment.
        before, after: bool (K, J, I), the accepted proposal and what was saved.
        strokes: how often the segment was painted or erased.
    """

    target: str
    segment_id: str
    before: np.ndarray
    after: np.ndarray
    strokes: int


class Learning:
    """Corrects and saves, through the module's own widgets and Slicer's own editing logic."""

    def __init__(
        self,
        driver: Driver,
        source: Path,
        wait: Callable[[Callable[[], object]], None],
        show: Callable[[float, str], None] = lambda fraction, text: None,
    ) -> None:
        """``source``: the file of the volume; ``wait``: runs the event loop until something holds; ``show``: progress."""
        self.driver = driver
        self._source = source
        self._wait = wait
        self._show = show

    def run(self, folder: Path, accepted: dict[str, str], steps: int) -> dict[str, Any]:
        """Correct, save, tune for some steps, and ask again; what is in summary.json.

        Args:
            folder: where the set, the adapter and the pictures go.
            accepted: identifiers of accepted segments by target, not empty.
            steps: training steps.
        """
        origin, times = self.driver.services.session.store.request, [time.monotonic()]
        corrections = self.correct(accepted)
        shown = self.save(corrections, folder / EXAMPLES)
        self.driver.panel(folder / "panel-5-saved.png")
        times.append(time.monotonic())
        adapter = self.tune(folder / ADAPTERS, steps)
        self.driver.panel(folder / "panel-6-tuned.png")
        times.append(time.monotonic())
        compared = self.compare(corrections, origin.seed, origin.steps, folder)
        self.driver.panel(folder / "panel-7-proposed-again.png")
        times.append(time.monotonic())
        phases = ("correct and save", "tune", "propose again")
        return {
            "strokes": {each.target: each.strokes for each in corrections},
            "set": shown,
            "adapter": adapter,
            "note": "before and after are of the slices that were tuned on: they say nothing about other patients",
            "dice_to_the_correction": compared,
            "timing_s": {name: round(b - a, 1) for name, a, b in zip(phases, times, times[1:], strict=False)},
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
            self._show(tuning.fraction, "tuning")

        tuning.changed.connect(show)
        self.driver.click(panel.ui.tuneButton)
        self._wait(lambda: not tuning.running)
        tuning.changed.disconnect(show)
        self.driver.settle()
        if not tuning.folder:
            raise InputError(tuning.message)
        box = panel.ui.adapterComboBox
        names = [box.itemText(number) for number in range(box.count)]
        box.setCurrentIndex(next(number for number, name in enumerate(names) if name.startswith(ADAPTER)))
        if not tuning.better:
            # With the examples of one volume nobody is held out, so nothing shows that it is better: that is up to the user.
            panel.ui.worseCheckBox.setChecked(True)
        self.driver.settle()
        return dict(json.loads((Path(tuning.folder) / ADAPTER_CARD_NAME).read_text(encoding="utf-8")))

    def compare(self, corrections: list[Correction], seed: int, steps: int, folder: Path) -> list[dict[str, Any]]:
        """Ask for the corrected targets again, on the slices in the middle of what was corrected.

        Returns:
            Dice to the correction of the first-ranked proposal before and after; pictures of both are in ``folder``.
        """
        store = self.driver.session.store
        axis = store.plan.axis
        others = tuple(each for each in range(3) if each != axis)
        filled = [n for n in store.slices if any(each.after.any(axis=others)[n] for each in corrections)]
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
        inside[(slice(None),) * axis + (slice(first, stop),)] = True
        values = slicer.util.arrayFromVolume(self.driver.volume)
        compared = []
        for each in corrections:
            rank_one = next(row for row in store.rows(each.target) if row.rank == 1)
            tuned, base, wanted = (
                mask & inside for mask in (self.driver.proposal(each.target, rank_one.index), each.before, each.after)
            )
            compared.append({"target": each.target, "before": dice(base, wanted), "after": dice(tuned, wanted)})
            changed = (base ^ tuned).sum(axis=others)
            index = int(changed.argmax() if changed.any() else wanted.sum(axis=others).argmax())
            window = display_window(values, None)
            frame = Backdrop(windowed(extract_slice(values, store.plan, index), window), store.plan.spacing_rc)
            pictures = []
            for mask in (base, tuned):  # orange, with the correction in white
                cuts = [extract_slice(array, store.plan, index) for array in (mask, wanted)]
                pictures.append(np.asarray(Image.open(io.BytesIO(outlines_png(frame, cuts, _STYLES))).convert("RGB")))
            name = f"{'-'.join(each.target.split())}-before-and-after.png"
            Image.fromarray(np.hstack(pictures)).save(folder / name)
        return compared

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

    def _correct(self, target: str, segment_id: str) -> Correction:
        self._choose(segment_id)
        before = self.driver.mask(segment_id)
        self.driver.click(self.driver.panels.review.ui.editButton)
        strokes = self._paint(segment_id, before, self._wanted(target, before))
        self.driver.panels.review.ui.editorSection.collapsed = True
        self.driver.settle()
        return Correction(target, segment_id, before, self.driver.mask(segment_id), strokes)

    def _choose(self, segment_id: str) -> None:
        self.driver.panels.review.ui.segmentComboBox.setCurrentIndex(self.driver.segment_ids().index(segment_id))
        self.driver.settle()

    def _wanted(self, target: str, before: np.ndarray) -> np.ndarray:
        """What the segment is edited towards: the organ where it is known, else its largest island with its gaps closed."""
        if self._source != sample_volume() or target not in SAMPLE_LABELS:
            islands = sitk.RelabelComponent(sitk.ConnectedComponent(sitk.GetImageFromArray(before.astype(np.uint8))))
            closed = sitk.BinaryMorphologicalClosing(islands == 1, [_CLOSED, _CLOSED, 0])
            return np.asarray(sitk.GetArrayFromImage(closed)) > 0
        (labels,) = (self._source.parent / "labels").glob("*.nii.gz")
        # Only in the slices that were proposed for, as the example holds no others.
        store = self.driver.session.store
        place = (slice(None),) * store.plan.axis + (slice(store.slices.start, store.slices.stop),)
        wanted = before.copy()
        wanted[place] = (read_volume(labels).array == SAMPLE_LABELS.index(target) + 1)[place]
        return wanted

    def _paint(self, segment_id: str, before: np.ndarray, wanted: np.ndarray) -> int:
        """Paint and erase slice by slice with the logic of Slicer's Segment Editor; the number of strokes."""
        from ProGiDiffSlicerLib.scene.labelmaps import labelmap_of, volume_grid

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


def dice(a: np.ndarray, b: np.ndarray) -> float:
    """Dice of two masks; NaN for two empty ones."""
    total = int(a.sum()) + int(b.sum())
    return 2.0 * int((a & b).sum()) / total if total else math.nan
