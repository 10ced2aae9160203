"""The session with a scripted client: what is asked of the worker in which order, and what becomes of its answers."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import slicer

from progidiff.errors import InputError, PromptError
from progidiff.proposals.proposals import Proposals
from progidiff.wire.messages import ProgressEvent, ProposeRequest, WarningEvent
from ProGiDiffSlicerLib.session import RunRequest, SessionState

from ..proposal_examples import ranking_event, slice_event
from .session_support import FakeClient
from .watched_session import (
    GEOMETRY,
    MASKS,
    PLAN,
    Spin,
    Watched,
    client,
    request,
    run_through,
    send,
    session,
    shown,
    volume,
)

__all__ = ["client", "session", "volume"]


def test_a_run_from_prompt_to_ranked_proposals(session: Watched, client: FakeClient, volume: Any, spin: Spin) -> None:
    volume.SetAttribute("DICOM.Modality", "CT")
    session.start(request(volume, "Leber", top_k=2, steps=3, seed=7))
    assert session.running
    assert client.values == (None, "auto")
    client.answer_load()
    array, affine, modality, _plane, _correct = client.values
    np.testing.assert_array_equal(array, slicer.util.arrayFromVolume(volume))
    np.testing.assert_allclose(affine, GEOMETRY.affine)
    assert modality == "CT"
    client.answer_image()
    (wanted,) = client.values
    assert (wanted.targets, wanted.proposals, wanted.top_k, wanted.steps, wanted.seed) == (("liver",), 5, 2, 3, 7)
    assert wanted.slices is None
    send(client)
    ranking = ranking_event(MASKS, GEOMETRY, top_k=2)
    client.call.event.emit(ranking)
    client.finish()
    assert session.state is SessionState.IDLE
    names = [name for name, *_rest in session.said]
    assert names == ["stateChanged", "storeChanged", "preview", "ranked", "stateChanged", "finished"]
    assert session.store is not None
    assert [row.index for row in session.store.rows("liver")] == ranking.order
    assert session.proposals.selected == ranking.order[0]
    for number in ranking.top_k:
        np.testing.assert_array_equal(shown(session, spin, number), MASKS[number])
    assert session.stale() is None


def test_a_first_look_before_the_ranking(session: Watched, client: FakeClient, volume: Any, spin: Spin) -> None:
    session.start(request(volume))
    client.reach_propose()
    client.call.event.emit(slice_event(MASKS[:2], PLAN, 0, last=False))
    assert session.heard("preview") == [("liver",)]
    arrived = MASKS[0].copy()
    arrived[1:] = False
    np.testing.assert_array_equal(shown(session, spin, 0), arrived)
    client.call.event.emit(slice_event(MASKS, PLAN, 0, first=2))
    assert len(session.heard("preview")) == 1, "not at every slice"
    assert session.heard("ranked") == []


def test_a_tidied_stack_takes_the_place_of_what_was_streamed(
    session: Watched, client: FakeClient, volume: Any, spin: Spin
) -> None:
    """The slices that have changed come before the ranking; whatever ends the run between them, nothing is lost."""
    masks = np.zeros_like(MASKS)
    masks[:, :2, :2, :2] = True
    masks[1, -1, -1, -1] = True
    session.start(request(volume, top_k=2))
    client.reach_propose()
    send(client, masks=masks)
    store = session.store
    assert store is not None
    engine = Proposals("liver", PLAN, range(PLAN.count))
    for index in engine.slices:
        engine.add(slice_event(masks, PLAN, index))
    first, *rest = list(engine.tidy())
    assert not rest
    client.call.event.emit(first)
    assert store is session.store
    np.testing.assert_array_equal(store["liver"].volume(1), masks[0])
    client.call.event.emit(engine.rank(client.values[0], GEOMETRY.voxel_volume_ml, "done"))
    client.finish()
    assert session.heard("finished") == [()]
    (row,) = store.rows("liver")
    assert (row.index, row.weight, row.dropped_pieces) == (0, 5, 0)
    np.testing.assert_array_equal(shown(session, spin, 0), masks[0])


def test_a_loaded_model_is_not_loaded_again(session: Watched, client: FakeClient, volume: Any) -> None:
    run_through(session, client, volume)
    run_through(session, client, volume)
    run_through(session, client, volume, device="cpu")
    run_through(session, client, volume, device="cpu", model_folder="")
    assert client.kinds == ["load", *["set_image", "propose"] * 2, "load", *["set_image", "propose"] * 2]


def test_progress_in_words(session: Watched, client: FakeClient, volume: Any) -> None:
    session.start(request(volume))
    client.call.event.emit(ProgressEvent("reading weights", 0.5))
    client.answer_load()
    client.call.event.emit(ProgressEvent("sending the image", 0.5))
    client.answer_image()
    client.call.event.emit(ProgressEvent("sampling", 0.0, 0, 0, 80))
    client.call.event.emit(ProgressEvent("sampling", 0.25, 11, 11, 80, "liver", 33.0))
    client.call.event.emit(ProgressEvent("sampling", 1.0, 79, 80, 80, "liver", 0.0))
    words = [text for _fraction, text, _eta in session.progress]
    assert words[:3] == ["starting the worker", "loading the model", "sending the volume"]
    assert words[-3:] == ["slice 1/80", "slice 12/80", "slice 80/80"]
    assert session.progress[-2][2] == 33.0
    fractions = [fraction for fraction, _text, _eta in session.progress]
    assert fractions == sorted(fractions)
    assert fractions[-1] == 1.0


def test_what_cannot_be_asked_is_refused_before_a_worker_is_asked(
    session: Watched, client: FakeClient, volume: Any, scene: Any
) -> None:
    with pytest.raises(PromptError, match="liver"):
        session.start(request(volume, "livre"))
    with pytest.raises(InputError, match="range"):
        session.start(request(volume, extent="range", slices=(4, 2)))
    with pytest.raises(InputError, match="No volume"):
        session.start(RunRequest("vtkMRMLScalarVolumeNode77", "liver", ProposeRequest(())))
    with pytest.raises(InputError, match="No volume"):
        session.start(RunRequest("", "liver", ProposeRequest(())))
    with pytest.raises(InputError, match="holds no voxels"):
        session.start(request(scene.AddNewNodeByClass("vtkMRMLScalarVolumeNode", "leer")))
    assert client.calls == []
    assert session.said == []


def test_a_refused_run_leaves_the_one_under_way_alone(session: Watched, client: FakeClient, volume: Any) -> None:
    session.start(request(volume))
    client.reach_propose()
    with pytest.raises(PromptError):
        session.start(request(volume, "unicorn"))
    assert session.running
    send(client)
    client.call.event.emit(ranking_event(MASKS, GEOMETRY))
    client.finish()
    assert session.heard("finished") == [()]


def test_vocabulary_of_the_bundled_model_before_any_worker_runs(session: Watched, client: FakeClient, volume: Any) -> None:
    assert {"liver", "spleen", "kidneys"} <= set(session.vocabulary())
    assert [target.key for target in session.parse("Milz und Leber")] == ["spleen", "liver"]
    run_through(session, client, volume)
    assert session.vocabulary() == client.vocabulary
    with pytest.raises(PromptError):
        session.parse("pancreas")


def test_a_model_whose_card_only_the_worker_can_read(scene: Any, client: FakeClient, volume: Any) -> None:
    session = Watched(scene, client, model_folder=lambda: "/remote/modèle")
    assert session.vocabulary() == ()
    assert [target.key for target in session.parse("pancreas")] == ["pancreas"]
    session.start(request(volume, "pancreas", model_folder="/remote/modèle"))
    client.answer_load()
    assert client.kinds == ["load"]
    (message,) = session.heard("failed")[0]
    assert "pancreas" in message
    assert session.state is SessionState.IDLE
    session.cleanup()


def test_a_slice_and_a_range(session: Watched, client: FakeClient, volume: Any) -> None:
    session.start(request(volume, extent="range", slices=(3, 4)))
    client.reach_propose()
    assert client.values[0].slices == (3, 4)
    send(client, range(3, 4))
    assert session.store is not None
    assert list(session.store.slices) == [3]
    session.start(request(volume, extent="range", slices=(1, 4)))
    client.reach_propose()
    assert client.values[0].slices == (1, 4)


def test_several_targets(session: Watched, client: FakeClient, volume: Any) -> None:
    session.start(request(volume, "liver; spleen"))
    client.reach_propose()
    assert client.values[0].targets == ("liver", "spleen")
    for index in range(PLAN.count):
        client.call.event.emit(slice_event(MASKS, PLAN, index))
        client.call.event.emit(slice_event(~MASKS, PLAN, index, target="spleen"))
    for target, masks in (("liver", MASKS), ("spleen", ~MASKS)):
        client.call.event.emit(ranking_event(masks, GEOMETRY, target))
    client.finish()
    assert session.heard("ranked") == [("liver",), ("spleen",)]
    assert session.store is not None
    assert session.store.rows("spleen")[0].millilitres != session.store.rows("liver")[0].millilitres


@pytest.mark.parametrize(("said", "told"), [("PT", "PT"), ("mr ", "MR"), ("", None), ("no code", None)])
def test_the_worker_is_told_what_the_volume_says_to_be(
    said: str, told: str | None, session: Watched, client: FakeClient, volume: Any
) -> None:
    volume.SetAttribute("DICOM.Modality", said)
    session.start(request(volume))
    client.reach_propose()
    assert next(values[2] for call, values in client.calls if call.kind == "set_image") == told


def test_warnings_are_passed_on(session: Watched, client: FakeClient, volume: Any) -> None:
    session.start(request(volume))
    client.reach_propose()
    client.call.event.emit(WarningEvent("empty", "liver: 100% of the proposals are empty."))
    assert session.heard("warned")[-1][0].message == "liver: 100% of the proposals are empty."
