"""Proposals as they arrive: masks come back voxel by voxel, ensembles and rows are what the engine's functions say."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest

from progidiff.errors import ProtocolError
from progidiff.ranking.ensembles import agreement, consensus, consensus_level, majority, staple
from progidiff.volumes.geometry import Geometry
from progidiff.volumes.slicing import extract_slice, plan_slices
from progidiff.wire.messages import SliceEvent
from ProGiDiffSlicerLib.logic.boxes import Crop
from ProGiDiffSlicerLib.logic.store import CONSENSUS, MAJORITY, MEAN, STAPLE, ProposalStore
from ProGiDiffSlicerLib.logic.volumes import volume_image

from ..volume_examples import GEOMETRIES, oblique
from .session_support import add_volume, random_masks, ranking_event, slice_event


def filled(scene: Any, geometry: Geometry, masks: np.ndarray, block: int = 2) -> ProposalStore:
    """A store with all masks, received in blocks."""
    store = ProposalStore(volume_image(add_volume(scene, geometry)), ("liver",), "liver")
    for index in range(store.plan.count):
        for first in range(0, len(masks), block):
            stop = min(first + block, len(masks))
            store.add(slice_event(masks[:stop], store.plan, index, first=first, last=stop == len(masks)))
    return store


def full(crop: Crop, shape: tuple[int, int, int]) -> np.ndarray:
    volume = np.zeros(shape, np.uint8)
    place = tuple(slice(o, o + n) for o, n in zip(crop.origin_kji, crop.array.shape, strict=True))
    volume[place] = crop.array
    return volume


def drain(steps: Any) -> Any:
    while True:
        try:
            next(steps)
        except StopIteration as end:
            return end.value


@pytest.mark.parametrize("name", GEOMETRIES)
def test_masks_come_back_exactly_on_every_grid(scene: Any, name: str) -> None:
    geometry = GEOMETRIES[name]
    masks = random_masks(geometry, 5)
    masks[3] = False
    store = filled(scene, geometry, masks)
    assert store.count("liver") == 5
    for number, mask in enumerate(masks):
        crop = store.masks("liver", number)
        np.testing.assert_array_equal(full(crop, geometry.shape_kji), mask)
        assert crop.empty == (not mask.any())
        if mask.any():
            assert all(crop.array.any(axis=tuple(a for a in range(3) if a != axis))[[0, -1]].all() for axis in range(3))
        for index in range(store.plan.count):
            np.testing.assert_array_equal(store.slice_mask("liver", number, index), extract_slice(mask, store.plan, index))


@pytest.mark.parametrize("name", ["LPS", "PSR", "ARI", "oblique", "single slice"])
def test_agreement_majority_and_mean(scene: Any, name: str) -> None:
    geometry = GEOMETRIES[name]
    masks = random_masks(geometry, 6, share=0.5)
    store = filled(scene, geometry, masks)
    share = agreement(masks)
    percent = store.agreement("liver")
    np.testing.assert_allclose(percent, 100 * share, atol=0.5)
    np.testing.assert_array_equal(percent == 100, share == 1)
    np.testing.assert_array_equal(percent == 0, share == 0)
    expected = majority(masks)
    np.testing.assert_array_equal(full(store.masks("liver", MAJORITY), geometry.shape_kji), expected)
    np.testing.assert_array_equal(full(store.masks("liver", MEAN), geometry.shape_kji), share > 0.5)
    expected = consensus(masks)
    np.testing.assert_array_equal(full(store.masks("liver", CONSENSUS), geometry.shape_kji), expected)
    for index in range(store.plan.count):
        found = store.slice_mask("liver", CONSENSUS, index)
        np.testing.assert_array_equal(found, extract_slice(expected, store.plan, index))
    uncertainty = store.uncertainty("liver")
    for index in range(store.plan.count):
        part = extract_slice(share, store.plan, index)
        assert uncertainty[index] == pytest.approx(float((part * (1 - part)).sum()), abs=1e-4)


def test_nearly_unanimous_voxels_do_not_count_as_certain(scene: Any) -> None:
    geometry = oblique()
    masks = np.ones((300, *geometry.shape_kji), bool)
    masks[0, 2, 3, 4] = False
    masks[1:, 1, 1, 1] = False
    store = filled(scene, geometry, masks, block=300)
    percent = store.agreement("liver")
    assert (percent[2, 3, 4], percent[1, 1, 1], percent[0, 0, 0]) == (99, 1, 100)


def test_rows_follow_the_ranking_and_fold_duplicates(scene: Any) -> None:
    geometry = GEOMETRIES["LPS"]
    masks = random_masks(geometry, 6, share=0.6)
    masks[4] = masks[1]
    masks[5] = False
    store = filled(scene, geometry, masks)
    event = ranking_event(masks, geometry)
    store.rank(event)
    rows = store.rows("liver")
    assert [row.index for row in rows] == event.order
    assert [row.rank for row in rows] == list(range(1, len(rows) + 1))
    assert sum(row.weight for row in rows) == 6
    assert {row.weight for row in rows if row.index in (1, 4)} == {2}
    assert [row.index for row in rows if row.in_top_k] == event.top_k
    assert [row.index for row in rows if row.random_pick] == [event.random_pick]
    share = agreement(masks)
    for row in rows:
        mask = masks[row.index]
        assert row.millilitres == pytest.approx(mask.sum() * geometry.voxel_volume_ml)
        assert row.empty == (not mask.any())
        assert row.agreement == pytest.approx(float(share[mask].mean()) if mask.any() else 0.0, abs=1e-6)
        assert row.score == event.scores[row.index]


def test_ensembles_have_rows(scene: Any) -> None:
    geometry = GEOMETRIES["PSR"]
    masks = random_masks(geometry, 5, share=0.6)
    store = filled(scene, geometry, masks)
    best, mean = store.ensembles("liver")
    assert (mean.kind, mean.index, mean.rank) == ("ensemble", MEAN, None)
    expected = consensus(masks)
    assert (best.index, best.empty) == (CONSENSUS, False)
    assert best.millilitres == pytest.approx(expected.sum() * geometry.voxel_volume_ml)
    assert best.agreement == pytest.approx(float(agreement(masks)[expected].mean()), abs=1e-6)


@pytest.mark.parametrize("count", [1, 2, 7, 17])
def test_staple_in_steps_is_staple(scene: Any, count: int) -> None:
    """Compared with SimpleITK's filter on proposals that follow one truth, each with its own errors."""
    geometry = oblique((31, 28, 9))
    rng = np.random.default_rng(4)
    k, j, i = np.meshgrid(*(np.arange(n) for n in geometry.shape_kji), indexing="ij")
    truth = (k - 4) ** 2 / 9 + (j - 14) ** 2 / 80 + (i - 13) ** 2 / 110 < 1
    masks = np.stack([truth ^ (rng.random(truth.shape) < 0.02 + 0.01 * n) for n in range(count)])
    store = filled(scene, geometry, masks, block=count)
    row = drain(store.staple_steps("liver"))
    found = full(store.masks("liver", STAPLE), geometry.shape_kji).astype(bool)
    expected = staple(masks).mask
    np.testing.assert_array_equal(found, expected)
    assert row.index == STAPLE
    assert row.millilitres == pytest.approx(expected.sum() * geometry.voxel_volume_ml)
    assert [r.index for r in store.ensembles("liver")] == [CONSENSUS, MEAN, STAPLE]
    store.add(slice_event(masks, store.plan, 0))
    assert [r.index for r in store.ensembles("liver")] == [CONSENSUS, MEAN], "of earlier proposals"


