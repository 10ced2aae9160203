"""DICOM series: the right stack in the right place, and a clear sentence for every folder that is not one."""

from __future__ import annotations

import os
import re
import shutil
from collections.abc import Callable, Iterator
from pathlib import Path

import numpy as np
import pydicom
import pytest
import SimpleITK as sitk
from pydicom.dataset import FileMetaDataset
from pydicom.fileset import FileSet
from pydicom.uid import UID, ExplicitVRLittleEndian

from progidiff.errors import InputError
from progidiff.volumes import dicom
from progidiff.volumes.geometry import Geometry
from progidiff.volumes.reading import read_volume

from ..volume_examples import GEOMETRIES, oriented, ramp, write_dicom_series

CT = oriented("LPS", (9, 8, 6), (0.75, 0.75, 2.5))


@pytest.fixture
def scan(tmp_path: Path) -> Path:
    """A folder with a CT of six slices, each another ramp of values."""
    write_dicom_series(tmp_path, ramp(CT), CT)
    return tmp_path


def is_the_scan(path: Path, series: str | None = None) -> None:
    np.testing.assert_array_equal(read_volume(path, series=series).array, ramp(CT))


@pytest.fixture(autouse=True)
def nothing_else_is_said(capfd: pytest.CaptureFixture[str]) -> Iterator[None]:
    """Neither when a series is read nor when it is refused does a library speak on the terminal."""
    yield
    assert tuple(capfd.readouterr()) == ("", "")


def refused(path: Path, series: str | None = None) -> str:
    with pytest.raises(InputError) as caught:
        read_volume(path, series=series)
    assert "\n" not in str(caught.value)
    return str(caught.value)


def edited(folder: Path, change: Callable[[int, pydicom.Dataset], object]) -> None:
    """Change the files of a series by the number of their slice along k."""
    for path in folder.glob("*.dcm"):
        image = pydicom.dcmread(path)
        change(int(image.InstanceNumber) - 1, image)
        image.save_as(path)


def moved(k: int, image: pydicom.Dataset, z: float) -> None:
    image.ImagePositionPatient = [*image.ImagePositionPatient[:2], f"{z:.6f}"]


def write_object(path: Path, storage: str, modality: str, of: Path, **more: object) -> None:
    """An object that is no image and names the series of one."""
    image = pydicom.dcmread(of)
    thing = pydicom.Dataset()
    thing.file_meta = FileMetaDataset()
    thing.file_meta.TransferSyntaxUID = ExplicitVRLittleEndian
    thing.SOPClassUID, thing.SOPInstanceUID = UID(storage), UID("1.2.826.0.1.3680043.2.1125.77")
    thing.file_meta.MediaStorageSOPClassUID = thing.SOPClassUID
    thing.file_meta.MediaStorageSOPInstanceUID = thing.SOPInstanceUID
    thing.Modality, thing.SeriesInstanceUID = modality, "1.2.826.0.1.3680043.2.1125.78"
    reference, instance = pydicom.Dataset(), pydicom.Dataset()
    reference.SeriesInstanceUID = image.SeriesInstanceUID
    instance.ReferencedSOPClassUID, instance.ReferencedSOPInstanceUID = image.SOPClassUID, image.SOPInstanceUID
    reference.ReferencedSOPSequence = [instance]
    thing.ReferencedSeriesSequence = [reference]
    for tag, value in more.items():
        setattr(thing, tag, value)
    thing.save_as(path, enforce_file_format=True)


# DICOM columns and rows are right-handed with the slice order, so only such grids can come back unchanged.
@pytest.mark.parametrize("name", ["LPS", "anisotropic", "single slice"])
def test_series_comes_back_on_its_grid(name: str, tmp_path: Path) -> None:
    geometry = GEOMETRIES[name]
    write_dicom_series(tmp_path / "Größe" / "below", ramp(geometry), geometry)
    (tmp_path / "Größe" / "README.txt").write_text("viewer")
    volume = read_volume(tmp_path / "Größe")
    np.testing.assert_array_equal(volume.array, ramp(geometry))
    assert volume.array.dtype == np.int16
    assert volume.geometry.is_close(geometry, tolerance_mm=1e-4)
    assert volume.modality == "CT"
    assert volume.name == "Größe"


