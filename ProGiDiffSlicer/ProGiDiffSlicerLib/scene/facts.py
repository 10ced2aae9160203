"""What a training example says of itself beside its voxels: target, codes, modality, and which patient it belongs to."""

from __future__ import annotations

from functools import cache
from typing import Any

import numpy as np
import slicer

from progidiff.curation import keys
from progidiff.targets import Target, catalog, find_target, target_for
from progidiff.volumes import values
from ProGiDiffSlicerLib.scene.provenance import get_tag, read_provenance
from ProGiDiffSlicerLib.scene.volumes import Modality

_LOOKED_AT = 100_000


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
            return keys.patient_key(secret, patient)
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
