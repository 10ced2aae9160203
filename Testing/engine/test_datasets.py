"""Labelled data: nnU-Net raw folders and slice folders, turns, partial labels, and what is refused."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import nibabel as nib
import numpy as np
import pytest
import SimpleITK as sitk
from PIL import Image

from progidiff.datasets.nnunet import NnUNetDataset
from progidiff.datasets.slices import LabelledSlice, SliceFolder, split_by_patient
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


@pytest.mark.parametrize(("codes", "ending"), [("RAS", ".nii.gz"), ("LPS", ".nrrd"), ("PIR", ".mha"), ("SPL", ".nii.gz")])
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


def test_version_1_labels_and_images_without_a_channel_number(tmp_path: Path) -> None:
    folder = dataset(
        tmp_path,
        {"0": "background", "1": "Liver", "2": "cancer", "9": "spleen"},
        suffix="",
        channel_names=None,
        file_ending=None,
        modality={"0": "CT"},
    )
    path = folder / "dataset.json"
    path.write_text(path.read_text("utf-8"), "utf-8-sig")  # a byte order mark is no damage
    data = NnUNetDataset(folder)
    assert data.labels == {"liver": (1,), "spleen": (9,)}
    assert data.labelled_targets == {"liver", "spleen"}
    assert data.warnings == ["The label 'cancer' names no known organ and is left out."]
    assert data.modality == "CT"
    for found in data:  # the spleen is labelled and absent: its mask is empty; what is not labelled has none
        assert set(found.labels) == found.labelled == {"liver", "spleen"}
        assert not found.labels["spleen"].any()


def test_regions_are_unions_of_values(tmp_path: Path) -> None:
    labels = {"background": 0, "liver": 1, "kidney": [2, 3], "left_kidney": 3}
    data = NnUNetDataset(dataset(tmp_path, labels))
    assert data.labels == {"liver": (1,), "kidneys": (2, 3), "left kidney": (3,)}
    total = sum(int(s.labels["kidneys"].sum()) for s in data)
    assert total == int((volumes()[1] >= 2).sum())
    assert data.warnings == []  # values that two entries share are what regions are for
    # The right kidney alone was never named, so it is unknown.
    assert "right kidney" not in data.labelled_targets


def told(folder: Path) -> list[str]:
    """What is said of a data set while it is opened and read, and that the same is kept."""
    said: list[str] = []
    data = NnUNetDataset(folder, tell=said.append)
    for _ in range(2):
        list(data)
    assert data.warnings == said
    return said


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
        ({"liver": 1, "whole liver": [1, 2], "spleen": 3}, '"liver": [1, 2]'),
    ],
)
def test_an_organ_in_a_name_is_found(tmp_path: Path, labels: dict[str, Any], expected: str) -> None:
    (sentence,) = told(dataset(tmp_path, labels))
    assert expected in sentence


@pytest.mark.parametrize(
    ("labels", "said"),
    [
        ({"background": 0, "liver": 1}, ["does not name (2, 3)", "count as background"]),
        ({"liver": 1, "Leber": 2, "spleen": 3}, ["'liver' and 'Leber' both mean liver"]),
    ],
)
def test_what_is_strange_about_the_values_is_said_once(tmp_path: Path, labels: dict[str, Any], said: list[str]) -> None:
    (sentence,) = told(dataset(tmp_path, labels, cases=("a", "b")))
    assert all(part in sentence for part in said)


@pytest.mark.parametrize("name", ["cancer", "spleen tumor"])
def test_what_is_in_no_labelled_organ_is_left_out(tmp_path: Path, name: str) -> None:
    labels = {"liver": 1, name: 2, "aorta": 3}
    assert told(dataset(tmp_path, labels)) == [f"The label '{name}' names no known organ and is left out."]


def test_a_missing_image_is_its_own_cases_fault(tmp_path: Path) -> None:
    folder = dataset(tmp_path, V2, cases=("a", "b"))
    (folder / "imagesTr" / "a_0000.nii.gz").unlink()
    save(folder / "labelsTr" / "b.nii.gz", np.zeros(SHAPE_RAS, dtype=np.uint8))  # a case without organs is one
    data = NnUNetDataset(folder)
    with pytest.raises(DatasetError, match="case 'a' is missing"):
        list(data.slices(data.cases[0]))
    assert len(list(data.slices(data.cases[1]))) == SHAPE_RAS[2]


def test_slices_with_ignored_voxels_are_left_out(tmp_path: Path) -> None:
    data = NnUNetDataset(dataset(tmp_path, {"background": 0, "right_kidney": 2, "left_kidney": 3, "ignore": 1}))
    assert [s.slice_id for s in data] == ["case_a_0", "case_a_1", "case_a_3"]


@pytest.mark.parametrize(("channel", "expected"), [("ct", "CT"), ("MRI", "MR"), ("T1w", "MR"), ("MR-T2", "MR")])
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
    for fraction in (0.01, 0.99):
        assert [len(side) for side in split_by_patient(["a", "b"], fraction)] == [1, 1]
    for few, fraction in ((["a", "a"], 0.5), ([], 0.5), (["a", "b"], 0.0), (["a", "b"], 1.0)):
        with pytest.raises(DatasetError):
            split_by_patient(few, fraction)


R, C = 14, 20
VALUES = np.zeros((R, C), dtype=np.uint8)
VALUES[2:8, 1:9] = 1
VALUES[9:12, 12:18] = 2
GREY = np.random.default_rng(1).integers(0, 256, (R, C), dtype=np.uint8)

BASE: dict[str, Any] = {
    "modality": "CT",
    "spacing_mm": [0.8, 0.7],
    "labels": {"1": "liver", "2": "Milz"},
    "window": "display",
}


def folder_with(folder: Path, settings: dict[str, Any], **entry: Any) -> SliceFolder:
    """A folder of one slice; ``image`` and ``mask`` are what is stored as a picture, or the name of a file that is there."""
    row: dict[str, Any] = {"image": GREY, "mask": VALUES, "patient": "p1"} | entry
    for name in ("image", "mask"):
        if not isinstance(row[name], str):
            Image.fromarray(row[name]).save(folder / f"{name}.png")
            row[name] = f"{name}.png"
    (folder / "manifest.json").write_text(json.dumps(settings | {"slices": [row]}), "utf-8")
    return SliceFolder(folder)


def only(data: SliceFolder) -> LabelledSlice:
    slices = list(data)
    assert len(slices) == len(data) == 1
    return slices[0]


def test_a_slice_with_pixel_values(tmp_path: Path) -> None:
    data = folder_with(tmp_path, BASE)
    found = only(data)
    assert np.allclose(found.image, GREY / 255.0)
    assert found.image.dtype == np.float32
    assert set(found.labels) == found.labelled == data.labelled_targets == {"liver", "spleen"}
    assert np.array_equal(found.labels["liver"], VALUES == 1)
    assert np.array_equal(found.labels["spleen"], VALUES == 2)
    assert (found.spacing_rc, found.patient, found.modality, found.window) == ((0.8, 0.7), "p1", "CT", "display")
    assert (found.second_labels, found.spacing_exact, data.patients) == (None, True, {"p1"})


@pytest.mark.parametrize(
    ("transpose", "flip_rows", "flip_cols"), [(False, True, False), (True, False, True), (True, True, False)]
)
def test_turns_move_image_mask_and_spacing_together(
    tmp_path: Path, transpose: bool, flip_rows: bool, flip_cols: bool
) -> None:
    # What is stored is a turned version of the canonical slice; reading must undo it.
    def store(canonical: np.ndarray) -> np.ndarray:
        canonical = canonical[::-1] if flip_rows else canonical
        canonical = canonical[:, ::-1] if flip_cols else canonical
        return np.ascontiguousarray(canonical.T if transpose else canonical)

    turns = {"transpose": transpose, "flip_rows": flip_rows, "flip_cols": flip_cols}
    stored_spacing = [0.7, 0.8] if transpose else [0.8, 0.7]
    settings = BASE | turns | {"spacing_mm": stored_spacing}
    found = only(folder_with(tmp_path, settings, image=store(GREY), mask=store(VALUES)))
    assert np.allclose(found.image, GREY / 255.0)
    assert np.array_equal(found.labels["liver"], VALUES == 1)
    assert found.spacing_rc == (0.8, 0.7)


def test_colours_and_several_colours_for_one_organ(tmp_path: Path) -> None:
    colours = np.array([[0, 0, 0], [255, 0, 0], [0, 0, 255]], dtype=np.uint8)[VALUES]
    labels = {"#ff0000": "kidneys", "#0000FF": "both kidneys"}
    found = only(folder_with(tmp_path, BASE | {"labels": labels}, mask=colours))
    assert np.array_equal(found.labels["kidneys"], VALUES > 0)
    near = np.array([[9, 4, 0], [240, 30, 20], [10, 20, 200]], dtype=np.uint8)[VALUES]
    with pytest.raises(DatasetError, match="value #"):
        only(folder_with(tmp_path, BASE | {"labels": labels}, mask=near))
    found = only(folder_with(tmp_path, BASE | {"labels": labels, "mask_match": "nearest"}, mask=near))
    assert np.array_equal(found.labels["kidneys"], VALUES > 0)


def test_nearest_reads_anti_aliased_masks_and_exact_refuses_them(tmp_path: Path) -> None:
    soft = np.array([0, 255, 0], dtype=np.uint8)[VALUES]
    soft[2, 1:9], soft[7, 1:9] = 100, 200
    settings = BASE | {"labels": {"255": "liver"}}
    with pytest.raises(DatasetError, match="value 100"):
        only(folder_with(tmp_path, settings, mask=soft))
    found = only(folder_with(tmp_path, settings | {"mask_match": "nearest"}, mask=soft))
    expected = VALUES == 1
    expected[2] = False
    assert np.array_equal(found.labels["liver"], expected)


def test_labelled_organs_beyond_the_masks_are_absent_and_others_unknown(tmp_path: Path) -> None:
    found = only(folder_with(tmp_path, BASE | {"labelled": ["liver", "spleen", "left kidney", "right kidney"]}))
    assert found.labelled == {"liver", "spleen", "left kidney", "right kidney", "kidneys"}
    assert not found.labels["kidneys"].any()
    assert "pancreas" not in found.labels
    found = only(folder_with(tmp_path, BASE | {"labelled": ["liver"]}))  # what is drawn only sometimes
    assert set(found.labels) == found.labelled == {"liver"}


def test_a_slice_may_differ_from_its_folder_and_have_a_second_rater(tmp_path: Path) -> None:
    Image.fromarray(np.roll(VALUES, 1, axis=0)).save(tmp_path / "second.png")
    own = {"modality": "MR", "labels": {"1": "pancreas", "2": "aorta"}, "second_mask": "second.png"}
    found = only(folder_with(tmp_path, BASE | {"labelled": ["liver", "spleen"]}, **own))
    assert (found.modality, found.labelled) == ("MR", {"pancreas", "aorta"})
    assert np.array_equal(found.second_labels["pancreas"], np.roll(VALUES, 1, axis=0) == 1)
    assert np.array_equal(found.labels["pancreas"], VALUES == 1)


def test_arrays_keep_hounsfield_units(tmp_path: Path) -> None:
    units = GREY.astype(np.int16) * 8 - 1024
    np.save(tmp_path / "image.npy", units)
    np.savez_compressed(tmp_path / "mask.npz", anything=VALUES.astype(np.int64))
    found = only(folder_with(tmp_path, BASE | {"window": None}, image="image.npy", mask="mask.npz"))
    assert np.array_equal(found.image, units.astype(np.float32))
    assert found.window is None
    assert np.array_equal(found.labels["spleen"], VALUES == 2)


def test_sixteen_bit_pictures_and_grey_stored_as_colour(tmp_path: Path) -> None:
    deep = GREY.astype(np.uint16) * 257
    assert np.allclose(only(folder_with(tmp_path, BASE, image=deep)).image, GREY / 255.0)
    assert np.allclose(only(folder_with(tmp_path, BASE, image=np.dstack([GREY] * 3))).image, GREY / 255.0)


MANIFESTS: list[tuple[dict[str, Any], str]] = [
    ({"labels": {"1": "flux capacitor"}}, "no organ that is known"),
    ({"labels": {"one": "liver"}}, "neither a pixel value"),
    ({"labels": {"1": "liver", "#ff0000": "spleen"}}, "all pixel values or all colours"),
    ({"labels": {}}, "'labels' is given neither"),
    ({"labels": {"1": "liver", "2": "liver tumor"}}, "'liver tumor' is no organ .* a part of the liver, give it"),
    ({"modality": None}, "'modality' is given neither"),
    ({"modality": "PET"}, "modality"),
    ({"spacing_mm": [0.0, 1.0]}, "spacing_mm"),
    ({"version": 2}, "version"),
    ({"window": "bone"}, "window"),
    ({"colour": 3}, "colour"),
]


@pytest.mark.parametrize(("change", "message"), MANIFESTS)
def test_invalid_manifests_name_the_field(tmp_path: Path, change: dict[str, Any], message: str) -> None:
    with pytest.raises(DatasetError, match=message) as caught:
        folder_with(tmp_path, BASE | change)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize("path", ["/etc/hosts", "a/../../b.png", "C:/x.png", "a\\b.png"])
def test_paths_stay_inside_the_folder(tmp_path: Path, path: str) -> None:
    with pytest.raises(DatasetError, match="inside the folder"):
        folder_with(tmp_path, BASE, second_mask=path)


def test_missing_and_malformed_manifests(tmp_path: Path) -> None:
    with pytest.raises(DatasetError, match=r"no manifest\.json"):
        SliceFolder(tmp_path)
    (tmp_path / "manifest.json").write_text("[1, 2", "utf-8")
    with pytest.raises(DatasetError, match="not valid"):
        SliceFolder(tmp_path)
    (tmp_path / "manifest.json").write_text(json.dumps(BASE | {"slices": []}), "utf-8")
    with pytest.raises(DatasetError, match="slices"):
        SliceFolder(tmp_path)


def test_a_byte_order_mark_is_no_damage_and_a_label_is_given_once(tmp_path: Path) -> None:
    folder = folder_with(tmp_path, BASE).folder
    path = folder / "manifest.json"
    path.write_text(path.read_text("utf-8"), "utf-8-sig")
    assert len(SliceFolder(folder)) > 0
    path.write_text(path.read_text("utf-8-sig").replace('"labels": {', '"labels": {"7": "liver", "7": "spleen", '), "utf-8")
    with pytest.raises(DatasetError, match="gives '7' twice"):
        SliceFolder(folder)


@pytest.mark.parametrize(
    ("which", "content", "message"),
    [
        ("image", np.dstack([GREY, GREY // 2, GREY]), "is in colour"),
        ("mask", VALUES[:5], "differ in size"),
        ("mask", VALUES + 4, "does not explain"),
        ("mask", np.dstack([VALUES * 0, VALUES * 100, VALUES]), "is in colour"),
        ("mask", b"no picture", "cannot be read"),
        ("mask", None, "is missing"),
        ("array", np.zeros((3, 4, 5), dtype=np.uint8), "is in colour|2-D|differ in size"),
        ("array", np.array([{"a": 1}], dtype=object), "cannot be read"),  # pickled
        ("array", np.full((R, C), 7.5), "leave"),  # a picture of the screen lies between 0 and 1
    ],
)
def test_files_that_cannot_be_used_are_named(
    which: str, content: np.ndarray | bytes | None, message: str, tmp_path: Path
) -> None:
    if which == "array":
        np.save(tmp_path / "image.npy", content, allow_pickle=True)
        data = folder_with(tmp_path, BASE, image="image.npy")
    elif isinstance(content, np.ndarray):
        data = folder_with(tmp_path, BASE, **{which: content})
    else:
        data = folder_with(tmp_path, BASE)
        (tmp_path / f"{which}.png").unlink()
        if content is not None:
            (tmp_path / f"{which}.png").write_bytes(content)
    with pytest.raises(DatasetError, match=message):
        only(data)
