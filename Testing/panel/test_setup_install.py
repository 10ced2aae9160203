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

    def __init__(self, folder: Path, spin: Spin, store: MemoryStore | None = None) -> None:
        self.folder = folder
        self.spin = spin
        self.store = MemoryStore() if store is None else store
        self.settings = Settings(self.store)
        self.tools = ScriptedTools()
        self.tools.torch_effect = lambda: self.put("torch", "2.9.1+cpu")
        self.tools.pip_effect = self._pip
        self.tools.uninstall_effect = lambda names: [self.take(name) for name in names]
        self.constraints = ""
        self.outcomes: list[Outcome] = []
        self.home = PythonHome(PREFIX, [str(folder)], NEEDS)
        self.installer = Installer(self.settings, self.tools, self.home)
        self.remover = Remover(self.settings, self.tools, self.home)
        self.installer.ended.connect(self.outcomes.append)
        self.remover.ended.connect(self.outcomes.append)

    def put(self, name: str, version: str, **options: Any) -> None:
        put_package(self.folder, name, version, **options)

    def take(self, name: str) -> None:
        for info in self.folder.glob(f"{name}-*.dist-info"):
            shutil.rmtree(info)

    @property
    def ledger(self) -> Ledger:
        """The account of what was installed."""
        return Ledger(self.settings, PREFIX)

    def bring(self, name: str, version: str = "1.0", requires: tuple[str, ...] = (), size: int = 0) -> None:
        """A package that was installed from here."""
        self.put(name, version, requires=requires, size=size)
        self.ledger.add({name: version})

    def fail(self, *lines: str) -> None:
        """Let pip fail, with this output."""
        self.tools.pip_code, self.tools.pip_lines = 1, list(lines)

    def use_wheels(self, folder: Path) -> None:
        make_wheel(folder, "torch", "2.10.0")
        self.settings.wheelFolder = str(folder)

    def remove(self) -> Outcome:
        self.remover.start()
        return self.outcomes[-1]

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
    stopped: list[list[str]] = []
    desk.installer.starting.connect(lambda: stopped.append(list(desk.tools.acts)))
    assert not desk.installer.continues()
    outcome = desk.install()
    assert outcome.kind == "done"
    assert outcome.message.startswith("Everything is installed: torch 2.9.1+cpu, diffusers 0.43.0")
    assert desk.tools.acts == ["ask", "torch", "pip"]
    assert stopped == [["ask"]], "the worker is stopped before anything is installed"
    assert desk.tools.log[0][1].splitlines() == ["torch>=2.9,<3", "diffusers>=0.42,<1", "transformers>=5.0,<6"]
    assert desk.tools.log[1][1] == ">=2.9,<3"
    question = desk.tools.questions[0]
    assert "torch>=2.9,<3, diffusers" in question
    assert "1 - 6 GB are downloaded" in question
    assert "are not changed, but for pip itself, which the PyTorch extension may replace" in question


def test_a_no_changes_nothing(desk: Desk) -> None:
    stopped: list[bool] = []
    desk.installer.starting.connect(lambda: stopped.append(True))
    desk.tools.answer = False
    assert desk.install().kind == "declined"
    assert desk.install().kind == "declined"
    assert desk.tools.acts == ["ask", "ask"], "another click asks again"
    assert stopped == []


def test_pip_keeps_what_slicer_lives_on(desk: Desk) -> None:
    for name, version in (("SimpleITK", "2.4.0"), ("scipy", "1.13.1"), ("torchvision", "0.24.0"), ("pillow", "11.0")):
        desk.put(name, version)
    desk.install()
    held = "numpy==2.0.2 requests==2.32.0 scipy==1.13.1 simpleitk==2.4.0 torch==2.9.1+cpu torchvision==0.24.0"
    assert sorted(desk.constraints.split()) == held.split()
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
    desk.use_wheels(wheels)
    desk.tools.extension_loaded = False
    assert desk.install().kind == "done"
    assert desk.tools.acts == ["ask", "pip"]
    arguments = pip_arguments(desk.tools)
    assert arguments[0].startswith("torch")
    assert arguments[-3:] == ["--no-index", "--find-links", str(wheels)]
    assert "the network is not used" in desk.tools.questions[0]
    assert "are not changed.\n" in desk.tools.questions[0]


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


@pytest.mark.parametrize("source", ["another Slicer", "a wheel folder"])
def test_an_agreement_holds_for_what_was_agreed_to(desk: Desk, tmp_path: Path, source: str) -> None:
    """Another Slicer or another source than was agreed to: it is asked again."""
    desk.tools.extension_loaded = False
    desk.install()
    again = desk.after_restart()
    if source == "another Slicer":
        again.home.prefix = "/opt/Slicer-5.14"
        assert not again.installer.continues()
    else:
        again.use_wheels(tmp_path / "wheels")
    assert again.install().kind == "done"
    assert again.tools.acts[0] == "ask"


def test_files_in_use_are_a_restart_and_not_an_end(desk: Desk) -> None:
    desk.fail("ERROR: Could not install packages due to an OSError: [WinError 5] Access is denied: '_core.pyd'")
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


