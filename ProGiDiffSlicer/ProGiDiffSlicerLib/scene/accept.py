"""Accepting a proposal: its voxels become a segment that has a name, a code, a colour and a history.

Written through ``vtkSlicerSegmentationsModuleLogic``, cropped to the mask's box, under the rules of the Segment Editor's
"Modify other segments": a neighbour that must stay as it is and lies under the mask in the same labelmap makes the
segment move to a labelmap of its own.
"""

from __future__ import annotations

import re
from collections.abc import Callable
from dataclasses import dataclass, replace
from enum import StrEnum
from typing import Any

import numpy as np
import slicer
from slicer.i18n import tr as _

from progidiff.errors import InputError
from progidiff.proposals.masks import Crop
from progidiff.targets import Target, target_for
from ProGiDiffSlicerLib.scene.editing import EditTracker
from ProGiDiffSlicerLib.scene.labelmaps import (
    LABELMAP,
    Index,
    Overwrite,
    between_nodes,
    on_grid_of,
    overlap,
    reference_grid,
    segment_mask,
    segments_of,
    tight,
    write_segment,
)
from ProGiDiffSlicerLib.scene.nodes import ROLE_ACCEPTED, ROLE_ATTRIBUTE, ROLE_PROPOSALS, place_beside
from ProGiDiffSlicerLib.scene.provenance import EARLIER_TAG, Provenance, get_tag, keep_earlier, write_provenance
from ProGiDiffSlicerLib.scene.store import ProposalStore, Row
from ProGiDiffSlicerLib.scene.undo import UndoStack
from ProGiDiffSlicerLib.scene.volumes import frames, record_segmentation, still_same


class AcceptMode(StrEnum):
    """Where an accepted proposal goes."""

    NEW = "new"
    REPLACE = "replace"
    ADD = "add"

    def label(self) -> str:
        """The choice's text in a combo box."""
        return {
            AcceptMode.NEW: _("New segment"),
            AcceptMode.REPLACE: _("Replace a segment"),
            AcceptMode.ADD: _("Add to a segment"),
        }[self]


@dataclass(frozen=True)
class Accepted:
    """What an accept did.

    Attributes:
        segmentation_node: the vtkMRMLSegmentationNode that holds the segment.
        segment_id: the segment.
        changed_voxels: voxels of the segment that are different now.
        overwritten: voxels that other segments lost, by segment identifier; empty unless the policy allows it.
        note: one sentence for the user, or "".
    """

    segmentation_node: Any
    segment_id: str
    changed_voxels: int
    overwritten: dict[str, int]
    note: str = ""


