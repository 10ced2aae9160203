"""DICOM SEG: read back by pydicom, highdicom and ITK to the last voxel, and looked at by dciodvfy."""

from __future__ import annotations

import io
import shutil
import subprocess
import sys
from dataclasses import replace
from pathlib import Path
from typing import Any

import highdicom as hd
import numpy as np
import pydicom
import pytest
import SimpleITK as sitk

from progidiff.errors import InputError
from progidiff.outputs.dicom_seg import dicom_seg, read_headers
from progidiff.outputs.segmentation import Segment
from progidiff.targets.catalog import target_for
from progidiff.volumes.geometry import LPS_FROM_RAS, Geometry
from progidiff.volumes.reading import Volume, read_volume

from ..volume_examples import GEOMETRIES, oblique, oriented, write_patient_series

THIN = oriented("LPS", (24, 20, 30), (0.8, 0.8, 0.6))
TILTED = oblique((21, 19, 12))
MODEL_TAGS = {
    "ProGiDiff.model": "abdomen-1",
    "ProGiDiff.adapter": "mr-7",
    "ProGiDiff.prompt": "linke Niere",
    "ProGiDiff.seed": "5",
}


def patient_series(folder: Path, geometry: Geometry, **options: Any) -> Volume:
    """A series of one patient, as read from its folder."""
    write_patient_series(folder, geometry, **options)
    return read_volume(folder)


@pytest.fixture
def thin(tmp_path: Path) -> Volume:
    """A series of one patient with thin slices."""
    return patient_series(tmp_path / "series", THIN)


def two_organs(geometry: Geometry) -> list[Segment]:
    """Two segments that overlap and reach the first and the last voxel, and an empty one."""
    rng = np.random.default_rng(1)
    kidney = rng.random(geometry.shape_kji) < 0.3
    liver = rng.random(geometry.shape_kji) < 0.3
    kidney[0, 0, 0] = liver[-1, -1, -1] = kidney[-1, 0, -1] = liver[0] = True
    target = target_for("left kidney")
    return [
        Segment("left kidney", kidney, target.color, target.terminology_entry, MODEL_TAGS),
        Segment("nothing", np.zeros_like(kidney), (0, 0, 0)),
        Segment("Leber\\Rand", liver, (1.0, 0.0, 0.0)),
    ]


def written(volume: Volume, segments: list[Segment], *, by_hand: bool = False) -> bytes:
    return dicom_seg(segments, volume.geometry, read_headers(volume.dicom_files[::-1]), by_hand=by_hand)


def disjoint(segments: list[Segment]) -> list[Segment]:
    """The same, but the last one leaves the first one's voxels alone."""
    first, empty, last = segments
    return [first, empty, replace(last, mask=np.asarray(last.mask) & ~np.asarray(first.mask))]


