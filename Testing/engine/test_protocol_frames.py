"""Frames survive every cut of the stream and every array; broken ones are found, and never raise or hang."""

from __future__ import annotations

import json
import random
import tracemalloc

import numpy as np
import pytest

from progidiff.errors import ProtocolError
from progidiff.wire.frames import MAX_HEADER, Frame, FrameDecoder, encode_frame

from .worker_pipe import raw_frame

ARRAYS = {
    "bits": np.random.default_rng(0).random((3, 5, 7)) > 0.5,
    "image": np.arange(-30, 30, dtype=np.int16).reshape(3, 4, 5),
    "affine": np.diag([0.5, -0.25, 3.0, 1.0]),
    "probability": np.linspace(0, 1, 11, dtype=np.float32),
    "number": np.array(7, np.uint64),
    "nothing": np.zeros((0, 4), np.float32),
    "no_bits": np.zeros((2, 0), bool),
}


def encoded(header: dict[str, object], arrays: dict[str, np.ndarray] | None = None) -> bytes:
    return b"".join(encode_frame(header, arrays))


def decode_all(data: bytes, **limits: int) -> list[Frame]:
    decoder = FrameDecoder(**limits)
    return decoder.feed(data) + decoder.finish()


def assert_same(arrays: dict[str, np.ndarray], expected: dict[str, np.ndarray]) -> None:
    assert list(arrays) == list(expected)
    for name, array in expected.items():
        assert arrays[name].dtype == array.dtype
        np.testing.assert_array_equal(arrays[name], array)


@pytest.mark.parametrize("chunk", [1, 7, 16, 64, 10**6])
def test_frames_survive_every_cut_of_the_stream(chunk: int) -> None:
    data = encoded({"type": "a", "text": "Größe 🫀"}, ARRAYS) + encoded({"type": "b"}) + encoded({"n": [1, None]}, ARRAYS)
    decoder = FrameDecoder()
    frames: list[Frame] = []
    for start in range(0, len(data), chunk):
        frames += decoder.feed(data[start : start + chunk])
    assert decoder.finish() == []
    assert [frame.header for frame in frames] == [{"type": "a", "text": "Größe 🫀"}, {"type": "b"}, {"n": [1, None]}]
    assert [frame.problem for frame in frames] == [None] * 3
    assert_same(frames[0].arrays, ARRAYS)
    assert_same(frames[2].arrays, ARRAYS)


@pytest.mark.parametrize("dtype", ["bool", "int8", "uint16", "int32", "uint64", "float16", "float64"])
def test_every_number_type_arrives_bit_for_bit(dtype: str) -> None:
    raw = np.random.default_rng(1).integers(0, 256, 24 * 8, dtype=np.uint8)
    array = (raw > 127).reshape(8, 24) if dtype == "bool" else raw.view(dtype)
    (frame,) = decode_all(encoded({}, {"x": array}))
    assert frame.arrays["x"].dtype == array.dtype
    assert frame.arrays["x"].tobytes() == array.tobytes()


def test_strided_and_big_endian_arrays_arrive_by_value() -> None:
    base = np.arange(24, dtype=np.int32).reshape(2, 3, 4)
    odd = {"t": base.T, "s": base[:, ::2, 1:], "b": base.astype(">i4"), "f": np.asfortranarray(base)}
    (frame,) = decode_all(encoded({}, odd))
    for name, array in odd.items():
        np.testing.assert_array_equal(frame.arrays[name], array)
        assert frame.arrays[name].dtype == np.int32


@pytest.mark.parametrize(
    "array",
    [np.array([{}], object), np.array(["a"]), np.zeros(2, "i2,f4"), np.zeros(2, complex), np.zeros(2, "M8[s]")],
    ids=["object", "text", "record", "complex", "date"],
)
def test_only_plain_numbers_can_be_sent(array: np.ndarray) -> None:
    with pytest.raises(ProtocolError, match="cannot be sent"):
        encode_frame({}, {"x": array})


@pytest.mark.parametrize("value", [float("nan"), {1}, b"bytes"])
def test_a_header_that_is_not_json_cannot_be_sent(value: object) -> None:
    with pytest.raises(ProtocolError, match="JSON"):
        encode_frame({"x": value})
    with pytest.raises(ProtocolError, match="too long"):
        encode_frame({"x": "y" * MAX_HEADER})


def test_a_volume_is_encoded_without_a_copy() -> None:
    volume = np.zeros((8, 64, 64), np.int16)
    buffers = encode_frame({}, {"array": volume})
    assert any(np.shares_memory(np.frombuffer(buffer, np.uint8), volume) for buffer in buffers[1:])


def test_a_large_volume_is_copied_once_while_it_is_decoded() -> None:
    volume = np.random.default_rng(2).integers(0, 1000, (16, 512, 512)).astype(np.int16)
    data = encoded({}, {"array": volume})
    decoder = FrameDecoder()
    frames: list[Frame] = []
    tracemalloc.start()
    try:
        for start in range(0, len(data), 1 << 16):
            frames += decoder.feed(memoryview(data)[start : start + (1 << 16)])
        _, peak = tracemalloc.get_traced_memory()
    finally:
        tracemalloc.stop()
    assert peak < 1.1 * volume.nbytes
    np.testing.assert_array_equal(frames[0].arrays["array"], volume)
    assert frames[0].arrays["array"].flags.aligned


