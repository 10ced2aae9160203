"""The client against a real worker process with a scripted engine."""

from __future__ import annotations

import json
import subprocess
import sys
import threading
from collections.abc import Iterator

import numpy as np
import pytest

from progidiff.errors import CancelledError, InputError
from progidiff.wire.client import (
    ClientState,
    RemoteError,
    WorkerClient,
    WorkerStateError,
)
from progidiff.wire.messages import DoneEvent, ProgressEvent, ProposeRequest, RankingEvent, SliceEvent

from .worker_pipe import environment, phantom, scripted_command

LIVER = ProposeRequest(("liver",), proposals=4)


@pytest.fixture
def client() -> Iterator[WorkerClient]:
    with WorkerClient(scripted_command()) as started:
        yield started


def prepared(client: WorkerClient, mode: str) -> WorkerClient:
    client.load(mode, "cpu")
    client.set_image(phantom(), np.eye(4), "CT")
    return client


def test_the_client_imports_neither_torch_nor_anything_else_heavy() -> None:
    probe = (
        "import json, sys\n"
        "before = set(sys.modules)\n"
        "import progidiff.wire.client\n"
        "roots = {name.partition('.')[0] for name in set(sys.modules) - before}\n"
        "print(json.dumps(sorted(roots - set(sys.stdlib_module_names))))\n"
    )
    run = subprocess.run([sys.executable, "-c", probe], capture_output=True, check=True, env=environment())
    assert set(json.loads(run.stdout)) == {"numpy", "progidiff"}


def test_a_session_from_start_to_close(client: WorkerClient) -> None:
    assert client.state is ClientState.READY
    assert client.hello is not None
    shown: list[ProgressEvent] = []
    loaded = client.load(None, "cpu", shown.append)
    assert (loaded.model_id, loaded.vocabulary) == ("scripted", ("liver", "spleen"))
    assert shown == [ProgressEvent("reading weights", 0.5)]
    image = phantom()
    info = client.set_image(image, np.diag([0.7, 0.8, 5.0, 1.0]), "CT")
    assert (info.slice_count, info.slice_shape, info.slice_spacing) == (3, (16, 20), 5.0)
    stream = client.propose(LIVER)
    assert client.state is ClientState.BUSY
    events = list(stream)
    assert client.state is ClientState.READY
    assert isinstance(events[-1], DoneEvent)
    slices = [event for event in events if isinstance(event, SliceEvent)]
    levels = np.linspace(0.2, 0.8, 4) * image.max()
    for event in slices:
        np.testing.assert_array_equal(event.masks, image[event.slice_index] > levels[:, None, None])
    assert sum(isinstance(event, RankingEvent) for event in events) == 1
    assert list(stream) == []
    assert client.status().state == "ready"
    client.close()
    assert client.state is ClientState.CLOSED
    client.close()


def test_an_image_is_sent_once(client: WorkerClient, monkeypatch: pytest.MonkeyPatch) -> None:
    from progidiff.wire import conversation

    sent: list[int] = []
    encode = conversation.encode_frame

    def spy(*arguments: object) -> list[bytes | memoryview]:
        buffers = encode(*arguments)  # type: ignore[arg-type]
        sent.append(sum(map(len, buffers)))
        return buffers

    monkeypatch.setattr(conversation, "encode_frame", spy)
    image = np.zeros((40, 64, 64), np.int16)
    image[20] = 1
    client.load("work", "cpu")
    first = client.set_image(image, np.eye(4), "CT")
    assert max(sent) > image.nbytes
    sent.clear()
    assert client.set_image(image.copy(), np.eye(4), "CT") == first
    client.load("work", "cpu")
    again = client.set_image(image, np.eye(4), "CT")
    assert again.slice_count == 40
    assert max(sent) < 1000
    image[21] = 1
    client.set_image(image, np.eye(4), "CT")
    assert max(sent) > image.nbytes


