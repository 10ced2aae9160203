"""How arrays lie in the payload of a frame: described by the header, checked before they are believed."""

from __future__ import annotations

import math
from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt

from progidiff.errors import ProtocolError

Array = npt.NDArray[Any]

MAX_PAYLOAD = 8 << 30

ALIGN = 8
_MAX_ARRAYS = 16
_MAX_NAME = 64
_MAX_NDIM = 6
# Only plain numbers may travel: an object, string or record dtype has no business in a message.
_INTEGERS = {"int8", "uint8", "int16", "uint16", "int32", "uint32", "int64", "uint64"}
DTYPES = frozenset({"bool", *_INTEGERS, "float16", "float32", "float64"})


@dataclass(frozen=True)
class ArraySpec:
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
        return -(-self.nbytes // ALIGN) * ALIGN


def array_bytes(array: Array, kind: str) -> memoryview:
    """The array's bytes on the wire, not copied if it is contiguous and little endian already."""
    if kind == "bool":
        return np.packbits(array).data
    little = np.ascontiguousarray(array, dtype=np.dtype(kind).newbyteorder("<"))
    return little.reshape(-1).view(np.uint8).data


def array_view(spec: ArraySpec, data: Array) -> Array:
    """The array whose bytes on the wire are ``data`` (uint8); a view of them, but for bool."""
    if spec.dtype == "bool":
        return np.unpackbits(data, count=spec.count).view(np.bool_).reshape(spec.shape)
    return data.view(np.dtype(spec.dtype).newbyteorder("<")).reshape(spec.shape)


def parse_specs(value: object, payload_length: int) -> list[ArraySpec]:
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


def _parse_spec(item: object, payload_length: int) -> ArraySpec:
    if not isinstance(item, dict) or set(item) != {"name", "dtype", "shape", "encoding"}:
        raise ProtocolError("An array of a message must have a name, a dtype, a shape and an encoding.")
    name, dtype, shape, encoding = item["name"], item["dtype"], item["shape"], item["encoding"]
    if not isinstance(name, str) or not 0 < len(name) <= _MAX_NAME:
        raise ProtocolError(f"The name of an array must be a text of 1 to {_MAX_NAME} characters.")
    if not isinstance(dtype, str) or dtype not in DTYPES:
        raise ProtocolError("The dtype of an array must be a plain number type.")
    if encoding != ArraySpec(name, dtype, ()).encoding:
        raise ProtocolError("Arrays of bool must be encoded as bits, all others raw.")
    if not isinstance(shape, list) or len(shape) > _MAX_NDIM or not all(map(_is_size, shape)):
        raise ProtocolError(f"The shape of an array must be a list of at most {_MAX_NDIM} whole numbers.")
    # Zeros are left out, so that an empty array cannot carry dimensions that no numpy array can have.
    if math.prod(_nonzero(shape)) > 8 * max(payload_length, ALIGN):
        raise ProtocolError("The shape of an array is larger than the message.")
    return ArraySpec(name, dtype, tuple(shape))


def _is_size(value: object) -> bool:
    return isinstance(value, int) and not isinstance(value, bool) and 0 <= value <= MAX_PAYLOAD * 8


def _nonzero(shape: Iterable[int]) -> list[int]:
    return [n for n in shape if n]
