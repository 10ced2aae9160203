"""Volumes and sequences: voxels and place, which frame is shown, which slices are meant.

Results are pinned to the frame that they were computed on, whatever frame is shown when they arrive.
"""

from __future__ import annotations

from dataclasses import dataclass
from enum import StrEnum
from typing import Any, Literal

import numpy as np
import slicer
import vtk
from slicer.i18n import tr as _

from progidiff.errors import InputError
from progidiff.volumes.geometry import Geometry
from progidiff.volumes.slicing import SlicePlan
from ProGiDiffSlicerLib.scene.labelmaps import volume_grid
from ProGiDiffSlicerLib.scene.nodes import nodes_of

Modality = Literal["CT", "MR"]
#: UCUM code that Slicer's DICOM reader writes for Hounsfield units.
_HOUNSFIELD = "[hnsf'U]"
Point = tuple[float, float, float]
#: A view whose normal is farther than this from the direction of the slices (as a cosine) does not show them.
_ALONG = float(np.sqrt(0.5))


class Extent(StrEnum):
    """How much of a volume is proposed for."""

    VOLUME = "volume"
    SLICE = "slice"
    RANGE = "range"

    def label(self) -> str:
        """The choice's text in a combo box."""
        return {
            Extent.VOLUME: _("Whole volume"),
            Extent.SLICE: _("This slice"),
            Extent.RANGE: _("Range of slices"),
        }[self]


class Frames(StrEnum):
    """Which frames of a sequence are proposed for."""

    THIS = "this"
    ALL = "all"

    def label(self) -> str:
        """The choice's text in a combo box."""
        return {Frames.THIS: _("This frame"), Frames.ALL: _("All frames")}[self]


@dataclass(frozen=True, eq=False)
class PlayedFrames:
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


def frames(node: Any) -> PlayedFrames | None:
    """The frames of a volume node, or ``None`` if no sequence browser plays it."""
    scene = None if node is None else node.GetScene()
    if scene is None:
        return None
    for browser in nodes_of(scene, "vtkMRMLSequenceBrowserNode"):
        sequence = browser.GetSequenceNode(node)
        if sequence is not None and browser.GetMasterSequenceNode() is not None and browser.GetNumberOfItems() > 0:
            index = min(max(browser.GetSelectedItemNumber(), 0), browser.GetNumberOfItems() - 1)
            return PlayedFrames(node, browser, sequence, browser.GetNumberOfItems(), index)
    return None


def parent_to_world(node: Any, playing: PlayedFrames | None = None, index: int = 0) -> np.ndarray | None:
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


def show_frame(playing: PlayedFrames, index: int) -> None:
    """Make the browser show frame ``index``."""
    playing.browser.SetSelectedItemNumber(index)


def record_segmentation(playing: PlayedFrames, segmentation_node: Any) -> Any:
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


@dataclass(frozen=True)
class Fingerprint:
    """By what a volume is known again.

    Attributes:
        node_id: MRML id of the volume node.
        image_mtime: modification time of its voxels.
        affine: bytes of the float64 (4, 4) that maps IJK to RAS, without parent transforms: these move a volume and what
            was made of it together.
        shape_kji: size of its array.
        frame: frame of the sequence that plays it, from 0, or ``None``.
    """

    node_id: str
    image_mtime: int
    affine: bytes
    shape_kji: tuple[int, int, int]
    frame: int | None = None


@dataclass(frozen=True, eq=False)
class VolumeImage:
    """A volume as the engine sees it.

    Attributes:
        node_id: MRML id of the volume node.
        name: its name.
        array_kji: numeric (K, J, I); shares the memory of the node.
        affine: float64 (4, 4), IJK to RAS of the world, linear parent transforms included.
        local_affine: the same without parent transforms, as in the node.
        modality: "CT", "MR", or ``None`` where the volume does not say it (the worker then guesses from the values).
        stated_modality: what DICOM says, whatever it is, e.g. "PT"; "" where it says nothing.
        fingerprint: by what it is known again.
    """

    node_id: str
    name: str
    array_kji: np.ndarray
    affine: np.ndarray
    local_affine: np.ndarray
    modality: Modality | None
    stated_modality: str
    fingerprint: Fingerprint

    @property
    def frame(self) -> int | None:
        """Frame of the sequence that plays it, or ``None``."""
        return self.fingerprint.frame

    @property
    def geometry(self) -> Geometry:
        """Its grid in the world."""
        k, j, i = self.array_kji.shape
        return Geometry((i, j, k), self.affine)


