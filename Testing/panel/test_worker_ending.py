"""The end of a worker on purpose: nothing is left, whatever it was doing; and what its log keeps."""

from __future__ import annotations

import dataclasses
import os
import shlex
import sys

import numpy as np
import psutil
import pytest

from progidiff.wire.conversation import MOST_LINES
from ProGiDiffSlicerLib.worker.client import WorkerState
from ProGiDiffSlicerLib.worker.command import WorkerCommand
from ProGiDiffSlicerLib.worker.process import LONGEST_LINE, LogLines

from .worker_support import (
    LIVER,
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
    reach_proposing,
    reach_starting,
    scripted,
    worker,
)

pytestmark = pytest.mark.usefixtures("app")
posix_only = pytest.mark.skipif(os.name == "nt", reason="needs a POSIX shell and signals")


def objects_of(client: Client) -> list[str]:
    return sorted(child.className() for child in client._parent.children())


@pytest.mark.slow
@pytest.mark.parametrize("mode", ["work", "deaf", "slow_load"])
def test_stop_leaves_no_process_timer_or_connection(mode: str, spin: Spin) -> None:
    with worker(stop_grace_s=1.0) as client:
        own = objects_of(client)
        run = client.run(mode)
        spin(lambda: run.done or bool(run.events))
        pid = client.pid
        assert len(objects_of(client)) > len(own)
        client.stop()
        assert client.state is WorkerState.STOPPED
        assert run.done
        assert (client.hello, client.loaded, client.image) == (None, None, None)
        spin(lambda: gone(pid) and not client._leaving and objects_of(client) == own)
        assert client.failures == []


def test_stop_while_the_process_starts(spin: Spin) -> None:
    with worker(python("import time; time.sleep(600)"), stop_grace_s=0.2) as client:
        run, pid = reach_starting(client, spin), only_child()
        client.stop()
        assert [how for _, how in run.outcomes] == ["cancelled"] * 3
        spin(lambda: gone(pid) and not client._leaving)
        assert client.failures == []


def test_stop_before_anything_was_started() -> None:
    with worker() as client:
        run = client.run()
        client.stop()
        assert [how for _, how in run.outcomes] == ["cancelled"] * 3
        assert children() == []


def test_stop_that_waits_ends_a_worker_that_hangs(spin: Spin) -> None:
    with worker(stop_grace_s=0.5) as client:
        reach_proposing(client, spin)
        pid = only_child()
        psutil.Process(pid).suspend()
        client.stop(wait=True)
        assert gone(pid)


@pytest.mark.slow
def test_restart_does_not_wait_for_the_old_worker(spin: Spin) -> None:
    with worker(stop_grace_s=2.0) as client:
        run, pid = reach_cancelling(client, spin), only_child()
        client.restart()
        assert run.outcomes[-1] == ("propose", "cancelled")
        assert client.state is WorkerState.STARTING
        again = finished(client.run(), spin)
        assert [how for _, how in again.outcomes] == ["succeeded"] * 3
        assert client.pid != pid
        spin(lambda: gone(pid))
        assert client.failures == []
        assert client.state is WorkerState.READY


@posix_only
def test_a_worker_behind_a_shell_is_ended_with_all_its_processes(spin: Spin) -> None:
    words = " ".join(map(shlex.quote, (sys.executable, *scripted().arguments)))
    command = WorkerCommand("/bin/sh", ("-c", f"cat | {words} | cat"), scripted().environment)
    with worker(command, stop_grace_s=0.3) as client:
        finished(client.run(), spin)
        everybody = children()
        assert len(everybody) == 4
        psutil.Process(client.pid).suspend()
        client.stop()
        spin(lambda: all(gone(member.pid) for member in everybody))


def test_the_log_is_bounded_and_holds_no_pixels_names_or_prompts(spin: Spin) -> None:
    volume = np.full((4, 64, 64), 0x4142, np.int16)  # as text: BABABA...
    with worker() as client:
        runs = [client.run("work", volume) for _ in range(3)]
        refused = Record(client.propose(dataclasses.replace(LIVER, targets=("DOE^JANE",))))
        spin(lambda: refused.done and runs[-1].done)
        log = client.log_tail()
        assert "4x64x64" in log
        assert "BABA" not in log
        assert "DOE" not in log
        assert len(log.splitlines()) <= MOST_LINES


@pytest.mark.slow
def test_a_flood_of_log_lines_stays_bounded(spin: Spin) -> None:
    code = (
        "import sys\nfor n in range(20_000): print('line', n, file=sys.stderr)\n"
        "sys.stderr.write('x' * 5_000_000)\nsys.exit(3)"
    )
    with worker(python(code)) as client:
        failure = failed_run(client, spin).failure
        assert "exit code 3" in failure.message
        lines = client.log_tail().splitlines()
        assert len(lines) == MOST_LINES
        assert lines[-1] == "x" * LONGEST_LINE
        assert lines[-2] == "line 19999"


def test_log_lines_are_cut_from_bytes_as_they_come() -> None:
    lines = LogLines()
    text = "Größe\nzweite Zeile\r\n" + "y" * 3 * LONGEST_LINE + "\nend"
    got: list[str] = []
    for byte in text.encode():
        got += lines.feed(bytes([byte]))
    got += lines.finish()
    assert got == ["Größe", "zweite Zeile", "y" * LONGEST_LINE, "end"]
    assert lines.finish() == []
    assert lines.feed(b"\xff\xfe\n") == ["\ufffd\ufffd"]
