"""What the worker answers: every request gets exactly one final reply, whatever the engine does."""

from __future__ import annotations

from dataclasses import replace
from io import BytesIO
from pathlib import Path
from typing import Any

import highdicom
import numpy as np
import pydicom
import pytest

from progidiff.targets.catalog import target_for
from progidiff.volumes.reading import read_volume
from progidiff.wire.messages import (
    Acknowledged,
    Cancel,
    Cancelled,
    DoneEvent,
    ErrorReply,
    Hello,
    HelloReply,
    ImageReply,
    Load,
    LoadAdapter,
    Loaded,
    ProgressEvent,
    ProposeRequest,
    RankingEvent,
    Reply,
    SegmentFacts,
    SegWritten,
    SetImage,
    Shutdown,
    SliceEvent,
    Status,
    StatusReply,
    UnloadAdapter,
    WarningEvent,
    WriteSeg,
    image_key,
)

from ..volume_examples import oriented, write_patient_series
from .scripted_worker import SECRET
from .worker_pipe import Peer, phantom, scripted_command

LIVER = ProposeRequest(("liver",), proposals=4)


def error_of(reply: Reply) -> ErrorReply:
    assert isinstance(reply, ErrorReply), reply
    assert reply.message.endswith(".")
    return reply


def test_hello_status_and_what_needs_a_model() -> None:
    with Peer(scripted_command("max_payload=1000000")) as peer:
        peer.send(Hello(), 1)
        hello = peer.final(1)
        assert isinstance(hello, HelloReply)
        assert hello.pid == peer.process.pid
        assert hello.max_payload == 1_000_000
        peer.send(Status(), 3)
        status = peer.final(3)
        assert isinstance(status, StatusReply)
        assert (status.state, status.model_id, status.adapter_id, status.image_key) == ("empty", None, None, None)
        assert status.running is None
        assert status.memory_mb is not None
        assert 1 < status.memory_mb < 10_000
        for number, request in enumerate((LoadAdapter("x"), UnloadAdapter()), 4):
            peer.send(request, number)
            assert error_of(peer.final(number)).code == "no_model"


@pytest.mark.slow
def test_a_session_from_load_to_done() -> None:
    image = phantom()
    with Peer(scripted_command()) as peer:
        peer.send(Load("work", "cpu"), 1)
        before: list[Reply] = []
        loaded = peer.final(1, before.append)
        assert before == [ProgressEvent("reading weights", 0.5)]
        assert loaded == Loaded(
            "scripted", ("liver", "spleen"), "cpu", {"model_id": "scripted", "vocabulary": ["liver", "spleen"]}
        )
        affine = np.diag([0.7, 0.8, 5.0, 1.0])
        peer.send(SetImage(image, affine, "CT", None), 2)
        reply = peer.final(2)
        assert isinstance(reply, ImageReply)
        assert reply.key == image_key(image, affine, "CT", None)
        assert reply.info.slice_shape == image.shape[1:]
        assert reply.info.spacing_rc == (0.8, 0.7)

        events: list[Reply] = []
        peer.send(LIVER, 3)
        done = peer.final(3, events.append)
        assert isinstance(done, DoneEvent)
        assert done.proposals == 4
        slices = [event for event in events if isinstance(event, SliceEvent)]
        assert [event.slice_index for event in slices] == [0, 1, 2]
        levels = np.linspace(0.2, 0.8, 4) * image.max()
        np.testing.assert_array_equal(slices[1].masks, image[1] > levels[:, None, None])
        assert sum(isinstance(event, RankingEvent) for event in events) == 1
        assert isinstance(events[-1], WarningEvent)

        peer.send(Status(), 4)
        status = peer.final(4)
        assert isinstance(status, StatusReply)
        assert (status.state, status.model_id, status.image_key) == ("ready", "scripted", reply.key)


def test_targets_that_the_engine_does_not_know_are_refused() -> None:
    with Peer(scripted_command()) as peer:
        peer.prepare()
        peer.send(ProposeRequest(("spleen", "liver")), 1)
        assert isinstance(peer.final(1), DoneEvent)
        peer.send(ProposeRequest(("wing",)), 2)
        error = error_of(peer.final(2))
        assert error.code == "prompt"
        assert "liver" in error.message


def test_an_image_that_the_worker_holds_is_not_needed_again() -> None:
    image = phantom()
    with Peer(scripted_command()) as peer:
        peer.prepare("work", image)
        key = image_key(image, np.eye(4), "CT", None)
        peer.send(SetImage(None, None, "CT", None, key), 1)
        first = peer.final(1)
        assert isinstance(first, ImageReply)
        assert first.info.content_hash == "engine-1"
        peer.send(SetImage(image, np.eye(4), "CT", None, key), 2)
        again = peer.final(2)
        assert again == first, "the same pixels are not given to the engine twice"
        peer.send(SetImage(None, None, "CT", None, "other"), 3)
        assert error_of(peer.final(3)).code == "unknown_image"
        # Another model takes the image over.
        peer.send(Load("work", "cpu"), 4)
        peer.final(4)
        peer.send(LIVER, 5)
        assert isinstance(peer.final(5), DoneEvent)


