"""Ranking without ground truth: scores, order, near-duplicates, empty proposals, RandTop-k."""

from __future__ import annotations

from collections import Counter

import numpy as np
import pytest

from progidiff.errors import InputError
from progidiff.proposals.ranking import medoid_scores, rand_top_k, rank, soft_dice_confidence
from progidiff.proposals.votes import gram_matrix


def disc(row: float, column: float, radius: float, size: int = 64) -> np.ndarray:
    r, c = np.mgrid[:size, :size]
    return (r - row) ** 2 + (c - column) ** 2 <= radius**2


def soft_dice(mask: np.ndarray, probability: np.ndarray) -> float:
    return float(2 * (probability * mask).sum() / (probability.sum() + mask.sum()))


@pytest.mark.parametrize("seed", range(2))
def test_confidence_is_the_papers_formula_on_the_mean_map(seed: int) -> None:
    rng = np.random.default_rng(seed)
    masks = np.stack([disc(*rng.uniform(25, 39, 2), rng.uniform(5, 20)) for _ in range(9)])
    mean = masks.mean(axis=0)
    expected = [soft_dice(mask, mean) for mask in masks]
    assert np.allclose(soft_dice_confidence(gram_matrix(masks)), expected)


def test_medoid_is_the_mean_dice_to_the_others() -> None:
    rng = np.random.default_rng(7)
    masks = rng.random((6, 20, 20)) < 0.4
    expected = [
        np.mean([2 * (a & b).sum() / (a.sum() + b.sum()) for j, b in enumerate(masks) if j != i])
        for i, a in enumerate(masks)
    ]
    assert np.allclose(medoid_scores(gram_matrix(masks)), expected)


@pytest.mark.parametrize("method", ["soft_dice", "medoid"])
def test_an_outlier_is_last_and_the_centre_first(method: str) -> None:
    masks = np.stack([disc(32, 36, 12), disc(8, 8, 5), disc(32, 32, 12), disc(32, 28, 12)])
    ranking = rank(gram_matrix(masks), method)  # type: ignore[arg-type]
    assert ranking.order[0] == 2
    assert ranking.order[-1] == 1
    assert all(0 <= score <= 1 for score in ranking.scores)
    in_order = [ranking.scores[i] for i in ranking.order]
    assert in_order == sorted(in_order, reverse=True)
    quarter = disc(20, 24, 12)  # four mirror images of each other: equal scores keep the order
    mirrored = np.stack([quarter, quarter[::-1], quarter[:, ::-1], quarter[::-1, ::-1]])
    assert rank(gram_matrix(mirrored), method).order == (0, 1, 2, 3)  # type: ignore[arg-type]


@pytest.mark.parametrize("method", ["soft_dice", "medoid"])
@pytest.mark.parametrize(("count", "empty"), [(1, False), (5, False), (5, True)])
def test_identical_proposals_are_shown_once(method: str, count: int, empty: bool) -> None:
    masks = np.repeat(disc(20, 20, 9)[None] & (not empty), count, axis=0)
    ranking = rank(gram_matrix(masks), method)  # type: ignore[arg-type]
    assert (ranking.order, ranking.groups, ranking.weights) == ((0,), (tuple(range(count)),), (count,))
    assert (ranking.scores, ranking.empty) == ((1.0,) * count, (empty,) * count)


@pytest.mark.parametrize("seed", range(2))
def test_the_order_does_not_depend_on_how_proposals_are_numbered(seed: int) -> None:
    rng = np.random.default_rng(seed)
    masks = np.stack([disc(*rng.uniform(20, 44, 2), rng.uniform(6, 16)) for _ in range(10)])
    shuffled = rng.permutation(10)
    order = rank(gram_matrix(masks)).order
    assert [int(shuffled[i]) for i in rank(gram_matrix(masks[shuffled])).order] == list(order)


