"""Every target that has a name: synonyms in seven languages, SNOMED CT codes and Slicer's own colours.

A model's vocabulary is usually a subset of this catalog. The data are in ``targets.json``, which also says
from which of Slicer's terminology lists each code and colour was taken.
"""

from __future__ import annotations

import json
import re
import unicodedata
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass, field, replace
from functools import cache
from importlib import resources
from types import MappingProxyType
from typing import Any, Literal

Side = Literal["left", "right", "both"]
Form = Literal["solid", "tube", "any"]
LANGUAGES = ("en", "la", "de", "fr", "es", "it", "pt")

_REGION_LIST = "Anatomic codes - DICOM master list"
_CAMEL_CASE = re.compile(r"(?<=[a-z])(?=[A-Z])")


@dataclass(frozen=True)
class Code:
    """One coded concept as DICOM writes it: coding scheme ("SCT"), value and meaning."""

    scheme: str
    value: str
    meaning: str

    def serialized(self) -> str:
        """``scheme^value^meaning``, as in Slicer's terminology tags."""
        return f"{self.scheme}^{self.value}^{self.meaning}"


@dataclass(frozen=True)
class Target:
    """Something a model can be asked for.

    Attributes:
        key: canonical English name, as in model vocabularies, e.g. ``"left kidney"``.
        names: names by language (``LANGUAGES``), the usual one first.
        category: SNOMED CT category, e.g. Anatomical Structure.
        type: SNOMED CT type, e.g. Kidney.
        modifier: laterality of the type where it has one: Left, Right, or Right and left.
        terminology_list: name of the Slicer terminology that holds these codes.
        color_rgb: Slicer's recommended display colour, 0-255.
        parts: keys of the targets that make up this one, e.g. both kidneys for ``"kidneys"``; often empty.
        side: ``"left"``, ``"right"``, ``"both"`` or ``None`` for what is not paired.
        aliases: abbreviations and label names of public data sets.
        form: ``"solid"`` for a body in one piece (in two where ``side`` is "both") without holes, ``"tube"`` for vessels and
            gut, which a field of view may cut into several, ``"any"`` where nothing is known of its pieces and holes.
    """

    key: str
    names: Mapping[str, tuple[str, ...]] = field(hash=False)
    category: Code
    type: Code
    modifier: Code | None
    terminology_list: str
    color_rgb: tuple[int, int, int]
    parts: tuple[str, ...] = ()
    side: Side | None = None
    aliases: tuple[str, ...] = ()
    form: Form = "any"

    @property
    def terminology_entry(self) -> str:
        """Value of a segment's terminology tag.

        Format of vtkSlicerTerminologiesModuleLogic::SerializeTerminologyEntry: list, category, type, type
        modifier, region list, region, region modifier; the last two stay empty.
        """
        modifier = self.modifier.serialized() if self.modifier else "^^"
        return "~".join(
            (
                self.terminology_list,
                self.category.serialized(),
                self.type.serialized(),
                modifier,
                _REGION_LIST,
                "^^",
                "^^",
            )
        )

    @property
    def color(self) -> tuple[float, float, float]:
        """The colour as segments store it, 0-1."""
        red, green, blue = self.color_rgb
        return red / 255, green / 255, blue / 255

    def name(self, language: str = "en") -> str:
        """The usual name in a language; the key where that language is not known."""
        known = self.names.get(language)
        return known[0] if known else self.key

    def all_names(self) -> Iterator[str]:
        """Key, names in every language, and aliases; some may occur twice."""
        yield self.key
        for names in self.names.values():
            yield from names
        yield from self.aliases


@cache
def catalog() -> Mapping[str, Target]:
    """All known targets by key, in the order of ``targets.json``. Read once; not to be changed."""
    content = json.loads(resources.files(__package__).joinpath("targets.json").read_text(encoding="utf-8"))
    lists: dict[str, str] = content["lists"]
    targets = (_from_json(entry, lists) for entry in content["targets"])
    return MappingProxyType({target.key: target for target in targets})


def find_target(name: str) -> Target | None:
    """The target of the whole catalog that a name or a data set's label means, or ``None``.

    ``name`` is one name in any language and spelling ("Kidney_L", "gall bladder",
    "portal_vein_and_splenic_vein"), not a list: "prostate/uterus" is no single target and gives ``None``.
    """
    found = lookup(name_index(), name_words(name))
    if found is None and name.isascii():
        found = lookup(name_index(), name_words(_CAMEL_CASE.sub(" ", name)))
    return catalog()[found] if found is not None else None


def part_of(name: str) -> Target | None:
    """The target that a name holds beside other words, as "left kidney" is in "tumor of the left kidney"; the one that says
    most of it, or ``None``.
    """
    words = name_words(_CAMEL_CASE.sub(" ", name))
    side = words.sides[0] if len(words.sides) == 1 else None
    held = [key for key in name_index() if key[0] in (side, None) and {*key[1]} < {*words.stems}]
    return catalog()[name_index()[max(held, key=lambda key: (len(key[1]), key[0] == side))]] if held else None


