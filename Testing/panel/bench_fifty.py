"""A worker whose proposals are liver-sized ellipsoids, sent as fast as the pipe takes them: ``python bench_fifty.py``.

That is far faster than any model; ``make stall`` shows fifty of them.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np

from progidiff.wire.messages import DoneEvent, Event, ImageInfo, ProgressEvent, ProposeRequest, SliceEvent

_BLOCK = 8


class EllipsoidEngine:
    """Proposes ellipsoids in the middle of an axial LPS volume, which differ in size and place."""

    device = "cpu"
    adapter = None

    def __init__(self) -> None:
        self.shape = (0, 0, 0)

    @property
    def card(self) -> Any:
        return _Card()

    def set_image(
        self, array_kji: np.ndarray, affine: np.ndarray, modality: str | None, plane: str | None, correct_values: bool
    ) -> ImageInfo:
        spacing = np.linalg.norm(affine[:3, :3], axis=0)
        k, j, i = self.shape = array_kji.shape
        return ImageInfo("ellipsoids", "axial", k, (j, i), (float(spacing[1]), float(spacing[0])), float(spacing[2]))

    def propose(self, request: ProposeRequest, emit: Callable[[Event], None], cancelled: Callable[[], bool]) -> None:
        from progidiff.proposals.ranking import ranking_event
        from progidiff.proposals.votes import grow_gram

        gram = np.zeros((0, 0))
        for index in range(self.shape[0]):
            masks = ellipsoids(self.shape, request.proposals, index)
            gram = grow_gram(gram, masks[:0], masks)
            for first in range(0, len(masks), _BLOCK):
                last = first + _BLOCK >= len(masks)
                mean = masks.mean(0, dtype=np.float32) if last else None
                emit(SliceEvent("liver", index, first, masks[first : first + _BLOCK], mean))
            emit(ProgressEvent("sampling", (index + 1) / self.shape[0], index, index + 1, self.shape[0], "liver", 0.0))
        emit(ranking_event("liver", gram, request, 0.001, "All that were asked for."))
        emit(DoneEvent("ellipsoids", request.proposals))


class _Card:
    model_id = "ellipsoids"
    vocabulary = ("liver",)

    def to_dict(self) -> dict[str, Any]:
        return {"model_id": self.model_id, "vocabulary": list(self.vocabulary)}


def ellipsoids(shape: tuple[int, int, int], count: int, index: int) -> np.ndarray:
    """Slice ``index`` of the proposals: bool (N, rows, columns)."""
    depth, rows, columns = shape
    numbers = np.arange(count)[:, None, None]
    row, column = np.ogrid[:rows, :columns]
    radius = 0.22 + 0.06 * numbers / count
    flat = ((row / rows - 0.5 - 0.02 * np.sin(numbers)) / radius) ** 2 + ((column / columns - 0.4) / radius) ** 2
    return np.asarray(flat + ((index / depth - 0.5) / 0.4) ** 2 < 1)


if __name__ == "__main__":
    from progidiff.worker.server import serve

    serve(lambda folder, device, progress: EllipsoidEngine())