def test_staple_of_nothing_and_of_equals(scene: Any) -> None:
    geometry = oblique()
    for value in (False, True):
        masks = np.full((3, *geometry.shape_kji), value)
        store = filled(scene, geometry, masks)
        row = drain(store.staple_steps("liver"))
        assert row.empty is not value
        np.testing.assert_array_equal(full(store.masks("liver", STAPLE), geometry.shape_kji), masks[0])


def test_staple_starts_again_when_proposals_arrive_meanwhile(scene: Any) -> None:
    geometry = oblique()
    masks = random_masks(geometry, 4, share=0.7)
    store = filled(scene, geometry, masks[:3])
    steps = store.staple_steps("liver")
    next(steps)
    for index in range(store.plan.count):
        store.add(slice_event(masks, store.plan, index, first=3))
    drain(steps)
    np.testing.assert_array_equal(full(store.masks("liver", STAPLE), geometry.shape_kji), staple(masks).mask)


def test_a_slice_that_comes_again_replaces_the_earlier_one(scene: Any) -> None:
    geometry = GEOMETRIES["LPS"]
    masks = random_masks(geometry, 3)
    store = filled(scene, geometry, ~masks)
    for index in range(store.plan.count):
        store.add(slice_event(masks, store.plan, index))
    assert [row.millilitres for row in store.rows("liver")] == pytest.approx(
        [float(mask.sum() * geometry.voxel_volume_ml) for mask in masks]
    )


