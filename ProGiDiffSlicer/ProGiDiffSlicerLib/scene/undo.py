"""Undo and redo of what the module does to segmentations: one step per action of the user.

A step holds the states of one segmentation node before and after the action. Steps may follow each other on different
nodes, and a step may create a node: undoing it removes the node, redoing it brings the same node back. What the user
changes by hand between two steps becomes a step of its own the moment it would otherwise be lost.

Slicer's own history of a segmentation copies whole labelmaps, leaves out whether a name or a colour was given by hand,
and ends with the node. A state keeps the labelmaps as runs of equal voxels, shares those that did not change with the
state before it, and brings back everything that belongs to a segment.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from typing import Any

import numpy as np
import slicer
import vtk
from slicer.i18n import tr as _

from ProGiDiffSlicerLib.scene.labelmaps import (
    CLOSED_SURFACE,
    LABELMAP,
    grid_of,
    image_of,
    segment_labelmap,
    segments_of,
    values_of,
)
from ProGiDiffSlicerLib.scene.provenance import DERIVED_TAGS, PROVENANCE_TAGS, get_tag
from ProGiDiffSlicerLib.scene.volumes import frames, record_segmentation, show_frame
from ProGiDiffSlicerLib.signals import Signal

# States share unchanged labelmaps and keep the others as runs, so that this is far more than a day's work needs.
MAX_BYTES = 256 * 2**20
MAX_STEPS = 50


_CHUNK = 1 << 24
_REPRESENTATIONS = (LABELMAP, CLOSED_SURFACE, "Fractional labelmap", "Planar contour", "Ribbon model")
_DISPLAY = (
    "Visibility",
    "Visibility3D",
    "Visibility2DFill",
    "Visibility2DOutline",
    "Opacity3D",
    "Opacity2DFill",
    "Opacity2DOutline",
    "Pickable",
)


@dataclass(eq=False)
class Step:
    """One action on one node.

    Attributes:
        label: what the user did.
        node: the vtkMRMLSegmentationNode.
        before, after: its states; ``None`` where it was not there.
        volume: the volume that was worked on; ``None`` where that does not matter.
        frame: the frame of the volume that was shown; ``None`` for a volume that no sequence browser plays.
        companions: nodes that left the scene together with the node.
        parent_item: where the node was in the subject hierarchy when it left the scene.
        recorded: whether the node had an item for each frame when it left the scene.
    """

    label: str
    node: Any
    before: NodeState | None
    after: NodeState | None
    volume: Any = None
    frame: int | None = None
    companions: list[Any] = field(default_factory=list)
    parent_item: int = 0
    recorded: bool = False


class UndoStack:
    """The steps that can be undone and redone.

    Memory is bounded: at most ``max_steps`` steps, and the oldest are forgotten while the states together take more than
    ``max_bytes``; the last step always stays. Steps of a node that the user removes, and all steps when the scene is
    closed, are forgotten.

    Attributes:
        changed: emitted when what can be undone or redone changed.
    """

    def __init__(self, scene: Any, max_bytes: int = MAX_BYTES, max_steps: int = MAX_STEPS) -> None:
        self.changed = Signal()
        self._scene = scene
        self._max_bytes = max_bytes
        self._max_steps = max_steps
        self._done: list[Step] = []
        self._undone: list[Step] = []
        self._latest: dict[str, NodeState] = {}
        self._working = False
        self._observers = [
            scene.AddObserver(scene.NodeAboutToBeRemovedEvent, self._on_node_removed),
            scene.AddObserver(scene.StartCloseEvent, self._on_scene_closed),
        ]

    @property
    def can_undo(self) -> bool:
        """Whether there is a step to undo."""
        return bool(self._done)

    @property
    def can_redo(self) -> bool:
        """Whether there is a step to redo."""
        return bool(self._undone)

    @property
    def undo_label(self) -> str:
        """What ``undo`` would undo; "" for nothing."""
        return self._done[-1].label if self._done else ""

    @property
    def redo_label(self) -> str:
        """What ``redo`` would redo; "" for nothing."""
        return self._undone[-1].label if self._undone else ""

    @property
    def nbytes(self) -> int:
        """Memory of all states together, in bytes; what they share is counted once."""
        states = (state for step in (*self._done, *self._undone) for state in (step.before, step.after) if state)
        return sum({id(layer): layer.nbytes for state in states for layer in state.layers}.values())

    @contextmanager
    def step(self, label: str, node: Any | None, volume: Any | None = None) -> Iterator[Step]:
        """Record what happens inside as one step on ``node``.

        For an action that creates its node, ``node`` is ``None`` and the yielded step's ``node`` is set inside. When the
        action fails, the node is brought back to what it was, or removed, and nothing is recorded. Where ``volume`` is
        played by a sequence browser, undoing the step goes back to the frame that is shown now.
        """
        before = self._capture(node) if node is not None else None
        playing = frames(volume)
        step = Step(label, node, before, None, volume, playing.index if playing is not None else None)
        try:
            yield step
        except BaseException:
            self._set_state(step, before)
            raise
        if step.node is None:
            return
        step.after = self._capture(step.node)
        if before is not None and before.same(step.after):
            return
        self._done.append(step)
        self._undone.clear()
        self._trim()
        self.changed.emit()

    def undo(self) -> str:
        """Undo the last step; returns its label, or "" where there is nothing to undo."""
        while self._done:
            step = self._done[-1]
            present = self._present(step)
            if _same(present, step.before):
                # Undone already, as with the Segment Editor's own undo.
                self._undone.append(self._done.pop())
                continue
            if not _same(present, step.after):
                step = Step(_("Changes by hand"), step.node, step.after, present, step.volume, step.frame)
                self._done.append(step)
                self._undone.clear()
            self._set_state(step, step.before)
            self._undone.append(self._done.pop())
            self.changed.emit()
            return step.label
        self.changed.emit()
        return ""

    def redo(self) -> str:
        """Redo the step that was undone last; returns its label, or "" where there is nothing to redo.

        Steps to redo are forgotten when the segmentation was changed since: redoing them would undo that.
        """
        while self._undone:
            step = self._undone[-1]
            present = self._present(step)
            if _same(present, step.after):
                self._done.append(self._undone.pop())
                continue
            if not _same(present, step.before):
                self._undone.clear()
                break
            self._set_state(step, step.after)
            self._done.append(self._undone.pop())
            self.changed.emit()
            return step.label
        self.changed.emit()
        return ""

    def clear(self) -> None:
        """Forget all steps."""
        had = bool(self._done or self._undone)
        self._done.clear()
        self._undone.clear()
        self._latest.clear()
        if had:
            self.changed.emit()

    def cleanup(self) -> None:
        """Forget everything and observe nothing any more."""
        for observer in self._observers:
            self._scene.RemoveObserver(observer)
        self._observers.clear()
        self.clear()
        self.changed.clear()

    def _present(self, step: Step) -> NodeState | None:
        playing = frames(step.volume) if step.volume is not None and self._scene.IsNodePresent(step.volume) else None
        if playing is not None and step.frame is not None and playing.index != step.frame < playing.count:
            show_frame(playing, step.frame)
        return self._capture(step.node) if self._scene.IsNodePresent(step.node) else None

    def _capture(self, node: Any) -> NodeState:
        state = capture(node, self._latest.get(node.GetID()))
        self._latest[node.GetID()] = state
        return state

    def _set_state(self, step: Step, state: NodeState | None) -> None:
        node = step.node
        if node is None:
            return
        self._working = True
        try:
            present = self._scene.IsNodePresent(node)
            if state is None:
                if present:
                    self._remove(step)
                return
            if not present:
                self._add_again(step)
            self._latest[node.GetID()] = restore(node, state)
            playing = frames(step.volume) if step.recorded and not present else None
            if playing is not None:
                record_segmentation(playing, node)
        finally:
            self._working = False

    def _remove(self, step: Step) -> None:
        node = step.node
        tree = self._scene.GetSubjectHierarchyNode()
        step.parent_item = int(tree.GetItemParent(tree.GetItemByDataNode(node))) if tree is not None else 0
        step.companions = [node.GetNthDisplayNode(n) for n in range(node.GetNumberOfDisplayNodes())]
        step.companions.append(node.GetStorageNode())
        step.companions = [companion for companion in step.companions if companion is not None]
        # The state holds the voxels; the node waits without them. Emptied while it is in the scene: Slicer goes on observing
        # a removed segmentation and reports each of its segments as an error that has no item in the subject hierarchy.
        node.GetSegmentation().RemoveAllSegments()
        playing = frames(node)
        step.recorded = playing is not None
        if playing is not None:
            # The items of its frames are empty by now: each frame's steps were undone before.
            playing.browser.RemoveSynchronizedSequenceNode(playing.sequence.GetID())
            self._scene.RemoveNode(playing.sequence)
        self._scene.RemoveNode(node)
        for companion in step.companions:
            self._scene.RemoveNode(companion)

    def _add_again(self, step: Step) -> None:
        for companion in step.companions:
            self._scene.AddNode(companion)
        self._scene.AddNode(step.node)
        tree = self._scene.GetSubjectHierarchyNode()
        item = tree.GetItemByDataNode(step.node) if tree is not None else 0
        if item and step.parent_item:
            tree.SetItemParent(item, step.parent_item)

    def _trim(self) -> None:
        while len(self._done) > 1 and (len(self._done) > self._max_steps or self.nbytes > self._max_bytes):
            del self._done[0]
        used = {step.node.GetID() for step in self._done}
        self._latest = {identifier: state for identifier, state in self._latest.items() if identifier in used}

    @vtk.calldata_type(vtk.VTK_OBJECT)
    def _on_node_removed(self, _caller: Any, _event: str, node: Any) -> None:
        if self._working:
            return
        kept = [[step for step in steps if step.node is not node] for steps in (self._done, self._undone)]
        if len(kept[0]) + len(kept[1]) < len(self._done) + len(self._undone):
            self._done, self._undone = kept
            self.changed.emit()

    def _on_scene_closed(self, _caller: Any, _event: str) -> None:
        self.clear()


def _same(a: NodeState | None, b: NodeState | None) -> bool:
    if a is None or b is None:
        return a is b
    return a.same(b)


class PackedLayer:
    """A labelmap as runs of equal voxels: an organ in 512 x 512 x 100 takes some hundred kilobytes."""

    def __init__(self, image: Any) -> None:
        values, self.origin = values_of(image)
        self.affine = grid_of(image)
        self.shape = values.shape
        flat = values.reshape(-1)
        starts = _run_starts(flat)
        if starts.nbytes + starts.size * flat.itemsize < flat.nbytes:
            self._starts: np.ndarray | None = starts
            self._values = flat[starts]
        else:
            self._starts, self._values = None, flat.copy()

    @property
    def nbytes(self) -> int:
        """Memory of the voxels, in bytes."""
        return int(self._values.nbytes + (self._starts.nbytes if self._starts is not None else 0))

    def image(self) -> Any:
        """The labelmap again."""
        flat = self._values
        if self._starts is not None:
            size = int(np.prod(self.shape))
            flat = np.repeat(flat, np.diff(np.append(self._starts, size)))
        return image_of(flat.reshape(self.shape), self.origin, self.affine)

    def same(self, other: PackedLayer) -> bool:
        """Whether both hold the same voxels at the same place."""
        if self is other:
            return True
        if (self._starts is None) != (other._starts is None) or self.shape != other.shape:
            return False
        place = self.origin == other.origin and np.allclose(self.affine, other.affine, rtol=0, atol=1e-9)
        runs = self._starts is None or np.array_equal(self._starts, _of(other._starts))
        return bool((place or not self._values.size) and runs and np.array_equal(self._values, other._values))


@dataclass(frozen=True, eq=False)
class SegmentState:
    """A segment without its voxels.

    Attributes:
        id: its identifier.
        metadata: a vtkSegment that holds its name, colour, label value and all tags.
        automatic: whether its name and its colour were given by Slicer.
        layer: index of its labelmap in the state's layers; -1 for none.
        display: its display properties, by display node and property.
        key: what must be equal for two states to be the same to a user.
    """

    id: str
    metadata: Any
    automatic: tuple[bool, bool]
    layer: int
    display: dict[str, dict[str, Any]]
    key: tuple[Any, ...]


@dataclass(frozen=True, eq=False)
class NodeState:
    """A segmentation node: its segments, their labelmaps, its reference geometry and its place."""

    segments: tuple[SegmentState, ...]
    layers: tuple[PackedLayer, ...]
    stamps: tuple[str, ...]
    source: str
    representations: tuple[str, ...]
    parameters: str
    reference_volume_id: str
    transform_id: str

    def same(self, other: NodeState) -> bool:
        """Whether nothing that counts differs: voxels, names, colours, tags, order and transform.

        What is shown and what follows from the voxels does not count.
        """
        if self.transform_id != other.transform_id or len(self.layers) != len(other.layers):
            return False
        if [(s.id, s.layer, s.key) for s in self.segments] != [(s.id, s.layer, s.key) for s in other.segments]:
            return False
        return all(a.same(b) for a, b in zip(self.layers, other.layers, strict=True))


def capture(node: Any, known: NodeState | None = None) -> NodeState:
    """The present state of a vtkMRMLSegmentationNode.

    Labelmaps that did not change since ``known`` was captured are taken from it.
    """
    at_hand = dict(zip(known.stamps, known.layers, strict=True)) if known is not None else {}
    stamps: dict[str, int] = {}
    layers: list[PackedLayer] = []
    segments = []
    for identifier, segment in segments_of(node):
        image = segment_labelmap(segment)
        layer = -1
        if image is not None:
            stamp = _stamp(image)
            if stamp not in stamps:
                stamps[stamp] = len(layers)
                layers.append(at_hand[stamp] if stamp in at_hand else PackedLayer(image))
            layer = stamps[stamp]
        segments.append(_segment_state(node, identifier, segment, layer))
    segmentation = node.GetSegmentation()
    volume = node.GetNodeReferenceID(node.GetReferenceImageGeometryReferenceRole())
    return NodeState(
        segments=tuple(segments),
        layers=tuple(layers),
        stamps=tuple(stamps),
        source=segmentation.GetSourceRepresentationName(),
        representations=_representations(node),
        parameters=segmentation.SerializeAllConversionParameters(),
        reference_volume_id=volume or "",
        transform_id=node.GetTransformNodeID() or "",
    )


def restore(node: Any, state: NodeState) -> NodeState:
    """Bring a node back to a state; returns the state with the labelmaps as they are now, for captures to build upon."""
    present = capture(node, state)
    segmentation = node.GetSegmentation()
    for name in _representations(node):
        if name != state.source:
            segmentation.RemoveRepresentation(name)  # they follow from the voxels and are made again below
    wanted = {segment.id for segment in state.segments}
    for identifier in [identifier for identifier, _segment in segments_of(node) if identifier not in wanted]:
        segmentation.RemoveSegment(identifier)
    if segmentation.GetSourceRepresentationName() != state.source:
        segmentation.SetSourceRepresentationName(state.source)
    images = _images(node, present, state)
    for segment_state in state.segments:
        _restore_segment(node, segment_state, images)
    segmentation.ReorderSegments([segment.id for segment in state.segments])
    segmentation.DeserializeConversionParameters(state.parameters)
    _restore_place(node, state)
    for name in state.representations:
        if name != state.source and state.segments:
            segmentation.CreateRepresentation(name)
    for segment_state in state.segments:
        segmentation.InvokeEvent(segmentation.SourceRepresentationModified, segment_state.id)
    segmentation.Modified()
    node.Modified()
    return replace(state, stamps=tuple(_stamp(image) for image in images), transform_id=node.GetTransformNodeID() or "")


def _run_starts(flat: np.ndarray) -> np.ndarray:
    """Index of the first voxel of each run, in pieces that keep the memory of the comparison small."""
    starts = [np.zeros(min(1, flat.size), dtype=np.int64)]
    for begin in range(0, max(flat.size - 1, 0), _CHUNK):
        piece = flat[begin : begin + _CHUNK + 1]
        starts.append(np.flatnonzero(piece[1:] != piece[:-1]) + begin + 1)
    return np.concatenate(starts).astype(np.uint32 if flat.size < 1 << 32 else np.int64)


def _of(array: np.ndarray | None) -> np.ndarray:
    return np.zeros(0, dtype=np.uint32) if array is None else array


def _stamp(image: Any) -> str:
    # VTK's modification times are unique in the process, so that an address that is used again is told apart.
    return f"{image.GetAddressAsString('')}@{image.GetMTime()}"


def _representations(node: Any) -> tuple[str, ...]:
    segmentation = node.GetSegmentation()
    return tuple(name for name in _REPRESENTATIONS if segmentation.ContainsRepresentation(name))


def _segment_state(node: Any, identifier: str, segment: Any, layer: int) -> SegmentState:
    metadata = slicer.vtkSegment()
    metadata.DeepCopyMetadata(segment)
    automatic = (bool(segment.GetNameAutoGenerated()), bool(segment.GetColorAutoGenerated()))
    names = (slicer.vtkSegment.GetTerminologyEntryTagName(), *PROVENANCE_TAGS, _status_tag())
    tags = tuple(get_tag(segment, name) for name in names if name not in DERIVED_TAGS)
    key = (segment.GetName(), tuple(segment.GetColor()), segment.GetLabelValue() if layer >= 0 else 0, tags)
    return SegmentState(identifier, metadata, automatic, layer, _display_of(node, identifier), key)


def _status_tag() -> str:
    return str(slicer.vtkSlicerSegmentationsModuleLogic.GetStatusTagName())


def _display_of(node: Any, identifier: str) -> dict[str, dict[str, Any]]:
    found = {}
    for n in range(node.GetNumberOfDisplayNodes()):
        display = node.GetNthDisplayNode(n)
        if display is not None:
            values = {name: getattr(display, f"GetSegment{name}")(identifier) for name in _DISPLAY}
            values["OverrideColor"] = tuple(display.GetSegmentOverrideColor(identifier))
            found[display.GetID()] = values
    return found


def _images(node: Any, present: NodeState, state: NodeState) -> list[Any]:
    """The labelmaps of a state: those that the node still holds unchanged, and new ones for the others."""
    held = {}
    for segment in present.segments:
        found = node.GetSegmentation().GetSegment(segment.id)
        if segment.layer >= 0 and found is not None:
            held[segment.layer] = segment_labelmap(found)
    images = []
    for layer in state.layers:
        same = (held[n] for n, other in enumerate(present.layers) if held.get(n) is not None and layer.same(other))
        images.append(next(same, None) or layer.image())
    return images


def _restore_segment(node: Any, state: SegmentState, images: list[Any]) -> None:
    segmentation = node.GetSegmentation()
    segment = segmentation.GetSegment(state.id)
    gone = segment is None
    if gone:
        segment = slicer.vtkSegment()
    image = images[state.layer] if state.layer >= 0 else None
    if image is not None and segment_labelmap(segment) is not image:
        segment.AddRepresentation(LABELMAP, image)
    segment.DeepCopyMetadata(state.metadata)
    segment.SetNameAutoGenerated(state.automatic[0])
    segment.SetColorAutoGenerated(state.automatic[1])
    if not gone:
        segment.Modified()
        return
    segmentation.AddSegment(segment, state.id)
    for n in range(node.GetNumberOfDisplayNodes()):
        display = node.GetNthDisplayNode(n)
        for name, value in state.display.get(display.GetID() if display else "", {}).items():
            if name == "OverrideColor":
                display.SetSegmentOverrideColor(state.id, *value)
            else:
                getattr(display, f"SetSegment{name}")(state.id, value)


def _restore_place(node: Any, state: NodeState) -> None:
    """Reference volume and parent transform; one that is not in the scene any more stays away."""
    scene = node.GetScene()
    role = node.GetReferenceImageGeometryReferenceRole()
    if (node.GetNodeReferenceID(role) or "") != state.reference_volume_id:
        known = scene is not None and state.reference_volume_id and scene.GetNodeByID(state.reference_volume_id)
        node.SetNodeReferenceID(role, state.reference_volume_id if known else None)
    if (node.GetTransformNodeID() or "") != state.transform_id:
        known = scene is not None and state.transform_id and scene.GetNodeByID(state.transform_id)
        node.SetAndObserveTransformNodeID(state.transform_id if known else None)
