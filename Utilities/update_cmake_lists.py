"""Write the lists of files in ProGiDiffSlicer/CMakeLists.txt; Slicer packages only what is listed there.

Run it after a file was added, renamed or removed: ``.venv/bin/python Utilities/update_cmake_lists.py``.
"""

from __future__ import annotations

import re
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
MODULE = ROOT / "ProGiDiffSlicer"
CMAKE_LISTS = MODULE / "CMakeLists.txt"

# Where an installation has the bundled model and the sample volume; CMakeLists.txt installs them as folders.
_BUNDLED = "progidiff/_resources"
# Made by the interpreter, an editor, a merge or a file browser; never shipped.
_NOT_SHIPPED_FOLDERS = {"__pycache__"}
_NOT_SHIPPED_SUFFIXES = {".pyc", ".bak", ".orig", ".rej", ".swp"}


def shipped_files(module: Path = MODULE) -> tuple[list[str], list[str]]:
    """Paths relative to the module's folder, sorted: Python scripts, and everything else (.ui, icons, tables, templates)."""
    files = [file for path in module.rglob("*") if path.is_file() and _ships(file := path.relative_to(module))]
    scripts = sorted(file.as_posix() for file in files if file.suffix == ".py")
    resources = sorted(file.as_posix() for file in files if file.suffix != ".py")
    return scripts, resources


def _ships(file: Path) -> bool:
    hidden = any(part.startswith(".") or part in _NOT_SHIPPED_FOLDERS for part in file.parts)
    debris = file.suffix in _NOT_SHIPPED_SUFFIXES or file.name.endswith("~")
    return not hidden and not debris and file.name != "CMakeLists.txt" and not file.as_posix().startswith(f"{_BUNDLED}/")


def _block(name: str) -> re.Pattern[str]:
    return re.compile(rf"^set\({name}\n(.*?)^  \)$", re.MULTILINE | re.DOTALL)


def listed_files(text: str, name: str) -> list[str]:
    """The entries of ``set(name ...)`` in the text of a CMakeLists.txt.

    Raises ValueError where the text has no such list.
    """
    found = _block(name).search(text)
    if found is None:
        raise ValueError(f"no list {name} in the text")
    return found.group(1).split()


def with_lists(text: str, scripts: list[str], resources: list[str]) -> str:
    """The text with its two lists replaced."""
    for name, files in (("MODULE_PYTHON_SCRIPTS", scripts), ("MODULE_PYTHON_RESOURCES", resources)):
        listed_files(text, name)
        body = "".join(f"  {file}\n" for file in files)
        block = f"set({name}\n{body}  )"
        text = _block(name).sub(lambda _, block=block: block, text)
    return text


if __name__ == "__main__":
    CMAKE_LISTS.write_text(with_lists(CMAKE_LISTS.read_text(encoding="utf-8"), *shipped_files()), encoding="utf-8")
