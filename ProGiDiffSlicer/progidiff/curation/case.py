"""One case of a curated set: what is saved, and what is read back."""

from __future__ import annotations

import json
import re
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

import numpy as np

from progidiff.errors import DatasetError, InputError
from progidiff.volumes.geometry import Geometry

Modality = Literal["CT", "MR"]

FORMAT_VERSION = "1.0"
FILE_ENDING = ".nii.gz"
IDENTIFIER = re.compile(r"[0-9a-f]{32}")
#: Everything that a case's file may hold; anything else could be about a patient.
FIELDS = frozenset(
    {
        "format_version", "id", "modality", "plane", "labels", "shape_kji", "affine", "image", "label", "prompt", "code",
        "proposal", "edited", "editor", "model_id", "adapter_id", "dice_to_proposal", "volume_key", "patient_key",
    }
)  # fmt: skip
_PLANES = ("axial", "coronal", "sagittal")


@dataclass(frozen=True, eq=False)
class NewCase:
    """A case to be saved.

    Attributes:
        image: (K, J, I), raw scanner values of any numeric type.
        affine: (4, 4), IJK to RAS in mm.
        masks: target key to bool (K, J, I); they must not overlap. Only these targets are known in the case.
        modality: "CT" or "MR".
        plane: of the slices.
        prompt: as it was typed; it names targets.
        code: the target's terminology, or ``None``.
        proposal: the proposal that it came from (seed, index, rank, score, proposals, steps, scheduler, everywhere),
            or ``None``.
        edited: whether a person changed it.
        editor: a random text that stands for that person.
        model_id, adapter_id: what made the proposal.
        dice_to_proposal: Dice of the mask to that proposal, or ``None``.
        volume_key: a digest of the whole volume's content; the set's secret is mixed into it.
        patient_key: see :mod:`progidiff.curation.keys`.
    """

    image: np.ndarray
    affine: np.ndarray
    masks: Mapping[str, np.ndarray]
    modality: Modality
    plane: str
    prompt: str
    code: Mapping[str, Any] | None = None
    proposal: Mapping[str, Any] | None = None
    edited: bool = False
    editor: str = ""
    model_id: str = ""
    adapter_id: str | None = None
    dice_to_proposal: float | None = None
    volume_key: str = ""
    patient_key: str | None = None

    def check(self) -> Geometry:
        """The grid of the case.

        Raises:
            InputError: something that cannot be saved.
        """
        image = np.asarray(self.image)
        if image.ndim != 3 or image.dtype.kind not in "iuf" or image.size == 0:
            raise InputError("A training example needs a volume of plain numbers with three axes.")
        if not np.isfinite(image).all():
            raise InputError("The image holds values that are not numbers; repair it before saving it as an example.")
        if self.modality not in ("CT", "MR") or self.plane not in _PLANES:
            raise InputError("A training example is CT or MR, and its slices are axial, coronal or sagittal.")
        if not self.masks:
            raise InputError("A training example needs at least one target.")
        taken = np.zeros(image.shape, dtype=bool)
        for target, mask in self.masks.items():
            outline = np.asarray(mask)
            if outline.shape != image.shape or outline.dtype != bool:
                raise InputError(f"The mask of {target} does not lie on the image's grid.")
            if (taken & outline).any():
                raise InputError("Targets of one example must not overlap; save them as separate examples.")
            taken |= outline
        if not taken.any():
            raise InputError("The segment is empty in these slices; there is nothing to learn from it.")
        return Geometry((image.shape[2], image.shape[1], image.shape[0]), np.asarray(self.affine, dtype=np.float64))


