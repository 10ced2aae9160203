"""The stand-in for Slicer's parameter node wrapper: same keys, same checks, same widgets."""

from __future__ import annotations

import enum
from typing import Annotated, Any

import ctk
import pytest
import qt
import slicer
from slicer.parameterNodeWrapper import WithinRange, parameterNodeWrapper


class Extent(enum.Enum):
    SLICE = "slice"
    VOLUME = "volume"


@parameterNodeWrapper
class Parameters:
    volume: slicer.vtkMRMLScalarVolumeNode
    prompt: str
    proposals: Annotated[int, WithinRange(1, 50)] = 8
    opacity: Annotated[float, WithinRange(0, 1)] = 0.4
    extent: Extent
    history: list[str]
    blinded: bool


@pytest.fixture
def node(scene: Any) -> Any:
    return scene.AddNewNodeByClass("vtkMRMLScriptedModuleNode")


def test_values_are_kept_under_slicers_own_keys(node: Any, scene: Any) -> None:
    parameters = Parameters(node)
    assert (parameters.proposals, parameters.opacity, parameters.prompt) == (8, 0.4, "")
    assert (parameters.volume, parameters.extent) == (None, Extent.SLICE)
    volume = scene.AddNewNodeByClass("vtkMRMLScalarVolumeNode", "CT")
    parameters.volume, parameters.extent = volume, Extent.VOLUME
    parameters.prompt, parameters.history, parameters.blinded = "liver; spleen", ["liver"], True
    parameters.history.append("spleen")
    kept = {name: node.GetParameter(name) for name in node.GetParameterNames()}
    assert (kept["prompt"], kept["extent"], kept["blinded"]) == ("liver; spleen", "VOLUME", "True")
    assert (kept["history.len"], kept["history.1"]) == ("2", "spleen")
    assert node.GetNodeReferenceID("volume") == volume.GetID()
    assert Parameters(node).history == ["liver", "spleen"]


@pytest.mark.parametrize(
    ("name", "wrong", "error"),
    [
        ("proposals", 51, ValueError),
        ("proposals", 3.5, TypeError),
        ("opacity", None, ValueError),
        ("prompt", 3, TypeError),
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


def test_a_change_elsewhere_is_seen_and_tells_observers_once(node: Any) -> None:
    one, other = Parameters(node), Parameters(node)
    seen: list[int] = []
    tag = one.AddObserver("ModifiedEvent", lambda *_: seen.append(one.proposals))
    other.proposals = 9
    assert one.proposals == 9
    assert seen == [9]
    one.RemoveObserver(tag)


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
