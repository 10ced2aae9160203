"""The folder of training examples: chosen once, slow, full, gone; and the process that writes into it."""

from __future__ import annotations

import os
import signal
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from ProGiDiffSlicerLib.setup.settings import Settings
from ProGiDiffSlicerLib.worker.client import WorkerState
from ProGiDiffSlicerLib.worker.command import local_command

from .curating_support import Saver, Spin, draw, only
from .panel_support import GRID, Opened, opened
from .setup_examples import MemoryStore
from .worker_support import children, gone, python

# A folder on a network that is away.
HUNG = (
    "import time; from progidiff.worker import server, tasks; "
    "tasks.count_cases = tasks.keep_case = lambda request, run: time.sleep(600); server.serve()"
)
# A disk on which no file may be longer than a kilobyte.
FULL = (
    "import resource, signal; signal.signal(signal.SIGXFSZ, signal.SIG_IGN); "
    "resource.setrlimit(resource.RLIMIT_FSIZE, (1000, 1000)); "
    "from progidiff.worker.server import serve; serve()"
)


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


def by(saver: Saver, code: str) -> None:
    """From now on another program saves."""
    saver.curating._client.stop()
    saver.curating._client._command = lambda: python(code)


def answering(saver: Saver) -> None:
    """From the next process on the right one saves."""
    saver.curating._client._command = local_command


def sent(saver: Saver, kind: str = "KeepCase") -> bool:
    """Whether a request, of an example, has left for the process that saves."""
    job, link = saver.curating._client._jobs.running, saver.curating._client._link
    return bool(job is not None and job.call.kind == kind and job.request_id and link.unsent == 0)


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
    by(saver, FULL)
    before = {path for path in saver.folder.rglob("*") if path.is_file()}
    said = saver.save()
    assert "space" in said or "could not be written" in said
    assert {path for path in saver.folder.rglob("*") if path.is_file()} == before
    saver.curating._client.stop()
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
    by(saver, HUNG)
    began = time.monotonic()
    panel.review.curating.look()
    assert time.monotonic() - began < 0.5
    assert saver.shown == "Looking into the folder …"
    spin(lambda: sent(saver, "CountCases"))
    # Saving waits behind it, and can be given up.
    saver.ui.saveExampleButton.click()
    spin(lambda: saver.curating.saving and saver.curating._saving.call is not None)
    assert saver.ui.saveExampleButton.text == "Cancel saving"
    saver.ui.saveExampleButton.click()
    assert saver.said == "Cancelled."
    # Cancelling looks again: that waits for the hung process no longer than for an answer to a cancel.
    answering(saver)
    saver.settle()
    assert saver.shown == "No training examples yet."
    saver.save()
    assert len(saver.cases) == 1


@pytest.mark.slow
@pytest.mark.parametrize("end", ["killed", "cancelled"])
def test_a_process_that_hangs_loses_nothing_and_the_next_save_works(
    end: str, panel: Opened, saver: Saver, spin: Spin
) -> None:
    panel.run(spin, 2)
    panel.review.accept()
    by(saver, HUNG)
    saver.ui.saveExampleButton.click()
    spin(lambda: sent(saver))
    pid = saver.curating._client.hello.pid
    answering(saver)
    if end == "killed":
        os.kill(pid, signal.SIGKILL)
        saver.settle()
        assert "ended unexpectedly" in saver.said
        assert "Every example in the set is whole" in saver.said
    else:
        saver.ui.saveExampleButton.click()
        saver.settle()
        assert saver.said == "Cancelled."
    spin(lambda: gone(pid))
    assert saver.save().startswith("Saved")
    assert len(saver.cases) == 1
    assert saver.shown == "liver 1; CT"


@pytest.mark.slow
def test_what_was_saved_in_spite_of_a_cancel_is_told_and_can_be_undone(panel: Opened, saver: Saver, spin: Spin) -> None:
    panel.run(spin, 2)
    panel.review.accept()
    by(saver, "from progidiff.worker import server, tasks; import time; keep = tasks.keep_case\n"
       "def keep_case(request, run):\n    while not run.cancelled(): time.sleep(0.01)\n"
       "    run.check = lambda: None\n    return keep(request, run)\n"
       "tasks.keep_case = keep_case; server.serve()")  # fmt: skip
    saver.ui.saveExampleButton.click()
    spin(lambda: sent(saver))
    saver.ui.saveExampleButton.click()
    saver.settle()
    assert saver.said.startswith("Saved as training example")
    assert len(saver.cases) == 1
    saver.undo()
    assert saver.cases == []


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
        spin(lambda: sent(saver))
    assert mask is not None
    assert only(saver.cases)[1].shape == GRID.shape_kji


def test_the_process_ends_when_nothing_is_asked_for_a_while(panel: Opened, saver: Saver, spin: Spin) -> None:
    client = saver.curating._client
    pid = client.hello.pid
    panel.review.curating.look()
    saver.settle()
    assert client.hello.pid == pid
    client._lingering.setInterval(0)
    panel.review.curating.look()
    saver.settle()
    spin(lambda: client.state is WorkerState.STOPPED and gone(pid))
    panel.review.curating.look()
    saver.settle()
    assert saver.shown == "No training examples yet."
