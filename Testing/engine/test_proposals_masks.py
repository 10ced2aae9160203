"""Packed boxes: masks come back pixel by pixel, and windows cut them."""

from __future__ import annotations

import numpy as np

from progidiff.proposals.masks import bounding_box, count_votes, cut, hull, pack


def masks_of(count: int, shape: tuple[int, int] = (23, 31)) -> np.ndarray:
    masks = np.random.default_rng(2).random((count, *shape)) < 0.2
    for number, mask in enumerate(masks):
        mask[: 3 * number] = mask[:, 20 + number :] = False
    return masks


def test_a_packed_mask_comes_back_in_any_window() -> None:
    mask = masks_of(3)[2]
    box = pack(mask)
    assert (box.top, box.left) == (6, np.flatnonzero(mask.any(axis=0))[0])
    for top, left, bottom, right in ((0, 0, 23, 31), (6, 2, 9, 5), (0, 0, 3, 3), (5, 20, 23, 31)):
        np.testing.assert_array_equal(cut(box, (top, left, bottom, right)), mask[top:bottom, left:right])
    moved = pack(mask[4:, 1:], 4, 1)
    np.testing.assert_array_equal(cut(moved, (0, 0, 23, 31)) | mask, mask | cut(moved, (0, 0, 23, 31)))
    np.testing.assert_array_equal(cut(moved, (0, 0, 23, 31))[4:, 1:], mask[4:, 1:])


def test_an_empty_mask_has_no_box() -> None:
    assert pack(np.zeros((5, 6), bool)) is None
    assert hull([None, None]) is None
    assert not cut(None, (0, 0, 5, 6)).any()


def test_votes_are_counted_in_the_hull() -> None:
    masks = masks_of(4)
    boxes = [pack(mask) for mask in masks] + [None]
    window = hull(boxes)
    top, left, bottom, right = window
    counts = np.zeros(masks.shape[1:], int)
    counts[top:bottom, left:right] = count_votes(boxes, window)
    np.testing.assert_array_equal(counts, masks.sum(axis=0))


def test_bounding_box_with_margins_within_the_array() -> None:
    mask = np.zeros((400, 400), bool)
    mask[10:20, 200:210] = True
    assert bounding_box(mask) == (slice(10, 20), slice(200, 210))
    assert bounding_box(mask, 50, 25) == (slice(0, 70), slice(175, 235))
    mask[390] = True
    assert bounding_box(mask, 20, 0) == (slice(0, 400), slice(0, 400))
    assert bounding_box(np.zeros((3, 4, 5), bool), 1, 1, 1) is None
    points = np.zeros((9, 8, 7), bool)
    points[2, 3, 4] = points[5, 3, 6] = True
    assert bounding_box(points, 1, 1, 1) == (slice(1, 7), slice(2, 5), slice(3, 7))
