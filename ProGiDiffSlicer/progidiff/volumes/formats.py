"""Reading NIfTI files through nibabel, NRRD and MetaImage files through SimpleITK; what can be wrong with an image file,
said in the same words whatever its format.
"""

from __future__ import annotations

import zlib
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import nibabel as nib
import numpy as np
import SimpleITK as sitk
from nibabel.filebasedimages import ImageFileError
from nibabel.imageglobals import LoggingOutputSuppressor
from nibabel.nifti1 import Nifti1Pair
from nibabel.openers import ImageOpener
from nibabel.spatialimages import HeaderDataError
from nibabel.wrapstruct import WrapStructError

from progidiff.errors import InputError, why_left_out
from progidiff.volumes.geometry import LPS_FROM_RAS, Geometry

# Far above any scanner's output; a header that claims more is damaged, and reading it would exhaust the
# memory.
MAX_VOXELS = 2**32


def damaged(name: str, kind: str) -> InputError:
    """The error for a file that its library refuses."""
    return InputError(f"{name} cannot be read as {kind}: it is damaged, cut off or not what its name says; export it again.")


def not_a_volume(name: str, what: str) -> InputError:
    """The error for an image with more than one value per voxel or more than three dimensions."""
    return InputError(f"{name} is {what}, not a single volume; export one 3-D greyscale volume and use that.")


def bad_spacing(name: str, spacing: Iterable[object]) -> InputError:
    """The error for voxels without a size."""
    stated = " × ".join(f"{s:g}" if isinstance(s, float) else str(s) for s in spacing)
    return InputError(
        f"{name} has a voxel spacing that is not above zero ({stated} mm); "
        "correct the spacing in its header or export it again."
    )


def too_large(name: str) -> InputError:
    """The error for an image that does not fit into memory."""
    return InputError(why_left_out(name, MemoryError()))


def is_text(path: Path) -> bool:
    """Whether a path can be written as text, as SimpleITK needs it: with any other it ends the whole program."""
    try:
        str(path).encode()
    except UnicodeEncodeError:
        return False
    return True


def check_size(name: str, shape: Iterable[int]) -> None:
    """Refuse a header that claims no voxels, or more than any scan has.

    Raises:
        InputError: with the number of voxels that is claimed.
    """
    voxels = 1
    for n in shape:
        voxels *= int(n)
    if voxels < 1:
        raise InputError(f"{name} holds no voxels; export the image again.")
    if voxels > MAX_VOXELS:
        raise InputError(f"{name} claims {voxels:,} voxels, too many for a scan; the file seems to be damaged.")


NIFTI_SUFFIXES = (".nii.gz", ".nii")

# What nibabel and the decompressors below it raise for a file that is not what it should be.
_REFUSALS = (
    ImageFileError,
    HeaderDataError,
    WrapStructError,
    zlib.error,
    OSError,
    EOFError,
    ValueError,
    TypeError,
    OverflowError,
)


def read_nifti(path: Path) -> tuple[np.ndarray, Geometry]:
    """Read a NIfTI-1 or NIfTI-2 file.

    Returns:
        Array (K, J, I) with the header's scaling applied, and its geometry; a 2-D image is one slice of 1 mm.

    Raises:
        InputError: damaged, 4-D, colour, without a spacing, or with an unusable affine.
    """
    try:
        with LoggingOutputSuppressor():
            image = nib.load(path)
            if not isinstance(image, Nifti1Pair):
                raise damaged(path.name, "a NIfTI image")
            # nibabel mends a zero or negative pixdim on loading; here they are errors, so look at the stored
            # ones.
            with ImageOpener(str(path)) as stream:
                stored = image.header_class.from_fileobj(stream, check=False)
        shape = tuple(int(n) for n in image.shape)
        _check_nifti(path.name, shape, image.get_data_dtype())
        shape = shape[:3]
        check_size(path.name, shape)
        zooms = np.asarray(stored["pixdim"][1 : 1 + len(shape)], dtype=np.float64)
        if not (np.isfinite(zooms).all() and (zooms > 0).all()):
            raise bad_spacing(path.name, zooms.tolist())
        affine = _nifti_affine(path, image, zooms)
        i, j, k = shape if len(shape) == 3 else (*shape, 1)
        array = np.asarray(image.dataobj).reshape((i, j, k), order="F")
    except MemoryError as error:
        raise too_large(path.name) from error
    except _REFUSALS as error:
        raise damaged(path.name, "a NIfTI image") from error
    return array.T, Geometry((i, j, k), affine)


