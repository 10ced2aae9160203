"""The proposals panel: order, selection, keys, outlines, thumbnails, rejecting, blinding, the map of agreement."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from typing import Any

import numpy as np
import pytest
import qt

from progidiff.volumes.geometry import Geometry
from ProGiDiffSlicerLib.panels.pictures import common_box, picture, pixmap
from ProGiDiffSlicerLib.panels.proposals import list_lines, summary
from ProGiDiffSlicerLib.scene.store import Row

from ..proposal_examples import ranking_event, slice_event
from .panel_support import GRID, Opened, nested_masks, press
from .session_support import plan_of, segment_array

Spin = Callable[..., None]
SHOW, PICTURE = 0, 1


def ticked(panel: Opened) -> list[int]:
    """Lines whose box is ticked."""
    return [row for row in range(panel.table.rowCount) if panel.table.item(row, SHOW).checkState() == qt.Qt.Checked]


def tick(panel: Opened, row: int, state: Any) -> None:
    panel.table.item(row, SHOW).setCheckState(state)


def outlined(panel: Opened) -> dict[str, bool]:
    """Names of the segments that can be seen, and whether they are filled."""
    node = panel.session.proposals.node
    segmentation, display = node.GetSegmentation(), node.GetDisplayNode()
    return {
        segmentation.GetSegment(each).GetName(): bool(display.GetSegmentVisibility2DFill(each))
        for each in segmentation.GetSegmentIDs()
        if display.GetSegmentVisibility(each)
    }


def arrived(panel: Opened, masks: np.ndarray, ranked: bool = True) -> Any:
    """A run in which these masks have arrived, bool (N, K, J, I); the volume."""
    node = panel.choose_volume()
    panel.propose(proposals=len(masks))
    panel.arrive(node, masks, ranked=ranked)
    return node


def block(slices: slice = slice(2, 6), count: int = 2) -> np.ndarray:
    """The same block ``count`` times, bool (N, K, J, I)."""
    masks = np.zeros((count, *GRID.shape_kji), bool)
    masks[:, slices, 3:8, 3:8] = True
    return masks


def test_lines_are_in_order_of_rank_and_say_what_they_hold(panel: Opened, spin: Spin) -> None:
    node, masks = panel.run(spin, 6, topK=2)
    ranking = panel.session.store["liver"].ranking
    expected = [f"#{place}  Proposal {index + 1}" for place, index in enumerate(ranking.order, start=1)]
    assert panel.titles() == [*expected, "Consensus of all", "Mean of all"]
    assert [panel.table.item(row, 3).text() for row in range(6)] == [f"{ranking.scores[n]:.2f}" for n in ranking.order]
    best = ranking.order[0]
    assert panel.table.item(0, 4).text() == f"{masks[best].sum() * plan_of(node)[0].voxel_volume_ml:.1f}"
    assert panel.table.item(0, 5).text() == f"{100 * masks.mean(axis=0)[masks[best]].mean():.0f} %"
    assert panel.proposals.ui.summaryLabel.text == "6 distinct of 6, best first."
    # The best are outlined and the selected one is filled.
    assert ticked(panel) == [0, 1]
    top = ranking.top_k
    assert outlined(panel) == {f"liver, Proposal {top[0] + 1}": True, f"liver, Proposal {top[1] + 1}": False}


def test_digits_and_arrows_select(panel: Opened, spin: Spin) -> None:
    _node, masks = panel.run(spin, 6, topK=2)
    press(panel.table, qt.Qt.Key_5)
    row = panel.proposals.selected
    assert row.rank == 5
    panel.settle(spin)
    assert ticked(panel) == [0, 1, 4]
    assert [name for name, filled in outlined(panel).items() if filled] == [f"liver, {row.name}"]
    shown = panel.session.proposals
    assert np.array_equal(segment_array(shown.node, shown.segment_id(row.index), GRID.shape_kji), masks[row.index])
    press(panel.table, qt.Qt.Key_Down)
    assert panel.proposals.selected.rank == 6
    assert ticked(panel) == [0, 1, 5]
    press(panel.table, qt.Qt.Key_9)
    assert panel.proposals.selected.rank == 6, "there is no ninth line"
    # They work in the whole panel and leave numbers alone.
    press(panel.proposals.ui.blindedCheckBox, qt.Qt.Key_3)
    assert panel.proposals.selected.rank == 3
    box = panel.prompt.ui.stepsSpinBox
    box.selectAll()
    press(box, qt.Qt.Key_2)
    assert (box.value, panel.proposals.selected.rank) == (2, 3)


def test_enter_accepts_and_delete_rejects(panel: Opened, spin: Spin) -> None:
    panel.run(spin, 4)
    press(panel.table, qt.Qt.Key_2)
    press(panel.table, qt.Qt.Key_Return)
    assert panel.parameters.targetSegmentation is not None
    first, second = panel.titles()[:2]
    press(panel.table, qt.Qt.Key_Delete)
    assert second not in panel.titles()
    assert panel.titles()[0] == first
    assert panel.proposals.selected.rank == 3, "the next one is selected"


def test_keys_do_nothing_while_another_module_is_shown(panel: Opened, spin: Spin) -> None:
    panel.run(spin, 4)
    panel.panels.exit()
    before = panel.titles()
    for key in (qt.Qt.Key_3, qt.Qt.Key_Delete, qt.Qt.Key_Return):
        press(panel.table, key)
    assert panel.proposals.selected.rank == 1
    assert panel.titles() == before
    assert panel.parameters.targetSegmentation is None


def test_what_was_rejected_is_not_outlined_and_can_be_brought_back(panel: Opened, spin: Spin) -> None:
    panel.run(spin, 3)
    before, name = panel.titles(), f"liver, {panel.proposals.selected.name}"
    panel.proposals.ui.rejectButton.click()
    panel.settle(spin)
    assert name not in outlined(panel)
    for _line in panel.titles():
        panel.proposals.ui.rejectButton.click()
    assert panel.titles() == []
    assert panel.proposals.selected is None
    button = panel.proposals.ui.bringBackButton
    assert button.text == "Bring back 5"
    button.click()
    assert panel.titles() == before
    assert not button.enabled


def test_boxes_show_and_hide_also_the_selected_one(panel: Opened, spin: Spin) -> None:
    panel.run(spin, 4, topK=1)
    tick(panel, 2, qt.Qt.Checked)
    panel.settle(spin)
    assert len(outlined(panel)) == 2
    tick(panel, 0, qt.Qt.Unchecked)
    panel.settle(spin)
    assert ticked(panel) == [2]
    assert True not in outlined(panel).values()
    press(panel.table, qt.Qt.Key_2)
    press(panel.table, qt.Qt.Key_1)
    assert 0 in ticked(panel), "looking at it again shows it again"


def test_near_duplicates_are_one_line(panel: Opened) -> None:
    masks = nested_masks(GRID, 3)
    masks[2] = masks[1]
    arrived(panel, masks)
    assert panel.titles()[0].endswith("2 alike")


def test_the_list_says_that_pieces_were_dropped(panel: Opened) -> None:
    node = panel.choose_volume()
    masks = nested_masks(GRID, 2)
    panel.propose(proposals=2)
    panel.arrive(node, masks, ranked=False)
    ranking = replace(ranking_event(masks, GRID), dropped_pieces=[3, 0], dropped_ml=[1.5, 0.0], filled_ml=[0.0, 0.0])
    panel.client.call.event.emit(ranking)
    titles = panel.titles()
    assert [title.endswith(", pieces dropped: 3") for title in titles] == ["Proposal 1" in title for title in titles]
    panel.parameters.blinded = True
    assert not any("dropped" in title for title in panel.titles())


def test_empty_proposals_say_so(panel: Opened) -> None:
    arrived(panel, np.zeros((2, *GRID.shape_kji), bool))
    assert "empty" in panel.titles()[0]
    assert "does not see it here" in panel.proposals.ui.summaryLabel.text
    panel.review.ui.acceptButton.click()
    assert panel.said == "This proposal is empty; select another one."
    assert panel.parameters.targetSegmentation is None


def test_blinded_lines_hide_everything_that_ranks_them(panel: Opened, spin: Spin) -> None:
    panel.run(spin, 8, seed=3, seedLocked=True)
    ranked = panel.titles()
    panel.proposals.ui.blindedCheckBox.setChecked(True)
    panel.settle(spin)
    titles = panel.titles()
    assert len(titles) == 8
    assert all(title.startswith("Proposal ") for title in titles)
    assert titles != [title.split("  ")[1] for title in ranked[:8]], "not in the order of rank"
    assert panel.table.isColumnHidden(3)
    assert panel.table.isColumnHidden(5)
    assert list(outlined(panel)) == [f"liver, {titles[0]}"], "the best ones are not shown in advance"
    assert not panel.proposals.ui.stapleButton.enabled
    panel.proposals.ui.blindedCheckBox.setChecked(False)
    assert panel.titles() == ranked
    assert not panel.table.isColumnHidden(3)


def test_the_blinded_order_depends_on_the_seed_alone() -> None:
    rows = [Row("proposal", index, index + 1, 0.9, 1.0, 0.5, 1, False, True) for index in range(12)]
    one = [line.key for line in list_lines(rows, (), True, 7)]
    assert one == [line.key for line in list_lines(rows[::-1], (), True, 7)]
    assert one != [line.key for line in list_lines(rows, (), True, 8)]
    assert sorted(one) == list(range(12))


def test_random_pick_selects_one_of_the_best(panel: Opened, spin: Spin) -> None:
    panel.run(spin, 6, topK=3)
    ranking = panel.session.store["liver"].ranking
    press(panel.table, qt.Qt.Key_6)
    panel.proposals.ui.randomPickButton.click()
    assert panel.proposals.selected.index == ranking.random_pick
    assert ranking.random_pick in ranking.top_k


def test_several_targets_have_a_list_each_that_remembers_how_it_was_looked_at(panel: Opened, spin: Spin) -> None:
    panel.run(spin, 4, prompt="liver; spleen")
    box = panel.proposals.ui.targetComboBox
    assert not box.isHidden()
    press(panel.table, qt.Qt.Key_3)
    panel.proposals.ui.rejectButton.click()
    left = panel.titles()
    box.setCurrentIndex(1)
    assert panel.proposals.target == "spleen"
    assert len(panel.titles()) == 6
    panel.settle(spin)
    assert all(name.startswith("spleen") for name in outlined(panel))
    box.setCurrentIndex(0)
    assert panel.titles() == left


def test_slices_are_listed_before_there_is_a_ranking(panel: Opened, spin: Spin) -> None:
    node, masks = panel.choose_volume(), nested_masks(GRID, 4)
    panel.propose(proposals=4)
    panel.client.reach_propose().event.emit(slice_event(masks, plan_of(node)[1], 2))
    assert panel.titles()[:4] == [f"Proposal {number}" for number in (1, 2, 3, 4)]
    assert panel.proposals.ui.summaryLabel.text == "4 received, not ranked yet."
    panel.settle(spin)
    assert len(outlined(panel)) == 3


def test_what_arrived_before_a_crash_stays_and_can_be_accepted(panel: Opened, spin: Spin) -> None:
    masks = nested_masks(GRID, 2)
    arrived(panel, masks, ranked=False)
    panel.client.crash()
    panel.settle(spin)
    assert panel.titles()[:2] == ["Proposal 1", "Proposal 2"]
    assert panel.proposals.ui.summaryLabel.text == "2 received before the run ended, not ranked."
    accepted = panel.review.accept()
    assert np.array_equal(segment_array(accepted.segmentation_node, accepted.segment_id, GRID.shape_kji), masks[0])


def test_proposals_of_a_removed_volume_go(panel: Opened, spin: Spin) -> None:
    node, _masks = panel.run(spin)
    panel.scene.RemoveNode(node)
    assert panel.titles() == []
    assert panel.proposals.target is None
    assert not panel.review.ui.acceptButton.enabled


def test_staple_is_computed_on_demand(panel: Opened, spin: Spin) -> None:
    panel.run(spin, 4)
    panel.proposals.ui.stapleButton.click()
    panel.settle(spin)
    assert panel.titles()[-1] == "STAPLE of all"


def test_the_agreement_map_follows_the_box_and_the_opacity(panel: Opened, spin: Spin) -> None:
    panel.run(spin, 4)
    composite = panel.scene.GetNodeByID("vtkMRMLSliceCompositeNodeRed")
    panel.proposals.ui.agreementCheckBox.setChecked(True)
    panel.settle(spin)
    overlay = panel.session.overlay.node
    assert composite.GetForegroundVolumeID() == overlay.GetID()
    panel.proposals.ui.opacitySlider.setValue(0.25)
    assert composite.GetForegroundOpacity() == pytest.approx(0.25)
    panel.proposals.ui.agreementCheckBox.setChecked(False)
    assert composite.GetForegroundVolumeID() != overlay.GetID()


def test_the_most_uncertain_slice_is_shown_and_where_all_agree_that_is_said(panel: Opened) -> None:
    masks = block()
    masks[1, 5] = False
    node = arrived(panel, masks)
    panel.proposals.ui.uncertainButton.click()
    red = panel.scene.GetNodeByID("vtkMRMLSliceNodeRed")
    assert red.GetSliceOffset() == pytest.approx(-40 + 5 * 5)
    panel.client.finish()
    panel.propose(proposals=2)
    panel.arrive(node, block())
    panel.proposals.ui.uncertainButton.click()
    assert panel.said == "The proposals agree everywhere."


def test_thumbnails_follow_the_slice_that_is_looked_at(panel: Opened, spin: Spin) -> None:
    red = panel.scene.GetNodeByID("vtkMRMLSliceNodeRed")
    red.JumpSliceByOffsetting(0, 0, -40 + 5 * 2)
    panel.run(spin, 3)
    before = thumbnail(panel, 0)
    assert before.width() == before.height() == 56
    red.JumpSliceByOffsetting(0, 0, -40 + 5 * 5)
    spin(lambda: thumbnail(panel, 0) != before, 5)
    assert thumbnail(panel, 0) != thumbnail(panel, 2), "each proposal has its own"


def test_thumbnails_of_sagittal_slices_that_are_stored_with_their_axes_in_another_order(panel: Opened, spin: Spin) -> None:
    affine = np.array([[0, 0, 4.0, -10], [0, -1.5, 0, 5], [-1.5, 0, 0, 7], [0, 0, 0, 1]])
    node = panel.choose_volume(Geometry((9, 11, 5), affine))
    assert plan_of(node)[1].plane == "sagittal"
    panel.run(spin, 2)
    assert thumbnail(panel, 0).width() == 56


def thumbnail(panel: Opened, row: int) -> Any:
    return panel.table.item(row, PICTURE).icon().pixmap(56, 56).toImage()


def test_a_thumbnail_shows_mask_and_surroundings_in_their_proportion() -> None:
    image = np.tile(np.arange(40, dtype=np.float32), (20, 1))
    mask = np.zeros((20, 40), bool)
    mask[8:12, 10:18] = True
    top, bottom, left, right = box = common_box([mask], mask.shape)
    assert top <= 8 < 12 <= bottom
    assert left <= 10 < 18 <= right
    rgb = picture(image, mask, box, 32, (0, 40), (1.0, 0.0, 0.0), (2.0, 1.0))
    assert rgb.shape == (32, 32, 3)
    red = (rgb[..., 0].astype(int) - rgb[..., 1]) > 30
    height, width = np.ptp(np.flatnonzero(red.any(axis=1))) + 1, np.ptp(np.flatnonzero(red.any(axis=0))) + 1
    assert height == pytest.approx(width, abs=2), "4 rows of 2 mm are as high as 8 columns of 1 mm are wide"
    shown = pixmap(rgb)
    assert (shown.width(), shown.height()) == (32, 32)
    assert qt.QColor(shown.toImage().pixel(16, 16)).red() == rgb[16, 16, 0]
    # Without a mask the whole slice is shown.
    empty = np.zeros((10, 30), bool)
    assert common_box([empty], empty.shape) == (0, 10, 0, 30)
    assert not picture(np.full((10, 30), np.nan), None, (0, 10, 0, 30), 16, (0, 1), (1, 0, 0)).any()


def test_the_summary_counts() -> None:
    assert summary([], False, False) == "Nothing has arrived yet."
    rows = [Row("proposal", 0, 1, 0.9, 1.0, 0.5, 4, False, True), Row("proposal", 1, 2, 0.8, 1.0, 0.5, 1, False)]
    assert summary(rows, True, True) == "2 distinct of 5, in random order."
