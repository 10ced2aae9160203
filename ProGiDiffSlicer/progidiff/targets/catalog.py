"""Every target that has a name: synonyms in seven languages, SNOMED CT codes and Slicer's own colours.

A model's vocabulary is usually a subset of this catalog. The data are in ``targets.json``, which also says
from which of Slicer's terminology lists each code and colour was taken.
"""

from __future__ import annotations

import json
import re
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field, replace
from functools import cache
from importlib import resources
from types import MappingProxyType
from typing import Any, Literal

from progidiff.targets.words import Words, name_words, spellings

Side = Literal["left", "right", "both"]
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
    )
