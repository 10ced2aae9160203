"""The map of agreement between proposals, over the volume in the slice views; and the slice on which they differ most."""

from __future__ import annotations

from collections.abc import Generator
from typing import Any

import numpy as np
import slicer
import vtk
from slicer.i18n import tr as _
from vtk.util.numpy_support import numpy_to_vtk

from progidiff.proposals.proposals import Proposals
from progidiff.volumes.slicing import restore_slice
from ProGiDiffSlicerLib.idle import IdleQueue, Task
from ProGiDiffSlicerLib.logic.hierarchy import place_beside, remove_with_display
from ProGiDiffSlicerLib.logic.labelmaps import matrix_of
from ProGiDiffSlicerLib.logic.store import ProposalStore
from ProGiDiffSlicerLib.signals import Signal

ROLE_ATTRIBUTE, ROLE = "ProGiDiff.Role", "agreement"

# Per cent of agreement and its colour: few violet, half of them orange, nearly all yellow (like matplotlib's plasma).
_STOPS = (
    (0, (0.05, 0.03, 0.53)),
    (25, (0.49, 0.01, 0.66)),
    (50, (0.80, 0.28, 0.47)),
    (75, (0.97, 0.58, 0.25)),
    (100, (0.94, 0.98, 0.13)),
)


class AgreementOverlay:
    """Colours where some proposals contain a voxel and others do not; where all agree the volume is seen as it is.

    Args:
        scene: vtkMRMLScene.
        idle: where the work is queued.

    Attributes:
        filled: Signal(), when the map is complete.
    """

    def __init__(self, scene: Any, idle: IdleQueue) -> None:
        self.filled = Signal()
        self._scene = scene
        self._idle = idle
        self._node_id = ""
        self._color_id = ""
        self._store: ProposalStore | None = None
        self._target = ""
        self._revision = -1
        self._before: dict[str, tuple[str | None, float]] = {}
        self._task: Task | None = None

    @property
    def node(self) -> Any | None:
        """The vtkMRMLScalarVolumeNode with the agreement in per cent, or ``None``."""
        return self._scene.GetNodeByID(self._node_id) if self._node_id else None

    @property
    def visible(self) -> bool:
        """Whether it is in the foreground of the slice views."""
        return bool(self._before)

    def show(self, store: ProposalStore, target: str, opacity: float = 0.5) -> None:
        """Show the agreement on a target in the foreground of all slice views.

        Args:
            store: the proposals.
            target: canonical name.
            opacity: 0 to 1.
        """
        changed = store is not self._store or target != self._target or store.revision != self._revision
        if changed or self.node is None:
            self._stop()
            self._store, self._target, self._revision = store, target, store.revision
            self._make(store, target)
            self._task = self._idle.submit(self._fill(store, target), self._on_filled)
        for composite in _nodes(self._scene, "vtkMRMLSliceCompositeNode"):
            if composite.GetForegroundVolumeID() != self._node_id:
                self._before[composite.GetID()] = (composite.GetForegroundVolumeID(), composite.GetForegroundOpacity())
                composite.SetForegroundVolumeID(self._node_id)
        self.set_opacity(opacity)

    def set_opacity(self, opacity: float) -> None:
        """Opacity of the map, 0 to 1."""
        for composite in _nodes(self._scene, "vtkMRMLSliceCompositeNode"):
            if self._node_id and composite.GetForegroundVolumeID() == self._node_id:
                composite.SetForegroundOpacity(float(opacity))

    def hide(self) -> None:
        """Give the slice views their own foreground back."""
        before, self._before = self._before, {}
        for composite in _nodes(self._scene, "vtkMRMLSliceCompositeNode"):
            # A foreground that the user has chosen meanwhile stays.
            if composite.GetID() in before and composite.GetForegroundVolumeID() == self._node_id:
                volume_id, opacity = before[composite.GetID()]
                known = volume_id is not None and self._scene.GetNodeByID(volume_id) is not None
                composite.SetForegroundVolumeID(volume_id if known else None)
                composite.SetForegroundOpacity(opacity)

    def clear(self) -> None:
        """Hide it and remove its nodes."""
        self.hide()
        node = self.node
        table = self._scene.GetNodeByID(self._color_id) if self._color_id else None
        self.forget()
        if node is not None:
            remove_with_display(self._scene, node)
        if table is not None:
            self._scene.RemoveNode(table)

    def forget(self) -> None:
        """Let go of the nodes, which the scene is about to remove."""
        self._stop()
        self._node_id, self._color_id, self._store, self._target, self._revision = "", "", None, "", -1
        self._before = {}

    def most_uncertain_slice(self, store: ProposalStore, target: str) -> int | None:
        """Index of the slice on which the proposals differ most; ``None`` where they are all alike."""
        return most_uncertain_slice(store, target)

    def jump_to_slice(self, store: ProposalStore, index: int) -> None:
        """Make the slice views show the centre of a slice of the volume; they keep their zoom and orientation."""
        centre = [(n - 1) / 2.0 for n in store.geometry.shape_ijk]
        centre[2 - store.plan.axis] = float(index)
        right, anterior, superior = (float(v) for v in (store.geometry.affine @ [*centre, 1.0])[:3])
        for view in _nodes(self._scene, "vtkMRMLSliceNode"):
            normal = np.array([view.GetSliceToRAS().GetElement(row, 2) for row in range(3)])
            axis = store.geometry.affine[:3, 2 - store.plan.axis]
            # Views across the slice would only lose their place.
            if abs(float(normal @ axis)) > np.linalg.norm(axis) * np.sqrt(0.5):
                view.JumpSliceByOffsetting(right, anterior, superior)

    def _stop(self) -> None:
        if self._task is not None:
            self._task.cancel()
            self._task = None

    def _make(self, store: ProposalStore, target: str) -> None:
        node = self.node
        if node is None:
            node = slicer.vtkMRMLScalarVolumeNode()
            node.SetSaveWithScene(False)
            node.SetAttribute(ROLE_ATTRIBUTE, ROLE)
            self._scene.AddNode(node)
            self._node_id = node.GetID()
        node.SetName(_("{volume} agreement: {target}").format(volume=store.volume_name, target=target))
        image = vtk.vtkImageData()
        image.SetDimensions(*store.geometry.shape_ijk)
        # Zeros of numpy take no time until they are written, which is slice by slice.
        values = numpy_to_vtk(np.zeros(image.GetNumberOfPoints(), np.uint8))
        values.SetName("ImageScalars")
        image.GetPointData().SetScalars(values)
        node.SetIJKToRASMatrix(matrix_of(store.local_affine))
        node.SetAndObserveImageData(image)
        volume = self._scene.GetNodeByID(store.volume_id)
        if volume is not None:
            node.SetAndObserveTransformNodeID(volume.GetTransformNodeID())
            place_beside(self._scene, node, volume)
        self._style(node)

    def _style(self, node: Any) -> None:
        if node.GetDisplayNode() is None:
            node.CreateDefaultDisplayNodes()
        display = node.GetDisplayNode()
        display.SetSaveWithScene(False)
        display.SetAndObserveColorNodeID(self._color_table().GetID())
        display.AutoWindowLevelOff()
        display.SetWindowLevelMinMax(0, 100)
        display.SetInterpolate(False)
        display.AutoThresholdOff()
        display.SetThreshold(1, 99)
        display.ApplyThresholdOn()

    def _color_table(self) -> Any:
        table = self._scene.GetNodeByID(self._color_id) if self._color_id else None
        if table is None:
            table = slicer.vtkMRMLColorTableNode()
            table.SetName(_("Agreement of proposals"))
            table.SetSaveWithScene(False)
            table.SetHideFromEditors(True)
            table.SetTypeToUser()
            table.SetNumberOfColors(101)
            places = [place for place, _color in _STOPS]
            for percent in range(101):
                red, green, blue = (
                    float(np.interp(percent, places, [color[channel] for _place, color in _STOPS])) for channel in range(3)
                )
                table.SetColor(percent, f"{percent} %", red, green, blue, 1.0)
            self._scene.AddNode(table)
            self._color_id = table.GetID()
        return table

    def _fill(self, store: ProposalStore, target: str) -> Generator[None, None, None]:
        for index in store.slices:
            values = agreement_percent(store[target], index)
            node = self.node
            if node is None or node.GetImageData() is None:
                return
            if values.any():
                slicer.util.arrayFromVolume(node)[(slice(None),) * store.plan.axis + (index,)] = values
            yield
        node = self.node
        if node is not None:
            slicer.util.arrayFromVolumeModified(node)

    def _on_filled(self, _result: Any) -> None:
        self._task = None
        self.filled.emit()


def agreement_percent(proposals: Proposals, index: int) -> np.ndarray:
    """Share of proposals that contain each voxel of a slice, in per cent, uint8, in the axis order of the volume's array.

    Where some proposals do and others do not it lies from 1 to 99.
    """
    counts, count = proposals.votes(index)
    percent = np.rint(counts * (100.0 / max(1, count))).astype(np.uint8)
    some = (counts > 0) & (counts < count)
    percent[some] = percent[some].clip(1, 99)
    return restore_slice(percent, proposals.plan)


def most_uncertain_slice(store: ProposalStore, target: str) -> int | None:
    """Index of the slice on which the proposals differ most, the first of equals; ``None`` where they are all alike."""
    uncertainty = store[target].uncertainty
    most = max(uncertainty.values(), default=0.0)
    return next((index for index, value in uncertainty.items() if value == most), None) if most > 0 else None


def _nodes(scene: Any, kind: str) -> list[Any]:
    return [scene.GetNthNodeByClass(number, kind) for number in range(scene.GetNumberOfNodesByClass(kind))]
