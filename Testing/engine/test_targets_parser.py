"""Prompts: what people type leads to the right targets, and everything else to one clear sentence."""

from __future__ import annotations

import random
import unicodedata

import pytest

from progidiff.errors import PromptError
from progidiff.targets import MAX_PROMPT_LENGTH, Target, catalog, complete, parse_prompt

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
        ("  LIVER.\n", ["liver"]),
        ("Left Kidney; pancreas", ["left kidney", "pancreas"]),
        ("spleen and both kidneys", ["spleen", "kidneys"]),
        ("liver, spleen, and the aorta", ["liver", "spleen", "aorta"]),
        ("liver\nspleen\r\nstomach", ["liver", "spleen", "stomach"]),
        ("liver & spleen + aorta / stomach", ["liver", "spleen", "aorta", "stomach"]),
        ("- liver\n- spleen", ["liver", "spleen"]),
        ("；liver，spleen；", ["liver", "spleen"]),  # full-width signs
        ("and liver,, ;", ["liver"]),
        ("Leber und Milz", ["liver", "spleen"]),
        ("Leber u. Milz", ["liver", "spleen"]),
        ("foie et rate", ["liver", "spleen"]),
        ("hígado y bazo", ["liver", "spleen"]),
        ("hepar et lien", ["liver", "spleen"]),
        ("liver; Milz; l'estomac; vesícula biliar", ["liver", "spleen", "stomach", "gallbladder"]),
        # accents, umlauts and ligatures are optional
        ("higado", ["liver"]),
        ("HÍGADO", ["liver"]),
        ("Bauchspeicheldrüse", ["pancreas"]),
        ("Bauchspeicheldruese", ["pancreas"]),
        ("bauchspeicheldruse", ["pancreas"]),
        (unicodedata.normalize("NFD", "Bauchspeicheldrüse"), ["pancreas"]),
        # plurals
        ("livers", ["liver"]),
        ("Lebern", ["liver"]),
        ("aortae", ["aorta"]),
        ("riñones", ["kidneys"]),
        # abbreviations
        ("IVC", ["inferior vena cava"]),
        ("V. cava inferior", ["inferior vena cava"]),
        ("li. Niere", ["left kidney"]),
        ("Niere re.", ["right kidney"]),
        ("riñón izq.", ["left kidney"]),
        ("kidney (L)", ["left kidney"]),
        # word order
        ("kidney, left", ["left kidney"]),
        ("kidney left", ["left kidney"]),
        ("kidney_left", ["left kidney"]),
        ("vena cava, inferior", ["inferior vena cava"]),
        ("rein gauche", ["left kidney"]),
        ("rechte Niere", ["right kidney"]),
        ("ren sinister", ["left kidney"]),
        ("spleen, kidney, left, liver", ["spleen", "left kidney", "liver"]),
        # pairs
        ("kidney", ["kidneys"]),
        ("Beide Nieren", ["kidneys"]),
        ("Nieren bds.", ["kidneys"]),
        ("les deux reins", ["kidneys"]),
        # Italian and Portuguese
        ("fegato e milza", ["liver", "spleen"]),
        ("fegato ed aorta", ["liver", "aorta"]),
        ("il fegato; la milza", ["liver", "spleen"]),
        ("rene sinistro e destro", ["left kidney", "right kidney"]),
        ("rene dx, rene sx", ["right kidney", "left kidney"]),
        ("entrambi i reni", ["kidneys"]),
        ("vena cava inferiore", ["inferior vena cava"]),
        ("colecisti", ["gallbladder"]),
        ("fígado e baço", ["liver", "spleen"]),
        ("figado; baco", ["liver", "spleen"]),
        ("rim esquerdo e direito", ["left kidney", "right kidney"]),
        ("os rins", ["kidneys"]),
        ("rim esq.", ["left kidney"]),
        ("rim dir.", ["right kidney"]),
        ("veia cava inferior", ["inferior vena cava"]),
        # as reports write it
        ("RK; LK", ["right kidney", "left kidney"]),
        ("lk/rk", ["left kidney", "right kidney"]),
        ("lt kidney", ["left kidney"]),
        ("rt. kidney", ["right kidney"]),
        ("lt and rt kidneys", ["left kidney", "right kidney"]),
        ("GB, ivc", ["gallbladder", "inferior vena cava"]),
        ("left and right kidney", ["left kidney", "right kidney"]),
        ("right and left kidneys", ["right kidney", "left kidney"]),
        ("linke und rechte Niere, Milz", ["left kidney", "right kidney", "spleen"]),
        ("rein gauche et droit", ["left kidney", "right kidney"]),
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
        for variant in (name, name.upper(), name.replace(" ", "_"), unicodedata.normalize("NFD", name)):
            assert keys(variant, EVERYTHING) == [target.key], variant


@pytest.mark.parametrize("text", ["kidneys", "both kidneys", "kidney", "beide Nieren", "riñones"])
def test_pair_becomes_its_parts_where_the_model_has_no_combined_target(text: str) -> None:
    assert keys(text, SIDES_ONLY) == ["left kidney", "right kidney"]


