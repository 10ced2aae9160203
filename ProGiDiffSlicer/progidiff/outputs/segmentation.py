"""Slicer segmentations: ``.seg.nrrd`` with names, colours, terminology and overlapping segments.

The layout is Slicer's own (vtkMRMLSegmentationStorageNode): segments that overlap lie in different layers,
the layers are the first, fastest axis of a 4-D NRRD of kind ``list``, and ``Segment<n>_...`` keys say which
label in which layer is which segment. No library writes that without holding all layers in memory, so the
header is written here (NRRD format definition, revision 4) and the voxels are streamed through gzip, plane by
plane.
"""

from __future__ import annotations

import gzip
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np

from progidiff.outputs.tags import escape_tag
from progidiff.places import atomic_file
from progidiff.volumes.geometry import Geometry
from progidiff.volumes.packed import PackedMask

TERMINOLOGY_TAG = "TerminologyEntry"
MAX_LABEL = 255

# Fast; masks compress by a factor of a hundred or more at any level.
_GZIP_LEVEL = 4


@dataclass(frozen=True, eq=False)
class Segment:
    """One segment of a segmentation.

    Attributes:
        name: shown in Slicer; any text.
        mask: (K, J, I) of bool, or packed.
        color: red, green and blue in [0, 1].
        terminology: terminology entry in Slicer's serialised form, or "" for none.
        tags: further tags, kept exactly whatever characters they hold: see :func:`progidiff.outputs.tags.escape_tag`.
        id: unique identifier; "" makes one.
    """

    name: str
    mask: np.ndarray | PackedMask
    color: tuple[float, float, float]
    terminology: str = ""
    tags: dict[str, str] = field(default_factory=dict)
    id: str = ""


def write_seg_nrrd(path: Path, segments: Sequence[Segment], geometry: Geometry) -> None:
    """Write segments, which may overlap, as a file that Slicer opens as a segmentation.

    The file has exactly the geometry of the image. Segments that do not overlap share a layer. Memory: one
    bit per voxel and segment, and one plane of all layers.

    Raises:
        OutputError: read-only folder or full disk; no partial file is left.
        ValueError: a mask does not fit the geometry, or identifiers are not unique.
    """
    path = Path(path)
    masks = [_packed(segment, geometry) for segment in segments]
    places = assign_layers(masks)
    layers = 1 + max((layer for layer, _ in places), default=0)
    header = _header(segments, masks, places, layers, geometry)
    with atomic_file(path) as staged, staged.open("wb") as stream:
        stream.write(header)
        with gzip.GzipFile(filename="", mode="wb", fileobj=stream, compresslevel=_GZIP_LEVEL, mtime=0) as voxels:
            _write_voxels(voxels, masks, places, layers, geometry)


def assign_layers(masks: Sequence[PackedMask]) -> list[tuple[int, int]]:
    """Layer and label value of each mask: the first layer where it overlaps nothing, labels from 1."""
    occupants: list[list[PackedMask]] = []
    places = []
    for mask in masks:
        layer = 0
        while layer < len(occupants) and (
            len(occupants[layer]) >= MAX_LABEL or any(mask.overlaps(other) for other in occupants[layer])
        ):
            layer += 1
        if layer == len(occupants):
            occupants.append([])
        occupants[layer].append(mask)
        places.append((layer, len(occupants[layer])))
    return places


def _packed(segment: Segment, geometry: Geometry) -> PackedMask:
    mask = segment.mask if isinstance(segment.mask, PackedMask) else PackedMask.from_array(segment.mask)
    if mask.shape != geometry.shape_kji:
        raise ValueError(f"mask of shape {mask.shape} does not fit a grid of shape {geometry.shape_kji}")
    return mask


def _write_voxels(
    stream: gzip.GzipFile,
    masks: Sequence[PackedMask],
    places: Sequence[tuple[int, int]],
    layers: int,
    geometry: Geometry,
) -> None:
    k_count, j_count, i_count = geometry.shape_kji
    bounds = [mask.bounds() for mask in masks]
    for k in range(k_count):
        plane = np.zeros((j_count, i_count, layers), dtype=np.uint8)
        for mask, bound, (layer, label) in zip(masks, bounds, places, strict=True):
            if bound is not None and bound[0][0] <= k <= bound[0][1]:
                plane[..., layer][mask.plane(k)] = label
        stream.write(plane.tobytes())


