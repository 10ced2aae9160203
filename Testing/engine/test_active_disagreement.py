"""The number by which volumes are ranked: agreement, doubt, absence, and where to look next."""

from __future__ import annotations

import numpy as np
import pytest

from progidiff.active.disagreement import TargetDoubt, binary_entropy, likely_presence, next_slice, spread_slices

SHAPE = (40, 50)
N = 6


def disc(row: float, column: float, radius: float) -> np.ndarray:
    y, x = np.mgrid[: SHAPE[0], : SHAPE[1]]
    return np.asarray((y - row) ** 2 + (x - column) ** 2 <= radius**2)


def doubt_of(*slices: np.ndarray, pixel_mm2: float = 4.0) -> TargetDoubt:
    """Slices of masks (N, H, W); the probability of a pixel is the share of masks that contain it."""
    doubt = TargetDoubt(pixel_mm2)
    for index, masks in enumerate(slices):
        doubt.add(index, masks, masks.mean(axis=0))
    return doubt


def agreeing() -> np.ndarray:
    return np.stack([disc(20, 25, 8)] * N)


def shifted(by: float) -> np.ndarray:
    return np.stack([disc(20, 25 + by * n, 8) for n in range(N)])


def scattered() -> np.ndarray:
    """Specks that overlap nowhere, as proposals for an organ that is not there."""
    return np.stack([disc(5 + 6 * n, 6 + 7 * n, 2) for n in range(N)])


EMPTY = np.zeros((N, *SHAPE), dtype=bool)


def test_agreement_is_zero_and_doubt_is_more() -> None:
    values = [doubt_of(masks).disagreement().value for masks in (agreeing(), shifted(0.5), shifted(1.5))]
    assert values[0] == 0
    assert 0.05 < values[1] < values[2] < 1


def test_the_number_is_its_parts() -> None:
    number = doubt_of(shifted(1.0)).disagreement()
    masks = shifted(1.0).reshape(N, -1)
    pairs = [
        2 * (masks[i] & masks[j]).sum() / (masks[i].sum() + masks[j].sum()) for i in range(N) for j in range(N) if i != j
    ]
    share = masks.mean(axis=0)
    assert number.pairwise == pytest.approx(1 - np.mean(pairs))
    assert number.entropy == pytest.approx(binary_entropy(share).sum() / (share > 0).sum())
    assert number.value == pytest.approx(number.presence * (number.pairwise + number.entropy) / 2)


def test_an_absent_organ_is_not_the_most_uncertain() -> None:
    absent, uncertain = doubt_of(scattered()).disagreement(), doubt_of(shifted(1.5)).disagreement()
    assert absent.pairwise > uncertain.pairwise  # without the weight it would be
    assert absent.value < uncertain.value / 2
    assert doubt_of(EMPTY).disagreement().value == 0
    assert doubt_of(EMPTY).disagreement().empty_share == 1


def test_the_most_uncertain_slice_is_where_a_correction_changes_most() -> None:
    doubt = doubt_of(agreeing(), shifted(0.3), shifted(1.5), scattered(), EMPTY)
    worst = doubt.most_uncertain()
    assert worst.index == 2
    assert worst.centre_rc == pytest.approx((20, 28.75), abs=0.5)
    assert doubt.found_on() == [0, 1, 2]


def test_where_all_agree_the_likeliest_slice_is_named() -> None:
    assert doubt_of(EMPTY, agreeing(), EMPTY).most_uncertain().index == 1


def test_presence_is_judged_on_the_same_area_whatever_the_pixel() -> None:
    probability = np.zeros((100, 100))
    probability[:5, :5] = 1.0  # 25 mm² at 1 mm, 100 mm² at 2 mm
    assert likely_presence(probability, 1.0) == pytest.approx(0.5)
    assert likely_presence(probability, 4.0) == 1.0
    assert likely_presence(probability, 1e6) == 1.0  # a pixel is the least


def test_entropy_has_its_ends() -> None:
    assert binary_entropy(np.array([0.0, 0.5, 1.0])).tolist() == [0.0, 1.0, 0.0]


@pytest.mark.parametrize(("count", "wanted"), [(1, 8), (8, 8), (9, 8), (100, 8), (100, 1)])
def test_slices_are_spread_evenly(count: int, wanted: int) -> None:
    chosen = spread_slices(count, wanted)
    assert len(chosen) == len(set(chosen)) == min(count, wanted)
    assert 0 <= chosen[0] <= count / wanted
    assert count - 1 >= chosen[-1] >= count - 1 - count / wanted


def test_the_next_slice_is_beside_what_was_found() -> None:
    doubt = TargetDoubt(4.0)
    for index, masks in ((5, EMPTY), (15, EMPTY), (25, agreeing()), (40, EMPTY)):
        doubt.add(index, masks, masks.mean(axis=0))
    assert next_slice(doubt, 50) == 32
    doubt.add(32, EMPTY, EMPTY.mean(axis=0))
    assert next_slice(doubt, 50) == 20


def test_where_nothing_was_found_the_likeliest_place_is_looked_at() -> None:
    doubt = TargetDoubt(4.0)
    for index, share in ((5, 0.0), (15, 0.3), (25, 0.1)):
        doubt.add(index, EMPTY, np.full(SHAPE, share))
    assert next_slice(doubt, 30) == 10
    full = TargetDoubt(4.0)
    full.add(0, EMPTY, np.zeros(SHAPE))
    assert next_slice(full, 1) is None
