"""The ProGiDiffSlicer module of 3D Slicer: type an organ, get ranked proposals of its outline."""

from __future__ import annotations

import os
import sys
import time
import unittest
from typing import Any

import slicer
from slicer.i18n import tr as _
from slicer.i18n import translate
from slicer.ScriptedLoadableModule import (
    ScriptedLoadableModule,
    ScriptedLoadableModuleLogic,
    ScriptedLoadableModuleTest,
    ScriptedLoadableModuleWidget,
)
from slicer.util import VTKObservationMixin

# The library is imported where it is needed: Slicer reads this file at every start, whether the module is opened or not.

SAMPLE_NAME = "ProGiDiffAbdomen"
SAMPLE_NODE_NAME = "Synthetic abdomen CT"
LIBRARY = "ProGiDiffSlicerLib"


class ProGiDiffSlicer(ScriptedLoadableModule):
    """What Slicer shows about the module."""

    def __init__(self, parent: Any) -> None:
        ScriptedLoadableModule.__init__(self, parent)
        parent.title = _("ProGiDiffSlicer")
        parent.categories = [translate("qSlicerAbstractCoreModule", "Segmentation")]
        # Slicer unloads modules in the reverse of the order in which it loaded them: cleanup() works with nodes of these.
        parent.dependencies = ["Markups", "Segmentations", "Sequences", "SubjectHierarchy", "Terminologies", "Volumes"]
        parent.contributors = ["The ProGiDiffSlicer developers"]
        parent.helpText = _(
            "Type the name of an organ and get several ranked proposals of its outline on a CT or MR volume, with a map of "
            "where the proposals disagree. Accept one as a segment, edit it, undo it. For research use, not for diagnosis."
        )
        parent.acknowledgementText = _(
            "The method follows ProGiDiff, prompt-guided diffusion for medical image segmentation "
            "({link}). If you publish results, please cite that paper."
        ).format(link='<a href="https://arxiv.org/abs/2601.16060">arXiv:2601.16060</a>')
        slicer.app.connect("startupCompleted()", registerSampleData)


def registerSampleData() -> None:
    """Offer the bundled sample volume in the Sample Data module; it is read from the installation, not from a network."""
    import hashlib

    from SampleData import SampleDataLogic

    from progidiff.errors import InputError
    from progidiff.places import sample_volume

    try:
        sample = sample_volume()
    except InputError:
        return
    if hasattr(SampleDataLogic, "registerCustomSampleDataCategory"):  # Slicer 5.12
        SampleDataLogic.registerCustomSampleDataCategory("ProGiDiffSlicer", title=_("ProGiDiffSlicer"))
    SampleDataLogic.registerCustomSampleDataSource(
        category="ProGiDiffSlicer",
        sampleName=SAMPLE_NAME,
        uris=sample.as_uri(),
        fileNames=sample.name,
        nodeNames=SAMPLE_NODE_NAME,
        checksums=f"SHA256:{hashlib.sha256(sample.read_bytes()).hexdigest()}",
        thumbnailFileName=os.path.join(os.path.dirname(__file__), "Resources", "Icons", "ProGiDiffSlicer.png"),
    )


class ProGiDiffSlicerWidget(ScriptedLoadableModuleWidget, VTKObservationMixin):
    """The module's place in Slicer's window; the panels are in ProGiDiffSlicerLib/panels."""

    def __init__(self, parent: Any = None) -> None:
        ScriptedLoadableModuleWidget.__init__(self, parent)
        VTKObservationMixin.__init__(self)
        self.logic: Any = None
        self.panels: Any = None
        self._parameters: Any = None
        self._entered = False

    def setup(self) -> None:
        """Called when the module is opened for the first time."""
        ScriptedLoadableModuleWidget.setup(self)
        from ProGiDiffSlicerLib.panels.module import ModulePanels

        self.logic = ProGiDiffSlicerLogic()
        self.panels = ModulePanels(self.layout, self.logic.services)
        self.addObserver(slicer.mrmlScene, slicer.mrmlScene.StartCloseEvent, self.onSceneStartClose)
        self.addObserver(slicer.mrmlScene, slicer.mrmlScene.EndCloseEvent, self.onSceneEndClose)
        self.addObserver(slicer.mrmlScene, slicer.mrmlScene.EndImportEvent, self.onSceneEndImport)
        slicer.app.connect("aboutToQuit()", self.onAboutToQuit)
        self.initializeParameterNode()
        if getattr(self.parent, "isEntered", False):
            # Nobody enters a module again that is reloaded while it is shown.
            self.enter()

    def enter(self) -> None:
        """Called each time the module is shown, even where it could not be set up."""
        self._entered = True
        self.initializeParameterNode()
        if self.panels is not None:
            self.panels.enter()

    def exit(self) -> None:
        """Called each time another module is shown instead; a run goes on meanwhile."""
        self._entered = False
        if self.panels is not None:
            self.panels.exit()

    def cleanup(self) -> None:
        """Called when the application closes and when the module is reloaded."""
        self._close()

    def onAboutToQuit(self) -> None:
        """The application ends. Slicer has unloaded its modules by then; the worker ends also where it did not."""
        self._close()

    def onSceneStartClose(self, caller: Any, event: str) -> None:
        """The parameter node is about to go."""
        self.setParameters(None)

    def onSceneEndClose(self, caller: Any, event: str) -> None:
        """Start again with the empty scene where the module is shown."""
        if self._entered:
            self.initializeParameterNode()

    def onSceneEndImport(self, caller: Any, event: str) -> None:
        """A scene was read, perhaps with parameters of this module."""
        self.setParameters(None)
        if self._entered:
            self.initializeParameterNode()

    def onReload(self) -> None:
        """Read the module again from its files, with everything in its library."""
        for name in [name for name in sys.modules if name == LIBRARY or name.startswith(LIBRARY + ".")]:
            del sys.modules[name]
        ScriptedLoadableModuleWidget.onReload(self)

    def initializeParameterNode(self) -> None:
        """Show the scene's parameters; the first volume is chosen where none is."""
        if self.panels is None:
            return
        if self._parameters is None:
            self.setParameters(self.logic.getParameterNode())
        if self._parameters.inputVolume is None:
            from ProGiDiffSlicerLib.scene.nodes import first_volume

            self._parameters.inputVolume = first_volume(slicer.mrmlScene)

    def setParameters(self, parameters: Any) -> None:
        """Show these parameters; ``None``: let go of them."""
        before, self._parameters = self._parameters, parameters
        if self.panels is not None and parameters is None:
            self.panels.disconnectGui()
        elif self.panels is not None:
            self.panels.connectGui(parameters)
        if before is not None:
            before.removeObservers()

    def _close(self) -> None:
        """Leave no process, timer or observer. At exit Slicer calls ``cleanup`` first, then ``aboutToQuit`` arrives."""
        logic, self.logic = self.logic, None
        if logic is None:
            return
        self.removeObservers()
        slicer.app.disconnect("aboutToQuit()", self.onAboutToQuit)
        panels, self.panels = self.panels, None
        if panels is not None:
            panels.cleanup()
        self.setParameters(None)
        logic.close()


