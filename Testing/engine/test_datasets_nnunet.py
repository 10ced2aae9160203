"""nnU-Net raw folders: both label formats, orientations, partial labels, and what is refused."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import nibabel as nib
import numpy as np
import pytest
import SimpleITK as sitk

from progidiff.datasets.nnunet import NnUNetDataset
from progidiff.datasets.slices import split_by_patient
from progidiff.errors import DatasetError

# In RAS millimetres: one marker voxel per organ, so that a mirrored slice cannot go unnoticed.
SHAPE_RAS = (12, 10, 4)
SPACING = (1.5, 2.0, 5.0)
MARKERS = {1: (9, 6, 2), 2: (10, 2, 1), 3: (2, 2, 1)}


def volumes() -> tuple[np.ndarray, np.ndarray]:
    image = np.random.default_rng(1).normal(40, 20, SHAPE_RAS).astype(np.float32)
    label = np.zeros(SHAPE_RAS, dtype=np.uint8)
    for value, (i, j, k) in MARKERS.items():
        label[i - 1 : i + 2, j - 1 : j + 2, k] = value
    return image, label


def save(path: Path, ras: np.ndarray, codes: str = "RAS") -> None:
    """Store an array given in RAS order with axes of another orientation."""
    path.parent.mkdir(parents=True, exist_ok=True)
    image = nib.Nifti1Image(ras, np.diag([*SPACING, 1.0]))
    turn = nib.orientations.ornt_transform(nib.io_orientation(image.affine), nib.orientations.axcodes2ornt(codes))
    image = image.as_reoriented(turn)
    if path.name.endswith((".nii.gz", ".nii")):
        nib.save(image, path)
        return
    flip = np.diag([-1.0, -1.0, 1.0, 1.0])
    out = sitk.GetImageFromArray(np.asarray(image.dataobj).T)
    affine = flip @ image.affine
    spacing = np.linalg.norm(affine[:3, :3], axis=0)
    out.SetSpacing(spacing.tolist())
    out.SetDirection((affine[:3, :3] / spacing).ravel().tolist())
    out.SetOrigin(affine[:3, 3].tolist())
    sitk.WriteImage(out, str(path))


def dataset(
    folder: Path,
    labels: dict[str, Any],
    *,
    cases: tuple[str, ...] = ("case_a",),
    codes: str = "RAS",
    ending: str = ".nii.gz",
    suffix: str = "_0000",
    **description: Any,
) -> Path:
    image, label = volumes()
    for case in cases:
        save(folder / "imagesTr" / f"{case}{suffix}{ending}", image, codes)
        save(folder / "labelsTr" / f"{case}{ending}", label, codes)
    content = {"labels": labels, "channel_names": {"0": "CT"}, "file_ending": ending} | description
    (folder / "dataset.json").write_text(json.dumps({k: v for k, v in content.items() if v is not None}), "utf-8")
    return folder


V2 = {"background": 0, "liver": 1, "right_kidney": 2, "left_kidney": 3}


@pytest.mark.parametrize("codes", ["RAS", "LPS", "LAS", "PIR", "SPL"])
@pytest.mark.parametrize("ending", [".nii.gz", ".nrrd", ".mha"])
def test_slices_are_canonical_whatever_the_storage(tmp_path: Path, codes: str, ending: str) -> None:
    data = NnUNetDataset(dataset(tmp_path, V2, codes=codes, ending=ending))
    slices = list(data)
    image, label = volumes()
    assert [s.plane for s in slices] == ["axial"] * 4
    by_content = {s.image.tobytes(): s for s in slices}
    for k in range(4):
        expected = np.ascontiguousarray(image[::-1, ::-1, k].T)
        found = by_content[expected.tobytes()]
        assert found.spacing_rc == pytest.approx((SPACING[1], SPACING[0]))
        for target, value in {"liver": 1, "right kidney": 2, "left kidney": 3}.items():
            assert np.array_equal(found.labels[target], value == label[::-1, ::-1, k].T)
        assert np.array_equal(found.labels["kidneys"], label[::-1, ::-1, k].T >= 2)


def test_the_right_kidney_is_on_the_images_left(tmp_path: Path) -> None:
    found = next(s for s in NnUNetDataset(dataset(tmp_path, V2)) if s.labels["kidneys"].any())
    columns = {t: np.argwhere(found.labels[t])[:, 1].mean() for t in ("right kidney", "left kidney")}
    assert columns["right kidney"] < columns["left kidney"]


def test_version_1_labels_and_images_without_a_channel_number(tmp_path: Path) -> None:
    folder = dataset(
        tmp_path,
        {"0": "background", "1": "Liver", "2": "cancer"},
        suffix="",
        channel_names=None,
        file_ending=None,
        modality={"0": "CT"},
    )
    data = NnUNetDataset(folder)
    assert data.labels == {"liver": (1,)}
    assert data.labelled_targets == {"liver"}
    assert data.warnings == ["The label 'cancer' names no known organ and is left out."]
    assert data.modality == "CT"
    assert set(next(iter(data)).labels) == {"liver"}


def test_regions_are_unions_of_values(tmp_path: Path) -> None:
    labels = {"background": 0, "liver": 1, "kidney": [2, 3], "left_kidney": 3}
    data = NnUNetDataset(dataset(tmp_path, labels))
    assert data.labels == {"liver": (1,), "kidneys": (2, 3), "left kidney": (3,)}
    total = sum(int(s.labels["kidneys"].sum()) for s in data)
    assert total == int((volumes()[1] >= 2).sum())
    assert data.warnings == []  # values that two entries share are what regions are for
    # The right kidney alone was never named, so it is unknown.
    assert "right kidney" not in data.labelled_targets


def test_an_organ_that_is_labelled_but_absent_has_an_empty_mask_and_an_unlabelled_one_none(tmp_path: Path) -> None:
    data = NnUNetDataset(dataset(tmp_path, {"background": 0, "liver": 1, "spleen": 9}))
    for found in data:
        assert found.labelled == {"liver", "spleen"} == set(found.labels)
        assert not found.labels["spleen"].any()
        assert "pancreas" not in found.labels


def test_an_all_background_label_map_is_a_case_without_organs(tmp_path: Path) -> None:
    folder = dataset(tmp_path, V2)
    save(folder / "labelsTr" / "case_a.nii.gz", np.zeros(SHAPE_RAS, dtype=np.uint8))
    assert not any(mask.any() for s in NnUNetDataset(folder) for mask in s.labels.values())


def told(folder: Path) -> list[str]:
    """What is said of a data set while it is opened and read, and that the same is kept."""
    said: list[str] = []
    data = NnUNetDataset(folder, tell=said.append)
    for _ in range(2):
        list(data)
    assert data.warnings == said
    return said


def test_values_without_a_name_are_said_once(tmp_path: Path) -> None:
    (sentence,) = told(dataset(tmp_path, {"background": 0, "liver": 1}, cases=("a", "b")))
    assert "does not name (2, 3)" in sentence
    assert "count as background" in sentence


def test_a_lesion_is_offered_as_part_of_its_organ(tmp_path: Path) -> None:
    labels: dict[str, Any] = {"background": 0, "Leber": 1, "liver_tumor": 2, "left_kidney": 3}
    (sentence,) = told(dataset(tmp_path, labels))
    assert "'liver_tumor'" in sentence
    assert "voxels of the value 2 count as not liver" in sentence
    offered = '"Leber": [1, 2]'
    assert offered in sentence
    # what is offered works, and says no more
    labels.update(json.loads(f"{{{offered}}}"))
    assert told(dataset(tmp_path, labels)) == []
    data = NnUNetDataset(tmp_path)
    assert data.labels["liver"] == (1, 2)
    label = volumes()[1]
    assert sum(int(s.labels["liver"].sum()) for s in data) == int(np.isin(label, (1, 2)).sum())


@pytest.mark.parametrize(
    ("labels", "expected"),
    [
        ({"left kidney": 1, "right kidney": 2, "kidney cyst": 3}, '"kidneys": [1, 2, 3]'),
        ({"left kidney": 1, "right kidney": 2, "tumour of the left kidney": 3}, '"left kidney": [1, 3]'),
        ({"pancreas": 1, "TumorPancreas": 2, "liver": 3}, '"pancreas": [1, 2]'),
        ({"liver": 1, "whole liver": [1, 2], "spleen": 3}, '"liver": [1, 2]'),
    ],
)
def test_an_organ_in_a_name_is_found(tmp_path: Path, labels: dict[str, Any], expected: str) -> None:
    (sentence,) = told(dataset(tmp_path, labels))
    assert expected in sentence


@pytest.mark.parametrize("name", ["cancer", "spleen tumor", "prostate/uterus", "vertebra 3"])
def test_what_is_in_no_labelled_organ_is_left_out(tmp_path: Path, name: str) -> None:
    labels = {"liver": 1, name: 2, "aorta": 3}
    assert told(dataset(tmp_path, labels)) == [f"The label '{name}' names no known organ and is left out."]


def test_two_names_of_one_organ_are_taken_together_and_said(tmp_path: Path) -> None:
    (sentence,) = told(dataset(tmp_path, {"liver": 1, "Leber": 2, "spleen": 3}))
    assert "'liver' and 'Leber' both mean liver" in sentence
    assert NnUNetDataset(tmp_path).labels["liver"] == (1, 2)


def test_a_byte_order_mark_is_no_damage(tmp_path: Path) -> None:
    path = dataset(tmp_path, V2) / "dataset.json"
    path.write_text(path.read_text("utf-8"), "utf-8-sig")
    assert NnUNetDataset(tmp_path).labels["liver"] == (1,)


def test_a_missing_image_is_its_own_cases_fault(tmp_path: Path) -> None:
    folder = dataset(tmp_path, V2, cases=("a", "b"))
    (folder / "imagesTr" / "a_0000.nii.gz").unlink()
    data = NnUNetDataset(folder)
    with pytest.raises(DatasetError, match="case 'a' is missing"):
        list(data.slices(data.cases[0]))
    assert len(list(data.slices(data.cases[1]))) == SHAPE_RAS[2]


def test_slices_with_ignored_voxels_are_left_out(tmp_path: Path) -> None:
    data = NnUNetDataset(dataset(tmp_path, {"background": 0, "right_kidney": 2, "left_kidney": 3, "ignore": 1}))
    assert [s.slice_id for s in data] == ["case_a_0", "case_a_1", "case_a_3"]


@pytest.mark.parametrize(
    ("channel", "expected"), [("CT", "CT"), ("ct", "CT"), ("MRI", "MR"), ("T2", "MR"), ("T1w", "MR"), ("MR-T2", "MR")]
)
def test_the_modality_is_the_channels_name(tmp_path: Path, channel: str, expected: str) -> None:
    assert NnUNetDataset(dataset(tmp_path, V2, channel_names={"0": channel})).modality == expected


def test_an_unknown_modality_must_be_given(tmp_path: Path) -> None:
    folder = dataset(tmp_path, V2, channel_names={"0": "noNorm"})
    with pytest.raises(DatasetError, match="CT or MR"):
        NnUNetDataset(folder)
    assert NnUNetDataset(folder, modality="MR").modality == "MR"


def test_patients_and_other_planes(tmp_path: Path) -> None:
    folder = dataset(tmp_path, V2, cases=("p1_day1", "p1_day2", "p2_day1"))
    data = NnUNetDataset(folder, patient_of=lambda name: name.split("_")[0], plane="coronal")
    assert len(data) == 3
    assert data.patients == {"p1", "p2"}
    slices = list(data)
    assert len(slices) == 3 * SHAPE_RAS[1]
    assert {s.plane for s in slices} == {"coronal"}
    assert slices[0].image.shape == (SHAPE_RAS[2], SHAPE_RAS[0])
    assert {s.patient for s in slices} == {"p1", "p2"}


def described(text: str) -> Callable[[Path], object]:
    return lambda folder: (folder / "dataset.json").write_text(text, "utf-8")


def labelled(array: np.ndarray, codes: str = "RAS") -> Callable[[Path], object]:
    return lambda folder: save(folder / "labelsTr" / "case_a.nii.gz", array, codes)


DAMAGES: dict[str, tuple[Callable[[Path], object], str]] = {
    "no description": (lambda folder: (folder / "dataset.json").unlink(), "no dataset.json"),
    "no json": (described("{"), "JSON"),
    "no labels": (described('{"name": "x"}'), "no table 'labels'"),
    "odd label": (described('{"labels": {"liver": 1.5}, "channel_names": {"0": "CT"}}'), "neither a number nor a name"),
    "negative": (described('{"labels": {"liver": -1}, "channel_names": {"0": "CT"}}'), "negative value -1"),
    "negative, version 1": (described('{"labels": {"-1": "liver"}, "channel_names": {"0": "CT"}}'), "negative value -1"),
    "background with an organ's name": (
        described('{"labels": {"liver": 0, "spleen": 1}}'),
        "gives 'liver' the value 0, which is the background",
    ),
    "one value, two names": (described('{"labels": {"liver": 1, "spleen": 1}}'), "the value 1 to both 'liver' and 'spleen'"),
    "one name twice": (described('{"labels": {"liver": 1, "spleen": 2, "liver": 3}}'), "gives 'liver' twice"),
    "no known organ": (described('{"labels": {"bg": 0, "widget": 1}}'), "No label of"),
    "no cases": (lambda folder: (folder / "labelsTr" / "case_a.nii.gz").unlink(), "holds no label maps"),
    "image is text": (
        lambda folder: (folder / "imagesTr" / "case_a_0000.nii.gz").write_text("not an image", "utf-8"),
        "In data set",
    ),
    "other grid": (labelled(volumes()[1][:, :, :3]), "grid"),
    "mirrored label": (labelled(volumes()[1], "LAS"), "grid"),
    "fractions": (labelled(volumes()[1].astype(np.float32) / 2), "whole numbers"),
}


@pytest.mark.parametrize("damage", DAMAGES)
def test_damaged_folders_end_in_one_sentence(tmp_path: Path, damage: str) -> None:
    folder = dataset(tmp_path, V2)
    do, message = DAMAGES[damage]
    do(folder)
    with pytest.raises(DatasetError, match=message) as caught:
        list(NnUNetDataset(folder))
    assert "\n" not in str(caught.value)


def test_split_by_patient_is_disjoint_complete_and_repeatable() -> None:
    ids = [f"p{i % 20}" for i in range(200)]
    train, held_out = split_by_patient(ids, 0.25, seed=1)
    assert len(held_out) == 5
    assert not train & held_out
    assert train | held_out == set(ids)
    assert (train, held_out) == split_by_patient(reversed(ids), 0.25, seed=1)
    assert held_out != split_by_patient(ids, 0.25, seed=2)[1]


@pytest.mark.parametrize("fraction", [0.01, 0.99])
def test_split_by_patient_leaves_a_patient_on_each_side(fraction: float) -> None:
    train, held_out = split_by_patient(["a", "b"], fraction)
    assert len(train) == len(held_out) == 1


@pytest.mark.parametrize(("ids", "fraction"), [(["a", "a"], 0.5), ([], 0.5), (["a", "b"], 0.0), (["a", "b"], 1.0)])
def test_impossible_splits_are_refused(ids: list[str], fraction: float) -> None:
    with pytest.raises(DatasetError):
        split_by_patient(ids, fraction)
