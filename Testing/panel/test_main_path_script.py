"""The script for the running application (Testing/slicer/main_path.py) goes through in the stand-in, but for editing."""

from __future__ import annotations

import importlib.util
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
import slicer

SCRIPT = Path(__file__).resolve().parents[1] / "slicer/main_path.py"


@pytest.fixture
def script(module: Any, monkeypatch: pytest.MonkeyPatch) -> ModuleType:
    """The script, where the module is shown by what the main window of the application does."""

    def select_module(name: str) -> None:
        assert name == "ProGiDiffSlicer"
        slicer.modules.ProGiDiffSlicerWidget.enter()

    monkeypatch.setattr(slicer.util, "mainWindow", lambda: module.parent)
    monkeypatch.setattr(slicer.util, "selectModule", select_module)
    spec = importlib.util.spec_from_file_location("main_path", SCRIPT)
    assert spec is not None
    assert spec.loader is not None
    loaded = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(loaded)
    return loaded


def test_steps_run(script: ModuleType, tmp_path: Path) -> None:
    script.check_main_path()
    node, identifier, _segment = script.accepted()
    assert node.GetSegmentation().GetSegment(identifier).GetName() == "Liver"
    script.check_scene_file(str(tmp_path))
    script.check_reload()


def test_missing_packages_are_a_skip_and_a_missing_module_a_failure(
    script: ModuleType, module: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    setup = type(module.panels.setup)
    monkeypatch.setattr(setup, "ready", property(lambda panel: False))
    assert script.run(str(tmp_path)) == script.SKIPPED
    assert "press Install" in capsys.readouterr().out
    monkeypatch.delattr(slicer.modules, "progidiffslicer")
    assert script.run(str(tmp_path)) == script.FAILED
    assert "--additional-module-paths" in capsys.readouterr().out


def test_a_step_that_fails_is_told(
    script: ModuleType, module: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def fails() -> None:
        raise AssertionError("no proposals")

    monkeypatch.setattr(type(module.panels.setup), "ready", property(lambda panel: True))
    monkeypatch.setattr(script, "check_main_path", fails)
    assert script.run(str(tmp_path)) == script.FAILED
    told = capsys.readouterr().out
    assert "FAILED: proposals" in told
    assert "no proposals" in told
