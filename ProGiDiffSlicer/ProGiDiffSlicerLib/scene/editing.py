"""Editing an accepted segment by hand, and keeping its provenance true while that happens."""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Callable
from typing import Any, Protocol

import qt
import slicer
import vtk

from progidiff.volumes.slicing import PackedMask
from ProGiDiffSlicerLib.scene.labelmaps import Index, Overwrite, segment_labelmap, segment_mask, segments_of
from ProGiDiffSlicerLib.scene.provenance import MASK_TAG, Provenance, get_tag, mask_identity, set_tag, update_after_edit

EDITOR_TAG = "ProGiDiff"
UPDATE_DELAY_MS = 700
# Masks that were accepted in this session and are kept, at a bit per voxel of their box, to compare later edits with.
_MAX_MASKS = 200


class Timer(Protocol):
    """What is needed of a single-shot timer."""

    def start(self) -> None: ...

    def stop(self) -> None: ...


class QtTimer:
    """Calls back once, a moment after it was last started."""

    def __init__(self, callback: Callable[[], None]) -> None:
        self._owner = qt.QObject()
        self._timer = qt.QTimer(self._owner)
        self._timer.setSingleShot(True)
        self._timer.setInterval(UPDATE_DELAY_MS)
        self._timer.connect("timeout()", callback)

    def start(self) -> None:
        """Start, or start again."""
        self._timer.start()

    def stop(self) -> None:
        """Do not call back."""
        self._timer.stop()


class EditTracker:
    """Notices that an accepted segment was changed and brings its "edited" and Dice up to date.

    Slicer tells nobody that it is about to save. So the tags are brought up to date a moment after each change, when
    editing ends, and when a storage node is made ready for writing, which is the first thing that happens when a scene is
    saved; ``StartSaveEvent`` is listened to as well, for programs that do announce it.

    Args:
        scene: the vtkMRMLScene.
        timer: makes the timer that waits for a pause in editing.
    """

    def __init__(self, scene: Any, timer: Callable[[Callable[[], None]], Timer] = QtTimer) -> None:
        self._scene = scene
        self._masks: OrderedDict[str, tuple[PackedMask, Index]] = OrderedDict()
        self._checked: dict[tuple[str, str], str] = {}
        self._waiting: set[str] = set()
        self._observed: dict[str, list[tuple[Any, int]]] = {}
        self._timer = timer(self.update_all)
        self._scene_observers = [
            scene.AddObserver(scene.NodeAddedEvent, self._on_node_added),
            scene.AddObserver(scene.NodeRemovedEvent, self._on_node_removed),
            scene.AddObserver(scene.StartSaveEvent, self._on_save),
            scene.AddObserver(scene.EndCloseEvent, self._on_scene_closed),
        ]
        for node in slicer.util.getNodesByClass("vtkMRMLSegmentationNode", scene):
            self._observe(node)

    def remember(self, segmentation_node: Any, segment_id: str) -> None:
        """Take a segment as it is now for the accepted mask that later edits are compared with."""
        segment = segmentation_node.GetSegmentation().GetSegment(segment_id)
        mask, origin = segment_mask(segment)
        identity = mask_identity(mask, origin)
        self._masks[identity] = (PackedMask.from_array(mask), origin)
        self._masks.move_to_end(identity)
        while len(self._masks) > _MAX_MASKS:
            self._masks.popitem(last=False)
        set_tag(segment, MASK_TAG, identity)
        self._checked[segmentation_node.GetID(), segment_id] = _stamp(segment)

    def update(self, segmentation_node: Any, segment_id: str) -> Provenance | None:
        """Bring one segment's tags up to date; returns its facts, ``None`` where it was not accepted from a proposal."""
        segment = segmentation_node.GetSegmentation().GetSegment(segment_id)
        if segment is None:
            return None
        self._checked[segmentation_node.GetID(), segment_id] = _stamp(segment)
        return update_after_edit(segmentation_node, segment_id, self._masks.get(get_tag(segment, MASK_TAG) or ""))

    def update_all(self) -> None:
        """Bring all segments that changed since they were last looked at up to date."""
        self._timer.stop()
        for identifier in list(self._waiting):
            self._update_node(identifier)

    def cleanup(self) -> None:
        """Bring the tags up to date a last time, then observe nothing any more."""
        self.update_all()
        for observer in self._scene_observers:
            self._scene.RemoveObserver(observer)
        self._scene_observers.clear()
        for identifier in list(self._observed):
            self._forget(identifier)
        self._masks.clear()
        self._checked.clear()

    def _update_node(self, identifier: str) -> None:
        self._waiting.discard(identifier)
        node = self._scene.GetNodeByID(identifier)
        if node is None:
            return
        for segment_id, segment in list(segments_of(node)):
            if segment.HasTag(MASK_TAG) and self._checked.get((identifier, segment_id)) != _stamp(segment):
                self.update(node, segment_id)

    def _observe(self, node: Any) -> None:
        identifier = node.GetID()
        if identifier in self._observed:
            return
        events = (
            (slicer.vtkSegmentation.SourceRepresentationModified, self._on_voxels_changed),
            (slicer.vtkMRMLNode.ReferenceAddedEvent, self._on_reference_added),
        )
        self._observed[identifier] = [(node, node.AddObserver(event, listener)) for event, listener in events]
        self._observe_storage(node)

    def _observe_storage(self, node: Any) -> None:
        storage = node.GetStorageNode()
        held = self._observed[node.GetID()]
        if storage is None or any(observed is storage for observed, _tag in held):
            return

        def on_storage(_caller: Any, _event: str, identifier: str = node.GetID()) -> None:
            if identifier in self._waiting:
                self._update_node(identifier)

        held.append((storage, storage.AddObserver("ModifiedEvent", on_storage)))

    def _forget(self, identifier: str) -> None:
        for observed, observer in self._observed.pop(identifier, []):
            observed.RemoveObserver(observer)
        self._waiting.discard(identifier)
        self._checked = {key: stamp for key, stamp in self._checked.items() if key[0] != identifier}

    def _on_voxels_changed(self, node: Any, _event: str) -> None:
        self._waiting.add(node.GetID())
        self._timer.start()

    def _on_reference_added(self, node: Any, _event: str) -> None:
        self._observe_storage(node)
        if node.GetID() in self._waiting:
            self._update_node(node.GetID())

    @vtk.calldata_type(vtk.VTK_OBJECT)
    def _on_node_added(self, _caller: Any, _event: str, node: Any) -> None:
        if node.IsA("vtkMRMLSegmentationNode"):
            self._observe(node)

    @vtk.calldata_type(vtk.VTK_OBJECT)
    def _on_node_removed(self, _caller: Any, _event: str, node: Any) -> None:
        if node.IsA("vtkMRMLSegmentationNode"):
            self._forget(node.GetID())

    def _on_save(self, _caller: Any, _event: str) -> None:
        self.update_all()

    def _on_scene_closed(self, _caller: Any, _event: str) -> None:
        for identifier in list(self._observed):
            if self._scene.GetNodeByID(identifier) is None:
                self._forget(identifier)
        self._masks.clear()


