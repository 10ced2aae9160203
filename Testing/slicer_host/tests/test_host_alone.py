"""The folder of the host is a package of its own: it imports nothing of a project, and works where it is copied to."""

from __future__ import annotations

import ast
import os
import re
import shutil
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

HOST = Path(__file__).resolve().parents[1]
# What the README says to install, and what is there with it or through the host.
ALLOWED = {"PySide6", "ctk", "numpy", "packaging", "pytest", "qt", "shiboken6", "slicer", "vtk", "vtkmodules"}
OPTIONAL = {"PIL", "matplotlib", "pydicom"}
MODULE = """
import qt, slicer
from types import SimpleNamespace
from slicer.ScriptedLoadableModule import *

class MyModule(ScriptedLoadableModule):
    pass

class MyModuleWidget(ScriptedLoadableModuleWidget):
    def setup(self):
        self.ui = SimpleNamespace(selector=slicer.qMRMLNodeComboBox(), applyButton=qt.QPushButton("Apply"))
        for each in vars(self.ui).values():
            self.layout.addWidget(each)
        self.ui.selector.nodeTypes = ["vtkMRMLScalarVolumeNode"]
        self.ui.selector.connect("currentNodeChanged(vtkMRMLNode*)", self.onVolume)
        self.ui.selector.setMRMLScene(slicer.mrmlScene)
        self.onVolume(self.ui.selector.currentNode())

    def onVolume(self, node):
        self.ui.applyButton.enabled = node is not None
"""
# Beside the README's test: what was loaded from elsewhere than the copy, Python and its packages.
WHAT_WAS_LOADED = """
import os, sys
from pathlib import Path

def test_nothing_was_loaded_from_elsewhere(widget):
    systems = {"sitecustomize", "usercustomize"}  # Linux distributions keep theirs below /etc
    loaded = [each for name, each in list(sys.modules.items()) if name not in systems]
    files = {Path(file).resolve() for each in loaded if (file := getattr(each, "__file__", None))}
    homes = [Path(each).resolve() for each in (os.getcwd(), sys.prefix, sys.base_prefix)]
    assert [file for file in files if not any(file.is_relative_to(home) for home in homes)] == []
"""


def imported(path: Path) -> Iterator[str]:
    """What a file imports, at any depth: top packages, and ``.`` for this folder's; one that leads out of it is spelt."""
    depth = len(path.relative_to(HOST).parts)
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if isinstance(node, ast.Import):
            yield from (each.name.partition(".")[0] for each in node.names)
        elif isinstance(node, ast.ImportFrom):
            inside = 0 < node.level <= depth
            yield "." if inside else "." * node.level + (node.module or "").partition(".")[0]


@pytest.mark.parametrize("path", sorted(HOST.rglob("*.py")), ids=lambda path: str(path.relative_to(HOST)))
def test_the_host_imports_nothing_of_a_project(path: Path) -> None:
    assert set(imported(path)) - sys.stdlib_module_names - ALLOWED - OPTIONAL <= {"."}


@pytest.mark.slow
def test_the_example_of_the_readme_runs_beside_a_copy(tmp_path: Path) -> None:
    shutil.copytree(HOST, tmp_path / "slicer_host", ignore=shutil.ignore_patterns("tests", "__pycache__"))
    text = (HOST / "README.md").read_text(encoding="utf-8")
    examples = dict(re.findall(r"^`(\w+\.py)`[^\n]*:\n\n```python\n(.*?)^```", text, re.MULTILINE | re.DOTALL))
    assert examples.keys() == {"conftest.py", "test_my_module.py"}
    (tmp_path / "MyModule").mkdir()
    for name, content in {**examples, "MyModule/MyModule.py": MODULE, "test_loaded.py": WHAT_WAS_LOADED}.items():
        (tmp_path / name).write_text(content, encoding="utf-8")
    environment = {name: value for name, value in os.environ.items() if not name.startswith(("PYTEST", "PYTHONPATH"))}
    ran = subprocess.run(
        [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", "test_my_module.py", "test_loaded.py"],
        cwd=tmp_path,
        env=environment,
        capture_output=True,
        text=True,
        timeout=300,
    )
    assert "2 passed" in ran.stdout, ran.stdout + ran.stderr
