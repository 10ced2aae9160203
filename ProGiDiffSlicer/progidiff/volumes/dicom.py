"""Reading one DICOM series as a volume, through GDCM in SimpleITK."""

from __future__ import annotations

import os
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import SimpleITK as sitk

from progidiff.errors import InputError
from progidiff.volumes.geometry import LPS_FROM_RAS, MAX_SHEAR, Geometry
from progidiff.volumes.problems import Modality, check_size, damaged, not_a_volume, too_large

MODALITY, SERIES, FRAMES = "0008|0060", "0020|000e", "0028|0008"
POSITION, ORIENTATION, SAMPLES = "0020|0032", "0020|0037", "0028|0002"

# Objects that GDCM lists like images but that are not scans.
NOT_SCANS = frozenset({"SEG", "RTDOSE", "RTSTRUCT", "RTPLAN", "SR", "PR", "KO", "REG", "DOC"})

# Deviation of a slice from even spacing that is still rounding: this share of the spacing.
UNEVEN = 0.02


def is_dicom_file(path: Path) -> bool:
    """Whether the file has DICOM's preamble."""
    with path.open("rb") as stream:
        return stream.read(132)[128:] == b"DICM"


# Array, geometry, modality, and the files of its slices.
Series = tuple[np.ndarray, Geometry, Modality | None, tuple[Path, ...]]


def read_folder(folder: Path) -> Series:
    """Read the only image series in a folder, or in the folders below it.

    Returns:
        Array (K, J, I) with the rescale slope and intercept applied, its geometry, the modality if CT or MR, and the files.

    Raises:
        InputError: no images, more than one series, or a series that is not one evenly spaced stack.
    """
    series = _image_series(folder)
    name = folder.name or folder.resolve().name
    if not series:
        raise InputError(f"The folder {name} holds no DICOM images; give the folder of one series, or an image file.")
    if len(series) > 1:
        counts = ", ".join(f"{len(files)} {modality or 'unknown'}" for modality, files in series)
        raise InputError(
            f"The folder {name} holds {len(series)} image series ({counts} images); "
            "copy the wanted series into a folder of its own and give that."
        )
    return read_files(series[0][1], name)


def read_files(files: Sequence[Path], name: str) -> Series:
    """Read the files of one series, in slice order; errors and results as for ``read_folder``."""
    heads = [_head(file) for file in files]
    if any(head is None for head in heads):
        raise damaged(name, "DICOM images")
    known = [head for head in heads if head is not None]
    if any(_count(head, FRAMES) > 1 for head in known):
        raise InputError(f"{name} is a multi-frame DICOM image; load it in Slicer and save the volume as NRRD or NIfTI.")
    if any(_count(head, SAMPLES) > 1 for head in known):
        raise not_a_volume(name, "a colour DICOM image")
    if len({head.GetSize() for head in known}) > 1:
        raise InputError(f"The images of {name} differ in size (a scout among them?); keep only the slices of one scan.")
    check_size(name, (*known[0].GetSize()[:2], len(known)))

    affine = _affine_lps(known, name)
    reader = sitk.ImageSeriesReader()
    reader.SetImageIO("GDCMImageIO")
    reader.SetFileNames([str(file) for file in files])
    try:
        array = sitk.GetArrayFromImage(reader.Execute())
    except MemoryError as error:
        raise too_large(name) from error
    except RuntimeError as error:
        raise damaged(name, "DICOM images") from error
    k, j, i = array.shape
    said = _tag(known[0], MODALITY)
    modality: Modality | None = "CT" if said == "CT" else "MR" if said == "MR" else None
    return _smallest(array), Geometry((i, j, k), LPS_FROM_RAS @ affine), modality, tuple(files)


def _image_series(folder: Path) -> list[tuple[str, list[Path]]]:
    """Modality and files in slice order of each series of scans in the folder or below it."""
    found = []
    for directory, _, names in sorted(os.walk(folder)):
        if not names:
            continue
        for uid in sitk.ImageSeriesReader.GetGDCMSeriesIDs(directory):
            files = [Path(f) for f in sitk.ImageSeriesReader.GetGDCMSeriesFileNames(directory, uid)]
            head = _head(files[0]) if files else None
            if head is not None and _tag(head, MODALITY) not in NOT_SCANS:
                _refuse_damaged(Path(directory), _tag(head, SERIES), files)
                found.append((_tag(head, MODALITY), files))
    return found


