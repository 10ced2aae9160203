"""The module keeps the rules of code for PythonQt, and its ``.ui`` files ask for what the widgets have."""

from __future__ import annotations

from pathlib import Path

import pytest

from ..slicer_host.pythonqt_lint import findings, ui_findings, widget_classes

ROOT = Path(__file__).resolve().parents[2] / "ProGiDiffSlicer"
FILES = [ROOT / "ProGiDiffSlicer.py", *sorted((ROOT / "ProGiDiffSlicerLib").rglob("*.py"))]
UI_FILES = sorted((ROOT / "Resources" / "UI").glob("*.ui"))
HELD = {**widget_classes(UI_FILES), "editor_widget": "qMRMLSegmentEditorWidget"}
FORBIDDEN = {"diffusers", "monai", "nibabel", "peft", "pydantic", "torch"}


@pytest.mark.parametrize("path", FILES, ids=lambda path: path.name)
def test_the_module_keeps_the_rules(path: Path) -> None:
    found = findings(path.read_text(encoding="utf-8"), HELD, FORBIDDEN)
    assert not found, "\n".join(f"line {each.line}: rule {each.rule}: {each.message}" for each in found)


@pytest.mark.parametrize("path", UI_FILES, ids=lambda path: path.name)
def test_the_ui_files_ask_for_what_the_widgets_have(path: Path) -> None:
    assert ui_findings(path) == []


def test_the_module_is_looked_at() -> None:
    assert {"ProGiDiffSlicer.py", "signals.py"} <= {path.name for path in FILES}
    assert "PromptPanel.ui" in {path.name for path in UI_FILES}
    assert findings("self.ui.volumeSelector.setNoneEnabled(True)", HELD), "the names of the panels are not known"
