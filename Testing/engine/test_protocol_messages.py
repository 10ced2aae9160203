"""Requests, replies and events survive the way through a frame; wrong ones are refused with a sentence."""

from __future__ import annotations

import json
import math
import random
from collections.abc import Callable
from dataclasses import asdict, replace
from typing import Any

import numpy as np
import pytest

from progidiff.errors import ProtocolError
from progidiff.wire.codec import RequestError, frame_to_reply, frame_to_request, to_frame, to_line
from progidiff.wire.frames import Frame, FrameDecoder, encode_frame
from progidiff.wire.messages import (
    Acknowledged,
    AdaptDone,
    AdapterLoaded,
    AdapterUnloaded,
    AdaptPicture,
    AdaptRequest,
    AdaptStart,
    AdaptStep,
    AdaptValidation,
    Bye,
    Cancel,
    Cancelled,
    CountCases,
    CuratedCases,
    DoneEvent,
    ErrorReply,
    Event,
    Heartbeat,
    Hello,
    HelloReply,
    ImageInfo,
    ImageReply,
    LeftOut,
    Load,
    LoadAdapter,
    Loaded,
    NextDone,
    NextItem,
    NextRequest,
    NextSettings,
    NextStart,
    NextVolume,
    ProgressEvent,
    ProposeRequest,
    RankingEvent,
    Reply,
    Request,
    SegmentFacts,
    SegWritten,
    SetImage,
    Shutdown,
    SliceEvent,
    Status,
    StatusReply,
    SwapCases,
    TidiedEvent,
    UnloadAdapter,
    WarningEvent,
    WriteSeg,
    image_key,
)

VOLUME = np.arange(24, dtype=np.int16).reshape(2, 3, 4)
AFFINE = np.diag([0.7, 0.8, 5.0, 1.0])


def travel(frame: Frame) -> Frame:
    decoder = FrameDecoder()
    (arrived,) = decoder.feed(b"".join(encode_frame(frame.header, frame.arrays))) + decoder.finish()
    assert arrived.problem is None
    return arrived


REQUESTS: list[Request] = [
    Hello(),
    Status(),
    Shutdown(),
    Cancel(),
    Cancel(7),
    Load(),
    Load("C:\\Users\\Jürgen\\模型", "cuda"),
    ProposeRequest(("liver", "left kidney")),
    ProposeRequest(("liver",), 50, 5, 20, "dpmsolver++", 2**63 - 1, (3, 9), True, 4, "medoid"),
    LoadAdapter("/somewhere"),
    LoadAdapter("C:\\Größe\\adapter", even_if_worse=True),
    UnloadAdapter(),
    CountCases("/set"),
    SwapCases("/set", ("a", "b"), ("c",)),
    NextRequest("/scans", "liver; Milz", "/scans/next.json"),
    NextRequest("/s", "liver", "/o", "/m", "/a", True, "cpu", NextSettings(2, 1, 3, 0, 2**63 - 1, "MR", "coronal", True)),
    AdaptRequest(("/set",), "/out"),
    AdaptRequest(("/a", "/b"), "/out", "/m", "/w", ("liver",), 0.0, "cuda", "Größe", "axial", True, learning_rate=1e-3),
]


@pytest.mark.parametrize("request_", REQUESTS, ids=lambda request: type(request).__name__)
def test_requests_arrive_as_they_were(request_: Request) -> None:
    assert frame_to_request(travel(to_frame(request_, 12))) == (12, request_)


def test_an_image_arrives_as_it_was() -> None:
    key = image_key(VOLUME, AFFINE, "CT", "coronal")
    request_id, image = frame_to_request(travel(to_frame(SetImage(VOLUME, AFFINE, "CT", "coronal", key), 3)))
    assert request_id == 3
    assert (image.modality, image.plane, image.key) == ("CT", "coronal", key)
    np.testing.assert_array_equal(image.array, VOLUME)
    np.testing.assert_array_equal(image.affine, AFFINE)
    assert image_key(image.array, image.affine, "CT", "coronal") == key


def test_a_wish_to_correct_values_arrives_and_makes_another_image() -> None:
    key = image_key(VOLUME, AFFINE, "CT", None, True)
    assert key != image_key(VOLUME, AFFINE, "CT", None)
    for request_ in (SetImage(VOLUME, AFFINE, "CT", None, key, True), SetImage(None, None, "CT", None, key, True)):
        _, image = frame_to_request(travel(to_frame(request_, 3)))
        assert (image.correct_values, image.key, image.array is None) == (True, key, request_.array is None)


