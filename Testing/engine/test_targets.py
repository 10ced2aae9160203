"""Targets: a catalog with Slicer's codes and colours; what people type leads to them, or to one clear sentence."""

from __future__ import annotations

import json
import random
import re
import unicodedata
from importlib import resources

import pytest

from progidiff.errors import PromptError
from progidiff.targets import LANGUAGES, MAX_PROMPT_LENGTH, Target, catalog, complete, find_target, parse_prompt, target_for
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
        ("left kidney", f"{GENERAL}{ANATOMY}64033007^Kidney~SCT^7771000^Left", (185, 102, 83)),
        # "Right and left" exists in the DICOM list only.
        ("kidneys", f"{DICOM}{ANATOMY}64033007^Kidney~SCT^51440002^Right and left", (185, 102, 83)),
        ("bone", f"{GENERAL}~SCT^85756007^Tissue~SCT^272673000^Bone~^^", (241, 214, 145)),
        ("urinary bladder", f"{GENERAL}{ANATOMY}89837001^Bladder~^^", (222, 154, 132)),
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
        ("kidney_left", "left kidney"), ("LeftKidney", "left kidney"), ("kidney", "kidneys"),
        ("gall bladder", "gallbladder"), ("postcava", "inferior vena cava"),
        ("arota", "aorta"),  # as a public data set spells it
        ("portal_vein_and_splenic_vein", "portal vein and splenic vein"), ("RAG", "right adrenal gland"),
        ("rene_sx", "left kidney"), ("osso dell’anca destro", "right hip bone"),
        ("portal and splenic vein", "portal vein and splenic vein"), ("heart_atrium_left", "left atrium"),
        ("iliac_vena_left", "left common iliac vein"), ("autochthon_right", "right deep back muscles"),
        ("left and right kidney", "kidneys"),
    ],
)  # fmt: skip
def test_finds_labels_of_data_sets(label: str, key: str) -> None:
    found = find_target(label)
    assert found.key == key


@pytest.mark.parametrize(
    "label", ["", "background", "prostate/uterus", "liver tumor", "kidney cyst", "PZ", "unknown", "left", "vertebra 3"]
)
def test_finds_nothing_for_other_labels(label: str) -> None:
    assert find_target(label) is None


@pytest.mark.parametrize(
    ("name", "key"),
    [
        ("liver tumor", "liver"), ("KidneyCyst", "kidneys"), ("tumour of the left kidney", "left kidney"),
        ("portal vein and splenic vein thrombus", "portal vein and splenic vein"), ("liver", None), ("cancer", None),
        ("", None),
    ],
)  # fmt: skip
def test_finds_the_organ_in_the_name_of_a_lesion(name: str, key: str | None) -> None:
    found = part_of(name)
    assert (None if found is None else found.key) == key


def test_keys_of_a_model_keep_their_spelling_and_unknown_ones_get_the_default_terminology() -> None:
    assert (target_for("kidney_left").key, target_for("kidney_left").type) == ("kidney_left", catalog()["left kidney"].type)
    target = target_for("hepatic lesion")
    assert target.key == "hepatic lesion"
    assert target.terminology_entry == (
        f"{GENERAL}~SCT^85756007^Tissue~SCT^85756007^Tissue~^^~Anatomic codes - DICOM master list~^^~^^"
    )


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


ABDOMEN = [
    "liver", "spleen", "left kidney", "right kidney", "kidneys",
    "pancreas", "stomach", "gallbladder", "aorta", "inferior vena cava",
]  # fmt: skip
SIDES_ONLY = [key for key in ABDOMEN if key != "kidneys"]
PAIR_ONLY = [key for key in ABDOMEN if key not in ("left kidney", "right kidney")]
EVERYTHING = list(catalog())


