"""Proposals as they arrive: masks come back voxel by voxel, ensembles are what the functions on whole masks say."""

from __future__ import annotations

import tracemalloc

import numpy as np
import pytest

from progidiff.errors import ProtocolError
from progidiff.proposals.proposals import CONSENSUS, MAJORITY, MEAN, STAPLE, Gathered, Proposals
from progidiff.proposals.votes import (
    agreement,
    consensus,
    consensus_level,
    consensus_overlap,
    finished,
    gram_matrix,
    majority,
    staple,
)
from progidiff.volumes.geometry import Geometry
from progidiff.volumes.slicing import extract_slice, plan_slices
from progidiff.wire.messages import DoneEvent, ProposeRequest, SliceEvent, WarningEvent

from ..proposal_examples import random_masks, ranking_event, slice_event
from ..volume_examples import GEOMETRIES, oblique


def started(geometry: Geometry) -> Proposals:
    plan = plan_slices(geometry)
    return Proposals("liver", plan, range(plan.count))


def filled(geometry: Geometry, masks: np.ndarray, block: int = 2) -> Proposals:
    """All masks, received in blocks."""
    proposals = started(geometry)
    for index in proposals.slices:
        for first in range(0, len(masks), block):
            stop = min(first + block, len(masks))
            proposals.add(slice_event(masks[:stop], proposals.plan, index, first=first, last=stop == len(masks)))
    return proposals


@pytest.mark.parametrize("name", ["PSR", "oblique", "single slice", "odd widths"])
def test_masks_come_back_exactly_on_every_grid(name: str) -> None:
    geometry = GEOMETRIES[name]
    masks = random_masks(geometry, 5)
    masks[3] = False
    proposals = filled(geometry, masks)
    assert proposals.count == 5
    for number, mask in enumerate(masks):
        crop = proposals.mask(number)
        np.testing.assert_array_equal(proposals.volume(number), mask)
        assert crop.empty == (not mask.any())
        if mask.any():
            assert all(crop.array.any(axis=tuple(a for a in range(3) if a != axis))[[0, -1]].all() for axis in range(3))
        for index in proposals.slices:
            view = extract_slice(mask, proposals.plan, index)
            np.testing.assert_array_equal(proposals.slice_mask(number, index), view)
            np.testing.assert_array_equal(proposals.slice_masks(index)[number], view)
    np.testing.assert_array_equal(proposals.voxels, masks.sum(axis=(1, 2, 3)))


@pytest.mark.parametrize("name", ["PSR", "oblique", "single slice"])
def test_agreement_ensembles_and_overlaps(name: str) -> None:
    geometry = GEOMETRIES[name]
    masks = random_masks(geometry, 6, share=0.5)
    proposals = filled(geometry, masks)
    share = agreement(masks)
    np.testing.assert_array_equal(proposals.agreement(), share)
    expected = {MAJORITY: majority(masks), MEAN: share > 0.5, CONSENSUS: consensus(masks)}
    for key, mask in expected.items():
        np.testing.assert_array_equal(proposals.volume(key), mask)
        voxels, agreed = proposals.tally(key)
        assert voxels == mask.sum()
        assert agreed == pytest.approx(float(share[mask].sum(dtype=np.float64)), rel=1e-6)
        for index in proposals.slices:
            np.testing.assert_array_equal(proposals.slice_mask(key, index), extract_slice(mask, proposals.plan, index))
    for index, number in proposals.uncertainty.items():
        part = extract_slice(share, proposals.plan, index)
        assert number == pytest.approx(float((part * (1 - part)).sum()), abs=1e-4)
    np.testing.assert_array_equal(proposals.gram, gram_matrix(masks))
    assert proposals.mean_agreement == pytest.approx([float(share[mask].mean()) for mask in masks], abs=1e-6)


