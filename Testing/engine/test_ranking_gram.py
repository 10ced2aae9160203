"""Gram matrices of masks against brute force."""

from __future__ import annotations

import numpy as np
import pytest

from progidiff.ranking import gram as gram_module
from progidiff.ranking.gram import GramAccumulator, gram_matrix, mean_pairwise_dice, pairwise_dice


def brute_force(masks: np.ndarray) -> np.ndarray:
    return np.array([[np.logical_and(a, b).sum() for b in masks] for a in masks], dtype=float)


def random_masks(seed: int, shape: tuple[int, ...]) -> np.ndarray:
    rng = np.random.default_rng(seed)
    return rng.random(shape) < rng.uniform(0.05, 0.9, (shape[0],) + (1,) * (len(shape) - 1))


@pytest.mark.parametrize("shape", [(1, 5, 5), (6, 31, 17), (9, 4, 13, 11)])
def test_gram_matrix_is_every_pairs_intersection(shape: tuple[int, ...]) -> None:
    masks = random_masks(1, shape)
    assert np.array_equal(gram_matrix(masks), brute_force(masks))


def test_chunks_add_up(monkeypatch: pytest.MonkeyPatch) -> None:
    masks = random_masks(2, (5, 40, 40))
    monkeypatch.setattr(gram_module, "_CHUNK", 37)
    assert np.array_equal(gram_matrix(masks), brute_force(masks))


def test_counts_beyond_the_precision_of_float32_stay_exact() -> None:
    # 2**24 + 1 is the first count that float32 cannot hold.
    masks = np.ones((1, 2**24 + 1), dtype=bool)
    assert gram_matrix(masks)[0, 0] == 2**24 + 1


def test_integer_masks_count_nonzero_voxels() -> None:
    masks = np.array([[0, 2, 255], [1, 1, 0]], dtype=np.uint8)
    assert gram_matrix(masks).tolist() == [[2, 1], [1, 2]]


def test_no_masks_and_no_voxels() -> None:
    assert gram_matrix(np.zeros((0, 4), dtype=bool)).shape == (0, 0)
    assert np.array_equal(gram_matrix(np.zeros((2, 0), dtype=bool)), np.zeros((2, 2)))
    with pytest.raises(ValueError, match="shape"):
        gram_matrix(np.zeros(4, dtype=bool))


def test_a_stack_built_slice_by_slice_and_block_by_block_equals_the_whole() -> None:
    stack = random_masks(3, (11, 6, 20, 15))
    accumulator = GramAccumulator()
    for k in range(6):
        accumulator.add(stack[:4, k])
    assert np.array_equal(accumulator.matrix, brute_force(stack[:4]))
    for stop in (8, 11):
        start = accumulator.count
        for k in range(6):
            accumulator.grow(stack[:start, k], stack[start:stop, k])
        assert accumulator.count == stop
        assert np.array_equal(accumulator.matrix, brute_force(stack[:stop]))


def test_growing_from_nothing_is_adding() -> None:
    masks = random_masks(4, (3, 9, 9))
    accumulator = GramAccumulator()
    accumulator.grow(masks[:0], masks)
    assert np.array_equal(accumulator.matrix, brute_force(masks))


def test_blocks_that_do_not_fit_are_refused() -> None:
    masks = random_masks(5, (8, 6, 6))
    accumulator = GramAccumulator()
    accumulator.add(masks[:4])
    with pytest.raises(ValueError, match="grow"):
        accumulator.add(masks[:5])
    with pytest.raises(ValueError, match="do not follow"):
        accumulator.grow(masks[:3], masks[3:8])
    with pytest.raises(ValueError, match="do not follow"):
        accumulator.grow(masks[:6], masks[6:8])
    with pytest.raises(ValueError, match="voxels"):
        accumulator.grow(masks[:4], masks[4:, :5])


def test_the_matrix_is_a_copy() -> None:
    accumulator = GramAccumulator()
    accumulator.add(np.ones((2, 3), dtype=bool))
    accumulator.matrix[:] = 0
    assert accumulator.matrix.tolist() == [[3, 3], [3, 3]]


def test_pairwise_dice_with_empty_masks() -> None:
    masks = np.array([[0, 0, 0], [0, 0, 0], [1, 1, 0], [0, 1, 1]], dtype=bool)
    expected = [[1, 1, 0, 0], [1, 1, 0, 0], [0, 0, 1, 0.5], [0, 0, 0.5, 1]]
    assert np.allclose(pairwise_dice(gram_matrix(masks)), expected)


def test_mean_pairwise_dice_is_the_mean_over_different_pairs() -> None:
    masks = random_masks(6, (7, 12, 12))
    pairs = [2 * (masks[i] & masks[j]).sum() / (masks[i].sum() + masks[j].sum()) for i in range(7) for j in range(i)]
    assert mean_pairwise_dice(gram_matrix(masks)) == pytest.approx(np.mean(pairs))
    assert mean_pairwise_dice(gram_matrix(masks[:1])) == 1.0


@pytest.mark.parametrize("shape", [(0, 0), (2, 3), (4,)])
def test_what_is_no_gram_matrix_is_refused(shape: tuple[int, ...]) -> None:
    with pytest.raises(ValueError, match="square"):
        pairwise_dice(np.zeros(shape))