def test_the_image_key_is_of_content_not_layout() -> None:
    key = image_key(VOLUME, AFFINE, "CT", None)
    assert key == image_key(np.asfortranarray(VOLUME), AFFINE.copy(), "CT", None)
    assert key == image_key(VOLUME.astype(">i2"), AFFINE, "CT", None)
    changed = VOLUME.copy()
    changed[1, 2, 3] += 1
    others = [
        image_key(changed, AFFINE, "CT", None),
        image_key(VOLUME.reshape(3, 2, 4), AFFINE, "CT", None),
        image_key(VOLUME.view(np.uint16), AFFINE, "CT", None),
        image_key(VOLUME, AFFINE * 2, "CT", None),
        image_key(VOLUME, AFFINE, "MR", None),
        image_key(VOLUME, AFFINE, "CT", "axial"),
    ]
    assert len({key, *others}) == 7


RANKING = RankingEvent(
    "liver", [2, 0], [0.5, 0.25, 0.75], [[2, 1], [0]], [2], 2, [1.0, 2.0, 3.0], [False, False, True], 1 / 3, 0.9, "done."
)
EVENTS: list[Event] = [
    ProgressEvent("sampling", 0.5),
    ProgressEvent("sampling", 0.5, 3, 2, 9, "liver", 1.5),
    RANKING,
    replace(RANKING, dropped_pieces=[0, 2, 1], dropped_ml=[0.0, 1.5, 0.5], filled_ml=[0.25, 0.0, 0.0]),
    WarningEvent("batch_halved", "Memory ran out; the batch was halved."),
    DoneEvent("model", 16, {"total": 1.25, "sampling": 1.0}, 512.0, None),
    DoneEvent("model", 16, {}, 0.0, "adapter"),
    NextStart(9, 3, ""),
    NextVolume(4, 9, None, NextItem("a/b.nii.gz", reason="It cannot be read.")),
    AdaptStart("id", 9, {"training": 3}, {"liver": {"training": 3, "validation": 1}}, (LeftOut("a", "It is empty."),)),
    AdaptStep(3, 9, 0.25, 1.5),
    AdaptValidation(3, 0.5, {"liver": 0.5}, best=True),
]
ITEM = NextItem("a.nii", 0.5, "liver", 3, (1.0, 2.0, 3.0), "axial", 9, {"liver": {"slices": [1, 2]}}, ("It is odd.",))


@pytest.mark.parametrize("event", EVENTS, ids=lambda event: type(event).__name__)
def test_events_arrive_as_they_were(event: Event) -> None:
    frame = travel(to_frame(event, 5))
    assert frame_to_reply(frame) == (5, event)


def test_a_picture_arrives_as_it_was_and_is_printed_as_text() -> None:
    png = np.frombuffer(b"\x89PNG\0\xff", np.uint8)
    _, picture = frame_to_reply(travel(to_frame(AdaptPicture("case", "liver", 0.5, 0.75, png), 5)))
    assert isinstance(picture, AdaptPicture)
    np.testing.assert_array_equal(picture.png, png)
    line = {"event": "picture", "case": "case", "target": "liver", "before": 0.5, "after": 0.75, "png": "iVBORwD/"}
    assert to_line(picture) == line


@pytest.mark.parametrize("maps", [True, False])
def test_a_slice_arrives_as_it_was(maps: bool) -> None:
    masks = np.random.default_rng(0).random((5, 9, 13)) > 0.5
    shared = masks.mean(0, dtype=np.float32) if maps else None
    _, event = frame_to_reply(travel(to_frame(SliceEvent("liver", 4, 8, masks, shared), 5)))
    assert (event.target, event.slice_index, event.first_proposal) == ("liver", 4, 8)
    assert event.masks.dtype == np.bool_
    np.testing.assert_array_equal(event.masks, masks)
    assert event.complete == maps
    if shared is not None:
        assert event.mean_probability.dtype == np.float32
        np.testing.assert_allclose(event.mean_probability, shared, atol=1 / 256)


def test_a_tidied_slice_arrives_as_it_was() -> None:
    masks = np.random.default_rng(0).random((5, 9, 13)) > 0.5
    _, event = frame_to_reply(travel(to_frame(TidiedEvent("liver", 4, (7, 300), masks), 5)))
    assert isinstance(event, TidiedEvent)
    assert (event.target, event.slice_index, event.corner) == ("liver", 4, (7, 300))
    np.testing.assert_array_equal(event.masks, masks)