def volume_image(node: Any, frame: int | None = None) -> VolumeImage:
    """Voxels and place of a volume node.

    Args:
        node: vtkMRMLScalarVolumeNode, or ``None``.
        frame: which frame of the sequence that plays it; ``None`` for the one that is shown.

    Raises:
        InputError: there is no volume, or it cannot be used as it is; the sentence says what to do.
    """
    if node is None:
        raise InputError(_("No volume is chosen; load a CT or MR volume and choose it."))
    name = node.GetName() or ""
    if not node.IsA("vtkMRMLScalarVolumeNode"):
        raise InputError(_("{name} is not a volume; choose a CT or MR volume.").format(name=name))
    playing = frames(node)
    source, index = node, None
    if playing is not None:
        index = playing.index if frame is None else frame
        source = playing.data_node(index)
    _check_voxels(node, source, name)
    array = slicer.util.arrayFromVolume(source)
    local = volume_grid(source)
    affine = _world_affine(node, local, playing, index, name)
    k, j, i = array.shape
    affine = Geometry((i, j, k), affine).affine
    stated = stated_modality(node)
    modality = modality_of(node) or modality_of(source)
    return VolumeImage(node.GetID(), name, array, affine, local, modality, stated, _fingerprint(node, source, index))


def stated_modality(node: Any) -> str:
    """The modality that DICOM states for a volume, e.g. "CT" or "PT"; "" where it states none."""
    stated = node.GetAttribute("DICOM.Modality")
    scene = node.GetScene()
    if not stated and scene is not None:
        hierarchy = slicer.vtkMRMLSubjectHierarchyNode.GetSubjectHierarchyNode(scene)
        item = hierarchy.GetItemByDataNode(node) if hierarchy is not None else 0
        attribute = slicer.vtkMRMLSubjectHierarchyConstants.GetDICOMSeriesModalityAttributeName()
        stated = hierarchy.GetItemAttribute(item, attribute) if item else ""
    code = (stated or "").strip().upper()
    return code if code.isalnum() and code.isascii() and 2 <= len(code) <= 16 else ""


def modality_of(node: Any) -> Modality | None:
    """ "CT" or "MR" where DICOM or the unit of the voxels says so, otherwise ``None``."""
    stated = stated_modality(node)
    if stated in ("CT", "MR"):
        return "CT" if stated == "CT" else "MR"
    units = node.GetVoxelValueUnits()
    if not stated and units is not None and units.GetCodeValue() == _HOUNSFIELD:
        return "CT"
    return None


def still_same(scene: Any, fingerprint: Fingerprint) -> str | None:
    """Why results for a volume can no longer be used, as a sentence; ``None`` while it is what it was."""
    node = scene.GetNodeByID(fingerprint.node_id)
    if node is None:
        return _("The volume was removed meanwhile; its proposals were dropped.")
    playing = frames(node)
    if (playing is None) != (fingerprint.frame is None):
        return _changed(node)
    try:
        source = node if playing is None or fingerprint.frame is None else playing.data_node(fingerprint.frame)
    except InputError:
        return _changed(node)
    if source.GetImageData() is None:
        return _changed(node)
    now = _fingerprint(node, source, fingerprint.frame)
    return None if now == fingerprint else _changed(node)


def _changed(node: Any) -> str:
    return _("{name} was changed meanwhile; its proposals were dropped, ask for them again.").format(name=node.GetName())


def _fingerprint(node: Any, source: Any, frame: int | None) -> Fingerprint:
    image = source.GetImageData()
    i, j, k = image.GetDimensions()
    return Fingerprint(node.GetID(), int(image.GetMTime()), volume_grid(source).tobytes(), (k, j, i), frame)


