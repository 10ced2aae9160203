"""Between numpy masks and the labelmaps of Slicer's segmentations, and writing them into segments.

A labelmap (``vtkOrientedImageData``) has an extent: the indices of its first and last voxel on its grid. A mask that
is cropped to the box it fills is a labelmap of that extent on the volume's own grid, so no voxel is ever resampled and
an organ costs the memory of its box.
"""

from __future__ import annotations

from collections.abc import Iterator
from enum import StrEnum
from typing import Any

import numpy as np
import slicer
import vtk
from slicer.i18n import tr as _
from vtk.util.numpy_support import vtk_to_numpy

from progidiff.errors import InputError
from progidiff.proposals.masks import bounding_box

LABELMAP = "Binary labelmap"
CLOSED_SURFACE = "Closed surface"

# A grid point that is farther than this from a grid point of the other grid, in voxels, needs resampling.
_ON_GRID = 1e-3

Index = tuple[int, int, int]


_VTK_TYPE = {
    "u1": vtk.VTK_UNSIGNED_CHAR,
    "i1": vtk.VTK_SIGNED_CHAR,
    "u2": vtk.VTK_UNSIGNED_SHORT,
    "i2": vtk.VTK_SHORT,
    "u4": vtk.VTK_UNSIGNED_INT,
    "i4": vtk.VTK_INT,
    "f4": vtk.VTK_FLOAT,
    "f8": vtk.VTK_DOUBLE,
}


class Overwrite(StrEnum):
    """Which other segments may lose voxels to the accepted one, or to editing."""

    NONE = "none"
    VISIBLE = "visible"
    ALL = "all"

    def label(self) -> str:
        """The choice's text in a combo box."""
        return {
            Overwrite.NONE: _("Never changed (may overlap)"),
            Overwrite.VISIBLE: _("Visible ones give way"),
            Overwrite.ALL: _("All give way"),
        }[self]


def matrix_of(affine: np.ndarray) -> Any:
    """The vtkMatrix4x4 of a (4, 4) array."""
    return slicer.util.vtkMatrixFromArray(np.asarray(affine, np.float64))


def array_of(matrix: Any) -> np.ndarray:
    """The float64 (4, 4) array of a vtkMatrix4x4."""
    return np.asarray(slicer.util.arrayFromVTKMatrix(matrix), np.float64)


def tight(array: np.ndarray, origin_kji: Index) -> tuple[np.ndarray, Index]:
    """The mask cropped to the voxels inside it, as a view; an empty mask has shape (0, 0, 0)."""
    box = bounding_box(array)
    if box is None:
        return array[:0, :0, :0], (0, 0, 0)
    k, j, i = (int(start) + side.start for start, side in zip(origin_kji, box, strict=True))
    return array[box], (k, j, i)


def labelmap_of(array: np.ndarray, origin_kji: Index, affine: np.ndarray, value: int = 1) -> Any:
    """A labelmap (uint8) that is ``value`` where ``array`` (k, j, i) is not 0.

    ``affine`` (4, 4) maps (i, j, k) of the whole grid to millimetres.
    """
    mask = np.asarray(array) != 0
    return image_of(np.where(mask, np.uint8(value), np.uint8(0)), origin_kji, affine)


def image_of(values: np.ndarray, origin_kji: Index, affine: np.ndarray) -> Any:
    """A vtkOrientedImageData that holds a copy of ``values`` (k, j, i); an array without voxels gives an empty one."""
    image = slicer.vtkOrientedImageData()
    image.SetGeometryFromImageToWorldMatrix(matrix_of(affine))
    extent = []
    for start, count in zip(origin_kji[::-1], values.shape[::-1], strict=True):
        extent += [int(start), int(start) + int(count) - 1]
    if values.size == 0:
        extent = [0, -1, 0, -1, 0, -1]
    image.SetExtent(*extent)
    image.AllocateScalars(_VTK_TYPE[values.dtype.str[1:]], 1)
    if values.size:
        vtk_to_numpy(image.GetPointData().GetScalars())[:] = values.ravel()
    return image


def values_of(image: Any) -> tuple[np.ndarray, Index]:
    """The voxels of a labelmap as a view (k, j, i) that must not outlive it, and the index of the first one."""
    i0, i1, j0, j1, k0, k1 = image.GetExtent()
    scalars = image.GetPointData().GetScalars()
    if i1 < i0 or j1 < j0 or k1 < k0 or scalars is None:
        return np.zeros((0, 0, 0), dtype=np.uint8), (0, 0, 0)
    return vtk_to_numpy(scalars).reshape(k1 - k0 + 1, j1 - j0 + 1, i1 - i0 + 1), (k0, j0, i0)


