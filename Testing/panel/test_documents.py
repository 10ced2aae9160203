"""The documents say what the module has: every control is described, and what is described is there."""

from __future__ import annotations

import ast
import re
import xml.etree.ElementTree as ElementTree
from collections.abc import Iterator
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]
MODULE = ROOT / "ProGiDiffSlicer"
LIBRARY = MODULE / "ProGiDiffSlicerLib"
SHOWN = ("text", "title")
DOCUMENTS = (
    "docs/panel.md",
    "docs/tutorial.md",
    "docs/installation.md",
    "docs/troubleshooting.md",
    "README.md",
    "CONTRIBUTING.md",
)


def _controls() -> Iterator[tuple[str, str]]:
    """Name and text of everything with a text in the .ui files."""
    for path in sorted((MODULE / "Resources/UI").glob("*.ui")):
        for widget in ElementTree.parse(path).getroot().iter("widget"):
            for item in widget.findall("property"):
                text = "".join(item.itertext()).strip().rstrip(":")
                if item.get("name") in SHOWN and text:
                    yield f"{path.stem}.{widget.get('name')}", text


def _texts_of_code() -> set[str]:
    texts: set[str] = set()
    for path in (*LIBRARY.rglob("*.py"), MODULE / "ProGiDiffSlicer.py"):
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
            if isinstance(node, ast.Constant) and isinstance(node.value, str):
                texts.add(node.value)
    return texts


def _bold(document: str) -> set[str]:
    return set(re.findall(r"\*\*(.+?)\*\*", document))


def test_every_control_is_described() -> None:
    document = (ROOT / "docs/panel.md").read_text(encoding="utf-8")
    described = _bold(document) | {heading.strip() for heading in re.findall(r"^## (.+)$", document, re.MULTILINE)}
    missing = {name: text for name, text in _controls() if text not in described}
    assert missing == {}


def test_controls_that_are_described_exist() -> None:
    """What stands in bold in the first column of a table is a text of the panel."""
    document = (ROOT / "docs/panel.md").read_text(encoding="utf-8")
    known = {text for _name, text in _controls()} | _texts_of_code()
    cells = re.findall(r"^\| (.+?) \|", document, re.MULTILINE)
    assert [text for cell in cells for text in _bold(cell) if text not in known] == []


def test_choices_that_are_described_exist() -> None:
    """What stands in italics in the tables is a choice, a row or a title of the panel."""
    document = (ROOT / "docs/panel.md").read_text(encoding="utf-8")
    rows = "\n".join(line for line in document.splitlines() if line.startswith("|"))
    texts = _texts_of_code() | {text for _name, text in _controls()}
    named = re.findall(r"(?<!\*)\*([^*]+)\*(?!\*)", rows)
    assert len(named) > 10
    assert [name for name in named if not any(name in text for text in texts)] == []


@pytest.mark.parametrize("name", DOCUMENTS)
def test_links_to_sections_resolve(name: str) -> None:
    path = ROOT / name
    for file, anchor in re.findall(r"\]\(([^)#\s]*)#([^)]+)\)", path.read_text(encoding="utf-8")):
        if "://" in file:
            continue
        text = (path.parent / file if file else path).read_text(encoding="utf-8")
        headings = re.findall(r"^#+ (.+)$", text, re.MULTILINE)
        anchors = {re.sub(r"[^\w\- ]", "", heading.lower()).replace(" ", "-") for heading in headings}
        assert anchor in anchors, f"{name}: {file}#{anchor}"


# The table of "The module inside Slicer" in docs/architecture.md: what a part of the library may import of the others, and
# of Slicer.
LAYERS = {
    "signals": (set(), set()),
    "idle": (set(), {"qt"}),
    "worker": ({"signals", "idle"}, {"qt", "slicer.i18n", "slicer.util"}),
    "session": ({"signals", "idle", "scene", "learning"}, {"slicer", "vtk"}),
    "scene": ({"signals", "idle", "worker", "session"}, {"qt", "slicer", "vtk"}),
    "learning": ({"signals", "idle", "worker", "scene"}, {"qt", "slicer"}),
    "setup": ({"signals", "worker"}, {"qt", "slicer"}),
    "parameters": ({"scene"}, {"slicer"}),
    "services": ({"signals", "idle", "worker", "session", "scene", "setup"}, {"qt", "slicer"}),
    "panels": (
        {"signals", "idle", "worker", "session", "scene", "learning", "setup", "parameters", "services"},
        {"qt", "ctk", "vtk", "slicer"},
    ),
}
WIDGETS = re.compile(r"\b(?:qt\.Q\w*(?:Widget|Button|Box|Label|Edit|Dialog|Layout|View|Menu|Pixmap)|ctk\.ctk|slicer\.qMRML)")


def _modules(path: Path) -> Iterator[str]:
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom) and node.module:
            yield node.module


@pytest.mark.slow
def test_the_library_keeps_its_layers() -> None:
    parts = {path.relative_to(LIBRARY).parts[0].removesuffix(".py") for path in LIBRARY.rglob("*.py")} - {"__init__"}
    assert parts == LAYERS.keys(), "a new part belongs into this table and into docs/architecture.md"
    found = []
    for path in sorted(LIBRARY.rglob("*.py")):
        part = path.relative_to(LIBRARY).parts[0].removesuffix(".py")
        if part == "__init__":
            continue
        own, foreign = LAYERS[part]
        for name in _modules(path):
            pieces = name.split(".")
            inside = pieces[0] == "ProGiDiffSlicerLib" and (len(pieces) == 1 or pieces[1] not in own | {part})
            slicers = pieces[0] in {"qt", "ctk", "slicer", "vtk"} and not {pieces[0], name} & (foreign | {"slicer.i18n"})
            if inside or (slicers and name != "slicer.i18n"):
                found.append(f"{path.relative_to(LIBRARY)} imports {name}")
        if part not in {"panels"} and WIDGETS.search(path.read_text(encoding="utf-8")):
            found.append(f"{path.relative_to(LIBRARY)} uses a widget")
    assert found == []


def test_the_layers_are_those_of_the_document() -> None:
    document = (ROOT / "docs/architecture.md").read_text(encoding="utf-8").split("## The module inside Slicer")[1]
    named = {
        name for row in re.findall(r"^\| (`.+?) \|", document, re.MULTILINE) for name in re.findall(r"`([\w./]+)`", row)
    }
    assert {
        name.removesuffix(".py").rstrip("/") for name in named if not name.startswith("ProGiDiffSlicer")
    } == LAYERS.keys()
