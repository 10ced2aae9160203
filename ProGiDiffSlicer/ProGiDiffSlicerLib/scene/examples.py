"""What a training example is made of: the voxels of a segment and of its volume, and where they come from.

:func:`examine` looks at the nodes and says what stands in the way; :func:`collect` copies the voxels in portions.
"""

from __future__ import annotations

import enum
import hashlib
from collections.abc import Callable, Generator
from dataclasses import dataclass
from functools import cache
from typing import Any

import numpy as np
import slicer
from slicer.i18n import tr as _

from progidiff import curation
from progidiff.errors import InputError
from progidiff.targets import Target, catalog, find_target, target_for
from progidiff.volumes import values
from progidiff.volumes.geometry import Geometry
from progidiff.volumes.slicing import SlicePlan, plan_slices
from progidiff.volumes.values import NotHounsfield
from ProGiDiffSlicerLib.scene.labelmaps import (
    Index,
    between_nodes,
    grid_of,
    segment_labelmap,
    step_between,
    values_of,
    volume_grid,
)
from ProGiDiffSlicerLib.scene.provenance import Provenance, earlier_provenance, get_tag, read_provenance
from ProGiDiffSlicerLib.scene.volumes import Modality, VolumeImage, frames, still_same, volume_image

# Slices around a segment that say where it ends.
MARGIN = 2
# What is copied or hashed between two events of the application.
_PORTION = 1 << 20

Array = np.ndarray[Any, np.dtype[Any]]


_LOOKED_AT = 100_000


class Slices(enum.Enum):
    """Which slices of the volume an example holds."""

    PROPOSED = "proposed"
    SEGMENT = "segment"
    VOLUME = "volume"

    def label(self) -> str:
        """The choice's text in a combo box."""
        return {
            Slices.PROPOSED: _("Slices that were proposed for"),
            Slices.SEGMENT: _("Slices of the segment and 2 around it"),
            Slices.VOLUME: _("Whole volume"),
        }[self]


@dataclass(frozen=True, eq=False)
class Example:
    """A segment that can be saved.

    Attributes:
        segmentation, segment_id, segment: where it is.
        volume_node: the volume on whose voxels it lies.
        volume: that volume as it is now.
        target: key of the target that it shows.
        modality: "CT" or "MR".
        plan: how the volume is cut: as it was for the proposal that the segment comes from.
        slices: which slices are saved.
        asked: slices that were proposed for, all where that was the whole volume; ``None`` for a segment made by hand.
        facts: where it comes from; ``None`` for a segment made by hand.
        step: whole-number (4, 4), indices of the segment's labelmap to those of the volume.
    """

    segmentation: Any
    segment_id: str
    segment: Any
    volume_node: Any
    volume: VolumeImage
    target: str
    modality: Modality
    plan: SlicePlan
    slices: Slices
    asked: range | None
    facts: Provenance | None
    step: Array


@dataclass(frozen=True, eq=False)
class Voxels:
    """What :func:`collect` copied.

    Attributes:
        image: (K, J, I) of the volume's own values; Hounsfield units where the user had them corrected.
        mask: bool (K, J, I).
        affine: float64 (4, 4), IJK of ``image`` to RAS of the world.
        slices: the slices, counted from 0 along the slice axis of the volume.
        volume_key: the same text for the same volume, whatever part of it is saved; for all frames of a sequence.
    """

    image: Array
    mask: Array
    affine: Array
    slices: range
    volume_key: str


def volume_role(segment_id: str) -> str:
    """Role of a segmentation's reference to the volume for which a segment was accepted."""
    return f"ProGiDiff.Volume.{segment_id}"


def remember_volume(segmentation: Any, segment_id: str, volume_id: str) -> None:
    """Note for which volume a segment was accepted: several volumes may share a grid, and a segmentation."""
    segmentation.SetNodeReferenceID(volume_role(segment_id), volume_id)