@pytest.mark.parametrize("name", ["PSR", "ARI", "oblique"])
def test_every_voxel_keeps_its_place_whatever_the_slice_order(name: str, tmp_path: Path) -> None:
    geometry = GEOMETRIES[name]
    array = ramp(geometry)
    write_dicom_series(tmp_path, array, geometry)
    volume = read_volume(tmp_path)
    assert volume.array.shape == array.shape
    # The voxel that is found at each place in the patient holds the value that was written there.
    to_ijk = np.linalg.inv(volume.geometry.affine) @ geometry.affine
    for k, j, i in np.ndindex(array.shape):
        at = to_ijk @ [i, j, k, 1]
        np.testing.assert_allclose(at, np.rint(at), atol=1e-3)
        ri, rj, rk = (int(n) for n in np.rint(at[:3]))
        assert volume.array[rk, rj, ri] == array[k, j, i]


def test_single_dicom_file_is_one_slice(scan: Path) -> None:
    next(scan.glob("*_006.dcm")).rename(scan / "IM000001")
    volume = read_volume(scan / "IM000001")
    np.testing.assert_array_equal(volume.array, ramp(CT)[:1])
    assert volume.geometry.spacing == pytest.approx((0.75, 0.75, 2.5))


def test_folder_without_images(tmp_path: Path) -> None:
    assert "holds no DICOM images" in refused(tmp_path)
    (tmp_path / "note.txt").write_text("nothing")
    (tmp_path / "broken.dcm").write_bytes(b"\0" * 128 + b"DICM" + b"rubbish" * 20)
    assert "holds no DICOM images" in refused(tmp_path)
    assert "cannot be read" in refused(tmp_path / "broken.dcm")


def test_objects_that_name_the_series_are_no_damaged_images_of_it(scan: Path) -> None:
    for number, modality in (("481.3", "RTSTRUCT"), ("88.59", "KO"), ("11.1", "PR"), ("88.67", "SR"), ("66.1", "REG")):
        write_object(scan / f"{modality}.dcm", f"1.2.840.10008.5.1.4.1.1.{number}", modality, scan / "1_001.dcm")
    write_dicom_series(scan, ramp(CT)[:1], CT, uid="9", modality="SEG")
    is_the_scan(scan)
    cut_off(scan / "1_001.dcm")
    assert "1 damaged image of its series" in refused(scan)


def test_the_index_of_a_disc_is_passed_over(tmp_path: Path) -> None:
    write_dicom_series(tmp_path / "scan", ramp(CT), CT)
    disc = FileSet()
    for path in (tmp_path / "scan").glob("*.dcm"):
        image = pydicom.dcmread(path)
        image.PatientID, image.StudyDate, image.StudyTime, image.StudyID = "1", "20200101", "000000", "1"
        image.SeriesNumber = 1
        image.save_as(path)
        disc.add(path)
    disc.write(tmp_path / "disc")
    is_the_scan(tmp_path / "disc")
    shutil.copy(tmp_path / "disc" / "DICOMDIR", tmp_path / "scan")
    is_the_scan(tmp_path / "scan")


def test_a_dose_that_stops_the_library_is_passed_over(scan: Path) -> None:
    dose = {"Rows": 8, "Columns": 9, "SamplesPerPixel": 1, "PhotometricInterpretation": "MONOCHROME2"}
    dose |= {"BitsAllocated": 16, "BitsStored": 16, "HighBit": 15, "PixelRepresentation": 0, "PixelData": bytes(144)}
    dose |= {"SliceThickness": None, "GridFrameOffsetVector": [0, 5, 10], "FrameIncrementPointer": 0x3004000C}
    dose |= {"DoseGridScaling": 0.001, "PixelSpacing": [1, 1], "ImagePositionPatient": [0, 0, 0]}
    dose |= {"ImageOrientationPatient": [1, 0, 0, 0, 1, 0]}
    write_object(scan / "dose.dcm", "1.2.840.10008.5.1.4.1.1.481.2", "RTDOSE", scan / "1_001.dcm", **dose)
    with pytest.raises(RuntimeError, match="invalid logic"):
        sitk.ImageSeriesReader.GetGDCMSeriesIDs(str(scan))
    is_the_scan(scan)
    assert "cannot be read" in refused(scan / "dose.dcm")