def keys(text: str, vocabulary: list[str] = ABDOMEN) -> list[str]:
    return [target.key for target in parse_prompt(text, vocabulary)]


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("liver", ["liver"]),
        ("Left Kidney; pancreas", ["left kidney", "pancreas"]),
        ("liver, spleen, and the aorta", ["liver", "spleen", "aorta"]),
        ("liver & spleen + aorta / stomach", ["liver", "spleen", "aorta", "stomach"]),
        ("- liver\n- spleen", ["liver", "spleen"]),
        ("；liver，spleen；", ["liver", "spleen"]),  # full-width signs
        ("and liver,, ;", ["liver"]),
        ("Leber u. Milz", ["liver", "spleen"]),
        ("hepar et lien", ["liver", "spleen"]),
        ("liver; Milz; l'estomac; vesícula biliar", ["liver", "spleen", "stomach", "gallbladder"]),
        # accents, umlauts and ligatures are optional
        ("higado", ["liver"]),
        ("Bauchspeicheldruese", ["pancreas"]),
        (unicodedata.normalize("NFD", "Bauchspeicheldrüse"), ["pancreas"]),
        # plurals
        ("Lebern", ["liver"]),
        ("riñones", ["kidneys"]),
        # abbreviations
        ("V. cava inferior", ["inferior vena cava"]),
        ("Niere re.", ["right kidney"]),
        ("riñón izq.", ["left kidney"]),
        ("kidney (L)", ["left kidney"]),
        # word order
        ("kidney, left", ["left kidney"]),
        ("vena cava, inferior", ["inferior vena cava"]),
        ("spleen, kidney, left, liver", ["spleen", "left kidney", "liver"]),
        # pairs
        ("kidney", ["kidneys"]),
        ("Nieren bds.", ["kidneys"]),
        # Italian and Portuguese
        ("fegato ed aorta", ["liver", "aorta"]),
        ("rene sinistro e destro", ["left kidney", "right kidney"]),
        ("rene dx, rene sx", ["right kidney", "left kidney"]),
        ("figado; baco", ["liver", "spleen"]),
        ("rim esquerdo e direito", ["left kidney", "right kidney"]),
        ("rim esq.", ["left kidney"]),
        # as reports write it
        ("RK; LK", ["right kidney", "left kidney"]),
        ("rt. kidney", ["right kidney"]),
        ("lt and rt kidneys", ["left kidney", "right kidney"]),
        ("GB, ivc", ["gallbladder", "inferior vena cava"]),
        ("right and left kidneys", ["right kidney", "left kidney"]),
        ("linke und rechte Niere, Milz", ["left kidney", "right kidney", "spleen"]),
        ("riñón derecho e izquierdo", ["right kidney", "left kidney"]),
        ("kidney, left and right, liver", ["left kidney", "right kidney", "liver"]),
        # each once, in the order named
        ("spleen; liver; Milz; Leber", ["spleen", "liver"]),
    ],
)
def test_understands(text: str, expected: list[str]) -> None:
    assert keys(text) == expected


@pytest.mark.parametrize("target", list(catalog().values()), ids=lambda target: target.key)
def test_every_name_leads_to_its_target(target: Target) -> None:
    for name in target.all_names():
        for variant in (name, unicodedata.normalize("NFD", name.upper()).replace(" ", "_")):
            assert keys(variant, EVERYTHING) == [target.key], variant


def test_a_pair_and_its_sides_stand_for_each_other() -> None:
    assert keys("both kidneys", SIDES_ONLY) == keys("kidney", SIDES_ONLY) == ["left kidney", "right kidney"]
    assert keys("left and right kidney", PAIR_ONLY) == ["kidneys"]
    with pytest.raises(PromptError, match=r'has not learned "left kidney": type "kidneys" instead'):
        keys("left kidney", PAIR_ONLY)
    with pytest.raises(PromptError, match=r'has not learned "kidneys": type "left kidney" instead'):
        keys("kidneys", ["liver", "left kidney"])
    lobes = [key for key in EVERYTHING if key.endswith("lung lobe")]
    assert len(lobes) == 5
    assert sorted(keys("lungs", lobes)) == sorted(lobes)
    assert keys("both ventricles", EVERYTHING) == ["left ventricle", "right ventricle"]


