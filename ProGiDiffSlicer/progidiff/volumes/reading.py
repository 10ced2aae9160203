"""Reading a CT or MR volume from NIfTI, NRRD, MetaImage or DICOM, with its exact place in the patient.

Whatever cannot be used ends in an ``InputError`` of one sentence; nothing is guessed, resampled or turned.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import SimpleITK as sitk

from progidiff.errors import InputError, ProGiDiffError
from progidiff.volumes import dicom
from progidiff.volumes.formats import (
    ITK_SUFFIXES,
    NIFTI_SUFFIXES,
    damaged,
    is_text,
    not_a_volume,
    read_itk,
    read_nifti,
    too_large,
)
from progidiff.volumes.geometry import Geometry

FORMATS = "NIfTI (.nii, .nii.gz), NRRD (.nrrd), MetaImage (.mha, .mhd) or a folder of DICOM images"


@dataclass(frozen=True, eq=False)
class Volume:
    """A volume as it is stored.

    Attributes:
        array: int16 (where the stored values are whole and fit) or float32, (K, J, I), contiguous; Hounsfield
            units for CT.
        geometry: its grid in the patient.
        modality: what the file says, as DICOM codes it ("CT", "MR", "PT" and so on); NIfTI and NRRD do not say it.
        name: file or folder name without its ending.
        dicom_files: the DICOM images that it was read from; empty for other formats.
        warnings: sentences that a user should read before the image is used.
    """

    array: np.ndarray
    geometry: Geometry
    modality: str | None
    name: str
    dicom_files: tuple[Path, ...] = ()
    warnings: tuple[str, ...] = ()


def read_volume(path: Path | str, *, allow_uniform: bool = False, series: str | None = None) -> Volume:
    """Read a volume.

    Args:
        path: a file in one of ``FORMATS``, or a folder with the DICOM images of one series.
        allow_uniform: accept an image in which every voxel has the same value, such as an empty label map.
        series: which one of several series in a folder, by its number or the end of its UID.

    Raises:
        InputError: the image is missing, unreadable, not a scalar 3-D (or 2-D) image, or useless as it is.
    """
    path = Path(path)
    if not is_text(path):
        name = str(path).encode(errors="surrogateescape").decode(errors="backslashreplace")
        raise InputError(f"The name {name} is not written in this system's characters; rename the file or folder.")
    modality: str | None = None
    warnings: tuple[str, ...] = ()
    files: tuple[Path, ...] = ()
    with _quiet_itk():
        is_folder = _is_folder(path)
        if series is not None and not is_folder:
            raise InputError(f"{path.name} is a single file, which has no series to choose; leave that choice out.")
        if is_folder or _is_dicom(path):
            array, geometry, modality, warnings, files = _dicom(path, series)
        elif path.name.lower().endswith(NIFTI_SUFFIXES):
            array, geometry = read_nifti(path)
        elif path.name.lower().endswith(ITK_SUFFIXES):
            array, geometry, modality = read_itk(path)
        else:
            raise InputError(f"{path.name} is not an image in a known format; give {FORMATS}.")
    try:
        checked = _checked(array, path.name, allow_uniform)
    except MemoryError as error:
        raise too_large(path.name) from error
    return Volume(checked, geometry, modality, volume_name(path), files, warnings)


def series_uid(folder: Path) -> str:
    """UID of the DICOM series that the first image directly in a folder belongs to; "" where there is none."""
    with _quiet_itk():
        try:
            return dicom.series_uid(folder)
        except Exception:  # whatever is wrong with the images is told when they are read
            return ""


def volume_name(path: Path) -> str:
    """File or folder name without the ending of an image format."""
    name = path.name or path.resolve().name
    for suffix in (".seg.nrrd", *NIFTI_SUFFIXES, *ITK_SUFFIXES, ".dcm"):
        if name.lower().endswith(suffix) and len(name) > len(suffix):
            return name[: -len(suffix)]
    return name


def _is_folder(path: Path) -> bool:
    """Whether the path is a folder; refuses what is missing, empty or locked."""
    try:
        if path.is_dir():
            return True
        with path.open("rb") as stream:
            empty = not stream.read(1)
    except FileNotFoundError as error:
        raise InputError(f"There is no file or folder at {path}; check the path.") from error
    except (OSError, ValueError) as error:
        raise InputError(f"{path} cannot be opened; check its spelling and its permissions.") from error
    if empty:
        raise InputError(f"{path.name} is an empty file; copy or export the image again.")
    return False


def _is_dicom(path: Path) -> bool:
    return not path.name.lower().endswith((*NIFTI_SUFFIXES, *ITK_SUFFIXES)) and dicom.is_dicom_file(path)


def _dicom(path: Path, series: str | None) -> dicom.Series:
    try:
        return dicom.read_folder(path, series) if path.is_dir() else dicom.read_file(path)
    except ProGiDiffError:
        raise
    except MemoryError as error:
        raise too_large(path.name) from error
    except Exception as error:  # GDCM has its own ideas of what to throw at a file that it did not expect
        raise damaged(path.name, "DICOM images") from error


@contextmanager
def _quiet_itk() -> Iterator[None]:
    """Keep ITK's warnings off the terminal: what a user must know is said by our own errors."""
    shown = sitk.ProcessObject.GetGlobalWarningDisplay()
    sitk.ProcessObject.SetGlobalWarningDisplay(False)
    try:
        yield
    finally:
        sitk.ProcessObject.SetGlobalWarningDisplay(shown)


def _checked(array: np.ndarray, name: str, allow_uniform: bool) -> np.ndarray:
    """The array as int16 or float32, contiguous; refuses what is not finite or (unless allowed) uniform."""
    if array.dtype.kind not in "biuf":
        raise not_a_volume(name, "an image of complex or structured values")
    low, high = array.min(), array.max()
    if array.dtype.kind in "biu" and low >= -32768 and high <= 32767:
        result = np.ascontiguousarray(array, dtype=np.int16)
    else:
        with np.errstate(over="ignore", invalid="ignore"):
            result = np.ascontiguousarray(array, dtype=np.float32)
        bad = result.size - int(np.count_nonzero(np.isfinite(result)))
        if bad:
            raise InputError(
                f"{name} has {bad:,} voxels that are not finite numbers (NaN or infinity); "
                "replace them by the background's value and try again."
            )
    if low == high and not allow_uniform:
        raise InputError(f"Every voxel of {name} has the value {low:g}, so there is nothing to see; choose another image.")
    return result
