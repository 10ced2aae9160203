"""Installing step by step, and removing exactly what was installed: one question each, nothing of Slicer replaced."""

from __future__ import annotations

import platform
import shutil
import sys
import types
from collections.abc import Callable
from pathlib import Path
from subprocess import CalledProcessError
from typing import Any

import pytest

from ProGiDiffSlicerLib.setup.install import Installer, Ledger, Outcome, Remover, loaded_and_changed, plan_removal, size_text
from ProGiDiffSlicerLib.setup.settings import Settings
from ProGiDiffSlicerLib.setup.status import Need, PythonHome

from .setup_examples import MemoryStore, ScriptedTools, make_wheel, put_package

pytestmark = pytest.mark.usefixtures("app")
Spin = Callable[..., None]

NEEDS = (
    Need("numpy", ">=2.0,<3", "slicer"),
    Need("torch", ">=2.9,<3", "torch"),
    Need("diffusers", ">=0.42,<1", "pip"),
    Need("transformers", ">=5.0,<6", "pip"),
)
PREFIX = "/opt/Slicer"


class Desk:
    """An installer over a folder of packages, with tools that put packages there."""

    def __init__(
        self, folder: Path, spin: Spin, store: MemoryStore | None = None, tools: ScriptedTools | None = None
    ) -> None:
        self.folder = folder
        self.spin = spin
        self.store = MemoryStore() if store is None else store
        self.settings = Settings(self.store)
        self.tools = ScriptedTools() if tools is None else tools
        self.tools.torch_effect = lambda: self.put("torch", "2.9.1+cpu")
        self.tools.pip_effect = self._pip
        self.constraints = ""
        self.outcomes: list[Outcome] = []
        self.installer = Installer(
            self.settings,
            self.tools,
            PythonHome(PREFIX, [str(folder)], NEEDS),
        )
        self.installer.ended.connect(self.outcomes.append)

    def put(self, name: str, version: str, **options: Any) -> None:
        put_package(self.folder, name, version, **options)

    def _pip(self, arguments: list[str]) -> None:
        self.constraints = Path(arguments[arguments.index("--constraint") + 1]).read_text(encoding="utf-8")
        if self.tools.pip_code == 0:
            for requirement in arguments[: arguments.index("--constraint")]:
                name = requirement.partition(">")[0]
                self.put(name, {"torch": "2.10.0", "diffusers": "0.43.0", "transformers": "5.1.0"}[name])
            self.put("safetensors", "0.6.0")

    def install(self) -> Outcome:
        before = len(self.outcomes)
        self.installer.start()
        self.spin(lambda: len(self.outcomes) > before, 10)
        return self.outcomes[-1]

    def after_restart(self) -> Desk:
        """A new session of Slicer on the same computer."""
        return Desk(self.folder, self.spin, self.store)


@pytest.fixture
def desk(tmp_path: Path, spin: Spin) -> Desk:
    site = tmp_path / "site"
    put_package(site, "numpy", "2.0.2")
    put_package(site, "requests", "2.32.0")
    return Desk(site, spin)


def pip_arguments(tools: ScriptedTools) -> list[str]:
    return next(arguments for act, arguments in tools.log if act == "pip")


def test_everything_is_installed_after_one_question(desk: Desk) -> None:
    outcome = desk.install()
    assert outcome.kind == "done"
    assert outcome.message.startswith("Everything is installed: torch 2.9.1+cpu, diffusers 0.43.0")
    assert desk.tools.acts == ["ask", "torch", "pip"]
    assert desk.tools.log[0][1].splitlines() == ["torch>=2.9,<3", "diffusers>=0.42,<1", "transformers>=5.0,<6"]
    assert desk.tools.log[1][1] == ">=2.9,<3"
    question = desk.tools.questions[0]
    assert "torch>=2.9,<3, diffusers" in question
    assert "1 - 6 GB are downloaded" in question
    assert not desk.installer.running


def test_a_no_changes_nothing(desk: Desk) -> None:
    desk.tools.answer = False
    assert desk.install().kind == "declined"
    assert desk.tools.acts == ["ask"]
    assert desk.install().kind == "declined"
    assert desk.tools.acts == ["ask", "ask"], "another click asks again"


def test_making_an_installer_and_looking_ask_and_install_nothing(desk: Desk) -> None:
    assert not desk.installer.continues()
    assert desk.tools.acts == []