def test_and_inside_a_name() -> None:
    whole = "portal vein and splenic vein"
    assert keys(f"liver and {whole} and spleen", EVERYTHING) == ["liver", whole, "spleen"]
    assert keys("Pfortader und Milzvene", EVERYTHING) == [whole]
    with pytest.raises(PromptError, match=f'has not learned "{whole}"'):
        keys(whole, ["liver", "portal vein"])


def test_comma_between_two_names_separates_them() -> None:
    assert keys("heart, left atrium", EVERYTHING) == ["heart", "left atrium"]
    both = ["left kidney", "right kidney", "left adrenal gland", "right adrenal gland"]
    assert keys("left and right kidneys and left and right adrenal glands", EVERYTHING) == both


@pytest.mark.parametrize("text", ["", ";;\n,", "and", "\u200b"])
def test_empty_prompt(text: str) -> None:
    with pytest.raises(PromptError, match=r"names no target: type one or more of liver, spleen"):
        keys(text)


@pytest.mark.parametrize(
    ("text", "nearest"),
    [
        ("liver tumour", '"liver"'), ("vena cava", '"inferior vena cava"'), ("liver spleen", '"liver" or "spleen"'),
        ("left", '"left kidney"'), ("xyz", '"spleen"'), ("vescicola biliare", '"gallbladder"'),
    ],
)  # fmt: skip
def test_unknown_text_names_the_nearest_targets(text: str, nearest: str) -> None:
    with pytest.raises(PromptError) as caught:
        keys(text)
    assert str(caught.value).startswith(f'This model does not know "{text.lower()}": type {nearest} instead, ')
    assert "liver, spleen, left kidney" in str(caught.value)


def test_nearest_targets_are_the_models_own_and_one_unknown_name_refuses_all() -> None:
    with pytest.raises(PromptError) as caught:
        keys("spleen; livr", ["spleen", "prostate"])
    assert '"liver"' not in str(caught.value)


def test_known_target_that_the_model_has_not_learned() -> None:
    with pytest.raises(PromptError) as caught:
        keys("liver; Prostata", ABDOMEN)
    message = str(caught.value)
    assert message.startswith('This model has not learned "prostate": type one of its targets (liver, ')
    assert message.endswith("or choose another model.")