def _header(
    segments: Sequence[Segment],
    masks: Sequence[PackedMask],
    places: Sequence[tuple[int, int]],
    layers: int,
    geometry: Geometry,
) -> bytes:
    lps = geometry.affine_lps
    directions = [_vector(lps[:3, axis]) for axis in range(3)]
    sizes = [str(n) for n in geometry.shape_ijk]
    kinds = ["domain"] * 3
    if layers > 1:
        directions, sizes, kinds = ["none", *directions], [str(layers), *sizes], ["list", *kinds]
    lines = [
        "NRRD0004",
        "# Complete NRRD file format specification at:",
        "# http://teem.sourceforge.net/nrrd/format.html",
        "type: unsigned char",
        f"dimension: {len(sizes)}",
        "space: left-posterior-superior",
        f"sizes: {' '.join(sizes)}",
        f"space directions: {' '.join(directions)}",
        f"kinds: {' '.join(kinds)}",
        "encoding: gzip",
        f"space origin: {_vector(lps[:3, 3])}",
    ]
    used: set[str] = set()
    for index, (segment, mask, (layer, label)) in enumerate(zip(segments, masks, places, strict=True)):
        identifier = segment.id or _free_identifier(segments, used)
        if identifier in used:
            raise ValueError(f"segment identifier {identifier} is used twice")
        used.add(identifier)
        tags = {TERMINOLOGY_TAG: segment.terminology} if segment.terminology else {}
        tags.update(segment.tags)
        lines += [
            _pair(f"Segment{index}_{name}", value)
            for name, value in (
                ("Color", " ".join(f"{min(max(c, 0.0), 1.0):.9g}" for c in segment.color)),
                ("ColorAutoGenerated", "0"),
                ("Extent", _extent(mask)),
                ("ID", identifier),
                ("LabelValue", str(label)),
                ("Layer", str(layer)),
                ("Name", segment.name),
                ("NameAutoGenerated", "0"),
                ("Tags", _tag_list(tags)),
            )
        ]
    lines += [
        _pair("Segmentation_ContainedRepresentationNames", "Binary labelmap|"),
        _pair("Segmentation_ConversionParameters", f"Reference image geometry|{_grid(geometry)}|&"),
        _pair("Segmentation_MasterRepresentation", "Binary labelmap"),
        _pair("Segmentation_ReferenceImageExtentOffset", "0 0 0"),
    ]
    return ("\n".join(lines) + "\n\n").encode("utf-8")


def _free_identifier(segments: Sequence[Segment], used: set[str]) -> str:
    taken = used | {segment.id for segment in segments}
    number = len(used) + 1
    while f"Segment_{number}" in taken:
        number += 1
    return f"Segment_{number}"


def _tag_list(tags: dict[str, str]) -> str:
    return "".join(f"{escape_tag(key, key=True)}:{escape_tag(value)}|" for key, value in tags.items())


def _extent(mask: PackedMask) -> str:
    """First and last index along i, j and k; Slicer's notation for nothing is a last index of -1."""
    bounds = mask.bounds()
    if bounds is None:
        return "0 -1 0 -1 0 -1"
    return " ".join(f"{first} {last}" for first, last in reversed(bounds))


def _grid(geometry: Geometry) -> str:
    """The grid as Slicer's "Reference image geometry", so that later edits stay on the image's voxels."""
    numbers = [_number(value) for value in geometry.affine.ravel()]
    extent = [text for n in geometry.shape_ijk for text in ("0", str(n - 1))]
    return "".join(f"{text};" for text in numbers + extent)


def _vector(values: np.ndarray) -> str:
    return "(" + ",".join(_number(v) for v in values) + ")"


def _number(value: float) -> str:
    """Shortest text that reads back as the same 64-bit number."""
    return repr(float(value) + 0.0)


def _pair(key: str, value: str) -> str:
    """A NRRD key/value pair, with the two escapes that the format defines."""
    escaped = value.replace("\\", "\\\\").replace("\n", "\\n")
    return f"{key}:={escaped}"
