"""Whatever arrives, the worker answers with an error or ends cleanly; it never hangs and never just dies."""

from __future__ import annotations

import json
import random

import numpy as np
import pytest

from progidiff.wire.frames import encode_frame
from progidiff.wire.messages import ErrorReply, Hello, HelloReply, SetImage, Status, StatusReply
from progidiff.worker.server import EXIT_OK, EXIT_PROTOCOL

from .test_protocol_frames import BROKEN_HEADERS
from .test_protocol_messages import WRONG_REQUESTS
from .worker_pipe import Peer, raw_frame, request_bytes, scripted_command


def test_broken_frames_are_answered_and_the_worker_goes_on() -> None:
    with Peer(scripted_command()) as peer:
        for number, header in enumerate(BROKEN_HEADERS.values()):
            peer.send_bytes(raw_frame(header, bytes(8)))
            peer.send(Status(), number)
            owner, error = peer.next()
            assert isinstance(error, ErrorReply)
            assert error.code == "frame"
            assert owner in (None, 5)
            answered, reply = peer.next()
            assert answered == number
            assert isinstance(reply, StatusReply)


def test_wrong_requests_are_answered_with_their_id_and_the_worker_goes_on() -> None:
    with Peer(scripted_command()) as peer:
        for header, code in WRONG_REQUESTS.values():
            peer.send_bytes(raw_frame(json.dumps(header).encode()))
            owner, error = peer.next()
            assert owner == 4
            assert isinstance(error, ErrorReply)
            assert error.code == code
        peer.send_bytes(b"".join(encode_frame({"type": "hello", "v": 2, "id": 9}, {"x": np.arange(4)})))
        owner, error = peer.next()
        assert (owner, getattr(error, "code", None)) == (9, "schema")
        peer.send(Status(), 10)
        assert isinstance(peer.final(10), StatusReply)


@pytest.mark.slow
@pytest.mark.parametrize(
    "data",
    [
        b"GET / HTTP/1.1\r\nHost: localhost\r\n\r\n",
        b"\n",
        raw_frame(b"{}", magic=b"pgd1"),
        b"PGD1" + b"\xff" * 12,
        raw_frame(b"{}", claimed=2**40),
        raw_frame(b"{}", claimed=10_001),
    ],
    ids=["http", "newline", "magic", "header length", "payload length", "above the limit"],
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
    for length in (3, 16, 40, len(image) - 1):
        with Peer(scripted_command()) as peer:
            peer.send_bytes(image[:length])
            peer.close_input()
            assert isinstance(peer.next()[1], ErrorReply)
            assert peer.wait() == EXIT_PROTOCOL
            assert b"Traceback" not in peer.log


def test_the_end_of_the_stream_between_frames_is_a_clean_end() -> None:
    with Peer(scripted_command()) as peer:
        peer.send(Hello(), 1)
        peer.close_input()
        assert isinstance(peer.final(1), HelloReply)
        assert peer.wait() == EXIT_OK


def test_a_writer_of_single_bytes_is_understood() -> None:
    image = request_bytes(SetImage(np.arange(8, dtype=np.int16).reshape(2, 2, 2), np.eye(4)), 1)
    with Peer(scripted_command()) as peer:
        for value in image + request_bytes(Status(), 2):
            peer.send_bytes(bytes([value]))
        # One thread answers each: the order is open.
        answers = dict([peer.next(), peer.next()])
        assert getattr(answers[1], "code", None) == "no_model"
        assert isinstance(answers[2], StatusReply)


@pytest.mark.parametrize("seed", range(3))
def test_random_bytes_end_in_an_error_reply_and_exit_code_3(seed: int) -> None:
    with Peer(scripted_command()) as peer:
        peer.send_bytes(random.Random(seed).randbytes(5000))
        assert isinstance(peer.next()[1], ErrorReply)
        assert peer.wait() == EXIT_PROTOCOL


@pytest.mark.slow
def test_damaged_requests_are_answered_or_end_cleanly() -> None:
    dice = random.Random(7)
    good = [request_bytes(Hello(), 1), request_bytes(SetImage(np.zeros((2, 3, 4), np.int16), np.eye(4)), 2)]
    codes = set()
    for _ in range(5):
        stream = b""
        for _ in range(150):
            frame = bytearray(dice.choice(good))
            # The lengths stay whole, so that one process sees many kinds of damage; the headers do not.
            for _ in range(dice.randrange(1, 5)):
                frame[dice.randrange(16, len(frame))] = dice.randrange(256)
            stream += frame
        damaged = bytearray(stream)
        damaged[dice.randrange(len(damaged))] ^= 0x10
        with Peer(scripted_command("heartbeat_s=3600")) as peer:
            peer.send_bytes(bytes(damaged))
            peer.close_input()
            codes.add(peer.wait())
            assert b"Traceback" not in peer.log
            assert not peer.replies.empty()
    assert codes <= {EXIT_OK, EXIT_PROTOCOL}
