"""What is installed is told from metadata: nothing is imported."""

from __future__ import annotations

import sys
from pathlib import Path

import pytest

from ProGiDiffSlicerLib.setup import status as status_module
from ProGiDiffSlicerLib.setup.status import Need, PythonHome, Status, engine_status

from .setup_examples import put_package

pytestmark = pytest.mark.usefixtures("app")

NEEDS = (Need("numpy", ">=2.0,<3", "slicer"), Need("torch", ">=2.9,<3", "torch"), Need("diffusers", ">=0.42,<1", "pip"))
_EXPLODES = "raise AssertionError('imported for a status')"


def status_of(folder: Path) -> Status:
    return PythonHome("/opt/Slicer", [str(folder)], NEEDS).status()


def look(folder: Path) -> dict[str, tuple[str, str]]:
    return {package.need.name: (package.state, package.installed) for package in status_of(folder).packages}


def test_each_state_of_a_package(tmp_path: Path) -> None:
    assert set(look(tmp_path).values()) == {("missing", "")}
    put_package(tmp_path, "numpy", "1.26.4")
    put_package(tmp_path, "torch", "2.9.1+cu128")
    put_package(tmp_path, "diffusers", "0.42.0", code=None)
    assert look(tmp_path) == {
        "numpy": ("unfit", "1.26.4"),
        "torch": ("ok", "2.9.1+cu128"),
        "diffusers": ("damaged", "0.42.0"),
    }


def test_a_status_imports_nothing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for name, version in (("numpy", "2.0.2"), ("torch", "2.9.1"), ("diffusers", "0.43.0")):
        put_package(tmp_path, name, version, code=_EXPLODES)
    monkeypatch.syspath_prepend(str(tmp_path))
    modules = set(sys.modules)
    status = status_of(tmp_path)
    assert status.ready
    assert not {name.partition(".")[0] for name in set(sys.modules) - modules} & {"torch", "diffusers", "transformers"}


def test_what_is_left_of_a_removed_package_is_not_taken_for_it(tmp_path: Path) -> None:
    """Windows cannot delete the libraries of a running program: the folder stays, without the module."""
    put_package(tmp_path, "torch", "2.9.1", code=None)
    (tmp_path / "torch" / "lib").mkdir(parents=True)
    assert look(tmp_path)["torch"] == ("damaged", "2.9.1")


def test_a_library_of_slicers_own_build_needs_no_metadata(tmp_path: Path) -> None:
    (tmp_path / "numpy").mkdir()
    (tmp_path / "numpy" / "__init__.py").touch()
    assert look(tmp_path)["numpy"] == ("ok", "")


def test_the_sentence_names_what_is_wanting(tmp_path: Path) -> None:
    assert status_of(tmp_path).sentence() == "Not installed yet: numpy, torch, diffusers."
    put_package(tmp_path, "numpy", "2.0.2")
    put_package(tmp_path, "torch", "2.5.0")
    assert status_of(tmp_path).sentence() == "Not installed or not usable: torch, diffusers."


def test_a_python_that_is_too_old_is_told_first(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(status_module, "PYTHON_WINDOW", ((3, 98), (3, 99)))
    status = status_of(tmp_path)
    assert not status.ready
    assert "(3.98 to 3.98)" in status.sentence()


def test_this_environment_is_ready() -> None:
    status = engine_status()
    assert status.ready, status.wanting()
    assert status.version("torch") in status.sentence()


def test_installed_packages_skip_what_a_cut_off_uninstall_left(tmp_path: Path) -> None:
    put_package(tmp_path, "Some_Thing", "1.0")
    (tmp_path / "gone-1.0.dist-info").mkdir()
    assert PythonHome(path=[str(tmp_path)]).versions() == {"some-thing": "1.0"}
