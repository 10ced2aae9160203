"""What the worker needs and what of it is installed in this Python. Metadata is read; none of the packages is imported."""

from __future__ import annotations

import importlib
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property
from importlib import metadata
from importlib.machinery import PathFinder
from pathlib import Path
from typing import Literal

from packaging.requirements import Requirement
from packaging.utils import canonicalize_name
from packaging.version import InvalidVersion, Version
from slicer.i18n import tr as _

from progidiff import PYTHON_WINDOW

Source = Literal["slicer", "torch", "pip"]

# Slicer is built with these, and other modules hold them loaded: whoever replaces one breaks Slicer itself.
PART_OF_SLICER = ("numpy", "pydicom", "requests", "scipy", "simpleitk")
# Kept at the version that is there while pip installs the rest.
HELD = (*PART_OF_SLICER, "torch", "torchvision")
# Packages whose module is not named as the package is.
_MODULES = {"simpleitk": "SimpleITK"}


State = Literal["ok", "missing", "unfit", "damaged"]


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


@dataclass(frozen=True)
class Package:
    """One package and how it stands: fitting, absent, of an unfit version, or listed without its files."""

    need: Need
    installed: str
    state: State


@dataclass(frozen=True)
class PythonStatus:
    """What the worker would find in this Python.

    Attributes:
        python: version of this Python, e.g. ``"3.12.10"``.
        python_fits: whether the engine runs on it.
        packages: everything that the worker needs.
    """

    python: str
    python_fits: bool
    packages: tuple[Package, ...]

    @property
    def ready(self) -> bool:
        """Whether proposals can be made with this Python."""
        return self.python_fits and not self.wanting()

    def wanting(self, *sources: Source) -> tuple[Package, ...]:
        """Packages that are not as they have to be, of some sources or of all."""
        return tuple(p for p in self.packages if p.state != "ok" and (not sources or p.need.source in sources))

    def version(self, name: str) -> str:
        """Installed version of a package, or ""."""
        return next((p.installed for p in self.packages if p.need.key == canonicalize_name(name)), "")

    def sentence(self) -> str:
        """How it stands, in one sentence."""
        if not self.python_fits:
            low, high = (".".join(map(str, version)) for version in (PYTHON_WINDOW[0], _last(PYTHON_WINDOW[1])))
            text = _("This Slicer's Python is {python}, which cannot run the worker; choose another one ({low} to {high}).")
            return text.format(python=self.python, low=low, high=high)
        wanting = self.wanting()
        if not wanting:
            text = _("Everything is installed: torch {torch}, diffusers {diffusers}, Python {python}.")
            return text.format(torch=self.version("torch"), diffusers=self.version("diffusers"), python=self.python)
        names = ", ".join(package.need.name for package in wanting)
        if all(package.state == "missing" for package in wanting):
            return _("Not installed yet: {names}.").format(names=names)
        return _("Not installed or not usable: {names}.").format(names=names)


class PythonHome:
    """A Python installation, as its metadata shows it: by default the one in which this runs.

    Attributes:
        prefix: tells one Slicer's Python from another's.
        path: folders that hold its packages, or ``None`` for ``sys.path``.
    """

    def __init__(self, prefix: str = sys.prefix, path: list[str] | None = None, needs: Sequence[Need] | None = None) -> None:
        """``needs`` is what the worker needs; by default what ships in ``Resources/requirements.txt``."""
        self.prefix = prefix
        self.path = path
        self._needs = needs

    def status(self) -> PythonStatus:
        """Look at what is installed, without importing any of it; takes milliseconds."""
        importlib.invalidate_caches()
        needs = read_needs() if self._needs is None else self._needs
        low, end = PYTHON_WINDOW
        version = ".".join(map(str, sys.version_info[:3]))
        return PythonStatus(version, low <= sys.version_info[:2] < end, tuple(_look_at(need, self.path) for need in needs))

    def distributions(self) -> dict[str, metadata.Distribution]:
        """Everything that is installed, under the spelling by which packages are compared."""
        importlib.invalidate_caches()
        found: dict[str, metadata.Distribution] = {}
        for distribution in metadata.distributions(path=sys.path if self.path is None else self.path):
            name = distribution.metadata["Name"]
            if name:  # an uninstall that was cut off leaves folders without metadata
                found.setdefault(str(canonicalize_name(name)), distribution)
        return found

    def versions(self) -> dict[str, str]:
        """Version by package of everything that is installed."""
        return {name: distribution.version for name, distribution in self.distributions().items()}


def engine_status() -> PythonStatus:
    """What the worker would find in this Python."""
    return PythonHome().status()


def _look_at(need: Need, path: list[str] | None) -> Package:
    distribution = next(iter(metadata.distributions(name=need.name, path=sys.path if path is None else path)), None)
    spec = PathFinder.find_spec(need.module, path)
    # An uninstall that was cut off can leave a folder without the module in it, which is found as a namespace.
    there = spec is not None and spec.loader is not None
    if distribution is None:
        # Slicer's own builds of its libraries do not all carry metadata.
        if need.source == "slicer" and there:
            return Package(need, "", "ok")
        return Package(need, "", "missing")
    version = distribution.version or ""
    if not there:
        return Package(need, version, "damaged")
    return Package(need, version, "ok" if need.fits(version) else "unfit")


def _last(end: tuple[int, int]) -> tuple[int, int]:
    """The last minor version before the end of a window."""
    return end[0], end[1] - 1
