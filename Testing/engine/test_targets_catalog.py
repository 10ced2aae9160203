"""The catalog: complete, free of contradictions, with the codes and colours that Slicer uses."""

from __future__ import annotations

import json
import re
from importlib import resources

import pytest

from progidiff.targets import LANGUAGES, Target, catalog, find_target, target_for
from progidiff.targets.catalog import name_keys, part_of

GENERAL = "Segmentation category and type - 3D Slicer General Anatomy list"
DICOM = "Segmentation category and type - DICOM master list"
ANATOMY = "~SCT^123037004^Anatomical Structure~SCT^"
ALL = list(catalog().values())


@pytest.mark.parametrize(
    ("key", "entry", "rgb"),
    [
        # Read from Slicer's SegmentationCategoryTypeModifier-SlicerGeneralAnatomy.json, not from the catalog.
        ("liver", f"{GENERAL}{ANATOMY}10200004^Liver~^^", (221, 130, 101)),
        ("spleen", f"{GENERAL}{ANATOMY}78961009^Spleen~^^", (157, 108, 162)),
        ("left kidney", f"{GENERAL}{ANATOMY}64033007^Kidney~SCT^7771000^Left", (185, 102, 83)),
        ("right kidney", f"{GENERAL}{ANATOMY}64033007^Kidney~SCT^24028007^Right", (185, 102, 83)),
        # "Right and left" exists in the DICOM list only.
        ("kidneys", f"{DICOM}{ANATOMY}64033007^Kidney~SCT^51440002^Right and left", (185, 102, 83)),
        ("pancreas", f"{GENERAL}{ANATOMY}15776009^Pancreas~^^", (249, 180, 111)),
        ("bone", f"{GENERAL}~SCT^85756007^Tissue~SCT^272673000^Bone~^^", (241, 214, 145)),
        ("duodenum", f"{GENERAL}{ANATOMY}38848004^Duodenum~^^", (255, 253, 229)),
        ("esophagus", f"{GENERAL}{ANATOMY}32849002^Esophagus~^^", (211, 171, 143)),
        ("colon", f"{GENERAL}{ANATOMY}71854001^Colon~^^", (204, 168, 143)),
        ("urinary bladder", f"{GENERAL}{ANATOMY}89837001^Bladder~^^", (222, 154, 132)),
        ("heart", f"{GENERAL}{ANATOMY}80891009^Heart~^^", (206, 110, 84)),
    ],
)
def test_terminology_entry_and_colour(key: str, entry: str, rgb: tuple[int, int, int]) -> None:
    target = catalog()[key]
    assert target.terminology_entry == f"{entry}~Anatomic codes - DICOM master list~^^~^^"
    assert target.color_rgb == rgb
    assert target.color == pytest.approx([value / 255 for value in rgb])


@pytest.mark.parametrize("target", ALL, ids=lambda target: target.key)
def test_entry_is_complete(target: Target) -> None:
    assert set(target.names) == set(LANGUAGES)
    assert all(names and all(name.strip() == name != "" for name in names) for names in target.names.values())
    assert target.name("en") == target.names["en"][0]
    assert target.name("xx") == target.key
    for code in (target.category, target.type, target.modifier):
        if code is not None:
            assert code.scheme == "SCT"
            assert re.fullmatch(r"[1-9]\d{5,17}", code.value)
            assert _snomed_check_digit_is_right(code.value)
            assert not set(code.meaning) & set("~^|")
    assert all(0 <= value <= 255 for value in target.color_rgb)
    assert len(target.terminology_entry.split("~")) == 7


@pytest.mark.parametrize("target", ALL, ids=lambda target: target.key)
def test_parts_exist_and_sides_agree(target: Target) -> None:
    assert target.key not in target.parts
    parts = [catalog()[part] for part in target.parts]
    if target.side == "both":
        assert [part.side for part in parts] == ["left", "right"]
        assert {part.type for part in parts} == {target.type}
        assert {part.color_rgb for part in parts} == {target.color_rgb}
    if target.side in ("left", "right"):
        assert target.key.startswith(target.side)
        assert all(part.side == target.side for part in parts)