def examine(
    segmentation: Any,
    segment_id: str,
    input_volume: Any,
    slices: Slices,
    target: str | None = None,
    modality: Modality | None = None,
    plan: Callable[[Geometry], SlicePlan] = plan_slices,
) -> Example:
    """A segment as an example; voxels are looked at later.

    Args:
        segmentation: the vtkMRMLSegmentationNode, or ``None``.
        segment_id: the segment; its provenance must be up to date.
        input_volume: the volume that is chosen, taken where the segment does not say for which it was accepted.
        slices: which slices.
        target: what it shows; ``None``: what the segment itself says.
        modality: of a volume that does not say it.
        plan: how a volume is cut for which the segment does not say it.

    Raises:
        InputError: it cannot be saved; the sentence says why and what to do.
    """
    segment = None if segmentation is None else segmentation.GetSegmentation().GetSegment(segment_id)
    if segment is None:
        raise InputError(_("Accept a proposal, or choose a segmentation and its segment, to save it as a training example."))
    name = segment.GetName()
    if segment_labelmap(segment) is None:
        raise InputError(_("{segment} is not made of voxels; make Binary labelmap its source.").format(segment=name))
    target = target or target_of(segment)
    if target is None:
        raise InputError(_("Choose under Target what {segment} shows, then save it.").format(segment=name))
    node, step = volume_of(segmentation, segment_id, segment, input_volume)
    playing = frames(node)
    if playing is not None and playing.browser.GetSequenceNode(segmentation) is None:
        text = _(
            "{segmentation} does not change with the frames of {volume}, so that the frame of {segment} is not known; "
            "accept into a new segmentation."
        )
        raise InputError(text.format(segmentation=segmentation.GetName(), volume=node.GetName(), segment=name))
    volume = volume_image(node)
    facts = read_provenance(segment)
    said = "" if facts is None else facts.plane
    cut = plan_slices(volume.geometry, said) if said else plan(volume.geometry)
    asked = None if facts is None else _asked([facts, *earlier_provenance(segment)], cut)
    found = volume.modality or modality or likely_modality(node)
    return Example(segmentation, segment_id, segment, node, volume, target, found, cut, slices, asked, facts, step)


def collect(example: Example) -> Generator[None, None, Voxels]:
    """Copy the voxels of an example, about a megabyte per step.

    Raises:
        InputError: the segment is empty or reaches outside the volume, or something was changed meanwhile.
        MemoryError: there is no room for the copy.
    """
    volume, name = example.volume, example.segment.GetName()
    labelmap, before = segment_labelmap(example.segment), stamp(example.segment)
    mask, occupied = yield from mask_on_volume(example, values_of(labelmap))
    key = yield from _volume_key(example)
    plan = example.plan
    rows = occupied[plan.axis]
    if not rows.any():
        raise InputError(_("{segment} is empty; there is nothing to learn from it.").format(segment=name))
    chosen = _range(example, np.flatnonzero(rows), plan.count)
    box = tuple(slice(chosen.start, chosen.stop) if axis == plan.axis else slice(None) for axis in range(3))
    is_corrected = example.facts is not None and example.facts.corrected
    image = yield from _copied(volume.array_kji[box], odd_values(volume.array_kji) if is_corrected else None)
    cut = yield from _copied(mask[box])
    changed = still_same(example.volume_node.GetScene(), volume.fingerprint) if example.volume_node.GetScene() else ""
    if changed is not None or stamp(example.segment) != before or segment_labelmap(example.segment) is not labelmap:
        raise InputError(_("{segment} or its volume was changed meanwhile; save it again.").format(segment=name))
    first = np.eye(4)
    first[2 - plan.axis, 3] = chosen.start
    return Voxels(image, cut, volume.affine @ first, chosen, key)


def volume_of(segmentation: Any, segment_id: str, segment: Any, input_volume: Any) -> tuple[Any, Array]:
    """The volume on whose voxels a segment lies, and the way there."""
    found = (
        segmentation.GetNodeReference(volume_role(segment_id)),
        input_volume,
        segmentation.GetNodeReference(segmentation.GetReferenceImageGeometryReferenceRole()),
    )
    candidates = [node for node in found if node is not None and node.IsA("vtkMRMLScalarVolumeNode")]
    grid = grid_of(segment_labelmap(segment))
    for node in candidates:
        if node.GetImageData() is None:
            continue
        step = step_between(grid, between_nodes(node, segmentation) @ volume_grid(node))
        if step is not None:
            return node, step
    name = segment.GetName()
    if not candidates:
        text = _("The volume of {segment} is not in the scene; load it and choose it under Prompt.")
        raise InputError(text.format(segment=name))
    text = _(
        "The voxels of {segment} are not those of {volume}, which was moved, resampled or replaced since; "
        "undo that, or accept a proposal for it again."
    )
    raise InputError(text.format(segment=name, volume=candidates[0].GetName()))


