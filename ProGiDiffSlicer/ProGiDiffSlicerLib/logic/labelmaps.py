"""Between numpy masks and the labelmaps of Slicer's segmentations.

A labelmap (``vtkOrientedImageData``) has an extent: the indices of its first and last voxel on its grid. A mask that
is cropped to the box it fills is a labelmap of that extent on the volume's own grid, so no voxel is ever resampled and
an organ costs the memory of its box.
"""

from __future__ import annotations

from collections.abc import Iterator
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