def test_the_mean_probability_travels_in_bytes_and_stays_on_its_side_of_one_half() -> None:
    half, one = np.float32(0.5), np.float32(1)
    around = [np.nextafter(half, one), half, np.nextafter(half, -one), np.nextafter(one, 2 * one), one, np.float32(1e-9), 0]
    levels = np.arange(65_537, dtype=np.float32) / 65_536
    for values in (around, levels, np.random.default_rng(3).random(5000, np.float32)):
        whole = np.zeros((9, 2 * len(values)), np.float32)
        whole[2:4, len(values) - 3 : 2 * len(values) - 3] = values
        frame = travel(to_frame(SliceEvent("liver", 0, 0, np.zeros((1, *whole.shape), bool), whole), 1))
        assert frame.arrays["mean_probability"].dtype == np.uint8
        assert frame.arrays["mean_probability"].shape[0] == 2
        assert frame.arrays["mean_probability"].shape[1] <= len(values)
        _, event = frame_to_reply(frame)
        np.testing.assert_array_equal(event.mean_probability > 0.5, whole > 0.5)
        np.testing.assert_allclose(event.mean_probability, whole, atol=1 / 256)
    nothing = travel(to_frame(SliceEvent("liver", 0, 0, np.zeros((1, 4, 5), bool), np.zeros((4, 5), np.float32)), 1))
    assert nothing.arrays["mean_probability"].size == 0
    _, event = frame_to_reply(nothing)
    assert event.complete
    np.testing.assert_array_equal(event.mean_probability, np.zeros((4, 5)))


def test_numpy_numbers_and_missing_numbers_arrive() -> None:
    event: Any = replace(
        RANKING,
        order=np.array([1, 0]),
        scores=[np.float32(0.5), float("nan")],
        empty=[np.bool_(True), np.bool_(False)],
        random_pick=np.int64(1),
        mean_pairwise_dice=float("nan"),
    )
    _, arrived = frame_to_reply(travel(to_frame(event, 1)))
    assert arrived.order == [1, 0]
    assert arrived.scores[0] == 0.5
    assert math.isnan(arrived.scores[1])
    assert math.isnan(arrived.mean_pairwise_dice)
    assert arrived.empty == [True, False]
    assert arrived.random_pick == 1


REPLIES: list[Reply] = [
    HelloReply("0.1.0", 4711, "3.12.1", 8 << 30, 1.0),
    Heartbeat(None, 0.0),
    Heartbeat(3, 2.5),
    StatusReply("ready", None, "model", "cuda", "key", 100.5, None, 3.0),
    StatusReply("ready", None, "model", "cuda", "key", 100.5, None, 3.0, "adapter"),
    AdapterLoaded("adapter", {"name": "Größe", "better": True}),
    AdapterUnloaded(),
    Acknowledged(True),
    Loaded("model", ("liver",), "cpu", {"name": "Größe", "accuracy": []}),
    ImageReply("key", ImageInfo("hash", "axial", 30, (512, 500), (0.7, 0.8), 5.0)),
    CuratedCases(3, {"liver": 2, "spleen": 1}, ("CT", "MR"), "a", "b"),
    NextDone((ITEM,), (NextItem("b", reason="Empty."),), cancelled=True),
    AdaptDone("/out", "id", True, False, "It is better.", {"name": "Größe"}),
    Cancelled(),
    Bye(),
    ErrorReply("prompt", "Not known.", "Try liver."),
]


@pytest.mark.parametrize("reply", REPLIES, ids=lambda reply: type(reply).__name__)
def test_replies_arrive_as_they_were(reply: Reply) -> None:
    for number in (None, 9):
        frame = travel(to_frame(reply, number))
        assert frame_to_reply(frame) == (number, reply)
        assert frame_to_reply(Frame({**frame.header, "mood": "fine"})) == (number, reply), "a newer worker may say more"


def test_text_that_is_no_text_does_not_break_an_error_reply() -> None:
    _, arrived = frame_to_reply(travel(to_frame(ErrorReply("model", "No such folder: /data/\udce9t\udce9/\0."), 1)))
    assert arrived.message.startswith("No such folder: /data/?t?/")


def header(kind: str, **changes: Any) -> dict[str, Any]:
    """The header of a request; a field that is ``"(absent)"`` is left out."""
    targets = {"targets": ["liver"]} if kind == "propose" else {}
    return {
        name: value for name, value in {"type": kind, "v": 2, "id": 4, **targets, **changes}.items() if value != "(absent)"
    }