@pytest.mark.parametrize("count", [1, 7])
def test_staple_in_steps_is_staple(count: int) -> None:
    geometry = oblique((31, 28, 9))
    masks = random_masks(geometry, count, share=0.6)
    proposals = filled(geometry, masks, block=count)
    expected = staple(masks)
    assert not proposals.has_staple
    with pytest.raises(KeyError):
        proposals.mask(STAPLE)
    assert proposals.staple() == proposals.tally(STAPLE)
    np.testing.assert_array_equal(proposals.volume(STAPLE), expected)
    assert proposals.tally(STAPLE).voxels == expected.sum()
    assert proposals.tally(STAPLE).agreed == pytest.approx(float(agreement(masks)[expected].sum(dtype=np.float64)), rel=1e-6)
    proposals.add(slice_event(masks, proposals.plan, 0))
    assert not proposals.has_staple, "of earlier proposals"


def test_staple_starts_again_when_proposals_arrive_meanwhile() -> None:
    geometry = oblique()
    masks = random_masks(geometry, 4, share=0.7)
    proposals = filled(geometry, masks[:3])
    steps = proposals.staple_steps()
    next(steps)
    for index in proposals.slices:
        proposals.add(slice_event(masks, proposals.plan, index, first=3))
    finished(steps)
    np.testing.assert_array_equal(proposals.volume(STAPLE), staple(masks))


def test_a_slice_that_comes_again_replaces_the_earlier_one() -> None:
    geometry = GEOMETRIES["LPS"]
    masks = random_masks(geometry, 3)
    proposals = filled(geometry, ~masks)
    np.testing.assert_array_equal(proposals.gram, gram_matrix(~masks))
    for index in proposals.slices:
        proposals.add(slice_event(masks, proposals.plan, index))
    np.testing.assert_array_equal(proposals.voxels, masks.sum(axis=(1, 2, 3)))
    np.testing.assert_array_equal(proposals.gram, gram_matrix(masks))


def test_what_arrived_of_an_unfinished_run_can_be_used() -> None:
    """Two slices complete, a third half done, no ranking: as when the worker has ended."""
    geometry = GEOMETRIES["LPS"]
    masks = random_masks(geometry, 4, share=0.7)
    proposals = started(geometry)
    for index in (0, 1):
        proposals.add(slice_event(masks, proposals.plan, index))
    proposals.add(slice_event(masks[:2], proposals.plan, 2, last=False))
    assert (proposals.count, proposals.received, proposals.ranked) == (4, 3, False)
    arrived = masks.copy()
    arrived[:, 3:] = False
    arrived[2:, 2] = False
    for number, mask in enumerate(arrived):
        np.testing.assert_array_equal(proposals.volume(number), mask)
    np.testing.assert_array_equal(proposals.voxels, arrived.sum(axis=(1, 2, 3)))
    np.testing.assert_array_equal(proposals.gram, gram_matrix(arrived))
    expected = np.concatenate([majority(masks[:, :2]), majority(masks[:2, 2:3])])
    for name in (MEAN, MAJORITY):
        np.testing.assert_array_equal(proposals.volume(name)[:3], expected)
    assert proposals.staple().voxels > 0
    # the slice that is half done counts by the share of its votes
    share = np.concatenate([agreement(masks[:, :2]), agreement(masks[:2, 2:3])])
    level = consensus_level(np.bincount(np.round(4 * share).astype(int).ravel(), minlength=5), 4)
    found = proposals.volume(CONSENSUS)[:3]
    np.testing.assert_array_equal(found, share >= level / 4)
    voxels, agreed = proposals.tally(CONSENSUS)
    assert voxels == found.sum()
    assert agreed / voxels == pytest.approx(float(share[found].mean()), abs=1e-6)
    with pytest.raises(ProtocolError, match="left out"):
        proposals.checked()


def test_blocks_follow_on_slices_that_seemed_complete() -> None:
    geometry = GEOMETRIES["LPS"]
    masks = random_masks(geometry, 8)
    proposals, agreed_on = started(geometry), []
    for stop in (4, 8):
        for index in proposals.slices:
            proposals.add(slice_event(masks[:stop], proposals.plan, index, first=stop - 4))
        np.testing.assert_array_equal(proposals.gram, gram_matrix(masks[:stop]))
        agreed_on.append(np.stack([consensus(masks[:stop, index]) for index in proposals.slices]))
        assert proposals.consensus_change() == consensus_overlap(agreed_on[0], agreed_on[-1]).dice
    np.testing.assert_array_equal(proposals.agreement(), agreement(masks))