def _check_nifti(name: str, shape: tuple[int, ...], dtype: Any) -> None:
    if np.dtype(dtype).fields is not None:
        raise not_a_volume(name, "a colour (RGB) image")
    if len(shape) < 2:
        raise not_a_volume(name, "an image with a single dimension")
    for axis, n in enumerate(shape[3:], start=3):
        if n > 1:
            what = f"a series of {n} volumes (4-D)" if axis == 3 else f"an image of {n} values per voxel"
            raise not_a_volume(name, what)


def _nifti_affine(path: Path, image: Nifti1Pair, zooms: np.ndarray) -> np.ndarray:
    """The header's IJK-to-RAS matrix, float64 (4, 4).

    A NIfTI header may hold two matrices (sform and qform) that differ, or none. Slicer reads NIfTI through
    ITK, so ITK's choice decides where the user sees the image; the chosen matrix is then taken exactly as it
    is stored, not as ITK's rounded spacing and directions. Where ITK refuses a file (it does for the
    slightest shear), nibabel's choice stands.
    """
    stored = []
    for form in (image.get_sform, image.get_qform):
        try:
            matrix, _ = form(coded=True)
        except (HeaderDataError, ValueError):  # an impossible quaternion says nothing about the other matrix
            continue
        if matrix is not None:
            stored.append(np.array(matrix, dtype=np.float64))
    if len(zooms) == 2:
        affine = stored[0] if stored else LPS_FROM_RAS @ np.diag([*zooms, 1.0, 1.0])
        return _with_slice_axis(affine)
    shown = _affine_in_itk(path)
    if shown is None:
        return stored[0] if stored else np.array(image.affine, dtype=np.float64)
    tolerance = 1e-3 * float(np.abs(shown[:3, :3]).max())
    for matrix in stored:
        same_axes = np.allclose(matrix[:3, :3], shown[:3, :3], rtol=0.0, atol=tolerance)
        if same_axes and np.allclose(matrix[:3, 3], shown[:3, 3], rtol=1e-5, atol=1e-2):
            return matrix
    return shown


def _affine_in_itk(path: Path) -> np.ndarray | None:
    reader = sitk.ImageFileReader()
    reader.SetFileName(str(path))
    reader.SetImageIO("NiftiImageIO")
    try:
        reader.ReadImageInformation()
    except RuntimeError:
        return None
    dimension = reader.GetDimension()
    direction = np.array(reader.GetDirection()).reshape(dimension, dimension)[:3, :3]
    affine = np.eye(4)
    affine[:3, :3] = direction * np.array(reader.GetSpacing()[:3])
    affine[:3, 3] = reader.GetOrigin()[:3]
    return LPS_FROM_RAS @ affine


def _with_slice_axis(affine: np.ndarray) -> np.ndarray:
    """Give a 2-D image's matrix a third axis of 1 mm across the image where it has none."""
    if not np.linalg.norm(affine[:3, 2]) > 0:
        normal = np.cross(affine[:3, 0], affine[:3, 1])
        affine[:3, 2] = normal / (np.linalg.norm(normal) or 1.0)
    return affine


NRRD_SUFFIXES, META_SUFFIXES = (".nrrd", ".nhdr"), (".mha", ".mhd")
ITK_SUFFIXES = NRRD_SUFFIXES + META_SUFFIXES

# What MetaImages say, without their prefix, and DICOM's code for it.
_MODALITIES = {"CT": "CT", "MR": "MR", "MRI": "MR", "PET": "PT", "NM": "NM", "US": "US"}


def read_itk(path: Path) -> tuple[np.ndarray, Geometry, str | None]:
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
        _check_itk(path.name, reader)
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


def _check_itk(name: str, reader: sitk.ImageFileReader) -> None:
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
