"""A stand-in for ``slicer.packaging``: it tells what is installed and installs nothing."""

from __future__ import annotations

from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

from packaging.requirements import Requirement

__all__ = ["load_requirements", "pip_check", "pip_ensure", "pip_install", "pip_uninstall"]


def load_requirements(path: str | Path) -> list[Requirement]:
    """The requirements in a file; comments, empty lines and options are passed over."""
    lines = [line.strip() for line in Path(path).read_text(encoding="utf-8").splitlines()]
    return [Requirement(line) for line in lines if line and not line.startswith(("#", "-"))]


def _requirements(given: Any) -> list[Requirement]:
    if isinstance(given, Requirement):
        return [given]
    if isinstance(given, str):
        return [Requirement(each) for each in given.split()]
    return [each if isinstance(each, Requirement) else Requirement(each) for each in given]


def pip_check(req: Any) -> bool:
    """Whether every requirement is met by what is installed."""
    for each in _requirements(req):
        if each.marker is not None and not each.marker.evaluate():
            continue
        try:
            if version(each.name) not in each.specifier:
                return False
        except PackageNotFoundError:
            return False
    return True


def pip_install(requirements: Any, **options: Any) -> None:
    """Refused: a test that wants to install replaces this function.

    Raises:
        RuntimeError: always.
    """
    raise RuntimeError(f"this host installs nothing; pip_install was called with {requirements!r}")


def pip_uninstall(requirements: Any, **options: Any) -> None:
    """Refused, as ``pip_install``.

    Raises:
        RuntimeError: always.
    """
    raise RuntimeError(f"this host installs nothing; pip_uninstall was called with {requirements!r}")


def pip_ensure(
    requirements: Any,
    constraints: str | Path | None = None,
    skip_packages: list[str] | None = None,
    prompt_install: bool = True,
    prompt_restart: bool = True,
    requester: str | None = None,
    skip_in_testing: bool = True,
    show_progress: bool = True,
) -> list[str] | None:
    """Nothing, as in Slicer's testing mode; with ``skip_in_testing=False`` what is missing goes to ``pip_install``."""
    missing = [str(each) for each in _requirements(requirements) if not pip_check(each)]
    if not missing or skip_in_testing:
        return None
    import slicer

    slicer.packaging.pip_install(missing, constraints=constraints, skip_packages=skip_packages, requester=requester)
    return None