def test_pip_keeps_what_slicer_lives_on(desk: Desk) -> None:
    desk.put("SimpleITK", "2.4.0")
    desk.put("scipy", "1.13.1")
    desk.put("torchvision", "0.24.0")
    desk.put("pillow", "11.0")
    desk.install()
    assert sorted(desk.constraints.split()) == [
        "numpy==2.0.2",
        "requests==2.32.0",
        "scipy==1.13.1",
        "simpleitk==2.4.0",
        "torch==2.9.1+cpu",
        "torchvision==0.24.0",
    ]
    arguments = pip_arguments(desk.tools)
    assert arguments[:2] == ["diffusers>=0.42,<1", "transformers>=5.0,<6"]
    assert "--no-input" in arguments
    assert not Path(arguments[arguments.index("--constraint") + 1]).exists(), "the file of constraints is left behind"


def test_only_what_is_missing_is_installed(desk: Desk) -> None:
    desk.put("torch", "2.9.1")
    desk.put("diffusers", "0.42.1")
    desk.install()
    assert desk.tools.acts == ["ask", "pip"]
    assert [each for each in pip_arguments(desk.tools) if "torch" in each or "diffusers" in each] == []
    assert "0.1 GB" in desk.tools.questions[0]
    assert desk.install().kind == "done"
    assert desk.tools.acts == ["ask", "pip"], "nothing is asked when nothing is missing"


def test_another_version_is_replaced_only_after_saying_so(desk: Desk) -> None:
    desk.put("torch", "2.9.1")
    desk.put("diffusers", "0.42.1")
    desk.put("transformers", "4.57.0")
    desk.tools.answer = False
    desk.install()
    assert "replaced, which other extensions may notice: transformers 4.57.0." in desk.tools.questions[0]


def test_from_a_wheel_folder_nothing_goes_through_the_network(desk: Desk, tmp_path: Path) -> None:
    wheels = tmp_path / "Räder für Slicer"
    make_wheel(wheels, "torch", "2.10.0")
    desk.settings.wheelFolder = str(wheels)
    desk.tools.extension_loaded = False
    assert desk.install().kind == "done"
    assert desk.tools.acts == ["ask", "pip"]
    arguments = pip_arguments(desk.tools)
    assert arguments[0].startswith("torch")
    assert arguments[-3:] == ["--no-index", "--find-links", str(wheels)]
    assert "the network is not used" in desk.tools.questions[0]


@pytest.mark.parametrize("made", [False, True])
def test_a_wheel_folder_without_wheels_is_refused(desk: Desk, tmp_path: Path, made: bool) -> None:
    folder = tmp_path / "wheels"
    if made:
        folder.mkdir()
    desk.settings.wheelFolder = str(folder)
    outcome = desk.install()
    assert outcome.kind == "failed"
    assert ("holds no wheels" if made else "There is no folder") in outcome.message
    assert desk.tools.acts == []


def test_the_extension_first_then_a_restart_then_the_rest_without_another_question(desk: Desk) -> None:
    desk.tools.extension_loaded = False
    outcome = desk.install()
    assert outcome.kind == "restart"
    assert "restart Slicer and continue" in outcome.message
    assert desk.tools.acts == ["ask", "extension"]
    assert "PyTorch extension of Slicer, torch" in desk.tools.questions[0]
    assert "restarted once" in desk.tools.questions[0]

    again = desk.after_restart()
    assert again.installer.continues()
    assert again.tools.acts == [], "nothing goes on by itself"
    assert again.install().kind == "done"
    assert again.tools.acts == ["torch", "pip"]
    assert not again.installer.continues()


def test_an_extension_that_waits_for_a_restart_is_not_installed_again(desk: Desk) -> None:
    desk.tools.extension_loaded = False
    desk.tools.extension_waits = True
    assert desk.install().kind == "restart"
    assert desk.tools.acts == ["ask"]


def test_no_extension_to_be_had(desk: Desk) -> None:
    desk.tools.extension_loaded = False
    desk.tools.extension_installs = False
    outcome = desk.install()
    assert outcome.kind == "failed"
    assert "install it with the Extensions Manager, restart Slicer and press Install again" in outcome.message
    assert not desk.installer.continues()


def test_an_agreement_holds_for_what_was_agreed_to(desk: Desk, tmp_path: Path) -> None:
    """Another Slicer, another source, or more packages than were agreed to: it is asked again."""
    desk.tools.extension_loaded = False
    desk.install()
    elsewhere = desk.after_restart()
    elsewhere.installer._home.prefix = "/opt/Slicer-5.14"
    assert not elsewhere.installer.continues()
    assert elsewhere.install().kind == "done"
    assert elsewhere.tools.acts[0] == "ask"