@pytest.mark.parametrize(
    "text",
    [
        "no liver", "liver without gallbladder", "left liver", "both livers", "kidney; left", "'; DROP TABLE targets; --",
        "liver 💀", "<script>alert(1)</script>", "%s%s%n", "\x00liver", "\ud800", "كبد", "l" * 200, "liver " * 300,
        "a;" * (MAX_PROMPT_LENGTH // 2), "left," * (MAX_PROMPT_LENGTH // 5),
        "\ufdfa" * MAX_PROMPT_LENGTH,  # each becomes 18 characters when compatibility forms are taken apart
        "liver;" * 10_000,
    ],
    ids=lambda text: ascii(text[:24]),
)  # fmt: skip
def test_absurd_text_gives_one_short_sentence(text: str) -> None:
    with pytest.raises(PromptError) as caught:
        keys(text, EVERYTHING)
    message = str(caught.value)
    assert message.endswith(".")
    assert message.isprintable()
    assert len(message) < 800
    message.encode("utf-8")


def test_the_whole_catalog_fits_into_one_prompt() -> None:
    text = "; ".join(EVERYTHING)
    assert len(text) <= MAX_PROMPT_LENGTH
    assert keys(text, EVERYTHING) == EVERYTHING


def test_model_without_targets() -> None:
    with pytest.raises(PromptError, match="knows no targets"):
        keys("liver", [])


def test_vocabulary_outside_the_catalog() -> None:
    vocabulary = ["Hepatic Lesion", "kidney_left", "prostate/uterus"]
    assert keys("hepatic lesions; left kidney", vocabulary) == ["Hepatic Lesion", "kidney_left"]
    assert keys("prostate/uterus", vocabulary) == ["prostate/uterus"]
    with pytest.raises(PromptError, match=r'"hepatic lesin": type "Hepatic Lesion" instead'):
        keys("hepatic lesin", vocabulary)


def _disguised(draw: random.Random, name: str) -> str:
    """The name as somebody else would type it."""
    words = name.split()
    if " and " not in f" {name} " and " und " not in name and " et " not in name and " y " not in name:
        draw.shuffle(words)
    text = draw.choice([" ", "_", "  ", " - "]).join(words)
    text = draw.choice([str.upper, str.lower, str.title, str])(text)
    return unicodedata.normalize(draw.choice(["NFC", "NFD", "NFKC"]), text)


def test_random_prompts_of_known_names() -> None:
    """Names in any language, case, order and separator come back as the targets they were drawn from."""
    draw = random.Random(20240)
    targets = list(catalog().values())
    for _ in range(150):
        chosen = draw.sample(targets, draw.randint(1, 5))
        separator = draw.choice(["; ", ";", "\n", " ;\n "])
        text = separator.join(_disguised(draw, draw.choice(list(target.all_names()))) for target in chosen)
        assert keys(text, EVERYTHING) == [target.key for target in chosen], text


def _outcome(text: str, vocabulary: list[str]) -> tuple[list[str], str]:
    """Targets, or none and the message; any other exception is a failure."""
    try:
        found = keys(text, vocabulary)
    except PromptError as error:
        return [], str(error)
    assert found, text
    return found, ""


@pytest.mark.slow
def test_random_noise_is_refused_or_understood_but_never_fails_otherwise() -> None:
    draw = random.Random(31)
    names = [name for target in catalog().values() for name in target.all_names()]
    signs = [";", ",", " and ", " ", "\n", "&", "left", "rechts", "both", "'", "\x00", "💀", "́", "\ud800", "ß", "("]
    refused = 0
    for _ in range(100):
        parts = [
            draw.choice(names)
            if draw.random() < 0.4
            else draw.choice(signs)
            if draw.random() < 0.8
            else "".join(chr(draw.randrange(1, 0x2FFF)) for _ in range(draw.randint(1, 12)))
            for _ in range(draw.randint(1, 12))
        ]
        text = draw.choice(["", " "]).join(parts)
        vocabulary = draw.choice([ABDOMEN, PAIR_ONLY, EVERYTHING])
        found, message = _outcome(text, vocabulary)
        refused += not found
        assert "does not know" not in message or ': type "' in message
        assert message.isprintable()
        assert len(set(found)) == len(found)
        assert set(found) <= set(vocabulary)
    assert 0 < refused < 100


def test_misspelt_names_never_become_another_target() -> None:
    """One letter changed: either still the same target (an optional ending) or refused."""
    draw = random.Random(7)
    for key in ABDOMEN:
        for _ in range(20):
            place = draw.randrange(len(key))
            text = key[:place] + draw.choice("bdfghkmpqtvwxz") + key[place + 1 :]
            assert _outcome(text, ABDOMEN)[0] in ([], [key]), text


@pytest.mark.parametrize(
    ("prefix", "expected"),
    [
        ("li", ["liver", "lien", "linke Niere"]), ("liver; sp", ["spleen"]),
        ("liver, Le", ["Leber", "left kidney", "les deux reins"]), ("kid", ["kidneys", "left kidney", "right kidney"]),
        ("ivc", ["IVC"]), ("liver; ", ABDOMEN), ("zz", []),
    ],
)  # fmt: skip
def test_completion(prefix: str, expected: list[str]) -> None:
    assert complete(prefix, ABDOMEN) == expected


def test_completions_are_understood_and_limited() -> None:
    for letter in "abcdefghijklmnopqrstuvwxyz":
        for name in complete(letter, EVERYTHING, limit=200):
            assert len(keys(name, EVERYTHING)) == 1, name
    assert len(complete("", EVERYTHING)) == 12
    assert complete("", EVERYTHING, limit=3) == EVERYTHING[:3]
