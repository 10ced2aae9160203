"""Each way in which a worker can fail is told apart, ends every call, and one click starts another worker."""

from __future__ import annotations

import os
import time
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path

import psutil
import pytest
import qt

from progidiff.errors import InputError
from progidiff.wire.client import ClientState, WorkerFailedError
from progidiff.wire.client import WorkerClient as BlockingClient
from progidiff.wire.conversation import WorkerFailure
from ProGiDiffSlicerLib.worker.client import WorkerState
from ProGiDiffSlicerLib.worker.command import WorkerCommand
from ProGiDiffSlicerLib.worker.process import PatientTimer

from .worker_support import (
    Client,
    Record,
    Spin,
    children,
    failed_run,
    finished,
    gone,
    only_child,
    python,
    reach_cancelling,
    reach_loading,
    reach_proposing,
    reach_sending,
    reach_starting,
    run_python,
    scripted,
    worker,
)

pytestmark = pytest.mark.usefixtures("app")

# A worker that says hello and answers the next request with whatever the test wants.
HELLO_THEN = """
import sys, time
from progidiff.wire.frames import FrameDecoder, encode_frame
from progidiff.wire.codec import frame_to_request, to_frame
from progidiff.wire.messages import (HelloReply)
def say(reply, number):
    frame = to_frame(reply, number)
    sys.stdout.buffer.write(b"".join(map(bytes, encode_frame(frame.header, frame.arrays))))
    sys.stdout.flush()
decoder = FrameDecoder()
while True:
    for frame in decoder.feed(sys.stdin.buffer.read1(65536)):
        number, request = frame_to_request(frame)
        if type(request).__name__ == "Hello":
            say(HelloReply("0", 1, "3", 1 << 40, 1.0), number)
        else:
            {}
            sys.stdout.flush()
            time.sleep(600)
"""


def after_hello(answer: str) -> WorkerCommand:
    return python(HELLO_THEN.replace("{}", answer))


def by_blocking_pipes(command: WorkerCommand, spin: Spin, start_timeout_s: float = 60.0) -> WorkerFailure:
    """Why a run on a worker of this command fails, with the client of the command line."""
    words = [command.program, *command.arguments]
    client = BlockingClient(words, env=command.environment, start_timeout=start_timeout_s)

    def run() -> None:
        client.start()
        client.load("work", "cpu")

    with pytest.raises(WorkerFailedError) as error:
        run()
    assert client.state is ClientState.FAILED
    assert error.value.failure.message in str(error.value)
    client.close()
    return error.value.failure


def by_qprocess(command: WorkerCommand, spin: Spin, start_timeout_s: float = 60.0) -> WorkerFailure:
    """The same with the module's own."""
    with worker(command, start_timeout_s=start_timeout_s) as client:
        failure = failed_run(client, spin).failure
        assert client.log_tail().endswith(failure.details)
        return failure


@pytest.fixture(params=[by_blocking_pipes, by_qprocess])
def fails(request: pytest.FixtureRequest, spin: Spin) -> Iterator[Callable[..., WorkerFailure]]:
    """Runs a command as the worker by either driver; returns why that fails, and no process is left."""
    before = {child.pid for child in children()}
    yield partial(request.param, spin=spin)
    spin(lambda: {child.pid for child in children()} <= before)


@pytest.mark.parametrize("program", ["no-such-program-anywhere", str(Path(__file__).parent), ""])
def test_a_program_that_cannot_be_run(program: str, fails: Callable[..., WorkerFailure]) -> None:
    failure = fails(WorkerCommand(program, (), dict(os.environ)))
    assert failure.kind == "start"
    assert f'could not be started with "{program}"' in failure.message
    assert "check the worker command" in failure.message


def test_the_module_says_where_the_command_is_chosen(spin: Spin) -> None:
    failure = by_qprocess(WorkerCommand("no-such-program-anywhere", (), dict(os.environ)), spin)
    assert failure.message.endswith("check the worker command in Setup.")


