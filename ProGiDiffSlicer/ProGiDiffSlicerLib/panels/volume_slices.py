"""A volume's own slices, for the panel: how many there are and which one is looked at."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import numpy as np

from progidiff.errors import InputError
from progidiff.volumes.geometry import Geometry
from progidiff.volumes.slicing import SlicePlan, extract_slice
from ProGiDiffSlicerLib.logic.extent import place_of, shown_point
from ProGiDiffSlicerLib.logic.volumes import VolumeImage, volume_image


@dataclass(frozen=True, eq=False)
class VolumeSlices:
    """A volume cut into slices.

    Attributes:
        image: the volume.
        plan: how it is cut.
    """

    image: VolumeImage
    plan: SlicePlan

    def shown(self, scene: Any) -> int:
        """Index of the slice that the slice views show, or the nearest one; the middle one where no view shows slices."""
        try:
            place = place_of(shown_point(scene, self.image.geometry, self.plan), self.image.geometry, self.plan)
        except InputError:
            return self.plan.count // 2
        return int(np.clip(np.floor(place + 0.5), 0, self.plan.count - 1))

    def pixels(self, index: int) -> np.ndarray:
        """The voxels of a slice (rows, columns) as radiologists read them; a view."""
        return extract_slice(self.image.array_kji, self.plan, index)


def slices_of(node: Any, plan: Callable[[Geometry], SlicePlan]) -> VolumeSlices | None:
    """The slices of a volume node, cut as ``plan`` says; or ``None`` where it cannot be used; a run says why."""
    if node is None:
        return None
    try:
        image = volume_image(node)
    except InputError:
        return None
    return VolumeSlices(image, plan(image.geometry))


def levels_of(node: Any, pixels: np.ndarray) -> tuple[float, float]:
    """Values that are shown black and white: the volume's own window, else the range of ``pixels``."""
    display = node.GetScalarVolumeDisplayNode()
    if display is not None and display.GetWindow() > 0:
        return display.GetLevel() - display.GetWindow() / 2, display.GetLevel() + display.GetWindow() / 2
    low, high = np.percentile(pixels, (1, 99))
    return float(low), float(high)
