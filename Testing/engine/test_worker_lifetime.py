"""How the worker process begins and ends: through other processes, with its parent, and never late."""

from __future__ import annotations

import json
import os
import shlex
import subprocess
import sys
import time
from pathlib import Path

import psutil
import pytest

from progidiff.wire.messages import (
    Bye,
    Cancelled,
    DoneEvent,
    Hello,
    HelloReply,
    ProgressEvent,
    ProposeRequest,
    Shutdown,
    Status,
    StatusReply,
)

from .worker_pipe import PATIENCE_S, Peer, environment, request_bytes, scripted_command

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
        peer.send(Hello(), 1)
        assert isinstance(peer.final(1), HelloReply)
        peer.send(Shutdown(), 2)
        assert peer.final(2) == Bye()
        assert peer.wait() == 0
        line = next(line for line in peer.log.decode().splitlines() if line.startswith("HEAVY"))
        assert json.loads(line.removeprefix("HEAVY")) == []


def test_the_worker_is_started_by_the_module_and_ends_when_asked() -> None:
    with Peer(WORKER) as peer:
        peer.send(Hello(), 1)
        hello = peer.final(1)
        assert isinstance(hello, HelloReply)
        peer.send(Shutdown(), 2)
        assert peer.final(2) == Bye()
        assert peer.wait() == 0


@posix_only
def test_it_works_through_other_processes() -> None:
    """As over ssh: neither pipe is the worker's own."""
    worker = " ".join(map(shlex.quote, scripted_command()))
    with Peer(["sh", "-c", f"cat | {worker} | cat"]) as peer:
        peer.prepare("work")
        peer.send(SLOW, 1)
        assert isinstance(peer.final(1), DoneEvent)
        peer.close_input()
        assert peer.wait() == 0


@pytest.mark.parametrize("arguments", [["--max-payload", "0"], ["--heartbeat", "nan"], ["--no-such"], ["x"]])
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


def test_shutdown_cancels_what_runs() -> None:
    with Peer(scripted_command()) as peer:
        peer.prepare("slow")
        peer.send(SLOW, 1)
        peer.reply(1, ProgressEvent)
        peer.send(Shutdown(), 2)
        assert peer.final(1) == Cancelled()
        assert peer.final(2) == Bye()
        assert peer.wait() == 0


@pytest.mark.parametrize("mode", ["slow", "deaf"])
def test_the_end_of_the_requests_ends_even_an_engine_that_does_not_listen(mode: str) -> None:
    with Peer(scripted_command()) as peer:
        peer.prepare(mode)
        peer.send(SLOW, 1)
        peer.reply(1, ProgressEvent)
        peer.close_input()
        assert peer.wait(30) == 0


def test_nobody_reading_ends_the_worker() -> None:
    with Peer(scripted_command("heartbeat_s=0.05")) as peer:
        peer.send(Status(), 1)
        assert isinstance(peer.final(1), StatusReply)
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
        assert parent.stdin is not None
        assert parent.stdout is not None
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
