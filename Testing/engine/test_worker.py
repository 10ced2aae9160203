"""The worker process: one final reply to every request, whatever arrives; it begins and ends when it should."""

from __future__ import annotations

import json
import os
import random
import shlex
import subprocess
import sys
import time
from dataclasses import replace
from io import BytesIO
from pathlib import Path
from typing import Any

import highdicom
import numpy as np
import psutil
import pydicom
import pytest

from progidiff.targets.catalog import target_for
from progidiff.volumes.reading import read_volume
from progidiff.wire.frames import encode_frame
from progidiff.wire.messages import (
    Acknowledged,
    Bye,
    Cancel,
    Cancelled,
    DoneEvent,
    ErrorReply,
    Hello,
    HelloReply,
    Load,
    LoadAdapter,
    ProgressEvent,
    ProposeRequest,
    Reply,
    SegmentFacts,
    SegWritten,
    SetImage,
    Shutdown,
    Status,
    StatusReply,
    UnloadAdapter,
    WriteSeg,
    image_key,
)
from progidiff.worker.server import EXIT_PROTOCOL

from ..volume_examples import oriented, write_patient_series
from .scripted_worker import SECRET
from .test_protocol_frames import BROKEN_HEADERS
from .test_protocol_messages import WRONG_REQUESTS
from .worker_pipe import PATIENCE_S, Peer, environment, phantom, raw_frame, request_bytes, scripted_command

LIVER = ProposeRequest(("liver",), proposals=4)


def error_of(reply: Reply) -> ErrorReply:
    assert isinstance(reply, ErrorReply), reply
    assert reply.message.endswith(".")
    return reply


def test_hello_status_and_what_needs_a_model() -> None:
    with Peer(scripted_command("max_payload=1000000")) as peer:
        hello = peer.ask(Hello(), 1)
        assert hello.pid == peer.process.pid
        assert hello.max_payload == 1_000_000
        status = peer.ask(Status(), 3)
        assert (status.state, status.model_id, status.adapter_id, status.image_key) == ("empty", None, None, None)
        assert status.running is None
        assert status.memory_mb is not None
        assert 1 < status.memory_mb < 10_000
        for number, request in enumerate((LoadAdapter("x"), UnloadAdapter()), 4):
            assert error_of(peer.ask(request, number)).code == "no_model"


def test_an_image_that_the_worker_holds_is_not_needed_again(peer: Peer) -> None:
    image = phantom()
    peer.prepare("work", image)
    key = image_key(image, np.eye(4), "CT", None)
    first = peer.ask(SetImage(None, None, "CT", None, key), 1)
    assert first.info.content_hash == "engine-1"
    again = peer.ask(SetImage(image, np.eye(4), "CT", None, key), 2)
    assert again == first, "the same pixels are not given to the engine twice"
    assert error_of(peer.ask(SetImage(None, None, "CT", None, "other"), 3)).code == "unknown_image"
    assert (
        "damaged"
        in error_of(peer.ask(SetImage(image, np.eye(4), "CT", None, image_key(image, np.eye(4), "MR", None)), 6)).message
    )
    # Another model takes the image over.
    peer.ask(Load("work", "cpu"), 4)
    assert isinstance(peer.ask(LIVER, 5), DoneEvent)


def test_an_engine_that_fails_is_an_error_reply_and_the_worker_goes_on(peer: Peer) -> None:
    for mode, code, says in (
        ("crash", "internal", "ValueError"),
        ("exit", "internal", "SystemExit"),
        ("memory", "memory", "memory"),
        ("cuda_memory", "memory", "memory"),
        ("unfinished", "internal", "without a result"),
        ("foreign_event", "internal", "engine failed"),
    ):
        peer.prepare(mode)
        error = error_of(peer.ask(LIVER, 1))
        assert (error.code, bool(error.hint)) == (code, True), mode
        assert says in error.message
    peer.prepare("work")
    assert isinstance(peer.ask(LIVER, 2), DoneEvent)


def test_requests_out_of_order_are_refused_with_a_hint(peer: Peer) -> None:
    assert error_of(peer.ask(LIVER, 1)).code == "no_model"
    assert error_of(peer.ask(SetImage(phantom(), np.eye(4)), 2)).code == "no_model"
    peer.ask(Load("work", "cpu"), 3)
    error = error_of(peer.ask(LIVER, 4))
    assert error.code == "no_image"
    assert error.hint