def grid_of(image: Any) -> np.ndarray:
    """The (4, 4) map from (i, j, k) of a labelmap to millimetres in the segmentation's own coordinates."""
    matrix = vtk.vtkMatrix4x4()
    image.GetImageToWorldMatrix(matrix)
    return array_of(matrix)


def volume_grid(volume_node: Any) -> np.ndarray:
    """The (4, 4) map from (i, j, k) of a volume to millimetres, before its parent transform."""
    matrix = vtk.vtkMatrix4x4()
    volume_node.GetIJKToRASMatrix(matrix)
    return array_of(matrix)


def segment_labelmap(segment: Any) -> Any | None:
    """The labelmap in which a segment lies, which other segments may share; ``None`` where it holds none."""
    return segment.GetRepresentation(LABELMAP)


def segment_mask(segment: Any) -> tuple[np.ndarray, Index]:
    """A segment's voxels as bool (k, j, i), cropped to them, and the index of the first one on the labelmap's grid."""
    image = segment_labelmap(segment)
    if image is None:
        return np.zeros((0, 0, 0), dtype=bool), (0, 0, 0)
    values, origin = values_of(image)
    return tight(values == segment.GetLabelValue(), origin)


def overlap(a: tuple[np.ndarray, Index], b: tuple[np.ndarray, Index]) -> int:
    """Number of voxels that are inside both masks; both lie on one grid."""
    in_a, in_b = [], []
    for axis in range(3):
        start = max(a[1][axis], b[1][axis])
        stop = min(a[1][axis] + a[0].shape[axis], b[1][axis] + b[0].shape[axis])
        if stop <= start:
            return 0
        in_a.append(slice(start - a[1][axis], stop - a[1][axis]))
        in_b.append(slice(start - b[1][axis], stop - b[1][axis]))
    return int(np.count_nonzero((a[0][tuple(in_a)] != 0) & (b[0][tuple(in_b)] != 0)))


def segments_of(segmentation_node: Any) -> Iterator[tuple[str, Any]]:
    """Identifier and vtkSegment of each segment, in the order of the list."""
    segmentation = segmentation_node.GetSegmentation()
    for n in range(segmentation.GetNumberOfSegments()):
        identifier = segmentation.GetNthSegmentID(n)
        yield identifier, segmentation.GetSegment(identifier)


def between_nodes(source: Any, target: Any) -> np.ndarray:
    """The (4, 4) map from the coordinates of one transformable node to those of another.

    Raises:
        InputError: a transform between them is not linear.
    """
    matrix = vtk.vtkMatrix4x4()
    pair = (source.GetParentTransformNode(), target.GetParentTransformNode())
    if not slicer.vtkMRMLTransformNode.GetMatrixTransformBetweenNodes(*pair, matrix):
        raise InputError(
            _(
                "A transform that is not linear lies between the volume and the segmentation; "
                "harden it on both in the Transforms module, or accept into a new segmentation."
            )
        )
    return array_of(matrix)


def step_between(a: np.ndarray, b: np.ndarray) -> np.ndarray | None:
    """The whole-number (4, 4) map from the indices of grid ``a`` to those of grid ``b``.

    Both are maps from (i, j, k) to millimetres. ``None`` where their voxels do not lie on each other, so that going from
    one to the other means resampling.
    """
    step = np.linalg.inv(b) @ a
    whole = np.rint(step)
    near = np.abs(step[:3, :3] - whole[:3, :3]).max() < 1e-5 and np.abs(step[:3, 3] - whole[:3, 3]).max() < _ON_GRID
    return whole.astype(np.int64) if near and round(abs(np.linalg.det(whole[:3, :3]))) == 1 else None


