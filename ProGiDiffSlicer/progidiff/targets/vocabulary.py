"""What one model can be asked for: its vocabulary seen through the catalog's names."""

from __future__ import annotations

import difflib
from collections.abc import Mapping
from dataclasses import dataclass
from functools import cached_property, lru_cache

from progidiff.targets.catalog import (
    NameKey,
    Side,
    catalog,
    find_target,
    lookup,
    name_index,
    name_keys,
    target_for,
)
from progidiff.targets.words import Words, fold, name_words, readable, split_pieces

_MOST_LISTED = 14
_NEAREST = 3
# Similarities from 0 to 1, as difflib gives them.
_CLOSE_ENOUGH = 0.6
_NEARLY_AS_CLOSE = 0.15
_CONTAINED = 0.9


@dataclass(frozen=True)
class Vocabulary:
    """What a model knows.

    Attributes:
        spelled: the model's own spelling by target key, in the order of its vocabulary.
        index: where names lead, also to targets that the model does not know.
        with_and: keys of targets that have a separator in their name, as "portal vein and splenic vein".
    """

    spelled: Mapping[str, str]
    index: Mapping[NameKey, str]
    with_and: frozenset[str]

    def find(self, words: Words) -> tuple[str, ...]:
        """Keys of the targets that words mean, whether the model knows them or not; empty if none."""
        readings: list[tuple[str, ...]] = []
        whole = lookup(self.index, words)
        if whole is not None:
            readings.append((whole,))
        if words.names_both_sides or words.sides == ("both",):
            sides: tuple[Side, ...] = words.sides if words.names_both_sides else ("left", "right")
            halves = tuple(self.index[side, words.stems] for side in sides if (side, words.stems) in self.index)
            if len(halves) == len(sides):
                readings.insert(0 if words.names_both_sides else len(readings), halves)
        # What the model can do comes first; the order above decides between equals.
        readings.sort(key=lambda keys: any(self.expand(key) is None for key in keys))
        return readings[0] if readings else ()

    def expand(self, key: str) -> list[str] | None:
        """The target where the model knows it, otherwise all of its parts; ``None`` if one is missing."""
        if key in self.spelled:
            return [key]
        known = catalog().get(key)
        if known is None or not known.parts:
            return None
        expanded: list[str] = []
        for part in known.parts:
            found = self.expand(part)
            if found is None:
                return None
            expanded += found
        return expanded

    def listing(self) -> str:
        """What the model knows, for a message."""
        names = list(self.spelled.values())
        if len(names) <= _MOST_LISTED:
            return ", ".join(names)
        return f"{', '.join(names[:_MOST_LISTED])} and {len(names) - _MOST_LISTED} more"

    def nearest(self, words: Words) -> list[str]:
        """The vocabulary's targets whose names, in any language, are most like what was typed; at least one."""
        scores: dict[str, float] = {}
        matcher = difflib.SequenceMatcher(autojunk=False)
        matcher.set_seq2(fold(readable(words.text)))
        typed = set(words.stems)
        for spelling, names in self._plain_names.items():
            for plain, stems in names.items():
                matcher.set_seq1(plain)
                score = matcher.ratio()
                # One inside the other: "ventricle" for the left ventricle, "liver tumour" for the liver.
                if stems and typed and (stems <= typed or typed <= stems):
                    score = max(score, _CONTAINED)
                scores[spelling] = max(score, scores.get(spelling, 0.0))
        best = max(scores.values())
        if best < _CLOSE_ENOUGH:
            return [max(scores, key=lambda spelling: scores[spelling])]
        bar = max(_CLOSE_ENOUGH, best - _NEARLY_AS_CLOSE)
        close = [spelling for spelling, score in scores.items() if score >= bar]
        return sorted(close, key=lambda spelling: -scores[spelling])[:_NEAREST]

    @cached_property
    def _plain_names(self) -> Mapping[str, Mapping[str, frozenset[str]]]:
        """Folded names with their stems, by the model's own spelling."""
        return {
            spelling: {fold(name): frozenset(name_words(name).stems) for name in (spelling, *target_for(key).all_names())}
            for key, spelling in self.spelled.items()
        }


@lru_cache(maxsize=16)
def read_vocabulary(vocabulary: tuple[str, ...]) -> Vocabulary:
    """Understand the keys of a model's vocabulary; those outside the catalog stand for themselves."""
    index = dict(name_index())
    spelled: dict[str, str] = {}
    for entry in vocabulary:
        if not name_words(entry).stems:
            continue
        target = catalog().get(entry) or find_target(entry) or target_for(entry)
        spelled.setdefault(target.key, entry)
        for key in name_keys(target):
            index.setdefault(key, target.key)
    with_and = frozenset(key for key in (*catalog(), *spelled) if len(split_pieces(key)) > 1)
    return Vocabulary(spelled, index, with_and)
