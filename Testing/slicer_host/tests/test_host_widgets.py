"""The stand-ins for CTK's and Slicer's widgets: they follow the scene, keep their limits and say when they change."""

from __future__ import annotations

from typing import Any

import ctk
import numpy as np
import pytest
import qt
import slicer
import vtk

from ..observers import Observers

pytestmark = pytest.mark.usefixtures("app")


@pytest.fixture
def box(scene: Any) -> Any:
    made = slicer.qMRMLNodeComboBox()
    made.nodeTypes = ["vtkMRMLScalarVolumeNode"]
    made.setMRMLScene(scene)
    return made


@pytest.fixture
def segmentation(scene: Any) -> Any:
    node = scene.AddNewNodeByClass("vtkMRMLSegmentationNode", "Accepted")
    node.CreateDefaultDisplayNodes()
    for name, colour in (("liver", (0.9, 0.5, 0.3)), ("spleen", (0.6, 0.2, 0.2))):
        node.GetSegmentation().AddEmptySegment(name, name, list(colour))
    return node


def shown_texts(box: Any) -> list[str]:
    inner = box.findChild(qt.QComboBox)
    return [inner.itemText(index) for index in range(inner.count)]


def test_node_box_follows_the_scene(box: Any, scene: Any) -> None:
    changes: list[Any] = []
    box.connect("currentNodeChanged(vtkMRMLNode*)", changes.append)
    first = scene.AddNewNodeByClass("vtkMRMLScalarVolumeNode", "CT")
    second = scene.AddNewNodeByClass("vtkMRMLScalarVolumeNode", "MR")
    scene.AddNewNodeByClass("vtkMRMLModelNode", "no volume")
    hidden = scene.AddNewNodeByClass("vtkMRMLScalarVolumeNode", "hidden")
    hidden.SetHideFromEditors(True)
    box.setMRMLScene(scene)
    assert box.nodeCount() == 2
    assert box.currentNode() is first
    box.setCurrentNodeID(second.GetID())
    second.SetName("MR T2")
    assert "MR T2" in shown_texts(box)
    scene.RemoveNode(second)
    assert box.currentNode() is first
    scene.Clear(False)
    assert box.currentNode() is None
    assert changes == [first, second, first, None]


def test_node_box_none_attributes_and_bool_signal(box: Any, scene: Any) -> None:
    valid: list[bool] = []
    box.noneEnabled = True
    box.addAttribute("vtkMRMLScalarVolumeNode", "Example.Role", "proposals")
    box.connect("currentNodeChanged(bool)", valid.append)
    plain = scene.AddNewNodeByClass("vtkMRMLScalarVolumeNode", "plain")
    marked = scene.AddNewNodeByClass("vtkMRMLScalarVolumeNode", "marked")
    assert box.nodeCount() == 0
    marked.SetAttribute("Example.Role", "proposals")
    box.setMRMLScene(scene)
    assert box.currentNode() is None
    assert shown_texts(box)[:2] == ["None", "marked"]
    box.setCurrentNode(marked)
    box.setCurrentNode(plain)
    assert box.currentNode() is None
    assert valid == [True, False]


def test_a_deleted_widget_observes_nothing(app: Any) -> None:
    class Watcher(qt.QWidget):
        def __init__(self) -> None:
            super().__init__()
            self.calls = 0

        def count(self) -> None:
            self.calls += 1

    where, watcher = vtk.vtkObject(), Watcher()
    Observers(watcher).add(where, "ModifiedEvent", watcher.count)
    where.Modified()
    assert watcher.calls == 1
    watcher.delete()
    assert not where.HasObserver("ModifiedEvent")


def test_slider_keeps_range_and_decimals() -> None:
    slider, seen = ctk.ctkSliderWidget(), []
    slider.connect("valueChanged(double)", seen.append)
    slider.setDecimals(0)
    slider.minimum, slider.maximum = 1, 50
    slider.value = 8
    slider.setValue(60)
    assert slider.value == 50
    slider.findChild(qt.QSlider).setValue(0)
    assert slider.value == 1
    assert seen == [1.0, 8.0, 50.0, 1.0]


def test_range_widget_and_its_parts_agree() -> None:
    widget, seen = ctk.ctkRangeWidget(), []
    widget.connect("valuesChanged(double,double)", lambda low, high: seen.append((low, high)))
    widget.setDecimals(0)
    widget.setRange(0, 80)
    widget.setValues(40, 12)
    assert (widget.minimumValue, widget.maximumValue) == (12, 40)
    widget.findChildren(qt.QDoubleSpinBox)[0].setValue(20)
    assert (widget.minimumValue, widget.maximumValue) == (20, 40)
    widget.setRange(0, 30)
    assert widget.maximumValue == 30
    assert seen[-3:] == [(12, 40), (20, 40), (20, 30)]


def test_collapsible_button_hides_what_it_holds(spin: Any) -> None:
    button, states = ctk.ctkCollapsibleButton(), []
    button.text = "Setup"
    button.connect("contentsCollapsed(bool)", states.append)
    inside, never = qt.QLabel("status"), qt.QLabel("never shown")
    layout = qt.QVBoxLayout(button)
    layout.addWidget(inside)
    layout.addWidget(never)
    never.hide()
    button.show()
    spin()
    assert inside.visible
    high = button.sizeHint().height()
    assert button.minimumSizeHint().height() > inside.minimumSizeHint().height() + 16, "no room for the header"
    button.collapsed = True
    assert not inside.visible
    assert button.sizeHint().height() < high
    button.click()
    assert not button.collapsed
    assert inside.visible
    assert not never.visible
    assert states == [True, False]


def test_segment_editor_takes_the_reference_volume_and_the_first_segment(segmentation: Any, scene: Any) -> None:
    editor = slicer.qMRMLSegmentEditorWidget()
    editor.setMRMLScene(scene)
    volume, other = (slicer.util.addVolumeFromArray(np.zeros((4, 5, 6), np.int16), name=name) for name in ("CT", "PET"))
    segmentation.SetReferenceImageGeometryParameterFromVolumeNode(volume)
    node = scene.AddNewNodeByClass("vtkMRMLSegmentEditorNode")
    node.SetAndObserveSegmentationNode(segmentation)
    node.SetAndObserveSourceVolumeNode(other)
    node.SetSelectedSegmentID("spleen")
    editor.setMRMLSegmentEditorNode(node)
    assert (node.GetSourceVolumeNode().GetName(), node.GetSelectedSegmentID()) == ("CT", "liver")
    composites = slicer.util.getNodesByClass("vtkMRMLSliceCompositeNode")
    assert {each.GetBackgroundVolumeID() for each in composites} == {volume.GetID()}
    editor.setMRMLSegmentEditorNode(None)
    assert editor.segmentationNode() is segmentation, "what is shown stays"


def test_segment_editor_activates_the_effect_that_its_node_brings(
    segmentation: Any, scene: Any, slicer_version: str
) -> None:
    def shown(given: Any) -> Any:
        editor = slicer.qMRMLSegmentEditorWidget()
        editor.setMRMLScene(scene)
        node = scene.AddNewNodeByClass("vtkMRMLSegmentEditorNode")
        node.SetAndObserveSegmentationNode(given)
        node.SetActiveEffectName("Paint")
        editor.setMRMLSegmentEditorNode(node)
        return editor

    assert shown(segmentation).activeEffect().name == "Paint"
    if slicer_version == "5.10":
        with pytest.raises(RuntimeError, match="crashes"):
            shown(None)
    else:
        assert shown(None).activeEffect() is None
