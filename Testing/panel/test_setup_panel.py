"""The setup panel through its own widgets."""

from __future__ import annotations

import json
import shutil
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import ctk
import pytest
import qt

from ProGiDiffSlicerLib.panels.setup import SetupPanel
from ProGiDiffSlicerLib.setup.card import bundled_folder
from ProGiDiffSlicerLib.setup.settings import Settings
from ProGiDiffSlicerLib.setup.status import Need, PythonHome

from .setup_examples import MemoryStore, ScriptedTools, put_package
from .test_setup_connection import StillClient

pytestmark = pytest.mark.usefixtures("app")
Spin = Callable[..., None]

NEEDS = (Need("numpy", ">=2.0,<3", "slicer"), Need("torch", ">=2.9,<3", "torch"), Need("diffusers", ">=0.42,<1", "pip"))


class Bench:
    """A panel in a collapsible section, over a folder of packages, with scripted tools."""

    def __init__(self, site: Path, spin: Spin, store: MemoryStore | None = None) -> None:
        self.site = site
        self.spin = spin
        self.store = MemoryStore() if store is None else store
        self.settings = Settings(self.store)
        self.tools = ScriptedTools()
        self.tools.torch_effect = lambda: put_package(site, "torch", "2.9.1")
        self.tools.pip_effect = lambda arguments: put_package(site, "diffusers", "0.43.0")
        self.section = ctk.ctkCollapsibleButton()
        qt.QVBoxLayout(self.section)
        StillClient.made = []
        home = PythonHome("/opt/Slicer", [str(site)], NEEDS)
        self.panel = SetupPanel(self.settings, self.section, self.tools, StillClient, home)
        self.section.layout().addWidget(self.panel.widget)
        self.ui = self.panel.ui
        self.told: list[Any] = []
        self.panel.readyChanged.connect(self.told.append)
        self.panel.workerMustStop.connect(self._on_stop)
        self.panel.refresh()

    def _on_stop(self) -> None:
        self.told.append("stop the worker")

    def click_install(self) -> None:
        self.ui.installButton.click()
        self.spin(lambda: not self.panel._installer.running, 10)

    def shown(self, name: str) -> bool:
        return not getattr(self.ui, name).isHidden()

    @property
    def message(self) -> str:
        return str(self.ui.messageLabel.text)


@pytest.fixture
def open_bench(tmp_path: Path, spin: Spin) -> Iterator[Callable[..., Bench]]:
    benches: list[Bench] = []

    def open_one(store: MemoryStore | None = None) -> Bench:
        site = tmp_path / "site"
        if not site.exists():
            put_package(site, "numpy", "2.0.2")
        benches.append(Bench(site, spin, store))
        return benches[-1]

    yield open_one
    for bench in benches:
        bench.panel.cleanup()
        bench.section.deleteLater()


@pytest.fixture
def bench(open_bench: Callable[..., Bench]) -> Bench:
    return open_bench()


def test_opening_the_panel_shows_what_is_missing_and_does_nothing(bench: Bench) -> None:
    assert bench.ui.statusLabel.text == "Not installed yet: torch, diffusers."
    assert not bench.section.collapsed
    assert bench.section.text == "Setup"
    assert bench.told == [False]
    assert bench.tools.acts == []
    assert StillClient.made == []
    assert bench.store.values == {}
    assert bench.ui.installButton.enabled
    assert not bench.ui.removeButton.enabled
    table = bench.ui.packagesTable
    cells = [[table.item(row, column).text() for column in range(4)] for row in range(table.rowCount)]
    assert cells == [
        ["numpy", "2.0.2", ">=2.0,<3", "ready"],
        ["torch", "", ">=2.9,<3", "not installed"],
        ["diffusers", "", ">=0.42,<1", "not installed"],
    ]


