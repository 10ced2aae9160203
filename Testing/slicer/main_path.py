"""The module's main path in the running application, with its real widgets, files and worker.

Everything that can be tested without the application is tested by ``make test``, in a stand-in for its Qt side. This script
is for the rest. It needs a Slicer (5.10 or later) in which the module's Setup says that everything is installed::

    Slicer --testing --no-splash --additional-module-paths <checkout>/ProGiDiffSlicer \\
           --python-script <checkout>/Testing/slicer/main_path.py <folder>

It closes the scene and takes a few minutes on a CPU. For each step it prints what happened and what a person who looks at
the window should see then; with a folder it leaves pictures of the window and the saved scene there. Who sends the printed
lines and the folder has said everything. Exit code: 0 passed, 1 failed, 77 not run because packages of the worker are
missing. CTest runs it too (Testing/slicer/CMakeLists.txt).

An exception that Python raises in a slot or an observer is printed by PythonQt and forgotten, and with ``--testing`` Slicer
then ends with 1, whatever exit code a script asks for. So such an exception is a failure of its step here, and a skip is one
only where nothing was raised. Without ``--testing`` the exit code is the script's own.

Not verified so far: nobody has run this script in the real application yet. It runs in the stand-in
(Testing/panel/test_main_path_script.py), which has no effects to edit with.
"""

from __future__ import annotations

import os
import platform
import sys
import tempfile
import time
import traceback
from collections.abc import Callable
from importlib import metadata
from typing import Any

import slicer
import slicer.util

PASSED, FAILED, SKIPPED = 0, 1, 77
MARGIN_MM = 3
UPDATE_TIMEOUT_S = 30


def panels() -> Any:
    """The module's panels, as they are now: a reload makes new ones."""
    slicer.util.selectModule("ProGiDiffSlicer")
    return slicer.modules.ProGiDiffSlicerWidget.panels


def say(text: str) -> None:
    """Tell the console, which --testing may be redirected to a file."""
    print(f"main path: {text}", flush=True)


def see(text: str) -> None:
    """Tell what a person should see in the window now."""
    say(f"     you should see: {text}")


class Unseen:
    """The exceptions that are printed and forgotten while this watches; they are printed as before."""

    def __init__(self) -> None:
        self.texts: list[str] = []
        self._before = sys.excepthook
        sys.excepthook = self._note

    def _note(self, kind: Any, error: Any, trace: Any) -> None:
        self.texts.append("".join(traceback.format_exception(kind, error, trace)))
        self._before(kind, error, trace)

    def take(self) -> list[str]:
        """What was raised since this was asked last."""
        texts, self.texts = self.texts, []
        return texts

    def end(self) -> None:
        """Watch no more."""
        sys.excepthook = self._before


def say_where() -> None:
    """What this runs in: the first thing that anybody asks."""
    version = f"{slicer.app.majorVersion}.{slicer.app.minorVersion} (revision {slicer.app.revision})"
    say(f"Slicer {version}, Python {platform.python_version()}, {platform.platform()}, {platform.machine()}")
    for name in ("pip", "numpy", "SimpleITK", "torch", "diffusers"):
        try:
            say(f"     {name} {metadata.version(name)}")
        except metadata.PackageNotFoundError:
            say(f"     {name} is not installed")
    say(f"     testing mode: {slicer.app.testingEnabled()}, main window: {slicer.util.mainWindow() is not None}")


def wait_until(condition: Any, what: str) -> None:
    """Let the application go on until something holds."""
    end = time.monotonic() + UPDATE_TIMEOUT_S
    while not condition():
        assert time.monotonic() < end, f"{what}: not within {UPDATE_TIMEOUT_S} s"
        slicer.app.processEvents()
        time.sleep(0.005)


