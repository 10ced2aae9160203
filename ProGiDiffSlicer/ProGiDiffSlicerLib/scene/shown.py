"""What shows proposals in the scene: a segmentation, the map of agreement, and which store is looked at."""

from __future__ import annotations

import colorsys
import time
from collections.abc import Generator, Iterable
from typing import Any

import numpy as np
import slicer
import vtk
from slicer.i18n import tr as _
from vtk.util.numpy_support import numpy_to_vtk

from progidiff.proposals.proposals import MaskKey, Proposals
from progidiff.targets import target_for
from progidiff.volumes.slicing import restore_slice
from ProGiDiffSlicerLib.idle import IdleQueue, Task
from ProGiDiffSlicerLib.scene.labelmaps import LABELMAP, image_of, matrix_of
from ProGiDiffSlicerLib.scene.nodes import (
    ROLE_AGREEMENT,
    ROLE_ATTRIBUTE,
    ROLE_PROPOSALS,
    nodes_of,
    place_beside,
    remove_with_display,
)
from ProGiDiffSlicerLib.scene.store import ProposalStore, row_name
from ProGiDiffSlicerLib.scene.volumes import frames
from ProGiDiffSlicerLib.signals import Signal

_FILL_OPACITY = 0.35
_OUTLINE_WIDTH = 2
_LONGEST_PROMPT = 60
# Colours that people with any colour vision tell apart (Okabe and Ito); later ones go round the colour circle.
_COLORS = (
    (0.90, 0.62, 0.00),
    (0.34, 0.71, 0.91),
    (0.00, 0.62, 0.45),
    (0.94, 0.89, 0.26),
    (0.80, 0.47, 0.65),
    (0.84, 0.37, 0.00),
    (0.20, 0.45, 0.90),
)
_GOLDEN = 0.618034
_ENSEMBLE_COLOR = (0.95, 0.95, 0.95)


# Per cent of agreement and its colour: few violet, half of them orange, nearly all yellow (like matplotlib's plasma).
_STOPS = (
    (0, (0.05, 0.03, 0.53)),
    (25, (0.49, 0.01, 0.66)),
    (50, (0.80, 0.28, 0.47)),
    (75, (0.97, 0.58, 0.25)),
    (100, (0.94, 0.98, 0.13)),
)
#: Seconds between two looks at what has arrived, and how many proposals such a look shows.
_LOOK_S = 1.0
_LOOK_COUNT = 3


def proposal_color(index: MaskKey) -> tuple[float, float, float]:
    """Colour of a proposal (by number) or an ensemble (by name), 0 to 1; the same in every run."""
    if isinstance(index, str):
        return _ENSEMBLE_COLOR
    if index < len(_COLORS):
        return _COLORS[index]
    turn = index - len(_COLORS)
    return colorsys.hsv_to_rgb((turn * _GOLDEN) % 1.0, 0.9 if turn % 2 else 0.55, 1.0 if turn % 3 else 0.8)


