"""Which slices of a volume are meant: all, a range, or the one that is looked at."""

from __future__ import annotations

from typing import Any, Literal

import numpy as np
from slicer.i18n import tr as _

from progidiff.errors import InputError
from progidiff.volumes.geometry import Geometry
from progidiff.volumes.slicing import SlicePlan

Extent = Literal["slice", "range", "volume"]
Point = tuple[float, float, float]

#: A view whose normal is farther than this from the direction of the slices (as a cosine) does not show them.
_ALONG = float(np.sqrt(0.5))


def slices_of_extent(
    extent: Extent,
    geometry: Geometry,
    plan: SlicePlan,
    start: int = 0,
    stop: int = 0,
    point_ras: Point | None = None,
    scene: Any = None,
) -> tuple[int, int] | None:
    """Half-open range of slices, or ``None`` for all of them.

    Args:
        extent: what is meant.
        geometry: grid of the volume in the world.
        plan: how it is cut.
        start, stop: half-open range, for ``"range"``.
        point_ras: place of the slice in mm, for ``"slice"``; ``None`` for what the slice views of ``scene`` show.
        scene: vtkMRMLScene.

    Raises:
        InputError: there is no such slice.
    """
    if extent == "volume":
        return None
    if extent == "range":
        if not 0 <= start < stop <= plan.count:
            raise InputError(
                _("The slices {first} to {last} are not within the volume's {count}; choose a range within them.").format(
                    first=start + 1, last=stop, count=plan.count
                )
            )
        return start, stop
    if extent != "slice":
        raise InputError(_("Choose this slice, a range of slices or the whole volume."))
    point = point_ras if point_ras is not None else shown_point(scene, geometry, plan)
    index = slice_at(point, geometry, plan)
    return index, index + 1


def slice_at(point_ras: Point, geometry: Geometry, plan: SlicePlan) -> int:
    """Index of the slice in which a point (RAS in mm) lies.

    Raises:
        InputError: it lies before the first or behind the last slice.
    """
    place = place_of(point_ras, geometry, plan)
    index = int(np.floor(place + 0.5))
    if not np.isfinite(place) or not 0 <= index < plan.count:
        raise InputError(
            _("The slice that is shown lies outside the volume; scroll into the volume, or choose a range of slices.")
        )
    return index


def place_of(point_ras: Point, geometry: Geometry, plan: SlicePlan) -> float:
    """Where a point (RAS in mm) lies along the slices, in slices; it may be before the first or behind the last one."""
    return float((np.linalg.inv(geometry.affine) @ [*point_ras, 1.0])[2 - plan.axis])


def shown_point(scene: Any, geometry: Geometry, plan: SlicePlan) -> Point:
    """Centre of the slice view that shows the volume's slices: the red one, or where that looks across them the best other.

    Raises:
        InputError: no view shows them.
    """
    axis = np.asarray(geometry.affine[:3, 2 - plan.axis])
    best, best_view = 0.0, None
    count = 0 if scene is None else scene.GetNumberOfNodesByClass("vtkMRMLSliceNode")
    for number in range(count):
        view = scene.GetNthNodeByClass(number, "vtkMRMLSliceNode")
        matrix = view.GetSliceToRAS()
        normal = np.array([matrix.GetElement(row, 2) for row in range(3)])
        along = abs(float(normal @ axis)) / float(np.linalg.norm(axis))
        if view.GetLayoutName() == "Red" and along > _ALONG:
            best_view = view
            break
        if along > max(best, _ALONG):
            best, best_view = along, view
    if best_view is None:
        raise InputError(_("No slice view shows the slices of this volume; choose a range of slices or the whole volume."))
    matrix = best_view.GetSliceToRAS()
    return matrix.GetElement(0, 3), matrix.GetElement(1, 3), matrix.GetElement(2, 3)
