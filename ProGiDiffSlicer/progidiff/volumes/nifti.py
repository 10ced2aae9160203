"""Reading NIfTI files through nibabel, in the place where Slicer shows them."""

from __future__ import annotations

import zlib
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

from progidiff.volumes.geometry import LPS_FROM_RAS, Geometry
from progidiff.volumes.problems import bad_spacing, check_size, damaged, not_a_volume, too_large

SUFFIXES = (".nii.gz", ".nii")

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


def read(path: Path) -> tuple[np.ndarray, Geometry]:
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
        _check_scalar_volume(path.name, shape, image.get_data_dtype())
        shape = shape[:3]
        check_size(path.name, shape)
        zooms = np.asarray(stored["pixdim"][1 : 1 + len(shape)], dtype=np.float64)
        if not (np.isfinite(zooms).all() and (zooms > 0).all()):
            raise bad_spacing(path.name, zooms.tolist())
        affine = _affine(path, image, zooms)
        i, j, k = shape if len(shape) == 3 else (*shape, 1)
        array = np.asarray(image.dataobj).reshape((i, j, k), order="F")
    except MemoryError as error:
        raise too_large(path.name) from error
    except _REFUSALS as error:
        raise damaged(path.name, "a NIfTI image") from error
    return array.T, Geometry((i, j, k), affine)


def _check_scalar_volume(name: str, shape: tuple[int, ...], dtype: Any) -> None:
    if np.dtype(dtype).fields is not None:
        raise not_a_volume(name, "a colour (RGB) image")
    if len(shape) < 2:
        raise not_a_volume(name, "an image with a single dimension")
    for axis, n in enumerate(shape[3:], start=3):
        if n > 1:
            what = f"a series of {n} volumes (4-D)" if axis == 3 else f"an image of {n} values per voxel"
            raise not_a_volume(name, what)


def _affine(path: Path, image: Nifti1Pair, zooms: np.ndarray) -> np.ndarray:
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
