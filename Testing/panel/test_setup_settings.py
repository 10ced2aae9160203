"""The choices of the setup survive the session, whatever they hold, and lead to the right worker."""

from __future__ import annotations

import os
import sys
from pathlib import Path

import pytest
import qt

from progidiff.errors import InputError
from ProGiDiffSlicerLib.setup.settings import Settings

from .setup_examples import MemoryStore

pytestmark = pytest.mark.usefixtures("app")

NAMES = ("modelFolder", "pythonPath", "commandText", "wheelFolder")


def test_what_was_chosen_is_there_in_the_next_session(tmp_path: Path) -> None:
    file = str(tmp_path / "Slicer.ini")
    settings = Settings(qt.QSettings(file, qt.QSettings.IniFormat))
    for name in NAMES:
        setattr(settings, name, f"/srv/Größe, é; \\\\server\\{name} 模型")
    settings.device, settings.workerKind = "cuda", "command"
    settings.write_record("installedPackages", {"/opt/é": {"torch": "2.9.1"}})
    settings._store.sync()

    again = Settings(qt.QSettings(file, qt.QSettings.IniFormat))
    for name in NAMES:
        assert getattr(again, name) == f"/srv/Größe, é; \\\\server\\{name} 模型"
    assert (again.device, again.workerKind) == ("cuda", "command")
    assert again.read_record("installedPackages") == {"/opt/é": {"torch": "2.9.1"}}


def test_a_fresh_installation_takes_this_python_the_bundled_model_and_any_device() -> None:
    settings = Settings(MemoryStore())
    assert [getattr(settings, name) for name in NAMES] == ["", "", "", ""]
    assert (settings.workerKind, settings.device) == ("this", "auto")


def test_what_somebody_wrote_into_the_file_does_no_harm() -> None:
    store = MemoryStore()
    store.values = {
        "ProGiDiff/device": "tpu",
        "ProGiDiff/workerKind": ["a", "b"],
        "ProGiDiff/pendingInstall": "{",
        "ProGiDiff/installedPackages": "[1]",
        "ProGiDiff/modelFolder": None,
    }
    settings = Settings(store)
    assert (settings.device, settings.workerKind, settings.modelFolder) == ("auto", "this", "")
    assert settings.read_record("pendingInstall") == settings.read_record("installedPackages") == {}
    with pytest.raises(ValueError, match="tpu"):
        settings.device = "tpu"  # type: ignore[assignment]
    with pytest.raises(ValueError, match="elsewhere"):
        settings.workerKind = "elsewhere"


def test_a_change_is_told_once_and_no_change_is_not_told() -> None:
    settings = Settings(MemoryStore())
    told: list[str] = []
    settings.changed.connect(told.append)
    settings.modelFolder = " /models/a "
    settings.modelFolder = "/models/a"
    settings.modelFolder = ""
    assert told == ["modelFolder", "modelFolder"]
    assert settings._store.values == {}


def test_the_worker_follows_its_kind(monkeypatch: pytest.MonkeyPatch) -> None:
    settings = Settings(MemoryStore())
    assert settings.command().arguments == ("-P", "-m", "progidiff", "worker")
    settings.workerKind = "python"
    with pytest.raises(InputError, match="No Python is chosen"):
        settings.command()
    settings.pythonPath = sys.executable
    assert settings.command().program == sys.executable
    settings.workerKind = "command"
    with pytest.raises(InputError, match="command is empty"):
        settings.command()
    settings.commandText = 'ssh gpu-host "/opt/my env/python" -m progidiff worker'
    command = settings.command()
    assert (command.program, command.arguments[:2]) == ("ssh", ("gpu-host", "/opt/my env/python"))
    assert os.environ.get("PATH") == command.environment.get("PATH")


def test_the_key_changes_with_whatever_a_test_of_the_connection_depends_on() -> None:
    settings = Settings(MemoryStore())
    keys = [settings.worker_key()]
    for name, value in (("device", "cpu"), ("modelFolder", "/m"), ("workerKind", "python"), ("pythonPath", "/p")):
        setattr(settings, name, value)
        keys.append(settings.worker_key())
    assert len(set(keys)) == len(keys)
    settings.wheelFolder = settings.commandText = "/elsewhere"
    assert settings.worker_key() == keys[-1]
