"""One case of a curated set: what is saved, what is read back, the steps on a shared folder and the keys."""

from __future__ import annotations

import errno
import hashlib
import hmac
import json
import os
import re
import time
from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

import numpy as np

from progidiff.errors import DatasetError, InputError, OutputError
from progidiff.places import DENIED, FULL
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
        proposal: the proposal that it came from (index, rank, score, all that was asked for), or ``None``.
        edited: whether a person changed it.
        editor: a random text that stands for that person.
        model_id, adapter_id: what made the proposal.
        dice_to_proposal: Dice of the mask to that proposal, or ``None``.
        volume_key: a digest of the whole volume's content; the set's secret is mixed into it.
        patient_key: see :func:`volume_key` and :func:`patient_key`.
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
        volume_key, patient_key: see :func:`volume_key` and :func:`patient_key`.
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


# Steps on a shared folder that are whole or not there: nothing is overwritten, and what is told as done is on the disk.
# Neither locks nor links are needed, which network file systems often lack. Names are random, so that nobody meets anybody.

_TRIES, _PAUSE_S = 20, 0.05


@contextmanager
def explained(folder: Path) -> Iterator[None]:
    """Turn the system's complaint into one sentence.

    Raises:
        OutputError: the folder is full, read-only or gone.
    """
    try:
        yield
    except OSError as error:
        if error.errno in FULL:
            reason = "there is not enough space; free some"
        elif error.errno in DENIED:
            reason = "you may not write there; ask for the permission or choose another folder"
        else:
            reason = f"{error.strerror or error}; check that it can be reached"
        raise OutputError(f'The set of training examples in "{folder}" cannot be changed: {reason}.') from error


def write_json(path: Path, content: Mapping[str, Any]) -> None:
    """Write a new file and have the system write it out."""
    with path.open("x", encoding="utf-8") as stream:
        json.dump(content, stream, indent=1, ensure_ascii=False, sort_keys=True)
        stream.write("\n")
        stream.flush()
        os.fsync(stream.fileno())


def sync_folder(path: Path) -> None:
    """Have the system write a folder's entries out, where it can be told to (Windows does so itself)."""
    try:
        descriptor = os.open(path, os.O_RDONLY)
    except OSError:
        return
    try:
        os.fsync(descriptor)
    except OSError:  # some network file systems cannot
        return
    finally:
        os.close(descriptor)


def move(source: Path, place: Path) -> None:
    """Move a file to a name that nobody has.

    Raises:
        FileExistsError: somebody has it.
    """
    if place.exists():
        raise FileExistsError(errno.EEXIST, "there is such a file already", str(place))
    _patiently(source, place)


def replace(source: Path, place: Path) -> None:
    """Put a file in another one's place; waits a little while somebody reads that one, as Windows demands."""
    _patiently(source, place)


def _patiently(source: Path, place: Path) -> None:
    for attempt in range(_TRIES):
        try:
            os.replace(source, place)
        except PermissionError:
            if attempt == _TRIES - 1:
                raise
            time.sleep(_PAUSE_S)
        else:
            return


def digest(path: Path) -> str:
    """SHA-256 of a file, hex."""
    with path.open("rb") as stream:
        return hashlib.file_digest(stream, "sha256").hexdigest()


# Opaque keys by which cases of one volume, or of one patient, are kept on one side of a split. Whoever holds a set holds the
# images in it, so its keys have to hide no more than what is not in it: which patient that was. A patient's ID is short and
# could be guessed; it is hashed with a secret of the person who saves, which never enters the set. Two people who save cases
# of one patient therefore give different patient keys: then only the same volume joins the cases.

_LENGTH = 32


def volume_key(secret: bytes | str, content: np.ndarray | bytes | str) -> str:
    """Key of a volume: HMAC-SHA256 of its content, hex.

    Args:
        secret: the set's own secret.
        content: voxels (K, J, I), or a digest of them.
    """
    if isinstance(content, np.ndarray):
        header = repr((content.shape, content.dtype.str)).encode()
        content = header + np.ascontiguousarray(content).tobytes()
    return _keyed(secret, content)


def patient_key(secret: bytes | str, identity: bytes | str) -> str:
    """Key of a patient: HMAC-SHA256 of an identifier, hex.

    Args:
        secret: of the person who saves; never the set's.
        identity: what identifies the patient, such as the DICOM patient ID and its issuer.
    """
    return _keyed(secret, identity)


def patient_groups(cases: Iterable[CuratedCase]) -> dict[str, str]:
    """Group of every case by its id: cases that share a volume or a patient key share a group, also through others."""
    parent: dict[str, str] = {}

    def root(name: str) -> str:
        while parent.setdefault(name, name) != name:
            parent[name] = parent[parent[name]]
            name = parent[name]
        return name

    ordered = sorted(cases, key=lambda case: case.id)
    for case in ordered:
        own = root(f"case {case.id}")
        for key in (f"volume {case.volume_key}", f"patient {case.patient_key}" if case.patient_key else ""):
            if key:
                parent[root(key)] = own
                own = root(own)
    names: dict[str, str] = {}
    for case in ordered:  # named by their first case, so that the name does not depend on the order of reading
        names.setdefault(root(f"case {case.id}"), case.id)
    return {case.id: names[root(f"case {case.id}")] for case in ordered}


def _keyed(secret: bytes | str, content: bytes | str) -> str:
    key = secret.encode() if isinstance(secret, str) else secret
    message = content.encode() if isinstance(content, str) else content
    return hmac.new(key, message, hashlib.sha256).hexdigest()[:_LENGTH]