@pytest.mark.slow
@pytest.mark.parametrize(
    ("geometry", "shifts", "apart"),
    [
        (GEOMETRIES["single slice"], None, False),
        (GEOMETRIES["PSR"], None, True),
        (THIN, None, False),
        (TILTED, None, False),
        (oriented("LPS", (9, 8, 6), (0.75, 0.75, 5.0)), {2: (0.0, 0.0, 0.04)}, True),
    ],
    ids=["one slice", "sagittal and disjoint", "thin", "oblique", "rounded positions and disjoint"],
)
def test_every_voxel_lies_where_it_lay(
    geometry: Geometry, shifts: dict[int, tuple[float, float, float]] | None, apart: bool, tmp_path: Path
) -> None:
    volume = patient_series(tmp_path / "series", geometry, shifts=shifts)
    segments = two_organs(volume.geometry)
    if apart:
        segments = disjoint(segments)
    masks = {"left kidney": np.asarray(segments[0].mask), "Leber/Rand": np.asarray(segments[2].mask)}
    content = written(volume, segments)

    # pydicom alone: the places of the voxels of each frame, in millimetres of the patient.
    seg = pydicom.dcmread(io.BytesIO(content))
    assert seg.SegmentsOverlap == ("NO" if apart else "YES")
    labels = {int(s.SegmentNumber): str(s.SegmentLabel) for s in seg.SegmentSequence}
    assert set(labels.values()) == set(masks)
    shared = seg.SharedFunctionalGroupsSequence[0]
    rows_apart, columns_apart = (float(v) for v in shared.PixelMeasuresSequence[0].PixelSpacing)
    along_row, along_column = np.array(shared.PlaneOrientationSequence[0].ImageOrientationPatient, float).reshape(2, 3)
    found = {name: np.zeros(volume.geometry.shape_kji, bool) for name in masks}
    to_ijk = np.linalg.inv(volume.geometry.affine_lps)
    pixels = seg.pixel_array.reshape(-1, seg.Rows, seg.Columns)
    for frame, plane in zip(seg.PerFrameFunctionalGroupsSequence, pixels, strict=True):
        position = np.array(frame.PlanePositionSequence[0].ImagePositionPatient, float)
        row, column = np.nonzero(plane)
        places = position + np.outer(column * columns_apart, along_row) + np.outer(row * rows_apart, along_column)
        at = (to_ijk @ np.c_[places, np.ones(len(places))].T)[:3]
        assert np.abs(at - np.rint(at)).max() < (0.02 if shifts else 1e-4)
        i, j, k = np.rint(at).astype(int)
        found[labels[int(frame.SegmentIdentificationSequence[0].ReferencedSegmentNumber)]][k, j, i] = True
    for name, mask in masks.items():
        np.testing.assert_array_equal(found[name], mask)

    # highdicom: by the images that the frames name.
    heads = read_headers(volume.dicom_files)
    read = hd.seg.segread(io.BytesIO(content))
    back = read.get_pixels_by_source_instance([h.SOPInstanceUID for h in heads], assert_missing_frames_are_empty=True)
    for number, name in labels.items():
        np.testing.assert_array_equal(back[..., number - 1], masks[name])
    named = {ref.ReferencedSOPInstanceUID for ref in seg.ReferencedSeriesSequence[0].ReferencedInstanceSequence}
    assert named == {h.SOPInstanceUID for h in heads}
    assert seg.ReferencedSeriesSequence[0].SeriesInstanceUID == heads[0].SeriesInstanceUID


# Of sizes that fill whole bytes: ITK's reader of single bits leaves out what does not fill the last one.
@pytest.mark.parametrize("geometry", [THIN, oblique((24, 20, 12))], ids=["thin", "oblique"])
def test_itk_reads_the_grid(geometry: Geometry, tmp_path: Path) -> None:
    volume = patient_series(tmp_path / "series", geometry)
    mask = np.asarray(two_organs(volume.geometry)[2].mask)
    (tmp_path / "seg.dcm").write_bytes(written(volume, [Segment("liver", mask, (1, 0, 0))]))
    image = sitk.ReadImage(str(tmp_path / "seg.dcm"))
    lps = Geometry.from_sitk(image)
    assert image.GetSize() == volume.geometry.shape_ijk
    # ITK may count the frames from the other end: compared are places.
    step = np.rint(np.linalg.inv(volume.geometry.affine) @ lps.affine)
    np.testing.assert_allclose(volume.geometry.affine @ step, lps.affine, atol=1e-3)
    assert abs(step[2, 2]) == 1
    array = sitk.GetArrayFromImage(image) != 0
    np.testing.assert_array_equal(array if step[2, 2] > 0 else array[::-1], mask)


def test_who_and_what_it_is_of_comes_from_the_images(thin: Volume) -> None:
    seg = pydicom.dcmread(io.BytesIO(written(thin, two_organs(THIN))))
    source = pydicom.dcmread(thin.dicom_files[0])
    for keyword in (
        *("PatientID", "PatientBirthDate", "PatientSex", "StudyInstanceUID", "StudyID", "StudyDate", "StudyTime"),
        *("AccessionNumber", "FrameOfReferenceUID"),
    ):
        assert seg[keyword].value == source[keyword].value, keyword
    assert (str(seg.PatientName), seg.StudyDescription, seg.SpecificCharacterSet) == ("Müller^Jörg", "Größe", "ISO_IR 192")
    assert (seg.Modality, seg.SegmentationType, seg.SeriesNumber) == ("SEG", "BINARY", 1004)
    assert seg.SeriesInstanceUID != source.SeriesInstanceUID
    assert seg.SeriesDescription == "ProGiDiff: left kidney, Leber/Rand"


