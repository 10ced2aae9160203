"""Volumes that change over time: which frame is shown, the voxels of any frame, and segmentations that go with the frames.

Results are pinned to the frame that they were computed on, whatever frame is shown when they arrive.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np
import slicer
import vtk
from slicer.i18n import tr as _

from progidiff.errors import InputError


@dataclass(frozen=True, eq=False)
class Frames:
    """The frames of a volume that a sequence browser plays.

    Attributes:
        node: the volume that is shown (the browser's proxy).
        browser: vtkMRMLSequenceBrowserNode.
        sequence: vtkMRMLSequenceNode that holds the volume of each frame.
        count: number of frames.
        index: the frame that is shown now, from 0.
    """

    node: Any
    browser: Any
    sequence: Any
    count: int
    index: int

    def data_node(self, index: int) -> Any:
        """The volume of frame ``index``; it lies in the sequence, not in the scene.

        Raises:
            InputError: there is no such frame, or it holds no volume.
        """
        found = self._item(self.sequence, index) if 0 <= index < self.count else None
        if found is None:
            raise InputError(
                _("Frame {number} of {name} holds no volume; choose another frame.").format(
                    number=index + 1, name=self.node.GetName()
                )
            )
        return found

    def _item(self, sequence: Any, index: int) -> Any | None:
        value = self.browser.GetMasterSequenceNode().GetNthIndexValue(index)
        return sequence.GetDataNodeAtValue(value, True)

    def source_of(self, node: Any, index: int) -> Any:
        """What stands for ``node`` in frame ``index``: an item of its sequence if the browser plays it, otherwise itself."""
        sequence = self.browser.GetSequenceNode(node)
        item = None if sequence is None else self._item(sequence, index)
        return node if item is None else item


def frames(node: Any) -> Frames | None:
    """The frames of a volume node, or ``None`` if no sequence browser plays it."""
    scene = None if node is None else node.GetScene()
    if scene is None:
        return None
    for number in range(scene.GetNumberOfNodesByClass("vtkMRMLSequenceBrowserNode")):
        browser = scene.GetNthNodeByClass(number, "vtkMRMLSequenceBrowserNode")
        sequence = browser.GetSequenceNode(node)
        if sequence is not None and browser.GetMasterSequenceNode() is not None and browser.GetNumberOfItems() > 0:
            index = min(max(browser.GetSelectedItemNumber(), 0), browser.GetNumberOfItems() - 1)
            return Frames(node, browser, sequence, browser.GetNumberOfItems(), index)
    return None


def parent_to_world(node: Any, playing: Frames | None = None, index: int = 0) -> np.ndarray | None:
    """Where the parent transforms of a node put it: float64 (4, 4), RAS of the node to RAS of the world.

    ``None`` where one of them is not linear. Transforms that the browser plays as well are taken as in frame ``index``.
    """
    total = np.eye(4)
    transform = node.GetParentTransformNode()
    while transform is not None:
        source = transform if playing is None else playing.source_of(transform, index)
        if not source.IsLinear():
            return None
        matrix = vtk.vtkMatrix4x4()
        source.GetMatrixTransformToParent(matrix)
        total = slicer.util.arrayFromVTKMatrix(matrix) @ total
        transform = transform.GetParentTransformNode()
    return total


def show_frame(playing: Frames, index: int) -> None:
    """Make the browser show frame ``index``."""
    playing.browser.SetSelectedItemNumber(index)


def record_segmentation(playing: Frames, segmentation_node: Any) -> Any:
    """Give a segmentation one item for each frame, in the browser that plays the volume; the sequence that holds them.

    What the segmentation holds now belongs to the frame that is shown now; in the other frames it is empty. From then on it
    changes with the frames, and changes of it are kept in the frame that is shown. A segmentation that the browser plays
    already is left as it is.
    """
    known = playing.browser.GetSequenceNode(segmentation_node)
    if known is not None:
        return known
    scene = segmentation_node.GetScene()
    master = playing.browser.GetMasterSequenceNode()
    shown = playing.browser.GetSelectedItemNumber()
    name = scene.GenerateUniqueName(_("{name} frames").format(name=segmentation_node.GetName()))
    sequence = scene.AddNewNodeByClass("vtkMRMLSequenceNode", name)
    sequence.SetIndexName(master.GetIndexName())
    sequence.SetIndexUnit(master.GetIndexUnit())
    sequence.SetIndexType(master.GetIndexType())
    empty = slicer.vtkMRMLSegmentationNode()
    empty.SetName(segmentation_node.GetName())
    empty.SetReferenceImageGeometryParameterFromVolumeNode(playing.node)
    # Every frame gets its item before the browser plays the sequence: the browser fills gaps from the frame before, and a
    # mask of one frame would turn up in the next.
    for index in range(playing.count):
        sequence.SetDataNodeAtValue(segmentation_node if index == shown else empty, master.GetNthIndexValue(index))
    # Told at once: a browser that sees the sequence before its node would make a second segmentation for it.
    modifying = playing.browser.StartModify()
    playing.browser.AddSynchronizedSequenceNode(sequence)
    playing.browser.SetOverwriteProxyName(sequence, False)
    playing.browser.SetSaveChanges(sequence, True)
    playing.browser.AddProxyNode(segmentation_node, sequence, False)
    playing.browser.EndModify(modifying)
    return sequence