#: Fields that a request cannot have: of a wrong type, out of range, unknown, or left out.
WRONG_FIELDS: dict[str, list[dict[str, Any]]] = {
    "hello": [{"more": 1}],
    "load": [{"folder": 3}, {"folder": "a\0b"}, {"folder": "\ud800"}, {"device": "abacus"}],
    "set_image": [{}, {"key": "a", "modality": "photo"}],
    "load_adapter": [{}],
    "propose": [
        {"targets": "(absent)"}, {"prompt": "liver"}, {"targets": []}, {"targets": "liver"}, {"targets": ["liver"] * 1000},
        {"proposals": 0}, {"proposals": True}, {"proposals": 16.0}, {"proposals": 10**9}, {"steps": 0}, {"steps": 101},
        {"scheduler": "euler"}, {"seed": -1}, {"seed": 2**64}, {"slices": [3]}, {"slices": [3, 3]}, {"slices": [-3, 3]},
        {"adaptive": 1}, {"batch_size": 0},
    ],
}  # fmt: skip
WRONG_REQUESTS: dict[str, tuple[dict[str, Any], str]] = {
    "no version": (header("hello", v="(absent)"), "version"),
    "other version": (header("hello", v=3), "version"),
    "version as text": (header("hello", v="2"), "version"),
    "no type": ({"id": 4, "v": 2}, "type"),
    "unknown type": (header("format_disk"), "type"),
    **{f"{kind} {wrong}"[:60]: (header(kind, **wrong), "schema") for kind, all_ in WRONG_FIELDS.items() for wrong in all_},
}


@pytest.mark.parametrize("name", WRONG_REQUESTS)
def test_wrong_requests_are_refused_with_their_id_and_one_sentence(name: str) -> None:
    wrong, code = WRONG_REQUESTS[name]
    with pytest.raises(RequestError) as refusal:
        frame_to_request(Frame(wrong))
    assert refusal.value.code == code
    assert refusal.value.request_id == 4
    assert str(refusal.value).endswith(".")


@pytest.mark.parametrize("request_id", [None, -1, "7", True, 2**60, "(absent)"])
def test_a_request_needs_an_id(request_id: object) -> None:
    with pytest.raises(RequestError) as refusal:
        frame_to_request(Frame(header("hello", id=request_id)))
    assert refusal.value.request_id is None


@pytest.mark.parametrize(
    "arrays",
    [
        {"array": VOLUME}, {"affine": AFFINE}, {"array": VOLUME, "affine": AFFINE, "more": AFFINE},
        {"array": VOLUME[0], "affine": AFFINE}, {"array": VOLUME[:0], "affine": AFFINE},
        {"array": VOLUME > 3, "affine": AFFINE}, {"array": VOLUME, "affine": AFFINE[:3]},
        {"array": VOLUME, "affine": AFFINE.astype(int)}, {"array": VOLUME, "affine": np.full((4, 4), np.nan)},
    ],
)  # fmt: skip
def test_wrong_images_are_refused(arrays: dict[str, np.ndarray]) -> None:
    with pytest.raises(RequestError, match=r"image|set_image"):
        frame_to_request(Frame(header("set_image"), arrays))


def test_arrays_where_none_belong_are_refused() -> None:
    with pytest.raises(RequestError, match="not known"):
        frame_to_request(Frame(header("hello"), {"x": VOLUME}))


@pytest.mark.parametrize(
    "arrays",
    [
        {},
        {"masks": np.zeros((2, 3), bool)},
        {"masks": np.zeros((2, 3, 4), np.uint8)},
        {"masks": np.zeros((2, 3), bool), "mean_probability": np.zeros((1, 1), np.uint8)},
        {"masks": np.zeros((2, 3, 4), bool), "mean_probability": np.zeros((3, 3), np.uint8)},
        {"masks": np.zeros((2, 3, 4), bool), "mean_probability": np.zeros((2, 4), np.float32)},
        {"masks": np.zeros((2, 3, 4), bool), "mean_probability": np.zeros(2, np.uint8)},
    ],
)
def test_wrong_slices_are_refused(arrays: dict[str, np.ndarray]) -> None:
    told = header("slice", target="a", slice_index=0, first_proposal=0, corner=[0, 2])
    with pytest.raises(ProtocolError, match="slice message"):
        frame_to_reply(Frame(told, arrays))