def _refuse_damaged(directory: Path, series_uid: str, listed: Sequence[Path]) -> None:
    """GDCM silently leaves out images that are cut off; at an end of the stack nobody would notice."""
    names = {file.name for file in listed}
    damaged_images = 0
    for file in directory.iterdir():
        if file.name in names or not file.is_file() or not is_dicom_file(file):
            continue
        with file.open("rb") as stream:
            damaged_images += series_uid.encode() in stream.read(1 << 16)
    if series_uid and damaged_images:
        raise InputError(
            f"The folder {directory.name} has {damaged_images} damaged image{'s'[: damaged_images - 1]} "
            "of its series; copy or export the series again."
        )


def _head(file: Path) -> sitk.ImageFileReader | None:
    """The read header of a DICOM file; ``None`` when it holds no readable image."""
    reader = sitk.ImageFileReader()
    reader.SetImageIO("GDCMImageIO")
    reader.SetFileName(str(file))
    try:
        reader.ReadImageInformation()
    except RuntimeError:
        return None
    return reader


def _tag(head: sitk.ImageFileReader, tag: str) -> str:
    return str(head.GetMetaData(tag)).strip(" \0") if head.HasMetaDataKey(tag) else ""


def _count(head: sitk.ImageFileReader, tag: str) -> int:
    text = _tag(head, tag)
    return int(text) if text.isdecimal() else 1


def _numbers(head: sitk.ImageFileReader, tag: str, count: int) -> np.ndarray | None:
    try:
        values = np.array([float(v) for v in _tag(head, tag).split("\\")])
    except ValueError:
        return None
    return values if values.shape == (count,) and np.isfinite(values).all() else None


def _affine_lps(heads: Sequence[sitk.ImageFileReader], name: str) -> np.ndarray:
    """IJK-to-LPS matrix (DICOM PS3.3 C.7.6.2.1.1), after checking that the slices are one even stack."""
    positions = [_numbers(head, POSITION, 3) for head in heads]
    orientations = [_numbers(head, ORIENTATION, 6) for head in heads]
    if any(p is None for p in positions) or any(o is None for o in orientations):
        raise InputError(f"The images of {name} do not say where they lie in the patient; export the series again.")
    at = np.array([p for p in positions if p is not None])
    axes = np.array([o for o in orientations if o is not None])
    if np.abs(axes - axes[0]).max() > MAX_SHEAR:
        raise InputError(f"The images of {name} lie in different directions (a scout?); keep only the slices of one scan.")
    along_i, along_j = axes[0, :3], axes[0, 3:]
    spacing = heads[0].GetSpacing()
    if min(spacing[:2]) <= 0:
        raise InputError(f"The images of {name} have a pixel spacing of zero; export the series again.")

    affine = np.eye(4)
    affine[:3, 0] = along_i * spacing[0]
    affine[:3, 1] = along_j * spacing[1]
    affine[:3, 3] = at[0]
    normal = np.cross(along_i, along_j)
    if len(heads) == 1:
        thickness = spacing[2] if len(spacing) > 2 and spacing[2] > 0 else 1.0
        affine[:3, 2] = normal * thickness
        return affine

    step = (at[-1] - at[0]) / (len(at) - 1)
    distance = float(np.linalg.norm(step))
    gaps = np.diff(at @ normal)
    smallest, largest = float(np.abs(gaps).min()), float(np.abs(gaps).max())
    if smallest < 1e-3:
        raise InputError(
            f"Several images of {name} lie at the same place (a dynamic or repeated scan); "
            "copy the images of one scan into a folder of its own."
        )
    if largest - smallest > max(UNEVEN * smallest, 0.01):
        raise InputError(
            f"The slices of {name} are not evenly spaced ({smallest:.3g} to {largest:.3g} mm), "
            "so some may be missing; complete the series or resample it in Slicer first."
        )
    if abs(abs(float(step @ normal)) / distance - 1.0) > MAX_SHEAR**2 / 2:
        raise InputError(
            f"The slices of {name} are tilted against their stack (gantry tilt); "
            "load the series in Slicer, harden its transform and use the saved volume."
        )
    affine[:3, 2] = step
    return affine


def _smallest(array: np.ndarray) -> np.ndarray:
    """GDCM returns float64 for any rescale slope; whole numbers become integers again."""
    if array.dtype.kind == "f" and np.isfinite(array).all() and np.array_equal(array, np.rint(array)):
        return array.astype(np.int32) if np.abs(array).max() < 2**31 else array
    return array