def test_a_command_that_is_none_says_so(spin: Spin) -> None:
    def nonsense() -> WorkerCommand:
        raise InputError("The worker command is empty; type one.")

    with worker() as client:
        client._command = nonsense
        failure = failed_run(client, spin).failure
        assert (failure.kind, failure.message) == ("start", "The worker command is empty; type one.")


HELLO_OF_ANOTHER_VERSION = (
    "import json, struct, sys, time\n"
    "h = json.dumps({'type': 'hello', 'v': 1, 'id': 1}).encode()\n"
    "sys.stdout.buffer.write(b'PGD1' + struct.pack('<IQ', len(h), 0) + h)\n"
    "sys.stdout.flush(); time.sleep(600)"
)
SAYS = "import sys, time; sys.stdout.write({!r}); sys.stdout.flush(); time.sleep(600)"
# What runs, and the kind, a part of the message and the details of its failure.
FAILURES: dict[str, tuple[WorkerCommand, str, str, str]] = {
    "ends at once": (
        python("import sys; print('the licence has expired', file=sys.stderr); sys.exit(9)"),
        "start",
        "did not start (exit code 9)",
        "the licence has expired",
    ),
    "no engine": (
        run_python("-m", "progidiff_that_is_not_there", "worker"),
        "start",
        'no package "progidiff_that_is_not_there"; install it',
        "No module named",
    ),
    "end in the middle of hello": (python("import sys; sys.stdout.write('PGD')"), "start", "exit code 0", ""),
    "another version": (python(HELLO_OF_ANOTHER_VERSION), "protocol", "another version of the protocol", ""),
    "greeting": (python(SAYS.format("Welcome to gpu-host!\n")), "protocol", "login script", ""),
    "no lengths": (python(SAYS.format("PGD1 and then no lengths that could be right")), "protocol", "login script", ""),
    "text after hello": (after_hello("sys.stdout.write('Killed')"), "protocol", "does not hold messages", ""),
    "lengths after hello": (
        after_hello("sys.stdout.buffer.write(b'PGD1' + bytes([255] * 12))"),
        "protocol",
        "longer than the limit",
        "",
    ),
    "wrong reply": (
        after_hello("from progidiff.wire.messages import Bye; say(Bye(), number)"),
        "protocol",
        "sent a Bye message where a Loaded was due",
        "",
    ),
    "unread request": (
        after_hello("from progidiff.wire.messages import ErrorReply; say(ErrorReply('frame', 'It was cut.'), None)"),
        "protocol",
        "could not read a request",
        "",
    ),
}


@pytest.mark.slow
@pytest.mark.parametrize("name", FAILURES)
def test_each_failure_is_told_apart_by_either_driver(name: str, fails: Callable[..., WorkerFailure]) -> None:
    command, kind, says, details = FAILURES[name]
    failure = fails(command)
    assert failure.kind == kind
    assert says in failure.message
    assert details in failure.details
    assert failure.message.endswith(".")
    if kind == "protocol":
        assert "install the same version" in failure.message.lower()
        assert "Welcome" not in failure.message + failure.details


@pytest.mark.slow
def test_a_program_that_never_answers_is_ended(fails: Callable[..., WorkerFailure]) -> None:
    failure = fails(python("import time; time.sleep(600)"), start_timeout_s=1.5)
    assert failure.kind == "start"
    assert "did not answer within 1.5 s" in failure.message


def reach_idle(client: Client, spin: Spin) -> Record:
    record = finished(client.run(), spin)
    return record


KILLED = {
    "starting": (reach_starting, "start", ["failed"] * 3),
    "loading": (reach_loading, "exit", ["failed"] * 3),
    "sending": (reach_sending, "exit", ["failed"] * 2),
    "proposing": (reach_proposing, "exit", ["succeeded", "succeeded", "failed"]),
    "cancelling": (reach_cancelling, "exit", ["succeeded", "succeeded", "cancelled"]),
    "idle": (reach_idle, "exit", ["succeeded"] * 3),
}


