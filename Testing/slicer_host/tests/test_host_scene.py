"""The host's application and scene: modules, files, slice views, dialogs, and loading a scripted module."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import slicer

from .. import clear_scene, collected_exceptions, load_module, quit_application, unload_order

UI = """<?xml version="1.0" encoding="UTF-8"?>
<ui version="4.0"><class>Panel</class>
<widget class="qMRMLWidget" name="Panel">
 <layout class="QVBoxLayout" name="column">
  <item><widget class="ctkCollapsibleButton" name="promptButton"><property name="text"><string>Prompt</string></property>
   <layout class="QFormLayout" name="form">
    <item row="0" column="1"><widget class="qMRMLNodeComboBox" name="volumeSelector">
     <property name="nodeTypes"><stringlist><string>vtkMRMLScalarVolumeNode</string></stringlist></property>
     <property name="noneEnabled"><bool>true</bool></property></widget></item>
    <item row="1" column="1"><widget class="ctkSliderWidget" name="proposalsSlider">
     <property name="decimals"><number>0</number></property><property name="minimum"><double>1.0</double></property>
     <property name="maximum"><double>50.0</double></property><property name="value"><double>8.0</double></property>
     <property name="SlicerParameterName" stdset="0"><string>proposals</string></property></widget></item>
   </layout></widget></item>
 </layout></widget>
<customwidgets>
 <customwidget><class>qMRMLWidget</class><extends>QWidget</extends><header>qMRMLWidget.h</header><container>1</container></customwidget>
 <customwidget><class>qMRMLNodeComboBox</class><extends>QWidget</extends><header>qMRMLNodeComboBox.h</header></customwidget>
 <customwidget><class>ctkCollapsibleButton</class><extends>QWidget</extends><header>ctkCollapsibleButton.h</header>
  <container>1</container></customwidget>
 <customwidget><class>ctkSliderWidget</class><extends>QWidget</extends><header>ctkSliderWidget.h</header></customwidget>
</customwidgets>
<connections><connection><sender>Panel</sender><signal>mrmlSceneChanged(vtkMRMLScene*)</signal>
 <receiver>volumeSelector</receiver><slot>setMRMLScene(vtkMRMLScene*)</slot></connection>
 <connection><sender>promptButton</sender><signal>contentsCollapsed(bool)</signal>
 <receiver>proposalsSlider</receiver><slot>setDisabled(bool)</slot></connection></connections></ui>
"""

MODULE = """
import qt, slicer
from slicer.i18n import tr as _, translate
from slicer.ScriptedLoadableModule import *
from slicer.util import VTKObservationMixin

class HostExample(ScriptedLoadableModule):
    def __init__(self, parent):
        ScriptedLoadableModule.__init__(self, parent)
        parent.title = _("Example {name}").format(name="module")
        parent.categories = [translate("qSlicerAbstractCoreModule", "Segmentation")]

class HostExampleWidget(ScriptedLoadableModuleWidget, VTKObservationMixin):
    def __init__(self, parent=None):
        ScriptedLoadableModuleWidget.__init__(self, parent)
        VTKObservationMixin.__init__(self)
        self.closed = 0
    def setup(self):
        ScriptedLoadableModuleWidget.setup(self)
        self.logic = HostExampleLogic()
        self.button = qt.QPushButton("x")
        self.layout.addWidget(self.button)
        self.addObserver(slicer.mrmlScene, slicer.mrmlScene.EndCloseEvent, self.onClose)
    def onClose(self, caller, event):
        self.closed += 1
    def cleanup(self):
        self.removeObservers()

class HostExampleLogic(ScriptedLoadableModuleLogic):
    pass

class HostExampleTest(ScriptedLoadableModuleTest):
    def test_node(self):
        self.assertIsNotNone(HostExampleLogic().getParameterNode())
