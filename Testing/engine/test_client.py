"""The client and a worker process with a scripted engine; each way to fail is an error of its own, and close never hangs."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import psutil
import pytest

from progidiff.errors import CancelledError, InputError, ProGiDiffError
from progidiff.wire.client import ClientState, RemoteError, WorkerClient, WorkerFailedError, WorkerStateError
from progidiff.wire.messages import DoneEvent, ProgressEvent, ProposeRequest, RankingEvent, SliceEvent

from .test_worker import gone, posix_only
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
    status = client.status()
    assert (status.state, status.model_id) == ("ready", "scripted")
    assert status.image_key is not None
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


def test_an_engine_that_fails_is_a_remote_error_and_the_client_goes_on(client: WorkerClient) -> None:
    prepared(client, "crash")
    with pytest.raises(RemoteError) as failure:
        list(client.propose(LIVER))
    assert failure.value.code == "internal"
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
    assert client.status().state == "empty"
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


def test_requests_out_of_turn_are_refused(client: WorkerClient) -> None:
    with pytest.raises(WorkerStateError, match="once"):
        client.start()
    client = WorkerClient(scripted_command())
    with pytest.raises(WorkerStateError, match="start"):
        client.status()
    client.close()
    with pytest.raises(WorkerStateError, match="new"):
        client.start()


def pid_of(client: WorkerClient) -> int:
    return client.hello.pid


def started(mode: str, **options: float) -> WorkerClient:
    client = WorkerClient(scripted_command(), **options)  # type: ignore[arg-type]
    client.start()
    client.load(mode, "cpu")
    client.set_image(phantom(), np.eye(4), "CT")
    return client


def test_a_worker_that_dies_at_work_says_its_code_and_last_words() -> None:
    client = started("die")
    with pytest.raises(WorkerFailedError, match="exit code 42") as failure:
        list(client.propose(LIVER))
    assert failure.value.failure.exit_code == 42
    assert failure.value.failure.details.endswith("the last line of the log")
    assert client.state is ClientState.FAILED
    with pytest.raises(WorkerFailedError):
        client.status()
    client.close()


@posix_only
def test_a_worker_that_is_killed_says_so() -> None:
    client = started("slow")
    stream = client.propose(LIVER)
    next(stream)
    os.kill(pid_of(client), signal.SIGKILL)
    with pytest.raises(WorkerFailedError, match="memory"):
        list(stream)
    client.close()


@pytest.mark.slow
@posix_only
def test_a_worker_that_falls_silent_is_ended() -> None:
    client = started("slow", heartbeat_timeout=3.0)
    stream = client.propose(LIVER)
    next(stream)
    pid = pid_of(client)
    os.kill(pid, signal.SIGSTOP)
    with pytest.raises(WorkerFailedError, match="no sign of life"):
        list(stream)
    assert gone(pid)
    assert client.state is ClientState.FAILED
    client.close()


@pytest.mark.slow
@posix_only
def test_a_worker_that_does_not_read_cannot_hang_the_sending_of_an_image() -> None:
    client = started("work", heartbeat_timeout=3.0)
    pid = pid_of(client)
    os.kill(pid, signal.SIGSTOP)
    with pytest.raises(WorkerFailedError):
        client.set_image(np.zeros((64, 512, 512), np.int16), np.eye(4))
    assert gone(pid)
    client.close()


@pytest.mark.slow
def test_a_stream_whose_engine_does_not_listen_is_ended_with_its_worker() -> None:
    client = started("deaf")
    stream = client.propose(LIVER)
    next(stream)
    stream.close(timeout=1.0)
    assert gone(pid_of(client))
    with pytest.raises(WorkerFailedError, match="did not stop"):
        client.status()
    client.close()


@pytest.mark.parametrize("mode", ["work", "slow", "deaf"])
def test_close_ends_the_worker_whatever_it_does(mode: str) -> None:
    client = started(mode)
    if mode != "work":
        next(client.propose(LIVER))
    client.close(timeout=20)
    assert gone(pid_of(client), 1)
    assert client.state is ClientState.CLOSED


@pytest.mark.slow
@posix_only
def test_close_ends_a_stopped_worker_behind_a_shell_with_all_its_processes() -> None:
    worker = " ".join(f"'{part}'" for part in scripted_command())
    client = WorkerClient(["sh", "-c", f"cat | {worker} | cat"])
    client.start()
    pid = pid_of(client)
    family = psutil.Process(pid).parent()
    everybody = [family.pid, *(child.pid for child in family.children(recursive=True))]
    assert len(everybody) == 4
    os.kill(pid, signal.SIGSTOP)
    client.close(timeout=1.0)
    assert all(gone(member, 5) for member in everybody)


def test_close_from_another_thread_wakes_whoever_waits() -> None:
    client = started("slow")
    stream = client.propose(LIVER)
    seen: list[BaseException] = []

    def consume() -> None:
        try:
            list(stream)
        except ProGiDiffError as error:
            seen.append(error)

    consumer = threading.Thread(target=consume)
    consumer.start()
    time.sleep(0.2)
    client.close()
    consumer.join(30)
    assert not consumer.is_alive()
    # Either the worker's last word about the request came first, or its end did.
    assert isinstance(seen[0], CancelledError | WorkerStateError | WorkerFailedError)


def test_a_client_that_is_forgotten_takes_its_worker_along(tmp_path: Path) -> None:
    script = tmp_path / "forgetful.py"
    script.write_text(
        "import sys\nfrom progidiff.wire.client import WorkerClient\n"
        "client = WorkerClient(sys.argv[1:])\nprint(client.start().pid, flush=True)\n",
        encoding="utf-8",
    )
    run = subprocess.run(
        [sys.executable, str(script), *scripted_command()], capture_output=True, env=environment(), check=True
    )
    assert gone(int(run.stdout))


def test_the_log_is_handed_on_and_a_listener_that_fails_does_no_harm() -> None:
    lines: list[str] = []

    def listen(line: str) -> None:
        lines.append(line)
        if len(lines) == 2:
            raise RuntimeError("widget is gone")

    client = WorkerClient(scripted_command(), on_log=listen)
    client.start()
    client.load("work", "cpu")
    client.set_image(phantom(), np.eye(4))
    list(client.propose(LIVER))
    client.close()
    assert len(lines) == 2
    assert "request" in lines[0]


def test_a_worker_that_floods_its_log_does_not_block() -> None:
    """Its exit code shows that it has the environment that it was given."""
    code = "import os, sys; sys.stderr.write('x' * 5_000_000 + '\\n'); sys.exit(int(os.environ['PGD_TEST_CODE']))"
    with pytest.raises(WorkerFailedError) as failure:
        WorkerClient([sys.executable, "-c", code], env={"PGD_TEST_CODE": "77"}).start()
    assert failure.value.failure.exit_code == 77
    assert len(failure.value.failure.details) < 300_000