def test_another_source_is_asked_about_again(desk: Desk, tmp_path: Path) -> None:
    desk.tools.extension_loaded = False
    desk.install()
    make_wheel(tmp_path / "wheels", "torch", "2.10.0")
    again = desk.after_restart()
    again.settings.wheelFolder = str(tmp_path / "wheels")
    assert again.install().kind == "done"
    assert again.tools.acts == ["ask", "pip"]


def test_files_in_use_are_a_restart_and_not_an_end(desk: Desk) -> None:
    desk.tools.pip_code = 1
    desk.tools.pip_lines = [
        "ERROR: Could not install packages due to an OSError: [WinError 5] Access is denied: '_core.pyd'"
    ]
    assert desk.install().kind == "restart"
    again = desk.after_restart()
    assert again.installer.continues()
    assert again.install().kind == "done"
    assert again.tools.acts == ["pip"], "torch is there already, and nothing is asked"


def test_what_another_extension_installed_is_not_replaced(desk: Desk) -> None:
    desk.put("torch", "2.5.1")
    outcome = desk.install()
    assert outcome.kind == "failed"
    assert outcome.message.startswith("torch 2.5.1 is installed for another extension, and >=2.9,<3 is needed; ")
    assert desk.tools.acts == []


def test_a_slicer_whose_own_libraries_do_not_fit(tmp_path: Path, spin: Spin) -> None:
    put_package(tmp_path, "numpy", "1.26.4")
    desk = Desk(tmp_path, spin)
    assert "comes with numpy 1.26.4" in desk.install().message
    assert "choose another Python" in desk.outcomes[-1].message
    bare = Desk(tmp_path / "bare", spin)
    assert "comes without numpy" in bare.install().message
    assert desk.tools.acts == bare.tools.acts == []


def test_damaged_torch_is_told_and_damaged_others_are_mended(desk: Desk) -> None:
    desk.put("torch", "2.9.1", code=None)
    assert "torch is damaged; uninstall it with the PyTorch Utils module" in desk.install().message
    (desk.folder / "torch").mkdir()
    (desk.folder / "torch" / "__init__.py").touch()
    desk.put("diffusers", "0.42.0", code=None)

    def uninstall(names: list[str]) -> None:
        for file in (desk.folder / "diffusers-0.42.0.dist-info").iterdir():
            file.unlink()
        (desk.folder / "diffusers-0.42.0.dist-info").rmdir()

    desk.tools.uninstall_effect = uninstall
    assert desk.install().kind == "done"
    assert desk.tools.acts == ["ask", "uninstall", "pip"]
    assert desk.tools.log[1][1] == ["diffusers"]


def test_torch_that_cannot_be_had_is_told_by_pips_last_line(desk: Desk) -> None:
    def fail() -> None:
        print("Collecting torch")
        raise CalledProcessError(1, "pip")

    desk.tools.torch_effect = fail
    desk.tools.answers = [True, False] * 3
    outcome = desk.install()
    assert outcome.kind == "failed"
    assert desk.tools.acts == ["ask", "torch", "ask"], "pip is not asked for the rest"

    def refuse() -> None:
        raise ValueError("Failed to get computation backend.")

    desk.tools.torch_effect = refuse
    assert desk.install().message.startswith("The PyTorch extension failed: ValueError: Failed to get computation backend;")
    desk.tools.torch_effect = lambda: None
    assert "The PyTorch extension failed: it did not install torch;" in desk.install().message


def test_pip_is_the_second_way_to_torch_where_its_own_server_is_blocked(desk: Desk) -> None:
    def blocked() -> None:
        raise TypeError("build_source() missing 1 required keyword-only argument: 'project_name'")

    desk.tools.torch_effect = blocked
    desk.tools.answers = [True, False]
    assert desk.install().message.startswith("The package server cannot be reached; ")
    desk.tools.answers = [True, True]
    assert desk.install().kind == "done"
    assert desk.tools.acts[3:] == ["ask", "torch", "ask", "pip"]
    assert pip_arguments(desk.tools)[:3] == ["torch>=2.9,<3", "diffusers>=0.42,<1", "transformers>=5.0,<6"]
    assert "its usual build of torch" in desk.tools.questions[-1]
    assert "cannot be reached" in desk.tools.questions[-1]


def test_a_full_disk_is_not_asked_about_a_second_way(desk: Desk) -> None:
    def full() -> None:
        raise OSError("[Errno 28] No space left on device")

    desk.tools.torch_effect = full
    assert desk.install().message.startswith("The disk is full")
    assert desk.tools.acts == ["ask", "torch"]