class ProposalSegmentation:
    """Shows some proposals of one target: all as outlines, the selected one filled.

    Segments get their voxels between the events of the application, the selected one first.

    Args:
        scene: vtkMRMLScene.
        idle: where the work is queued.

    Attributes:
        filled: Signal(), when all that was asked for can be seen.
        selected: the one that is filled, or ``None``.
    """

    def __init__(self, scene: Any, idle: IdleQueue) -> None:
        self.filled = Signal()
        self.selected: MaskKey | None = None
        self._scene = scene
        self._idle = idle
        self._node_id = ""
        self._store: ProposalStore | None = None
        self._target = ""
        self._revisions: dict[MaskKey, int] = {}
        self._shown: dict[MaskKey, bool] = {}
        self._task: Task | None = None
        self._volume: Any = None
        self._volume_tag = 0

    @property
    def node(self) -> Any | None:
        """The vtkMRMLSegmentationNode, or ``None`` while nothing is shown."""
        return self._scene.GetNodeByID(self._node_id) if self._node_id else None

    @property
    def busy(self) -> bool:
        """Whether voxels are still to come."""
        return self._task is not None and not self._task.done

    def show(self, store: ProposalStore, target: str, indices: Iterable[MaskKey], selected: MaskKey | None = None) -> None:
        """Show these proposals or ensembles of a target, and no others.

        What is shown already and has not changed costs nothing.
        """
        if store is not self._store or target != self._target or self.node is None:
            self._begin(store, target)
        wanted = list(dict.fromkeys(indices))
        if selected is not None and selected not in wanted:
            wanted.append(selected)
        self._shown = {**dict.fromkeys(self._shown, False), **dict.fromkeys(wanted, True)}
        self.selected = selected
        self._stop()
        self._apply_display()
        first = [selected] if selected is not None else []
        self._task = self._idle.submit(
            self._fill([*first, *(index for index in wanted if index != selected)]), self._on_filled
        )

    def select(self, index: MaskKey | None) -> None:
        """Fill this one, and show it if it is not shown."""
        if self._store is not None:
            self.show(self._store, self._target, [key for key, shown in self._shown.items() if shown], index)

    def set_visible(self, index: MaskKey, visible: bool) -> None:
        """Show or hide one."""
        if self._store is None:
            return
        others = [key for key, shown in self._shown.items() if shown and key != index]
        selected = None if index == self.selected and not visible else self.selected
        self.show(self._store, self._target, [*others, index] if visible else others, selected)

    def is_visible(self, index: MaskKey) -> bool:
        """Whether it is shown."""
        return self._shown.get(index, False)

    def segment_id(self, index: MaskKey) -> str | None:
        """Identifier of its segment; ``None`` until it has voxels."""
        return _segment_id(index) if index in self._revisions and self.node is not None else None

    def set_hidden(self, hidden: bool) -> None:
        """Hide or show all of them, as when another frame of a sequence is looked at."""
        node = self.node
        if node is not None and node.GetDisplayNode() is not None:
            node.GetDisplayNode().SetVisibility(not hidden)

    def clear(self) -> None:
        """Remove the node."""
        node = self.node
        self.forget()
        if node is not None:
            remove_with_display(self._scene, node)

    def forget(self) -> None:
        """Let go of the node, which the scene is about to remove."""
        self._stop()
        if self._volume is not None:
            self._volume.RemoveObserver(self._volume_tag)
            self._volume = None
        self._node_id, self._store, self._target, self.selected = "", None, "", None
        self._revisions, self._shown = {}, {}

    def _stop(self) -> None:
        if self._task is not None:
            self._task.cancel()
            self._task = None

    def _begin(self, store: ProposalStore, target: str) -> None:
        volume = self._scene.GetNodeByID(store.volume_id)
        node = self.node
        if node is None:
            node = slicer.vtkMRMLSegmentationNode()
            node.SetAttribute(ROLE_ATTRIBUTE, ROLE_PROPOSALS)
            node.SetSaveWithScene(False)
            self._scene.AddNode(node)
            node.CreateDefaultDisplayNodes()
            display = node.GetDisplayNode()
            display.SetSaveWithScene(False)
            display.SetSliceIntersectionThickness(_OUTLINE_WIDTH)
        self.forget()
        self._node_id, self._store, self._target = node.GetID(), store, target
        node.GetSegmentation().RemoveAllSegments()
        asked = " ".join((store.prompt or target).split())
        shortened = asked if len(asked) <= _LONGEST_PROMPT else asked[: _LONGEST_PROMPT - 1] + "…"
        node.SetName(_("{volume} proposals: {prompt}").format(volume=store.volume_name, prompt=shortened))
        node.GetDisplayNode().SetVisibility(True)
        if volume is not None:
            node.SetReferenceImageGeometryParameterFromVolumeNode(volume)
            place_beside(self._scene, node, volume)
            event = slicer.vtkMRMLTransformableNode.TransformModifiedEvent
            self._volume, self._volume_tag = volume, volume.AddObserver(event, self._follow_transform)
            self._follow_transform(volume, "")

    def _follow_transform(self, volume: Any, _event: str) -> None:
        """Voxels are given in the volume's own coordinates, so the segmentation is moved by the same transform."""
        node = self.node
        if node is not None and node.GetTransformNodeID() != volume.GetTransformNodeID():
            node.SetAndObserveTransformNodeID(volume.GetTransformNodeID())

    def _fill(self, indices: list[MaskKey]) -> Generator[None, None, None]:
        store, target = self._store, self._target
        if store is None:
            return
        for index in indices:
            revision = store.revision
            if self._revisions.get(index) == revision:
                continue
            crop = store[target].mask(index)
            yield
            image = image_of(crop.array, crop.origin_kji, store.local_affine)
            node = self.node
            if node is None:
                return
            self._put(node, index, image)
            self._revisions[index] = revision
            self._apply_display()
            yield

    def _put(self, node: Any, index: MaskKey, image: Any) -> None:
        """Give a segment its voxels.

        Each segment has a labelmap of its own, since proposals overlap. It is handed over as it is: a segment that is
        modified through the segmentation logic starts in the labelmap of another one and is then separated from it, which
        takes tens of milliseconds in a large volume, against less than one.
        """
        segmentation = node.GetSegmentation()
        segment = segmentation.GetSegment(_segment_id(index))
        if segment is not None:
            segment.GetRepresentation(LABELMAP).ShallowCopy(image)
            return
        segment = slicer.vtkSegment()
        segment.SetName(_("{target}, {proposal}").format(target=self._target, proposal=row_name(index)))
        segment.SetColor(*proposal_color(index))
        segment.SetTag(slicer.vtkSegment.GetTerminologyEntryTagName(), target_for(self._target).terminology_entry)
        segment.SetTag("ProGiDiff.Proposal", str(index))
        segment.AddRepresentation(LABELMAP, image)
        segmentation.AddSegment(segment, _segment_id(index))

    def _apply_display(self) -> None:
        node = self.node
        display = None if node is None else node.GetDisplayNode()
        if display is None:
            return
        was_modifying = display.StartModify()
        for index in self._revisions:
            segment_id = _segment_id(index)
            display.SetSegmentVisibility(segment_id, self._shown.get(index, False))
            display.SetSegmentVisibility3D(segment_id, False)
            display.SetSegmentVisibility2DOutline(segment_id, True)
            display.SetSegmentVisibility2DFill(segment_id, index == self.selected)
            display.SetSegmentOpacity2DFill(segment_id, _FILL_OPACITY)
        display.EndModify(was_modifying)

    def _on_filled(self, _result: Any) -> None:
        self._task = None
        self.filled.emit()


