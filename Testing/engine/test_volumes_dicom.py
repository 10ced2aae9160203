"""DICOM series: the right stack in the right place, and a clear sentence for every folder that is not one."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import SimpleITK as sitk

from progidiff.errors import InputError
from progidiff.volumes.reading import read_volume

from ..volume_examples import GEOMETRIES, oriented, ramp, write_dicom_series

CT = oriented("LPS", (9, 8, 6), (0.75, 0.75, 2.5))


def refused(path: Path) -> str:
    with pytest.raises(InputError) as caught:
        read_volume(path)
    assert "\n" not in str(caught.value)
    return str(caught.value)


# DICOM columns and rows are right-handed with the slice order, so only such grids can come back unchanged.
@pytest.mark.parametrize("name", ["LPS", "anisotropic", "single slice"])
def test_series_comes_back_on_its_grid(name: str, tmp_path: Path) -> None:
    geometry = GEOMETRIES[name]
    write_dicom_series(tmp_path / "Größe", ramp(geometry), geometry)
    volume = read_volume(tmp_path / "Größe")
    np.testing.assert_array_equal(volume.array, ramp(geometry))
    assert volume.array.dtype == np.int16
    assert volume.geometry.is_close(geometry, tolerance_mm=1e-4)
    assert volume.modality == "CT"
    assert volume.name == "Größe"


@pytest.mark.parametrize("name", ["PSR", "RAS", "ARI", "oblique"])
def test_every_voxel_keeps_its_place_whatever_the_slice_order(name: str, tmp_path: Path) -> None:
    geometry = GEOMETRIES[name]
    array = ramp(geometry)
    write_dicom_series(tmp_path, array, geometry, modality="MR")
    volume = read_volume(tmp_path)
    assert volume.modality == "MR"
    assert volume.array.shape == array.shape
    # The voxel that is found at each place in the patient holds the value that was written there.
    to_ijk = np.linalg.inv(volume.geometry.affine) @ geometry.affine
    for k, j, i in np.ndindex(array.shape):
        at = to_ijk @ [i, j, k, 1]
        np.testing.assert_allclose(at, np.rint(at), atol=1e-3)
        ri, rj, rk = (int(n) for n in np.rint(at[:3]))
        assert volume.array[rk, rj, ri] == array[k, j, i]


def test_series_in_a_folder_below(tmp_path: Path) -> None:
    write_dicom_series(tmp_path / "DICOM" / "0001", ramp(CT), CT)
    (tmp_path / "README.txt").write_text("viewer")
    np.testing.assert_array_equal(read_volume(tmp_path).array, ramp(CT))


def test_single_dicom_file_is_one_slice(tmp_path: Path) -> None:
    write_dicom_series(tmp_path, ramp(CT), CT)
    volume = read_volume(next(tmp_path.glob("*_006.dcm")))
    np.testing.assert_array_equal(volume.array, ramp(CT)[:1])
    assert volume.geometry.spacing == pytest.approx((0.75, 0.75, 2.5))


def test_file_without_ending_is_recognised(tmp_path: Path) -> None:
    write_dicom_series(tmp_path, ramp(CT)[:1], CT)
    next(tmp_path.glob("*.dcm")).rename(tmp_path / "IM000001")
    assert read_volume(tmp_path / "IM000001").array.shape == (1, 8, 9)


def test_folder_without_images(tmp_path: Path) -> None:
    assert "holds no DICOM images" in refused(tmp_path)
    (tmp_path / "note.txt").write_text("nothing")
    (tmp_path / "broken.dcm").write_bytes(b"\0" * 128 + b"DICM" + b"rubbish" * 20)
    assert "holds no DICOM images" in refused(tmp_path)
    assert "cannot be read" in refused(tmp_path / "broken.dcm")


def test_several_series(tmp_path: Path) -> None:
    write_dicom_series(tmp_path, ramp(CT), CT, uid="1")
    write_dicom_series(tmp_path, ramp(CT)[:2], CT, uid="2", modality="MR")
    message = refused(tmp_path)
    assert "2 image series" in message
    assert "6 CT" in message
    assert "2 MR" in message
    assert "folder of its own" in message


def test_other_objects_beside_the_scan_do_not_count(tmp_path: Path) -> None:
    write_dicom_series(tmp_path, ramp(CT), CT)
    write_dicom_series(tmp_path, ramp(CT)[:1], CT, uid="9", modality="SEG")
    np.testing.assert_array_equal(read_volume(tmp_path).array, ramp(CT))


def test_missing_slice(tmp_path: Path) -> None:
    write_dicom_series(tmp_path, ramp(CT), CT)
    (tmp_path / "1_003.dcm").unlink()
    assert "not evenly spaced (2.5 to 5 mm)" in refused(tmp_path)


def test_repeated_positions(tmp_path: Path) -> None:
    write_dicom_series(tmp_path, ramp(CT), CT, shifts={4: (0.0, 0.0, -2.5)})
    assert "same place" in refused(tmp_path)


def test_gantry_tilt(tmp_path: Path) -> None:
    write_dicom_series(tmp_path, ramp(CT), CT, shifts={k: (0.0, 0.4 * k, 0.0) for k in range(6)})
    assert "gantry tilt" in refused(tmp_path)


def test_slices_of_different_sizes_and_directions(tmp_path: Path) -> None:
    write_dicom_series(tmp_path / "sizes", ramp(CT), CT)
    wide = oriented("LPS", (12, 8, 1), (0.75, 0.75, 2.5))
    write_dicom_series(tmp_path / "other", ramp(wide), wide)
    (tmp_path / "other" / "1_001.dcm").rename(tmp_path / "sizes" / "scout.dcm")
    assert "differ in size" in refused(tmp_path / "sizes")

    write_dicom_series(tmp_path / "turned", ramp(CT), CT)
    coronal = oriented("LIP", (9, 8, 1), (0.75, 0.75, 2.5))
    write_dicom_series(tmp_path / "more", ramp(coronal), coronal)
    (tmp_path / "more" / "1_001.dcm").rename(tmp_path / "turned" / "scout.dcm")
    assert "different directions" in refused(tmp_path / "turned")


def test_multi_frame(tmp_path: Path) -> None:
    image = CT.to_sitk(ramp(CT))
    image.SetMetaData("0008|0060", "CT")
    sitk.WriteImage(image, str(tmp_path / "frames.dcm"))
    assert "multi-frame" in refused(tmp_path / "frames.dcm")
    assert "multi-frame" in refused(tmp_path)


@pytest.mark.parametrize("which", ["1_001.dcm", "1_002.dcm"])
def test_truncated_image(which: str, tmp_path: Path) -> None:
    write_dicom_series(tmp_path, ramp(CT), CT)
    path = tmp_path / which
    path.write_bytes(path.read_bytes()[:-60])
    assert "1 damaged image" in refused(tmp_path)


def test_nothing_but_the_error_is_said(tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    write_dicom_series(tmp_path, ramp(CT), CT)
    (tmp_path / "1_003.dcm").unlink()
    (tmp_path / "note.txt").write_text("nothing")
    capfd.readouterr()
    refused(tmp_path)
    captured = capfd.readouterr()
    assert captured.out == ""
    assert captured.err == ""
