"""The same code with a real pip in an environment of its own: offline, held versions, and away again."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import slicer

from ProGiDiffSlicerLib.setup.install import Installer, Ledger, Outcome, Remover
from ProGiDiffSlicerLib.setup.settings import Settings
from ProGiDiffSlicerLib.setup.status import Need, PythonHome
from ProGiDiffSlicerLib.setup.tools import Tools

from .setup_examples import MemoryStore, ScratchPython, make_wheel, put_package

pytestmark = pytest.mark.usefixtures("app")
Spin = Callable[..., None]

NEEDS = (Need("numpy", ">=2.0,<3", "slicer"), Need("torch", ">=2.9,<3", "torch"), Need("alpha", ">=1.0", "pip"))


class Yes(Tools):
    """Slicer's tools with the scratch environment's pip behind them; every question is answered with yes."""

    def __init__(self, python: ScratchPython) -> None:
        super().__init__()
        if self._packaging is not None:  # not in Slicer 5.10
            self._packaging = python
        self.questions: list[str] = []

    def ask(self, title: str, text: str, details: str) -> bool:
        self.questions.append(text)
        return True


class Bench:
    def __init__(self, folder: Path, spin: Spin) -> None:
        self.python = ScratchPython(folder / "python é")
        self.wheels = folder / "wheels"
        self.spin = spin
        self.settings = Settings(MemoryStore())
        self.settings.wheelFolder = str(self.wheels)
        self.tools = Yes(self.python)
        home = PythonHome(self.python.prefix, [str(self.python.site)], NEEDS)
        self.installed = home.versions
        self.outcomes: list[Outcome] = []
        self.installer = Installer(self.settings, self.tools, home)
        self.remover = Remover(self.settings, self.tools, home)
        self.installer.ended.connect(self.outcomes.append)
        self.remover.ended.connect(self.outcomes.append)

    def have(self, name: str, version: str, requires: tuple[str, ...] = ()) -> None:
        """A package that was there before."""
        wheel = make_wheel(self.wheels.parent / "before", name, version, requires)
        assert self.python.pip("install", "--no-index", "--no-deps", str(wheel)).returncode == 0

    def end_of(self, start: Callable[[], None]) -> Outcome:
        before = len(self.outcomes)
        start()
        self.spin(lambda: len(self.outcomes) > before)
        return self.outcomes[-1]


@pytest.fixture
def bench(tmp_path: Path, spin: Spin, monkeypatch: pytest.MonkeyPatch, request: pytest.FixtureRequest) -> Any:
    is_old = "slicer_version" in request.fixturenames and request.getfixturevalue("slicer_version") == "5.10"
    monkeypatch.setattr(slicer, "app", SimpleNamespace(testingEnabled=lambda: False, extensionsManagerModel=lambda: None))
    bench = Bench(tmp_path, spin)
    if is_old:
        monkeypatch.setattr(slicer.util, "pip_install", bench.python.install_and_wait)
        monkeypatch.setattr(slicer.util, "pip_uninstall", bench.python.uninstall_and_wait)
    put_package(bench.python.site, "numpy", "2.0.2")
    for name, version, requires in (
        ("torch", "2.10.0", ()),
        ("alpha", "1.5", ("beta", "numpy")),
        ("beta", "1.0", ()),
        ("numpy", "2.4.6", ()),
    ):
        make_wheel(bench.wheels, name, version, requires)
    return bench


@pytest.mark.slow
@pytest.mark.usefixtures("slicer_version")
def test_offline_there_and_away_again(bench: Bench) -> None:
    outcome = bench.end_of(bench.installer.start)
    assert outcome.kind == "done", outcome
    assert bench.installed() == {"numpy": "2.0.2", "torch": "2.10.0", "alpha": "1.5", "beta": "1.0"}
    assert Ledger(bench.settings, bench.python.prefix).packages() == {"torch": "2.10.0", "alpha": "1.5", "beta": "1.0"}
    assert len(bench.python.calls) == len(bench.tools.questions) == 1

    bench.have("othertool", "1.0", ("beta",))
    outcome = bench.end_of(bench.remover.start)
    assert outcome.kind == "done", outcome
    assert bench.installed() == {"numpy": "2.0.2", "beta": "1.0", "othertool": "1.0"}
    assert "beta stays: othertool needs it" in outcome.details
    assert sorted(path.name for path in bench.wheels.iterdir()) == [
        "alpha-1.5-py3-none-any.whl",
        "beta-1.0-py3-none-any.whl",
        "numpy-2.4.6-py3-none-any.whl",
        "torch-2.10.0-py3-none-any.whl",
    ], "the wheel folder is the user's"


@pytest.mark.slow
def test_a_package_that_needs_another_numpy_does_not_get_it(bench: Bench) -> None:
    make_wheel(bench.wheels, "alpha", "1.5", ("numpy>=2.3",))
    outcome = bench.end_of(bench.installer.start)
    assert outcome.kind == "failed"
    assert "do not go together with what is needed (numpy==2.0.2)" in outcome.message
    assert bench.installed() == {"numpy": "2.0.2"}


@pytest.mark.slow
def test_a_wheel_that_is_not_in_the_folder(bench: Bench) -> None:
    next(bench.wheels.glob("beta-*")).unlink()
    outcome = bench.end_of(bench.installer.start)
    assert outcome.kind == "failed"
    assert outcome.message.startswith("The wheel folder has no beta for Python")
    assert bench.installed() == {"numpy": "2.0.2"}
    make_wheel(bench.wheels, "beta", "1.0")
    assert bench.end_of(bench.installer.start).kind == "done"


@pytest.mark.slow
def test_a_wheel_that_was_cut_off_while_copying(bench: Bench) -> None:
    wheel = next(bench.wheels.glob("torch-*"))
    wheel.write_bytes(wheel.read_bytes()[:100])
    outcome = bench.end_of(bench.installer.start)
    assert outcome.kind == "failed"
    assert "\n" not in outcome.message
    assert "torch" in outcome.message
    assert outcome.message.endswith("choose another Python for the worker.")


@pytest.mark.slow
def test_damaged_files_are_mended(bench: Bench) -> None:
    bench.have("alpha", "1.0")
    (bench.python.site / "alpha" / "__init__.py").unlink()
    for cache in (bench.python.site / "alpha").glob("__pycache__/*"):
        cache.unlink()
    outcome = bench.end_of(bench.installer.start)
    assert outcome.kind == "done", outcome
    assert bench.installed()["alpha"] == "1.5"
