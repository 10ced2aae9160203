"""From a prompt to targets of a model's vocabulary, or one clear sentence why not.

A prompt that names nothing known is refused: a mask of something that was not asked for is worse than none.
"""

from __future__ import annotations

import difflib
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import cached_property, lru_cache

from progidiff.errors import PromptError
from progidiff.targets.catalog import (
    NameKey,
    Piece,
    Side,
    Target,
    Words,
    catalog,
    find_target,
    fold,
    lookup,
    name_index,
    name_keys,
    name_words,
    readable,
    split_pieces,
    target_for,
)

MAX_PROMPT_LENGTH = 4000
"""Characters; the names of all targets of the catalog together are shorter."""

# "kidney, left and right" is three pieces; "gland, adrenal, left and right" four.
_MOST_JOINED = 4
_MOST_REPORTED = 3
_OPPOSITE = {"left": "right", "right": "left"}


def parse_prompt(text: str, vocabulary: Sequence[str]) -> list[Target]:
    """Targets that a prompt asks for, each once, in the order in which they are named.

    Separators are ``;``, line ends, commas and "and" (also und, et, y, e, ``&``, ``+``, ``/``). Names are those
    of the catalog in English, Latin, German, French, Spanish, Italian and Portuguese, whatever their case, accents,
    plural and word order, with usual abbreviations ("IVC", "li. Niere", "kidney, left"). A pair ("kidneys", "both
    kidneys") is the combined target where the vocabulary has it, otherwise left and right; "left and right
    kidney" is two targets where the vocabulary has them, otherwise the combined one.

    Args:
        text: the prompt, at most ``MAX_PROMPT_LENGTH`` characters.
        vocabulary: keys of the targets that the model knows; keys outside the catalog are read as they stand.

    Returns:
        Targets whose ``key`` is an element of ``vocabulary``; never empty.

    Raises:
        PromptError: the prompt is empty or too long, names something unknown (the message names the nearest
            targets of the vocabulary), or something that the model has not learned (the message lists what
            it has).
    """
    known = read_vocabulary(tuple(vocabulary))
    if not known.spelled:
        raise PromptError("This model knows no targets: train it or choose another model.")
    if len(text) > MAX_PROMPT_LENGTH:
        raise PromptError(
            f"The prompt has {len(text)} characters and may have {MAX_PROMPT_LENGTH}: "
            "name targets only, separated by semicolons."
        )
    pieces = split_pieces(text)
    if not pieces:
        raise PromptError(f"The prompt names no target: type one or more of {known.listing()}, separated by semicolons.")
    reading = _read(_merge_sides(pieces, known), known)
    if reading.unknown:
        raise PromptError(_unknown_message(reading.unknown, known))
    if reading.absent:
        raise PromptError(_absent_message(reading.absent, known))
    return [replace(target_for(key), key=known.spelled[key]) for key in _unique(reading.keys)]


def complete(prefix: str, vocabulary: Sequence[str], limit: int = 12) -> list[str]:
    """Names that the last target of a prompt being typed could become, one for each target.

    Args:
        prefix: what has been typed; only what follows its last ``;``, comma or line end is completed.
        vocabulary: keys of the targets that the model knows.
        limit: most names returned.

    Returns:
        Whole names in the language typed (the vocabulary's own keys for an empty prefix), to replace that
        last part. Names that begin with it come before those in which a later word does.
    """
    known = read_vocabulary(tuple(vocabulary))
    cut = max(prefix.rfind(mark) for mark in ";,\n") + 1
    typed = " ".join(fold(prefix[cut:][:MAX_PROMPT_LENGTH]).replace("_", " ").split())
    starts: list[str] = []
    contains: list[str] = []
    for key, spelling in known.spelled.items():
        names = {name: f" {fold(name)}" for name in (spelling, *target_for(key).all_names())}
        first = next((name for name, plain in names.items() if plain.startswith(f" {typed}")), None)
        later = next((name for name, plain in names.items() if f" {typed}" in plain), None)
        if first is not None:
            starts.append(first)
        elif later is not None:
            contains.append(later)
    return [*starts, *contains][:limit]


@dataclass
class _Reading:
    keys: list[str]
    absent: list[str]
    unknown: list[Words]