def test_a_damaged_image_is_refused() -> None:
    with Peer(scripted_command()) as peer:
        peer.prepare()
        peer.send(SetImage(phantom(), np.eye(4), "CT", None, image_key(phantom(), np.eye(4), "MR", None)), 1)
        assert "damaged" in error_of(peer.final(1)).message


@pytest.mark.parametrize(
    ("mode", "code", "says"),
    [
        ("crash", "internal", "ValueError"),
        ("exit", "internal", "SystemExit"),
        ("memory", "memory", "memory"),
        ("cuda_memory", "memory", "memory"),
        ("unfinished", "internal", "without a result"),
        ("foreign_event", "internal", "engine failed"),
    ],
)
def test_an_engine_that_fails_is_an_error_reply_and_the_worker_goes_on(mode: str, code: str, says: str) -> None:
    with Peer(scripted_command()) as peer:
        peer.prepare(mode)
        peer.send(LIVER, 1)
        error = error_of(peer.final(1))
        assert error.code == code
        assert says in error.message
        assert error.hint
        peer.prepare("work")
        peer.send(LIVER, 2)
        assert isinstance(peer.final(2), DoneEvent)


def test_requests_out_of_order_are_refused_with_a_hint() -> None:
    with Peer(scripted_command()) as peer:
        peer.send(LIVER, 1)
        assert error_of(peer.final(1)).code == "no_model"
        peer.send(SetImage(phantom(), np.eye(4)), 2)
        assert error_of(peer.final(2)).code == "no_model"
        peer.send(Load("work", "cpu"), 3)
        peer.final(3)
        peer.send(LIVER, 4)
        error = error_of(peer.final(4))
        assert error.code == "no_image"
        assert error.hint


def test_a_model_or_an_image_that_cannot_be_used_is_an_error_reply() -> None:
    with Peer(scripted_command()) as peer:
        peer.send(Load("missing", "cpu"), 1)
        assert error_of(peer.final(1)).code == "model"
        peer.send(Load("refuse_image", "cpu"), 2)
        peer.final(2)
        peer.send(SetImage(phantom(), np.eye(4)), 3)
        assert error_of(peer.final(3)).code == "input"
        peer.send(LIVER, 4)
        assert error_of(peer.final(4)).code == "no_image"


def test_busy_means_busy_and_cancel_ends_it() -> None:
    with Peer(scripted_command()) as peer:
        peer.prepare("slow")
        peer.send(LIVER, 1)
        peer.reply(1, ProgressEvent)
        for number, request in enumerate((LIVER, Load("work"), SetImage(phantom(), np.eye(4))), 2):
            peer.send(request, number)
            assert error_of(peer.final(number)).code == "busy"
        peer.send(Status(), 5)
        status: Any = peer.final(5)
        assert (status.state, status.running) == ("working", 1)
        peer.send(Cancel(77), 6)
        assert peer.final(6) == Acknowledged(False)
        peer.reply(1, ProgressEvent)
        peer.send(Cancel(1), 7)
        # The two final replies may come in either order; both come.
        finals = {}
        while len(finals) < 2:
            number, reply = peer.next()
            if isinstance(reply, Acknowledged | Cancelled):
                finals[number] = reply
        assert finals == {7: Acknowledged(True), 1: Cancelled()}
        peer.send(Cancel(), 8)
        assert peer.final(8) == Acknowledged(False)
        peer.prepare("work")
        peer.send(LIVER, 9)
        assert isinstance(peer.final(9), DoneEvent)


def test_loading_can_be_cancelled() -> None:
    with Peer(scripted_command()) as peer:
        peer.send(Load("slow_load", "cpu"), 1)
        peer.reply(1, ProgressEvent)
        peer.send(Cancel(), 2)
        assert peer.final(1) == Cancelled()
        peer.send(Status(), 3)
        status: Any = peer.reply(3, StatusReply)
        assert status.state == "empty"


def test_stray_output_and_input_do_not_touch_the_frames() -> None:
    with Peer(scripted_command()) as peer:
        peer.prepare("noisy")
        events: list[Reply] = []
        peer.send(LIVER, 1)
        assert isinstance(peer.final(1, events.append), DoneEvent)
        assert ProgressEvent("input said ''", 0.5) in events
        peer.send(Shutdown(), 2)
        assert peer.wait() == 0
        for stray in (b"stray print of a library", b"stray bytes of native code", b"stray output of a child process"):
            assert stray in peer.log