def test_near_duplicates_join_the_best_of_them_without_chaining() -> None:
    line = np.zeros((3, 1000), dtype=bool)
    # Neighbours have a Dice of 0.985, the outer two of 0.97.
    for i in range(3):
        line[i, 15 * i : 15 * i + 970] = True
    ranking = rank(gram_matrix(line))
    assert ranking.order[0] == 1
    assert ranking.groups == ((1, 0, 2),)
    apart = rank(gram_matrix(line), duplicate_dice=0.99)
    assert sorted(apart.weights) == [1, 1, 1]
    chain = np.concatenate([line, np.zeros((1, 1000), dtype=bool)])
    chain[3, 45:] = True  # 955 long: near-duplicate of the third, but not of the second, which leads its group
    assert len(rank(gram_matrix(chain)).groups) == 2


@pytest.mark.parametrize("seed", range(2))
def test_groups_are_a_partition_led_by_their_best_member(seed: int) -> None:
    rng = np.random.default_rng(seed)
    masks = np.stack([disc(32 + rng.integers(3), 32, 20 + rng.integers(3)) for _ in range(12)])
    masks[rng.integers(12)] = False
    ranking = rank(gram_matrix(masks))
    assert sorted(i for group in ranking.groups for i in group) == list(range(12))
    assert ranking.order == tuple(group[0] for group in ranking.groups)
    for group in ranking.groups:
        assert all(ranking.scores[group[0]] >= ranking.scores[i] - 1e-12 for i in group)
    assert sum(ranking.weights) == 12


@pytest.mark.parametrize("method", ["soft_dice", "medoid"])
@pytest.mark.parametrize(("empty", "first_is_empty"), [(0, False), (3, False), (5, True)])
def test_empty_proposals_lead_only_where_they_are_the_majority(method: str, empty: int, first_is_empty: bool) -> None:
    masks = np.stack([disc(32 + i, 32, 12) for i in range(8)])
    masks[:empty] = False
    ranking = rank(gram_matrix(masks), method)  # type: ignore[arg-type]
    assert ranking.empty[ranking.order[0]] is first_is_empty
    assert ranking.empty_share == empty / 8
    # All empty proposals are one group.
    assert sum(ranking.empty[group[0]] for group in ranking.groups) == (1 if empty else 0)


@pytest.mark.parametrize("share", [0.55, 0.9])
def test_a_majority_of_empty_proposals_beats_identical_full_ones(share: float) -> None:
    masks = np.repeat(disc(30, 30, 10)[None], 20, axis=0)
    masks[: round(20 * share)] = False
    ranking = rank(gram_matrix(masks))
    assert ranking.empty[ranking.order[0]]
    assert ranking.scores[ranking.order[0]] == pytest.approx(share)
    masks[:10], masks[10:] = False, disc(30, 30, 10)
    assert rank(gram_matrix(masks)).order == (10, 0), "an even split shows the organ first"


@pytest.mark.parametrize(("gram", "method"), [(np.zeros((0, 0)), "soft_dice"), (np.ones((1, 1)), "oracle")])
def test_nothing_to_rank_and_unknown_methods_are_refused(gram: np.ndarray, method: str) -> None:
    with pytest.raises(InputError):
        rank(gram, method)  # type: ignore[arg-type]


def test_rand_top_k_takes_the_best_and_picks_each_as_often() -> None:
    masks = np.stack([disc(32, 32 + 3 * i, 12) for i in range(6)])
    ranking = rank(gram_matrix(masks))
    picks = Counter(rand_top_k(ranking, 3, seed).pick for seed in range(900))
    assert set(picks) == set(ranking.order[:3])
    assert all(abs(count - 300) < 60 for count in picks.values())
    assert rand_top_k(ranking, 3, 0).best == ranking.order[:3]
    assert rand_top_k(ranking, 3, 17) == rand_top_k(ranking, 3, 17)
    same = rank(gram_matrix(np.repeat(disc(9, 9, 4)[None], 8, axis=0)))
    assert rand_top_k(same, 3, 1).best == (0,), "fewer than asked for"
    with pytest.raises(InputError, match="at least 1"):
        rand_top_k(same, 0, 1)
