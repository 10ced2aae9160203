"""Images that cannot be used: each ends in one clear sentence, and in nothing else on the terminal."""

from __future__ import annotations

import gzip
import re
from pathlib import Path

import nibabel as nib
import numpy as np
import pytest
import SimpleITK as sitk

from progidiff.errors import InputError
from progidiff.volumes.reading import read_volume

from ..volume_examples import PIXDIM_1, SROW_X, oblique, oriented, patch, ramp, write_nifti

# Place of the sizes in a NIfTI-1 header.
DIM = 40


def write_nrrd(path: Path, header: str, data: bytes) -> Path:
    path.write_bytes(b"NRRD0004\n" + header.encode() + b"encoding: raw\nendian: little\n\n" + data)
    return path


def refused(path: Path) -> str:
    with pytest.raises(InputError) as caught:
        read_volume(path)
    message = str(caught.value)
    assert "\n" not in message
    assert message.endswith(".")
    return message


def test_missing_path(tmp_path: Path) -> None:
    assert "no file or folder" in refused(tmp_path / "nowhere.nii.gz")
    assert "cannot be opened" in refused(tmp_path / "bad\0name.nii")


@pytest.mark.parametrize("suffix", [".nii.gz", ".nrrd", ""])
def test_empty_file(suffix: str, tmp_path: Path) -> None:
    path = tmp_path / f"empty{suffix}"
    path.touch()
    assert "empty file" in refused(path)


@pytest.mark.parametrize("suffix", [".nii", ".nii.gz", ".nrrd", ".nhdr", ".mha", ".mhd"])
@pytest.mark.parametrize(
    "content",
    [b"Dear colleague,\nplease find: the report = attached.\n", gzip.compress(b"Dear " * 99, mtime=0)],
    ids=["letter", "packed"],
)
def test_other_files_renamed(content: bytes, suffix: str, tmp_path: Path) -> None:
    path = tmp_path / f"letter{suffix}"
    path.write_bytes(content)
    assert "cannot be read" in refused(path)
    (tmp_path / "photo.png").write_bytes(content)
    assert "DICOM" in refused(tmp_path / "photo.png"), "the known formats are named"


@pytest.mark.parametrize("suffix", [".nii", ".nii.gz", ".nrrd", ".mha"])
@pytest.mark.parametrize("share", [0.02, 0.98])
def test_cut_off_files(suffix: str, share: float, tmp_path: Path) -> None:
    geometry = oriented("LPS", (30, 30, 30), (1.0, 1.0, 2.0))
    array = np.random.default_rng(3).integers(-1000, 1000, geometry.shape_kji).astype(np.int16)
    path = tmp_path / f"cut{suffix}"
    sitk.WriteImage(geometry.to_sitk(array), str(path), useCompression=suffix == ".nrrd")
    data = path.read_bytes()
    path.write_bytes(data[: int(len(data) * share)])
    assert "cannot be read" in refused(path)


@pytest.mark.parametrize("value", [np.nan, np.inf])
@pytest.mark.parametrize("suffix", [".nii.gz", ".nrrd"])
def test_numbers_that_are_not_finite(suffix: str, value: float, tmp_path: Path) -> None:
    array = ramp(oblique(), "float32")
    array[1, 2, :2] = value
    path = tmp_path / f"nan{suffix}"
    sitk.WriteImage(oblique().to_sitk(array), str(path))
    assert "2 voxels that are not finite" in refused(path)


@pytest.mark.parametrize("suffix", [".nii.gz", ".nrrd", ".mha"])
def test_series_of_volumes(suffix: str, tmp_path: Path) -> None:
    frames = [oblique().to_sitk(ramp(oblique())) for _ in range(7)]
    path = tmp_path / f"series{suffix}"
    sitk.WriteImage(sitk.JoinSeries(frames), str(path))
    assert "series of 7 volumes (4-D)" in refused(path)


@pytest.mark.parametrize("suffix", [".nrrd", ".mha", ".nii"])
def test_colour_and_vector_images(suffix: str, tmp_path: Path) -> None:
    array = np.random.default_rng(0).integers(0, 255, (*oblique().shape_kji, 3)).astype(np.uint8)
    path = tmp_path / f"rgb{suffix}"
    sitk.WriteImage(sitk.GetImageFromArray(array, isVector=True), str(path))
    assert re.search("values per voxel|RGB", refused(path))


