"""Writing a volume back onto the grid it came from."""

from __future__ import annotations

from pathlib import Path

import nibabel as nib
import numpy as np
import SimpleITK as sitk

from progidiff.errors import OutputError
from progidiff.places import atomic_file
from progidiff.volumes.geometry import Geometry


def write_volume(path: Path, array: np.ndarray, geometry: Geometry) -> None:
    """Write an array as .nii.gz, .nii, .nrrd or .mha, in exactly the given geometry.

    NIfTI stores the affine as 32-bit numbers, so a geometry that was read from NIfTI comes back unchanged;
    the other formats store 64-bit numbers.

    Args:
        path: file to write; an existing one is replaced.
        array: (K, J, I) of bool (written as 0 and 1), integers or float32; float64 is written as float32.
        geometry: grid of the array.

    Raises:
        OutputError: unknown ending, read-only folder or full disk; no partial file is left.
        ValueError: the array does not fit the geometry.
    """
    path = Path(path)
    if array.shape != geometry.shape_kji:
        raise ValueError(f"array of shape {array.shape} does not fit a grid of shape {geometry.shape_kji}")
    if array.dtype == bool:
        array = array.astype(np.uint8)
    elif array.dtype == np.float64:
        array = array.astype(np.float32)
    name = path.name.lower()
    if name.endswith((".nii.gz", ".nii")):
        with atomic_file(path) as staged:
            _nifti(array, geometry).to_filename(staged)
    elif name.endswith((".nrrd", ".mha")):
        with atomic_file(path) as staged:
            try:
                sitk.WriteImage(geometry.to_sitk(array), str(staged), useCompression=True)
            except RuntimeError as error:
                raise OutputError(f"{path} could not be written; check the free space and permissions.") from error
    else:
        raise OutputError(f"{path.name} has no known ending; use .nii.gz, .nii, .nrrd or .mha.")


def _nifti(array: np.ndarray, geometry: Geometry) -> nib.Nifti1Image:
    image = nib.Nifti1Image(array.T, geometry.affine)
    # Both matrices, so that readers which prefer either place the image alike; code 1 is "scanner".
    image.set_sform(geometry.affine, code=1)
    image.set_qform(geometry.affine, code=1)
    image.header.set_xyzt_units("mm")
    return image
