"""The stand-in for Slicer's parameter node wrapper: same keys, same checks, same widgets."""

from __future__ import annotations

import enum
from pathlib import Path
from typing import Annotated, Any

import ctk
import pytest
import qt
import slicer
from slicer.parameterNodeWrapper import (
    Choice,
    Default,
    FloatRange,
    RangeBounds,
    WithinRange,
    parameterNodeWrapper,
    parameterPack,
)


class Extent(enum.Enum):
    SLICE = "slice"
    VOLUME = "volume"


@parameterPack
class Seed:
    number: int
    locked: bool = False


@parameterNodeWrapper
class Parameters:
    volume: slicer.vtkMRMLScalarVolumeNode
    target: slicer.vtkMRMLSegmentationNode | None
    prompt: str
    proposals: Annotated[int, WithinRange(1, 50)] = 8
    opacity: Annotated[float, WithinRange(0, 1), Default(0.4)]
    mode: Annotated[str, Choice(["new", "replace", "add"])] = "new"
    extent: Extent
    slices: Annotated[FloatRange, RangeBounds(0, 100), Default(FloatRange(2, 5))]
    history: list[str]
    folder: Path
    blinded: bool
    seed: Seed


@pytest.fixture
def node(scene: Any) -> Any:
    return scene.AddNewNodeByClass("vtkMRMLScriptedModuleNode")


def test_defaults(node: Any) -> None:
    parameters = Parameters(node)
    assert (parameters.proposals, parameters.opacity, parameters.mode, parameters.prompt) == (8, 0.4, "new", "")
    assert parameters.extent is Extent.SLICE
    assert (parameters.slices.minimum, parameters.slices.maximum) == (2, 5)
    assert parameters.volume is None
    assert parameters.target is None
    assert parameters.seed == Seed(0, False)


def test_values_are_kept_under_slicers_own_keys(node: Any, scene: Any) -> None:
    parameters = Parameters(node)
    volume = scene.AddNewNodeByClass("vtkMRMLScalarVolumeNode", "CT")
    segmentation = scene.AddNewNodeByClass("vtkMRMLSegmentationNode", "S")
    parameters.volume, parameters.target, parameters.extent = volume, segmentation, Extent.VOLUME
    parameters.prompt, parameters.history, parameters.blinded = "liver; spleen", ["liver"], True
    parameters.history.append("spleen")
    parameters.slices.maximum = 50
    parameters.seed.number = 7
    kept = {name: node.GetParameter(name) for name in node.GetParameterNames()}
    assert kept["prompt"] == "liver; spleen"
    assert kept["extent"] == "VOLUME"
    assert kept["blinded"] == "True"
    assert (kept["history.len"], kept["history.1"]) == ("2", "spleen")
    assert kept["slices._maximum"] == "50"
    assert kept["seed.number"] == "7"
    assert node.GetNodeReferenceID("volume") == volume.GetID()
    assert node.GetNodeReferenceID("target.0") == segmentation.GetID()
    assert Parameters(node).history == ["liver", "spleen"]
    assert Parameters(node).seed.number == 7


@pytest.mark.parametrize(
    ("name", "wrong", "error"),
    [
        ("proposals", 51, ValueError),
        ("proposals", 3.5, TypeError),
        ("opacity", None, ValueError),
        ("mode", "other", ValueError),
        ("prompt", 3, TypeError),
        ("slices", FloatRange(0, 101), ValueError),
        ("history", [1], TypeError),
        ("extent", "VOLUME", TypeError),
    ],
)
def test_values_that_the_annotations_forbid_are_refused_and_change_nothing(
    node: Any, name: str, wrong: object, error: type[Exception]
) -> None:
    parameters = Parameters(node)
    before = getattr(parameters, name)
    with pytest.raises(error):
        setattr(parameters, name, wrong)
    assert getattr(parameters, name) == before


