"""Proposals for tests of whatever gathers them: masks, and the events in which they come."""

from __future__ import annotations

from dataclasses import fields
from typing import Any, get_args, get_type_hints

import numpy as np

from progidiff.proposals import ranking
from progidiff.proposals.votes import gram_matrix
from progidiff.volumes.geometry import Geometry
from progidiff.volumes.slicing import SlicePlan, extract_slice
from progidiff.wire.messages import ProposeRequest, RankingEvent, SliceEvent


def random_masks(geometry: Geometry, count: int, seed: int = 3, share: float = 0.3) -> np.ndarray:
    """bool (N, K, J, I): overlapping, without any symmetry, with margins of different sizes."""
    rng = np.random.default_rng(seed)
    masks = rng.random((count, *geometry.shape_kji)) < share
    for axis, cut in ((1, 1), (2, 2), (3, 1)):
        if masks.shape[axis] > 2 * cut:
            masks[(slice(None),) * axis + (slice(0, cut),)] = False
    return masks


def slice_event(
    masks: np.ndarray, plan: SlicePlan, index: int, target: str = "liver", first: int = 0, last: bool = True
) -> SliceEvent:
    """What a worker sends of masks, bool (N, K, J, I), from proposal ``first`` on; ``last`` as at the end of a block."""
    canonical = np.stack([extract_slice(mask, plan, index) for mask in masks])
    mean = canonical.mean(0, dtype=np.float32) if last else None
    return SliceEvent(target, index, first, canonical[first:], mean_probability=mean)


def ranking_event(masks: np.ndarray, geometry: Geometry, target: str = "liver", top_k: int = 3) -> RankingEvent:
    """The ranking as the engine makes it."""
    request = ProposeRequest((target,), top_k=top_k)
    return ranking.ranking_event(target, gram_matrix(masks), request, geometry.voxel_volume_ml, "All that were asked for.")


def unusual_request() -> ProposeRequest:
    """A request none of whose fields has its default, whatever fields there are."""
    values: dict[str, Any] = {"targets": ("liver", "left kidney"), "slices": (2, 9), "batch_size": 7}
    hints = get_type_hints(ProposeRequest)
    for field in fields(ProposeRequest):
        if field.name not in values:
            chosen = get_args(hints[field.name])  # of a Literal
            other = not field.default if hints[field.name] is bool else chosen[-1] if chosen else field.default + 1
            values[field.name] = other
    return ProposeRequest(**values)