def test_a_slicer_for_intel_macs_points_to_another_python(
    desk: Desk, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(sys, "platform", "darwin")
    monkeypatch.setattr(platform, "machine", lambda: "x86_64")
    outcome = desk.install()
    assert outcome.kind == "failed"
    assert outcome.message.startswith("There is no torch >=2.9,<3 for a Slicer that is built for Intel Macs; choose Another")
    assert desk.tools.acts == []
    desk.use_wheels(tmp_path / "wheels")
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


def test_a_failure_keeps_its_details_and_the_account(desk: Desk) -> None:
    desk.fail("Collecting diffusers", "ERROR: Could not install packages: [Errno 28] No space left on device")
    outcome = desk.install()
    assert outcome.kind == "failed"
    assert outcome.details.splitlines()[-2:] == desk.tools.pip_lines
    assert desk.ledger.packages() == {"torch": "2.9.1+cpu"}


def test_pip_that_claims_success_is_not_believed(desk: Desk) -> None:
    desk.tools.pip_effect = lambda arguments: None
    outcome = desk.install()
    assert outcome.kind == "failed"
    assert "pip reported no error, but diffusers, transformers cannot be found" in outcome.message


def test_a_panel_that_goes_away_leaves_no_further_step(desk: Desk) -> None:
    desk.installer.start()
    desk.installer.start()
    desk.installer.abandon()
    desk.spin(lambda: not desk.installer.running, 10)
    assert desk.tools.acts == ["ask", "torch"], (
        "the step that had begun ends, no other begins, and a second click does nothing"
    )
    assert desk.outcomes == []
    assert desk.ledger.packages() == {"torch": "2.9.1+cpu"}


def test_the_account_holds_only_what_was_not_there_before(desk: Desk) -> None:
    desk.put("transformers", "4.57.0")
    desk.install()
    assert desk.ledger.packages() == {"torch": "2.9.1+cpu", "diffusers": "0.43.0", "safetensors": "0.6.0"}


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


def test_one_slicers_account_is_not_anothers(desk: Desk) -> None:
    other = Ledger(desk.settings, "/opt/Slicer-5.14")
    desk.ledger.add({"torch": "2.9"})
    other.add({"torch": "2.10"})
    desk.ledger.add({"diffusers": "0.43"})
    other.keep_only({})
    assert other.packages() == {}
    assert desk.ledger.packages() == {"torch": "2.9", "diffusers": "0.43"}


def test_what_somebody_else_needs_stays_with_all_that_it_needs_in_turn(desk: Desk) -> None:
    desk.bring("torch", requires=("sympy>=1",))
    desk.bring("sympy", requires=("mpmath",))
    desk.bring("mpmath")
    desk.bring("diffusers", requires=("torch; extra == 'torch'",), size=2_000_000)
    desk.put("othertool", "1.0", requires=("Torch",))
    removal = plan_removal(desk.ledger, desk.home)
    assert removal.packages == ("diffusers",)
    assert removal.kept == ("mpmath stays: sympy needs it", "sympy stays: torch needs it", "torch stays: othertool needs it")
    assert 2_000_000 < removal.size < 2_010_000


def test_an_option_or_another_systems_need_does_not_hold(desk: Desk) -> None:
    desk.bring("torch")
    desk.put("othertool", "1.0", requires=("torch; extra == 'gpu'", "torch; sys_platform == 'plan9'", "???"))
    assert plan_removal(desk.ledger, desk.home).packages == ("torch",)


def test_what_was_changed_since_or_is_gone_or_is_slicers_own_is_not_touched(desk: Desk) -> None:
    desk.bring("transformers", "5.0")
    desk.take("transformers")
    desk.put("transformers", "5.9")
    desk.ledger.add({"vanished": "1.0", "numpy": "2.0.2", "requests": "2.32.0"})
    for name in ("simpleitk", "pip"):
        desk.bring(name)
    removal = plan_removal(desk.ledger, desk.home)
    assert removal.packages == ()
    assert "transformers stays: it was changed to 5.9 since" in removal.kept


def test_it_says_how_much_asks_once_and_removes(desk: Desk) -> None:
    desk.bring("diffusers", size=3_000_000)
    desk.bring("torch")
    desk.put("othertool", "1.0", requires=("torch",))
    stopped: list[list[str]] = []
    desk.remover.starting.connect(lambda: stopped.append(desk.tools.acts))
    assert desk.remover.possible()
    assert desk.remove().message == "Removed packages: 1, 3.0 MB in all."
    assert desk.tools.log == [("ask", "diffusers\ntorch stays: othertool needs it"), ("uninstall", ["diffusers"])]
    assert stopped == [["ask"]]
    assert "packages: 1, size: 3.0 MB" in desk.tools.questions[0]
    assert desk.ledger.packages() == {"torch": "1.0"}, "what stays is still accounted for"
    assert "diffusers" not in desk.home.versions()
    assert desk.home.versions()["torch"] == "1.0"


def test_a_no_removes_nothing_and_nothing_to_remove_is_not_asked_about(desk: Desk) -> None:
    assert not desk.remover.possible()
    assert desk.remove().message.startswith("There is nothing to remove")
    assert desk.tools.acts == []
    desk.bring("diffusers")
    desk.tools.answer = False
    assert desk.remove().kind == "declined"
    assert desk.tools.acts == ["ask"]
    assert desk.ledger.packages() == {"diffusers": "1.0"}


def test_a_removal_that_fails_half_way_keeps_the_rest_on_the_account(desk: Desk) -> None:
    desk.bring("diffusers")
    desk.bring("transformers")
    desk.tools.uninstall_effect = lambda names: desk.take("diffusers")
    desk.fail("PermissionError: [WinError 5] Access is denied: 'tokenizers.pyd'")
    outcome = desk.remove()
    assert outcome.kind == "failed"
    assert "restart Slicer" in outcome.message
    assert desk.ledger.packages() == {"transformers": "1.0"}


def test_sizes_as_a_person_reads_them() -> None:
    assert [size_text(size) for size in (0, 2_340_000, 5_400_000_000)] == ["0.0 MB", "2.3 MB", "5.4 GB"]