def accepted() -> tuple[Any, str, Any]:
    """The only accepted segmentation, and the identifier and the vtkSegment of its only segment."""
    nodes = [node for node in slicer.util.getNodesByClass("vtkMRMLSegmentationNode") if role(node) == "accepted"]
    assert len(nodes) == 1, [node.GetName() for node in nodes]
    segmentation = nodes[0].GetSegmentation()
    assert segmentation.GetNumberOfSegments() == 1
    return nodes[0], segmentation.GetNthSegmentID(0), segmentation.GetNthSegment(0)


def role(node: Any) -> str | None:
    """What a node is to the module."""
    value = node.GetAttribute("ProGiDiff.Role")
    return None if value is None else str(value)


def check_panel() -> None:
    """The sections open and close, and a folder that was chosen can be un-chosen."""
    ui, setup = panels().ui, panels().setup
    assert ui.setupSection.collapsed, "Setup stays open although everything is installed"
    for section in (ui.setupSection, ui.promptSection, ui.proposalsSection, ui.reviewSection, ui.tuningSection):
        was_closed = section.collapsed
        section.collapsed = not was_closed
        assert section.collapsed is not was_closed, section.name
        section.collapsed = was_closed
    line, settings = setup.ui.modelFolderEdit, slicer.modules.ProGiDiffSlicerWidget.logic.services.settings
    before = line.currentPath
    try:
        line.setCurrentPath(os.path.dirname(__file__))
        assert settings.modelFolder == os.path.dirname(__file__), settings.modelFolder
        line.setCurrentPath("")
        assert settings.modelFolder == "", "an emptied model folder is not forgotten"
    finally:
        line.setCurrentPath(before)
    see(f"the title 'Setup: ready' above a closed section, and the sections {_titles(ui)}")


def _titles(ui: Any) -> str:
    sections = (ui.promptSection, ui.proposalsSection, ui.reviewSection, ui.tuningSection)
    return ", ".join(str(section.text) for section in sections)


def check_main_path() -> None:
    """Sample volume, prompt, proposals, accept, undo, redo: the test that the module itself has."""
    from ProGiDiffSlicer import ProGiDiffSlicerTest

    began = time.monotonic()
    case = ProGiDiffSlicerTest()
    case.messageDelay = 100
    case.setUp()
    case.test_main_path()
    _node, _identifier, segment = accepted()
    proposals = panels().proposals
    say(f"     status line: {panels().status.text}")
    say(f"     {proposals.ui.proposalsTable.rowCount} lines, the best with {proposals.selected.millilitres:.0f} mL")
    say(f"     {time.monotonic() - began:.0f} s with loading the model")
    see("the abdomen in the slice views, the best proposals outlined on it, thumbnails with scores in the list,")
    see(f"and the accepted segment {segment.GetName()} in Review; no red error sign in the status bar")


def check_editing() -> None:
    """The embedded Segment Editor changes the accepted segment, and its provenance says so."""
    from ProGiDiffSlicerLib.scene.provenance import read_provenance

    review = panels().review
    review.edit()
    editor = review.ui.segmentEditor
    node, identifier, segment = accepted()
    assert editor.segmentationNode() is node
    assert editor.currentSegmentID() == identifier
    assert editor.sourceVolumeNode() is not None
    editor.setActiveEffectByName("Margin")
    effect = editor.activeEffect()
    assert effect is not None, "the editor has no Margin effect"
    effect.setParameter("MarginSizeMm", str(MARGIN_MM))
    effect.self().onApply()
    review.end_edit()
    facts = read_provenance(segment)
    assert facts is not None
    assert facts.edited
    assert facts.dice_to_proposal is not None
    assert 0 < facts.dice_to_proposal < 1, facts.dice_to_proposal
    assert editor.activeEffect() is None, "the effect stays active after editing"
    see(f"a segment that is {MARGIN_MM} mm larger all around, the editor closed again, and below it:")
    see(f"'{review.ui.provenanceLabel.text.splitlines()[-1]}'")