class Acceptance:
    """Accepts proposals into segmentations of a scene; each accept is one step of ``undo``.

    Args:
        scene: the vtkMRMLScene.
        undo: the steps; one of its own where none is given.
        tracker: follows edits of accepted segments; one of its own where none is given.
        save_editor_state: called before a segmentation is changed, so that the undo of an embedded Segment Editor, which
            keeps states of its own, does not step over the accept: the editor's ``saveStateForUndo``. May be set later.
    """

    def __init__(
        self,
        scene: Any,
        undo: UndoStack | None = None,
        tracker: EditTracker | None = None,
        save_editor_state: Callable[[], object] | None = None,
    ) -> None:
        self._scene = scene
        self.undo = undo or UndoStack(scene)
        self.tracker = tracker or EditTracker(scene)
        self.save_editor_state = save_editor_state

    def accept_proposal(
        self,
        store: ProposalStore | None,
        target: str,
        row: Row,
        segmentation_node: Any | None = None,
        mode: AcceptMode = AcceptMode.NEW,
        segment_id: str | None = None,
        overwrite: Overwrite = Overwrite.NONE,
    ) -> Accepted:
        """Make a proposal or an ensemble of a store a segment, with every fact of the run that made it.

        Raises:
            InputError: there is nothing to accept, the volume has changed since, or the mask cannot go there.
        """
        if store is None:
            raise InputError(_("There is nothing to accept: ask for proposals first."))
        volume = self._scene.GetNodeByID(store.volume_id)
        if volume is None or still_same(self._scene, store.fingerprint) is not None:
            text = _("{name} was changed after these proposals were made; ask for them again.")
            raise InputError(text.format(name=store.volume_name))
        if row.empty:
            raise InputError(_("This proposal is empty; select another one."))
        facts = _facts(store, target, row)
        crop = store[target].mask(row.index)
        return self.accept(crop, volume, target_for(target), facts, segmentation_node, mode, segment_id, overwrite)

    def accept(
        self,
        crop: Crop,
        volume_node: Any,
        target: Target,
        facts: Provenance,
        segmentation_node: Any | None = None,
        mode: AcceptMode = AcceptMode.NEW,
        segment_id: str | None = None,
        overwrite: Overwrite = Overwrite.NONE,
    ) -> Accepted:
        """Write a mask into a segment.

        Args:
            crop: the mask on the volume's voxels.
            volume_node: the volume it was proposed for.
            target: gives name, terminology and colour.
            facts: where the mask comes from; an empty ``created`` becomes the present time.
            segmentation_node: where to; a new segmentation of the volume's geometry where it is ``None``, which changes with
                the volume's frames if a sequence browser plays it.
            mode: ``NEW`` adds a segment; ``REPLACE`` makes ``segment_id`` exactly the mask; ``ADD`` adds the mask
                to it. A segment that a user named or coded keeps name, code and colour.
            segment_id: the segment to replace or add to.
            overwrite: which other segments lose the voxels under the mask: none, the visible ones, or all.

        Raises:
            InputError: an empty mask, no such segment, a segmentation that cannot hold voxels, or a transform that is
                not linear; nothing is changed.
        """
        mask, origin = tight(np.asarray(crop.array) != 0, crop.origin_kji)
        _check_mask(mask, origin, volume_node)
        segment = _check_place(self._scene, segmentation_node, mode, segment_id)
        if segmentation_node is not None:
            between_nodes(volume_node, segmentation_node)
            if self.save_editor_state is not None:
                self.save_editor_state()
        with self.undo.step(_label(mode, target), segmentation_node, volume_node) as step:
            created = segmentation_node is None
            if created:
                step.node = self._scene.AddNewNodeByClass("vtkMRMLSegmentationNode", self._new_name(volume_node))
                segmentation_node = step.node
                segmentation_node.CreateDefaultDisplayNodes()
                segmentation_node.SetAttribute(ROLE_ATTRIBUTE, ROLE_ACCEPTED)
                segmentation_node.SetAndObserveTransformNodeID(volume_node.GetTransformNodeID())
                place_beside(self._scene, segmentation_node, volume_node)
            _prepare(segmentation_node, volume_node)
            if segment is None or segment_id is None:
                segment_id, segment = _new_segment(segmentation_node, target)
            image, resampled = on_grid_of(segment, mask, origin, volume_node, segmentation_node)
            before = segment_mask(segment)
            lost = write_segment(image, segmentation_node, segment_id, mode == AcceptMode.REPLACE, overwrite)
            _describe(segment, target, facts, mode)
            self.tracker.remember(segmentation_node, segment_id)
            changed = _difference(before, segment_mask(segment))
            playing = frames(volume_node) if created else None
            if playing is not None:
                record_segmentation(playing, segmentation_node)
        return Accepted(segmentation_node, segment_id, changed, lost, _note(resampled, segment, target))

    def _new_name(self, volume_node: Any) -> str:
        return str(self._scene.GetUniqueNameByString(_("{volume} segmentation").format(volume=volume_node.GetName())))

    def cleanup(self) -> None:
        """Forget all steps and observe nothing any more."""
        self.undo.cleanup()
        self.tracker.cleanup()


def _check_mask(mask: np.ndarray, origin: Index, volume_node: Any) -> None:
    if not mask.size:
        raise InputError(_("This proposal is empty; choose another one."))
    image = volume_node.GetImageData() if volume_node is not None else None
    shape = image.GetDimensions()[::-1] if image is not None else (0, 0, 0)
    if any(start < 0 or start + count > size for start, count, size in zip(origin, mask.shape, shape, strict=True)):
        raise InputError(_("The volume is not the one the proposal was made for; propose again."))


def _check_place(scene: Any, node: Any | None, mode: AcceptMode, segment_id: str | None) -> Any | None:
    """The segment to write into; ``None`` for a new one."""
    if node is None:
        if mode == AcceptMode.NEW:
            return None
        raise InputError(_("There is no segmentation to change; choose one, or accept as a new segment."))
    if not scene.IsNodePresent(node):
        raise InputError(_("The segmentation was removed from the scene; choose another one, or accept as a new segment."))
    if node.GetAttribute(ROLE_ATTRIBUTE) == ROLE_PROPOSALS:
        raise InputError(
            _("{name} is remade with every run; choose another segmentation to accept into.").format(name=node.GetName())
        )
    segmentation = node.GetSegmentation()
    if segmentation.GetNumberOfSegments() and segmentation.GetSourceRepresentationName() != LABELMAP:
        raise InputError(
            _(
                "{name} is not made of voxels; make Binary labelmap its source representation in the Segmentations module, "
                "or accept into a new segmentation."
            ).format(name=node.GetName())
        )
    if mode == AcceptMode.NEW:
        return None
    segment = segmentation.GetSegment(segment_id) if segment_id else None
    if segment is None:
        text = _("Select the segment to change in {name}, or accept as a new segment.")
        raise InputError(text.format(name=node.GetName()))
    return segment


