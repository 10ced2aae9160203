"""Which pieces of a proposal of a stack are the organ, and which holes in it are none.

A proposal is drawn slice by slice, so that it may hold what no organ has: a second one far away, islands, holes. What is
known of a target's form (:attr:`progidiff.targets.Target.form`), and where the other proposals of the run lie, says what to
drop and what to fill.
"""

from __future__ import annotations

import math
from typing import NamedTuple

import numpy as np

from progidiff.proposals.masks import bounding_box
from progidiff.targets import Target

#: The second of two pieces, as of both kidneys, has at least this share of the votes of the first one.
SECOND = 0.1
#: A piece with this share of the votes of the first one is its rival: nobody can say which of them is the organ.
RIVAL = 0.5
#: Share of the proposals that have to contain a piece, or a hole, for it to be sure.
SURE = 0.5
#: A piece of a tube is an island below this share of the votes of the first one and from this distance to it on.
SMALL, FAR_MM = 0.25, 20.0
#: Holes up to this volume, and up to this area on a slice, are filled whatever the other proposals say.
HOLE_MM3, HOLE_MM2 = 100.0, 25.0


class Tidied(NamedTuple):
    """What was done to one proposal: how many pieces were dropped, their voxels, and the voxels of the holes filled."""

    pieces: int = 0
    dropped: int = 0
    filled: int = 0


def tidy(
    mask: np.ndarray, votes: np.ndarray, count: int, target: Target, spacing: tuple[float, ...], ends: np.ndarray
) -> tuple[np.ndarray, Tidied]:
    """A proposal without the pieces that are not the organ, and without holes.

    Args:
        mask: bool (slices, rows, columns), a part of the stack that holds the proposal.
        votes: unsigned int, as large: how many proposals contain each voxel.
        count: number of proposals.
        target: what it should be; of a form that nothing is known of the mask is left as it is.
        spacing: mm along the three axes.
        ends: bool (3, 2): whether the part begins and ends where the stack does, by axis.

    Returns:
        The mask, and what was done to it.
    """
    around = bounding_box(mask)
    if around is None or target.form == "any":
        return mask, Tidied()
    result = np.zeros_like(mask)
    inner, own = mask[around], votes[around]
    edges = ends & [[side.start == 0, side.stop == size] for side, size in zip(around, mask.shape, strict=True)]
    kept, pieces = _pieces(inner, own, count, target, spacing, edges)
    filled = _filled(kept, own, count if target.form == "solid" else 0, spacing)
    result[around] = filled
    dropped = int(np.count_nonzero(inner)) - int(np.count_nonzero(kept))
    return result, Tidied(pieces, dropped, int(np.count_nonzero(filled)) - int(np.count_nonzero(kept)))


def _pieces(
    mask: np.ndarray, votes: np.ndarray, count: int, target: Target, spacing: tuple[float, ...], edges: np.ndarray
) -> tuple[np.ndarray, int]:
    """The mask without the pieces that are not the organ, and how many those are."""
    # where the others bridge a gap of this proposal, its two sides are one piece
    labels, number = _labelled(mask | (votes > SURE * count), touching=True)
    if number < 2:
        return mask, 0
    inside, places = labels[mask], np.argwhere(mask)
    sizes = np.bincount(inside, minlength=number + 1)
    mass = np.bincount(inside, votes[mask], minlength=number + 1)
    low, high = np.full((number + 1, 3), mask.shape), np.zeros((number + 1, 3), int)
    np.minimum.at(low, inside, places)
    np.maximum.at(high, inside, places)
    first, second = np.argsort(-mass, kind="stable")[:2]
    keep = mass >= RIVAL * mass[first]
    if target.side == "both":
        keep[second] |= mass[second] >= SECOND * mass[first]
    if target.form == "tube":
        apart = np.maximum(np.maximum(low - high[first], low[first] - high), 0) * spacing
        keep |= (mass >= SMALL * mass[first]) | (np.sqrt((apart**2).sum(axis=1)) < FAR_MM)
    # what reaches the same end of the stack as the organ may be joined to it beyond
    reached = np.concatenate([(low == 0) & edges[:, 0], (high == np.array(mask.shape) - 1) & edges[:, 1]], axis=1)
    keep |= (mass >= SURE * count * sizes) & (reached & reached[keep].any(axis=0)).any(axis=1)
    return mask & keep[labels], int(np.count_nonzero((sizes > 0) & ~keep))


def _filled(mask: np.ndarray, votes: np.ndarray, count: int, spacing: tuple[float, ...]) -> np.ndarray:
    """The mask with small holes filled, in 3-D and on each slice; with a ``count`` also those that most proposals fill."""
    result = _without_holes(mask, votes, count, HOLE_MM3 / math.prod(spacing))
    for plane, own in zip(result, votes, strict=True):
        plane[:] = _without_holes(plane, own, count, HOLE_MM2 / math.prod(spacing[1:]))
    return result


def _without_holes(mask: np.ndarray, votes: np.ndarray, count: int, small: float) -> np.ndarray:
    """The mask, bool of 2 or 3 axes, with holes of up to ``small`` elements filled."""
    labels, number = _labelled(np.pad(~mask, 1, constant_values=True), touching=False)
    if number < 2:
        return mask.copy()
    outside, labels = ~mask, labels[(slice(1, -1),) * mask.ndim]
    sizes = np.bincount(labels[outside], minlength=number + 1)
    hole = sizes <= small
    if count:
        hole |= np.bincount(labels[outside], votes[outside], minlength=number + 1) > SURE * count * sizes
    hole[[0, 1]] = False  # inside, and what is around everything
    return mask | hole[labels]


def _labelled(mask: np.ndarray, touching: bool) -> tuple[np.ndarray, int]:
    """Number of the connected piece of each element, from 1, as int (...), and how many there are.

    Args:
        mask: bool, of 2 or 3 axes.
        touching: whether elements that share but a corner are connected.
    """
    import SimpleITK as sitk  # not when Slicer's panel opens

    finder = sitk.ConnectedComponentImageFilter()
    finder.SetFullyConnected(touching)
    labels = sitk.GetArrayFromImage(finder.Execute(sitk.GetImageFromArray(mask.view(np.uint8))))
    return labels, finder.GetObjectCount()
