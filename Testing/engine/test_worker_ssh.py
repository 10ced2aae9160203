"""The command line with its worker behind a real ssh connection: every way in which that fails is one sentence."""

from __future__ import annotations

import os
import shlex
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

import pytest
from typer.testing import CliRunner

from progidiff.cli.app import app
from progidiff.wire.client import WorkerClient, WorkerFailedError
from progidiff.wire.conversation import meaning_of_end, unattended

from ..sshd import ENGINE, SshServer
from .test_cli_propose import image_file, propose, segments_of

LOST = "The connection to the other computer was lost"


def over_ssh(image: Path, out: Path, command: list[str]) -> subprocess.Popen[str]:
    """``progidiff propose`` as a process of its own, which can be interrupted."""
    words = [sys.executable, "-m", "progidiff", "propose", str(image), "--out", str(out), "--prompt", "liver; spleen"]
    environment = {**os.environ, "PYTHONPATH": str(ENGINE), "OMP_NUM_THREADS": "1"}
    return subprocess.Popen(
        [*words, "--worker-command", shlex.join(command)], env=environment, stderr=subprocess.PIPE, text=True
    )


def wait_for(condition: Callable[[], bool], seconds: float = 60.0) -> None:
    end = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < end, "it never happened"
        time.sleep(0.05)


def earlier_result(image: Path, out: Path) -> dict[str, bytes]:
    ran = propose(image, out, "--prompt", "liver", "--proposals", "2")
    assert ran.exit_code == 0, ran.output
    return {file.name: file.read_bytes() for file in out.iterdir()}


@pytest.mark.slow
def test_proposals_over_ssh_are_those_of_this_computer(ssh_server: SshServer, tmp_path: Path, asked: Path) -> None:
    image = image_file(tmp_path / "ct.nii.gz")
    here = propose(image, tmp_path / "here", "--prompt", "liver; spleen", "--proposals", "4")
    assert here.exit_code == 0, here.output
    arguments = ["propose", str(image), "--out", str(tmp_path / "there"), "--prompt", "liver; spleen", "--proposals", "4"]
    there = CliRunner().invoke(app, [*arguments, "--worker-command", shlex.join(ssh_server.organs())])
    assert there.exit_code == 0, there.output
    first, second = (segments_of(tmp_path / name / "proposals.seg.nrrd") for name in ("here", "there"))
    assert list(first) == list(second)
    assert all((first[name][0] == second[name][0]).all() for name in first)
    wait_for(lambda: not ssh_server.workers())
    assert not asked.exists()


@pytest.mark.slow
def test_ctrl_c_ends_the_worker_over_there_and_writes_nothing(ssh_server: SshServer, tmp_path: Path) -> None:
    image, note = image_file(tmp_path / "ct.nii.gz"), tmp_path / "note"
    before = earlier_result(image, tmp_path / "out")
    with over_ssh(image, tmp_path / "out", ssh_server.organs({"pause": 0.5, "note": str(note)})) as run:
        wait_for(note.exists)
        run.send_signal(signal.SIGINT)
        assert run.wait(30) == 130
    wait_for(lambda: not ssh_server.workers())
    assert note.read_text().strip() == "cancelled"
    assert {file.name: file.read_bytes() for file in (tmp_path / "out").iterdir()} == before


@pytest.mark.slow
def test_a_connection_that_is_cut_is_one_sentence_and_loses_nothing(ssh_server: SshServer, tmp_path: Path) -> None:
    image, note = image_file(tmp_path / "ct.nii.gz"), tmp_path / "note"
    before = earlier_result(image, tmp_path / "out")
    with over_ssh(image, tmp_path / "out", ssh_server.organs({"pause": 0.5, "note": str(note)})) as run:
        wait_for(note.exists)
        ssh_server.cut()
        _, said = run.communicate(timeout=30)
    assert run.returncode == 2
    assert LOST in said
    assert "Traceback" not in said
    wait_for(lambda: not ssh_server.workers())
    assert {file.name: file.read_bytes() for file in (tmp_path / "out").iterdir()} == before


