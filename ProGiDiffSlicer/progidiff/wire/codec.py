"""Messages as frames: written from their dataclasses and read into them by the annotations.

A request goes as ``encode_frame(frame.header, frame.arrays)`` of :func:`to_frame`; what comes back through a
:class:`~progidiff.wire.frames.FrameDecoder` is read by :func:`frame_to_reply`.

Whoever reads trusts nothing: types, ranges and choices are those of the class, and an error names message and field, never a
value. A request with a field that its class lacks is refused; a reply may say more.
"""

from __future__ import annotations

import base64
import math
import re
import types
from collections.abc import Callable, Iterable, Mapping
from dataclasses import MISSING, fields, is_dataclass
from functools import cache
from typing import Annotated, Any, Literal, Union, get_args, get_origin, get_type_hints

import numpy as np

from progidiff.errors import ProtocolError
from progidiff.wire.frames import Array, Frame
from progidiff.wire.messages import MAX_ID, MAX_TEXT, PROTOCOL_VERSION, Of, Reply, Request, SliceEvent
from progidiff.wire.request import Range


def _type(cls: type[Any]) -> str:
    """How a message's class is called in a header: ``"load_adapter"``, ``"propose"`` for a ``ProposeRequest``."""
    return re.sub("(?<=[a-z])(?=[A-Z])", "_", re.sub("(Request|Reply|Event)$", "", cls.__name__)).lower()


_REQUESTS: dict[str, Any] = {_type(cls): cls for cls in get_args(Request)}
_REPLIES: dict[str, Any] = {_type(cls): cls for cls in get_args(Reply)}
_NAMES = {cls: name for table in (_REQUESTS, _REPLIES) for name, cls in table.items()}


class RequestError(ProtocolError):
    """A request that cannot be understood.

    Attributes:
        code: ``"frame"``, ``"version"``, ``"type"`` or ``"schema"``.
        request_id: id of the request if that much could be read.
    """

    def __init__(self, message: str, code: str, request_id: int | None) -> None:
        super().__init__(message)
        self.code = code
        self.request_id = request_id


def to_frame(message: Request | Reply, request_id: int | None) -> Frame:
    """The frame of a message; its arrays are not copied.

    ``request_id`` is ``None`` where a reply answers no request, as a heartbeat.
    """
    cls: Any = type(message)
    header: dict[str, Any] = {"type": _NAMES[cls], "v": PROTOCOL_VERSION, "id": request_id}
    arrays: dict[str, Array] = {}
    for name, (_, _, is_array) in _readers(cls).items():
        value = getattr(message, name)
        if not is_array:
            header[name] = _plain(value)
        elif value is not None:
            arrays[name] = value
    if isinstance(message, SliceEvent) and message.mean_probability is not None:
        arrays["mean_probability"], header["corner"] = _packed(message.mean_probability)
    return Frame(header, arrays)


def to_line(message: Reply) -> dict[str, Any]:
    """A reply or event as the command line prints it: the last word of its type as ``event``, and its fields.

    Bytes are written in base64.
    """
    line: dict[str, Any] = {"event": _NAMES[type(message)].rpartition("_")[2]}
    for entry in fields(message):
        value = getattr(message, entry.name)
        is_array = isinstance(value, np.ndarray)
        line[entry.name] = base64.b64encode(value.tobytes()).decode("ascii") if is_array else _plain(value)
    return line


def frame_to_request(frame: Frame) -> tuple[int, Request]:
    """Id and request of a frame.

    Raises:
        RequestError: the frame is broken, of another version, of unknown type, or not as its class says.
    """
    header = frame.header
    request_id = header.get("id")
    if type(request_id) is not int or not 0 <= request_id <= MAX_ID:
        request_id = None
    if frame.problem is not None:
        raise RequestError(frame.problem, "frame", request_id)
    if header.get("v") != PROTOCOL_VERSION or header.get("v") is True:
        raise RequestError(
            f"This worker speaks version {PROTOCOL_VERSION} of the protocol; install the same version on both sides.",
            "version",
            request_id,
        )
    kind = header.get("type")
    cls = _REQUESTS.get(kind) if isinstance(kind, str) else None
    if cls is None:
        raise RequestError(
            "The worker does not know this type of request; install the same version on both sides.", "type", request_id
        )
    if request_id is None:
        raise RequestError("A request needs an id, a whole number from 0.", "schema", None)
    try:
        if {*header, *frame.arrays} - {*_readers(cls), "type", "v", "id"}:
            raise ProtocolError(f"A {kind} message has fields or arrays that are not known; both sides need one version.")
        return request_id, _read(cls, frame)
    except ProtocolError as error:
        raise RequestError(str(error), "schema", request_id) from None