def check_scene_file(folder: str) -> None:
    """The accepted segment comes back from a saved scene with all that is known of it; proposals are not saved."""
    from ProGiDiffSlicerLib.scene.provenance import read_provenance

    _node, _identifier, segment = accepted()
    before, color = read_provenance(segment), segment.GetColor()
    assert before is not None
    path = os.path.join(folder, "Szene é.mrb")
    assert slicer.util.saveScene(path), "the scene was not saved"
    slicer.mrmlScene.Clear(0)
    assert not slicer.util.getNodesByClass("vtkMRMLSegmentationNode")
    slicer.util.loadScene(path)
    roles = [role(node) for node in slicer.util.getNodesByClass("vtkMRMLSegmentationNode")]
    assert roles == ["accepted"], roles
    _node, _identifier, segment = accepted()
    assert segment.GetName() == "Liver"
    assert max(abs(a - b) for a, b in zip(segment.GetColor(), color, strict=True)) < 0.01
    assert read_provenance(segment) == before
    assert panels().prompt.ui.promptEdit.text == "liver", "the parameters were not saved with the scene"
    say(f"     {os.path.getsize(path) / 1e6:.1f} MB in {os.path.basename(path)}")
    see("the same segment in the same colour after loading, an empty list of proposals, and 'liver' in Outline")


def check_reload() -> None:
    """Reloading the module ends its worker and gives a panel that works."""
    panels()
    old = slicer.modules.ProGiDiffSlicerWidget.logic.services.client
    slicer.util.reloadScriptedModule("ProGiDiffSlicer")
    wait_until(lambda: old.state.value == "stopped", "the worker of the panel before the reload ends")
    assert slicer.modules.ProGiDiffSlicerWidget.logic.services.client is not old
    assert panels().setup.ready
    see("the panel as before, without proposals; its keys work (Ctrl+Z, arrows in the list)")


def picture(folder: str, name: str) -> None:
    """A picture of the window, where there is one."""
    window = slicer.util.mainWindow()
    if window is not None:
        slicer.app.processEvents()
        window.grab().save(os.path.join(folder, name))


def run(folder: str) -> int:
    """All steps; returns the exit code."""
    unseen = Unseen()
    try:
        return _run(folder, unseen)
    finally:
        unseen.end()


def _run(folder: str, unseen: Unseen) -> int:
    say_where()
    if not hasattr(slicer.modules, "progidiffslicer"):
        say("FAILED: the module is not loaded; name its folder with --additional-module-paths")
        return FAILED
    if not _step("opening", panels, unseen, folder):
        return FAILED
    if not panels().setup.ready:
        say("SKIPPED: packages of the worker are missing; open the module, press Install in Setup, and run this again")
        return SKIPPED
    steps: tuple[tuple[str, Callable[[], Any]], ...] = (
        ("panel", check_panel),
        ("proposals", check_main_path),
        ("editing", check_editing),
        ("scene-file", lambda: check_scene_file(folder)),
        ("reload", check_reload),
    )
    for name, step in steps:
        if not _step(name, step, unseen, folder):
            return FAILED
    say(f"PASSED: {len(steps)} steps")
    return PASSED


def _step(name: str, step: Callable[[], Any], unseen: Unseen, folder: str) -> bool:
    """Run one step and tell how it went; whether it went well."""
    trouble = ""
    try:
        step()
        slicer.app.processEvents()
    except Exception:
        trouble = traceback.format_exc()
    raised = unseen.take()
    if not trouble and raised:
        trouble = f"{len(raised)} raised in slots or observers, the first:\n{raised[0]}"
    say(f"FAILED: {name}\n{trouble}" if trouble else f"ok: {name}")
    picture(folder, f"{name}-failed.png" if trouble else f"{name}.png")
    return not trouble


def main() -> None:
    """Run in the application and leave it with the exit code."""
    if len(sys.argv) > 1 and os.path.isdir(sys.argv[-1]):
        code = run(sys.argv[-1])
        say(f"please send these lines and what is in {sys.argv[-1]}")
        slicer.util.exit(code)
        return
    with tempfile.TemporaryDirectory() as folder:
        slicer.util.exit(run(folder))


if __name__ == "__main__":
    main()
