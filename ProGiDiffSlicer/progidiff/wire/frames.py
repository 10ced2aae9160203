"""Frames: how one message travels over a byte stream. Sans-IO: bytes in, frames out, and the other way round.

A frame is, little endian and without gaps::

    b"PGD1" | uint32 header length | uint64 payload length | header (JSON object, UTF-8) | payload (raw bytes)

``header["arrays"]`` describes the payload: arrays follow each other in the listed order, each padded with
zero bytes to a multiple of 8. Booleans are packed eight to a byte (``"encoding": "bits"``), everything else
is raw, little endian.

Whoever reads a stream trusts nothing in it: lengths are bounded before a byte is stored, and a broken frame
becomes a :class:`Frame` with a ``problem`` instead of an exception, so that the reader can answer it. Where
the lengths were sound the stream goes on after it; where not (``fatal``), the next frame cannot be found.
"""

from __future__ import annotations

import json
import math
import struct
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from typing import Any, NoReturn

import numpy as np
import numpy.typing as npt

from progidiff.errors import ProtocolError

Array = npt.NDArray[Any]

MAGIC = b"PGD1"
PREFIX = struct.Struct("<4sIQ")
MAX_HEADER = 1 << 20
MAX_PAYLOAD = 8 << 30

_ALIGN = 8
_MAX_ARRAYS = 16
_MAX_NAME = 64
_MAX_NDIM = 6
# Only plain numbers may travel: an object, string or record dtype has no business in a message.
_INTEGERS = {"int8", "uint8", "int16", "uint16", "int32", "uint32", "int64", "uint64"}
_DTYPES = frozenset({"bool", *_INTEGERS, "float16", "float32", "float64"})