def test_sides_become_the_pair_where_the_model_has_no_sides() -> None:
    assert keys("left and right kidney", PAIR_ONLY) == ["kidneys"]
    with pytest.raises(PromptError, match=r'has not learned "left kidney": type "kidneys" instead'):
        keys("left kidney", PAIR_ONLY)


def test_pair_is_refused_where_one_side_is_missing() -> None:
    with pytest.raises(PromptError, match=r'has not learned "kidneys": type "left kidney" instead'):
        keys("kidneys", ["liver", "left kidney"])


def test_parts_of_parts() -> None:
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
    assert keys("left and right kidneys and left and right adrenal glands", EVERYTHING) == [
        "left kidney",
        "right kidney",
        "left adrenal gland",
        "right adrenal gland",
    ]


@pytest.mark.parametrize("text", ["", "   ", ";;\n,", "and", "the", "--", "\u200b"])
def test_empty_prompt(text: str) -> None:
    with pytest.raises(PromptError, match=r"names no target: type one or more of liver, spleen"):
        keys(text)


@pytest.mark.parametrize(
    ("text", "nearest"),
    [
        ("livr", '"liver"'),
        ("Lebr", '"liver"'),
        ("liver tumour", '"liver"'),
        ("vena cava", '"inferior vena cava"'),
        ("liver spleen", '"liver" or "spleen"'),
        ("pancras", '"pancreas"'),
        ("left", '"left kidney"'),
        ("xyz", '"spleen"'),
        ("hepat", '"liver"'),
        ("jejunum", '"liver"'),
        ("fegat", '"liver"'),
        ("vescicola biliare", '"gallbladder"'),
    ],
)
def test_unknown_text_names_the_nearest_targets(text: str, nearest: str) -> None:
    with pytest.raises(PromptError) as caught:
        keys(text)
    assert str(caught.value).startswith(f'This model does not know "{text.lower()}": type {nearest} instead, ')
    assert "liver, spleen, left kidney" in str(caught.value)


def test_nearest_targets_are_the_models_own() -> None:
    with pytest.raises(PromptError) as caught:
        keys("livr", ["spleen", "prostate"])
    assert '"liver"' not in str(caught.value)


def test_known_target_that_the_model_has_not_learned() -> None:
    with pytest.raises(PromptError) as caught:
        keys("liver; Prostata", ABDOMEN)
    message = str(caught.value)
    assert message.startswith('This model has not learned "prostate": type one of its targets (liver, ')
    assert message.endswith("or choose another model.")


def test_one_unknown_name_refuses_the_whole_prompt() -> None:
    with pytest.raises(PromptError, match="frobnicator"):
        keys("liver; spleen; frobnicator")


@pytest.mark.parametrize(
    "text",
    [
        "no liver",
        "liver without gallbladder",
        "hígado sin vesícula",
        "left liver",
        "both livers",
        "left left kidney",
        "both left kidney",
        "left",
        "kidney; left",
        "'; DROP TABLE targets; --",
        "liver' OR '1'='1",
        "💀",
        "liver 💀",
        "../../etc/passwd",
        "<script>alert(1)</script>",
        "${jndi:ldap://x}",
        "%s%s%n",
        "\x00liver",
        "\ud800",
        "肝臓",
        "كبد",
        "1",
        "l" * 200,
        "liver " * 300,
        "a" * MAX_PROMPT_LENGTH,
        "a;" * (MAX_PROMPT_LENGTH // 2),
        "left," * (MAX_PROMPT_LENGTH // 5),
        "\ufdfa" * MAX_PROMPT_LENGTH,  # each becomes 18 characters when compatibility forms are taken apart
        "x" * 10_000,
        "liver;" * 10_000,
    ],
    ids=lambda text: ascii(text[:24]),
)
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
    for _ in range(400):
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
    for _ in range(300):
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
    assert 0 < refused < 300


def test_misspelt_names_never_become_another_target() -> None:
    """One letter changed: either still the same target (an optional ending) or refused."""
    draw = random.Random(7)
    for key in ABDOMEN:
        for _ in range(60):
            place = draw.randrange(len(key))
            text = key[:place] + draw.choice("bdfghkmpqtvwxz") + key[place + 1 :]
            assert _outcome(text, ABDOMEN)[0] in ([], [key]), text


@pytest.mark.parametrize(
    ("prefix", "expected"),
    [
        ("li", ["liver", "lien", "linke Niere"]),
        ("liver; sp", ["spleen"]),
        ("liver, Le", ["Leber", "left kidney", "les deux reins"]),
        ("kid", ["kidneys", "left kidney", "right kidney"]),
        ("hig", ["hígado"]),
        ("LEFT K", ["left kidney"]),
        ("ivc", ["IVC"]),
        ("", ABDOMEN),
        ("liver; ", ABDOMEN),
        ("zz", []),
    ],
)
def test_completion(prefix: str, expected: list[str]) -> None:
    assert complete(prefix, ABDOMEN) == expected


def test_completions_are_understood_and_limited() -> None:
    for letter in "abcdefghijklmnopqrstuvwxyz":
        for name in complete(letter, EVERYTHING, limit=200):
            assert len(keys(name, EVERYTHING)) == 1, name
    assert len(complete("", EVERYTHING)) == 12
    assert complete("", EVERYTHING, limit=3) == EVERYTHING[:3]
