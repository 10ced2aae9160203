"""What the worker needs: the list that ships agrees with the project, suffices, and fits the Slicers it is meant for."""

from __future__ import annotations

import tomllib
from pathlib import Path

import numpy as np
import pytest
from packaging.requirements import Requirement
from packaging.utils import canonicalize_name
from Testing.alone import alone

from progidiff.wire.client import WorkerClient
from progidiff.wire.messages import DoneEvent, ProposeRequest
from ProGiDiffSlicerLib.setup.requirements import Need, read_needs

pytestmark = pytest.mark.usefixtures("app")
ROOT = Path(__file__).resolve().parents[2]

# numpy and scipy as Slicer's own build files pin them.
SLICERS = {"5.10": {"numpy": "2.0.2", "scipy": "1.13.1"}, "5.12": {"numpy": "2.4.6", "scipy": "1.17.1"}}


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