@dataclass(frozen=True)
class _ArraySpec:
    """Name, type and shape of one array of a payload."""

    name: str
    dtype: str
    shape: tuple[int, ...]

    @property
    def count(self) -> int:
        return math.prod(self.shape)

    @property
    def encoding(self) -> str:
        return "bits" if self.dtype == "bool" else "raw"

    @property
    def nbytes(self) -> int:
        """Bytes on the wire, without padding."""
        return (self.count + 7) // 8 if self.dtype == "bool" else self.count * np.dtype(self.dtype).itemsize

    @property
    def padded(self) -> int:
        """Bytes on the wire; arrays begin at multiples of 8, so that they can be used where they lie."""
        return -(-self.nbytes // _ALIGN) * _ALIGN


@dataclass(frozen=True)
class Frame:
    """One message as it travels.

    Attributes:
        header: the JSON object, without ``"arrays"``.
        arrays: by name; of a decoded frame they are views of one buffer that belongs to the frame.
        problem: what is wrong with a frame that could not be decoded, as a sentence; ``header`` then holds
            what could be read.
        fatal: nothing after this frame can be read.
    """

    header: dict[str, Any]
    arrays: dict[str, Array] = field(default_factory=dict)
    problem: str | None = None
    fatal: bool = False


def encode_frame(header: Mapping[str, Any], arrays: Mapping[str, Array] | None = None) -> list[bytes | memoryview]:
    """Buffers that, written one after the other, are the frame.

    A contiguous little-endian array is not copied: its buffer is a view, so the array must not change before
    it is written.

    Raises:
        ProtocolError: the header cannot be JSON (it holds NaN, for instance) or is too long, or the dtype of
            an array may not travel.
    """
    specs: list[dict[str, Any]] = []
    buffers: list[bytes | memoryview] = []
    total = 0
    for name, array in (arrays or {}).items():
        kind = array.dtype.newbyteorder("=").name
        if kind not in _DTYPES:
            raise ProtocolError(f"An array of type {kind} cannot be sent; convert it to a plain number type.")
        spec = _ArraySpec(name, kind, tuple(int(n) for n in array.shape))
        specs.append({"name": name, "dtype": kind, "shape": spec.shape, "encoding": spec.encoding})
        total += spec.padded
        if spec.nbytes:
            buffers.append(_array_bytes(array, kind))
        if spec.padded > spec.nbytes:
            buffers.append(bytes(spec.padded - spec.nbytes))
    fields = dict(header)
    if specs:
        fields["arrays"] = specs
    try:
        text = json.dumps(fields, allow_nan=False, separators=(",", ":")).encode("ascii")
    except (TypeError, ValueError, RecursionError) as error:
        raise ProtocolError(f"A message cannot be written as JSON ({error}).") from error
    if len(text) > MAX_HEADER:
        raise ProtocolError(f"A message header of {len(text)} bytes is too long; the limit is {MAX_HEADER} bytes.")
    return [PREFIX.pack(MAGIC, len(text), total) + text, *buffers]


class FrameDecoder:
    """Turns a byte stream, however it is cut into pieces, into frames; never raises on what it holds."""

    def __init__(self, max_header: int = MAX_HEADER, max_payload: int = MAX_PAYLOAD) -> None:
        self._max_header = max_header
        self._max_payload = max_payload
        self._broken = False
        self._start_frame()

    @property
    def broken(self) -> bool:
        """Whether a fatal problem was met; whatever is fed from then on is ignored."""
        return self._broken

    def feed(self, data: bytes | bytearray | memoryview) -> list[Frame]:
        """Frames completed by ``data``, in order; a payload byte is copied once, into its frame's buffer."""
        frames: list[Frame] = []
        view = memoryview(data)
        while len(view) and not self._broken:
            view = view[self._take(view, frames) :]
        return frames

    def finish(self) -> list[Frame]:
        """To be called at the end of the stream: a fatal frame if it ended within a frame, else nothing."""
        if self._broken or (not self._head and self._lengths is None):
            return []
        return [self._fail("The stream ended in the middle of a message.")]

    def _start_frame(self) -> None:
        self._head = bytearray()
        self._lengths: tuple[int, int] | None = None
        self._frame: Frame | None = None
        self._specs: list[_ArraySpec] = []
        self._payload: Array | None = None
        self._filled = 0

    def _take(self, view: memoryview, frames: list[Frame]) -> int:
        """Consume some of ``view`` and say how much of it."""
        if self._lengths is None:
            used = min(len(view), PREFIX.size - len(self._head))
            self._head += view[:used]
            self._check_prefix(frames)
            return used
        header_length, payload_length = self._lengths
        if self._frame is None:
            used = min(len(view), header_length - len(self._head))
            self._head += view[:used]
            if len(self._head) == header_length:
                self._read_header(payload_length)
        else:
            used = min(len(view), payload_length - self._filled)
            if self._payload is not None:
                self._payload[self._filled : self._filled + used] = np.frombuffer(view[:used], np.uint8)
            self._filled += used
        self._end_frame(frames)
        return used

    def _end_frame(self, frames: list[Frame]) -> None:
        if self._frame is not None and self._lengths is not None and self._filled == self._lengths[1]:
            frames.append(self._complete(self._frame))
            self._start_frame()

    def _check_prefix(self, frames: list[Frame]) -> None:
        # The magic is compared as far as it has arrived: after a stray "hi" nobody should wait for more.
        if not MAGIC.startswith(self._head[: len(MAGIC)]):
            frames.append(self._fail("The stream does not hold messages of this protocol."))
        elif len(self._head) == PREFIX.size:
            _, header_length, payload_length = PREFIX.unpack(self._head)
            if header_length > self._max_header:
                frames.append(self._fail(f"A message header is longer than the limit of {self._max_header} bytes."))
            elif payload_length > self._max_payload:
                frames.append(self._fail(f"A message payload is longer than the limit of {self._max_payload} bytes."))
            else:
                self._lengths = (header_length, payload_length)
                self._head = bytearray()
                if header_length == 0:
                    self._read_header(payload_length)
                    self._end_frame(frames)

    def _read_header(self, payload_length: int) -> None:
        header: dict[str, Any] = {}
        try:
            header = _parse_object(bytes(self._head))
            self._specs = _parse_specs(header.pop("arrays", []), payload_length)
            self._payload = np.empty(payload_length, np.uint8)
        except ProtocolError as error:
            self._frame = Frame(header, problem=str(error))
        except MemoryError:
            self._frame = Frame(header, problem=f"There is not enough memory for a message of {payload_length} bytes.")
        else:
            self._frame = Frame(header)

    def _complete(self, frame: Frame) -> Frame:
        if frame.problem is not None or self._payload is None:
            return frame
        offset = 0
        for spec in self._specs:
            try:
                frame.arrays[spec.name] = _array_view(spec, self._payload[offset : offset + spec.nbytes])
            except MemoryError:
                return Frame(frame.header, problem="There is not enough memory to unpack the arrays of a message.")
            offset += spec.padded
        return frame

    def _fail(self, problem: str) -> Frame:
        self._broken = True
        self._start_frame()
        return Frame({}, problem=problem, fatal=True)


def _parse_object(data: bytes) -> dict[str, Any]:
    try:
        value = json.loads(data.decode("utf-8"), parse_constant=_no_constant)
    except UnicodeDecodeError:
        raise ProtocolError("A message header is not UTF-8.") from None
    except (ValueError, RecursionError):
        # The parser's own words would quote the header, which may hold a prompt.
        raise ProtocolError("A message header is not JSON.") from None
    if not isinstance(value, dict):
        raise ProtocolError("A message header is not a JSON object.")
    return value


def _no_constant(name: str) -> NoReturn:
    raise ValueError(f"{name} is not JSON")


def _array_bytes(array: Array, kind: str) -> memoryview:
    """The array's bytes on the wire, not copied if it is contiguous and little endian already."""
    if kind == "bool":
        return np.packbits(array).data
    little = np.ascontiguousarray(array, dtype=np.dtype(kind).newbyteorder("<"))
    return little.reshape(-1).view(np.uint8).data


def _array_view(spec: _ArraySpec, data: Array) -> Array:
    """The array whose bytes on the wire are ``data`` (uint8); a view of them, but for bool."""
    if spec.dtype == "bool":
        return np.unpackbits(data, count=spec.count).view(np.bool_).reshape(spec.shape)
    return data.view(np.dtype(spec.dtype).newbyteorder("<")).reshape(spec.shape)


def _parse_specs(value: object, payload_length: int) -> list[_ArraySpec]:
    """Checked ``header["arrays"]``.

    Raises:
        ProtocolError: not a sound description of ``payload_length`` bytes.
    """
    if not isinstance(value, list) or len(value) > _MAX_ARRAYS:
        raise ProtocolError(f"The arrays of a message must be a list of at most {_MAX_ARRAYS}.")
    specs = [_parse_spec(item, payload_length) for item in value]
    if len({spec.name for spec in specs}) != len(specs):
        raise ProtocolError("A message names an array twice.")
    described = sum(spec.padded for spec in specs)
    if described != payload_length:
        raise ProtocolError(f"A message describes {described} bytes of arrays but carries {payload_length}.")
    return specs


def _parse_spec(item: object, payload_length: int) -> _ArraySpec:
    if not isinstance(item, dict) or set(item) != {"name", "dtype", "shape", "encoding"}:
        raise ProtocolError("An array of a message must have a name, a dtype, a shape and an encoding.")
    name, dtype, shape, encoding = item["name"], item["dtype"], item["shape"], item["encoding"]
    if not isinstance(name, str) or not 0 < len(name) <= _MAX_NAME:
        raise ProtocolError(f"The name of an array must be a text of 1 to {_MAX_NAME} characters.")
    if not isinstance(dtype, str) or dtype not in _DTYPES:
        raise ProtocolError("The dtype of an array must be a plain number type.")
    if encoding != _ArraySpec(name, dtype, ()).encoding:
        raise ProtocolError("Arrays of bool must be encoded as bits, all others raw.")
    if not isinstance(shape, list) or len(shape) > _MAX_NDIM or not all(map(_is_size, shape)):
        raise ProtocolError(f"The shape of an array must be a list of at most {_MAX_NDIM} whole numbers.")
    # Zeros are left out, so that an empty array cannot carry dimensions that no numpy array can have.
    if math.prod(_nonzero(shape)) > 8 * max(payload_length, _ALIGN):
        raise ProtocolError("The shape of an array is larger than the message.")
    return _ArraySpec(name, dtype, tuple(shape))


def _is_size(value: object) -> bool:
    return isinstance(value, int) and not isinstance(value, bool) and 0 <= value <= MAX_PAYLOAD * 8


def _nonzero(shape: Iterable[int]) -> list[int]:
    return [n for n in shape if n]
