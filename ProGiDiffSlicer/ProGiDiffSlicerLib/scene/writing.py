"""Writing a mask into a segment: on which grid, and what happens to the segments around it."""

from __future__ import annotations

from typing import Any, Literal

import numpy as np
import slicer
from slicer.i18n import tr as _

from progidiff.errors import InputError
from ProGiDiffSlicerLib.scene.labelmaps import (
    Index,
    between_nodes,
    grid_of,
    labelmap_of,
    overlap,
    segment_labelmap,
    segment_mask,
    segments_of,
    step_between,
    values_of,
    volume_grid,
)

Overwrite = Literal["none", "visible", "all"]


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
    if overwrite == "none":
        others = {}
    elif overwrite == "visible":
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
