"""The script for the running application (Testing/slicer/main_path.py) goes through in the stand-in."""

from __future__ import annotations

import importlib.util
import sys
from pathlib import Path
from types import ModuleType
from typing import Any, ClassVar

import numpy as np
import pytest
import qt
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


@pytest.fixture
def scripted_effect(script: ModuleType, module: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    """The Margin effect, which the stand-in's editor has by name only: it grows the segment by a voxel."""

    class Margin:
        name = "Margin"
        applied: ClassVar[dict[str, str]] = {}

        def setParameter(self, name: str, value: str) -> None:
            self.applied[name] = value

        def self(self) -> Any:
            return self

        def onApply(self) -> None:
            assert self.applied == {"MarginSizeMm": str(script.MARGIN_MM)}
            node, identifier, _segment = script.accepted()
            volume = module.panels.review.ui.segmentEditor.sourceVolumeNode()
            voxels = slicer.util.arrayFromSegmentBinaryLabelmap(node, identifier, volume)
            grown = (voxels > 0) | (np.roll(voxels, 1, axis=2) > 0)
            slicer.util.updateSegmentBinaryLabelmapFromArray(grown.astype(np.uint8), node, identifier, volume)

    editor = type(module.panels.review.ui.segmentEditor)
    by_name = editor.effectByName
    monkeypatch.setattr(editor, "effectByName", lambda self, name: Margin() if name == "Margin" else by_name(self, name))


@pytest.mark.slow
@pytest.mark.usefixtures("scripted_effect")
def test_the_whole_script_passes_and_tells_what_to_see(
    script: ModuleType, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert script.run(str(tmp_path)) == script.PASSED, capsys.readouterr().out
    told = capsys.readouterr().out
    assert [line.removeprefix("main path: ok: ") for line in told.splitlines() if line.startswith("main path: ok: ")] == [
        "opening", "panel", "proposals", "editing", "scene-file", "reload",
    ]  # fmt: skip
    assert "Slicer 5.13 (revision" in told
    assert "torch " in told
    assert "Setup: ready" in told
    assert "the accepted segment Liver in Review" in told
    assert "Edited, Dice to the proposal 0." in told
    assert told.count("you should see: ") >= 6
    assert (tmp_path / "proposals.png").stat().st_size > 0
    assert "PASSED: 5 steps" in told


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
    monkeypatch.setattr(script, "check_panel", lambda: None)
    monkeypatch.setattr(script, "check_main_path", fails)
    assert script.run(str(tmp_path)) == script.FAILED
    told = capsys.readouterr().out
    assert "FAILED: proposals" in told
    assert "no proposals" in told


@pytest.mark.parametrize("ready", [True, False])
def test_an_exception_that_pythonqt_prints_is_a_failure_and_no_skip(
    script: ModuleType,
    module: Any,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
    ready: bool,
) -> None:
    """With --testing Slicer ends with 1 then, whatever the script asks for."""
    printed: list[str] = []

    def breaks() -> None:
        raise RuntimeError("a slot broke")

    def enter_with_trouble() -> Any:
        button = qt.QPushButton("x")
        button.connect("clicked()", breaks)
        button.click()
        return module.panels

    monkeypatch.setattr(sys, "excepthook", lambda kind, error, trace: printed.append(str(error)))
    monkeypatch.setattr(type(module.panels.setup), "ready", property(lambda panel: ready))
    monkeypatch.setattr(script, "panels", enter_with_trouble)
    hook = sys.excepthook
    assert script.run(str(tmp_path)) == script.FAILED
    told = capsys.readouterr().out
    assert "FAILED: opening" in told
    assert "1 raised in slots or observers" in told
    assert "SKIPPED" not in told
    assert printed == ["a slot broke"], "it is still printed"
    assert sys.excepthook is hook