def write_segment(image: Any, node: Any, segment_id: str, replace_all: bool, overwrite: Overwrite) -> dict[str, int]:
    """Write a labelmap of ones into a segment as the Segment Editor would.

    Args:
        image: on the grid of the segment's labelmap.
        node: the vtkMRMLSegmentationNode.
        segment_id: the segment.
        replace_all: whether the segment loses the voxels it had.
        overwrite: which other segments lose the voxels that are inside ``image``.

    Returns:
        How many voxels other segments lost, by identifier.
    """
    logic = slicer.vtkSlicerSegmentationsModuleLogic
    display = node.GetDisplayNode()
    others = {identifier: other for identifier, other in segments_of(node) if identifier != segment_id}
    if overwrite == Overwrite.NONE:
        others = {}
    elif overwrite == Overwrite.VISIBLE:
        others = {key: other for key, other in others.items() if display is None or display.GetSegmentVisibility(key)}
    masks = {key: _on_layer(image, segment_labelmap(other)) for key, other in others.items()}
    under = {key: count for key, other in others.items() if (count := overlap(segment_mask(other), values_of(masks[key])))}
    if replace_all:
        logic.ClearSegment(node, segment_id)
    written = _merge(image, node, segment_id, logic.MODE_MERGE_MASK, list(under))
    for key in under:
        # Those in the segment's own labelmap lost their voxels to it already.
        values, origin = values_of(masks[key])
        if written and overlap(segment_mask(others[key]), (values, origin)):
            outside = labelmap_of(values == 0, origin, grid_of(masks[key]), value=255)
            written = _merge(outside, node, key, logic.MODE_MERGE_MIN, [])
    if not written:
        text = _("The segmentation {name} could not take the mask; accept it into a new segmentation.")
        raise InputError(text.format(name=node.GetName()))
    return under


def _merge(image: Any, node: Any, segment_id: str, how: int, overwritten: list[str]) -> bool:
    logic = slicer.vtkSlicerSegmentationsModuleLogic
    return bool(logic.SetBinaryLabelmapToSegment(image, node, segment_id, how, image.GetExtent(), False, overwritten))


def _on_layer(image: Any, layer: Any | None) -> Any:
    """A mask on the grid of another labelmap; the mask itself where that is its own grid."""
    if layer is None or np.allclose(grid_of(image), grid_of(layer), rtol=0, atol=1e-6):
        return image
    return _resampled(image, grid_of(layer))


def _resampled(image: Any, grid: np.ndarray) -> Any:
    """A mask on another grid; each voxel takes the value of the nearest one."""
    reference = labelmap_of(np.zeros((1, 1, 1), dtype=bool), (0, 0, 0), grid)
    resampled = slicer.vtkOrientedImageData()
    resample = slicer.vtkOrientedImageDataResample.ResampleOrientedImageToReferenceOrientedImage
    resample(image, reference, resampled, False, True)
    return resampled


def reference_grid(node: Any) -> np.ndarray | None:
    """The reference geometry of a segmentation as a map from (i, j, k) to millimetres; ``None`` where it has none."""
    converter = slicer.vtkSegmentationConverter
    text = node.GetSegmentation().GetConversionParameter(converter.GetReferenceImageGeometryParameterName())
    image = slicer.vtkOrientedImageData()
    return grid_of(image) if text and converter.DeserializeImageGeometry(text, image, False) else None


def _wanted_grid(segment: Any, node: Any, grid: np.ndarray) -> np.ndarray:
    """The grid that a segment's voxels have to lie on: its own where it has any, else one of the segmentation's.

    Of those, one whose voxels are the mask's is best; Slicer's own choice, the reference geometry, comes first.
    """
    own = segment_labelmap(segment)
    if own is not None and values_of(own)[0].size:
        return grid_of(own)
    layers = (segment_labelmap(other) for _identifier, other in segments_of(node))
    candidates = [reference_grid(node), *(grid_of(layer) for layer in layers if layer and values_of(layer)[0].size)]
    found = [candidate for candidate in candidates if candidate is not None]
    return next((candidate for candidate in found if step_between(grid, candidate) is not None), (found or [grid])[0])


def on_grid_of(segment: Any, mask: np.ndarray, origin: Index, volume_node: Any, node: Any) -> tuple[Any, bool]:
    """The mask as a labelmap on the grid that the segment lies on, and whether that took resampling."""
    grid = between_nodes(volume_node, node) @ volume_grid(volume_node)
    wanted = _wanted_grid(segment, node, grid)
    step = step_between(grid, wanted)
    if step is not None and np.array_equal(step[:3, :3], np.eye(3)):
        i, j, k = (int(index) + int(shift) for index, shift in zip(origin[::-1], step[:3, 3], strict=True))
        return labelmap_of(mask, (k, j, i), wanted), False
    return _resampled(labelmap_of(mask, origin, grid), wanted), step is None