def test_the_bundled_model_introduces_itself(bench: Bench) -> None:
    text = bench.ui.modelText.text
    assert text.startswith("Bundled model: ProGiDiff abdomen, small")
    assert all(words in text for words in ("Apache-2.0", "liver, spleen", "CT, MR"))
    titles = [bench.ui.accuracyTable.horizontalHeaderItem(column).text() for column in range(4)]
    assert titles == ["Patients of", "Target", "Dice, rank 1", "Dice, best of 16"]
    figures = json.loads((Path(bundled_folder()) / "model_card.json").read_text(encoding="utf-8"))["accuracy"]
    first = [bench.ui.accuracyTable.item(0, column).text() for column in range(3)]
    assert bench.ui.accuracyTable.rowCount == len({(figure["set"], figure["target"]) for figure in figures})
    assert first[0] == f"{figures[0]['set']}, n={figures[0]['n_patients']}"
    assert first[1:] == [figures[0]["target"], f"{figures[0]['value']:.2f}"]


def test_install_ends_with_a_closed_section(bench: Bench) -> None:
    bench.ui.installButton.click()
    resting = (bench.ui.installButton, bench.ui.testButton, bench.ui.workerKindComboBox)
    assert [each.enabled for each in resting] == [False] * 3, "they rest while something is installed"
    assert bench.shown("progressBar")
    bench.spin(lambda: not bench.panel._installer.running, 10)
    assert bench.tools.acts == ["ask", "torch", "pip"]
    assert bench.told == [False, "stop the worker", True]
    assert bench.section.collapsed
    assert bench.section.text == "Setup: ready"
    assert bench.message.startswith("Everything is installed")
    assert [each.enabled for each in resting] == [False, True, True]
    assert bench.ui.removeButton.enabled
    assert not bench.shown("progressBar")
    # A section that the user opened stays open.
    bench.section.collapsed = False
    bench.panel.refresh()
    bench.ui.deviceComboBox.setCurrentIndex(1)
    assert not bench.section.collapsed


def test_a_refusal_is_told_and_can_be_taken_back(bench: Bench) -> None:
    bench.tools.answer = False
    bench.click_install()
    assert bench.message.startswith("Nothing was installed")
    assert bench.told == [False], "the worker goes on"
    assert bench.ui.installButton.enabled


def test_a_failure_is_one_sentence_with_the_details_below(bench: Bench) -> None:
    bench.tools.pip_code = 1
    bench.tools.pip_effect = lambda arguments: None
    bench.tools.pip_lines = ["Collecting diffusers", "OSError: [Errno 28] No space left on device"]
    bench.click_install()
    assert bench.message.startswith("The disk is full")
    assert "Collecting diffusers" in bench.ui.logText.plainText
    assert not bench.section.collapsed
    assert bench.ui.installButton.enabled


def test_restart_and_continue(bench: Bench, open_bench: Callable[..., Bench]) -> None:
    bench.tools.extension_loaded = False
    assert not bench.shown("restartButton")
    bench.click_install()
    assert "restart Slicer and continue" in bench.message
    assert bench.shown("restartButton")
    bench.ui.restartButton.click()
    assert bench.tools.acts == ["ask", "extension", "restart"]

    again = open_bench(bench.store)
    assert again.ui.installButton.text == "Continue installation"
    assert "press Continue installation" in again.message
    assert again.tools.acts == [], "nothing goes on before the click"
    again.click_install()
    assert again.tools.acts == ["torch", "pip"]
    assert again.section.collapsed


def test_what_is_chosen_is_kept(bench: Bench, open_bench: Callable[..., Bench], tmp_path: Path) -> None:
    bench.ui.deviceComboBox.setCurrentIndex(2)
    bench.ui.wheelFolderEdit.setCurrentPath("/media/Räder")
    bench.ui.workerKindComboBox.setCurrentIndex(1)
    bench.ui.pythonPathEdit.setCurrentPath(sys.executable)
    bench.ui.workerKindComboBox.setCurrentIndex(2)
    bench.ui.commandEdit.setText("ssh gpu python -m progidiff worker")
    bench.ui.commandEdit.editingFinished.emit()
    settings = Settings(bench.store)
    assert (settings.device, settings.workerKind, settings.wheelFolder) == ("cuda", "command", "/media/Räder")
    assert (settings.pythonPath, settings.commandText) == (sys.executable, "ssh gpu python -m progidiff worker")
    again = open_bench(bench.store)
    assert again.ui.workerKindComboBox.currentIndex == 2
    assert again.ui.deviceComboBox.currentIndex == 2
    assert again.ui.commandEdit.text == "ssh gpu python -m progidiff worker"
    assert again.ui.pythonPathEdit.currentPath == sys.executable
    assert again.ui.wheelFolderEdit.currentPath == "/media/Räder"