def test_a_model_an_image_or_a_target_that_cannot_be_used_is_an_error_reply(peer: Peer) -> None:
    assert error_of(peer.ask(Load("missing", "cpu"), 1)).code == "model"
    peer.ask(Load("refuse_image", "cpu"), 2)
    assert error_of(peer.ask(SetImage(phantom(), np.eye(4)), 3)).code == "input"
    assert error_of(peer.ask(LIVER, 4)).code == "no_image"
    peer.prepare()
    assert error_of(peer.ask(ProposeRequest(("wing",)), 5)).code == "prompt"


def test_busy_means_busy_and_cancel_ends_it(peer: Peer) -> None:
    peer.prepare("slow")
    peer.send(LIVER, 1)
    peer.reply(1, ProgressEvent)
    for number, request in enumerate((LIVER, Load("work"), SetImage(phantom(), np.eye(4))), 2):
        assert error_of(peer.ask(request, number)).code == "busy"
    status: Any = peer.ask(Status(), 5)
    assert (status.state, status.running) == ("working", 1)
    assert peer.ask(Cancel(77), 6) == Acknowledged(False)
    peer.reply(1, ProgressEvent)
    peer.send(Cancel(1), 7)
    # The two final replies may come in either order; both come.
    finals = {}
    while len(finals) < 2:
        number, reply = peer.next()
        if isinstance(reply, Acknowledged | Cancelled):
            finals[number] = reply
    assert finals == {7: Acknowledged(True), 1: Cancelled()}
    assert peer.ask(Cancel(), 8) == Acknowledged(False)
    peer.prepare("work")
    assert isinstance(peer.ask(LIVER, 9), DoneEvent)


def test_stray_output_and_input_do_not_touch_the_frames(peer: Peer) -> None:
    peer.prepare("noisy")
    events: list[Reply] = []
    assert isinstance(peer.ask(LIVER, 1, events.append), DoneEvent)
    assert ProgressEvent("input said ''", 0.5) in events
    peer.send(Shutdown(), 2)
    assert peer.wait() == 0
    for stray in (b"stray print of a library", b"stray bytes of native code", b"stray output of a child process"):
        assert stray in peer.log


def test_a_buffer_that_the_engine_uses_again_is_not_sent_twice(peer: Peer) -> None:
    peer.prepare("flood")
    slices: list[Reply] = []
    peer.ask(ProposeRequest(("liver",), seed=50), 1, slices.append)
    seen = [int(event.masks[0].argmax()) for event in slices]  # type: ignore[union-attr]
    assert seen == list(range(50))


def test_a_slow_reader_is_not_forgotten_and_can_still_cancel(peer: Peer) -> None:
    """The replies are only read after the cancel was sent: more waits than all pipes and queues hold."""
    peer.prepare("flood")
    peer.pause_reading()
    peer.send(ProposeRequest(("liver",), seed=1500), 1)
    assert peer.memory_settles() < 300, "a slow reader costs time, not memory"
    peer.send(Cancel(1), 2)
    peer.resume_reading()
    count: list[Reply] = []
    assert peer.final(1, count.append) == Cancelled()
    assert len(count) < 1500


@pytest.mark.slow
def test_heartbeats_come_while_the_engine_holds_the_interpreter_lock() -> None:
    with Peer(scripted_command("heartbeat_s=0.05")) as peer:
        peer.prepare("hog")
        before = peer.heartbeats
        assert isinstance(peer.ask(LIVER, 1), DoneEvent)
        # Two silent seconds of holding the lock, stretch by stretch; beats every 0.05 s may be lost, but not all.
        assert peer.heartbeats > before


def test_the_log_holds_no_pixels_file_names_or_prompts() -> None:
    image = phantom()
    image[0, 0, :8] = np.frombuffer(b"PIXEL_" * 3, np.int16)[:8]
    with Peer(scripted_command("log_level=10")) as peer:
        peer.prepare("crash", image)
        peer.ask(ProposeRequest(("liver", SECRET)), 1)
        peer.ask(Load(f"{SECRET}/missing", "cpu"), 3)
        peer.send_bytes(b"PGD1" + (9).to_bytes(4, "little") + bytes(8) + b"PIXEL_DOE")
        peer.reply(None, ErrorReply)
        peer.send(Shutdown(), 4)
        assert peer.wait() == 0
        for word in (SECRET, "PIXEL_", "nii.gz"):
            assert word.encode() not in peer.log
        for word in ("liver", "3x16x20", "ValueError", "scripted_worker.py"):
            assert word.encode() in peer.log