def test_a_buffer_that_the_engine_uses_again_is_not_sent_twice() -> None:
    with Peer(scripted_command()) as peer:
        peer.prepare("flood")
        slices: list[Reply] = []
        peer.send(ProposeRequest(("liver",), seed=50), 1)
        peer.final(1, slices.append)
        seen = [int(event.masks[0].argmax()) for event in slices]  # type: ignore[union-attr]
        assert seen == list(range(50))


def test_a_slow_reader_is_not_forgotten_and_can_still_cancel() -> None:
    """The replies are only read after the cancel was sent: more waits than all pipes and queues hold."""
    with Peer(scripted_command()) as peer:
        peer.prepare("flood")
        peer.pause_reading()
        peer.send(ProposeRequest(("liver",), seed=3000), 1)
        assert peer.memory_settles() < 300, "a slow reader costs time, not memory"
        peer.send(Cancel(1), 2)
        peer.resume_reading()
        count: list[Reply] = []
        assert peer.final(1, count.append) == Cancelled()
        assert len(count) < 3000


@pytest.mark.slow
def test_heartbeats_come_while_the_engine_holds_the_interpreter_lock() -> None:
    with Peer(scripted_command("heartbeat_s=0.05")) as peer:
        peer.prepare("hog")
        before = peer.heartbeats
        peer.send(LIVER, 1)
        assert isinstance(peer.final(1), DoneEvent)
        # Two silent seconds of holding the lock, stretch by stretch; beats every 0.05 s may be lost, but not all.
        assert peer.heartbeats > before


def test_the_log_holds_no_pixels_file_names_or_prompts() -> None:
    image = phantom()
    image[0, 0, :8] = np.frombuffer(b"PIXEL_" * 3, np.int16)[:8]
    with Peer(scripted_command("log_level=10")) as peer:
        peer.prepare("crash", image)
        peer.send(ProposeRequest(("liver", SECRET)), 1)
        peer.final(1)
        peer.send(Load(f"{SECRET}/missing", "cpu"), 3)
        peer.final(3)
        peer.send_bytes(b"PGD1" + (9).to_bytes(4, "little") + bytes(8) + b"PIXEL_DOE")
        peer.reply(None, ErrorReply)
        peer.send(Shutdown(), 4)
        assert peer.wait() == 0
        for word in (SECRET, "PIXEL_", "nii.gz"):
            assert word.encode() not in peer.log
        for word in ("liver", "3x16x20", "ValueError", "scripted_worker.py"):
            assert word.encode() in peer.log


@pytest.mark.slow
def test_accepted_segments_become_a_dicom_seg_without_a_model(tmp_path: Path) -> None:
    geometry = oriented("LPS", (11, 8, 6), (0.75, 0.75, 2.5))
    write_patient_series(tmp_path / "series", geometry)
    volume = read_volume(tmp_path / "series")
    mask = np.random.default_rng(3).random(geometry.shape_kji) < 0.4
    uids = tuple(str(pydicom.dcmread(file).SOPInstanceUID) for file in volume.dicom_files)
    files = tuple(map(str, volume.dicom_files))
    target = target_for("spleen")
    facts = SegmentFacts("Milz", target.color, target.terminology_entry, {"ProGiDiff.model": "m1"}, "s1")
    by_files = WriteSeg((facts,), np.packbits(mask, axis=-1)[None], 11, volume.geometry.affine, uids, files)
    content = [file.read_bytes() for file in volume.dicom_files]
    # As over ssh: what stands before the pixels, and no paths.
    heads = [data[: data.rindex(b"\xe0\x7f\x10\x00")] for data in content]
    by_headers = replace(
        by_files,
        files=(),
        headers=np.frombuffer(b"".join(heads), dtype=np.uint8),
        header_sizes=tuple(map(len, heads)),
    )
    elsewhere = replace(by_files, instances=(*uids[1:], "1.2.3"))
    with Peer(scripted_command()) as peer:
        for request_id, request in enumerate((by_files, by_headers), start=1):
            peer.send(request, request_id)
            reply = peer.final(request_id)
            assert isinstance(reply, SegWritten), reply
            seg = highdicom.seg.segread(BytesIO(reply.content.tobytes()))
            pixels = seg.get_pixels_by_source_instance(uids, assert_missing_frames_are_empty=True)
            np.testing.assert_array_equal(pixels[..., 0], mask)
            assert (seg.PatientID, seg.SegmentSequence[0].SegmentAlgorithmType) == ("P-17", "SEMIAUTOMATIC")
        peer.send(elsewhere, 3)
        assert "replaced or moved since they were loaded" in error_of(peer.final(3)).message
        peer.send(replace(by_files, files=(*files[1:], str(tmp_path / "gone.dcm"))), 4)
        assert error_of(peer.final(4)).message.startswith("The DICOM image gone.dcm cannot be read")