@pytest.mark.parametrize(
    ("index", "rows"),
    [(0, {"wheelFolderEdit", "installButton"}), (1, {"pythonPathEdit"}), (2, {"commandEdit"})],
)
def test_each_kind_of_worker_shows_its_own_rows(bench: Bench, index: int, rows: set[str]) -> None:
    bench.ui.workerKindComboBox.setCurrentIndex(index)
    names = {"wheelFolderEdit", "installButton", "pythonPathEdit", "commandEdit"}
    assert {name for name in names if bench.shown(name)} == rows


def test_an_emptied_path_is_forgotten(bench: Bench, tmp_path: Path) -> None:
    """Nothing but validInputChanged tells that a line became empty."""
    for name in ("modelFolder", "wheelFolder", "pythonPath"):
        line = getattr(bench.ui, f"{name}Edit")
        line.setCurrentPath(str(tmp_path))
        assert getattr(bench.settings, name) == str(tmp_path)
        line.setCurrentPath("")
        assert getattr(bench.settings, name) == "", name


def test_a_folder_that_is_no_model_is_told_and_bundled_takes_it_back(bench: Bench, tmp_path: Path) -> None:
    bench.ui.modelFolderEdit.setCurrentPath(str(tmp_path))
    assert "holds no ProGiDiff model" in bench.ui.statusLabel.text
    assert bench.ui.modelText.text == ""
    assert not bench.shown("accuracySection")
    bench.ui.bundledButton.click()
    assert bench.settings.modelFolder == ""
    assert bench.ui.modelFolderEdit.currentPath == ""
    assert "Bundled model: ProGiDiff abdomen" in bench.ui.modelText.text


def test_another_computer_is_ready_once_it_was_tested(bench: Bench, open_bench: Callable[..., Bench]) -> None:
    bench.ui.workerKindComboBox.setCurrentIndex(2)
    assert "command is empty" in bench.ui.statusLabel.text
    bench.ui.commandEdit.setText("ssh gpu python -m progidiff worker")
    bench.ui.commandEdit.editingFinished.emit()
    assert "Press Test connection" in bench.ui.statusLabel.text
    bench.ui.modelFolderEdit.setCurrentPath("/srv/model")
    assert "no folder" not in bench.ui.statusLabel.text
    bench.ui.testButton.click()
    assert bench.ui.testButton.text == "Cancel test"
    StillClient.made[-1].answer()
    assert bench.message == "The worker answers: Python 3.12.1, Remote model loaded on cuda:0."
    assert "Remote model" in bench.ui.modelText.text
    assert bench.ui.testButton.text == "Test connection"
    assert bench.told == [False, True]
    assert bench.section.collapsed
    assert open_bench(bench.store).section.collapsed, "it is remembered without starting anything"
    assert len(StillClient.made) == 0


def test_a_test_can_be_cancelled(bench: Bench) -> None:
    bench.ui.testButton.click()
    bench.ui.testButton.click()
    assert bench.message == "The test was cancelled."
    assert StillClient.made[-1].stopped == 1
    assert bench.ui.installButton.enabled


def test_remove_what_was_brought(bench: Bench) -> None:
    bench.click_install()
    assert bench.section.collapsed

    def uninstall(names: list[str]) -> None:
        for folder in (found for name in names for found in (*bench.site.glob(f"{name}-*"), bench.site / name)):
            shutil.rmtree(folder)

    bench.tools.uninstall_effect = uninstall
    bench.ui.removeButton.click()
    assert bench.tools.log[-1] == ("uninstall", ["diffusers", "torch"])
    assert bench.message.startswith("Removed packages: 2, ")
    assert bench.told == [False, "stop the worker", True, "stop the worker", False]
    assert bench.ui.installButton.enabled
    assert not bench.ui.removeButton.enabled


def test_a_panel_that_is_gone_hears_nothing(bench: Bench) -> None:
    bench.ui.testButton.click()
    client = StillClient.made[-1]
    bench.panel.cleanup()
    assert client.stopped >= 1
    bench.settings.device = "cpu"
    bench.ui.deviceComboBox.setCurrentIndex(2)
    assert bench.settings.device == "cpu"
    assert bench.told == [False]
