"""The segmentation that shows proposals: made anew by each run, not saved with the scene, never the accepted one."""

from __future__ import annotations

import colorsys
from collections.abc import Generator, Iterable
from typing import Any

import slicer
from slicer.i18n import tr as _

from progidiff.proposals.proposals import MaskKey
from progidiff.targets import target_for
from ProGiDiffSlicerLib.idle import IdleQueue, Task
from ProGiDiffSlicerLib.logic.hierarchy import place_beside, remove_with_display
from ProGiDiffSlicerLib.logic.labelmaps import LABELMAP, image_of
from ProGiDiffSlicerLib.logic.store import ProposalStore, row_name
from ProGiDiffSlicerLib.signals import Signal

ROLE_ATTRIBUTE, ROLE = "ProGiDiff.Role", "proposals"

_FILL_OPACITY = 0.35
_OUTLINE_WIDTH = 2
_LONGEST_PROMPT = 60
# Colours that people with any colour vision tell apart (Okabe and Ito); later ones go round the colour circle.
_COLORS = (
    (0.90, 0.62, 0.00),
    (0.34, 0.71, 0.91),
    (0.00, 0.62, 0.45),
    (0.94, 0.89, 0.26),
    (0.80, 0.47, 0.65),
    (0.84, 0.37, 0.00),
    (0.20, 0.45, 0.90),
)
_GOLDEN = 0.618034
_ENSEMBLE_COLOR = (0.95, 0.95, 0.95)


def proposal_color(index: MaskKey) -> tuple[float, float, float]:
    """Colour of a proposal (by number) or an ensemble (by name), 0 to 1; the same in every run."""
    if isinstance(index, str):
        return _ENSEMBLE_COLOR
    if index < len(_COLORS):
        return _COLORS[index]
    turn = index - len(_COLORS)
    return colorsys.hsv_to_rgb((turn * _GOLDEN) % 1.0, 0.9 if turn % 2 else 0.55, 1.0 if turn % 3 else 0.8)


