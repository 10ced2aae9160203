"""The panel that saves a segment as a training example: a step of its own, after accepting and correcting."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import qt
from slicer.i18n import tr as _

from progidiff.errors import ProGiDiffError
from progidiff.targets import catalog, target_for
from progidiff.volumes.geometry import Geometry
from progidiff.volumes.slicing import SlicePlan
from progidiff.wire.messages import CuratedCases
from ProGiDiffSlicerLib.learning.curating import Curating, Who
from ProGiDiffSlicerLib.panels.panel import Panel, StatusLine
from ProGiDiffSlicerLib.scene.examples import Example, Slices, examine, likely_modality, target_of
from ProGiDiffSlicerLib.scene.labelmaps import segments_of
from ProGiDiffSlicerLib.scene.provenance import read_provenance
from ProGiDiffSlicerLib.scene.volumes import Modality, modality_of
from ProGiDiffSlicerLib.services import Services
from ProGiDiffSlicerLib.worker.client import WorkerClient
from ProGiDiffSlicerLib.worker.command import local_command

MODALITIES: tuple[Modality, ...] = ("CT", "MR")
# A path is typed letter by letter.
LOOK_DELAY_MS = 600
# What saves is ended when it has had nothing to do for so long: starting it takes longer than most of what is asked.
LINGER_S = 30.0
# A folder that does not answer does not answer a cancel either.
CANCEL_S = 3.0
# A case that is being written when the module is closed is finished within this time, or not at all.
LAST_S = 10.0


@dataclass(frozen=True)
class Chosen:
    """What is chosen under Review.

    Attributes:
        segmentation: the vtkMRMLSegmentationNode, or ``None``.
        segment_id: the segment, "" for none.
        volume: the volume that is chosen under Prompt, or ``None``.
        plane: in which it is cut; "" for what suits it and the model.
    """

    segmentation: Any
    segment_id: str
    volume: Any
    plane: str = ""

    @property
    def segment(self) -> Any:
        """The vtkSegment, or ``None``."""
        return None if self.segmentation is None else self.segmentation.GetSegmentation().GetSegment(self.segment_id)


class CuratingPanel(Panel):
    """Folder, target, slices, and the button that saves.

    Attributes:
        curating: what it saves with.
    """

    def __init__(
        self, services: Services, status: StatusLine, chosen: Callable[[], Chosen], complete: Callable[[], None]
    ) -> None:
        """``complete`` is called before segments are read: editing ends, and their provenance is brought up to date."""
        super().__init__("CuratingPanel")
        # Wherever the worker runs that proposes: Slicer's own Python can do it, before anything is installed.
        keeper = WorkerClient(
            local_command, parent=services.owner, cancel_timeout_s=CANCEL_S, stop_grace_s=LAST_S, linger_s=LINGER_S
        )
        self.curating = Curating(services.idle, keeper)
        self._settings = services.settings
        self._session = services.session
        self._status = status
        self._chosen = chosen
        self._complete = complete
        self._targets = sorted(catalog(), key=lambda key: target_for(key).name("en").lower())
        self._shown: tuple[Any, ...] = ()
        self._active = False
        self._due = False
        self.ui.exampleTargetComboBox.addItem("")
        self.ui.exampleTargetComboBox.addItems([target_for(key).name("en") for key in self._targets])
        self.ui.exampleModalityComboBox.addItems(list(MODALITIES))
        self.ui.exampleSlicesComboBox.addItems([each.label() for each in Slices])
        self.ui.examplesFolderEdit.setCurrentPath(self._settings.curatedFolder)
        self._timer = qt.QTimer(self.widget)
        self._timer.setSingleShot(True)
        self._timer.setInterval(LOOK_DELAY_MS)
        self.listen(
            (self.ui.examplesFolderEdit, "currentPathChanged(QString)", self._on_folder),
            (self.ui.examplesFolderEdit, "validInputChanged(bool)", self._on_folder),
            (self.ui.saveExampleButton, "clicked()", self.save),
            (self.ui.undoSaveButton, "clicked()", self.curating.undo),
            (self.ui.allSegmentsCheckBox, "toggled(bool)", self._on_all),
            (self._timer, "timeout()", self.look),
            (self.curating.changed, self.refresh),
            (self.curating.told, self._status.say),
        )
        self.refresh()

    @property
    def looking(self) -> bool:
        """Whether what the set holds is not known yet, but will be."""
        return self._due or self.curating.looking

    def activate(self, shown: bool) -> None:
        """The module is shown or hidden: what the set holds is looked up while somebody can see it."""
        if shown and not self._active and self._settings.curatedFolder:
            self.look()
        self._active = shown

    def look(self) -> None:
        """Look up what the set holds."""
        self._timer.stop()
        self._due = False
        # A saving says itself what the set holds.
        if not self.curating.busy:
            self.curating.look(self._settings.curatedFolder)

    def save(self) -> None:
        """Save the chosen segment, or all accepted ones; while that goes on the button cancels it."""
        if self.curating.saving:
            self.curating.cancel()
            return
        self._complete()
        try:
            who = Who(self._settings.annotatorId, self._settings.annotatorSecret)
            self.curating.save(self._settings.curatedFolder, self._examples(), who)
        except ProGiDiffError as error:
            self._status.say(str(error))

    def refresh(self) -> None:
        """Show what would be saved, what can be done, and what the set holds."""
        chosen = self._chosen()
        self._show_segment(chosen)
        busy, saving = self.curating.busy, self.curating.saving
        some = chosen.segment is not None
        self.ui.saveExampleButton.setText(_("Cancel saving") if saving else _("Save as training example"))
        self.ui.saveExampleButton.setEnabled(saving or (some and not busy))
        self.ui.undoSaveButton.setEnabled(self.curating.can_undo)
        self.ui.exampleTargetComboBox.setEnabled(some and not self.ui.allSegmentsCheckBox.checked)
        text = _("Saving …") if saving else self._contents_text()
        self.ui.examplesLabel.setText(text)
        self.ui.examplesLabel.setVisible(bool(text))

    def cleanup(self) -> None:
        """Let go of everything outside the panel."""
        super().cleanup()
        self._timer.stop()
        self.curating.cleanup()

    def _examples(self) -> list[Example]:
        chosen = self._chosen()
        slices = list(Slices)[self.ui.exampleSlicesComboBox.currentIndex]
        modality = MODALITIES[self.ui.exampleModalityComboBox.currentIndex]

        def plan(geometry: Geometry) -> SlicePlan:
            return self._session.plan(geometry, chosen.plane)

        if not self.ui.allSegmentsCheckBox.checked:
            number = self.ui.exampleTargetComboBox.currentIndex
            target = self._targets[number - 1] if number > 0 else None
            return [examine(chosen.segmentation, chosen.segment_id, chosen.volume, slices, target, modality, plan)]
        segments = [] if chosen.segmentation is None else list(segments_of(chosen.segmentation))
        accepted = [identifier for identifier, segment in segments if read_provenance(segment) is not None]
        return [examine(chosen.segmentation, each, chosen.volume, slices, None, modality, plan) for each in accepted]

    def _show_segment(self, chosen: Chosen) -> None:
        """Target and modality follow the segment and the volume, until the user says otherwise."""
        segment, volume = chosen.segment, chosen.volume
        target = None if segment is None else target_of(segment)
        voxels = None if volume is None or volume.GetImageData() is None else volume.GetImageData().GetMTime()
        shown = (chosen.segmentation, chosen.segment_id, target, volume, voxels)
        if shown == self._shown:
            return
        before, self._shown = self._shown, shown
        if shown[:3] != before[:3]:
            number = 0 if target is None else self._targets.index(target) + 1
            self.ui.exampleTargetComboBox.setCurrentIndex(number)
        if shown[3:] != before[3:]:
            stated = None if volume is None else modality_of(volume)
            self.ui.exampleModalityComboBox.setEnabled(stated is None)
            if voxels is not None:
                self.ui.exampleModalityComboBox.setCurrentIndex(MODALITIES.index(stated or likely_modality(volume)))

    def _contents_text(self) -> str:
        if not self._settings.curatedFolder:
            return str(_("No folder is chosen."))
        if self.looking:
            return str(_("Looking into the folder …"))
        contents = self.curating.contents
        return self.curating.trouble if contents is None else contents_sentence(contents)

    def _on_folder(self, _told: str | bool) -> None:
        self._settings.curatedFolder = self.ui.examplesFolderEdit.currentPath
        if self._active:
            self._due = True
            self._timer.start()
        self.refresh()

    def _on_all(self, checked: bool) -> None:
        self.refresh()


def contents_sentence(contents: CuratedCases) -> str:
    """What a set holds, e.g. "liver 4, pancreas 2; CT"."""
    if not contents.cases:
        return str(_("No training examples yet."))
    most_first = sorted(contents.counts.items(), key=lambda pair: (-pair[1], pair[0]))
    counts = ", ".join(f"{target_for(key).name('en')} {count}" for key, count in most_first if count)
    return f"{counts}; {', '.join(contents.modalities)}"
