"""From typed text to comparable words: case, accents, umlauts, plurals, and words for left, right and both.

No dictionary is involved: plurals fall to a suffix rule that is applied to the catalog's names and to the
typed text alike, so that both meet at the same stem. The tests check that it keeps different targets apart.
"""

from __future__ import annotations

import re
import unicodedata
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from typing import Literal

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
