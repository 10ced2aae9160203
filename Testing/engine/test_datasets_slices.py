"""Slice folders: encodings, turns, partial labels, and manifests that are refused."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image

from progidiff.datasets.slices import LabelledSlice, SliceFolder
from progidiff.errors import DatasetError

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


@pytest.mark.parametrize("transpose", [False, True])
@pytest.mark.parametrize("flip_rows", [False, True])
@pytest.mark.parametrize("flip_cols", [False, True])
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


def test_nearest_in_colour_space(tmp_path: Path) -> None:
    colours = np.array([[9, 4, 0], [240, 30, 20], [10, 200, 15]], dtype=np.uint8)[VALUES]
    settings = BASE | {"labels": {"#ff0000": "liver", "#00ff00": "spleen"}}
    with pytest.raises(DatasetError, match="value #"):
        only(folder_with(tmp_path, settings, mask=colours))
    found = only(folder_with(tmp_path, settings | {"mask_match": "nearest"}, mask=colours))
    assert np.array_equal(found.labels["liver"], VALUES == 1)
    assert np.array_equal(found.labels["spleen"], VALUES == 2)


def test_labelled_organs_beyond_the_masks_are_absent_and_others_unknown(tmp_path: Path) -> None:
    found = only(folder_with(tmp_path, BASE | {"labelled": ["liver", "spleen", "left kidney", "right kidney"]}))
    assert found.labelled == {"liver", "spleen", "left kidney", "right kidney", "kidneys"}
    assert not found.labels["kidneys"].any()
    assert "pancreas" not in found.labels


def test_what_is_drawn_only_sometimes_can_be_left_unknown(tmp_path: Path) -> None:
    found = only(folder_with(tmp_path, BASE | {"labelled": ["liver"]}))
    assert set(found.labels) == found.labelled == {"liver"}


def test_a_second_rater(tmp_path: Path) -> None:
    second = np.roll(VALUES, 1, axis=0)
    Image.fromarray(second).save(tmp_path / "second.png")
    found = only(folder_with(tmp_path, BASE, second_mask="second.png"))
    assert found.second_labels is not None
    assert np.array_equal(found.second_labels["liver"], second == 1)
    assert np.array_equal(found.labels["liver"], VALUES == 1)


def test_a_slice_may_differ_from_its_folder(tmp_path: Path) -> None:
    found = only(
        folder_with(
            tmp_path, BASE | {"labelled": ["liver", "spleen"]}, modality="MR", labels={"1": "pancreas", "2": "aorta"}
        )
    )
    assert (found.modality, found.labelled) == ("MR", {"pancreas", "aorta"})


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


@pytest.mark.parametrize("path", ["../secret.png", "/etc/hosts", "a/../../b.png", "C:/x.png", "a\\b.png"])
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


def test_a_lesion_may_be_called_by_its_organ(tmp_path: Path) -> None:
    with pytest.raises(
        DatasetError, match="'liver tumor' is no organ that is known; where it is a part of the liver, give it"
    ):
        folder_with(tmp_path, BASE | {"labels": {"1": "liver", "2": "liver tumor"}})


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
    ],
)
def test_files_that_cannot_be_used_are_named(
    which: str, content: np.ndarray | bytes | None, message: str, tmp_path: Path
) -> None:
    if isinstance(content, np.ndarray):
        data = folder_with(tmp_path, BASE, **{which: content})
    else:
        data = folder_with(tmp_path, BASE)
        (tmp_path / f"{which}.png").unlink()
        if content is not None:
            (tmp_path / f"{which}.png").write_bytes(content)
    with pytest.raises(DatasetError, match=message):
        only(data)


@pytest.mark.parametrize(
    ("array", "message"),
    [
        (np.zeros((3, 4, 5), dtype=np.uint8), "is in colour|2-D|differ in size"),
        (np.array([{"a": 1}], dtype=object), "cannot be read"),  # pickled
        (np.full((R, C), 7.5), "leave"),  # a picture of the screen lies between 0 and 1
    ],
)
def test_arrays_that_cannot_be_used_are_named(array: np.ndarray, message: str, tmp_path: Path) -> None:
    np.save(tmp_path / "image.npy", array, allow_pickle=True)
    with pytest.raises(DatasetError, match=message):
        only(folder_with(tmp_path, BASE, image="image.npy"))