def test_a_series_is_chosen_by_its_number_or_the_end_of_its_uid(tmp_path: Path) -> None:
    write_dicom_series(tmp_path, ramp(CT), CT, uid="41")
    write_dicom_series(tmp_path, ramp(CT)[:2] + 7, CT, uid="52", modality="MR")
    write_dicom_series(tmp_path / "below", ramp(CT)[:3] + 9, CT, uid="63", modality="MR")
    numbers = {"41": 3, "52": 4, "63": 4}

    def change(k: int, image: pydicom.Dataset) -> None:
        image.SeriesNumber = numbers[image.SeriesInstanceUID[-2:]]
        image.PatientName, image.SeriesDescription = "Doe^Jane", "liver of Jane"

    edited(tmp_path, change)
    edited(tmp_path / "below", change)
    is_the_scan(tmp_path, series="3")
    np.testing.assert_array_equal(read_volume(tmp_path, series=" 5.1.52").array, ramp(CT)[:2] + 7)
    np.testing.assert_array_equal(read_volume(tmp_path, series="1125.1.63").array, ramp(CT)[:3] + 9)
    for message, which in ((refused(tmp_path), ""), (refused(tmp_path, "9"), "none"), (refused(tmp_path, "4"), "2 of them")):
        assert "3 image series" in message
        assert which in message
        assert "series 3 (6 CT images, UID ending in 5.1.41)" in message
        assert "series 4 (2 MR images, UID ending in 5.1.52), series 4 (3 MR images, UID ending in 5.1.63)" in message
        assert "Jane" not in message
        assert "--series" in message
    assert "none of them" in refused(tmp_path / "below", "3")
    assert "no series to choose" in refused(tmp_path / "below" / "63_001.dcm", "4")


def test_a_screen_shot_without_a_place_is_no_choice_beside_a_scan(scan: Path) -> None:
    write_dicom_series(scan / "report", ramp(CT)[:1], CT, uid="2")
    edited(scan / "report", lambda k, image: delattr(image, "ImagePositionPatient"))
    assert "2 image series" in refused(scan)
    set_all(scan / "report", "SOPClassUID", lambda k: "1.2.840.10008.5.1.4.1.1.7")
    is_the_scan(scan)
    assert "where they lie" in refused(scan / "report")


def shifted(folder: Path, shifts: dict[int, tuple[float, float, float]]) -> None:
    write_dicom_series(folder, ramp(CT), CT, shifts=shifts)


def set_all(folder: Path, name: str, value: Callable[[int], object]) -> None:
    edited(folder, lambda k, image: setattr(image, name, value(k)))


def with_another(folder: Path, geometry: Geometry) -> None:
    """One image more of the same series, on another grid."""
    write_dicom_series(folder / "other", ramp(geometry), geometry)
    (folder / "other" / "1_001.dcm").rename(folder / "scout.dcm")


def cut_off(path: Path) -> None:
    path.write_bytes(path.read_bytes()[:-60])


def leads_nowhere(path: Path) -> None:
    path.unlink()
    path.symlink_to(path.with_name("gone"))


