"""Grids and images of every orientation, for the tests of volumes and outputs."""

from __future__ import annotations

import json
from pathlib import Path

import nibabel as nib
import numpy as np
import pydicom
import SimpleITK as sitk

from progidiff.volumes.geometry import LPS_FROM_RAS, Geometry

# Byte positions in a NIfTI-1 header.
PIXDIM_1, UNITS, QFORM_CODE, QUATERN_B, SROW_X = 80, 123, 252, 256, 280


def oblique_rotation() -> np.ndarray:
    """A proper rotation by 20, -15 and 10 degrees about the three axes."""
    rotation = np.eye(3)
    for axis, degrees in enumerate((20.0, -15.0, 10.0)):
        c, s = np.cos(np.radians(degrees)), np.sin(np.radians(degrees))
        a, b = [n for n in range(3) if n != axis]
        step = np.eye(3)
        step[a, a] = step[b, b] = c
        step[a, b], step[b, a] = -s, s
        rotation = rotation @ step
    return rotation


def oriented(codes: str, shape: tuple[int, int, int], spacing: tuple[float, float, float]) -> Geometry:
    """A grid whose i, j and k grow towards the three letters, e.g. "LPS"."""
    affine = np.eye(4)
    affine[:3, :3] = 0.0
    for axis, code in enumerate(codes):
        row = next(n for n, pair in enumerate(("RL", "AP", "SI")) if code in pair)
        affine[row, axis] = spacing[axis] * (1.0 if code in "RAS" else -1.0)
    affine[:3, 3] = (-31.25, 17.5, 1040.125)
    return Geometry(shape, affine)


def oblique(shape: tuple[int, int, int] = (9, 8, 6)) -> Geometry:
    """An oblique, anisotropic, left-handed grid."""
    affine = np.eye(4)
    affine[:3, :3] = oblique_rotation() * np.array([-0.7, -0.7, -2.5])
    affine[:3, 3] = (12.5, -80.25, 333.0)
    return Geometry(shape, affine)


GEOMETRIES = {
    "LPS": oriented("LPS", (9, 8, 6), (0.75, 0.75, 2.5)),
    "RAS": oriented("RAS", (9, 8, 6), (1.0, 1.0, 1.0)),
    "PSR": oriented("PSR", (9, 8, 6), (0.8, 0.9, 3.0)),
    "ARI": oriented("ARI", (7, 10, 5), (1.5, 0.5, 0.5)),
    "oblique": oblique(),
    "anisotropic": oriented("LPS", (9, 8, 6), (0.3, 1.7, 11.0)),
    "single slice": oriented("LPS", (9, 8, 1), (0.75, 0.75, 5.0)),
    "odd widths": oblique((17, 3, 4)),
}


def ramp(geometry: Geometry, dtype: str = "int16") -> np.ndarray:
    """A different value in every voxel, (K, J, I)."""
    count = int(np.prod(geometry.shape_ijk))
    return (np.arange(count) - 100).reshape(geometry.shape_kji).astype(dtype)


def write_dicom_series(
    folder: Path,
    array: np.ndarray,
    geometry: Geometry,
    *,
    uid: str = "1",
    modality: str = "CT",
    shifts: dict[int, tuple[float, float, float]] | None = None,
) -> None:
    """Write int16 (K, J, I) as one DICOM file for each k; ``shifts`` moves the stated positions (LPS mm)."""
    folder.mkdir(parents=True, exist_ok=True)
    writer = sitk.ImageFileWriter()
    writer.KeepOriginalImageUIDOn()
    lps = LPS_FROM_RAS @ geometry.affine
    cosines = lps[:3, :2] / np.array(geometry.spacing[:2])
    for k, plane in enumerate(array):
        image = sitk.GetImageFromArray(plane[None])
        image.SetSpacing(geometry.spacing)
        position = (lps @ [0, 0, k, 1])[:3] + np.array((shifts or {}).get(k, (0.0, 0.0, 0.0)))
        tags = {
            "0008|0060": modality,
            "0020|000d": "1.2.826.0.1.3680043.2.1125.1",
            "0020|000e": f"1.2.826.0.1.3680043.2.1125.1.{uid}",
            "0008|0018": f"1.2.826.0.1.3680043.2.1125.1.{uid}.{k + 1}",
            "0020|0013": str(k + 1),
            "0020|0032": "\\".join(f"{v:.10g}" for v in position),
            "0020|0037": "\\".join(f"{v:.10g}" for v in cosines.T.ravel()),
            "0018|0050": f"{geometry.spacing[2]:.8g}",
            "0028|1052": "-1024",
            "0028|1053": "1",
        }
        for tag, value in tags.items():
            image.SetMetaData(tag, value)
        writer.SetFileName(str(folder / f"{uid}_{len(array) - k:03d}.dcm"))
        writer.Execute(image)


def write_patient_series(
    folder: Path,
    geometry: Geometry,
    *,
    shifts: dict[int, tuple[float, float, float]] | None = None,
    without: str | None = None,
) -> None:
    """A CT series (a ramp) whose headers speak of a patient and a study; ``without``: an attribute that they lack."""
    write_dicom_series(folder, ramp(geometry), geometry, shifts=shifts)
    for file in folder.iterdir():
        image = pydicom.dcmread(file)
        image.SpecificCharacterSet = "ISO_IR 100"
        image.PatientName, image.PatientID, image.PatientBirthDate, image.PatientSex = "Müller^Jörg", "P-17", "19500102", "M"
        image.StudyDescription, image.AccessionNumber, image.StudyID = "Größe", "A1", "S1"
        image.StudyDate, image.StudyTime, image.SeriesNumber = "20260102", "101112", 4
        image.FrameOfReferenceUID = "1.2.826.0.1.3680043.2.1125.9"
        image.Manufacturer = "Scanner"
        if without:
            image[without].value = ""
        image.save_as(file)


def write_nifti(path: Path, geometry: Geometry, array: np.ndarray | None = None) -> Path:
    """Write (K, J, I), by default a ramp, as NIfTI."""
    image = nib.Nifti1Image((ramp(geometry) if array is None else array).T, geometry.affine)
    image.to_filename(path)
    return path


def write_nnunet(
    folder: Path,
    cases: dict[str, tuple[np.ndarray, np.ndarray]],
    affine: np.ndarray,
    labels: dict[str, int],
    **description: object,
) -> Path:
    """nnU-Net raw set of CT cases: image and label map, both (K, J, I), by name; ``description``: more for dataset.json."""
    for part in ("imagesTr", "labelsTr"):
        (folder / part).mkdir(parents=True)
    for name, (image, label) in cases.items():
        nib.save(nib.Nifti1Image(image.T, affine), folder / "imagesTr" / f"{name}_0000.nii.gz")
        nib.save(nib.Nifti1Image(label.T.astype(np.uint8), affine), folder / "labelsTr" / f"{name}.nii.gz")
    content = {"labels": {"background": 0, **labels}, "channel_names": {"0": "CT"}, "file_ending": ".nii.gz", **description}
    (folder / "dataset.json").write_text(json.dumps(content), "utf-8")
    return folder


def patch(path: Path, at: int, dtype: str, *values: float) -> Path:
    """Overwrite bytes of a file, such as a field of its header."""
    data = bytearray(path.read_bytes())
    new = np.array(values, dtype=dtype).tobytes()
    data[at : at + len(new)] = new
    path.write_bytes(data)
    return path
