"""What is run as the worker, and how it is ended with all that it started."""

from __future__ import annotations

import os
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import psutil
import pytest
import slicer.util

import progidiff
from progidiff import system
from progidiff.errors import InputError
from ProGiDiffSlicerLib.worker import command as command_module
from ProGiDiffSlicerLib.worker.client import WorkerState
from ProGiDiffSlicerLib.worker.command import (
    local_command,
    own_python,
    parse_command,
    startup_environment,
    worker_environment,
)

from .worker_support import SCRIPT, Spin, gone, worker

ENGINE = str(Path(progidiff.__file__).resolve().parents[1])
posix_only = pytest.mark.skipif(os.name == "nt", reason="needs POSIX tools")


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("ssh gpu-host python -m progidiff worker", ["ssh", "gpu-host", "python", "-m", "progidiff", "worker"]),
        ("  /opt/my\\ env/bin/python  -m\tprogidiff worker ", ["/opt/my env/bin/python", "-m", "progidiff", "worker"]),
        ('"/opt/my env/python" -c \'print("#1; $HOME")\'', ["/opt/my env/python", "-c", 'print("#1; $HOME")']),
        ("python worker # no comment", ["python", "worker", "#", "no", "comment"]),
        ("/opt/Jürgen/Größe/python ''", ["/opt/Jürgen/Größe/python", ""]),
        ("a&&b | c > d", ["a&&b", "|", "c", ">", "d"]),
    ],
)
def test_a_command_is_cut_into_words(text: str, words: list[str]) -> None:
    parsed = parse_command(text, windows=False)
    assert [parsed.program, *parsed.arguments] == words


@pytest.mark.parametrize(
    ("text", "words"),
    [
        (r"C:\Users\Jürgen\env\python.exe -m worker", [r"C:\Users\Jürgen\env\python.exe", "-m", "worker"]),
        (r'"C:\Program Files\Python\python.exe" -P', [r"C:\Program Files\Python\python.exe", "-P"]),
        (r"C:\Users\O'Neil\python.exe", [r"C:\Users\O'Neil\python.exe"]),
        (r'ssh host "cd /data && python -m progidiff worker"', ["ssh", "host", "cd /data && python -m progidiff worker"]),
    ],
)
def test_a_command_of_windows_keeps_its_backslashes_and_apostrophes(text: str, words: list[str]) -> None:
    parsed = parse_command(text, windows=True)
    assert [parsed.program, *parsed.arguments] == words


@pytest.mark.parametrize(
    ("text", "says"),
    [
        ("", "is empty"),
        ("   ", "is empty"),
        ("'' worker", "is empty"),
        ("ssh 'host", "not closed"),
        ("-m progidiff worker", "begin with a program"),
        ("ssh host\nrm -rf /", "single line"),
        ("ssh host\0x", "single line"),
    ],
)
def test_nonsense_is_refused_with_what_to_do(text: str, says: str) -> None:
    with pytest.raises(InputError, match=says) as error:
        parse_command(text, windows=False)
    assert str(error.value).endswith(".")


def test_a_home_folder_is_found() -> None:
    assert parse_command("~/env/bin/python -m x", windows=False).program == str(Path.home() / "env/bin/python")