DAMAGES: dict[str, tuple[Callable[[Path], object], str]] = {
    "a missing slice": (lambda f: (f / "1_003.dcm").unlink(), r"not evenly spaced \(2.5 to 5 mm\)"),
    "a repeated position": (lambda f: shifted(f, {4: (0.0, 0.0, -2.5)}), "same place"),
    "an uneven repeat": (
        lambda f: edited(f, lambda k, image: moved(k, image, 2.5 * min(k, 3))),
        "show 4 slices, each up to 3 times at the same place",
    ),
    "a repeated scan": (
        lambda f: edited(f, lambda k, image: moved(k, image, 2.5 * (k % 2))),
        "6 images of .* show 2 slices, each 3 times at the same place",
    ),
    "a slice moved aside": (lambda f: shifted(f, {3: (8.0, 0.0, 0.0)}), "not evenly spaced"),
    "gantry tilt": (lambda f: shifted(f, {k: (0.0, 0.4 * k, 0.0) for k in range(6)}), "gantry tilt"),
    "no pixel spacing": (
        lambda f: edited(f, lambda k, image: delattr(image, "PixelSpacing")),
        "do not say how large their pixels are",
    ),
    "pixel spacing of zero": (lambda f: set_all(f, "PixelSpacing", lambda k: [0, 1]), "not above zero"),
    "two pixel spacings": (
        lambda f: set_all(f, "PixelSpacing", lambda k: [1 + k // 3, 1]),
        "differ in the size of their pixels",
    ),
    "two sizes": (lambda f: with_another(f, oriented("LPS", (12, 8, 1), (0.75, 0.75, 2.5))), "differ in size"),
    "two directions": (lambda f: with_another(f, oriented("LIP", (9, 8, 1), (0.75, 0.75, 2.5))), "different directions"),
    "the first image cut off": (lambda f: cut_off(f / "1_001.dcm"), "1 damaged image"),
    "another image cut off": (lambda f: cut_off(f / "1_002.dcm"), "1 damaged image"),
    "an image that cannot be opened": (lambda f: leads_nowhere(f / "1_001.dcm"), r'"1_001.dcm" in .*cannot be opened'),
}


@pytest.mark.parametrize("damage", DAMAGES)
def test_a_damaged_series_is_refused(damage: str, scan: Path) -> None:
    do, sentence = DAMAGES[damage]
    do(scan)
    assert re.search(sentence, refused(scan))


def test_a_copy_is_named(scan: Path) -> None:
    (scan / "more").mkdir()
    shutil.copy(scan / "1_003.dcm", scan / "more" / "copy of 3.dcm")
    assert f'"1_003.dcm" and "more/copy of 3.dcm" in {scan.name} are the same image' in refused(scan)


@pytest.mark.parametrize("distance", [0.33, 2.96875])
def test_positions_rounded_to_a_tenth_are_read_with_a_warning(distance: float, tmp_path: Path) -> None:
    geometry = oriented("LPS", (9, 8, 20), (0.75, 0.75, distance))
    write_dicom_series(tmp_path, ramp(geometry), geometry)
    edited(tmp_path, lambda k, image: moved(k, image, round(distance * k + 1e-9, 1)))
    volume = read_volume(tmp_path)
    np.testing.assert_array_equal(volume.array, ramp(geometry))
    assert volume.geometry.spacing[2] == pytest.approx(distance, abs=0.005)
    (warning,) = volume.warnings
    assert "are rounded" in warning
    assert "evenly spaced" in warning
    (tmp_path / "1_010.dcm").unlink()
    assert "some may be missing" in refused(tmp_path)


def test_rounded_positions_across_the_stack_are_no_gantry_tilt(tmp_path: Path) -> None:
    geometry = GEOMETRIES["oblique"]
    write_dicom_series(tmp_path, ramp(geometry), geometry)

    def rounded(k: int, image: pydicom.Dataset) -> None:
        image.ImagePositionPatient = [f"{float(v):.1f}" for v in image.ImagePositionPatient]

    edited(tmp_path, rounded)
    volume = read_volume(tmp_path)
    assert len(volume.warnings) == 1
    corners = np.array([[i, j, k, 1] for i in (0, 8) for j in (0, 7) for k in (0, 5)])
    to_ijk = np.linalg.inv(volume.geometry.affine)
    for ijk in corners:
        place = geometry.affine @ ijk
        i, j, k = np.rint((to_ijk @ place)[:3]).astype(int)
        assert volume.array[k, j, i] == ramp(geometry)[ijk[2], ijk[1], ijk[0]]
        assert np.abs(volume.geometry.affine @ [i, j, k, 1] - place).max() < 0.1


@pytest.mark.parametrize(("said", "expected"), [("PT", "PT"), ("", None)])
def test_the_modality_is_what_the_images_say(said: str, expected: str | None, scan: Path) -> None:
    set_all(scan, "Modality", lambda k: said)
    set_all(scan, "PixelSpacing", lambda k: [1.5, 0.5])
    volume = read_volume(scan)
    assert (volume.modality, volume.warnings) == (expected, ())
    assert volume.geometry.spacing == pytest.approx((0.5, 1.5, 2.5)), "rows and columns keep their own spacing"


@pytest.mark.skipif(not hasattr(os, "mkfifo"), reason="this system has no pipes with names")
def test_a_series_over_several_folders_with_a_pipe_that_is_not_waited_for(scan: Path) -> None:
    for number, path in enumerate(sorted(scan.glob("*.dcm"))):
        (scan / f"part {number % 3}").mkdir(exist_ok=True)
        path.rename(scan / f"part {number % 3}" / path.name)
    os.mkfifo(scan / "pipe")
    is_the_scan(scan)
    frames = CT.to_sitk(ramp(CT))
    frames.SetMetaData("0008|0060", "CT")
    (scan / "below").mkdir()
    sitk.WriteImage(frames, str(scan / "below" / "frames.dcm"))
    assert "multi-frame" in refused(scan / "below" / "frames.dcm")
    assert "multi-frame" in refused(scan / "below")


def test_whatever_the_library_throws_is_one_sentence(scan: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(*_: object) -> None:
        raise SystemError("an assertion of the library")

    monkeypatch.setattr(dicom, "_image", fail)
    assert f"{scan.name} cannot be read as DICOM images" in refused(scan)