def test_what_was_counted_outlasts_the_masks() -> None:
    geometry = GEOMETRIES["PSR"]
    masks = random_masks(geometry, 5)
    kept, proposals = filled(geometry, masks), started(geometry)
    for index in proposals.slices:
        proposals.add(slice_event(masks, proposals.plan, index))
        proposals.let_go(index)
    assert proposals.memory_bytes == 0
    np.testing.assert_array_equal(proposals.gram, kept.gram)
    assert proposals.tally(MAJORITY) == kept.tally(MAJORITY)
    request = ProposeRequest(("liver",))
    assert proposals.rank(request, 0.5, "") == kept.rank(request, 0.5, "")


def test_what_does_not_fit_is_refused_and_changes_nothing() -> None:
    geometry = GEOMETRIES["LPS"]
    masks = random_masks(geometry, 3)
    proposals = filled(geometry, masks)
    rows, columns = proposals.plan.shape_rc
    for wrong in (
        SliceEvent("liver", 0, 0, np.ones((2, rows + 1, columns), bool)),
        SliceEvent("liver", proposals.plan.count, 0, np.ones((2, rows, columns), bool)),
    ):
        with pytest.raises(ProtocolError, match="does not belong"):
            proposals.add(wrong)
    for event in (
        slice_event(np.concatenate([masks, masks]), proposals.plan, 0, first=4),
        SliceEvent("liver", 0, 0, masks[:, 0], mean_probability=np.zeros((2, 2), np.float32)),
        ranking_event(masks[:2], geometry),
    ):
        with pytest.raises(ProtocolError, match=r"left out|does not belong"):
            proposals.add(event)
    np.testing.assert_array_equal(proposals.volume(1), masks[1])
    assert not proposals.ranked


def test_a_result_is_complete_with_every_slice_and_its_ranking() -> None:
    geometry = GEOMETRIES["LPS"]
    masks = random_masks(geometry, 3)
    whole, ranking = filled(geometry, masks), ranking_event(masks, geometry)
    with pytest.raises(ProtocolError, match="left out"):
        whole.checked()
    whole.add(ranking)
    assert whole.checked() is ranking
    lacking = started(geometry)
    for index in lacking.slices[:-1]:
        lacking.add(slice_event(masks, lacking.plan, index))
    lacking.add(ranking)
    with pytest.raises(ProtocolError, match="left out"):
        lacking.checked()


def test_one_request_is_gathered_by_target() -> None:
    geometry = GEOMETRIES["LPS"]
    masks = random_masks(geometry, 2)
    gathered = Gathered(("liver", "spleen"), plan_slices(geometry), (1, 3))
    assert list(gathered.slices) == [1, 2]
    gathered.add(slice_event(masks, gathered.plan, 1))
    gathered.add(slice_event(~masks, gathered.plan, 1, target="spleen"))
    np.testing.assert_array_equal(gathered["spleen"].slice_mask(0, 1), ~gathered["liver"].slice_mask(0, 1))
    with pytest.raises(ProtocolError, match="does not belong"):
        gathered.add(slice_event(masks, gathered.plan, 3))
    with pytest.raises(ProtocolError, match="not asked for"):
        gathered.add(slice_event(masks, gathered.plan, 1, target="aorta"))
    with pytest.raises(ProtocolError, match="without a result"):
        gathered.finished()
    gathered.add(WarningEvent("empty", "Nothing."))
    gathered.add(DoneEvent("m", 1))
    assert (gathered.finished().model_id, [w.code for w in gathered.warnings]) == ("m", ["empty"])


def test_many_proposals_cost_a_bit_per_voxel() -> None:
    shape, count = (32, 256, 256), 40
    plan = plan_slices(Geometry(shape[::-1], np.diag([1.0, 1.0, 3.0, 1.0])))
    proposals = Proposals("liver", plan, range(plan.count))
    full = np.ones((1, *plan.shape_rc), bool)
    tracemalloc.start()
    try:
        for number in range(count):
            for index in range(plan.count):
                proposals.add(SliceEvent("liver", index, number, full))
        peak = tracemalloc.get_traced_memory()[1]
    finally:
        tracemalloc.stop()
    assert peak < count * np.prod(shape) / 6