RGB = np.zeros((4, 4, 4), dtype=[("R", "u1"), ("G", "u1"), ("B", "u1")])


@pytest.mark.parametrize(("array", "says"), [(RGB, "colour (RGB)"), (np.ones((4, 4, 4), np.complex64), "complex")])
def test_nifti_of_other_types(array: np.ndarray, says: str, tmp_path: Path) -> None:
    nib.Nifti1Image(array, np.eye(4)).to_filename(tmp_path / "other.nii")
    assert says in refused(tmp_path / "other.nii")


@pytest.mark.parametrize(
    ("at", "dtype", "values", "says"),
    [
        (PIXDIM_1, "<f4", [0.0], "not above zero"),
        (PIXDIM_1, "<f4", [-2.0], "not above zero"),
        (PIXDIM_1, "<f4", [np.nan], "not above zero"),
        (SROW_X, "<f4", [0.0] * 12, "spacing of zero"),
        (SROW_X, "<f4", [2, 2, 0, 0, 0, 0, 0, 0, 0, 0, 2, 0], "zero|singular"),
        (SROW_X, "<f4", [2, 0, 0, 0, 0, 2, 0.7, 0, 0, 0, 1.87, 0], "sheared"),
        (DIM, "<i2", [3, 32000, 32000, 32000], "voxels"),  # more than the file can hold
    ],
)
def test_nifti_geometry(at: int, dtype: str, values: list[float], says: str, tmp_path: Path) -> None:
    path = write_nifti(tmp_path / "s.nii", oriented("RAS", (4, 4, 4), (2.0, 2.0, 2.0)))
    assert re.search(says, refused(patch(path, at, dtype, *values)))


SPACINGS = {
    "spacings: 0 1 1\n": "not above zero",
    "spacings: 1 -1 1\n": "not above zero",
    "space: left-posterior-superior\nspace directions: (1,0,0) (0,0,0) (0,0,2)\n": "not above zero",
    "space: left-posterior-superior\nspace directions: (1,0,0) (1,0,0) (0,0,2)\n": "",
    "": "how large",
}


@pytest.mark.parametrize("line", SPACINGS)
def test_nrrd_spacing(line: str, tmp_path: Path) -> None:
    data = np.arange(60, dtype="<i2").tobytes()
    path = write_nrrd(tmp_path / "s.nrrd", f"type: short\ndimension: 3\nsizes: 3 4 5\n{line}", data)
    assert SPACINGS[line] in refused(path)


METAIMAGES = {
    "ElementSpacing = 0 1 1\n": "not above zero",
    "ElementSpacing = 1 -1 1\n": "not above zero",
    "ElementSpacing = 1 1 1\nTransformMatrix = 1 0 0 1 0 0 0 0 1\n": "do not span space",
    "": "how large",
}


@pytest.mark.parametrize("lines", METAIMAGES)
def test_metaimage_geometry(lines: str, tmp_path: Path) -> None:
    head = f"ObjectType = Image\nNDims = 3\nDimSize = 3 4 5\n{lines}ElementType = MET_SHORT\n"
    head += "ElementDataFile = LOCAL\n"
    path = tmp_path / "s.mha"
    path.write_bytes(head.encode() + np.arange(60, dtype="<i2").tobytes())
    assert METAIMAGES[lines] in refused(path)


def test_header_whose_data_file_is_missing(tmp_path: Path) -> None:
    sitk.WriteImage(oblique().to_sitk(ramp(oblique())), str(tmp_path / "a.mhd"))
    (tmp_path / "a.raw").unlink()
    assert "cannot be read" in refused(tmp_path / "a.mhd")


def test_nothing_but_the_error_is_said(tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    for name in ("text.nii.gz", "text.nii", "text.nrrd", "text.mha"):
        (tmp_path / name).write_text("no image = at all\n")
        refused(tmp_path / name)
    refused(patch(write_nifti(tmp_path / "s.nii", oblique()), PIXDIM_1, "<f4", 0.0))
    assert tuple(capfd.readouterr()) == ("", "")