def target_for(key: str) -> Target:
    """The target of a vocabulary key; a key outside the catalog gets Slicer's default terminology, Tissue.

    The returned target's ``key`` is the given one, whatever its spelling.
    """
    target = catalog().get(key) or find_target(key)
    if target is not None:
        return target if target.key == key else replace(target, key=key)
    tissue = Code("SCT", "85756007", "Tissue")
    return Target(
        key=key,
        names={"en": (key,)},
        category=tissue,
        type=tissue,
        modifier=None,
        terminology_list="Segmentation category and type - 3D Slicer General Anatomy list",
        color_rgb=(128, 174, 128),
    )


NameKey = tuple[Side | None, tuple[str, ...]]


def name_keys(target: Target) -> Iterator[NameKey]:
    """Under what the names of a target are found: side and sorted stems."""
    for name in target.all_names():
        for spelling in spellings(name):
            words = name_words(spelling)
            if not words.stems:
                continue
            side = words.sides[0] if words.sides else None
            yield side, words.stems
            if target.side == "both":
                yield "both", words.stems
                yield None, words.stems


@cache
def name_index() -> Mapping[NameKey, str]:
    """Target key by side and stems, over the whole catalog."""
    index: dict[NameKey, str] = {}
    for target in catalog().values():
        for key in name_keys(target):
            index.setdefault(key, target.key)
    return MappingProxyType(index)


def lookup(index: Mapping[NameKey, str], words: Words) -> str | None:
    """Key of the one target that words mean, or ``None``; left with right counts as both."""
    if not words.stems:
        return None
    if len(words.sides) < 2:
        return index.get((words.sides[0] if words.sides else None, words.stems))
    return index.get(("both", words.stems)) if words.names_both_sides else None


def _from_json(entry: Mapping[str, Any], lists: Mapping[str, str]) -> Target:
    red, green, blue = entry["rgb"]
    return Target(
        key=entry["key"],
        names={language: tuple(names) for language, names in entry["names"].items()},
        category=Code(*entry["category"]),
        type=Code(*entry["type"]),
        modifier=Code(*entry["modifier"]) if entry["modifier"] else None,
        terminology_list=lists[entry["list"]],
        color_rgb=(red, green, blue),
        parts=tuple(entry["parts"]),
        side=entry["side"],
        aliases=tuple(entry["aliases"]),
        form=entry["form"],
    )


# From typed text to comparable words: case, accents, umlauts, plurals, and words for left, right and both. No dictionary is
# involved: plurals fall to a suffix rule that is applied to the catalog's names and to the typed text alike, so that both
# meet at the same stem. The tests check that it keeps different targets apart.

SideWord = Literal["left", "right", "both"]
Joint = Literal["stop", "comma", "and"]

_LEFT = (
    "left l lt links linke linker linkes linken linkem li gauche gauches g izquierdo izquierda izquierdos "
    "izquierdas izq izqdo izqda izdo izda sinister sinistra sinistrum sinistri sinistrae sinistro sinistre sin sn sx "
    "esquerdo esquerda esquerdos esquerdas esq"
)
_RIGHT = (
    "right r rt rechts rechte rechter rechtes rechten rechtem re droit droite droits droites dr d derecho "
    "derecha derechos derechas dcho dcha dexter dextra dextrum dextri dextrae dext dx destro destra destri destre "
    "direito direita direitos direitas dir dto dta"
)
_BOTH = (
    "both bilateral bilat beide beider beiden beides beidseitig beidseitige beidseits bds deux bilaterale "
    "bilaterales bilateraux ambos ambas ambo ambae uterque utraque entrambi entrambe ambedue bilaterali bilaterais"
)
# Without the Portuguese "os", which is a bone in Latin and in French.
_ARTICLES = (
    "the a an of der die das des dem den le la les du de el los las del "
    "il lo gli i di dello della dei degli delle o as do da dos das"
)
_AND = "and und u sowie et y e ed ac atque plus"
SIDE_WORDS: dict[str, SideWord] = {
    **dict.fromkeys(_LEFT.split(), "left"),
    **dict.fromkeys(_RIGHT.split(), "right"),
    **dict.fromkeys(_BOTH.split(), "both"),
}
ARTICLES = frozenset(_ARTICLES.split())
AND_WORDS = frozenset(_AND.split())

