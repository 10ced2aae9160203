"""Each way in which a worker can fail is an error of its own, in bounded time, and close never hangs."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import threading
import time
from pathlib import Path

import numpy as np
import psutil
import pytest

from progidiff.errors import CancelledError, ProGiDiffError
from progidiff.wire.client import ClientState, WorkerClient, WorkerFailedError, WorkerStateError
from progidiff.wire.messages import ProposeRequest

from .test_worker_lifetime import gone, posix_only
from .worker_pipe import environment, phantom, scripted_command

LIVER = ProposeRequest(("liver",), proposals=2)


def python(code: str) -> list[str]:
    return [sys.executable, "-c", code]


def pid_of(client: WorkerClient) -> int:
    assert client.hello is not None
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
    assert family is not None
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
    code = "import sys; sys.stderr.write('x' * 5_000_000 + '\\n'); sys.exit(3)"
    with pytest.raises(WorkerFailedError) as failure:
        WorkerClient(python(code)).start()
    assert failure.value.failure.exit_code == 3
    assert len(failure.value.failure.details) < 300_000


def test_environment_variables_reach_the_worker() -> None:
    code = "import os, sys; sys.exit(int(os.environ['PGD_TEST_CODE']))"
    with pytest.raises(WorkerFailedError) as failure:
        WorkerClient(python(code), env={"PGD_TEST_CODE": "77"}).start()
    assert failure.value.failure.exit_code == 77


def test_a_client_starts_once() -> None:
    with WorkerClient(scripted_command()) as client, pytest.raises(WorkerStateError, match="once"):
        client.start()