def test_what_arrived_of_an_unfinished_run_can_be_used(scene: Any) -> None:
    """Two slices complete, a third half done, no ranking: as when the worker has ended."""
    geometry = GEOMETRIES["LPS"]
    masks = random_masks(geometry, 4, share=0.7)
    store = ProposalStore(volume_image(add_volume(scene, geometry)), ("liver",))
    for index in (0, 1):
        store.add(slice_event(masks, store.plan, index))
    store.add(slice_event(masks[:2], store.plan, 2, last=False))
    assert (store.received("liver"), store.ranked("liver")) == (3, False)
    rows = store.rows("liver")
    assert [(row.index, row.rank, row.score, row.weight) for row in rows] == [(n, None, None, 1) for n in range(4)]
    arrived = masks.copy()
    arrived[:, 3:] = False
    arrived[2:, 2] = False
    for row in rows:
        assert row.millilitres == pytest.approx(arrived[row.index].sum() * geometry.voxel_volume_ml)
        np.testing.assert_array_equal(full(store.masks("liver", row.index), geometry.shape_kji), arrived[row.index])
    expected = np.concatenate([majority(masks[:, :2]), majority(masks[:2, 2:3])])
    for name in (MEAN, MAJORITY):
        np.testing.assert_array_equal(full(store.masks("liver", name), geometry.shape_kji)[:3], expected)
    assert drain(store.staple_steps("liver")).millilitres > 0
    # the slice that is half done counts by the share of its votes
    share = np.concatenate([agreement(masks[:, :2]), agreement(masks[:2, 2:3])])
    level = consensus_level(np.bincount(np.round(4 * share).astype(int).ravel(), minlength=5), 4)
    found = full(store.masks("liver", CONSENSUS), geometry.shape_kji)[:3]
    np.testing.assert_array_equal(found, share >= level / 4)
    row = store.ensembles("liver")[0]
    assert row.millilitres == pytest.approx(found.sum() * geometry.voxel_volume_ml)
    assert row.agreement == pytest.approx(float(share[found.astype(bool)].mean()), abs=1e-6)


def test_adaptive_sampling_adds_blocks_to_slices_that_seemed_complete(scene: Any) -> None:
    geometry = GEOMETRIES["LPS"]
    masks = random_masks(geometry, 8)
    store = ProposalStore(volume_image(add_volume(scene, geometry)), ("liver",))
    for stop in (4, 8):
        for index in range(store.plan.count):
            store.add(slice_event(masks[:stop], store.plan, index, first=stop - 4))
    store.rank(ranking_event(masks, geometry))
    np.testing.assert_allclose(store.agreement("liver"), 100 * agreement(masks), atol=0.5)


def test_targets_are_kept_apart_and_only_the_asked_slices_are_taken(scene: Any) -> None:
    geometry = GEOMETRIES["LPS"]
    masks = random_masks(geometry, 2)
    store = ProposalStore(volume_image(add_volume(scene, geometry)), ("liver", "spleen"), slices=(1, 3))
    assert list(store.slices) == [1, 2]
    store.add(slice_event(masks, store.plan, 1))
    store.add(slice_event(~masks, store.plan, 1, target="spleen"))
    np.testing.assert_array_equal(store.slice_mask("spleen", 0, 1), ~store.slice_mask("liver", 0, 1))
    for wrong in (slice_event(masks, store.plan, 3), slice_event(masks, store.plan, 1, target="aorta")):
        with pytest.raises(ProtocolError, match="does not belong"):
            store.add(wrong)


def test_what_does_not_fit_is_refused_and_changes_nothing(scene: Any) -> None:
    geometry = GEOMETRIES["LPS"]
    masks = random_masks(geometry, 3)
    store = filled(scene, geometry, masks)
    before = store.masks("liver", 1).array.copy()
    rows, columns = store.plan.shape_rc
    with pytest.raises(ProtocolError, match="does not belong"):
        store.add(SliceEvent("liver", 0, 0, np.ones((2, rows + 1, columns), bool)))
    with pytest.raises(ProtocolError, match="left out"):
        store.add(slice_event(np.concatenate([masks, masks]), store.plan, 0, first=4))
    with pytest.raises(ProtocolError, match="left out"):
        store.rank(ranking_event(masks[:2], geometry))
    np.testing.assert_array_equal(store.masks("liver", 1).array, before)
    assert not store.ranked("liver")


def test_fifty_proposals_stay_small(scene: Any) -> None:
    """A liver-sized blob: 50 masks of 256 x 256 x 40 as bytes would take 131 MB."""
    geometry = Geometry((256, 256, 40), np.diag([1.0, 1.0, 2.5, 1.0]))
    store = ProposalStore(volume_image(add_volume(scene, geometry, array=np.zeros((40, 256, 256), np.int16))), ("liver",))
    _k, j, i = np.ogrid[:40, :256, :256]
    plan = plan_slices(geometry)
    radii = np.linspace(40, 60, 50)
    for index in range(40):
        reach = 1 - ((index - 20) / 18) ** 2
        canonical = np.stack([(j[0] - 120) ** 2 + (i[0] - 100) ** 2 < reach * r**2 for r in radii])
        mean = canonical.mean(0, dtype=np.float32)
        store.add(SliceEvent("liver", index, 0, extract_all(canonical, plan), mean))
    assert store.count("liver") == 50
    assert store.memory_bytes < 4e6
    assert len(store.rows("liver")) == 50


def extract_all(raw: np.ndarray, plan: Any) -> np.ndarray:
    """Masks (n, J, I) of an axial slice in the canonical view."""
    return np.stack([extract_slice(np.broadcast_to(mask, (plan.count, *mask.shape)), plan, 0) for mask in raw])
