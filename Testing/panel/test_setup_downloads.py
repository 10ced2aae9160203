"""Removing: exactly what the Install button brought, and nothing that somebody else has come to need."""

from __future__ import annotations

import shutil
from pathlib import Path

import pytest

from ProGiDiffSlicerLib.setup.install import Ledger, Outcome, Remover, plan_removal, size_text
from ProGiDiffSlicerLib.setup.settings import Settings
from ProGiDiffSlicerLib.setup.status import PythonHome

from .setup_examples import MemoryStore, ScriptedTools, put_package

pytestmark = pytest.mark.usefixtures("app")

PREFIX = "/opt/Slicer"


@pytest.fixture
def settings() -> Settings:
    return Settings(MemoryStore())


@pytest.fixture
def ledger(settings: Settings) -> Ledger:
    return Ledger(settings, PREFIX)


def home(site: Path) -> PythonHome:
    return PythonHome(PREFIX, [str(site)])


def brought(
    ledger: Ledger, site: Path, name: str, version: str = "1.0", requires: tuple[str, ...] = (), size: int = 0
) -> None:
    put_package(site, name, version, requires, size=size)
    ledger.add({name: version})


def test_one_slicers_account_is_not_anothers(settings: Settings, ledger: Ledger) -> None:
    other = Ledger(settings, "/opt/Slicer-5.14")
    ledger.add({"torch": "2.9"})
    other.add({"torch": "2.10"})
    ledger.add({"diffusers": "0.43"})
    assert ledger.packages() == {"torch": "2.9", "diffusers": "0.43"}
    other.keep_only({})
    assert other.packages() == {}
    assert ledger.packages() == {"torch": "2.9", "diffusers": "0.43"}


def test_what_was_not_brought_stays(ledger: Ledger, tmp_path: Path) -> None:
    put_package(tmp_path, "pydantic", "2.12")
    brought(ledger, tmp_path, "diffusers", size=2_000_000)
    removal = plan_removal(ledger, home(tmp_path))
    assert removal.packages == ("diffusers",)
    assert 2_000_000 < removal.size < 2_010_000
    text, details = removal.question()
    assert "packages: 1, size: 2.0 MB" in text
    assert details == "diffusers"


def test_what_somebody_else_needs_stays_with_all_that_it_needs_in_turn(ledger: Ledger, tmp_path: Path) -> None:
    brought(ledger, tmp_path, "torch", requires=("sympy>=1",))
    brought(ledger, tmp_path, "sympy", requires=("mpmath",))
    brought(ledger, tmp_path, "mpmath")
    brought(ledger, tmp_path, "diffusers", requires=("torch; extra == 'torch'",))
    put_package(tmp_path, "othertool", "1.0", requires=("Torch",))
    removal = plan_removal(ledger, home(tmp_path))
    assert removal.packages == ("diffusers",)
    assert removal.kept == ("mpmath stays: sympy needs it", "sympy stays: torch needs it", "torch stays: othertool needs it")


def test_an_option_or_another_systems_need_does_not_hold(ledger: Ledger, tmp_path: Path) -> None:
    brought(ledger, tmp_path, "torch")
    put_package(tmp_path, "othertool", "1.0", requires=("torch; extra == 'gpu'", "torch; sys_platform == 'plan9'", "???"))
    assert plan_removal(ledger, home(tmp_path)).packages == ("torch",)


def test_what_was_changed_since_or_is_gone_is_not_touched(ledger: Ledger, tmp_path: Path) -> None:
    brought(ledger, tmp_path, "transformers", "5.0")
    shutil.rmtree(tmp_path / "transformers-5.0.dist-info")
    put_package(tmp_path, "transformers", "5.9")
    ledger.add({"vanished": "1.0"})
    removal = plan_removal(ledger, home(tmp_path))
    assert removal.packages == ()
    assert removal.kept == ("transformers stays: it was changed to 5.9 since",)


def test_slicers_own_libraries_stay_even_if_noted(ledger: Ledger, tmp_path: Path) -> None:
    for name in ("numpy", "simpleitk", "requests", "pip"):
        brought(ledger, tmp_path, name)
    assert plan_removal(ledger, home(tmp_path)).packages == ()


class Bench:
    def __init__(self, settings: Settings, site: Path) -> None:
        self.tools = ScriptedTools()
        self.outcomes: list[Outcome] = []
        self.remover = Remover(settings, self.tools, home(site))
        self.remover.ended.connect(self.outcomes.append)

        def uninstall(names: list[str]) -> None:
            for name in names:
                shutil.rmtree(site / f"{name}-1.0.dist-info")

        self.tools.uninstall_effect = uninstall


def test_it_says_how_much_asks_once_and_removes(settings: Settings, ledger: Ledger, tmp_path: Path) -> None:
    brought(ledger, tmp_path, "diffusers", size=3_000_000)
    brought(ledger, tmp_path, "torch")
    put_package(tmp_path, "othertool", "1.0", requires=("torch",))
    bench = Bench(settings, tmp_path)
    stopped: list[list[str]] = []
    bench.remover.starting.connect(lambda: stopped.append(bench.tools.acts))
    assert bench.remover.possible()
    bench.remover.start()
    assert bench.tools.log == [("ask", "diffusers\ntorch stays: othertool needs it"), ("uninstall", ["diffusers"])]
    assert stopped == [["ask"]]
    assert "3.0 MB" in bench.tools.questions[0]
    assert bench.outcomes[-1].message == "Removed packages: 1, 3.0 MB in all."
    assert ledger.packages() == {"torch": "1.0"}, "what stays is still accounted for"
    assert home(tmp_path).versions() == {"othertool": "1.0", "torch": "1.0"}


def test_a_no_removes_nothing(settings: Settings, ledger: Ledger, tmp_path: Path) -> None:
    brought(ledger, tmp_path, "diffusers")
    bench = Bench(settings, tmp_path)
    bench.tools.answer = False
    bench.remover.start()
    assert bench.tools.acts == ["ask"]
    assert bench.outcomes[-1].kind == "declined"
    assert ledger.packages() == {"diffusers": "1.0"}


def test_nothing_to_remove_is_not_asked_about(settings: Settings, ledger: Ledger, tmp_path: Path) -> None:
    bench = Bench(settings, tmp_path)
    assert not bench.remover.possible()
    bench.remover.start()
    assert bench.tools.acts == []
    assert bench.outcomes[-1].message.startswith("There is nothing to remove")


def test_a_removal_that_fails_half_way_keeps_the_rest_on_the_account(
    settings: Settings, ledger: Ledger, tmp_path: Path
) -> None:
    brought(ledger, tmp_path, "diffusers")
    brought(ledger, tmp_path, "transformers")
    bench = Bench(settings, tmp_path)
    bench.tools.uninstall_effect = lambda names: shutil.rmtree(tmp_path / "diffusers-1.0.dist-info")
    bench.tools.pip_code = 1
    bench.tools.pip_lines = ["PermissionError: [WinError 5] Access is denied: 'tokenizers.pyd'"]
    bench.remover.start()
    assert bench.outcomes[-1].kind == "failed"
    assert "restart Slicer" in bench.outcomes[-1].message
    assert ledger.packages() == {"transformers": "1.0"}


def test_sizes_as_a_person_reads_them() -> None:
    assert [size_text(size) for size in (0, 2_340_000, 5_400_000_000)] == ["0.0 MB", "2.3 MB", "5.4 GB"]