class Editing:
    """An editing session in a Segment Editor; ``end`` it when the user is done."""

    def __init__(self, node: Any, segment_id: str, editor_node: Any, widget: Any | None, ended: Callable[[], None]) -> None:
        self.segmentation_node = node
        self.segment_id = segment_id
        self.editor_node = editor_node
        self._widget = widget
        self._ended = ended
        self.active = True

    def end(self) -> None:
        """Leave the active effect and bring the provenance up to date; a second call does nothing."""
        if not self.active:
            return
        self.active = False
        if self._widget is not None:
            self._widget.setActiveEffectByName("")
        self._ended()


def begin_edit(
    segmentation_node: Any,
    segment_id: str,
    volume_node: Any,
    editor_widget: Any | None = None,
    overwrite: Overwrite = Overwrite.NONE,
    ended: Callable[[], None] = lambda: None,
) -> Editing:
    """Make a Segment Editor ready to edit a segment.

    Args:
        segmentation_node: the vtkMRMLSegmentationNode.
        segment_id: the segment to select.
        volume_node: the source volume.
        editor_widget: the qMRMLSegmentEditorWidget to use; without one only the parameter node is made ready.
        overwrite: which other segments editing may change.
        ended: called when editing ends, e.g. ``EditTracker.update_all``.
    """
    scene = segmentation_node.GetScene()
    editor_node = scene.GetSingletonNode(EDITOR_TAG, "vtkMRMLSegmentEditorNode")
    if editor_node is None:
        editor_node = slicer.vtkMRMLSegmentEditorNode()
        editor_node.SetSingletonTag(EDITOR_TAG)
        editor_node = scene.AddNode(editor_node)
    modes = {
        Overwrite.NONE: editor_node.OverwriteNone,
        Overwrite.VISIBLE: editor_node.OverwriteVisibleSegments,
        Overwrite.ALL: editor_node.OverwriteAllSegments,
    }
    # The node comes from the scene, perhaps with the effect that was active when that was saved: the widget activates it at
    # once, and that of Slicer 5.10 crashes where there is no segmentation yet.
    editor_node.SetActiveEffectName("")
    editor_node.SetAndObserveSegmentationNode(segmentation_node)
    if editor_widget is not None:
        editor_widget.updateEffectList()  # a start-up module is made before all effects are registered
        editor_widget.setMRMLSegmentEditorNode(editor_node)
    # Last: with a new segmentation the widget chooses its reference volume and its first segment.
    editor_node.SetAndObserveSourceVolumeNode(volume_node)
    editor_node.SetSelectedSegmentID(segment_id)
    editor_node.SetOverwriteMode(modes[overwrite])
    editor_node.SetMaskMode(slicer.vtkMRMLSegmentationNode.EditAllowedEverywhere)
    editor_node.SetSourceVolumeIntensityMask(False)
    return Editing(segmentation_node, segment_id, editor_node, editor_widget, ended)


def _stamp(segment: Any) -> str:
    image = segment_labelmap(segment)
    return "" if image is None else f"{image.GetAddressAsString('')}@{image.GetMTime()}@{segment.GetLabelValue()}"