def _prepare(node: Any, volume_node: Any) -> None:
    """An empty segmentation without a geometry takes the volume's."""
    segmentation = node.GetSegmentation()
    if segmentation.GetNumberOfSegments():
        return
    segmentation.SetSourceRepresentationName(LABELMAP)
    role = node.GetReferenceImageGeometryReferenceRole()
    if reference_grid(node) is None or not node.GetNodeReferenceID(role):
        node.SetReferenceImageGeometryParameterFromVolumeNode(volume_node)
        # DICOM export finds the images through this reference.
        node.SetNodeReferenceID(role, volume_node.GetID())


def _new_segment(node: Any, target: Target) -> tuple[str, Any]:
    segmentation = node.GetSegmentation()
    segment = slicer.vtkSegment()
    _name_after(segment, target, {other.GetName() for _identifier, other in segments_of(node)})
    identifier = str(segmentation.GenerateUniqueSegmentID(""))
    segmentation.AddSegment(segment, identifier)
    return identifier, segment


def _name_after(segment: Any, target: Target, taken: set[str]) -> None:
    """Name, terminology and colour of the target."""
    usual = target.name("en")
    name = usual = usual[:1].upper() + usual[1:]
    number = 2
    while name in taken:
        name, number = f"{usual} {number}", number + 1
    segment.SetName(name)
    segment.SetNameAutoGenerated(False)
    segment.SetColor(*target.color)
    segment.SetColorAutoGenerated(False)
    segment.SetTag(slicer.vtkSegment.GetTerminologyEntryTagName(), target.terminology_entry)


def _describe(segment: Any, target: Target, facts: Provenance, mode: AcceptMode) -> None:
    if mode != AcceptMode.NEW and _nobody_named(segment):
        _name_after(segment, target, set())
    if mode == AcceptMode.ADD:
        keep_earlier(segment)
    else:
        segment.RemoveTag(EARLIER_TAG)
    write_provenance(segment, replace(facts.stamped(), edited=False, dice_to_proposal=1.0))
    logic = slicer.vtkSlicerSegmentationsModuleLogic
    logic.SetSegmentStatus(segment, logic.InProgress)


def _nobody_named(segment: Any) -> bool:
    """Whether name and code are what Slicer gives to every new segment."""
    tag = slicer.vtkSegment.GetTerminologyEntryTagName()
    automatic = segment.GetNameAutoGenerated() or re.fullmatch(r"Segment_\d+", segment.GetName() or "Segment_1")
    return bool(automatic) and get_tag(segment, tag) in (None, "", get_tag(slicer.vtkSegment(), tag))


def _difference(before: tuple[np.ndarray, Index], after: tuple[np.ndarray, Index]) -> int:
    return int(np.count_nonzero(before[0])) + int(np.count_nonzero(after[0])) - 2 * overlap(before, after)


def _label(mode: AcceptMode, target: Target) -> str:
    name = target.name("en")
    if mode == AcceptMode.REPLACE:
        return str(_("Replace by {name}").format(name=name))
    return str((_("Add {name}") if mode == AcceptMode.ADD else _("Accept {name}")).format(name=name))


def _note(resampled: bool, segment: Any, target: Target) -> str:
    notes = []
    if resampled:
        notes.append(_("The segmentation has another grid than the volume, so the mask was resampled."))
    if get_tag(segment, slicer.vtkSegment.GetTerminologyEntryTagName()) != target.terminology_entry:
        text = _("The segment is still called {name} and keeps its code; it was asked for as {target}.")
        notes.append(text.format(name=segment.GetName(), target=target.name("en")))
    return " ".join(notes)


def _facts(store: ProposalStore, target: str, row: Row) -> Provenance:
    is_whole = len(store.slices) == store.plan.count
    slices = None if is_whole else (store.slices.start, store.slices.stop)
    return Provenance(
        prompt=store.prompt,
        target=target,
        proposal=row.index if isinstance(row.index, int) else -1,
        request=replace(store.request, proposals=store[target].count, slices=slices),
        rank=row.rank,
        score=row.score,
        dropped_pieces=row.dropped_pieces,
        dropped_ml=row.dropped_ml,
        model_id=store.model_id,
        adapter_id=store.adapter_id,
        plane=store.plan.plane,
        corrected=store.corrected,
        ensemble=row.index if isinstance(row.index, str) else "",
    )