def frame_to_reply(frame: Frame) -> tuple[int | None, Reply]:
    """Request id and reply (or event) of a frame. Unknown fields are ignored: a newer worker may say more.

    Raises:
        ProtocolError: the frame is broken, of another version, of unknown type, or not as its class says.
    """
    if frame.problem is not None:
        raise ProtocolError(frame.problem)
    header = frame.header
    if header.get("v") != PROTOCOL_VERSION or header.get("v") is True:
        raise ProtocolError("The worker speaks another version of the protocol; install the same version on both sides.")
    kind, request_id = header.get("type"), header.get("id")
    if request_id is not None and (type(request_id) is not int or not 0 <= request_id <= MAX_ID):
        raise ProtocolError(f'The field "id" of a reply message must be a whole number from 0 to {MAX_ID}.')
    cls = _REPLIES.get(kind) if isinstance(kind, str) else None
    if cls is None:
        raise ProtocolError("The worker sent a reply of an unknown type; install the same version on both sides.")
    return request_id, _read(cls, frame)


# Annotations read and written -----------------------------------------------------------------------------------------

_Reader = Callable[[Any], Any]


class _Wrong(Exception):
    """A value is not ``wanted``, in words; of a dataclass, its field ``name`` is not (``None``: is not there)."""

    def __init__(self, wanted: str | None, name: str = "") -> None:
        self.wanted = wanted
        self.name = name


def _read(cls: type[Any], frame: Frame) -> Any:
    kind = _NAMES[cls]
    given = {**frame.header, **frame.arrays}
    if cls is SliceEvent and "mean_probability" in given:
        given["mean_probability"] = _unpacked(given["mean_probability"], given.get("corner"), given.get("masks"))
    try:
        message = cls(**_values(cls, given))
    except _Wrong as wrong:
        if wrong.wanted is None:
            raise ProtocolError(f'A {kind} message lacks the field "{wrong.name}".') from None
        raise ProtocolError(f'The field "{wrong.name}" of a {kind} message must be {wrong.wanted}.') from None
    if hasattr(message, "problem") and (problem := message.problem()):
        raise ProtocolError(problem)
    return message


def _values(cls: Any, given: Mapping[str, Any]) -> dict[str, Any]:
    found = {}
    for name, (reader, required, _) in _readers(cls).items():
        if name in given:
            try:
                found[name] = reader(given[name])
            except _Wrong as wrong:
                raise _Wrong(wrong.wanted, name) from None
        elif required:
            raise _Wrong(None, name)
    return found


@cache
def _readers(cls: Any) -> dict[str, tuple[_Reader, bool, bool]]:
    """By name of a field: how it is read, whether a message must have it, whether it is an array."""
    hints = get_type_hints(cls, include_extras=True)
    return {
        entry.name: (
            _reader(hints[entry.name]),
            entry.default is MISSING and entry.default_factory is MISSING,
            "ndarray" in repr(hints[entry.name]),
        )
        for entry in fields(cls)
    }


@cache
def _reader(hint: Any, rule: Any = None) -> _Reader:
    """What returns a checked value of JSON, or an array, as an annotation has it."""
    origin, args = get_origin(hint), get_args(hint)
    if origin is Annotated:
        return _reader(args[0], args[1])
    if origin in (types.UnionType, Union):  # ``X | None``
        some = _reader(args[0], rule)
        return lambda value: None if value is None else some(value)
    if origin is Literal:
        return _check(f"one of {', '.join(args)}", lambda value: isinstance(value, str) and value in args)
    if hint is bool:
        return _check("true or false", lambda value: isinstance(value, bool))
    if hint is int:
        low, high = rule.low, rule.high
        return _check(f"a whole number from {low} to {high}", lambda value: type(value) is int and low <= value <= high)
    if hint is float:
        return _check("a number", lambda value: _is_number(value, rule), _to_float)
    if hint is str:
        longest = MAX_TEXT if rule is None else rule.high
        return _check(f"a text of at most {longest} characters", lambda value: _is_text(value, longest))
    if origin is np.ndarray:
        what = "an array" if rule is None else f"an array of {rule.dtype} with {rule.axes} axes"
        return _check(what, lambda value: isinstance(value, np.ndarray) and rule in (None, Of(value.dtype.name, value.ndim)))
    if origin is dict:
        each: _Reader = (lambda value: value) if args[1] is Any else _reader(args[1])
        many = _check("an object", lambda value: isinstance(value, dict))
        return lambda value: dict(zip(many(value), _all(map(each, value.values())), strict=True))
    if origin in (list, tuple):
        return _list_reader(origin, args, rule)
    assert is_dataclass(hint), hint
    made: Any = hint

    def read(value: Any) -> Any:
        if not isinstance(value, dict):
            raise _Wrong("an object")
        try:
            return made(**_values(made, value))
        except _Wrong as wrong:
            raise _Wrong(f'an object whose field "{wrong.name}" is {wrong.wanted or "given"}') from None

    return read