def _segment_id(index: MaskKey) -> str:
    return f"proposal_{index}"


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
        for composite in nodes_of(self._scene, "vtkMRMLSliceCompositeNode"):
            if composite.GetForegroundVolumeID() != self._node_id:
                self._before[composite.GetID()] = (composite.GetForegroundVolumeID(), composite.GetForegroundOpacity())
                composite.SetForegroundVolumeID(self._node_id)
        self.set_opacity(opacity)

    def set_opacity(self, opacity: float) -> None:
        """Opacity of the map, 0 to 1."""
        for composite in nodes_of(self._scene, "vtkMRMLSliceCompositeNode"):
            if self._node_id and composite.GetForegroundVolumeID() == self._node_id:
                composite.SetForegroundOpacity(float(opacity))

    def hide(self) -> None:
        """Give the slice views their own foreground back."""
        before, self._before = self._before, {}
        for composite in nodes_of(self._scene, "vtkMRMLSliceCompositeNode"):
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

    def jump_to_slice(self, store: ProposalStore, index: int) -> None:
        """Make the slice views show the centre of a slice of the volume; they keep their zoom and orientation."""
        centre = [(n - 1) / 2.0 for n in store.geometry.shape_ijk]
        centre[2 - store.plan.axis] = float(index)
        right, anterior, superior = (float(v) for v in (store.geometry.affine @ [*centre, 1.0])[:3])
        for view in nodes_of(self._scene, "vtkMRMLSliceNode"):
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
            node.SetAttribute(ROLE_ATTRIBUTE, ROLE_AGREEMENT)
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


