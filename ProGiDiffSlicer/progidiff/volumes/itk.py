"""Reading NRRD and MetaImage files through SimpleITK."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import SimpleITK as sitk

from progidiff.errors import InputError
from progidiff.volumes.geometry import Geometry
from progidiff.volumes.problems import bad_spacing, check_size, damaged, not_a_volume, too_large

NRRD_SUFFIXES, META_SUFFIXES = (".nrrd", ".nhdr"), (".mha", ".mhd")
SUFFIXES = NRRD_SUFFIXES + META_SUFFIXES

# What MetaImages say, without their prefix, and DICOM's code for it.
_MODALITIES = {"CT": "CT", "MR": "MR", "MRI": "MR", "PET": "PT", "NM": "NM", "US": "US"}


def read(path: Path) -> tuple[np.ndarray, Geometry, str | None]:
    """Read a NRRD or MetaImage file.

    Returns:
        Array (K, J, I), its geometry, and the modality (DICOM's code) where a MetaImage says it; a 2-D image is one slice of
        1 mm.

    Raises:
        InputError: damaged, 4-D, colour or layered, without a spacing, or with singular directions.
    """
    is_nrrd = path.name.lower().endswith(NRRD_SUFFIXES)
    kind = "a NRRD image" if is_nrrd else "a MetaImage"
    _check_declared_spacing(path, kind, is_nrrd)
    reader = sitk.ImageFileReader()
    reader.SetFileName(str(path))
    reader.SetImageIO("NrrdImageIO" if is_nrrd else "MetaImageIO")
    try:
        reader.ReadImageInformation()
        _check_scalar_volume(path.name, reader)
        image = reader.Execute()
    except MemoryError as error:
        raise too_large(path.name) from error
    except RuntimeError as error:
        if "determinant is 0" in str(error):
            raise InputError(
                f"{path.name} has axes that do not span space (singular directions); export it again with its geometry."
            ) from error
        raise (too_large(path.name) if "allocate" in str(error) else damaged(path.name, kind)) from error
    if image.GetDimension() == 4:
        image = image[:, :, :, 0]
    elif image.GetDimension() == 2:
        image = sitk.JoinSeries(image)
    return sitk.GetArrayFromImage(image), Geometry.from_sitk(image), _modality(reader)


def _check_scalar_volume(name: str, reader: sitk.ImageFileReader) -> None:
    size = reader.GetSize()
    components = reader.GetNumberOfComponents()
    if components > 1:
        raise not_a_volume(name, f"an image of {components} values per voxel (colour, vectors or layers)")
    if len(size) > 4 or max(size[3:], default=1) > 1:
        raise not_a_volume(name, f"a series of {size[3]} volumes (4-D)")
    if len(size) < 2:
        raise not_a_volume(name, "an image with a single dimension")
    if min(reader.GetSpacing()) <= 0:
        raise bad_spacing(name, reader.GetSpacing())
    check_size(name, size)


def _modality(reader: sitk.ImageFileReader) -> str | None:
    said = reader.GetMetaData("Modality").strip().upper() if reader.HasMetaDataKey("Modality") else ""
    return _MODALITIES.get(said.removeprefix("MET_MOD_"))


def _check_declared_spacing(path: Path, kind: str, is_nrrd: bool) -> None:
    """Refuse a header with no voxel size or one of zero, for which ITK takes 1 mm or nonsense."""
    with path.open("rb") as stream:
        head = stream.read(1 << 16)
    if is_nrrd and not head.startswith(b"NRRD"):
        raise damaged(path.name, kind)
    fields = ("spacings", "space directions") if is_nrrd else ("elementspacing", "elementsize")
    declared = None
    for line in head.split(b"\n"):
        name, separator, value = line.decode("utf-8", "replace").partition(":" if is_nrrd else "=")
        field = name.strip().lower()
        if not line.strip() or field == "elementdatafile":  # the header ends here
            break
        if separator and field in fields:
            declared = value
    if declared is None:
        if not is_nrrd and b"ElementDataFile" not in head:
            raise damaged(path.name, kind)
        raise InputError(f"{path.name} does not say how large its voxels are; export it again with its spacing.")
    for part in declared.replace(", ", ",").split():
        try:
            numbers = [float(n) for n in part.strip("()").split(",")]
        except ValueError:
            continue  # "none" is an axis without a place in space; ITK judges whatever else is not a number
        zero_vector = part.startswith("(") and not any(numbers)
        if zero_vector or (not part.startswith("(") and numbers[0] <= 0):
            raise bad_spacing(path.name, declared.split())