@pytest.mark.slow
def test_accepted_segments_become_a_dicom_seg_without_a_model(peer: Peer, tmp_path: Path) -> None:
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
        by_files, files=(), headers=np.frombuffer(b"".join(heads), dtype=np.uint8), header_sizes=tuple(map(len, heads))
    )
    elsewhere = replace(by_files, instances=(*uids[1:], "1.2.3"))
    for request_id, request in enumerate((by_files, by_headers), start=1):
        reply = peer.ask(request, request_id)
        assert isinstance(reply, SegWritten), reply
        seg = highdicom.seg.segread(BytesIO(reply.content.tobytes()))
        pixels = seg.get_pixels_by_source_instance(uids, assert_missing_frames_are_empty=True)
        np.testing.assert_array_equal(pixels[..., 0], mask)
        assert (seg.PatientID, seg.SegmentSequence[0].SegmentAlgorithmType) == ("P-17", "SEMIAUTOMATIC")
    assert "replaced or moved since they were loaded" in error_of(peer.ask(elsewhere, 3)).message
    assert error_of(peer.ask(replace(by_files, files=(*files[1:], str(tmp_path / "gone.dcm"))), 4)).message.startswith(
        "The DICOM image gone.dcm cannot be read"
    )


def test_broken_frames_are_answered_and_the_worker_goes_on(peer: Peer) -> None:
    for number, header in enumerate(BROKEN_HEADERS.values()):
        peer.send_bytes(raw_frame(header, bytes(8)))
        peer.send(Status(), number)
        owner, error = peer.next()
        assert error.code == "frame"
        assert owner in (None, 5)
        answered, reply = peer.next()
        assert answered == number
        assert isinstance(reply, StatusReply)


def test_wrong_requests_are_answered_with_their_id_and_the_worker_goes_on(peer: Peer) -> None:
    for header, code in WRONG_REQUESTS.values():
        peer.send_bytes(raw_frame(json.dumps(header).encode()))
        owner, error = peer.next()
        assert owner == 4
        assert error.code == code
    peer.send_bytes(b"".join(encode_frame({"type": "hello", "v": 2, "id": 9}, {"x": np.arange(4)})))
    owner, error = peer.next()
    assert (owner, getattr(error, "code", None)) == (9, "schema")
    assert isinstance(peer.ask(Status(), 10), StatusReply)


@pytest.mark.slow
@pytest.mark.parametrize(
    "data",
    [b"GET / HTTP/1.1\r\nHost: localhost\r\n\r\n", raw_frame(b"{}", claimed=10_001), random.Random(0).randbytes(5000)],
    ids=["http", "above the limit", "random bytes"],
)
def test_a_stream_that_is_not_the_protocol_is_an_error_reply_and_exit_code_3(data: bytes) -> None:
    with Peer(scripted_command("max_payload=10000")) as peer:
        peer.send(Hello(), 1)
        peer.send_bytes(data)
        assert isinstance(peer.final(1), HelloReply)
        owner, error = peer.next()
        assert owner is None
        assert isinstance(error, ErrorReply)
        assert peer.wait() == EXIT_PROTOCOL
        assert b"Traceback" not in peer.log


def test_a_frame_cut_short_is_an_error_reply_and_exit_code_3() -> None:
    image = request_bytes(SetImage(np.zeros((4, 5, 6), np.int16), np.eye(4)), 2)
    for length in (3, len(image) - 1):
        with Peer(scripted_command()) as peer:
            peer.send_bytes(image[:length])
            peer.close_input()
            assert isinstance(peer.next()[1], ErrorReply)
            assert peer.wait() == EXIT_PROTOCOL
            assert b"Traceback" not in peer.log


WORKER = [sys.executable, "-m", "progidiff", "worker"]
SLOW = ProposeRequest(("liver",))
posix_only = pytest.mark.skipif(os.name == "nt", reason="needs a POSIX shell and signals")


def gone(pid: int, timeout: float = PATIENCE_S) -> bool:
    deadline = time.monotonic() + timeout
    while time.monotonic() < deadline:
        try:
            if psutil.Process(pid).status() == psutil.STATUS_ZOMBIE:
                return True
        except psutil.NoSuchProcess:
            return True
        time.sleep(0.05)
    return False


def test_the_real_worker_says_hello_before_anything_heavy_is_imported() -> None:
    heavy = ("torch", "diffusers", "transformers", "SimpleITK", "pydantic", "typer", "scipy", "rich")
    probe = (
        "import atexit, json, os, sys\n"
        "sys.argv = ['progidiff', 'worker']\n"
        "from progidiff.worker import server\n"
        "hello = server.Server._hello\n"
        "def spy(self):\n"
        f"    print('HEAVY', json.dumps([m for m in {heavy!r} if m in sys.modules]), file=sys.stderr, flush=True)\n"
        "    return hello(self)\n"
        "server.Server._hello = spy\n"
        "from progidiff.__main__ import main\n"
        "main()\n"
    )
    with Peer([sys.executable, "-c", probe]) as peer:
        assert isinstance(peer.ask(Hello(), 1), HelloReply)
        assert peer.ask(Shutdown(), 2) == Bye()
        assert peer.wait() == 0
        line = next(line for line in peer.log.decode().splitlines() if line.startswith("HEAVY"))
        assert json.loads(line.removeprefix("HEAVY")) == []