def test_segments_say_what_they_are_and_who_made_them(thin: Volume) -> None:
    kidney, drawn = pydicom.dcmread(io.BytesIO(written(thin, two_organs(THIN)))).SegmentSequence
    target = target_for("left kidney")
    kind = kidney.SegmentedPropertyTypeCodeSequence[0]
    assert [
        (c.CodeValue, c.CodingSchemeDesignator, c.CodeMeaning)
        for c in (kidney.SegmentedPropertyCategoryCodeSequence[0], kind, kind.SegmentedPropertyTypeModifierCodeSequence[0])
    ] == [(c.value, c.scheme, c.meaning) for c in (target.category, target.type, target.modifier)]
    algorithm = kidney.SegmentationAlgorithmIdentificationSequence[0]
    assert (kidney.SegmentAlgorithmType, algorithm.AlgorithmName) == ("AUTOMATIC", "ProGiDiff abdomen-1 + mr-7")
    assert algorithm.AlgorithmParameters == "model=abdomen-1,adapter=mr-7,prompt=linke Niere,seed=5"
    # Red, as Slicer writes it: L 54.3, a 80.8, b 69.9 (CIELab, D50).
    lab = np.array(drawn.RecommendedDisplayCIELabValue) / 65535 * (100, 255, 255) - (0, 128, 128)
    np.testing.assert_allclose(lab, (54.3, 80.8, 69.9), atol=0.1)
    assert (drawn.SegmentAlgorithmType, "SegmentationAlgorithmIdentificationSequence" in drawn) == ("MANUAL", False)
    assert drawn.SegmentedPropertyTypeCodeSequence[0].CodeMeaning == "Tissue"
    assert (kidney.TrackingID, drawn.TrackingID) == ("left kidney", "Leber/Rand")
    assert kidney.TrackingUID != drawn.TrackingUID

    # The same segment, chosen by a person, keeps its tracking UID in a new object.
    again = pydicom.dcmread(io.BytesIO(written(thin, two_organs(THIN), by_hand=True)))
    assert again.SegmentSequence[0].SegmentAlgorithmType == "SEMIAUTOMATIC"
    assert again.SegmentSequence[0].TrackingUID == kidney.TrackingUID


def test_a_region_that_slicer_added_is_kept(thin: Volume) -> None:
    entry = (
        "List~SCT^49755003^Morphologically Altered Structure~SCT^4147007^Mass~^^~Regions~SCT^10200004^Liver~SCT^7771000^Left"
    )
    mask = np.ones(THIN.shape_kji, bool)
    segment = pydicom.dcmread(io.BytesIO(written(thin, [Segment("x" * 90, mask, (0, 1, 0), entry)]))).SegmentSequence[0]
    assert segment.SegmentedPropertyTypeCodeSequence[0].CodeMeaning == "Mass"
    region = segment.AnatomicRegionSequence[0]
    assert (region.CodeMeaning, region.AnatomicRegionModifierSequence[0].CodeMeaning) == ("Liver", "Left")
    assert segment.SegmentLabel == "x" * 61 + "..."


def moved(geometry: Geometry, millimetres: float) -> Geometry:
    affine = geometry.affine.copy()
    affine[:3, 3] += LPS_FROM_RAS[:3, :3] @ (0.0, 0.0, millimetres)
    return Geometry(geometry.shape_ijk, affine)


@pytest.mark.parametrize("millimetres", [0.6, 0.3])
def test_a_volume_that_left_its_images_is_refused(millimetres: float, thin: Volume) -> None:
    with pytest.raises(InputError, match="voxels are not those of its DICOM images"):
        dicom_seg(two_organs(THIN), moved(thin.geometry, millimetres), read_headers(thin.dicom_files))