@dataclass(frozen=True)
class CuratedCase:
    """A case in a set.

    Attributes:
        id: random, 32 hex digits.
        modality, plane: of its slices.
        targets: the targets that are known in it.
        label_ids: their values in the label map.
        image_path, label_path: its files.
        facts: everything else that its file says.
        volume_key, patient_key: see :mod:`progidiff.curation.keys`.
    """

    id: str
    modality: Modality
    plane: str
    targets: tuple[str, ...]
    label_ids: Mapping[str, int]
    image_path: Path
    label_path: Path
    facts: Mapping[str, Any] = field(repr=False)

    @property
    def volume_key(self) -> str:
        return str(self.facts["volume_key"])

    @property
    def patient_key(self) -> str | None:
        key = self.facts["patient_key"]
        return None if key is None else str(key)

    def read(self) -> tuple[np.ndarray, np.ndarray, dict[str, np.ndarray]]:
        """Image (K, J, I), affine float64 (4, 4) IJK to RAS, and bool (K, J, I) by target.

        Raises:
            DatasetError: a file is missing or damaged, or they do not fit together.
        """
        image, labels = read_image(self.image_path), read_image(self.label_path)
        if list(image.shape) != list(self.facts["shape_kji"]) or labels.shape != image.shape:
            raise DatasetError(f"The files of case {self.id} do not lie on one grid; remove the case with 'curate remove'.")
        affine = np.array(self.facts["affine"], dtype=np.float64)
        return image, affine, {target: labels == value for target, value in self.label_ids.items()}


def parse_case(path: Path, dataset: Path) -> CuratedCase:
    """A case by its file.

    Raises:
        DatasetError: it is damaged or of a newer format.
    """
    try:
        facts = json.loads(path.read_text(encoding="utf-8"))
        if str(facts["format_version"]).split(".")[0] != FORMAT_VERSION.split(".")[0]:
            raise DatasetError(f"The case {path.stem} was saved by a newer version; install that version to use it.")
        identifier = str(facts["id"])
        if identifier != path.stem or not IDENTIFIER.fullmatch(identifier):
            raise ValueError("another id than its file's name")
        ids = {str(target): int(value) for target, value in facts["labels"].items()}
        if facts["modality"] not in ("CT", "MR") or not ids or "volume_key" not in facts or "patient_key" not in facts:
            raise ValueError("fields are missing")
        for part in ("image", "label"):
            if not isinstance(facts[part]["sha256"], str) or not isinstance(facts[part]["bytes"], int):
                raise TypeError("checksums are missing")
        np.array(facts["affine"], dtype=np.float64).reshape(4, 4)
        plane, _ = str(facts["plane"]), list(facts["shape_kji"])
    except DatasetError:
        raise
    except Exception as error:  # there is no end to how a file can be damaged, and the other cases are sound
        raise DatasetError(f"The file of case {path.stem} is damaged ({error}); restore it from a copy.") from error
    image, label = case_files(dataset, identifier)
    return CuratedCase(identifier, facts["modality"], plane, tuple(ids), ids, image, label, facts)


def case_files(dataset: Path, identifier: str) -> tuple[Path, Path]:
    """Where nnU-Net expects image and label map of a case."""
    return dataset / "imagesTr" / f"{identifier}_0000{FILE_ENDING}", dataset / "labelsTr" / f"{identifier}{FILE_ENDING}"


def write_image(path: Path, array: np.ndarray, geometry: Geometry) -> None:
    """Write an array (K, J, I) with its geometry and nothing else."""
    plain = np.ascontiguousarray(array, dtype=array.dtype.newbyteorder("="))
    if plain.dtype == np.float16:
        plain = plain.astype(np.float32)
    import SimpleITK as sitk  # not when Slicer's panel opens

    try:
        sitk.WriteImage(geometry.to_sitk(plain), str(path), useCompression=True)
    except RuntimeError as error:
        raise OSError(None, "the image could not be written") from error


def read_image(path: Path) -> np.ndarray:
    """The array (K, J, I) of a file of a case.

    Raises:
        DatasetError: missing or damaged.
    """
    import SimpleITK as sitk

    try:
        return np.asarray(sitk.GetArrayFromImage(sitk.ReadImage(str(path))))
    except RuntimeError as error:
        raise DatasetError(f"{path.name} is missing or damaged; check the set with 'progidiff curate verify'.") from error