_STOPS = frozenset(";|\n\r\x0b\x0c\x1c\x1d\x1e\x85\u2028\u2029")
_COMMAS = frozenset(",、")
_ANDS = frozenset("&+/")
# Read as a blank inside a name: "kidney_left", "Lenden-Darmbein-Muskel", "li. Niere", "kidney (left)".
_BLANKS = frozenset(" \t_-.'’‘`´\"“”„«»()[]‐‑‒–—")
_LIGATURES = str.maketrans({"œ": "oe", "æ": "ae", "ø": "o", "ł": "l"})
_UMLAUTS = str.maketrans({"ä": "ae", "ö": "oe", "ü": "ue"})
_ELISION = re.compile(r"(?<![^\W_])(?:[ld]|dell|degl)['’]")
_SHORTEST_STEM = 3
_STRENGTH: tuple[Joint, ...] = ("comma", "and", "stop")


@dataclass(frozen=True)
class Words:
    """A piece of text between two separators.

    Attributes:
        sides: the side words in it, in order.
        stems: stems of all its other words, sorted, so that the order of words does not matter.
        text: what was typed, on one line, for messages.
    """

    sides: tuple[SideWord, ...]
    stems: tuple[str, ...]
    text: str

    @property
    def names_both_sides(self) -> bool:
        """Whether it says left and right, each once."""
        return sorted(self.sides) == ["left", "right"]

    def joined(self, other: Words) -> Words:
        """Both pieces read as one name, as in "kidney, left"."""
        return Words(
            self.sides + other.sides,
            tuple(sorted(self.stems + other.stems)),
            f"{self.text} {other.text}",
        )


@dataclass(frozen=True)
class Piece:
    """Words and the separator before them."""

    joint: Joint
    words: Words


def fold(text: str) -> str:
    """Lower case without accents, ligatures, invisible characters and compatibility forms."""
    plain = unicodedata.normalize("NFKC", text).casefold().translate(_LIGATURES)
    return "".join(
        character
        for character in unicodedata.normalize("NFKD", plain)
        if unicodedata.category(character) not in ("Mn", "Cf")
    )


def spellings(name: str) -> tuple[str, ...]:
    """A name as it is and, where it has umlauts, also with ae, oe and ue."""
    composed = unicodedata.normalize("NFC", name).casefold()
    spelled_out = composed.translate(_UMLAUTS)
    return (composed,) if spelled_out == composed else (composed, spelled_out)


def stem(word: str) -> str:
    """Cut off what plurals add in English, Latin, German, French, Spanish and Portuguese; words of three letters stay."""
    while len(word) > _SHORTEST_STEM and word[-1] in "sne":
        word = word[:-1]
    return word[:-1] + "i" if len(word) > _SHORTEST_STEM and word[-1] == "y" else word


def to_words(tokens: Iterable[str], text: str) -> Words:
    """Sort folded tokens into side words and stems; articles are dropped."""
    sides: list[SideWord] = []
    stems: list[str] = []
    for token in tokens:
        side = SIDE_WORDS.get(token)
        if side is not None:
            sides.append(side)
        elif token not in ARTICLES:
            stems.append(stem(token))
    return Words(tuple(sides), tuple(sorted(stems)), text)


def name_words(name: str) -> Words:
    """A whole text read as one name: separators and words for "and" in it do not count."""
    tokens = [token for token in _tokens(name) if _joint(token) is None]
    return to_words(tokens, readable(name))


def split_pieces(text: str) -> list[Piece]:
    """Cut a prompt at its separators: ``;`` and line ends, commas, and the words and signs for "and".

    Of several separators in a row the strongest counts ("liver; and spleen"); the first piece follows a stop.
    """
    pieces: list[Piece] = []
    joint: Joint = "stop"
    tokens: list[str] = []
    for token in (*_tokens(text), ";"):
        found = _joint(token)
        if found is None:
            tokens.append(token)
            continue
        words = to_words(tokens, " ".join(tokens))
        tokens = []
        if words.sides or words.stems:
            pieces.append(Piece(joint, words))
            joint = found
        else:
            joint = max(joint, found, key=_STRENGTH.index)
    return pieces


def readable(text: str, limit: int = 40) -> str:
    """Typed text for a message: one line, printable characters only, at most ``limit`` of them."""
    line = " ".join("".join(c if c.isprintable() else " " for c in text[: 4 * limit]).split())
    return line if len(line) <= limit else line[: limit - 1] + "…"


def _joint(token: str) -> Joint | None:
    if token in _STOPS:
        return "stop"
    if token in _COMMAS:
        return "comma"
    return "and" if token in _ANDS or token in AND_WORDS else None


def _tokens(text: str) -> Iterator[str]:
    """Words and separators of folded text; any other sign is a token of its own, never overlooked."""
    word: list[str] = []
    for character in _ELISION.sub(" ", fold(text)):
        if character.isalnum():
            word.append(character)
            continue
        if word:
            yield "".join(word)
            word = []
        if character not in _BLANKS and (not character.isspace() or character in _STOPS):
            yield character
    if word:
        yield "".join(word)
