"""Checked reading of the fields of a message header, and plain writing of values into one."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Any, Final

import numpy as np

from progidiff.errors import ProtocolError

MAX_ID = 2**53  # whole numbers that survive every JSON reader
MAX_TEXT = 32_768  # the longest path that Windows knows


class _Required:
    """Marks a field without a default."""


REQUIRED: Final = _Required()


class Fields:
    """Reads each field once and checks type and range.

    Every method raises :class:`ProtocolError` with a sentence that names the message and the field, never its
    value. A ``default`` makes a field optional; where the default is ``None``, JSON null is taken too.
    """

    def __init__(self, values: Mapping[str, Any], message: str) -> None:
        self._values = values
        self._message = message
        self._read: set[str] = {"type", "v", "id"}

    def integer(self, name: str, low: int, high: int, default: Any = REQUIRED) -> Any:
        value, given = self._take(name, default)
        if given and not (_is_int(value) and low <= value <= high):
            raise self.wrong(name, f"a whole number from {low} to {high}")
        return value

    def number(self, name: str, default: Any = REQUIRED) -> Any:
        value, given = self._take(name, default)
        if given and not _is_number(value):
            raise self.wrong(name, "a number")
        return float(value) if given else value

    def boolean(self, name: str, default: Any = REQUIRED) -> Any:
        value, given = self._take(name, default)
        if given and not isinstance(value, bool):
            raise self.wrong(name, "true or false")
        return value

    def text(self, name: str, default: Any = REQUIRED, longest: int = MAX_TEXT) -> Any:
        value, given = self._take(name, default)
        if given and not _is_text(value, longest):
            raise self.wrong(name, f"a text of at most {longest} characters")
        return value

    def choice(self, name: str, choices: Sequence[str], default: Any = REQUIRED) -> Any:
        value, given = self._take(name, default)
        if given and not (isinstance(value, str) and value in choices):
            raise self.wrong(name, f"one of {', '.join(choices)}")
        return value

    def texts(self, name: str, most: int, longest: int = MAX_TEXT, default: Any = REQUIRED) -> Any:
        value, given = self._take(name, default)
        if not given:
            return value
        if not isinstance(value, list) or len(value) > most or not all(_is_text(item, longest) for item in value):
            raise self.wrong(name, f"a list of at most {most} texts")
        return tuple(value)

    def integers(self, name: str, low: int, high: int, default: Any = REQUIRED) -> Any:
        value, given = self._take(name, default)
        if given and not (isinstance(value, list) and all(_is_int(item) and low <= item <= high for item in value)):
            raise self.wrong(name, f"a list of whole numbers from {low} to {high}")
        return value

    def numbers(self, name: str) -> list[float]:
        """A list of numbers; null stands for a number that does not exist (NaN)."""
        value, _ = self._take(name, REQUIRED)
        if not isinstance(value, list) or not all(item is None or _is_number(item) for item in value):
            raise self.wrong(name, "a list of numbers")
        return [math.nan if item is None else float(item) for item in value]

    def mapping(self, name: str) -> dict[str, Any]:
        value, _ = self._take(name, REQUIRED)
        if not isinstance(value, dict):
            raise self.wrong(name, "an object")
        return value

    def anything(self, name: str, default: Any = None) -> Any:
        return self._take(name, default)[0]

    def nothing_else(self) -> None:
        """Raise if the message holds a field that was not asked for."""
        unknown = len(set(self._values) - self._read)
        if unknown:
            raise ProtocolError(f"A {self._message} message has {unknown} unknown field(s); both sides need one version.")

    def wrong(self, name: str, wanted: str) -> ProtocolError:
        """The error that says what the field must be."""
        return ProtocolError(f'The field "{name}" of a {self._message} message must be {wanted}.')

    def _take(self, name: str, default: Any) -> tuple[Any, bool]:
        self._read.add(name)
        if name not in self._values:
            if default is REQUIRED:
                raise ProtocolError(f'A {self._message} message lacks the field "{name}".')
            return default, False
        value = self._values[name]
        if value is None and default is None:
            return None, False
        return value, True


def plain(value: Any) -> Any:
    """``value`` as JSON has it: numpy scalars and arrays become Python's, tuples lists, numbers that are not
    finite null."""
    if isinstance(value, np.ndarray | np.generic):
        value = value.tolist()
    if isinstance(value, str):
        # A file name in a message may hold what is no text (see _is_text).
        return value[:MAX_TEXT].replace("\0", "?").encode("utf-8", "replace").decode("utf-8")
    if isinstance(value, float):
        return value if math.isfinite(value) else None
    if isinstance(value, Mapping):
        return {str(key): plain(item) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return [plain(item) for item in value]
    return value


def _is_int(value: object) -> bool:
    return isinstance(value, int) and not isinstance(value, bool)


def _is_number(value: object) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool) and abs(value) < 1e300


def _is_text(value: object, longest: int) -> bool:
    # Zero bytes and lone surrogates can be written in JSON, but no file system and no UTF-8 stream takes
    # them.
    if not isinstance(value, str) or len(value) > longest or "\0" in value:
        return False
    return not any("\ud800" <= character <= "\udfff" for character in value)
