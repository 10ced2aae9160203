"""The module's main path in the running application, with its real widgets, files and worker.

Everything that can be tested without the application is tested by ``make test``, in a stand-in for its Qt side. This script
is for the rest. It needs a Slicer (5.10 or later) in which the module's Setup says that everything is installed::

    Slicer --testing --no-splash --additional-module-paths <checkout>/ProGiDiffSlicer \\
           --python-script <checkout>/Testing/slicer/main_path.py [folder]

It closes the scene, takes a few minutes on a CPU, and prints one line per step. With a folder it leaves pictures of the
window and the saved scene there. Exit code: 0 passed, 1 failed, 77 not run because packages of the worker are missing. CTest
runs it too (Testing/slicer/CMakeLists.txt).

Not verified so far: nobody has run this script in the real application yet. Its steps other than editing run in the stand-in
(Testing/panel/test_main_path_script.py).
"""

from __future__ import annotations

import os
import sys
import tempfile
import time
import traceback
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


def check_main_path() -> None:
    """Sample volume, prompt, proposals, accept, undo, redo: the test that the module itself has."""
    from ProGiDiffSlicer import ProGiDiffSlicerTest

    case = ProGiDiffSlicerTest()
    case.messageDelay = 100
    case.setUp()
    case.test_main_path()
    accepted()


def check_editing() -> None:
    """The embedded Segment Editor changes the accepted segment, and its provenance says so."""
    from ProGiDiffSlicerLib.logic.provenance import read_provenance

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


def check_scene_file(folder: str) -> None:
    """The accepted segment comes back from a saved scene with all that is known of it; proposals are not saved."""
    from ProGiDiffSlicerLib.logic.provenance import read_provenance

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


def check_reload() -> None:
    """Reloading the module ends its worker and gives a panel that works."""
    panels()
    old = slicer.modules.ProGiDiffSlicerWidget.logic.services.client
    slicer.util.reloadScriptedModule("ProGiDiffSlicer")
    wait_until(lambda: old.state.value == "stopped", "the worker of the panel before the reload ends")
    assert slicer.modules.ProGiDiffSlicerWidget.logic.services.client is not old
    assert panels().setup.ready


def picture(folder: str, name: str) -> None:
    """A picture of the window, where there is one."""
    window = slicer.util.mainWindow()
    if window is not None:
        slicer.app.processEvents()
        window.grab().save(os.path.join(folder, name))


def run(folder: str) -> int:
    """All steps; returns the exit code."""
    if not hasattr(slicer.modules, "progidiffslicer"):
        say("FAILED: the module is not loaded; name its folder with --additional-module-paths")
        return FAILED
    if not panels().setup.ready:
        say("SKIPPED: packages of the worker are missing; open the module, press Install in Setup, and run this again")
        return SKIPPED
    for name, step in (
        ("proposals", check_main_path),
        ("editing", check_editing),
        ("scene-file", lambda: check_scene_file(folder)),
        ("reload", check_reload),
    ):
        try:
            step()
        except Exception:
            say(f"FAILED: {name}\n{traceback.format_exc()}")
            picture(folder, f"{name}-failed.png")
            return FAILED
        say(f"ok: {name}")
        picture(folder, f"{name}.png")
    return PASSED


def main() -> None:
    """Run in the application and leave it with the exit code."""
    if len(sys.argv) > 1 and os.path.isdir(sys.argv[-1]):
        slicer.util.exit(run(sys.argv[-1]))
        return
    with tempfile.TemporaryDirectory() as folder:
        slicer.util.exit(run(folder))


if __name__ == "__main__":
    main()