def _list_reader(kind: type[Any], args: tuple[Any, ...], rule: Range | None) -> _Reader:
    several = kind is list or args[-1] is ...
    low, high = (0, math.inf) if rule is None else (rule.low, rule.high)
    if not several:
        low = high = len(args)
    readers = [_reader(each) for each in (args[:1] if several else args)]
    many = f"a list of {low} items" if low == high else f"a list of {low} or more items, at most {high}"

    def read(value: Any) -> Any:
        if not isinstance(value, list) or not low <= len(value) <= high:
            raise _Wrong(many)
        each = readers * len(value) if several else readers
        return kind(_all(reader(item) for reader, item in zip(each, value, strict=True)))

    return read


def _all(items: Iterable[Any]) -> list[Any]:
    try:
        return list(items)
    except _Wrong as wrong:
        raise _Wrong(f"a list or an object, each item {wrong.wanted}") from None


def _check(wanted: str, fits: Callable[[Any], bool], change: _Reader = lambda value: value) -> _Reader:
    def read(value: Any) -> Any:
        if not fits(value):
            raise _Wrong(wanted)
        return change(value)

    return read


def _is_number(value: object, rule: Range | None) -> bool:
    if value is None and rule is None:
        return True  # JSON has no NaN
    if not isinstance(value, int | float) or isinstance(value, bool) or not abs(value) < 1e300:
        return False
    return rule is None or rule.low <= value <= rule.high


def _to_float(value: Any) -> float:
    return math.nan if value is None else float(value)


def _is_text(value: object, longest: float) -> bool:
    # Zero bytes and lone surrogates can be written in JSON, but no file system and no UTF-8 stream takes them.
    if not isinstance(value, str) or len(value) > longest or "\0" in value:
        return False
    return not any("\ud800" <= character <= "\udfff" for character in value)


def _plain(value: Any) -> Any:
    """``value`` as JSON has it: numpy's numbers become Python's, tuples lists, numbers that are not finite null."""
    if is_dataclass(value):
        return {entry.name: _plain(getattr(value, entry.name)) for entry in fields(value)}
    if isinstance(value, np.ndarray | np.generic):
        value = value.tolist()
    if isinstance(value, str):
        # A file name in a message may hold what is no text (see _is_text).
        return value[:MAX_TEXT].replace("\0", "?").encode("utf-8", "replace").decode("utf-8")
    if isinstance(value, float):
        return value if math.isfinite(value) else None
    if isinstance(value, Mapping):
        return {str(key): _plain(item) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return [_plain(item) for item in value]
    return value


# Probabilities as bytes ------------------------------------------------------------------------------------------------

# Byte b stands for more than b / 256 up to (b + 1) / 256, so that more than one half is 128 and above.
_SHARES = np.append(0, (np.arange(1, 256) + 0.5) / 256).astype(np.float32)


def _packed(probability: Array) -> tuple[Array, list[int]]:
    """The bytes of the box outside of which all are 0, and the box's first row and column."""
    levels = np.clip(np.ceil(probability * 256) - 1, 0, 255).astype(np.uint8)
    rows, columns = (np.flatnonzero(levels.any(axis=axis)) for axis in (1, 0))
    if not len(rows):
        return levels[:0, :0], [0, 0]
    return levels[rows[0] : rows[-1] + 1, columns[0] : columns[-1] + 1], [int(rows[0]), int(columns[0])]


def _unpacked(box: Any, corner: Any, masks: Any) -> Array:
    """Probabilities, float32 of the masks' size; they are 0 outside the box."""
    shape = masks.shape[1:] if isinstance(masks, np.ndarray) else ()
    fits = isinstance(box, np.ndarray) and box.dtype == np.uint8 and isinstance(corner, list)
    fits = fits and len(box.shape) == len(corner) == len(shape) == 2
    if not fits or not all(type(c) is int and 0 <= c <= n - m for c, m, n in zip(corner, box.shape, shape, strict=True)):
        raise ProtocolError("The mean probability of a slice message must be the bytes of a box within the masks.")
    probability = np.zeros(shape, np.float32)
    probability[corner[0] :, corner[1] :][: box.shape[0], : box.shape[1]] = _SHARES[box]
    return probability