def _check_voxels(node: Any, source: Any, name: str) -> None:
    image = source.GetImageData()
    if image is None or image.GetPointData().GetScalars() is None or min(image.GetDimensions()) < 1:
        raise InputError(_("{name} holds no voxels; load it again.").format(name=name))
    if node.IsA("vtkMRMLLabelMapVolumeNode"):
        raise InputError(_("{name} is a label map, not an image; choose the CT or MR volume.").format(name=name))
    if image.GetNumberOfScalarComponents() != 1:
        raise InputError(
            _("{name} has {count} values in each voxel, as a colour image; extract one as a scalar volume first.").format(
                name=name, count=image.GetNumberOfScalarComponents()
            )
        )


def _world_affine(node: Any, local: np.ndarray, playing: PlayedFrames | None, index: int | None, name: str) -> np.ndarray:
    parent = parent_to_world(node, playing, index or 0)
    if parent is None:
        raise InputError(
            _(
                "{name} is under a non-linear transform; harden the transform (Transforms module, Apply) "
                "or resample the volume, then try again."
            ).format(name=name)
        )
    return np.asarray(parent @ local, np.float64)


def slices_of_extent(
    extent: Extent,
    slices: tuple[int, int] | None,
    geometry: Geometry,
    plan: SlicePlan,
    scene: Any = None,
) -> tuple[int, int] | None:
    """Half-open range of slices, or ``None`` for all of them.

    Args:
        extent: what is meant.
        slices: half-open range, for ``"range"``.
        geometry: grid of the volume in the world.
        plan: how it is cut.
        scene: vtkMRMLScene, whose slice views show what ``"slice"`` means.

    Raises:
        InputError: there is no such slice.
    """
    if extent == Extent.VOLUME:
        return None
    if extent == Extent.RANGE:
        start, stop = slices or (0, 0)
        if not 0 <= start < stop <= plan.count:
            raise InputError(
                _("The slices {first} to {last} are not within the volume's {count}; choose a range within them.").format(
                    first=start + 1, last=stop, count=plan.count
                )
            )
        return start, stop
    if extent != Extent.SLICE:
        raise InputError(_("Choose this slice, a range of slices or the whole volume."))
    index = slice_at(shown_point(scene, geometry, plan), geometry, plan)
    return index, index + 1


def slice_at(point_ras: Point, geometry: Geometry, plan: SlicePlan) -> int:
    """Index of the slice in which a point (RAS in mm) lies.

    Raises:
        InputError: it lies before the first or behind the last slice.
    """
    place = place_of(point_ras, geometry, plan)
    index = int(np.floor(place + 0.5))
    if not np.isfinite(place) or not 0 <= index < plan.count:
        raise InputError(
            _("The slice that is shown lies outside the volume; scroll into the volume, or choose a range of slices.")
        )
    return index


def place_of(point_ras: Point, geometry: Geometry, plan: SlicePlan) -> float:
    """Where a point (RAS in mm) lies along the slices, in slices; it may be before the first or behind the last one."""
    return float((np.linalg.inv(geometry.affine) @ [*point_ras, 1.0])[2 - plan.axis])


def shown_point(scene: Any, geometry: Geometry, plan: SlicePlan) -> Point:
    """Centre of the slice view that shows the volume's slices: the red one, or where that looks across them the best other.

    Raises:
        InputError: no view shows them.
    """
    axis = np.asarray(geometry.affine[:3, 2 - plan.axis])
    best, best_view = 0.0, None
    for view in [] if scene is None else nodes_of(scene, "vtkMRMLSliceNode"):
        matrix = view.GetSliceToRAS()
        normal = np.array([matrix.GetElement(row, 2) for row in range(3)])
        along = abs(float(normal @ axis)) / float(np.linalg.norm(axis))
        if view.GetLayoutName() == "Red" and along > _ALONG:
            best_view = view
            break
        if along > max(best, _ALONG):
            best, best_view = along, view
    if best_view is None:
        raise InputError(_("No slice view shows the slices of this volume; choose a range of slices or the whole volume."))
    matrix = best_view.GetSliceToRAS()
    return matrix.GetElement(0, 3), matrix.GetElement(1, 3), matrix.GetElement(2, 3)