def test_parameters_are_saved_with_the_scene(node: Any, scene: Any, tmp_path: Path) -> None:
    parameters = Parameters(node)
    node.SetSingletonTag("Example")
    parameters.volume = slicer.util.addVolumeFromArray(__import__("numpy").zeros((3, 4, 5), "int16"), name="CT äöü")
    parameters.proposals, parameters.prompt, parameters.history = 20, "Leber | links: 3", ["a", "b"]
    path = str(tmp_path / "scène.mrb")
    assert slicer.util.saveScene(path)
    scene.Clear(False)
    slicer.util.loadScene(path)
    found = slicer.util.getNodesByClass("vtkMRMLScriptedModuleNode")
    assert len(found) == 1
    again = Parameters(found[0])
    assert (again.proposals, again.prompt, again.history) == (20, "Leber | links: 3", ["a", "b"])
    assert again.volume.GetName() == "CT äöü"


def test_a_change_elsewhere_is_seen_and_tells_observers_once(node: Any) -> None:
    one, other = Parameters(node), Parameters(node)
    seen: list[int] = []
    tag = one.AddObserver("ModifiedEvent", lambda *_: seen.append(one.proposals))
    other.proposals = 9
    assert one.proposals == 9
    assert seen == [9]
    one.RemoveObserver(tag)


def test_widgets_follow_and_lead(node: Any, scene: Any) -> None:
    holder = qt.QWidget()
    widgets = {
        "volume": slicer.qMRMLNodeComboBox(holder),
        "prompt": qt.QLineEdit(holder),
        "proposals": ctk.ctkSliderWidget(holder),
        "opacity": qt.QDoubleSpinBox(holder),
        "mode": qt.QComboBox(holder),
        "extent": qt.QComboBox(holder),
        "slices": ctk.ctkRangeWidget(holder),
        "folder": ctk.ctkPathLineEdit(holder),
        "blinded": qt.QCheckBox(holder),
        "seed.locked": ctk.ctkCheckBox(holder),
    }
    for name, widget in widgets.items():
        widget.setProperty("SlicerParameterName", name)
    widgets["volume"].setMRMLScene(scene)
    volume = scene.AddNewNodeByClass("vtkMRMLScalarVolumeNode", "CT")
    parameters = Parameters(node)
    tag = parameters.connectGui(holder)
    assert widgets["slices"].maximum == 100
    assert widgets["mode"].currentText == "new"

    parameters.proposals, parameters.prompt, parameters.extent, parameters.blinded = 12, "liver", Extent.VOLUME, True
    parameters.volume, parameters.folder, parameters.slices = volume, Path("/models"), FloatRange(10, 20)
    assert widgets["proposals"].value == 12
    assert widgets["prompt"].text == "liver"
    assert widgets["extent"].currentText == "VOLUME"
    assert widgets["blinded"].checked
    assert widgets["volume"].currentNode() is volume
    assert widgets["folder"].currentPath == str(Path("/models"))
    assert widgets["slices"].maximumValue == 20

    widgets["proposals"].setValue(3)
    widgets["mode"].setCurrentIndex(2)
    widgets["slices"].setValues(30, 60)
    widgets["seed.locked"].setChecked(True)
    assert (parameters.proposals, parameters.mode, parameters.slices.minimum) == (3, "add", 30)
    assert parameters.seed.locked

    parameters.disconnectGui(tag)
    widgets["proposals"].setValue(7)
    assert parameters.proposals == 3


@pytest.mark.parametrize(
    ("widget", "name"),
    [
        (qt.QPlainTextEdit, "prompt"),
        (qt.QGroupBox, "blinded"),
        (ctk.ctkSliderWidget, "prompt"),
        (qt.QSpinBox, "opacity"),
    ],
)
def test_pairs_that_slicer_has_no_connector_for_are_refused(node: Any, widget: Any, name: str) -> None:
    with pytest.raises(RuntimeError, match="Unable to create GUI connector"):
        Parameters(node).connectParametersToGui({name: widget()})


def test_reserved_names_and_impossible_types_are_refused(app: Any) -> None:
    class Reserved:
        default: int

    class Impossible:
        what: complex

    with pytest.raises(ValueError, match="reserved name"):
        parameterNodeWrapper(Reserved)
    with pytest.raises(TypeError, match="Unable to create serializer"):
        parameterNodeWrapper(Impossible)