class ProposalSegmentation:
    """Shows some proposals of one target: all as outlines, the selected one filled.

    Segments get their voxels between the events of the application, the selected one first.

    Args:
        scene: vtkMRMLScene.
        idle: where the work is queued.

    Attributes:
        filled: Signal(), when all that was asked for can be seen.
        selected: the one that is filled, or ``None``.
    """

    def __init__(self, scene: Any, idle: IdleQueue) -> None:
        self.filled = Signal()
        self.selected: MaskKey | None = None
        self._scene = scene
        self._idle = idle
        self._node_id = ""
        self._store: ProposalStore | None = None
        self._target = ""
        self._revisions: dict[MaskKey, int] = {}
        self._shown: dict[MaskKey, bool] = {}
        self._task: Task | None = None
        self._volume: Any = None
        self._volume_tag = 0

    @property
    def node(self) -> Any | None:
        """The vtkMRMLSegmentationNode, or ``None`` while nothing is shown."""
        return self._scene.GetNodeByID(self._node_id) if self._node_id else None

    @property
    def busy(self) -> bool:
        """Whether voxels are still to come."""
        return self._task is not None and not self._task.done

    def show(self, store: ProposalStore, target: str, indices: Iterable[MaskKey], selected: MaskKey | None = None) -> None:
        """Show these proposals or ensembles of a target, and no others.

        What is shown already and has not changed costs nothing.
        """
        if store is not self._store or target != self._target or self.node is None:
            self._begin(store, target)
        wanted = list(dict.fromkeys(indices))
        if selected is not None and selected not in wanted:
            wanted.append(selected)
        self._shown = {**dict.fromkeys(self._shown, False), **dict.fromkeys(wanted, True)}
        self.selected = selected
        self._stop()
        self._apply_display()
        first = [selected] if selected is not None else []
        self._task = self._idle.submit(
            self._fill([*first, *(index for index in wanted if index != selected)]), self._on_filled
        )

    def select(self, index: MaskKey | None) -> None:
        """Fill this one, and show it if it is not shown."""
        if self._store is not None:
            self.show(self._store, self._target, [key for key, shown in self._shown.items() if shown], index)

    def set_visible(self, index: MaskKey, visible: bool) -> None:
        """Show or hide one."""
        if self._store is None:
            return
        others = [key for key, shown in self._shown.items() if shown and key != index]
        selected = None if index == self.selected and not visible else self.selected
        self.show(self._store, self._target, [*others, index] if visible else others, selected)

    def is_visible(self, index: MaskKey) -> bool:
        """Whether it is shown."""
        return self._shown.get(index, False)

    def segment_id(self, index: MaskKey) -> str | None:
        """Identifier of its segment; ``None`` until it has voxels."""
        return _segment_id(index) if index in self._revisions and self.node is not None else None

    def set_hidden(self, hidden: bool) -> None:
        """Hide or show all of them, as when another frame of a sequence is looked at."""
        node = self.node
        if node is not None and node.GetDisplayNode() is not None:
            node.GetDisplayNode().SetVisibility(not hidden)

    def clear(self) -> None:
        """Remove the node."""
        node = self.node
        self.forget()
        if node is not None:
            remove_with_display(self._scene, node)

    def forget(self) -> None:
        """Let go of the node, which the scene is about to remove."""
        self._stop()
        if self._volume is not None:
            self._volume.RemoveObserver(self._volume_tag)
            self._volume = None
        self._node_id, self._store, self._target, self.selected = "", None, "", None
        self._revisions, self._shown = {}, {}

    def _stop(self) -> None:
        if self._task is not None:
            self._task.cancel()
            self._task = None

    def _begin(self, store: ProposalStore, target: str) -> None:
        volume = self._scene.GetNodeByID(store.volume_id)
        node = self.node
        if node is None:
            node = slicer.vtkMRMLSegmentationNode()
            node.SetAttribute(ROLE_ATTRIBUTE, ROLE)
            node.SetSaveWithScene(False)
            self._scene.AddNode(node)
            node.CreateDefaultDisplayNodes()
            display = node.GetDisplayNode()
            display.SetSaveWithScene(False)
            display.SetSliceIntersectionThickness(_OUTLINE_WIDTH)
        self.forget()
        self._node_id, self._store, self._target = node.GetID(), store, target
        node.GetSegmentation().RemoveAllSegments()
        asked = " ".join((store.prompt or target).split())
        shortened = asked if len(asked) <= _LONGEST_PROMPT else asked[: _LONGEST_PROMPT - 1] + "…"
        node.SetName(_("{volume} proposals: {prompt}").format(volume=store.volume_name, prompt=shortened))
        node.GetDisplayNode().SetVisibility(True)
        if volume is not None:
            node.SetReferenceImageGeometryParameterFromVolumeNode(volume)
            place_beside(self._scene, node, volume)
            event = slicer.vtkMRMLTransformableNode.TransformModifiedEvent
            self._volume, self._volume_tag = volume, volume.AddObserver(event, self._follow_transform)
            self._follow_transform(volume, "")

    def _follow_transform(self, volume: Any, _event: str) -> None:
        """Voxels are given in the volume's own coordinates, so the segmentation is moved by the same transform."""
        node = self.node
        if node is not None and node.GetTransformNodeID() != volume.GetTransformNodeID():
            node.SetAndObserveTransformNodeID(volume.GetTransformNodeID())

    def _fill(self, indices: list[MaskKey]) -> Generator[None, None, None]:
        store, target = self._store, self._target
        if store is None:
            return
        for index in indices:
            revision = store.revision
            if self._revisions.get(index) == revision:
                continue
            crop = store[target].mask(index)
            yield
            image = image_of(crop.array, crop.origin_kji, store.local_affine)
            node = self.node
            if node is None:
                return
            self._put(node, index, image)
            self._revisions[index] = revision
            self._apply_display()
            yield

    def _put(self, node: Any, index: MaskKey, image: Any) -> None:
        """Give a segment its voxels.

        Each segment has a labelmap of its own, since proposals overlap. It is handed over as it is: a segment that is
        modified through the segmentation logic starts in the labelmap of another one and is then separated from it, which
        takes tens of milliseconds in a large volume, against less than one.
        """
        segmentation = node.GetSegmentation()
        segment = segmentation.GetSegment(_segment_id(index))
        if segment is not None:
            segment.GetRepresentation(LABELMAP).ShallowCopy(image)
            return
        segment = slicer.vtkSegment()
        segment.SetName(_("{target}, {proposal}").format(target=self._target, proposal=row_name(index)))
        segment.SetColor(*proposal_color(index))
        segment.SetTag(slicer.vtkSegment.GetTerminologyEntryTagName(), target_for(self._target).terminology_entry)
        segment.SetTag("ProGiDiff.Proposal", str(index))
        segment.AddRepresentation(LABELMAP, image)
        segmentation.AddSegment(segment, _segment_id(index))

    def _apply_display(self) -> None:
        node = self.node
        display = None if node is None else node.GetDisplayNode()
        if display is None:
            return
        was_modifying = display.StartModify()
        for index in self._revisions:
            segment_id = _segment_id(index)
            display.SetSegmentVisibility(segment_id, self._shown.get(index, False))
            display.SetSegmentVisibility3D(segment_id, False)
            display.SetSegmentVisibility2DOutline(segment_id, True)
            display.SetSegmentVisibility2DFill(segment_id, index == self.selected)
            display.SetSegmentOpacity2DFill(segment_id, _FILL_OPACITY)
        display.EndModify(was_modifying)

    def _on_filled(self, _result: Any) -> None:
        self._task = None
        self.filled.emit()


def _segment_id(index: MaskKey) -> str:
    return f"proposal_{index}"
