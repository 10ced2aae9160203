"""Write the lists of files in ProGiDiffSlicer/CMakeLists.txt; Slicer packages only what is listed there.

Run it after a file was added, renamed or removed: ``.venv/bin/python Utilities/update_cmake_lists.py``.
"""

from __future__ import annotations

import re
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
MODULE = ROOT / "ProGiDiffSlicer"
CMAKE_LISTS = MODULE / "CMakeLists.txt"

# Made by the interpreter or by a file browser; never shipped.
_NOT_SHIPPED_FOLDERS = {"__pycache__"}
_NOT_SHIPPED_NAMES = {"CMakeLists.txt", ".DS_Store"}


def shipped_files(module: Path = MODULE) -> tuple[list[str], list[str]]:
    """Paths relative to the module's folder, sorted: Python scripts, and everything else."""
    files = [
        path.relative_to(module)
        for path in module.rglob("*")
        if path.is_file() and path.name not in _NOT_SHIPPED_NAMES and not _NOT_SHIPPED_FOLDERS & set(path.parts)
    ]
    scripts = sorted(file.as_posix() for file in files if file.suffix == ".py")
    resources = sorted(file.as_posix() for file in files if file.suffix not in {".py", ".pyc"})
    return scripts, resources


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