def test_a_claimed_payload_costs_no_memory_until_it_comes() -> None:
    header = json.dumps({"arrays": [{"name": "x", "dtype": "uint8", "shape": [6 << 30], "encoding": "raw"}]}).encode()
    tracemalloc.start()
    try:
        assert FrameDecoder().feed(raw_frame(header, claimed=6 << 30)[:-1]) == []
        header_only, _ = tracemalloc.get_traced_memory()
    finally:
        tracemalloc.stop()
    assert header_only < 1 << 20


@pytest.mark.parametrize(
    ("data", "says"),
    [
        (raw_frame(b"{}", magic=b"PGD2"), "not hold messages"),
        (b"Welcome to gpu-host!\n", "not hold messages"),
        (b"PGD1" + (MAX_HEADER + 1).to_bytes(4, "little") + bytes(8), "header is longer"),
        (raw_frame(b"{}", claimed=2**63), "payload is longer"),
        (raw_frame(b"{}", claimed=1001), "payload is longer"),
        (b"PG", "ended in the middle"),
        (raw_frame(b"{}")[:-1], "ended in the middle"),
        (raw_frame(b"{}", b"1234", claimed=8), "ended in the middle"),
    ],
)
def test_a_stream_that_cannot_go_on_ends_with_a_fatal_frame(data: bytes, says: str) -> None:
    good = encoded({"type": "before"})
    frames = decode_all(good + data, max_payload=1000)
    assert frames[0].header == {"type": "before"}
    assert len(frames) == 2
    assert frames[1].fatal
    assert says in str(frames[1].problem)
    decoder = FrameDecoder()
    decoder.feed(b"nonsense")
    assert decoder.broken
    assert decoder.feed(good) + decoder.finish() == [], "nothing is read after a fatal frame"


def spec(**changes: object) -> bytes:
    entry: dict[str, object] = {"name": "x", "dtype": "int16", "shape": [4], "encoding": "raw"}
    entry |= changes
    return json.dumps({"id": 5, "arrays": [{k: v for k, v in entry.items() if v is not None}]}).encode()


BROKEN_HEADERS = {
    "empty": b"",
    "invalid UTF-8": b'{"type": "\xff\xfe"}',
    "not JSON": b"{type: hello}",
    "a list": b"[1, 2]",
    "NaN": b'{"id": NaN}',
    "a nested bomb": b"[" * 100_000,
    "a number bomb": b'{"id": ' + b"9" * 100_000 + b"}",
    "arrays no list": b'{"arrays": {"x": 1}}',
    "array no object": b'{"arrays": [1]}',
    "too many arrays": json.dumps({"arrays": [{}] * 10_000}).encode(),
    "array without shape": spec(shape=None),
    "array with more": spec(strides=[1]),
    "name of wrong type": spec(name=3),
    "name empty": spec(name=""),
    "object dtype": spec(dtype="object"),
    "dtype list": spec(dtype=[["a", "i2"]]),
    "encoding of wrong type": spec(encoding=["raw"]),
    "fractional shape": spec(shape=[4.0]),
    "name too long": spec(name="n" * 1000),
    "record dtype": spec(dtype="i2,f4"),
    "byte order dtype": spec(dtype=">i2"),
    "unknown encoding": spec(encoding="zlib"),
    "raw bool": spec(dtype="bool", shape=[8]),
    "bits of numbers": spec(encoding="bits"),
    "negative shape": spec(shape=[-4]),
    "boolean shape": spec(shape=[True, 4]),
    "too many axes": spec(shape=[1] * 40 + [4]),
    "overflowing shape": spec(shape=[2**32, 2**32, 2**32]),
    "huge empty shape": spec(shape=[0, 2**31, 2**31, 2**31]),
    "shape too small": spec(shape=[3, 3]),
    "shape too large": spec(shape=[5]),
    "an array twice": json.dumps(
        {"arrays": [{"name": "x", "dtype": "uint8", "shape": [4], "encoding": "raw"}] * 2}
    ).encode(),
}


@pytest.mark.parametrize("name", BROKEN_HEADERS)
def test_the_stream_goes_on_after_a_broken_header(name: str) -> None:
    data = raw_frame(BROKEN_HEADERS[name], bytes(8)) + encoded({"type": "after"}, {"x": np.arange(3)})
    broken, after = decode_all(data)
    assert broken.problem
    assert not broken.fatal
    assert not broken.arrays
    assert broken.header.get("id", 5) == 5, "it still tells whose it is"
    assert "\n" not in broken.problem
    assert after.header == {"type": "after"}
    np.testing.assert_array_equal(after.arrays["x"], [0, 1, 2])


def test_random_bytes_never_raise_or_go_on_forever() -> None:
    dice = random.Random(3)
    for _ in range(100):
        data = dice.randbytes(dice.randrange(1, 400))
        frames = decode_all(data)
        assert len(frames) == 1
        assert frames[0].fatal


def test_damaged_frames_never_raise_and_what_is_whole_is_right() -> None:
    dice = random.Random(4)
    good = encoded({"type": "image", "id": 3}, ARRAYS)
    seen = set()
    for _ in range(1000):
        damaged = bytearray(good)
        for _ in range(dice.randrange(1, 4)):
            at = dice.randrange(len(damaged))
            action = dice.randrange(3)
            if action == 0:
                damaged[at] = dice.randrange(256)
            elif action == 1:
                del damaged[at : at + dice.randrange(1, 20)]
            else:
                damaged[at:at] = dice.randbytes(dice.randrange(1, 20))
        for frame in decode_all(bytes(damaged), max_payload=1 << 16):
            seen.add("fatal" if frame.fatal else "broken" if frame.problem else "whole")
            for array in frame.arrays.values():
                assert array.dtype.kind in "buif"
                array.sum()
    assert seen == {"fatal", "broken", "whole"}
