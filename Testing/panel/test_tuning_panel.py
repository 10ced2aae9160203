"""The Tuning panel with scripted processes: what is shown, what is chosen, and how things end."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import psutil
import pytest

from progidiff.wire.messages import AdaptRequest, CuratedCases
from ProGiDiffSlicerLib.learning.adapters import base_hash
from ProGiDiffSlicerLib.worker.calls import Call
from ProGiDiffSlicerLib.worker.command import WorkerCommand

from .panel_support import Opened, opened
from .tuning_process import write_adapter
from .worker_support import run_python

Spin = Callable[..., None]
SCRIPTED = str(Path(__file__).with_name("tuning_process.py"))


class Tuner:
    """The panel, with a script in place of the engine."""

    def __init__(self, panels: Opened, spin: Spin, folder: Path) -> None:
        self.panels, self.spin, self.folder = panels, spin, folder
        self.script = "work"
        self.asked: list[AdaptRequest] = []
        self.panel = panels.panels.tuning
        self.ui = self.panel.ui
        panels.panels.ui.tuningSection.collapsed = False
        (folder / "set").mkdir()
        panels.services.settings.curatedFolder = str(folder / "set")
        self.ui.adaptersFolderEdit.setCurrentPath(str(folder / "adapters"))

        for client in (self.panel.tuning._client, self.panel.next.search._client):
            client._command = self.command
        self._ask, self.panel.tuning._client.ask = self.panel.tuning._client.ask, self.ask

    def command(self) -> WorkerCommand:
        self.panels.services.settings.command_here()  # refuses what the real one refuses
        return run_python(SCRIPTED, self.script)

    def ask(self, request: AdaptRequest, expects: type[Any]) -> Call:
        self.asked.append(request)
        return self._ask(request, expects)

    def run(self, script: str = "work") -> str:
        """Press the button and wait for the end; what the status line says."""
        self.script = script
        self.ui.tuneButton.click()
        self.spin(lambda: not self.panel.tuning.running)
        self.spin()
        return self.panels.said

    @property
    def adapters(self) -> list[str]:
        box = self.ui.adapterComboBox
        return [box.itemText(number) for number in range(box.count)]


@pytest.fixture
def tuner(scene: Any, spin: Spin, tmp_path: Path) -> Iterator[Tuner]:
    with opened(scene) as panels:
        yield Tuner(panels, spin, tmp_path)


def fitting(folder: Path, better: bool = True) -> None:
    """An adapter for the bundled model."""
    write_adapter(folder, better, str(base_hash(None)))


@pytest.mark.slow
def test_a_tuning_is_followed_and_its_adapter_is_used(tuner: Tuner) -> None:
    tuner.ui.adapterNameEdit.setText("My scanner")
    tuner.ui.tuningStepsSpinBox.setValue(40)
    said = tuner.run()
    assert "better on the held-out cases" in said
    (asked,) = tuner.asked
    out = str(tuner.folder / "adapters" / "My-scanner")
    assert asked == AdaptRequest((str(tuner.folder / "set"),), out, device="auto", name="My scanner", steps=40)
    found = tuner.panel.tuning
    assert found.losses == [(1, 1.0), (2, 0.5), (3, pytest.approx(1 / 3)), (4, 0.25)]
    assert found.dices == [(0, 0.5), (4, 0.75)]
    assert found.message == "It was measured."
    assert tuner.ui.pictureComboBox.itemText(0) == "liver  0.50 → 0.75"
    assert not tuner.ui.pictureLabel.pixmap.isNull()
    assert not tuner.ui.curveLabel.pixmap.isNull()
    assert tuner.panels.parameters.adapterFolder == str(tuner.folder / "adapters" / "My-scanner")
    assert tuner.ui.adapterComboBox.currentIndex == 1
    assert tuner.ui.tuneButton.text == "Start tuning"


def test_a_worse_adapter_is_listed_and_not_used(tuner: Tuner) -> None:
    said = tuner.run("worse")
    assert "it is not used" in said
    assert tuner.panels.parameters.adapterFolder == ""
    assert len(tuner.adapters) == 2
    assert tuner.ui.adapterComboBox.currentIndex == 0


def test_stop_keeps_the_best(tuner: Tuner) -> None:
    tuner.script = "wait"
    tuner.ui.tuneButton.click()
    tuner.spin(lambda: len(tuner.panel.tuning.losses) == 4)
    assert tuner.ui.tuneButton.text == "Stop and keep the best"
    tuner.ui.tuneButton.click()
    assert tuner.ui.tuneButton.text == "End at once"
    tuner.spin(lambda: not tuner.panel.tuning.running)
    assert tuner.panel.tuning.better
    assert tuner.ui.tuneButton.text == "Start tuning"
    assert len(tuner.adapters) == 2


def test_a_second_stop_ends_a_process_that_does_not_listen(tuner: Tuner) -> None:
    tuner.script = "deaf"
    tuner.ui.tuneButton.click()
    tuner.spin(lambda: len(tuner.panel.tuning.losses) == 4)
    children = psutil.Process().children(recursive=True)
    tuner.ui.tuneButton.click()
    tuner.ui.tuneButton.click()
    tuner.spin(lambda: not tuner.panel.tuning.running)
    assert "what was done is kept, start again to go on" in tuner.panels.said
    tuner.spin(lambda: not any(child.is_running() and child.status() != "zombie" for child in children))
    tuner.run("work")  # goes on under the same name
    assert tuner.asked[0] == tuner.asked[1]


@pytest.mark.parametrize(
    ("script", "sentence"), [("crash", "exit code 3"), ("refuse", "No case labels a target that is to be tuned.")]
)
def test_a_tuning_that_fails_says_why_and_changes_nothing(script: str, sentence: str, tuner: Tuner) -> None:
    assert sentence in tuner.run(script)
    assert tuner.adapters == ["Base model (no adapter)"]
    assert tuner.panels.parameters.adapterFolder == ""
    assert "better" in tuner.run("work")


def test_closing_the_module_leaves_no_process(scene: Any, spin: Spin, tmp_path: Path) -> None:
    with opened(scene) as panels:
        made = Tuner(panels, spin, tmp_path)
        made.script = "deaf"
        made.ui.tuneButton.click()
        spin(lambda: len(made.panel.tuning.losses) == 4)
        children = psutil.Process().children(recursive=True)
        assert children
    assert not any(child.is_running() and child.status() != "zombie" for child in children)


def test_what_is_missing_is_told(tuner: Tuner) -> None:
    tuner.panels.services.settings.curatedFolder = ""
    tuner.ui.tuneButton.click()
    assert "save some under Review" in tuner.panels.said
    tuner.panels.services.settings.curatedFolder = str(tuner.folder / "set")
    tuner.ui.adaptersFolderEdit.setCurrentPath("")
    tuner.ui.tuneButton.click()
    assert "folder for the adapters" in tuner.panels.said
    assert not tuner.panel.tuning.running


def test_a_worker_elsewhere_cannot_tune_here(tuner: Tuner) -> None:
    tuner.panels.services.settings.workerKind = "command"
    tuner.panels.services.settings.commandText = "ssh gpu-host python -m progidiff worker"
    assert "runs on this computer" in tuner.run()


def test_the_chosen_adapter_goes_with_the_next_run(tuner: Tuner) -> None:
    fitting(tuner.folder / "adapters" / "good")
    fitting(tuner.folder / "adapters" / "poor", better=False)
    write_adapter(tuner.folder / "adapters" / "strange")
    (tuner.folder / "adapters" / "no adapter").mkdir()
    tuner.panel.look()
    names = tuner.adapters
    assert names[0] == "Base model (no adapter)"
    assert sorted(names[1:]) == ["good", "poor (not shown to be better)", "strange (another model's)"]
    tuner.panels.choose_volume()
    tuner.ui.adapterComboBox.setCurrentIndex(names.index("good"))
    assert "Dice 0.50 before, 0.75 after" in tuner.ui.adapterLabel.text
    assert not tuner.ui.worseCheckBox.visible
    tuner.panels.propose("liver")
    client = tuner.panels.client
    client.answer_load()
    assert (client.call.kind, client.values) == ("load_adapter", (str(tuner.folder / "adapters" / "good"), False))
    tuner.panels.session.cancel()
    client.confirm_cancel()
    tuner.ui.adapterComboBox.setCurrentIndex(names.index("poor (not shown to be better)"))
    assert tuner.ui.worseCheckBox.visible
    tuner.ui.worseCheckBox.setChecked(True)
    assert tuner.panels.parameters.adapterEvenIfWorse
    tuner.ui.adapterComboBox.setCurrentIndex(names.index("strange (another model's)"))
    assert "made for other weights" in tuner.ui.adapterLabel.text
    assert not tuner.panels.parameters.adapterEvenIfWorse
    tuner.ui.adapterComboBox.setCurrentIndex(0)
    assert tuner.panels.parameters.adapterFolder == ""


def test_delete_can_be_undone(tuner: Tuner) -> None:
    place = tuner.folder / "adapters" / "good"
    fitting(place)
    tuner.panel.look()
    tuner.ui.adapterComboBox.setCurrentIndex(1)
    tuner.ui.deleteAdapterButton.click()
    assert not place.exists()
    assert tuner.adapters == ["Base model (no adapter)"]
    assert tuner.panels.parameters.adapterFolder == ""
    tuner.ui.undoDeleteButton.click()
    assert (place / "adapter.safetensors").read_bytes() == b"weights"
    assert tuner.panels.parameters.adapterFolder == str(place)
    assert not tuner.ui.undoDeleteButton.enabled


def test_cases_are_counted_by_target(tuner: Tuner) -> None:
    curating = tuner.panels.review.curating.curating
    assert "save some under Review" in tuner.ui.casesLabel.text
    curating.contents = CuratedCases(6, {"liver": 4, "pancreas": 2}, ("CT", "MR"))
    curating.changed.emit()
    assert tuner.ui.casesLabel.text == "Training examples: liver 4, pancreas 2 (CT, MR)"
    tuner.ui.tuningTargetComboBox.setCurrentIndex(2)
    tuner.run()
    (asked,) = tuner.asked
    assert asked.targets == ("pancreas",)


def test_the_next_case_is_the_most_uncertain_one(tuner: Tuner) -> None:
    ui, search = tuner.ui, tuner.panel.next.search
    ui.nextButton.click()
    assert "Choose a folder" in tuner.panels.said
    (tuner.folder / "waiting").mkdir()
    ui.nextFolderEdit.setCurrentPath(str(tuner.folder / "waiting"))
    ui.nextButton.click()
    assert "what to look for" in tuner.panels.said
    tuner.panels.prompt.ui.promptEdit.setText("liver; pancreas")
    tuner.script = "search and wait"
    ui.nextButton.click()
    tuner.spin(lambda: search.done == 3)
    assert ui.nextButton.text == "Stop"
    assert [ui.nextTable.item(row, 0).text() for row in range(2)] == ["deep/b.nii.gz *", "a.nii.gz"]
    assert ui.nextTable.item(0, 0).toolTip() == "The slices are coronal.\nThe values are odd."
    assert ui.nextTable.item(1, 0).toolTip() == ""
    ui.nextButton.click()
    tuner.spin(lambda: not search.running)
    assert search.message == "2 volumes, the most uncertain first"
    assert search.place(search.items[0]) == str(tuner.folder / "waiting" / "deep" / "b.nii.gz")
    assert search.items[0].ras == (4.0, 5.0, 6.0)
    ui.nextTable.selectRow(0)
    assert ui.loadNextButton.enabled
    ui.loadNextButton.click()
    assert "could not be loaded" in tuner.panels.said
