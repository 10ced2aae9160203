"""What the tests of the session share: volumes in the scene, events as a worker sends them, and a scripted client."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import fields
from typing import Any

import numpy as np
import slicer
import vtk
from vtk.util.numpy_support import vtk_to_numpy

from progidiff.volumes.geometry import Geometry
from progidiff.volumes.slicing import SlicePlan, plan_slices
from progidiff.wire.conversation import WorkerFailure
from progidiff.wire.messages import (
    AdapterLoaded,
    AdapterUnloaded,
    DoneEvent,
    ImageInfo,
    ImageReply,
    Loaded,
    ProposeRequest,
)
from ProGiDiffSlicerLib.scene.volumes import volume_image
from ProGiDiffSlicerLib.session import RunRequest
from ProGiDiffSlicerLib.worker.calls import Call

from ..volume_examples import ramp
from .setup_examples import CARD

LABELMAP = "Binary labelmap"
VOCABULARY = ("liver", "spleen", "left kidney")


def matrix(array: np.ndarray) -> Any:
    """vtkMatrix4x4 of a (4, 4)."""
    result = vtk.vtkMatrix4x4()
    result.DeepCopy([float(v) for v in np.asarray(array).ravel()])
    return result


def add_volume(scene: Any, geometry: Geometry, name: str = "CT", array: np.ndarray | None = None) -> Any:
    """A volume node with its own copy of ``array`` (K, J, I), by default a different value in every voxel."""
    node = slicer.vtkMRMLScalarVolumeNode()
    node.SetName(name)
    node.SetIJKToRASMatrix(matrix(geometry.affine))
    slicer.util.updateVolumeFromArray(node, ramp(geometry) if array is None else array)
    scene.AddNode(node)
    return node


def add_transform(scene: Any, affine: np.ndarray) -> Any:
    """A linear transform node."""
    node = slicer.vtkMRMLLinearTransformNode()
    node.SetMatrixTransformToParent(matrix(affine))
    scene.AddNode(node)
    return node


def add_sequence(scene: Any, geometry: Geometry, arrays: Sequence[np.ndarray], name: str = "heart") -> tuple[Any, Any]:
    """A sequence of volumes and its browser; the proxy node that shows a frame, and the browser."""
    sequence = scene.AddNewNodeByClass("vtkMRMLSequenceNode", f"{name} sequence")
    sequence.SetIndexName("time")
    sequence.SetIndexUnit("s")
    for number, array in enumerate(arrays):
        node = slicer.vtkMRMLScalarVolumeNode()
        node.SetName(f"{name} {number}")
        node.SetIJKToRASMatrix(matrix(geometry.affine))
        slicer.util.updateVolumeFromArray(node, array)
        sequence.SetDataNodeAtValue(node, str(number * 0.5))
    browser = scene.AddNewNodeByClass("vtkMRMLSequenceBrowserNode", f"{name} browser")
    browser.SetAndObserveMasterSequenceNodeID(sequence.GetID())
    browser.SetSelectedItemNumber(0)
    proxy = browser.GetProxyNode(sequence)
    assert proxy is not None, "the sequences logic makes the proxy node"
    return proxy, browser


def segment_array(node: Any, segment_id: str, shape_kji: tuple[int, int, int]) -> np.ndarray:
    """The voxels of a segment by index, bool (K, J, I)."""
    segment = node.GetSegmentation().GetSegment(segment_id)
    image = segment.GetRepresentation(LABELMAP)
    full = np.zeros(shape_kji, bool)
    i0, i1, j0, j1, k0, k1 = image.GetExtent()
    if i1 >= i0:
        values = vtk_to_numpy(image.GetPointData().GetScalars()).reshape(k1 - k0 + 1, j1 - j0 + 1, i1 - i0 + 1)
        full[k0 : k1 + 1, j0 : j1 + 1, i0 : i1 + 1] = values == segment.GetLabelValue()
    return full


def segment_points(node: Any, segment_id: str) -> np.ndarray:
    """Where the voxels of a segment lie in the world, transforms included: float (n, 3) RAS in mm, sorted."""
    segment = node.GetSegmentation().GetSegment(segment_id)
    image = segment.GetRepresentation(LABELMAP)
    i0, i1, j0, j1, k0, k1 = image.GetExtent()
    if i1 < i0:
        return np.zeros((0, 3))
    values = vtk_to_numpy(image.GetPointData().GetScalars()).reshape(k1 - k0 + 1, j1 - j0 + 1, i1 - i0 + 1)
    kji = np.argwhere(values == segment.GetLabelValue()) + np.array([k0, j0, i0])
    to_node = vtk.vtkMatrix4x4()
    image.GetImageToWorldMatrix(to_node)
    affine = slicer.util.arrayFromVTKMatrix(to_node)
    parent = node.GetParentTransformNode()
    if parent is not None:
        to_world = vtk.vtkMatrix4x4()
        parent.GetMatrixTransformToWorld(to_world)
        affine = slicer.util.arrayFromVTKMatrix(to_world) @ affine
    return sorted_points(kji, affine)


def sorted_points(kji: np.ndarray, affine: np.ndarray) -> np.ndarray:
    """Voxels (n, 3) by (k, j, i) as points in RAS, in a fixed order."""
    points = np.c_[kji[:, ::-1], np.ones(len(kji))] @ np.asarray(affine).T
    rounded = points[:, :3].round(4) + 0.0
    return rounded[np.lexsort(rounded.T)]


class FakeClient:
    """A worker client without a process: the test says what the worker does, call by call."""

    def __init__(self, vocabulary: tuple[str, ...] = VOCABULARY) -> None:
        self.vocabulary = vocabulary
        self.loaded: Loaded | None = None
        self.loaded_from: tuple[str | None, str] | None = None
        self.adapter: AdapterLoaded | None = None
        self.adapter_from: str | None = None
        self.calls: list[tuple[Call, tuple[Any, ...]]] = []
        self.cancels: list[Call] = []

    def load(self, folder: str | None, device: str = "auto") -> Call:
        return self._call("load", folder, device)

    def load_adapter(self, folder: str, even_if_worse: bool = False) -> Call:
        return self._call("load_adapter", folder, even_if_worse)

    def unload_adapter(self) -> Call:
        return self._call("unload_adapter")

    def set_image(
        self,
        array_kji: np.ndarray,
        affine: np.ndarray,
        modality: str | None = None,
        plane: str | None = None,
        correct_values: bool = False,
    ) -> Call:
        return self._call("set_image", array_kji, affine, modality, plane, correct_values)

    def propose(self, request: ProposeRequest) -> Call:
        return self._call("propose", request)

    def _call(self, kind: str, *values: Any) -> Call:
        call = Call(kind, self.cancels.append)
        self.calls.append((call, values))
        return call

    @property
    def call(self) -> Call:
        """The latest call."""
        return self.calls[-1][0]

    @property
    def values(self) -> tuple[Any, ...]:
        """Its arguments."""
        return self.calls[-1][1]

    @property
    def kinds(self) -> list[str]:
        return [call.kind for call, _values in self.calls]

    def answer_load(self) -> None:
        assert self.call.kind == "load"
        self.loaded, self.loaded_from = (
            Loaded("fake", self.vocabulary, "cpu", {**CARD, "vocabulary": self.vocabulary}),
            self.values,
        )
        self.call.succeed(self.loaded)

    def answer_adapter(self) -> None:
        if self.call.kind == "unload_adapter":
            self.adapter = self.adapter_from = None
            self.call.succeed(AdapterUnloaded())
            return
        assert self.call.kind == "load_adapter"
        self.adapter, self.adapter_from = AdapterLoaded(f"id of {self.values[0]}"), self.values[0]
        self.call.succeed(self.adapter)

    def answer_image(self) -> None:
        assert self.call.kind == "set_image"
        array, affine, _modality, plane, _correct = self.values
        k, j, i = array.shape
        plan = plan_slices(Geometry((i, j, k), affine), plane)
        info = ImageInfo("hash", plan.plane, plan.count, plan.shape_rc, plan.spacing_rc, plan.slice_spacing)
        self.call.succeed(ImageReply("key", info))

    def reach_propose(self) -> Call:
        """Answer whatever comes first; the proposing call."""
        if self.call.kind == "load":
            self.answer_load()
        if self.call.kind in ("load_adapter", "unload_adapter"):
            self.answer_adapter()
        self.answer_image()
        assert self.call.kind == "propose"
        return self.call

    def finish(self) -> None:
        self.call.succeed(DoneEvent("fake", self.values[0].proposals))

    def crash(self) -> None:
        self.loaded = self.loaded_from = self.adapter = self.adapter_from = None
        self.call.fail(WorkerFailure("exit", "The worker ended unexpectedly (exit code 42); start it again."))

    def confirm_cancel(self) -> None:
        """The worker has stopped what was cancelled last."""
        self.cancels[-1].end_cancelled()


def run_request(volume: Any, prompt: str, **options: Any) -> RunRequest:
    """What a user asks for; ``options`` are fields of the request for the engine and of what is around it."""
    asked = {field.name: options.pop(field.name) for field in fields(ProposeRequest) if field.name in options}
    return RunRequest(volume.GetID(), prompt, ProposeRequest(**{"targets": (), **asked}), **options)


def plan_of(node: Any) -> tuple[Geometry, SlicePlan]:
    geometry = volume_image(node).geometry
    return geometry, plan_slices(geometry)
