"""The rows of a table: what is said of each proposal and ensemble of a run on a volume of the scene."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest

from progidiff.proposals.proposals import CONSENSUS, MEAN, STAPLE
from progidiff.proposals.votes import agreement, consensus
from progidiff.volumes.geometry import Geometry
from progidiff.wire.messages import ProposeRequest
from ProGiDiffSlicerLib.scene.store import ProposalStore
from ProGiDiffSlicerLib.scene.volumes import volume_image

from ..proposal_examples import random_masks, ranking_event, slice_event
from ..volume_examples import GEOMETRIES
from .session_support import add_volume


def filled(scene: Any, geometry: Geometry, masks: np.ndarray) -> ProposalStore:
    store = ProposalStore(volume_image(add_volume(scene, geometry)), ProposeRequest(("liver",)), "liver")
    for index in store.slices:
        store.add(slice_event(masks, store.plan, index))
    return store


def test_without_a_ranking_rows_are_in_the_order_of_sampling(scene: Any) -> None:
    geometry = GEOMETRIES["LPS"]
    masks = random_masks(geometry, 4, share=0.7)
    rows = filled(scene, geometry, masks).rows("liver")
    assert [(row.index, row.rank, row.score, row.weight) for row in rows] == [(n, None, None, 1) for n in range(4)]
    assert [row.millilitres for row in rows] == pytest.approx([m.sum() * geometry.voxel_volume_ml for m in masks])


def test_rows_follow_the_ranking_and_fold_duplicates(scene: Any) -> None:
    geometry = GEOMETRIES["LPS"]
    masks = random_masks(geometry, 6, share=0.6)
    masks[4] = masks[1]
    masks[5] = False
    store = filled(scene, geometry, masks)
    event = ranking_event(masks, geometry)
    revision = store.revision
    store.add(event)
    assert store.revision > revision
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
    voxels = store["liver"].staple().voxels
    assert [row.index for row in store.ensembles("liver")] == [CONSENSUS, MEAN, STAPLE]
    assert store.ensembles("liver")[-1].millilitres == pytest.approx(voxels * geometry.voxel_volume_ml)
    store.add(slice_event(masks, store.plan, 0))
    assert [row.index for row in store.ensembles("liver")] == [CONSENSUS, MEAN], "of earlier proposals"
