"""What the user chose: kept in a parameter node, so that it is saved with the scene."""

from __future__ import annotations

from dataclasses import fields
from enum import StrEnum
from typing import Annotated, Any

from slicer import vtkMRMLScalarVolumeNode, vtkMRMLSegmentationNode
from slicer.i18n import tr as _
from slicer.parameterNodeWrapper import WithinRange, parameterNodeWrapper

from progidiff.wire.messages import ProposeRequest
from ProGiDiffSlicerLib.scene.accept import AcceptMode
from ProGiDiffSlicerLib.scene.labelmaps import Overwrite
from ProGiDiffSlicerLib.scene.volumes import Extent, Frames

MOST_PROPOSALS = 100
MOST_STEPS = 100
# The largest number that Qt's spin box takes.
LARGEST_SEED = 2**31 - 1


class Plane(StrEnum):
    """In which plane the volume is cut; "" is what suits volume and model."""

    AUTOMATIC = ""
    AXIAL = "axial"
    CORONAL = "coronal"
    SAGITTAL = "sagittal"

    def label(self) -> str:
        """The choice's text in a combo box."""
        return {
            Plane.AUTOMATIC: _("Automatic"),
            Plane.AXIAL: _("Axial"),
            Plane.CORONAL: _("Coronal"),
            Plane.SAGITTAL: _("Sagittal"),
        }[self]


@parameterNodeWrapper
class _Parameters:
    """The module's parameters.

    Attributes:
        inputVolume: the volume to propose for.
        correctedVolume: the volume of which the user wants values corrected that cannot be Hounsfield units.
        prompt: what to outline, as typed.
        promptHistory: earlier prompts, latest last.
        plane: in which plane the volume is cut.
        extent: how much of the volume.
        rangeStart, rangeStop: half-open range of slices along the slice axis, used by ``Extent.RANGE``.
        frames: which frames, where the volume is a frame of a sequence.
        proposals: how many proposals (the maximum when ``adaptive``).
        topK: how many of the best are shown at first.
        steps: denoising steps.
        seed: seed of the latest or next run.
        seedLocked: whether the next run keeps ``seed`` or draws a new one.
        adaptive: whether sampling stops when the proposals have settled.
        everywhere: whether targets are also drawn on slices where they seem to be absent.
        keepPieces: whether proposals of a stack stay as they were sampled, with islands and holes.
        blinded: whether the proposals are listed in random order, without rank and score.
        adapterFolder: folder of the adapter that the next run uses; "" for the base model.
        adapterEvenIfWorse: whether it is used although it was not better than its base on held-out cases.
        targetSegmentation: where accepted segments go; none: a new segmentation.
        acceptMode: as a new segment, in place of one, or added to one.
        targetSegment: id of that one.
        overwrite: which other segments may change.
        showAgreement: whether the map of agreement is shown.
        agreementOpacity: its opacity, 0 to 1.
    """

    inputVolume: vtkMRMLScalarVolumeNode
    correctedVolume: vtkMRMLScalarVolumeNode
    prompt: str = ""
    promptHistory: list[str]
    plane: Plane = Plane.AUTOMATIC
    extent: Extent = Extent.VOLUME
    rangeStart: int = 0
    rangeStop: int = 0
    frames: Frames = Frames.THIS
    proposals: Annotated[int, WithinRange(1, MOST_PROPOSALS)] = 8
    topK: Annotated[int, WithinRange(1, MOST_PROPOSALS)] = 3
    steps: Annotated[int, WithinRange(1, MOST_STEPS)] = 4
    seed: Annotated[int, WithinRange(0, LARGEST_SEED)] = 0
    seedLocked: bool = False
    adaptive: bool = False
    everywhere: bool = False
    keepPieces: bool = False
    blinded: bool = False
    adapterFolder: str = ""
    adapterEvenIfWorse: bool = False
    targetSegmentation: vtkMRMLSegmentationNode
    acceptMode: AcceptMode = AcceptMode.NEW
    targetSegment: str = ""
    overwrite: Overwrite = Overwrite.NONE
    showAgreement: bool = False
    agreementOpacity: Annotated[float, WithinRange(0.0, 1.0)] = 0.5


class Parameters(_Parameters):
    """The module's parameters in one node, with every observer of it that was added through them.

    Slicer 5.10 adds an observer in ``connectGui`` that it never removes; it would keep these parameters and their own
    observers alive, and the node outlives them: one more set with every scene that is closed or read.
    """

    def __init__(self, parameterNode: Any) -> None:
        super().__init__(parameterNode)  # type: ignore[call-arg]
        self._tags: list[int] = []

    def request(self) -> ProposeRequest:
        """What of a request can be chosen: each of its fields that has a parameter, ``topK`` for ``top_k``; no targets."""
        chosen: dict[str, Any] = {"targets": ()}
        for field in fields(ProposeRequest):
            first, *others = field.name.split("_")
            parameter = first + "".join(map(str.capitalize, others))
            if hasattr(self, parameter):
                chosen[field.name] = getattr(self, parameter)
        return ProposeRequest(**chosen)

    def AddObserver(self, event: Any, callback: Any, priority: float = 0.0) -> int:
        """Observe the node; the tag of the observer."""
        tag = int(self.parameterNode.AddObserver(event, callback, priority))  # type: ignore[attr-defined]
        self._tags.append(tag)
        return tag

    def removeObservers(self) -> None:
        """Observe the node no more, whoever asked for it."""
        for tag in self._tags:
            self.parameterNode.RemoveObserver(tag)  # type: ignore[attr-defined]
        self._tags.clear()