def mask_on_volume(example: Example, labelled: tuple[Array, Index]) -> Generator[None, None, tuple[Array, list[Array]]]:
    """The segment on the voxels of its volume, and for each axis which planes hold some of it."""
    values, origin = _turned(*labelled, example.step)
    label = example.segment.GetLabelValue()
    shape = example.volume.array_kji.shape
    mask = np.zeros(shape, dtype=bool)
    occupied = [np.zeros(size, dtype=bool) for size in shape]
    first = [max(0, start) for start in origin]
    last = [min(size, start + count) for size, start, count in zip(shape, origin, values.shape, strict=True)]
    place = tuple(slice(a, max(a, b)) for a, b in zip(first, last, strict=True))
    inside = tuple(slice(a - o, max(a, b) - o) for a, b, o in zip(first, last, origin, strict=True))
    done = 0
    for k, plane in enumerate(values):
        found = plane == label
        if found.any():
            rows, columns = (np.flatnonzero(found.any(axis=axis)) for axis in (1, 0))
            within = inside[1].start <= rows[0] and rows[-1] < inside[1].stop
            within = within and inside[2].start <= columns[0] and columns[-1] < inside[2].stop
            if not within or not inside[0].start <= k < inside[0].stop:
                text = _("{segment} reaches outside {volume}; cut that part off, or choose its own volume under Prompt.")
                raise InputError(text.format(segment=example.segment.GetName(), volume=example.volume.name))
            mask[k + origin[0], place[1], place[2]] = found[inside[1], inside[2]]
            occupied[0][k + origin[0]] = True
            occupied[1][rows + origin[1]] = True
            occupied[2][columns + origin[2]] = True
        done += plane.size
        if done >= _PORTION:
            done = 0
            yield
    return mask, occupied


def _turned(values: Array, origin: Index, step: Array) -> tuple[Array, Index]:
    """A labelmap's voxels as a view in the axis order of the volume, and the volume's index of the first one."""
    turn, shift = step[:3, :3], step[:3, 3]
    source = [int(np.abs(row).argmax()) for row in turn]  # by axis i, j, k of the volume: that of the labelmap
    signs = [int(turn[axis, of]) for axis, of in enumerate(source)]
    counts, starts = values.shape[::-1], origin[::-1]
    first = [
        int(shift[axis]) + (starts[of] if sign > 0 else -(starts[of] + counts[of] - 1))
        for axis, (of, sign) in enumerate(zip(source, signs, strict=True))
    ]
    turned = values.transpose([2 - of for of in source[::-1]])
    turned = turned[tuple(slice(None, None, sign) for sign in signs[::-1])]
    return turned, (first[2], first[1], first[0])


def _volume_key(example: Example) -> Generator[None, None, str]:
    playing = frames(example.volume_node)
    array = example.volume.array_kji
    if playing is not None:
        array = slicer.util.arrayFromVolume(playing.data_node(0))
    digest = hashlib.sha256(f"{array.dtype.str} {array.shape}".encode())
    for portion in _portions(array):
        digest.update(np.ascontiguousarray(array[portion]).reshape(-1).view(np.uint8).data)
        yield
    return digest.hexdigest()[:32]


def _copied(source: Array, odd: NotHounsfield | None = None) -> Generator[None, None, Array]:
    copy = np.empty(source.shape, source.dtype.newbyteorder("<") if odd is None else np.dtype("<f4"))
    for portion in _portions(source):
        copy[portion] = source[portion] if odd is None else odd.corrected(source[portion])
        yield
    return copy