class ProGiDiffSlicerLogic(ScriptedLoadableModuleLogic):
    """Everything that works without a window."""

    def __init__(self) -> None:
        ScriptedLoadableModuleLogic.__init__(self)
        from ProGiDiffSlicerLib.services import Services

        self.services = Services(slicer.mrmlScene)

    def getParameterNode(self) -> Any:
        """The module's parameters in this scene."""
        from ProGiDiffSlicerLib.parameters import Parameters

        wrapped: Any = Parameters  # the decorator gives it its constructor
        return wrapped(ScriptedLoadableModuleLogic.getParameterNode(self))

    def close(self) -> None:
        """End the worker and leave nothing behind."""
        self.services.close()


class ProGiDiffSlicerTest(ScriptedLoadableModuleTest):
    """The way from the sample volume to an accepted segment and back, with the real worker, in the running application."""

    RUN_TIMEOUT_S = 600

    def setUp(self) -> None:
        """Start with an empty scene."""
        slicer.mrmlScene.Clear(0)

    def runTest(self) -> None:
        """Run all tests: what "Test" and "Reload and Test" call, which take a skipped test for a failed one."""
        self.setUp()
        try:
            self.test_main_path()
        except unittest.SkipTest as skipped:
            self.delayDisplay(_("Test skipped: {reason}").format(reason=skipped))

    def test_main_path(self) -> None:
        """Sample volume, prompt, propose, accept, undo, redo."""
        from progidiff.places import sample_volume

        if slicer.util.mainWindow() is not None:
            slicer.util.selectModule("ProGiDiffSlicer")
        widget = slicer.util.getModuleWidget("ProGiDiffSlicer")
        panels, session = widget.panels, widget.logic.services.session
        if not panels.setup.ready:
            self.skipTest("The setup is not complete: open the module and install what it needs.")
        if slicer.util.mainWindow() is None:
            # Nothing else enters the module again after the scene was cleared.
            widget.enter()
        volume = slicer.util.loadVolume(str(sample_volume()), {"name": SAMPLE_NODE_NAME})
        panels.prompt.ui.volumeSelector.setCurrentNode(volume)

        self.delayDisplay("Proposing the liver on the middle slices")
        panels.prompt.ui.promptEdit.setText("liver")
        panels.prompt.ui.proposalsSpinBox.setValue(4)
        panels.prompt.ui.extentComboBox.setCurrentIndex(2)
        panels.prompt.ui.rangeWidget.setValues(13, 15)
        panels.prompt.ui.proposeButton.click()
        assert session.running, panels.status.text
        self._wait(session)
        assert session.failure is None, panels.status.text
        store = session.store
        assert store is not None
        assert store["liver"].ranked
        assert panels.proposals.selected.millilitres > 1

        self.delayDisplay("Accepting the best proposal")
        panels.review.ui.acceptButton.click()
        segmentation = panels.review.ui.segmentationSelector.currentNode()
        assert segmentation is not None, panels.status.text
        assert segmentation.GetSegmentation().GetNumberOfSegments() == 1
        segment = segmentation.GetSegmentation().GetNthSegment(0)
        assert segment.GetName() == "Liver"
        identifier = segmentation.GetSegmentation().GetNthSegmentID(0)
        voxels = int((slicer.util.arrayFromSegmentBinaryLabelmap(segmentation, identifier, volume) > 0).sum())
        assert voxels > 100

        self.delayDisplay("Undo and redo")
        panels.review.ui.undoButton.click()
        assert not slicer.mrmlScene.IsNodePresent(segmentation)
        panels.review.ui.redoButton.click()
        assert slicer.mrmlScene.IsNodePresent(segmentation)
        assert segmentation.GetSegmentation().GetNumberOfSegments() == 1
        self.delayDisplay("Test passed")

    def _wait(self, session: Any) -> None:
        end = time.monotonic() + self.RUN_TIMEOUT_S
        while session.running and time.monotonic() < end:
            slicer.app.processEvents()
            time.sleep(0.005)
        assert not session.running, "The run takes too long."
