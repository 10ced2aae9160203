"""Undo and redo of what the module does to segmentations: one step per action of the user.

A step holds the states of one segmentation node before and after the action. Steps may follow each other on different
nodes, and a step may create a node: undoing it removes the node, redoing it brings the same node back. What the user
changes by hand between two steps becomes a step of its own the moment it would otherwise be lost.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

import vtk
from slicer.i18n import tr as _

from ProGiDiffSlicerLib.scene.sequences import frames, record_segmentation, show_frame
from ProGiDiffSlicerLib.scene.snapshot import NodeState, capture, restore
from ProGiDiffSlicerLib.signals import Signal

# States share unchanged labelmaps and keep the others as runs, so that this is far more than a day's work needs.
MAX_BYTES = 256 * 2**20
MAX_STEPS = 50


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