def test_an_image_that_the_engine_refused_is_sent_again(client: WorkerClient) -> None:
    prepared(client, "work")
    client.load("refuse_image", "cpu")
    with pytest.raises(RemoteError, match="uniform") as refusal:
        client.set_image(phantom(), np.eye(4), "CT")
    assert refusal.value.code == "input"
    client.load("work", "cpu")
    assert client.set_image(phantom(), np.eye(4), "CT").slice_count == 3


@pytest.mark.parametrize(
    "image", [np.zeros((3, 4)), np.zeros((2, 2, 2), bool), np.zeros((2, 2, 2), complex), np.full((2, 2, 2), None)]
)
def test_what_is_no_volume_is_refused_before_it_is_sent(client: WorkerClient, image: np.ndarray) -> None:
    client.load("work", "cpu")
    with pytest.raises(InputError, match="three axes"):
        client.set_image(image, np.eye(4))
    client.status()


def test_an_image_above_the_workers_limit_is_refused_before_it_is_sent() -> None:
    with WorkerClient(scripted_command("max_payload=100000")) as client:
        client.load("work", "cpu")
        with pytest.raises(InputError, match="--max-payload"):
            client.set_image(np.zeros((10, 100, 100), np.int16), np.eye(4))


@pytest.mark.parametrize(("mode", "code"), [("crash", "internal"), ("memory", "memory"), ("unfinished", "internal")])
def test_an_engine_that_fails_is_a_remote_error_and_the_client_goes_on(client: WorkerClient, mode: str, code: str) -> None:
    prepared(client, mode)
    stream = client.propose(LIVER)
    with pytest.raises(RemoteError) as failure:
        list(stream)
    assert failure.value.code == code
    assert client.state is ClientState.READY
    prepared(client, "work")
    assert isinstance(list(client.propose(LIVER))[-1], DoneEvent)


def test_cancel_from_another_thread(client: WorkerClient) -> None:
    prepared(client, "slow")
    assert not client.cancel()
    stream = client.propose(LIVER)
    next(stream)
    threading.Timer(0.2, client.cancel).start()
    with pytest.raises(CancelledError):
        list(stream)
    assert client.state is ClientState.READY
    assert list(stream) == []
    prepared(client, "work")


def test_loading_can_be_cancelled_from_its_own_progress(client: WorkerClient) -> None:
    with pytest.raises(CancelledError):
        client.load("slow_load", "cpu", lambda event: client.cancel() and None)
    assert client.load("work").model_id == "scripted"


def test_a_second_request_while_one_runs_is_refused_here_and_status_is_not(client: WorkerClient) -> None:
    prepared(client, "slow")
    with client.propose(LIVER) as stream:
        next(stream)
        for attempt in (lambda: client.propose(LIVER), lambda: client.load("work")):
            with pytest.raises(WorkerStateError, match="busy"):
                attempt()
        assert client.status().state == "working"
    assert client.state is ClientState.READY


def test_leaving_a_stream_early_frees_the_worker(client: WorkerClient) -> None:
    prepared(client, "slow")
    with client.propose(LIVER) as stream:
        for _ in stream:
            break
    prepared(client, "work")
    assert isinstance(list(client.propose(LIVER))[-1], DoneEvent)


@pytest.mark.slow
def test_status_is_answered_while_nobody_reads_a_flood(client: WorkerClient) -> None:
    """More events wait than the client holds; the answer to another question still gets through."""
    prepared(client, "flood")
    stream = client.propose(ProposeRequest(("liver",), seed=400))
    assert client.status(60).running is not None
    events = list(stream)
    assert [event.slice_index for event in events if isinstance(event, SliceEvent)] == list(range(400))


def test_a_callback_that_fails_ends_the_load_and_not_the_client(client: WorkerClient) -> None:
    def fail(event: ProgressEvent) -> None:
        raise RuntimeError("widget is gone")

    with pytest.raises(RuntimeError, match="widget"):
        client.load("work", "cpu", fail)
    client.status()


def test_requests_out_of_turn_are_refused() -> None:
    client = WorkerClient(scripted_command())
    with pytest.raises(WorkerStateError, match="start"):
        client.status()
    client.close()
    with pytest.raises(WorkerStateError, match="new"):
        client.start()