def test_no_name_means_two_targets() -> None:
    owner: dict[object, str] = {}
    for target in ALL:
        for key in name_keys(target):
            assert owner.setdefault(key, target.key) == target.key, key


def test_keys_in_the_file_are_unique() -> None:
    content = json.loads(resources.files("progidiff.targets").joinpath("targets.json").read_text("utf-8"))
    keys = [entry["key"] for entry in content["targets"]]
    assert sorted(keys) == sorted(set(keys)) == sorted(catalog())


@pytest.mark.parametrize(
    ("label", "key"),
    [
        ("kidney_left", "left kidney"),
        ("Kidney_L", "left kidney"),
        ("LeftKidney", "left kidney"),
        ("right_kidney", "right kidney"),
        ("kidney", "kidneys"),
        ("gall bladder", "gallbladder"),
        ("postcava", "inferior vena cava"),
        ("arota", "aorta"),  # as a public data set spells it
        ("portal_vein_and_splenic_vein", "portal vein and splenic vein"),
        ("lung_upper_lobe_left", "left upper lung lobe"),
        ("adrenal_gland_right", "right adrenal gland"),
        ("RAG", "right adrenal gland"),
        ("LK", "left kidney"),
        ("RK", "right kidney"),
        ("rene_sx", "left kidney"),
        ("rim direito", "right kidney"),
        ("osso dell’anca destro", "right hip bone"),
        ("portal and splenic vein", "portal vein and splenic vein"),
        ("heart_atrium_left", "left atrium"),
        ("iliac_vena_left", "left common iliac vein"),
        ("autochthon_right", "right deep back muscles"),
        ("hip_left", "left hip bone"),
        ("small_bowel", "small bowel"),
        ("left and right kidney", "kidneys"),
    ],
)
def test_finds_labels_of_data_sets(label: str, key: str) -> None:
    found = find_target(label)
    assert found is not None
    assert found.key == key


@pytest.mark.parametrize(
    "label", ["", "background", "prostate/uterus", "liver tumor", "kidney cyst", "PZ", "unknown", "left", "vertebra 3"]
)
def test_finds_nothing_for_other_labels(label: str) -> None:
    assert find_target(label) is None


@pytest.mark.parametrize(
    ("name", "key"),
    [
        ("liver tumor", "liver"),
        ("KidneyCyst", "kidneys"),
        ("tumour of the left kidney", "left kidney"),
        ("left_kidney_cyst", "left kidney"),
        ("metastasi del fegato", "liver"),
        ("portal vein and splenic vein thrombus", "portal vein and splenic vein"),
        ("liver", None),
        ("cancer", None),
        ("", None),
    ],
)
def test_finds_the_organ_in_the_name_of_a_lesion(name: str, key: str | None) -> None:
    found = part_of(name)
    assert (None if found is None else found.key) == key


def test_key_outside_the_catalog_gets_the_default_terminology() -> None:
    target = target_for("hepatic lesion")
    assert target.key == "hepatic lesion"
    assert target.terminology_entry == (
        f"{GENERAL}~SCT^85756007^Tissue~SCT^85756007^Tissue~^^~Anatomic codes - DICOM master list~^^~^^"
    )


def test_vocabulary_spelling_is_kept() -> None:
    target = target_for("kidney_left")
    assert target.key == "kidney_left"
    assert target.type == catalog()["left kidney"].type


def test_targets_are_hashable_values() -> None:
    assert len({*ALL, *ALL}) == len(ALL)


def _snomed_check_digit_is_right(identifier: str) -> bool:
    """Verhoeff check digit of a SNOMED CT identifier (SNOMED CT release file specification, annex C)."""
    multiply = [[(a + b) % 5 for b in range(5)] + [(a + b) % 5 + 5 for b in range(5)] for a in range(5)] + [
        [(a - b) % 5 + 5 for b in range(5)] + [(a - b) % 5 for b in range(5)] for a in range(5)
    ]
    permute = [list(range(10)), [1, 5, 7, 6, 2, 8, 3, 0, 9, 4]]
    while len(permute) < 8:
        permute.append([permute[-1][digit] for digit in permute[1]])
    check = 0
    for position, digit in enumerate(reversed(identifier)):
        check = multiply[check][permute[position % 8][int(digit)]]
    return check == 0
