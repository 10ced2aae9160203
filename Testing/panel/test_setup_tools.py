"""What is asked of Slicer 5.12 (``slicer.packaging``) and of Slicer 5.10 (``slicer.util`` alone)."""

from __future__ import annotations

import sys
import types
from collections.abc import Iterator
from subprocess import CalledProcessError
from types import SimpleNamespace
from typing import Any

import pytest
import slicer

from ProGiDiffSlicerLib.setup.tools import Tools, lines_of_stdout

from .. import slicer_host as host

pytestmark = pytest.mark.usefixtures("app")


class Told:
    """What the tools told."""

    def __init__(self) -> None:
        self.lines: list[str] = []
        self.codes: list[int] = []


@pytest.fixture
def told() -> Told:
    return Told()


@pytest.fixture
def application(monkeypatch: pytest.MonkeyPatch) -> SimpleNamespace:
    """Slicer's application, not in testing mode; some Slicers are built without extensions."""
    app = SimpleNamespace(testing=False)
    app.testingEnabled = lambda: app.testing
    monkeypatch.setattr(slicer, "app", app)
    return app


@pytest.fixture
def packaging(monkeypatch: pytest.MonkeyPatch, application: SimpleNamespace) -> Any:
    """The module of Slicer 5.12, noting its calls."""
    module: Any = types.ModuleType("slicer.packaging")
    module.calls = []

    def pip_install(
        requirements: list[str], constraints: Any = None, blocking: bool = True, show_progress: bool = True, **rest: Any
    ) -> None:
        module.calls.append((requirements, blocking, show_progress, set(rest)))
        rest["logCallback"]("Collecting")
        rest["completedCallback"](0)

    def pip_uninstall(
        requirements: list[str], blocking: bool = True, logCallback: Any = None, completedCallback: Any = None
    ) -> None:
        module.calls.append((requirements, blocking))
        completedCallback(0)

    module.pip_install, module.pip_uninstall = pip_install, pip_uninstall
    monkeypatch.setitem(sys.modules, "slicer.packaging", module)
    monkeypatch.setattr(slicer, "packaging", module, raising=False)
    return module


@pytest.fixture
def old_slicer(monkeypatch: pytest.MonkeyPatch, application: SimpleNamespace) -> Iterator[Any]:
    """Slicer 5.10: pip blocks and prints; there is no ``slicer.packaging``."""
    calls: list[Any] = []

    def pip(requirements: list[str]) -> None:
        assert isinstance(requirements, list)
        calls.append(requirements)
        print("Collecting diffusers\nERROR: no luck")
        if "bad" in requirements:
            raise CalledProcessError(2, "pip")

    with host.as_version("5.10"):
        monkeypatch.setattr(slicer.util, "pip_install", pip)
        monkeypatch.setattr(slicer.util, "pip_uninstall", pip)
        yield calls


def test_the_newer_slicer_does_not_block(packaging: Any, told: Told) -> None:
    tools = Tools()
    tools.pip_install(["diffusers>=0.42,<1"], told.lines.append, told.codes.append)
    assert packaging.calls == [(["diffusers>=0.42,<1"], False, False, {"logCallback", "completedCallback"})]
    assert (told.lines, told.codes) == (["Collecting"], [0])
    tools.pip_uninstall(["diffusers"], told.lines.append, told.codes.append)
    assert packaging.calls[-1] == (["diffusers"], False)


def test_an_installation_of_somebody_else_is_a_failure_and_not_an_exception(packaging: Any, told: Told) -> None:
    def busy(*args: Any, **rest: Any) -> None:
        raise RuntimeError("A non-blocking pip_install is already in progress.")

    packaging.pip_install = busy
    Tools().pip_install(["diffusers"], told.lines.append, told.codes.append)
    assert (told.lines, told.codes) == (["A non-blocking pip_install is already in progress."], [1])


def test_the_older_slicer_tells_what_pip_printed(old_slicer: Any, told: Told, capsys: pytest.CaptureFixture[str]) -> None:
    tools = Tools()
    tools.pip_install(["diffusers"], told.lines.append, told.codes.append)
    assert (told.lines, told.codes) == (["Collecting diffusers", "ERROR: no luck"], [0])
    assert capsys.readouterr().out == "Collecting diffusers\nERROR: no luck\n", "the Python console still shows it"
    tools.pip_uninstall(["bad"], told.lines.append, told.codes.append)
    assert told.codes == [0, 2]
    assert old_slicer == [["diffusers"], ["bad"]]


def test_in_testing_mode_nothing_is_agreed_to(application: SimpleNamespace, monkeypatch: pytest.MonkeyPatch) -> None:
    """Slicer's own dialogs answer yes then."""
    asked: list[str] = []

    def confirm(text: str, title: str | None = None, **rest: Any) -> bool:
        asked.append(text + rest["detailedText"])
        return True

    monkeypatch.setattr(slicer.util, "confirmOkCancelDisplay", confirm, raising=False)
    application.testing = True
    assert not Tools().ask("title", "text", "details")
    application.testing = False
    assert Tools().ask("title", "text ", "details")
    assert asked == ["text details"]


def test_a_slicer_without_the_extensions_manager(application: SimpleNamespace, monkeypatch: pytest.MonkeyPatch) -> None:
    tools = Tools()
    assert not tools.torch_extension_waits()
    assert not tools.install_torch_extension()
    application.extensionsManagerModel = lambda: None
    assert not tools.install_torch_extension()


def test_the_extension_is_installed_without_slicers_own_question(application: SimpleNamespace) -> None:
    seen: list[Any] = []

    class Model:
        interactive = True

        def isExtensionInstalled(self, name: str) -> bool:
            return name == "PyTorch"

        def installExtensionFromServer(self, name: str, restart: bool) -> bool:
            seen.append((name, restart, self.interactive))
            return True

    model = Model()
    application.extensionsManagerModel = lambda: model
    tools = Tools()
    assert tools.torch_extension_waits()
    assert tools.install_torch_extension()
    assert seen == [("PyTorch", False, False)]
    assert model.interactive


def test_torch_comes_through_the_extension(
    application: SimpleNamespace, told: Told, monkeypatch: pytest.MonkeyPatch
) -> None:
    tools = Tools()
    assert not tools.torch_extension_loaded()
    calls: list[dict[str, Any]] = []

    class PyTorchUtilsLogic:
        def installTorch(self, **options: Any) -> None:
            calls.append(options)
            print("Looking for a GPU\nfound none", end="")

    module: Any = types.ModuleType("PyTorchUtils")
    module.PyTorchUtilsLogic = PyTorchUtilsLogic
    module.__spec__ = None
    monkeypatch.setitem(sys.modules, "PyTorchUtils", module)
    assert tools.torch_extension_loaded()
    tools.install_torch(">=2.9,<3", told.lines.append)
    assert calls == [{"askConfirmation": False, "torchVersionRequirement": ">=2.9,<3"}]
    assert told.lines == ["Looking for a GPU", "found none"]


def test_lines_are_told_where_there_is_no_console(told: Told, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sys, "stdout", None)
    with lines_of_stdout(told.lines.append):
        print("one\r\ntwo", flush=True)
    assert told.lines == ["one", "two"]
    assert sys.stdout is None
