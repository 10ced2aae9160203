"""The folder of training examples: chosen once, slow, full, gone; and the process that writes into it."""

from __future__ import annotations

import os
import signal
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import psutil
import pytest
import qt

from ProGiDiffSlicerLib.learning.curating_process import Keeper, keeper_command
from ProGiDiffSlicerLib.setup.settings import Settings
from ProGiDiffSlicerLib.worker.command import WorkerCommand

from .curating_support import Saver, Spin, draw, only
from .panel_support import GRID, Opened, opened
from .setup_examples import MemoryStore
from .worker_support import children

# Takes everything in and never says anything: a folder on a network that is away.
SILENT = "import sys\nwhile sys.stdin.buffer.read1(65536): pass\nimport time\ntime.sleep(600)"
# A disk on which no file may be longer than a kilobyte.
FULL = (
    "import resource, runpy, signal; signal.signal(signal.SIGXFSZ, signal.SIG_IGN); "
    "resource.setrlimit(resource.RLIMIT_FSIZE, (1000, 1000)); "
    "runpy.run_module('ProGiDiffSlicerLib.learning.curating_child', run_name='__main__')"
)

EMPTY = {"cases": 0, "counts": {}, "modalities": []}
ENDED = "The process that keeps the training examples ended unexpectedly; nothing was changed, try again."


@pytest.fixture
def panel(scene: Any) -> Iterator[Opened]:
    before = {child.pid for child in children()}
    with opened(scene) as panels:
        yield panels
    left = [child for child in children() if child.pid not in before]
    for child in left:
        child.kill()
    assert left == []


@pytest.fixture
def saver(panel: Opened, spin: Spin, tmp_path: Path) -> Saver:
    return Saver(panel.panels, spin, tmp_path / "set")


def silent(saver: Saver) -> None:
    """From now on the process does not answer."""
    saver.curating._keeper._retire()
    saver.curating._keeper._command = lambda: WorkerCommand(sys.executable, ("-c", SILENT), dict(os.environ))


def answering(saver: Saver) -> None:
    saver.curating._keeper._retire()
    saver.curating._keeper._command = keeper_command


def kept_process(before: set[int]) -> psutil.Process:
    (process,) = [child for child in children() if child.pid not in before]
    return process


def test_the_folder_is_remembered_and_looking_makes_nothing(panel: Opened, saver: Saver) -> None:
    assert saver.shown == "No training examples yet."
    assert panel.services.settings.curatedFolder == str(saver.folder)
    assert not saver.folder.exists()


def test_an_emptied_folder_is_forgotten(panel: Opened, saver: Saver) -> None:
    saver.ui.examplesFolderEdit.setCurrentPath("")
    panel.panels.tuning.ui.adaptersFolderEdit.setCurrentPath(str(saver.folder))
    panel.panels.tuning.ui.adaptersFolderEdit.setCurrentPath("")
    assert (panel.services.settings.curatedFolder, panel.services.settings.adaptersFolder) == ("", "")


def test_random_texts_are_made_once() -> None:
    store = MemoryStore()
    first, second = Settings(store), Settings(store)
    assert first.annotatorId == second.annotatorId
    assert first.annotatorSecret == second.annotatorSecret
    assert len(first.annotatorSecret) == 64
    assert Settings(MemoryStore()).annotatorId != first.annotatorId


def test_a_folder_that_cannot_be_made_is_said_and_another_one_works(panel: Opened, saver: Saver, spin: Spin) -> None:
    panel.run(spin, 2)
    panel.review.accept()
    blocked = saver.folder.parent / "file"
    blocked.write_text("not a folder")
    saver.ui.examplesFolderEdit.setCurrentPath(str(blocked / "set"))
    said = saver.save()
    assert "cannot be changed: Not a directory" in said
    assert blocked.read_text() == "not a folder"
    assert not saver.ui.undoSaveButton.enabled
    saver.ui.examplesFolderEdit.setCurrentPath(str(saver.folder))
    saver.save()
    assert len(saver.cases) == 1


@pytest.mark.slow
@pytest.mark.skipif(sys.platform == "win32", reason="limits of a process are POSIX")
def test_a_full_disk_leaves_nothing_and_is_said(panel: Opened, saver: Saver, spin: Spin) -> None:
    panel.run(spin, 2)
    panel.review.accept()
    saver.save()
    saver.curating._keeper._retire()
    saver.curating._keeper._command = lambda: WorkerCommand(sys.executable, ("-c", FULL), keeper_command().environment)
    before = {path for path in saver.folder.rglob("*") if path.is_file()}
    said = saver.save()
    assert "space" in said or "could not be written" in said
    assert {path for path in saver.folder.rglob("*") if path.is_file()} == before
    answering(saver)
    assert "takes the place" in saver.save()
    assert len(saver.cases) == 1


