"""Reading and writing volumes: values and place are exactly those of the file, in every format and library."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import nibabel as nib
import numpy as np
import pytest
import SimpleITK as sitk

from progidiff.errors import InputError, OutputError
from progidiff.outputs.segmentation import write_volume
from progidiff.volumes.geometry import Geometry
from progidiff.volumes.reading import read_volume, volume_name

from ..volume_examples import (
    GEOMETRIES,
    QFORM_CODE,
    QUATERN_B,
    UNITS,
    oblique,
    oblique_rotation,
    oriented,
    patch,
    ramp,
    write_nifti,
)


@pytest.mark.parametrize("suffix", [".nii", ".nii.gz"])
@pytest.mark.parametrize("name", ["PSR", "oblique", "single slice"])
def test_nifti_keeps_the_stored_matrix_to_the_last_bit(name: str, suffix: str, tmp_path: Path) -> None:
    geometry = GEOMETRIES[name]
    volume = read_volume(write_nifti(tmp_path / f"Lékař 肝臓{suffix}", geometry))
    np.testing.assert_array_equal(volume.array, ramp(geometry))
    assert volume.array.dtype == np.int16
    assert volume.array.flags.c_contiguous
    assert volume.name == "Lékař 肝臓"
    assert volume.modality is None
    # A NIfTI header holds 32-bit numbers.
    np.testing.assert_array_equal(volume.geometry.affine, geometry.affine.astype(np.float32))


@pytest.mark.parametrize("suffix", [".nrrd", ".nhdr", ".mha", ".mhd"])
@pytest.mark.parametrize("name", ["PSR", "oblique", "single slice"])
def test_nrrd_and_metaimage(name: str, suffix: str, tmp_path: Path) -> None:
    geometry = GEOMETRIES[name]
    path = tmp_path / f"Лёгкие{suffix}"
    sitk.WriteImage(geometry.to_sitk(ramp(geometry, "float32")), str(path))
    volume = read_volume(path)
    np.testing.assert_array_equal(volume.array, ramp(geometry, "float32"))
    assert volume.array.dtype == np.float32
    assert volume.geometry.is_close(geometry, tolerance_mm=1e-6)
    if suffix in (".nrrd", ".nhdr"):
        np.testing.assert_allclose(volume.geometry.affine, geometry.affine, rtol=0, atol=1e-12)


@pytest.mark.parametrize("stored", ["uint8", "int8", "int16", "uint16", "int32", "int64", "float64", ">i2", ">f4"])
def test_stored_types_become_int16_or_float32_with_the_same_values(stored: str, tmp_path: Path) -> None:
    geometry = oriented("LPS", (4, 4, 4), (1.0, 1.0, 2.0))
    array = np.abs(ramp(geometry)).astype(stored)
    image = nib.Nifti1Image(array.T, geometry.affine, dtype=array.dtype)
    image.to_filename(tmp_path / "image.nii")
    volume = read_volume(tmp_path / "image.nii")
    assert volume.array.dtype == (np.float32 if "f" in stored else np.int16)
    np.testing.assert_array_equal(volume.array, array)
    if stored == "int64":  # beyond int16
        nib.Nifti1Image(array.T * 1000, geometry.affine, dtype=array.dtype).to_filename(tmp_path / "image.nii")
        volume = read_volume(tmp_path / "image.nii")
        assert volume.array.dtype == np.float32
        np.testing.assert_array_equal(volume.array, array * 1000)


def test_nifti_scaling_is_applied(tmp_path: Path) -> None:
    image = nib.Nifti1Image(np.arange(64, dtype=np.int16).reshape(4, 4, 4), np.eye(4))
    image.header.set_slope_inter(0.5, -1000.0)
    image.to_filename(tmp_path / "image.nii")
    array = read_volume(tmp_path / "image.nii").array
    stored = np.frombuffer((tmp_path / "image.nii").read_bytes()[352:], dtype="<i2")
    np.testing.assert_allclose(array.ravel(), stored * 0.5 - 1000.0)


def two_places(
    path: Path, qform: np.ndarray | None, qcode: int, sform: np.ndarray | None, scode: int, zooms: tuple[float, ...] = ()
) -> Path:
    """Write a NIfTI with these two matrices."""
    image = nib.Nifti1Image(ramp(oblique()).T, None)
    if zooms:
        image.header.set_zooms(zooms)
    image.set_qform(qform, code=qcode)
    image.set_sform(sform, code=scode)
    image.to_filename(path)
    return path


def test_impossible_quaternion_beside_a_good_sform(tmp_path: Path) -> None:
    path = write_nifti(tmp_path / "q.nii", oblique())
    patch(path, QFORM_CODE, "<i2", 1, 1)  # the sform's code lies behind it
    patch(path, QUATERN_B, "<f4", 3.0, 3.0, 3.0)
    np.testing.assert_array_equal(read_volume(path).geometry.affine, oblique().affine.astype(np.float32))


@pytest.mark.parametrize(("qcode", "scode"), [(1, 1), (1, 2), (2, 1), (0, 2), (1, 0), (0, 0)])
def test_nifti_with_two_places_lies_where_slicer_shows_it(qcode: int, scode: int, tmp_path: Path) -> None:
    turned = np.eye(4)
    turned[:3, :3] = oblique_rotation() * np.array([2.0, 2.0, 3.0])
    plain = np.diag([-2.0, -2.0, 3.0, 1.0])
    path = two_places(tmp_path / "both.nii", plain, qcode, turned, scode, (2.0, 2.0, 3.0))
    shown = Geometry.from_sitk(sitk.ReadImage(str(path))).affine
    np.testing.assert_allclose(read_volume(path).geometry.affine, shown, rtol=0, atol=1e-4)


def test_nifti_in_metres(tmp_path: Path) -> None:
    path = patch(write_nifti(tmp_path / "m.nii", oriented("LPS", (4, 4, 4), (0.001,) * 3)), UNITS, "u1", 1)
    assert read_volume(path).geometry.spacing == pytest.approx((1.0, 1.0, 1.0), rel=1e-5)


def test_slight_shear_that_itk_refuses_is_read(tmp_path: Path) -> None:
    affine = oblique().affine.copy()
    affine[:3, 1] += 4e-4 * affine[:3, 0]
    path = two_places(tmp_path / "slight.nii", None, 0, affine, 2)
    np.testing.assert_array_equal(read_volume(path).geometry.affine, affine.astype(np.float32))


def test_images_of_two_or_four_dimensions(tmp_path: Path) -> None:
    affine = oblique().affine
    nib.Nifti1Image(np.arange(20, dtype=np.int16).reshape(5, 4), affine).to_filename(tmp_path / "flat.nii")
    volume = read_volume(tmp_path / "flat.nii")
    assert volume.array.shape == (1, 4, 5)
    np.testing.assert_allclose(volume.geometry.affine[:, [0, 1, 3]], affine[:, [0, 1, 3]], atol=1e-5)
    assert volume.array[0, 2, 3] == 3 * 4 + 2
    nib.Nifti1Image(np.arange(60, dtype=np.int16).reshape(5, 4, 3, 1), affine).to_filename(tmp_path / "one.nii")
    assert read_volume(tmp_path / "one.nii").array.shape == (3, 4, 5), "a fourth dimension of one is no series"

    image = sitk.GetImageFromArray(np.arange(20, dtype=np.int16).reshape(4, 5))
    image.SetSpacing((0.5, 0.75))
    sitk.WriteImage(image, str(tmp_path / "flat.mha"))
    volume = read_volume(tmp_path / "flat.mha")
    assert volume.array.shape == (1, 4, 5)
    assert volume.geometry.spacing == (0.5, 0.75, 1.0)


def test_empty_label_map_on_request(tmp_path: Path) -> None:
    path = write_nifti(tmp_path / "label.nii", oblique(), np.zeros(oblique().shape_kji, np.uint8))
    with pytest.raises(InputError, match="value 0"):
        read_volume(path)
    assert not read_volume(path, allow_uniform=True).array.any()


def test_metaimage_says_its_modality(tmp_path: Path) -> None:
    path = tmp_path / "ct.mha"
    sitk.WriteImage(oblique().to_sitk(ramp(oblique())), str(path))
    header, _, data = path.read_bytes().partition(b"ElementDataFile")
    path.write_bytes(header + b"Modality = MET_MOD_CT\nElementDataFile" + data)
    assert read_volume(path).modality == "CT"


@pytest.mark.parametrize(
    ("path", "name"),
    [("a/ct.nii.gz", "ct"), ("a/CT.NII", "CT"), ("b/x.y.nrrd", "x.y"), ("s.seg.nrrd", "s"), ("dicom/", "dicom")],
)
def test_volume_names(path: str, name: str) -> None:
    assert volume_name(Path(path)) == name


# -----------------------------------------------------------------------------------------------------


@pytest.fixture
def real(shared_data: Path) -> Callable[[str], Path]:
    return lambda name: shared_data / "permissive" / "totalsegmentator_tests" / name


@pytest.mark.parametrize(
    ("name", "shape"), [("example_ct_sm", (122, 101, 30)), ("example_ct", (122, 101, 112)), ("example_mr_sm", (117, 91, 20))]
)
def test_real_scans(real: Callable[[str], Path], name: str, shape: tuple[int, int, int]) -> None:
    volume = read_volume(real(f"{name}.nii.gz"))
    assert volume.geometry.shape_ijk == shape
    assert volume.geometry.spacing == pytest.approx((3.0, 3.0, 3.0), rel=1e-2)
    image = nib.load(real(f"{name}.nii.gz"))
    np.testing.assert_allclose(volume.array.T, image.get_fdata(), rtol=1e-6)
    np.testing.assert_array_equal(volume.geometry.affine, image.affine)


@pytest.mark.parametrize("suffix", [".nii.gz", ".nii", ".nrrd", ".mha"])
@pytest.mark.parametrize("name", ["PSR", "oblique", "single slice"])
def test_written_volumes_come_back_on_the_same_grid(name: str, suffix: str, tmp_path: Path) -> None:
    geometry = GEOMETRIES[name]
    array = np.linspace(0, 1, ramp(geometry).size, dtype=np.float32).reshape(geometry.shape_kji)
    write_volume(tmp_path / f"Übersicht{suffix}", array, geometry)
    back = read_volume(tmp_path / f"Übersicht{suffix}")
    np.testing.assert_array_equal(back.array, array)
    assert back.array.dtype == np.float32
    assert back.geometry.is_close(geometry, tolerance_mm=1e-3)


@pytest.mark.parametrize("name", ["example_ct_sm", "example_mr_sm"])
def test_result_has_the_real_inputs_affine_to_the_last_bit(name: str, shared_data: Path, tmp_path: Path) -> None:
    source = shared_data / "permissive" / "totalsegmentator_tests" / f"{name}.nii.gz"
    volume = read_volume(source)
    write_volume(tmp_path / "agreement.nii.gz", volume.array > 0, volume.geometry)
    written = nib.load(tmp_path / "agreement.nii.gz")
    np.testing.assert_array_equal(written.affine, nib.load(source).affine)
    assert written.shape == nib.load(source).shape
    assert written.get_data_dtype() == np.uint8


def test_types_of_written_volumes(tmp_path: Path) -> None:
    geometry = oblique()
    for dtype, stored in ((bool, "uint8"), ("float64", "float32"), ("int16", "int16"), ("uint16", "uint16")):
        array = np.abs(ramp(geometry)).astype(dtype)
        write_volume(tmp_path / "a.nii.gz", array, geometry)
        image = nib.load(tmp_path / "a.nii.gz")
        assert image.get_data_dtype() == np.dtype(stored)
        np.testing.assert_array_equal(np.asarray(image.dataobj).T, array)


def test_refusals_of_writing(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="does not fit"):
        write_volume(tmp_path / "a.nii.gz", np.zeros((2, 2, 2)), oblique())
    with pytest.raises(OutputError, match=r"\.nii\.gz"):
        write_volume(tmp_path / "a.png", ramp(oblique()), oblique())
    assert list(tmp_path.iterdir()) == []
