"""The prompt panel: typing, starting, cancelling, progress, what it says when something cannot be done."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

import numpy as np
import pytest
import qt

from progidiff.wire.conversation import WorkerFailure
from progidiff.wire.messages import ProgressEvent, WarningEvent
from ProGiDiffSlicerLib.panels.panel import remaining
from ProGiDiffSlicerLib.panels.prompt import MOST_KEPT, PromptHistory, completions, with_target
from ProGiDiffSlicerLib.scene.volumes import Extent, Frames

from ..proposal_examples import random_masks
from .panel_support import GRID, Opened, opened, press, type_text
from .session_support import VOCABULARY, add_sequence, plan_of

Spin = Callable[..., None]


@pytest.fixture
def panel(scene: Any) -> Iterator[Opened]:
    with opened(scene) as panels:
        yield panels


def test_only_the_last_part_of_a_prompt_is_completed() -> None:
    assert completions("liver; sp", VOCABULARY) == ["liver; spleen"]
    assert completions("Li", VOCABULARY)[0].lower() == "liver"
    assert completions("liver; ", VOCABULARY) == []
    assert completions("xyz", VOCABULARY) == []


def test_a_target_is_added_to_what_is_typed() -> None:
    assert with_target("", "liver") == "liver"
    assert with_target("liver ; ", "spleen") == "liver; spleen"


def test_the_completer_offers_the_models_names_while_one_types(panel: Opened) -> None:
    type_text(panel.prompt.ui.promptEdit, "left")
    completer = panel.prompt.ui.promptEdit.completer()
    model = completer.model()
    offered = [model.data(model.index(row, 0)) for row in range(model.rowCount())]
    assert offered == ["left kidney"]
    completer.popup().hide()


def test_the_menu_holds_earlier_prompts_and_the_vocabulary(panel: Opened) -> None:
    panel.choose_volume()
    panel.propose("spleen & liver")
    menu = panel.prompt.ui.historyButton.menu()
    menu.aboutToShow.emit()
    assert menu.actions()[0].text == "spleen && liver"
    (names,) = menu.findChildren(qt.QMenu)
    assert names.menuAction() in menu.actions()
    assert "left kidney" in [action.text for action in names.actions()]
    panel.prompt.ui.promptEdit.setText("liver")
    next(action for action in names.actions() if action.text == "left kidney").trigger()
    assert panel.prompt.line.text == "liver; left kidney"
    menu.actions()[0].trigger()
    assert panel.prompt.line.text == "spleen & liver"


def test_up_and_down_walk_through_the_history_and_keep_the_draft(panel: Opened) -> None:
    panel.prompt.line.set_history(["liver", "spleen"])
    edit = panel.prompt.ui.promptEdit
    edit.setText("kid")
    press(edit, qt.Qt.Key_Up)
    assert edit.text == "spleen"
    press(edit, qt.Qt.Key_Up)
    press(edit, qt.Qt.Key_Up)
    assert edit.text == "liver"
    press(edit, qt.Qt.Key_Down)
    press(edit, qt.Qt.Key_Down)
    assert edit.text == "kid"


def test_the_history_forgets_the_oldest_and_never_doubles() -> None:
    history = PromptHistory(f"organ {number}" for number in range(MOST_KEPT + 3))
    history.add("organ 10")
    history.add("  ")
    assert history.prompts[-1] == "organ 10"
    assert len(history.prompts) == MOST_KEPT == len(set(history.prompts))
    assert history.prompts[0] == "organ 3"


def test_ctrl_enter_starts_a_run_while_the_module_is_shown_and_not_otherwise(panel: Opened) -> None:
    panel.choose_volume()
    edit = panel.prompt.ui.promptEdit
    edit.setText("liver")
    panel.panels.exit()
    press(edit, qt.Qt.Key_Return, qt.Qt.ControlModifier)
    assert not panel.session.running
    panel.panels.enter()
    press(edit, qt.Qt.Key_Return, qt.Qt.ControlModifier)
    assert panel.session.running


def test_entering_twice_installs_a_key_once(panel: Opened) -> None:
    panel.choose_volume()
    panel.panels.enter()
    panel.panels.enter()
    edit = panel.prompt.ui.promptEdit
    edit.setText("liver")
    # Twice the same key would be ambiguous, and Qt would call neither.
    press(edit, qt.Qt.Key_Return, qt.Qt.ControlModifier)
    assert panel.session.running


def test_a_run_asks_for_what_the_panel_says(panel: Opened) -> None:
    node = panel.choose_volume()
    settings = {"proposals": 7, "topK": 2, "steps": 9, "adaptive": True, "everywhere": True, "keepPieces": True}
    panel.propose("liver; spleen", seed=41, seedLocked=True, **settings)
    panel.client.reach_propose()
    request = panel.client.values[0]
    assert (request.targets, request.proposals, request.top_k, request.steps) == (("liver", "spleen"), 7, 2, 9)
    assert (request.seed, request.adaptive, request.everywhere, request.slices) == (41, True, True, None)
    assert request.keep_pieces
    assert panel.session.store is None, "nothing has arrived"
    assert panel.parameters.inputVolume is node


def test_more_best_ones_than_proposals_are_not_asked_for(panel: Opened) -> None:
    panel.choose_volume()
    panel.propose(proposals=2, topK=9)
    panel.client.reach_propose()
    assert panel.client.values[0].top_k == 2


def test_a_seed_is_drawn_for_every_run_and_shown_unless_it_is_kept(panel: Opened, spin: Spin) -> None:
    panel.choose_volume()
    seeds = []
    for locked in (False, False, True):
        panel.run(spin, 2, seedLocked=locked)
        seeds.append(panel.parameters.seed)
        assert panel.session.store.request.seed == panel.prompt.ui.seedSpinBox.value == seeds[-1]
    assert seeds[0] != seeds[1] == seeds[2]


def test_a_range_is_counted_from_one_and_passed_on_from_zero(panel: Opened) -> None:
    panel.choose_volume()
    panel.prompt.ui.extentComboBox.setCurrentIndex(list(Extent).index(Extent.RANGE))
    box = panel.prompt.ui.rangeWidget
    assert (box.minimum, box.maximum, box.minimumValue, box.maximumValue) == (1, 8, 1, 8)
    assert not box.isHidden()
    box.setValues(3, 5)
    panel.propose()
    panel.client.reach_propose()
    assert panel.client.values[0].slices == (2, 5)


def test_a_new_range_is_one_change_of_the_parameters(panel: Opened) -> None:
    panel.choose_volume()
    panel.prompt.ui.extentComboBox.setCurrentIndex(list(Extent).index(Extent.RANGE))
    seen: list[tuple[int, int]] = []

    def note(*_event: Any) -> None:
        seen.append((panel.parameters.rangeStart, panel.parameters.rangeStop))

    tag = panel.parameters.AddObserver("ModifiedEvent", note)
    panel.prompt.ui.rangeWidget.setValues(3, 5)
    panel.parameters.RemoveObserver(tag)
    assert set(seen) == {(2, 5)}


def test_another_volume_gets_its_own_range(panel: Opened) -> None:
    panel.choose_volume()
    panel.prompt.ui.extentComboBox.setCurrentIndex(list(Extent).index(Extent.RANGE))
    panel.prompt.ui.rangeWidget.setValues(6, 8)
    short = type(GRID)((14, 12, 4), GRID.affine)
    panel.choose_volume(short, "short")
    box = panel.prompt.ui.rangeWidget
    assert (box.maximum, box.minimumValue, box.maximumValue) == (4, 1, 4)
    panel.propose()
    panel.client.reach_propose()
    assert panel.client.values[0].slices == (0, 4)


def test_this_slice_is_the_one_that_the_view_shows(panel: Opened) -> None:
    panel.choose_volume()
    red = panel.scene.GetNodeByID("vtkMRMLSliceNodeRed")
    red.JumpSliceByOffsetting(0, 0, -40 + 5 * 6)
    panel.propose(extent=Extent.SLICE)
    panel.client.reach_propose()
    assert panel.client.values[0].slices == (6, 7)


def test_rows_that_do_not_apply_are_hidden(panel: Opened) -> None:
    panel.choose_volume()
    assert panel.prompt.ui.rangeWidget.isHidden()
    assert panel.prompt.ui.framesComboBox.isHidden()
    assert panel.prompt.ui.progressBar.isHidden()


def test_all_frames_of_a_sequence(panel: Opened) -> None:
    rng = np.random.default_rng(2)
    arrays = [rng.normal(size=GRID.shape_kji).astype(np.float32) for _frame in range(3)]
    node, _browser = add_sequence(panel.scene, GRID, arrays)
    panel.prompt.ui.volumeSelector.setCurrentNode(node)
    assert not panel.prompt.ui.framesComboBox.isHidden()
    panel.prompt.ui.framesComboBox.setCurrentIndex(list(Frames).index(Frames.ALL))
    panel.propose(proposals=2)
    masks = random_masks(GRID, 2)
    for _frame in range(3):
        panel.arrive(node, masks)
        panel.client.finish()
    assert not panel.session.running
    assert sorted(panel.session.stores) == [0, 1, 2]


@pytest.mark.parametrize(("prompt", "said"), [("", "names no target"), ("livr", '"liver"'), ("aorta", "has not learned")])
def test_a_prompt_that_cannot_be_understood_is_explained_and_kept(panel: Opened, prompt: str, said: str) -> None:
    panel.choose_volume()
    loaded(panel)
    panel.propose(prompt)
    assert said in panel.said
    assert panel.said.count(". ") <= 1
    assert panel.prompt.line.text == prompt
    assert not panel.session.running
    assert not panel.prompt.line.history


def test_without_a_volume_one_is_asked_for(panel: Opened) -> None:
    panel.propose()
    assert "No volume is chosen" in panel.said
    assert panel.prompt.line.text == "liver"


def test_the_button_cancels_what_it_started(panel: Opened) -> None:
    panel.choose_volume()
    button = panel.prompt.ui.proposeButton
    panel.propose()
    assert button.text == "Cancel"
    assert not panel.prompt.ui.progressBar.isHidden()
    panel.client.reach_propose()
    button.click()
    assert (button.text, button.enabled) == ("Cancelling", False)
    panel.client.confirm_cancel()
    assert (button.text, button.enabled) == ("Propose", True)
    assert panel.prompt.ui.progressBar.isHidden()
    assert "Cancelled" in panel.said


def test_progress_says_the_slice_and_the_time_left(panel: Opened) -> None:
    panel.choose_volume()
    panel.propose()
    call = panel.client.reach_propose()
    call.event.emit(ProgressEvent("sampling", 0.5, slice_index=3, slices_done=11, slices_total=80, eta_s=42.0))
    bar = panel.prompt.ui.progressBar
    assert bar.text == "slice 12/80, about 40 s left"
    assert 400 < bar.value < 700


@pytest.mark.parametrize(
    ("seconds", "words"),
    [
        (None, ""),
        (-1, ""),
        (1, "a few seconds left"),
        (14, "about 15 s left"),
        (89, "about 90 s left"),
        (240, "about 4 min left"),
    ],
)
def test_the_time_left_in_words(seconds: float | None, words: str) -> None:
    assert remaining(seconds) == words


def test_a_crash_is_one_sentence_with_a_restart_and_the_prompt_stays(panel: Opened) -> None:
    panel.choose_volume()
    panel.propose("liver; spleen")
    panel.client.reach_propose()
    panel.client.crash()
    assert panel.said == "The worker ended unexpectedly (exit code 42); start it again."
    restart = panel.panels.ui.restartButton
    assert not restart.isHidden()
    assert panel.prompt.line.text == panel.parameters.prompt == "liver; spleen"
    assert panel.prompt.ui.proposeButton.text == "Propose"
    restart.click()
    assert panel.client.restarts == 1
    assert restart.isHidden()
    assert panel.said == ""


def test_what_the_worker_refuses_needs_no_restart(panel: Opened) -> None:
    panel.choose_volume()
    panel.propose()
    refused = WorkerFailure("remote", "Not enough memory; ask for fewer proposals.", code="memory")
    panel.client.reach_propose().fail(refused)
    assert panel.said == "Not enough memory; ask for fewer proposals."
    assert panel.panels.ui.restartButton.isHidden()


def test_a_worker_that_ends_while_nothing_is_asked_of_it_is_noticed(panel: Opened) -> None:
    panel.client.failed.emit(WorkerFailure("exit", "The worker ended unexpectedly; start it again."))
    assert panel.said == "The worker ended unexpectedly; start it again."
    assert not panel.panels.ui.restartButton.isHidden()


def test_the_next_run_takes_an_old_failure_away(panel: Opened) -> None:
    panel.choose_volume()
    panel.propose()
    panel.client.reach_propose()
    panel.client.crash()
    panel.propose()
    assert panel.said == ""
    assert panel.panels.ui.restartButton.isHidden()


def test_a_warning_is_shown(panel: Opened) -> None:
    panel.choose_volume()
    panel.propose()
    panel.client.reach_propose().event.emit(WarningEvent("modality", "The values look like CT."))
    assert panel.said == "The values look like CT."


def test_the_volume_that_is_removed_takes_its_run_along_and_that_is_said(panel: Opened) -> None:
    node = panel.choose_volume()
    panel.propose()
    panel.client.reach_propose()
    panel.scene.RemoveNode(node)
    assert "was removed" in panel.said
    assert not panel.session.running
    assert panel.prompt.line.text == "liver"


def test_parameters_and_history_are_restored_from_the_scene(panel: Opened) -> None:
    node = panel.choose_volume()
    panel.propose("left kidney", proposals=11, steps=6, extent=Extent.RANGE, rangeStart=2, rangeStop=4)
    stored = panel.parameters.parameterNode
    panel.panels.disconnectGui()
    panel.prompt.ui.promptEdit.setText("something else")
    panel.prompt.ui.proposalsSpinBox.setValue(3)
    again = type(panel.parameters)(stored)
    panel.panels.connectGui(again)
    ui = panel.prompt.ui
    assert (ui.promptEdit.text, ui.proposalsSpinBox.value, ui.stepsSpinBox.value) == ("left kidney", 11, 6)
    assert (ui.rangeWidget.minimumValue, ui.rangeWidget.maximumValue) == (3, 4)
    assert panel.prompt.line.history == ["left kidney"]
    assert ui.volumeSelector.currentNode() is node


def test_nodes_of_our_own_are_not_offered_as_volumes(panel: Opened, spin: Spin) -> None:
    node, _masks = panel.run(spin)
    panel.proposals.ui.agreementCheckBox.setChecked(True)
    assert panel.session.overlay.node is not None
    panel.panels.enter()
    selector = panel.prompt.ui.volumeSelector
    assert [selector.nodeFromIndex(place).GetID() for place in range(selector.nodeCount())] == [node.GetID()]
    assert selector.currentNode() is node


def loaded(panel: Opened) -> None:
    """Let the worker be loaded, so that its vocabulary counts."""
    panel.propose()
    panel.client.reach_propose()
    panel.prompt.ui.proposeButton.click()
    panel.client.confirm_cancel()
    panel.prompt.line.set_history([])
    assert plan_of(panel.parameters.inputVolume)[1].count == 8