def test_a_connection_that_falls_silent_is_noticed(ssh_server: SshServer) -> None:
    with WorkerClient(ssh_server.organs({"pause": 30}), heartbeat_timeout=3.0) as client:
        stopped = ssh_server.sessions()
        for process in stopped:
            process.suspend()
        try:
            with pytest.raises(WorkerFailedError, match="gave no sign of life for 3 s"):
                client.load()
        finally:
            for process in stopped:
                process.resume()
    wait_for(lambda: not ssh_server.workers())


NOWHERE = "/opt/nowhere/python"
FAILURES: dict[str, tuple[Callable[[SshServer], list[str]], str]] = {
    "wrong host key": (lambda s: s.organs(known="other_host"), "shows another host key than the one that is known"),
    "unknown host key": (lambda s: s.organs(known=""), "The host key of the other computer is not known here"),
    "password": (lambda s: s.organs(user_key="stranger"), "lets nobody in without a password"),
    "unknown host": (lambda s: s.organs(host="no-such-host.invalid"), "There is no computer of the name"),
    "no server": (lambda s: s.organs(port=1), "The other computer cannot be reached"),
    "no Python": (lambda s: s.ssh(NOWHERE, "-m", "progidiff", "worker"), "the worker command names was not found"),
    "no package": (lambda s: s.ssh(sys.executable, "-Im", "progidiff_"), 'no package "progidiff_"; install it there'),
}


@pytest.mark.parametrize("name", FAILURES)
def test_what_fails_before_the_worker_runs(name: str, ssh_server: SshServer, tmp_path: Path, asked: Path) -> None:
    command, sentence = FAILURES[name]
    arguments = ["propose", str(image_file(tmp_path / "ct.nii.gz")), "--out", str(tmp_path / "out"), "--prompt", "liver"]
    began = time.monotonic()
    ran = CliRunner().invoke(app, [*arguments, "--worker-command", shlex.join(command(ssh_server))])
    assert time.monotonic() - began < 30, "nothing was waited for"
    assert ran.exit_code == 2
    assert sentence in ran.stderr.splitlines()[0]
    assert not asked.exists()
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize(
    ("command", "runs"),
    [
        (["ssh", "gpu", "python"], ["ssh", "-o", "BatchMode=yes", "gpu", "python"]),
        (["/usr/bin/ssh", "gpu"], ["/usr/bin/ssh", "-o", "BatchMode=yes", "gpu"]),
        (
            [r"C:\Windows\System32\OpenSSH\SSH.EXE", "gpu"],
            [r"C:\Windows\System32\OpenSSH\SSH.EXE", "-o", "BatchMode=yes", "gpu"],
        ),
        (["ssh", "-obatchmode=no", "gpu"], ["ssh", "-obatchmode=no", "gpu"]),
        (["python", "-m", "progidiff", "worker"], ["python", "-m", "progidiff", "worker"]),
        (["./ssh-wrapper", "gpu"], ["./ssh-wrapper", "gpu"]),
    ],
)
def test_ssh_asks_nobody(command: list[str], runs: list[str]) -> None:
    assert unattended(command) == runs


@pytest.mark.parametrize(
    ("code", "log", "sentence"),
    [
        (255, "No ED25519 host key is known for gpu and you have requested strict checking.", "is not known here"),
        (255, "@ WARNING: REMOTE HOST IDENTIFICATION HAS CHANGED! @\nHost key verification failed.", "another host key"),
        (255, "anna@gpu: Permission denied (publickey,password).", "lets nobody in without a password"),
        (255, "ssh: Could not resolve hostname gpu: Name or service not known", "no computer of the name"),
        (255, "ssh: connect to host gpu port 22: Connection timed out", "cannot be reached"),
        (255, "client_loop: send disconnect: Broken pipe", "was lost"),
        (255, "Timeout, server gpu not responding.", "was lost"),
        (255, "Connection to gpu closed by remote host.", "was lost"),
        (127, "bash: line 1: python: command not found", "was not found"),
    ],
)
def test_what_ssh_says_is_told_in_one_sentence(code: int, log: str, sentence: str) -> None:
    told = meaning_of_end(code, f"INFO something before\n{log}\n")
    assert sentence in told
    assert told.endswith(".")


def test_what_is_not_known_is_not_explained() -> None:
    assert meaning_of_end(255, "something else") == ""
    assert meaning_of_end(1, "Permission denied (publickey).") == ""
    assert meaning_of_end(None, "Connection closed") == ""