def test_a_folder_that_vanished_is_made_again_and_undo_says_what_is_wrong(panel: Opened, saver: Saver, spin: Spin) -> None:
    panel.run(spin, 2)
    panel.review.accept()
    saver.save()
    saver.folder.rename(saver.folder.parent / "elsewhere")
    said = saver.undo()
    assert said
    assert "No longer" not in said or not saver.cases
    saver.save()
    assert len(saver.cases) == 1


@pytest.mark.slow
def test_a_folder_that_does_not_answer_stops_nothing(panel: Opened, saver: Saver, spin: Spin) -> None:
    panel.run(spin, 2)
    panel.review.accept()
    silent(saver)
    began = time.monotonic()
    panel.review.curating.look()
    assert time.monotonic() - began < 0.5
    assert saver.shown == "Looking into the folder …"
    # Saving waits behind it, and can be given up.
    saver.ui.saveExampleButton.click()
    spin(lambda: saver.curating.saving and saver.curating._saving.request is not None)
    assert saver.ui.saveExampleButton.text == "Cancel saving"
    saver.ui.saveExampleButton.click()
    assert saver.said == "Cancelled."
    answering(saver)
    panel.review.curating.look()
    saver.settle()
    assert saver.shown == "No training examples yet."
    saver.save()
    assert len(saver.cases) == 1


@pytest.mark.slow
def test_a_killed_process_loses_nothing_and_the_next_save_works(panel: Opened, saver: Saver, spin: Spin) -> None:
    panel.run(spin, 2)
    panel.review.accept()
    silent(saver)
    before = {child.pid for child in children()}
    saver.ui.saveExampleButton.click()
    spin(lambda: {child.pid for child in children()} != before)
    os.kill(kept_process(before).pid, signal.SIGKILL)
    saver.settle()
    assert "ended unexpectedly" in saver.said
    answering(saver)
    assert saver.save().startswith("Saved")
    assert len(saver.cases) == 1


def test_the_proposals_worker_does_not_matter(panel: Opened, saver: Saver, spin: Spin) -> None:
    panel.run(spin, 2)
    panel.review.accept()
    panel.client.crash()
    assert saver.save().startswith("Saved")
    assert saver.shown == "liver 1; CT"


def test_a_segment_that_changes_while_it_is_copied_is_not_saved(panel: Opened, saver: Saver, spin: Spin) -> None:
    node, masks = panel.run(spin, 2)
    accepted = panel.review.accept()
    saver.ui.saveExampleButton.click()
    draw(accepted.segmentation_node, accepted.segment_id, node, masks[0])
    node.GetImageData().Modified()
    saver.settle()
    assert "changed meanwhile" in saver.said
    assert not saver.folder.exists()


def test_closing_the_module_finishes_what_only_waits_for_the_disk(scene: Any, spin: Spin, tmp_path: Path) -> None:
    with opened(scene) as panel:
        saver = Saver(panel.panels, spin, tmp_path / "set")
        panel.run(spin, 2)
        panel.review.accept()
        mask = panel.proposals.selected.index
        saver.ui.saveExampleButton.click()
        request = None
        while request is None:
            spin()
            request = saver.curating._saving.request
        spin(lambda: not request.outgoing)
    assert mask is not None
    assert only(saver.cases)[1].shape == GRID.shape_kji


def test_requests_are_answered_in_order_by_one_process(app: Any, spin: Spin, tmp_path: Path) -> None:
    owner = qt.QObject()
    keeper, answers = Keeper(owner), []
    for number in range(3):
        keeper.ask({"request": "counts", "folder": str(tmp_path)}, lambda reply, n=number: answers.append(n), answers.append)
    process = keeper._process
    spin(lambda: len(answers) == 3)
    assert answers == [0, 1, 2]
    assert process is keeper._process
    process.kill_tree()
    keeper.ask({"request": "counts", "folder": str(tmp_path)}, answers.append, answers.append)
    spin(lambda: len(answers) == 4)
    assert answers[3] in (EMPTY, ENDED)
    keeper._linger.setInterval(0)
    keeper.ask({"request": "counts", "folder": str(tmp_path)}, answers.append, answers.append)
    spin(lambda: len(answers) == 5)
    assert answers[4] == EMPTY
    spin(lambda: keeper._process is None and not keeper._leaving)
    keeper.close()
    owner.deleteLater()
