"""The volumes of a folder and of the folders in it, and fingerprints of what is in them."""

from __future__ import annotations

import hashlib
import os
from dataclasses import dataclass
from pathlib import Path

from progidiff.errors import InputError
from progidiff.volumes.dicom import is_dicom_file
from progidiff.volumes.formats import ITK_SUFFIXES, NIFTI_SUFFIXES
from progidiff.volumes.reading import series_uid

#: Label maps by their names: nnU-Net's folders, Slicer's segmentations.
_LABEL_FOLDERS = frozenset({"labelstr", "labelsts"})
_LABEL_SUFFIXES = (".seg.nrrd", ".seg.nhdr", ".seg.nii.gz", ".seg.nii")
_BLOCK = 1 << 20


@dataclass(frozen=True)
class Candidate:
    """A file, or a folder with DICOM images, that should hold a volume.

    Attributes:
        path: where it is.
        name: its path relative to the searched folder, with forward slashes.
    """

    path: Path
    name: str


def find_volumes(folder: Path) -> list[Candidate]:
    """Files in a format of :mod:`progidiff.volumes.reading`, and folders that hold DICOM images, by name.

    A series that is spread over several folders is one volume, of the folder that holds them. Hidden entries,
    nnU-Net's label folders and segmentation files are passed over. Links to folders are not followed.

    Raises:
        InputError: there is no such folder, or no volume in it.
    """
    folder = Path(folder)
    if not folder.is_dir():
        raise InputError(f"There is no folder {folder}; give the folder that holds the volumes.")
    found: list[Candidate] = []
    series: dict[str, list[Path]] = {}
    for directory, folders, names in os.walk(folder):
        folders[:] = sorted(n for n in folders if not n.startswith(".") and n.lower() not in _LABEL_FOLDERS)
        here = Path(directory)
        others = []
        for name in sorted(n for n in names if not n.startswith(".")):
            lower = name.lower()
            if lower.endswith(_LABEL_SUFFIXES):
                continue
            if lower.endswith((*NIFTI_SUFFIXES, *ITK_SUFFIXES)):
                found.append(_candidate(here / name, folder))
            else:
                others.append(here / name)
        if any(_is_dicom(path) for path in others):
            series.setdefault(series_uid(here) or str(here), []).append(here)
    places = {Path(os.path.commonpath(parts)) for parts in series.values()}
    found += [_candidate(place, folder) for place in places]
    if not found:
        raise InputError(f"The folder {folder} holds no volumes (NIfTI, NRRD, MetaImage or DICOM); give another one.")
    return sorted(found, key=lambda c: c.name)


def fingerprint(path: Path) -> str:
    """BLAKE2 digest of a file's content, or of the names and contents of the DICOM files in a folder and below it.

    Raises:
        InputError: something in it cannot be read.
    """
    digest = hashlib.blake2b(digest_size=16)
    try:
        if path.is_dir():
            for entry in sorted(p for p in path.rglob("*") if not p.name.startswith(".") and _is_dicom(p)):
                name = entry.relative_to(path).as_posix()
                digest.update(f"{name}\0{entry.stat().st_size}\0".encode(errors="surrogateescape"))
                _feed(digest, entry)
        else:
            _feed(digest, path)
            raw = _raw_part(path)
            if raw is not None:
                _feed(digest, raw)
    except OSError as error:
        raise InputError(f"{path} cannot be opened; check its permissions.") from error
    return digest.hexdigest()


def _candidate(path: Path, folder: Path) -> Candidate:
    # a name that is not UTF-8 could not be written into the result
    name = path.relative_to(folder).as_posix().encode(errors="surrogateescape").decode(errors="backslashreplace")
    return Candidate(path, name)


def _is_dicom(path: Path) -> bool:
    try:
        return path.is_file() and is_dicom_file(path)
    except OSError:
        return False  # a locked file beside the images; whether the series is whole is for the reader to say


def _raw_part(path: Path) -> Path | None:
    """The file beside a ``.mhd`` or ``.nhdr`` header that holds its voxels."""
    if path.suffix.lower() not in (".mhd", ".nhdr"):
        return None
    beside = [path.with_suffix(ending) for ending in (".raw", ".zraw", ".raw.gz")]
    return next((p for p in beside if p.is_file()), None)


def _feed(digest: hashlib.blake2b, path: Path) -> None:
    with path.open("rb") as stream:
        while block := stream.read(_BLOCK):
            digest.update(block)