def refusal(read: Callable[[Frame], object], frame: Frame) -> str | None:
    try:
        read(frame)
    except ProtocolError as error:
        return str(error)
    return None


def test_headers_with_random_values_are_read_or_refused() -> None:
    dice = random.Random(5)
    values: list[Any] = [
        None, True, -1, 0, 1, 3.5, 1e300, 10**400, "", "liver", "\0", "\ud800", [], [1], ["a"], [[0]], {}, {"a": 1}
    ]  # fmt: skip
    headers = [to_frame(request, 1).header for request in REQUESTS]
    headers += [frame.header for frame in [to_frame(reply, 1) for reply in [*REPLIES, *EVENTS]]]
    outcomes = set()
    for _ in range(1000):
        changed = dict(dice.choice(headers))
        for name in dice.sample(sorted(changed), k=min(len(changed), dice.randrange(1, 3))):
            changed[name] = dice.choice(values)
        frame = Frame(changed)
        for read in (frame_to_request, frame_to_reply):
            outcomes.add(refusal(read, frame) is None)
    assert outcomes == {True, False}


def test_refusals_do_not_quote_what_was_sent() -> None:
    secret = "DOE_JANE"
    for name in asdict(ProposeRequest(())):
        with pytest.raises(RequestError) as refusal:
            frame_to_request(Frame(header("propose", **{name: {secret: secret}})))
        assert secret not in str(refusal.value)
    decoder = FrameDecoder()
    (frame,) = decoder.feed(b"PGD1" + (9).to_bytes(4, "little") + bytes(8) + b"DOE_JANE,")
    assert secret not in json.dumps(frame.problem)


SEG = WriteSeg(
    (
        SegmentFacts("Größe", (1.0, 0.5, 0.0), "list~a^b^c", {"ProGiDiff.model": "m|1"}, "s1"),
        SegmentFacts("b", (0.0, 0.0, 0.0)),
    ),
    np.arange(2 * 3 * 4 * 2, dtype=np.uint8).reshape(2, 3, 4, 2),
    11,
    AFFINE,
    ("1.2", "1.3", "1.4"),
    ("/a", "/b", "/ç"),
)
BY_HEADERS = replace(SEG, files=(), headers=np.arange(9, dtype=np.uint8), header_sizes=(2, 3, 4))


@pytest.mark.parametrize("asked", [SEG, BY_HEADERS], ids=["files", "headers"])
def test_segments_for_dicom_travel(asked: WriteSeg) -> None:
    request_id, back = frame_to_request(travel(to_frame(asked, 3)))
    assert request_id == 3
    assert isinstance(back, WriteSeg)
    for name in ("segments", "columns", "instances", "files", "header_sizes"):
        assert getattr(back, name) == getattr(asked, name)
    np.testing.assert_array_equal(back.masks, asked.masks)
    np.testing.assert_array_equal(back.affine, asked.affine)
    assert (back.headers is None) == (asked.headers is None)
    _, reply = frame_to_reply(travel(to_frame(SegWritten(np.arange(7, dtype=np.uint8)), 3)))
    np.testing.assert_array_equal(reply.content, np.arange(7))


@pytest.mark.parametrize(
    ("changes", "arrays"),
    [
        ({"segments": []}, {}), ({"segments": ["liver"]}, {}),
        ({"segments": [{"name": "a", "color": [2, 0, 0], "terminology": "", "tags": {}}] * 2}, {}),
        ({"segments": [{"name": "a", "color": [0, 0, 0], "terminology": "", "tags": {"a": 1}}] * 2}, {}),
        ({"columns": 20}, {}), ({"files": ["/a"]}, {}), ({"header_sizes": [1]}, {}),
        ({}, {"masks": np.zeros((2, 3, 4, 2), dtype=np.int16)}), ({}, {"masks": np.zeros((3, 3, 4, 2), dtype=np.uint8)}),
        ({}, {"affine": np.full((4, 4), np.nan)}), ({}, {"headers": np.zeros(4, dtype=np.uint8)}),
        ({"files": []}, {"headers": np.zeros(4, dtype=np.uint8)}),
    ],
)  # fmt: skip
def test_wrong_segments_for_dicom_are_refused(changes: dict[str, Any], arrays: dict[str, Any]) -> None:
    frame = to_frame(SEG, 3)
    with pytest.raises(RequestError) as caught:
        frame_to_request(travel(Frame(frame.header | changes, frame.arrays | arrays)))
    assert (caught.value.code, caught.value.request_id) == ("schema", 3)