def _portions(array: Array) -> Generator[tuple[Any, ...], None, None]:
    """Places of an array (k, j, i) that hold about a megabyte each."""
    rows = max(1, _PORTION // max(1, array.shape[2] * array.itemsize))
    planes = max(1, rows // max(1, array.shape[1]))
    for k in range(0, array.shape[0], planes):
        for j in range(0, array.shape[1], rows):
            yield slice(k, k + planes), slice(j, j + rows)


def _range(example: Example, filled: Array, count: int) -> range:
    """The slices to save; those in which there is something of the segment always belong to them."""
    if example.slices is Slices.VOLUME:
        return range(count)
    first, last = int(filled[0]), int(filled[-1])
    if example.slices is Slices.PROPOSED and example.asked is not None:
        return range(min(first, example.asked.start), max(last + 1, example.asked.stop))
    return range(max(0, first - MARGIN), min(count, last + 1 + MARGIN))


def _asked(origins: list[Provenance], plan: SlicePlan) -> range:
    """All slices that were proposed for, one or several times; what was proposed on slices of another plane says nothing."""
    ranges, count = [], plan.count
    for facts in origins:
        if facts.plane not in ("", plan.plane):
            continue
        first, stop = facts.request.slices or (0, count)
        ranges.append(range(first, min(count, stop)))
    return range(min(each.start for each in ranges), max(each.stop for each in ranges))


def stamp(segment: Any) -> tuple[Any, ...]:
    """What is different as soon as a segment's voxels are."""
    image = segment_labelmap(segment)
    return (None,) if image is None else (image.GetMTime(), tuple(image.GetExtent()), segment.GetLabelValue())


def likely_modality(node: Any) -> Modality:
    """What a volume that does not say it looks like."""
    return values.likely_modality(_some(slicer.util.arrayFromVolume(node)))


def odd_values(array: np.ndarray) -> values.NotHounsfield | None:
    """What the values of a CT (k, j, i) look like where they cannot be Hounsfield units."""
    return values.not_hounsfield(_some(array))


def _some(array: np.ndarray) -> np.ndarray:
    flat = array.reshape(-1)
    return flat[:: max(1, flat.size // _LOOKED_AT)]


def target_of(segment: Any) -> str | None:
    """Key of the catalogue's target that a segment shows: by its code, its origin or its name; ``None`` if none says it."""
    facts = read_provenance(segment)
    code = _code_of(get_tag(segment, slicer.vtkSegment.GetTerminologyEntryTagName()) or "")
    if facts is not None and facts.target in catalog() and code in (None, _code(target_for(facts.target))):
        return facts.target
    if code in _by_code():
        return _by_code()[code]
    named = find_target(segment.GetName() or "") if facts is None else find_target(facts.target)
    return None if named is None else named.key


def terminology(key: str) -> dict[str, Any]:
    """The codes of a target as they are saved: category, type and modifier with scheme, value and meaning."""
    target = target_for(key)
    codes = {"category": target.category, "type": target.type, "modifier": target.modifier}
    return {
        name: {"scheme": code.scheme, "value": code.value, "meaning": code.meaning}
        for name, code in codes.items()
        if code is not None
    }


def patient_key(volume_node: Any, secret: str) -> str | None:
    """A text that is the same for all volumes of a patient and tells nothing of who that is; ``None`` where nothing says it.

    The patient ID of DICOM is hashed with a secret, because IDs are few enough to try them all.
    """
    scene = volume_node.GetScene()
    tree = None if scene is None else slicer.vtkMRMLSubjectHierarchyNode.GetSubjectHierarchyNode(scene)
    if tree is None:
        return None
    item = tree.GetItemByDataNode(volume_node)
    name = slicer.vtkMRMLSubjectHierarchyConstants.GetDICOMPatientIDAttributeName()
    while item and item != tree.GetSceneItemID():
        patient = (tree.GetItemAttribute(item, name) or "").strip()
        if patient:
            return curation.patient_key(secret, patient)
        item = tree.GetItemParent(item)
    return None


def _code(target: Target) -> tuple[str, str]:
    return target.type.value, target.modifier.value if target.modifier else ""


def _code_of(entry: str) -> tuple[str, str] | None:
    """Type and modifier of a terminology tag; ``None`` where it holds none, or what Slicer gives to every new segment."""
    parts = entry.split("~")
    if len(parts) < 4 or entry == get_tag(slicer.vtkSegment(), slicer.vtkSegment.GetTerminologyEntryTagName()):
        return None
    type_code, modifier = (part.split("^") for part in parts[2:4])
    return (type_code[1], modifier[1] if len(modifier) > 1 else "") if len(type_code) > 1 and type_code[1] else None


@cache
def _by_code() -> dict[tuple[str, str] | None, str]:
    found: dict[tuple[str, str] | None, str] = {}
    for key, target in catalog().items():
        found.setdefault(_code(target), key)
    return found
