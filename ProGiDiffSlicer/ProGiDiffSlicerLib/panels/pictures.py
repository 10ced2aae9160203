"""Thumbnails of the listed proposals on the slice that is looked at, drawn while nothing else is to do."""

from __future__ import annotations

from collections.abc import Callable, Generator, Sequence
from typing import Any

from progidiff.proposals.proposals import MaskKey
from ProGiDiffSlicerLib.idle import IdleQueue, Task
from ProGiDiffSlicerLib.logic.store import ProposalStore
from ProGiDiffSlicerLib.panels.table import THUMBNAIL_PX, ProposalTable
from ProGiDiffSlicerLib.panels.thumbnails import common_box, picture, pixmap
from ProGiDiffSlicerLib.panels.volume_slices import VolumeSlices, levels_of

Colour = tuple[float, float, float]


class Pictures:
    """Draws the thumbnails of a table; a new drawing takes the place of one that is under way."""

    def __init__(self, table: ProposalTable, idle: IdleQueue, colour_of: Callable[[MaskKey], Colour]) -> None:
        self._table = table
        self._idle = idle
        self._colour_of = colour_of
        self._task: Task | None = None

    def draw(self, store: ProposalStore, target: str, node: Any, slices: VolumeSlices, index: int) -> None:
        """Draw slice ``index`` of the volume ``node`` with the mask of each listed proposal."""
        self.cancel()
        keys = [line.key for line in self._table.lines]
        if keys:
            self._task = self._idle.submit(self._steps(store, target, node, slices, index, keys))

    def cancel(self) -> None:
        """Draw no more."""
        if self._task is not None:
            self._task.cancel()
            self._task = None

    def _steps(
        self, store: ProposalStore, target: str, node: Any, slices: VolumeSlices, index: int, keys: Sequence[MaskKey]
    ) -> Generator[None, None, None]:
        masks = []
        for key in keys:
            masks.append(store[target].slice_mask(key, index))
            yield
        pixels = slices.pixels(index)
        levels = levels_of(node, pixels)
        box = common_box(masks, slices.plan.shape_rc)
        yield
        for key, mask in zip(keys, masks, strict=True):
            colours = picture(pixels, mask, box, THUMBNAIL_PX, levels, self._colour_of(key), slices.plan.spacing_rc)
            self._table.set_picture(key, pixmap(colours))
            yield