class Shelf:
    """Keeps the stores of one volume, and shows the one that belongs to what is looked at.

    Args:
        scene: vtkMRMLScene.
        proposals: shows proposals.
        overlay: shows agreement.

    Attributes:
        stores: by frame; ``None`` for a volume that is no frame of a sequence.
        current: the store of the frame that is shown, or of the volume.
        changed: Signal(): ``current`` is another one.
    """

    def __init__(self, scene: Any, proposals: ProposalSegmentation, overlay: AgreementOverlay) -> None:
        self.stores: dict[int | None, ProposalStore] = {}
        self.current: ProposalStore | None = None
        self.changed = Signal()
        self._scene = scene
        self._proposals = proposals
        self._overlay = overlay
        self._looked = 0.0
        self._browser: Any = None
        self._browser_tag = 0

    @property
    def volume_ids(self) -> set[str]:
        """MRML ids of the volumes to which the proposals belong."""
        return {store.volume_id for store in self.stores.values()}

    def keep(self, store: ProposalStore) -> None:
        """Let a store take the place of the earlier one of its frame; proposals of other volumes go."""
        if self.stores.get(store.frame) is store:
            return
        if store.frame is None or any(other.volume_id != store.volume_id for other in self.stores.values()):
            self.stores.clear()
        self.stores.pop(None, None)
        self.stores[store.frame] = store
        self._looked = 0.0
        self._watch(store)
        self._choose()

    def clear(self) -> None:
        """Give everything up."""
        self.stores.clear()
        self._unwatch()
        self._choose()

    def look(self, store: ProposalStore) -> bool:
        """Show what has arrived so far: at once for the first time, then now and then; whether it did."""
        now = time.monotonic()
        if store is not self.current or (self._looked and (self._proposals.busy or now - self._looked < _LOOK_S)):
            return False
        self._looked = now
        self.show(store)
        return True

    def show(self, store: ProposalStore) -> None:
        """Show the best proposals of the first target, or the first ones where there is no ranking."""
        target = store.targets[0]
        ranking, count = store[target].ranking, store[target].count
        if ranking is not None:
            self._proposals.show(store, target, ranking.top_k, ranking.order[0])
        elif count:
            self._proposals.show(store, target, range(min(count, _LOOK_COUNT)), 0)

    def _choose(self) -> None:
        chosen = next(iter(self.stores.values()), None)
        if chosen is not None and chosen.frame is not None:
            playing = frames(self._scene.GetNodeByID(chosen.volume_id))
            chosen = None if playing is None else self.stores.get(playing.index)
        if chosen is self.current:
            return
        self.current = chosen
        self._overlay.hide()
        self._proposals.set_hidden(chosen is None)
        if chosen is not None:
            self.show(chosen)
        self.changed.emit()

    def _watch(self, store: ProposalStore) -> None:
        playing = frames(self._scene.GetNodeByID(store.volume_id))
        browser = None if playing is None else playing.browser
        if browser is not self._browser:
            self._unwatch()
            if browser is not None:
                self._browser = browser
                self._browser_tag = browser.AddObserver(vtk.vtkCommand.ModifiedEvent, self._on_browser)

    def _unwatch(self) -> None:
        if self._browser is not None:
            self._browser.RemoveObserver(self._browser_tag)
            self._browser = None

    def _on_browser(self, _caller: Any, _event: str) -> None:
        self._choose()