"""


def test_ui_file_with_stand_ins(scene: Any, tmp_path: Path) -> None:
    path = tmp_path / "Panel.ui"
    path.write_text(UI, encoding="utf-8")
    widget = slicer.util.loadUI(str(path))
    ui = slicer.util.childWidgetVariables(widget)
    assert ui.promptButton.text == "Prompt"
    assert ui.proposalsSlider.value == 8
    assert ui.proposalsSlider.property("SlicerParameterName") == "proposals"
    assert list(ui.volumeSelector.nodeTypes) == ["vtkMRMLScalarVolumeNode"]
    assert ui.volumeSelector.noneEnabled
    ui.promptButton.collapsed = True
    assert not ui.proposalsSlider.enabled
    widget.setMRMLScene(scene)
    scene.AddNewNodeByClass("vtkMRMLScalarVolumeNode", "CT")
    assert ui.volumeSelector.nodeCount() == 1


def test_ui_file_with_an_unknown_class(app: Any, tmp_path: Path) -> None:
    path = tmp_path / "Panel.ui"
    path.write_text(UI.replace("ctkSliderWidget", "ctkUnheardOf"), encoding="utf-8")
    with pytest.raises(RuntimeError, match=r"no stand-in .* ctkUnheardOf"):
        slicer.util.loadUI(str(path))


def test_scene_is_closed_between_tests_and_keeps_what_the_application_needs(scene: Any) -> None:
    scene.AddNewNodeByClass("vtkMRMLScalarVolumeNode", "CT")
    scene.AddNewNodeByClass("vtkMRMLScriptedModuleNode", "P")
    clear_scene()
    assert scene.GetFirstNodeByName("CT") is None
    assert scene.GetFirstNodeByClass("vtkMRMLScriptedModuleNode") is None
    assert scene.GetFirstNodeByClass("vtkMRMLSliceNode") is not None
    assert scene.GetNodeByID("vtkMRMLColorTableNodeGrey") is not None


def test_nodes_have_subject_hierarchy_items_while_they_live(scene: Any) -> None:
    volume = slicer.util.addVolumeFromArray(np.zeros((3, 4, 5), np.int16), name="CT")
    hierarchy = scene.GetSubjectHierarchyNode()
    assert hierarchy.GetItemByDataNode(volume)
    scene.RemoveNode(volume)
    assert not hierarchy.GetItemByName("CT")


def test_segments_have_items_and_a_removed_segmentation_is_still_watched(
    scene: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    node = scene.AddNewNodeByClass("vtkMRMLSegmentationNode", "Accepted")
    hierarchy, segmentation = scene.GetSubjectHierarchyNode(), node.GetSegmentation()
    for name in ("liver", "spleen"):
        segmentation.AddEmptySegment(name, name)
    segmentation.GetSegment("liver").SetName("Leber")
    item = hierarchy.GetItemByDataNode(node)
    assert hierarchy.GetNumberOfItemChildren(item) == 2
    assert hierarchy.GetItemChildWithName(item, "Leber")
    segmentation.RemoveSegment("liver")
    assert hierarchy.GetNumberOfItemChildren(item) == 1
    scene.RemoveNode(node)
    with collected_exceptions(monkeypatch) as complaints:
        segmentation.RemoveSegment("spleen")
    assert len(complaints) == 1
    assert "Subject hierarchy item cannot be found for segmentation node Accepted" in complaints[0]
    scene.AddNode(node)
    segmentation.AddEmptySegment("spleen", "spleen")
    assert hierarchy.GetNumberOfItemChildren(hierarchy.GetItemByDataNode(node)) == 1


def test_modules_are_unloaded_in_the_reverse_order_and_come_back(scene: Any, tmp_path: Path) -> None:
    path = tmp_path / "HostExample.py"
    path.write_text(MODULE, encoding="utf-8")
    loaded = load_module(path)
    order = unload_order()
    assert order.index("Markups") < order.index("HostExample") < order.index("Colors")
    loaded.info.dependencies = ["Markups"]
    order = unload_order()
    assert order.index("HostExample") < order.index("Markups")
    assert order.index("Segmentations") < order.index("HostExample")
    gone: list[bool] = []
    loaded.widget.cleanup = lambda: gone.append(hasattr(slicer.modules, "segmentations"))
    told: list[bool] = []
    slicer.app.aboutToQuit.connect(told_once := lambda: told.append(hasattr(slicer.modules, "markups")))
    quit_application()
    slicer.app.aboutToQuit.disconnect(told_once)
    assert gone == [False]
    assert told == [False], "who listens to the end of the application hears of it after all modules are gone"
    assert slicer.modules.markups.logic() is not None


def test_save_and_load(scene: Any, tmp_path: Path) -> None:
    rng = np.random.default_rng(3)
    array = rng.integers(-1000, 1000, (4, 5, 6)).astype(np.int16)
    volume = slicer.util.addVolumeFromArray(array, name="CT")
    path = str(tmp_path / "bild_ä.nrrd")
    assert slicer.util.saveNode(volume, path)
    clear_scene()
    again = slicer.util.loadVolume(path)
    assert np.array_equal(slicer.util.arrayFromVolume(again), array)
    with pytest.raises(RuntimeError, match="Failed to load"):
        slicer.util.loadVolume(str(tmp_path / "missing.nrrd"))


def test_dialogs_are_noted_and_answered(dialogs: Any) -> None:
    dialogs.answers = [False]
    assert not slicer.util.confirmOkCancelDisplay("Install PyTorch?")
    assert slicer.util.confirmYesNoDisplay("Restart?")
    slicer.util.errorDisplay("No volume is selected.")
    assert dialogs.texts() == ["Install PyTorch?", "Restart?", "No volume is selected."]
    assert dialogs.texts("error") == ["No volume is selected."]


def test_nothing_is_installed(app: Any) -> None:
    with pytest.raises(RuntimeError, match="installs nothing"):
        slicer.util.pip_install("torch")
    assert slicer.packaging.pip_check("numpy>=1.20")
    assert not slicer.packaging.pip_check("numpy>=99")


def test_environment_of_a_process(app: Any) -> None:
    import os

    assert slicer.util.startupEnvironment()["PATH"] == os.environ["PATH"]


def test_settings_live_in_this_run_only(app: Any) -> None:
    import qt

    qt.QSettings().setValue("Example/device", "cpu")
    assert slicer.util.settingsValue("Example/device", "auto") == "cpu"
    assert qt.QSettings().fileName().startswith(app.temporaryPath)
    qt.QSettings().remove("Example/device")


def test_slice_views_are_real(scene: Any) -> None:
    volume = slicer.util.addVolumeFromArray(np.zeros((10, 20, 30), np.int16), name="CT")
    volume.SetSpacing(1, 1, 2.5)
    slicer.util.setSliceViewerLayers(background=volume, fit=True)
    manager = slicer.app.layoutManager()
    assert manager.sliceViewNames() == ("Red", "Yellow", "Green")
    red = manager.sliceWidget("Red")
    red.mrmlSliceNode().JumpSliceByCentering(0, 0, 12.5)
    assert red.sliceLogic().GetSliceOffset() == pytest.approx(12.5)
    assert red.mrmlSliceCompositeNode().GetBackgroundVolumeID() == volume.GetID()
    assert manager.sliceWidget("Slice7") is None


def test_a_scripted_module_is_loaded_reloaded_tested_and_unloaded(scene: Any, tmp_path: Path) -> None:
    path = tmp_path / "HostExample.py"
    path.write_text(MODULE, encoding="utf-8")
    loaded = load_module(path)
    try:
        assert loaded.info.title == "Example module"
        widget = slicer.util.getModuleWidget("HostExample")
        assert widget is loaded.widget
        assert slicer.util.modulePath("HostExample") == str(path)
        scene.Clear(False)
        assert widget.closed == 1
        slicer.selfTests["HostExample"]()
        slicer.util.reloadScriptedModule("HostExample")
        assert loaded.widget is not widget
        assert slicer.modules.HostExampleWidget is loaded.widget
        scene.Clear(False)
        assert (widget.closed, loaded.widget.closed) == (1, 1)
    finally:
        last = loaded.widget
        loaded.unload()
    scene.Clear(False)
    assert last.closed == 1
    assert not hasattr(slicer.modules, "hostexample")
    assert "HostExample" not in sys.modules
