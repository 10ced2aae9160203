"""Which packages the worker needs in Slicer's Python, and by which way each of them gets there."""

from __future__ import annotations

from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Literal

from packaging.requirements import Requirement
from packaging.utils import canonicalize_name
from packaging.version import InvalidVersion, Version

Source = Literal["slicer", "torch", "pip"]

# Slicer is built with these, and other modules hold them loaded: whoever replaces one breaks Slicer itself.
PART_OF_SLICER = ("numpy", "pydicom", "requests", "scipy", "simpleitk")
# Kept at the version that is there while pip installs the rest.
HELD = (*PART_OF_SLICER, "torch", "torchvision")
# Packages whose module is not named as the package is.
_MODULES = {"simpleitk": "SimpleITK"}


@dataclass(frozen=True)
class Need:
    """One package that the worker needs.

    Attributes:
        name: as its project writes it.
        window: versions that are meant to work, e.g. ``">=2.9,<3"``.
        source: part of Slicer, through the PyTorch extension, or through pip.
    """

    name: str
    window: str
    source: Source

    @property
    def key(self) -> str:
        """The name in the one spelling by which packages are compared."""
        return str(canonicalize_name(self.name))

    @property
    def module(self) -> str:
        """Name of the module that it brings."""
        return _MODULES.get(self.key, self.name)

    @property
    def text(self) -> str:
        """The line for pip."""
        return f"{self.name}{self.window}"

    @cached_property
    def _requirement(self) -> Requirement:
        return Requirement(self.text)

    def fits(self, version: str) -> bool:
        """Whether a version lies in the window; a development version counts by its number."""
        try:
            return self._requirement.specifier.contains(Version(version), prereleases=True)
        except InvalidVersion:
            return False


def requirements_file() -> Path:
    """The file that ships with the module."""
    return Path(__file__).resolve().parents[2] / "Resources" / "requirements.txt"


def read_needs(path: Path | None = None) -> tuple[Need, ...]:
    """What the worker needs, in the order of the file.

    Raises:
        OSError: the file is not there.
        packaging.requirements.InvalidRequirement: a line is not a requirement.
    """
    lines = map(str.strip, (path or requirements_file()).read_text(encoding="utf-8").splitlines())
    names = {line: Requirement(line).name for line in lines if line and not line.startswith("#")}
    return tuple(Need(name, line.removeprefix(name).strip(), _source(name)) for line, name in names.items())


def _source(name: str) -> Source:
    key = canonicalize_name(name)
    if key in PART_OF_SLICER:
        return "slicer"
    return "torch" if key == "torch" else "pip"