def test_pip_itself_may_change_and_the_question_says_so(desk: Desk, tmp_path: Path) -> None:
    desk.tools.answer = False
    desk.install()
    assert "are not changed, but for pip itself, which the PyTorch extension may replace" in desk.tools.questions[-1]
    make_wheel(tmp_path / "wheels", "torch", "2.10.0")
    desk.settings.wheelFolder = str(tmp_path / "wheels")
    desk.install()
    assert "are not changed.\n" in desk.tools.questions[-1]


def test_a_slicer_for_intel_macs_points_to_another_python(
    desk: Desk, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(sys, "platform", "darwin")
    monkeypatch.setattr(platform, "machine", lambda: "x86_64")
    outcome = desk.install()
    assert outcome.kind == "failed"
    assert outcome.message.startswith("There is no torch >=2.9,<3 for a Slicer that is built for Intel Macs; choose Another")
    assert desk.tools.acts == []
    make_wheel(tmp_path / "wheels", "torch", "2.10.0")
    desk.settings.wheelFolder = str(tmp_path / "wheels")
    assert desk.install().kind == "done", "who has built torch can use it"
    desk.settings.wheelFolder = ""
    monkeypatch.setattr(platform, "machine", lambda: "arm64")
    assert desk.install().kind == "done"


def test_torch_that_is_there_but_cannot_be_loaded_here_is_enough(desk: Desk) -> None:
    """The PyTorch extension imports what it has installed; this process need not be able to."""

    def install() -> None:
        desk.put("torch", "2.9.1")
        raise ImportError("DLL load failed")

    desk.tools.torch_effect = install
    assert desk.install().kind == "done"


def test_a_failure_is_one_sentence_and_the_account_is_kept(desk: Desk) -> None:
    desk.tools.pip_code = 1
    desk.tools.pip_lines = ["Collecting diffusers", "ERROR: Could not install packages: [Errno 28] No space left on device"]
    outcome = desk.install()
    assert outcome.kind == "failed"
    assert outcome.message == "The disk is full; free some space (up to 6 GB are needed) and press Install again."
    assert outcome.details.splitlines()[-2:] == desk.tools.pip_lines
    assert Ledger(desk.settings, PREFIX).packages() == {"torch": "2.9.1+cpu"}


def test_pip_that_claims_success_is_not_believed(desk: Desk) -> None:
    desk.tools.pip_effect = lambda arguments: None
    outcome = desk.install()
    assert outcome.kind == "failed"
    assert "pip reported no error, but diffusers, transformers cannot be found" in outcome.message


def test_the_worker_is_stopped_before_and_not_at_a_no(desk: Desk) -> None:
    told: list[list[str]] = []
    desk.installer.starting.connect(lambda: told.append(list(desk.tools.acts)))
    desk.tools.answer = False
    desk.install()
    assert told == []
    desk.tools.answer = True
    desk.install()
    assert told == [["ask", "ask"]]


def test_a_second_click_while_it_runs_does_nothing(desk: Desk) -> None:
    desk.installer.start()
    desk.installer.start()
    desk.spin(lambda: bool(desk.outcomes), 10)
    assert desk.tools.acts == ["ask", "torch", "pip"]


def test_a_panel_that_goes_away_leaves_no_further_step(desk: Desk) -> None:
    desk.installer.start()
    desk.installer.abandon()
    desk.spin(lambda: not desk.installer.running, 10)
    assert desk.tools.acts == ["ask", "torch"], "the step that had begun ends, no other begins"
    assert desk.outcomes == []
    assert Ledger(desk.settings, PREFIX).packages() == {"torch": "2.9.1+cpu"}


def test_the_account_holds_only_what_was_not_there_before(desk: Desk) -> None:
    desk.put("transformers", "4.57.0")
    desk.install()
    noted = Ledger(desk.settings, PREFIX).packages()
    assert noted == {"torch": "2.9.1+cpu", "diffusers": "0.43.0", "safetensors": "0.6.0"}


def test_packages_that_slicer_has_loaded_in_another_version_are_named(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    put_package(tmp_path, "loadedthing", "2.0")
    put_package(tmp_path, "restingthing", "2.0")
    for name in ("loadedthing", "restingthing"):
        (tmp_path / f"{name}-2.0.dist-info" / "top_level.txt").write_text(name)
    monkeypatch.syspath_prepend(str(tmp_path))
    monkeypatch.setitem(sys.modules, "loadedthing", types.ModuleType("loadedthing"))
    after = {"loadedthing": "2.0", "restingthing": "2.0"}
    assert loaded_and_changed({"loadedthing": "1.0", "restingthing": "1.0"}, after) == ("loadedthing",)
    assert loaded_and_changed({"loadedthing": "2.0"}, after) == ()


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