@pytest.mark.slow
@pytest.mark.parametrize("phase", KILLED)
def test_a_worker_that_is_killed_at_each_phase(phase: str, spin: Spin) -> None:
    reach, kind, outcomes = KILLED[phase]
    # Python's start is quick: for the time until hello there is a program that never says it.
    with worker(python("import time; time.sleep(600)") if phase == "starting" else scripted()) as client:
        record = reach(client, spin)
        psutil.Process(only_child()).kill()
        spin(lambda: client.state is WorkerState.CRASHED and record.done)
        (failure,) = client.failures
        assert failure.kind == kind
        if os.name != "nt":
            assert "killed, perhaps because the computer ran out of memory" in failure.message
        assert [how for _, how in record.outcomes] == outcomes
        assert (client.hello, client.loaded, client.image) == (None, None, None)
        if phase != "starting":
            assert "start it again" in failure.message
            again = finished(client.run(), spin)
            assert [how for _, how in again.outcomes] == ["succeeded"] * 3
            assert client.failure is None


@pytest.mark.slow
@pytest.mark.parametrize("reach", [reach_proposing, reach_sending])
def test_a_worker_that_falls_silent_is_ended(reach: Callable[[Client, Spin], Record], spin: Spin) -> None:
    with worker(scripted("heartbeat_s=0.2"), heartbeat_timeout_s=2.0) as client:
        record, pid = reach(client, spin), only_child()
        psutil.Process(pid).suspend()
        spin(lambda: record.done)
        assert record.failure.kind == "lost"
        assert "no sign of life for 2 s" in record.failure.message
        assert client.failures == [record.failure]
        spin(lambda: gone(pid))


@pytest.mark.slow
@pytest.mark.parametrize(("heartbeat_s", "timeout_s"), [(0.1, 1.5), (2, 0.5)], ids=["computes for long", "slow heartbeat"])
def test_a_worker_that_says_little_is_not_lost(heartbeat_s: float, timeout_s: float, spin: Spin) -> None:
    # It holds the interpreter lock for stretches and says nothing but its heartbeats for two seconds.
    with worker(scripted(f"heartbeat_s={heartbeat_s}"), heartbeat_timeout_s=timeout_s) as client:
        run = finished(client.run("hog"), spin)
        assert run.outcomes[-1] == ("propose", "succeeded")


def test_time_in_which_this_process_stood_still_does_not_count(spin: Spin) -> None:
    with worker(scripted("heartbeat_s=0.2"), heartbeat_timeout_s=1.0) as client:
        record = reach_proposing(client, spin)
        heard = len(record.events)
        time.sleep(1.5)
        spin(lambda: len(record.events) > heard + 20)
        assert client.state is WorkerState.BUSY
        assert client.failures == []


def test_patience_ends_once_and_only_without_signs_of_life(spin: Spin) -> None:
    parent = qt.QObject()
    log: list[str] = []
    kept = PatientTimer(parent, lambda: log.append("kept"))
    lost = PatientTimer(parent, lambda: log.append("lost"))
    kept.start(0.2)
    lost.start(0.2)

    def reset() -> bool:
        kept.reset()
        return "lost" in log

    spin(reset)
    end = time.monotonic() + 0.5
    spin(lambda: reset() and time.monotonic() > end)
    assert log == ["lost"]
    kept.release()
    lost.release()


@pytest.mark.slow
def test_a_worker_that_does_not_stop_is_ended_and_its_call_is_cancelled(spin: Spin) -> None:
    with worker(cancel_timeout_s=1.0) as client:
        record, pid = reach_cancelling(client, spin), only_child()
        again = client.run()
        spin(lambda: record.done and again.done)
        assert record.outcomes[-1] == ("propose", "cancelled")
        (failure,) = client.failures
        assert failure.kind == "lost"
        assert "did not stop within 1 s" in failure.message
        # What was asked meanwhile was meant for that worker; it says so instead of running on a new one without its model.
        assert again.failure is failure
        spin(lambda: gone(pid))
        third = finished(client.run(), spin)
        assert [how for _, how in third.outcomes] == ["succeeded"] * 3
