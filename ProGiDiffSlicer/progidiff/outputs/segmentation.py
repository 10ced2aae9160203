"""Slicer segmentations: ``.seg.nrrd`` with names, colours, terminology and overlapping segments.

The layout is Slicer's own (vtkMRMLSegmentationStorageNode): segments that overlap lie in different layers,
the layers are the first, fastest axis of a 4-D NRRD of kind ``list``, and ``Segment<n>_...`` keys say which
label in which layer is which segment. No library writes that without holding all layers in memory, so the
header is written here (NRRD format definition, revision 4) and the voxels are streamed through gzip, plane by
plane.

Plain volumes on the grid of an image are written here too.
"""

from __future__ import annotations

import colorsys
import gzip
import re
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from progidiff.errors import OutputError
from progidiff.places import atomic_file
from progidiff.volumes.geometry import Geometry
from progidiff.volumes.slicing import PackedMask
from progidiff.wire.request import ProposeRequest

if TYPE_CHECKING:
    import nibabel as nib

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
        tags: further tags, kept exactly whatever characters they hold: see :func:`escape_tag`.
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


def shade(rgb255: tuple[int, int, int], place: int, count: int) -> tuple[float, float, float]:
    """Colour (0..1) of the ``place``-th of ``count`` proposals: the target's own first, then lighter and darker.

    The hue stays the target's; lightness moves in growing steps so that neighbours in rank are told apart.
    """
    red, green, blue = (channel / 255.0 for channel in rgb255)
    if place == 0:
        return red, green, blue
    hue, light, saturation = colorsys.rgb_to_hls(red, green, blue)
    levels = max(1, count // 2)
    step = (place + 1) // 2 / levels
    moved = light + (0.92 - light) * 0.75 * step if place % 2 else light - (light - 0.12) * 0.65 * step
    return colorsys.hls_to_rgb(hue, min(max(moved, 0.0), 1.0), saturation)


def escape_tag(text: str, *, key: bool = False) -> str:
    """Protect the characters that Slicer's tag list cannot hold: ``|`` anywhere and ``:`` in a key.

    Slicer writes tags as ``key:value|key:value|`` without any protection, so a value is cut at its first
    ``|`` and a key at its first ``:``. They become ``%7C`` and ``%3A``; all other text, and so nearly every
    tag, stays readable as it is. ``unescape_tag`` gives the text back exactly.
    """
    special = r"\||\r|:" if key else r"\||\r"
    return re.sub(special + r"|%(?=7C|3A|0D|25)", lambda m: f"%{ord(m.group()):02X}", text)


def unescape_tag(text: str) -> str:
    """The text that ``escape_tag`` was given."""
    return re.sub("%(7C|3A|0D|25)", lambda m: chr(int(m.group(1), 16)), text)


def tag_text(value: Any) -> str:
    """A fact as the text of a tag: "" for nothing, 1 and 0 for yes and no, a range of slices as people count them."""
    if value is None:
        return ""
    if isinstance(value, bool):
        return "1" if value else "0"
    if isinstance(value, tuple):
        is_range = bool(value) and isinstance(value[0], int)
        return f"{value[0] + 1}-{value[1]}" if is_range else "; ".join(value)
    return repr(float(value)) if isinstance(value, float) else str(value)


def request_tags(request: ProposeRequest) -> dict[str, str]:
    """Tags of a segment that say all that was asked for."""
    return {f"ProGiDiff.{name}": tag_text(value) for name, value in vars(request).items()}


def write_volume(path: Path, array: np.ndarray, geometry: Geometry) -> None:
    """Write an array as .nii.gz, .nii, .nrrd or .mha, in exactly the given geometry.

    NIfTI stores the affine as 32-bit numbers, so a geometry that was read from NIfTI comes back unchanged;
    the other formats store 64-bit numbers.

    Args:
        path: file to write; an existing one is replaced.
        array: (K, J, I) of bool (written as 0 and 1), integers or float32; float64 is written as float32.
        geometry: grid of the array.

    Raises:
        OutputError: unknown ending, read-only folder or full disk; no partial file is left.
        ValueError: the array does not fit the geometry.
    """
    path = Path(path)
    if array.shape != geometry.shape_kji:
        raise ValueError(f"array of shape {array.shape} does not fit a grid of shape {geometry.shape_kji}")
    if array.dtype == bool:
        array = array.astype(np.uint8)
    elif array.dtype == np.float64:
        array = array.astype(np.float32)
    name = path.name.lower()
    if name.endswith((".nii.gz", ".nii")):
        with atomic_file(path) as staged:
            _nifti(array, geometry).to_filename(staged)
    elif name.endswith((".nrrd", ".mha")):
        import SimpleITK as sitk  # not when Slicer's panel opens

        with atomic_file(path) as staged:
            try:
                sitk.WriteImage(geometry.to_sitk(array), str(staged), useCompression=True)
            except RuntimeError as error:
                raise OutputError(f"{path} could not be written; check the free space and permissions.") from error
    else:
        raise OutputError(f"{path.name} has no known ending; use .nii.gz, .nii, .nrrd or .mha.")


def _nifti(array: np.ndarray, geometry: Geometry) -> nib.Nifti1Image:
    import nibabel as nib  # which Slicer's own Python lacks

    image = nib.Nifti1Image(array.T, geometry.affine)
    # Both matrices, so that readers which prefer either place the image alike; code 1 is "scanner".
    image.set_sform(geometry.affine, code=1)
    image.set_qform(geometry.affine, code=1)
    image.header.set_xyzt_units("mm")
    return image