def test_what_is_no_whole_series_is_refused(thin: Volume, monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(InputError, match="an image is missing"):
        dicom_seg(two_organs(THIN), thin.geometry, read_headers(thin.dicom_files[:-1]))
    with pytest.raises(InputError, match="Every segment is empty"):
        written(thin, two_organs(THIN)[1:2])
    with pytest.raises(InputError, match="cannot be read"):
        read_headers([*thin.dicom_files, io.BytesIO(b"no DICOM at all")])
    heads = read_headers(thin.dicom_files)
    study = heads[0].pop("StudyInstanceUID")
    with pytest.raises(InputError, match="do not say their StudyInstanceUID"):
        dicom_seg(two_organs(THIN), thin.geometry, heads)
    heads[0].add(study)
    heads[0].NumberOfFrames = 30
    with pytest.raises(InputError, match="one multi-frame DICOM object"):
        dicom_seg(two_organs(THIN), thin.geometry, heads)
    monkeypatch.setitem(sys.modules, "highdicom", None)
    with pytest.raises(InputError, match="needs the package highdicom"):
        read_headers([])


def test_names_in_another_alphabet_are_kept(thin: Volume) -> None:
    for file in thin.dicom_files:
        image = pydicom.dcmread(file)
        image.SpecificCharacterSet = ["", "ISO 2022 IR 87"]
        image.PatientName, image.StudyDescription = "Yamada^Tarou=山田^太郎", "腹部"
        image.save_as(file)
    seg = pydicom.dcmread(io.BytesIO(written(thin, two_organs(THIN))))
    assert (str(seg.PatientName), seg.StudyDescription) == ("Yamada^Tarou=山田^太郎", "腹部")


def test_nothing_of_the_patient_is_said(
    thin: Volume, capfd: pytest.CaptureFixture[str], caplog: pytest.LogCaptureFixture, recwarn: pytest.WarningsRecorder
) -> None:
    for file in thin.dicom_files:
        image = pydicom.dcmread(file)
        with pydicom.config.disable_value_validation():
            image.PatientID, image.PatientBirthDate = "Geheim" * 20, "born long ago"
            image.save_as(file)
    seg = pydicom.dcmread(io.BytesIO(written(thin, two_organs(THIN))))
    told = "".join(capfd.readouterr()) + caplog.text + "".join(str(warning.message) for warning in recwarn)
    assert "Geheim" not in told
    assert "born" not in told
    assert seg.PatientID == "Geheim" * 20


@pytest.mark.skipif(shutil.which("dciodvfy") is None, reason="dciodvfy is not installed (Debian: dicom3tools)")
@pytest.mark.parametrize("geometry", [GEOMETRIES["single slice"], THIN, TILTED], ids=["one slice", "thin", "oblique"])
def test_dciodvfy_finds_no_error(geometry: Geometry, tmp_path: Path) -> None:
    volume = patient_series(tmp_path / "series", geometry)
    segments = two_organs(volume.geometry)
    segments.append(replace(segments[0], name="eine lange Beschreibung der größten Läsion in der linken Niere, " * 2))
    (tmp_path / "seg.dcm").write_bytes(written(volume, segments))
    ran = subprocess.run(["dciodvfy", str(tmp_path / "seg.dcm")], capture_output=True, text=True, check=False)
    assert "Segmentation" in ran.stderr
    assert [line for line in ran.stderr.splitlines() if line.startswith("Error")] == []


@pytest.mark.slow
def test_a_real_ct(shared_data: Path, tmp_path: Path) -> None:
    source = shared_data / "permissive" / "totalsegmentator_example_ct_dicom" / "example_ct_dicom"
    volume = read_volume(source)
    mask = volume.array > 200
    bone = target_for("liver")
    segment = Segment("bone", mask, bone.color, bone.terminology_entry, MODEL_TAGS)
    heads = read_headers(volume.dicom_files)
    # It was anonymised to the point of belonging to no study.
    with pytest.raises(InputError, match="anonymised"):
        dicom_seg([segment], volume.geometry, heads)
    for head in heads:
        head.StudyInstanceUID, head.SeriesInstanceUID = "1.2.3", "1.2.3.4"
    content = dicom_seg([segment], volume.geometry, heads)
    back = hd.seg.segread(io.BytesIO(content)).get_volume(combine_segments=False)
    # highdicom counts the slices from the other end: compared are places.
    filled = np.flatnonzero(mask.any((1, 2)))
    expected = (volume.geometry.affine_lps @ [0, 0, int(filled[-1]), 1])[:3]
    np.testing.assert_allclose(back.affine[:3, 3], expected, atol=1e-6)
    np.testing.assert_array_equal(np.squeeze(back.array)[::-1], mask[filled[0] : filled[-1] + 1])
