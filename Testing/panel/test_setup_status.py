"""What the worker needs, and what of it is installed: told from metadata, nothing is imported."""

from __future__ import annotations

import sys
import tomllib
from pathlib import Path

import numpy as np
import pytest
from packaging.requirements import Requirement
from packaging.utils import canonicalize_name
from Testing.alone import alone

from progidiff.wire.client import WorkerClient
from progidiff.wire.messages import DoneEvent, ProposeRequest
from ProGiDiffSlicerLib.setup import status as status_module
from ProGiDiffSlicerLib.setup.status import Need, PythonHome, PythonStatus, engine_status, read_needs

from .setup_examples import put_package

pytestmark = pytest.mark.usefixtures("app")

NEEDS = (Need("numpy", ">=2.0,<3", "slicer"), Need("torch", ">=2.9,<3", "torch"), Need("diffusers", ">=0.42,<1", "pip"))
_EXPLODES = "raise AssertionError('imported for a status')"


ROOT = Path(__file__).resolve().parents[2]
# numpy and scipy as Slicer's own build files pin them.
SLICERS = {"5.10": {"numpy": "2.0.2", "scipy": "1.13.1"}, "5.12": {"numpy": "2.4.6", "scipy": "1.17.1"}}


def status_of(folder: Path) -> PythonStatus:
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


@pytest.fixture
def needs() -> tuple[Need, ...]:
    return read_needs()


def test_windows_are_those_of_the_project(needs: tuple[Need, ...]) -> None:
    project = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["project"]
    windows = {canonicalize_name(r.name): r.specifier for r in map(Requirement, project["dependencies"])}
    assert len(needs) == 14
    for need in needs:
        assert Requirement(need.text).specifier == windows[need.key], need.name


def test_each_package_comes_by_its_own_way(needs: tuple[Need, ...]) -> None:
    by = {source: {need.name for need in needs if need.source == source} for source in ("slicer", "torch", "pip")}
    assert by["slicer"] == {"numpy", "scipy", "SimpleITK"}
    assert by["torch"] == {"torch"}
    names = "diffusers matplotlib nibabel peft psutil pydantic safetensors tokenizers transformers typer"
    assert by["pip"] == set(names.split())


@pytest.mark.parametrize("slicer_version", sorted(SLICERS))
def test_what_slicer_brings_fits(needs: tuple[Need, ...], slicer_version: str) -> None:
    windows = {need.key: need for need in needs}
    for name, version in SLICERS[slicer_version].items():
        assert windows[name].fits(version), (name, version)


def test_development_versions_count_by_their_number_and_nonsense_does_not_fit(needs: tuple[Need, ...]) -> None:
    itk = next(need for need in needs if need.name == "SimpleITK")
    torch = next(need for need in needs if need.name == "torch")
    assert itk.fits("2.5.0.dev12+gabc")
    assert not itk.fits("3.0")
    assert not itk.fits("unknown")
    assert torch.fits("2.9.1+cu128")
    assert not torch.fits("2.8.0")


@pytest.mark.slow
def test_a_worker_that_has_nothing_else_makes_proposals(needs: tuple[Need, ...]) -> None:
    """The real worker with the bundled model, in a process where every other package is refused."""
    command = alone([need.name for need in needs], "worker")
    rng = np.random.default_rng(1)
    with WorkerClient(command) as client:
        client.load(None, "cpu")
        client.set_image(rng.normal(40, 20, (1, 64, 64)).astype(np.float32), np.diag([4.0, 4.0, 4.0, 1.0]), "CT")
        events = list(client.propose(ProposeRequest(("liver",), proposals=2, steps=1)))
    assert isinstance(events[-1], DoneEvent)