def _merge_sides(pieces: list[Piece], known: Vocabulary) -> list[Piece]:
    """Give "left and right kidney" and "linke und rechte Niere" back their first half."""
    merged: list[Piece] = []
    for piece in pieces:
        before = merged[-1].words if merged else None
        if (
            before is not None
            and piece.joint == "and"
            and not before.stems
            and len(before.sides) == len(piece.words.sides) == 1
            and _OPPOSITE.get(before.sides[0]) == piece.words.sides[0]
            and known.find(piece.words)
        ):
            merged[-1] = Piece(merged[-1].joint, before.joined(piece.words))
        else:
            merged.append(piece)
    return merged


def _read(pieces: list[Piece], known: Vocabulary) -> _Reading:
    """Sort pieces into targets, targets that the model lacks, and unknown words."""
    reading = _Reading([], [], [])
    position = 0
    while position < len(pieces):
        used, keys = _longest_name(pieces, position, known)
        if not keys:
            reading.unknown.append(pieces[position].words)
        for key in keys:
            expanded = known.expand(key)
            if expanded is None:
                reading.absent.append(key)
            else:
                reading.keys += expanded
        position += used
    return reading


def _longest_name(pieces: list[Piece], start: int, known: Vocabulary) -> tuple[int, tuple[str, ...]]:
    """How many pieces from ``start`` are one name, and what it means: nothing if it is unknown."""
    group = [pieces[start]]
    for piece in pieces[start + 1 : start + _MOST_JOINED]:
        if piece.joint == "stop":
            break
        group.append(piece)
    meanings = [known.find(piece.words) for piece in group]
    for count in range(len(group), 1, -1):
        words = group[0].words
        for piece in group[1:count]:
            words = words.joined(piece.words)
        found = known.find(words)
        if found and _may_join(group[:count], meanings[:count], found, known):
            return count, found
    return 1, meanings[0]


def _may_join(
    group: Sequence[Piece], meanings: Sequence[tuple[str, ...]], found: tuple[str, ...], known: Vocabulary
) -> bool:
    """Whether pieces are one name in spite of the separators between them.

    They are where a piece alone means nothing: a bare side ("kidney, left"), or a name turned round at a
    comma ("vena cava, inferior"). A name that has an "and" of its own ("portal vein and splenic vein")
    counts where the model knows it, or does not know all of its pieces: then the message names it whole.
    """
    bases = sum(1 for piece in group if piece.words.stems)
    if bases <= 1 or all(piece.joint == "comma" for piece in group[1:]):
        return not all(meanings)
    if not known.with_and.issuperset(found):
        return False
    whole_known = all(known.expand(key) is not None for key in found)
    pieces_known = all(meaning and all(known.expand(key) for key in meaning) for meaning in meanings)
    return whole_known or not pieces_known


def _unknown_message(unknown: Iterable[Words], known: Vocabulary) -> str:
    typed = {readable(words.text): words for words in unknown}
    shown = list(typed)[:_MOST_REPORTED]
    more = f" and {len(typed) - len(shown)} more" if len(typed) > len(shown) else ""
    nearest = _unique(key for text in shown for key in known.nearest(typed[text]))
    return f"This model does not know {_quoted(shown)}{more}: type {_instead(nearest)} of its targets ({known.listing()})."


def _absent_message(absent: Iterable[str], known: Vocabulary) -> str:
    missing = _unique(absent)
    more = f" and {len(missing) - _MOST_REPORTED} more" if len(missing) > _MOST_REPORTED else ""
    parts = {part for key in missing for part in target_for(key).parts}
    related = [
        spelling
        for key, spelling in known.spelled.items()
        if key in parts or not set(missing).isdisjoint(target_for(key).parts)
    ]
    return (
        f"This model has not learned {_quoted(missing[:_MOST_REPORTED])}{more}: "
        f"type {_instead(related)} of its targets ({known.listing()}), or choose another model."
    )


def _instead(names: Sequence[str]) -> str:
    return f"{_quoted(names, 'or')} instead, or another" if names else "one"


def _quoted(names: Sequence[str], conjunction: str = "and") -> str:
    quoted = [f'"{name}"' for name in names]
    return quoted[0] if len(quoted) == 1 else f"{', '.join(quoted[:-1])} {conjunction} {quoted[-1]}"


def _unique(items: Iterable[str]) -> list[str]:
    return list(dict.fromkeys(items))


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
