"""What the engine needs to know of a volume node, and whether that still holds when results arrive."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, Literal

import numpy as np
import slicer
from slicer.i18n import tr as _

from progidiff.errors import InputError
from progidiff.volumes.geometry import Geometry
from ProGiDiffSlicerLib.scene.labelmaps import volume_grid
from ProGiDiffSlicerLib.scene.sequences import Frames, frames, parent_to_world

Modality = Literal["CT", "MR"]

#: UCUM code that Slicer's DICOM reader writes for Hounsfield units.
_HOUNSFIELD = "[hnsf'U]"


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


def _world_affine(node: Any, local: np.ndarray, playing: Frames | None, index: int | None, name: str) -> np.ndarray:
    parent = parent_to_world(node, playing, index or 0)
    if parent is None:
        raise InputError(
            _(
                "{name} is under a non-linear transform; harden the transform (Transforms module, Apply) "
                "or resample the volume, then try again."
            ).format(name=name)
        )
    return np.asarray(parent @ local, np.float64)