def test_this_machines_python_runs_the_engine_beside_the_module(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PYTHONPATH", os.pathsep.join(["/somewhere else", ENGINE]))
    command = local_command()
    assert command.program == own_python()
    assert command.arguments == ("-P", "-m", "progidiff", "worker")
    assert command.environment["PYTHONPATH"].split(os.pathsep) == [ENGINE, "/somewhere else"]
    assert command.environment["PYTHONIOENCODING"] == "utf-8"
    assert command.environment["PYTHONUNBUFFERED"] == "1"
    assert command.environment["PATH"] == os.environ["PATH"]


def test_slicers_own_python_comes_first(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    program = tmp_path / ("PythonSlicer.exe" if os.name == "nt" else "PythonSlicer")
    program.write_text("#!/bin/sh\n", encoding="utf-8")
    program.chmod(0o755)
    monkeypatch.setenv("PATH", str(tmp_path), prepend=os.pathsep)
    assert local_command().program == str(program)


def test_another_python_gets_the_environment_without_slicers_libraries(monkeypatch: pytest.MonkeyPatch) -> None:
    clean = {"PATH": "/usr/bin", "HOME": "/nowhere"}
    monkeypatch.setenv("PYTHONHOME", "/Slicer/lib/Python")
    monkeypatch.setattr(command_module, "startup_environment", lambda: clean)
    for command in (local_command(sys.executable), parse_command("python -m progidiff worker")):
        assert command.environment == worker_environment(clean)
        assert "PYTHONHOME" not in command.environment
    assert "PYTHONHOME" in local_command().environment


def test_slicer_is_asked_for_the_environment_it_was_started_in(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(slicer.util, "startupEnvironment", lambda: {"PATH": "/usr/bin"}, raising=False)
    assert startup_environment() == {"PATH": "/usr/bin"}
    assert parse_command("ssh host").environment["PATH"] == "/usr/bin"
    monkeypatch.delattr(slicer.util, "startupEnvironment")
    assert startup_environment() == dict(os.environ)


@pytest.mark.parametrize(("python", "says"), [("", "No Python is chosen"), ("/no/such/python", "no Python at")])
def test_a_python_that_is_not_there(python: str, says: str) -> None:
    with pytest.raises(InputError, match=says):
        local_command(python)


def test_the_default_command_starts_the_real_worker(app: Any, spin: Spin) -> None:
    with worker(local_command()) as client:
        client.start()
        spin(lambda: client.state is WorkerState.READY)
        assert client.hello is not None
        assert client.hello.version == progidiff.__version__


def test_a_command_with_a_path_beyond_ascii_works(app: Any, tmp_path: Path, spin: Spin) -> None:
    folder = tmp_path / "Jürgen Größe 学"
    folder.mkdir()
    script = folder / "wörker skript.py"
    script.write_text(SCRIPT.read_text(encoding="utf-8"), encoding="utf-8")
    if os.name == "nt":
        text = f'"{sys.executable}" "{script}"'
    else:
        # A program of such a name, too; a link to the interpreter would not find the packages of its environment.
        program = folder / "pythön"
        program.write_text(f'#!/bin/sh\nexec "{sys.executable}" "$@"\n', encoding="utf-8")
        program.chmod(0o755)
        text = f'"{folder}/pythön" "{script}" heartbeat_s=0.5'
    with worker(parse_command(text)) as client:
        run = client.run(str(tmp_path / "Modèle" / "work"))
        spin(lambda: run.done)
        assert [how for _, how in run.outcomes] == ["succeeded"] * 3
        assert client.loaded_from == (str(tmp_path / "Modèle" / "work"), "cpu")


def family() -> tuple[int, list[int]]:
    """A process with a child and a grandchild."""
    sleep = "import time; time.sleep(600)"
    child = f"import subprocess, sys; subprocess.run([sys.executable, '-c', {sleep!r}])"
    code = f"import subprocess, sys; subprocess.run([sys.executable, '-c', {child!r}])"
    root = subprocess.Popen([sys.executable, "-c", code])
    end = time.monotonic() + 60
    while len(members := psutil.Process(root.pid).children(recursive=True)) < 2:
        assert time.monotonic() < end
        time.sleep(0.02)
    return root.pid, [root.pid, *(member.pid for member in members)]


def all_gone(pids: list[int]) -> bool:
    end = time.monotonic() + 60
    while not all(map(gone, pids)):
        if time.monotonic() > end:
            return False
        time.sleep(0.02)
    return True


@pytest.mark.parametrize("psutil_there", [True, False])
def test_a_process_is_killed_with_its_descendants(psutil_there: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    """Without psutil by the system's own means."""
    root, pids = family()
    with monkeypatch.context() as without:
        if not psutil_there:
            without.setitem(sys.modules, "psutil", None)
        for _again in range(2):
            system.kill_tree(root)
    assert all_gone(pids)


@posix_only
def test_where_taskkill_ends_a_tree_it_has_done_so_before_the_root_goes(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    """On Windows without psutil: QProcess kills the root next, and descendants are found through it."""
    script = tmp_path / "taskkill"
    code = f"""#!{sys.executable}
import os, signal, sys, time
time.sleep(0.3)
sys.path.insert(0, {str(Path(system.__file__).parents[1])!r})
from progidiff.system import descendants
assert sys.argv[1:4] == ["/T", "/F", "/PID"]
root = int(sys.argv[4])
for each in [*descendants(root), root]:
    os.kill(each, signal.SIGKILL)
"""
    script.write_text(code, encoding="utf-8")
    script.chmod(0o755)
    root, pids = family()
    with monkeypatch.context() as windows:
        windows.setitem(sys.modules, "psutil", None)
        windows.setenv("PATH", str(tmp_path), prepend=os.pathsep)
        windows.setattr(sys, "platform", "win32")
        windows.setattr(subprocess, "CREATE_NO_WINDOW", 0, raising=False)
        system.kill_tree(root)
    psutil.Process(root).kill()
    assert all_gone(pids)


@posix_only
def test_descendants_are_found_without_proc(monkeypatch: pytest.MonkeyPatch) -> None:
    root, pids = family()
    try:
        assert set(system.descendants(root)) == set(pids[1:])
        if Path("/bin/ps").exists() or Path("/usr/bin/ps").exists():
            monkeypatch.setattr(system, "Path", lambda path: Path("/nowhere"))
            assert set(system.descendants(root)) == set(pids[1:])
    finally:
        system.kill_tree(root)
    assert all_gone(pids)