@posix_only
def test_it_works_through_other_processes() -> None:
    """As over ssh: neither pipe is the worker's own."""
    worker = " ".join(map(shlex.quote, scripted_command()))
    with Peer(["sh", "-c", f"cat | {worker} | cat"]) as peer:
        peer.prepare("work")
        assert isinstance(peer.ask(SLOW, 1), DoneEvent)
        peer.close_input()
        assert peer.wait() == 0


@pytest.mark.parametrize("arguments", [["--max-payload", "0"], ["--heartbeat", "nan"], ["x"]])
def test_wrong_options_are_refused(arguments: list[str]) -> None:
    run = subprocess.run(
        [*WORKER, *arguments], stdin=subprocess.DEVNULL, capture_output=True, env=environment(), check=False
    )
    assert run.returncode == 2
    assert run.stdout == b""
    assert b"error:" in run.stderr


@posix_only
def test_a_terminal_is_told_what_this_is() -> None:
    import pty

    master, terminal = pty.openpty()
    try:
        run = subprocess.run(WORKER, stdin=terminal, capture_output=True, env=environment(), check=False)
    finally:
        os.close(master)
        os.close(terminal)
    assert run.returncode == 2
    assert b"not to a terminal" in run.stderr


@posix_only
def test_without_standard_input_it_ends_at_once() -> None:
    run = subprocess.run(
        ["sh", "-c", " ".join(map(shlex.quote, WORKER)) + " <&-"], capture_output=True, env=environment(), check=False
    )
    assert run.returncode == 2
    assert b"Traceback" not in run.stderr


def test_shutdown_cancels_what_runs(peer: Peer) -> None:
    peer.prepare("slow")
    peer.send(SLOW, 1)
    peer.reply(1, ProgressEvent)
    peer.send(Shutdown(), 2)
    assert peer.final(1) == Cancelled()
    assert peer.final(2) == Bye()
    assert peer.wait() == 0


@pytest.mark.parametrize("mode", ["slow", "deaf"])
def test_the_end_of_the_requests_ends_even_an_engine_that_does_not_listen(peer: Peer, mode: str) -> None:
    peer.prepare(mode)
    peer.send(SLOW, 1)
    peer.reply(1, ProgressEvent)
    peer.close_input()
    assert peer.wait(30) == 0


def test_nobody_reading_ends_the_worker() -> None:
    with Peer(scripted_command("heartbeat_s=0.05")) as peer:
        assert isinstance(peer.ask(Status(), 1), StatusReply)
        peer.stop_reading()
        assert peer.wait(30) == 0


PARENT = """
import subprocess, sys, time
worker = subprocess.Popen(sys.argv[1:], stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL)
worker.stdin.write(bytes.fromhex(sys.stdin.readline()))
worker.stdin.flush()
assert worker.stdout.read(4) == b"PGD1"
{more}
print(worker.pid, flush=True)
time.sleep(600)
"""


@posix_only
@pytest.mark.parametrize("keeps_pipe_open", [False, True], ids=["pipe closes", "a sibling holds the pipe"])
def test_the_worker_goes_when_its_parent_is_killed(tmp_path: Path, keeps_pipe_open: bool) -> None:
    more = ""
    if keeps_pipe_open:
        # A process that outlives the parent with the worker's pipes in its hands, as a badly timed fork leaves it.
        more = (
            "sleeper = subprocess.Popen(['sleep', '600'], stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL, "
            "pass_fds=(worker.stdin.fileno(), worker.stdout.fileno()))\nprint(sleeper.pid)"
        )
    else:
        more = "print(0)"
    script = tmp_path / "parent.py"
    script.write_text(PARENT.format(more=more), encoding="utf-8")
    parent = subprocess.Popen(
        [sys.executable, str(script), *scripted_command()],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        text=True,
        env=environment(),
    )
    sleeper = 0
    try:
        parent.stdin.write(request_bytes(Status(), 1).hex() + "\n")
        parent.stdin.flush()
        sleeper, worker = int(parent.stdout.readline()), int(parent.stdout.readline())
        assert psutil.pid_exists(worker)
        parent.kill()
        parent.wait(PATIENCE_S)
        assert gone(worker, 20)
    finally:
        parent.kill()
        parent.wait(PATIENCE_S)
        if sleeper:
            psutil.Process(sleeper).kill()
