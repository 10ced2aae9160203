"""The session with a scripted client: crashes, cancelling, runs in quick succession, volumes that go or change."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import slicer

from progidiff.wire.conversation import WorkerFailure
from progidiff.wire.messages import SliceEvent
from ProGiDiffSlicerLib.session import SessionState

from ..proposal_examples import ranking_event, slice_event
from .session_support import FakeClient, add_transform, add_volume
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


def cut_off(session: Watched, client: FakeClient, volume: Any) -> None:
    session.start(request(volume))
    client.reach_propose()
    send(client, range(3))


def assert_kept(session: Watched, spin: Spin) -> None:
    """The three slices of :func:`cut_off` are there, unranked, and can be seen."""
    assert session.state is SessionState.IDLE
    store = session.store
    assert store is not None
    assert [(row.index, row.rank) for row in store.rows("liver")] == [(n, None) for n in range(5)]
    arrived = MASKS.copy()
    arrived[:, 3:] = False
    np.testing.assert_array_equal(shown(session, spin, 0), arrived[0])
    crop = store["liver"].mask(4)
    assert crop.array.sum() == arrived[4].sum()


def test_a_crash_keeps_what_was_received(session: Watched, client: FakeClient, volume: Any, spin: Spin) -> None:
    cut_off(session, client, volume)
    client.crash()
    assert session.heard("failed") == [("The worker ended unexpectedly (exit code 42); start it again.",)]
    assert session.failure.kind == "exit"
    assert_kept(session, spin)
    run_through(session, client, volume)
    assert session.heard("finished") == [()]
    assert session.failure is None


def test_cancelling_keeps_what_was_received(session: Watched, client: FakeClient, volume: Any, spin: Spin) -> None:
    cut_off(session, client, volume)
    session.cancel()
    session.cancel()
    assert session.state is SessionState.CANCELLING
    assert client.cancels == [client.call]
    assert session.heard("cancelled") == []
    client.confirm_cancel()
    assert session.heard("cancelled") == [()]
    assert_kept(session, spin)


@pytest.mark.parametrize("stage", ["load", "set_image", "propose"])
def test_cancelling_at_each_stage(session: Watched, client: FakeClient, volume: Any, stage: str) -> None:
    session.start(request(volume))
    if stage != "load":
        client.answer_load()
    if stage == "propose":
        client.answer_image()
    assert client.call.kind == stage
    session.cancel()
    client.confirm_cancel()
    assert session.heard("cancelled") == [()]
    assert session.state is SessionState.IDLE
    assert session.store is None
    calls = len(client.calls)
    run_through(session, client, volume)
    assert len(client.calls) > calls
    assert session.heard("finished") == [()]


@pytest.mark.parametrize("stage", ["load", "set_image", "propose"])
def test_failing_at_each_stage(session: Watched, client: FakeClient, volume: Any, stage: str) -> None:
    run_through(session, client, volume)
    before = session.store
    client.loaded = None
    session.start(request(volume))
    if stage != "load":
        client.answer_load()
    if stage == "propose":
        client.answer_image()
    client.call.fail(WorkerFailure("remote", "There was not enough memory.", code="memory"))
    assert session.heard("failed") == [("There was not enough memory.",)]
    assert session.store is before, "proposals of the run before stay until there are new ones"
    assert session.state is SessionState.IDLE


def test_two_runs_in_quick_succession(session: Watched, client: FakeClient, volume: Any) -> None:
    session.start(request(volume, "liver"))
    first = client.reach_propose()
    first.event.emit(slice_event(MASKS, PLAN, 0))
    session.start(request(volume, "spleen"))
    assert client.cancels == [first]
    assert session.heard("cancelled") == [()]
    assert session.running
    second = client.reach_propose()
    first.event.emit(slice_event(MASKS, PLAN, 1))
    first.end_cancelled()
    assert session.running, "the end of the first run is not the end of the second"
    for index in range(PLAN.count):
        second.event.emit(slice_event(~MASKS, PLAN, index, target="spleen"))
    second.event.emit(ranking_event(~MASKS, GEOMETRY, "spleen"))
    client.finish()
    assert session.heard("finished") == [()]
    assert session.heard("cancelled") == [()]
    assert session.store is not None
    assert session.store.targets == ("spleen",)


def test_three_runs_before_the_worker_says_anything(session: Watched, client: FakeClient, volume: Any) -> None:
    for _ in range(3):
        session.start(request(volume))
    assert client.kinds == ["load"] * 3
    assert len(client.cancels) == 2
    for call in list(client.cancels):
        call.end_cancelled()
    assert session.running
    client.reach_propose()
    send(client)
    client.call.event.emit(ranking_event(MASKS, GEOMETRY))
    client.finish()
    assert session.heard("finished") == [()]


def test_results_for_a_deleted_volume_are_dropped(session: Watched, client: FakeClient, volume: Any, scene: Any) -> None:
    cut_off(session, client, volume)
    before = client.call
    scene.RemoveNode(volume)
    assert session.heard("dropped") == [("The volume was removed; its proposals were dropped.",)]
    assert session.state is SessionState.IDLE
    assert client.cancels == [before]
    assert session.store is None
    assert session.proposals.node is None
    before.event.emit(slice_event(MASKS, PLAN, 4))
    before.end_cancelled()
    assert session.store is None
    assert len(session.heard("dropped")) == 1


def test_proposals_of_a_volume_that_is_deleted_later_go_with_it(
    session: Watched, client: FakeClient, volume: Any, scene: Any
) -> None:
    run_through(session, client, volume)
    scene.RemoveNode(add_volume(scene, GEOMETRY, "other"))
    assert session.store is not None
    scene.RemoveNode(volume)
    assert session.store is None
    assert len(session.heard("dropped")) == 1


@pytest.mark.parametrize("stage", ["load", "set_image", "propose", "ranking"])
def test_results_for_a_changed_volume_are_dropped(session: Watched, client: FakeClient, volume: Any, stage: str) -> None:
    def change() -> None:
        slicer.util.arrayFromVolume(volume)[:] += 1
        slicer.util.arrayFromVolumeModified(volume)

    session.start(request(volume))
    if stage == "load":
        change()  # nothing was sent yet: the run goes on with the new voxels
    client.answer_load()
    if stage == "set_image":
        change()
    client.answer_image()
    if stage == "set_image":
        assert client.kinds == ["load", "set_image"]
    else:
        send(client, range(2))
        if stage == "propose":
            change()
        send(client, range(2, PLAN.count))
        if stage == "ranking":
            change()
        client.call.event.emit(ranking_event(MASKS, GEOMETRY))
    if stage == "load":
        assert session.heard("dropped") == []
        assert session.store is not None
        return
    (reason,) = session.heard("dropped")[0]
    assert reason == "Bauch 肝 was changed meanwhile; its proposals were dropped, ask for them again."
    assert session.store is None
    assert session.state is SessionState.IDLE


def test_a_volume_that_is_only_moved_keeps_its_proposals(
    session: Watched, client: FakeClient, volume: Any, scene: Any, spin: Spin
) -> None:
    session.start(request(volume))
    client.reach_propose()
    send(client, range(3))
    transform = add_transform(scene, np.diag([-1.0, -1.0, 1.0, 1.0]))
    volume.SetAndObserveTransformNodeID(transform.GetID())
    send(client, range(3, PLAN.count))
    client.call.event.emit(ranking_event(MASKS, GEOMETRY))
    client.finish()
    assert session.heard("dropped") == []
    np.testing.assert_array_equal(shown(session, spin, session.proposals.selected), MASKS[session.proposals.selected])
    assert session.proposals.node.GetTransformNodeID() == transform.GetID()


def test_changes_after_the_run_are_told_when_asked(session: Watched, client: FakeClient, volume: Any) -> None:
    run_through(session, client, volume)
    slicer.util.arrayFromVolumeModified(volume)
    assert "was changed" in (session.stale() or "")
    assert session.store is not None, "nothing that was received is lost"


def test_closing_the_scene_cancels_and_forgets(session: Watched, client: FakeClient, volume: Any, scene: Any) -> None:
    cut_off(session, client, volume)
    running = client.call
    scene.Clear(0)
    assert client.cancels == [running]
    assert session.state is SessionState.IDLE
    assert session.heard("cancelled") == [()]
    assert session.heard("dropped") == []
    assert session.store is None
    assert session.proposals.node is None
    running.event.emit(slice_event(MASKS, PLAN, 4))
    running.end_cancelled()
    again = add_volume(scene, GEOMETRY)
    run_through(session, client, again)
    assert session.heard("finished") == [()]


def test_nonsense_from_the_worker_ends_the_run_with_a_sentence(session: Watched, client: FakeClient, volume: Any) -> None:
    session.start(request(volume))
    client.reach_propose()
    send(client, range(2))
    client.call.event.emit(SliceEvent("liver", 2, 0, np.ones((5, 3, 3), bool)))
    (message,) = session.heard("failed")[0]
    assert "install the same version" in message
    assert session.state is SessionState.IDLE
    assert session.store is not None
    assert session.store["liver"].received == 2


def test_a_worker_that_cuts_the_volume_differently_is_refused(session: Watched, client: FakeClient, volume: Any) -> None:
    session.start(request(volume))
    client.answer_load()
    array, affine, *rest = client.calls[-1][1]
    client.calls[-1] = (client.call, (array[:3], affine, *rest))
    client.answer_image()
    assert "differently" in session.heard("failed")[0][0]
    assert session.state is SessionState.IDLE


def test_cleaning_up_leaves_no_observer_and_no_node(scene: Any, client: FakeClient, volume: Any) -> None:
    kinds = slicer.vtkMRMLScene
    before = scene.GetNumberOfNodes()
    session = Watched(scene, client)
    cut_off(session, client, volume)
    session.overlay.show(session.store, "liver")  # type: ignore[arg-type]
    tags = list(session._tags)
    session.cleanup()
    assert scene.GetNumberOfNodes() == before
    assert client.cancels == [client.call]
    for event in (kinds.NodeAboutToBeRemovedEvent, kinds.StartCloseEvent, kinds.EndCloseEvent):
        assert tags
        assert all(scene.GetCommand(tag) is None for tag in tags), event
    said = len(session.said)
    scene.RemoveNode(volume)
    assert len(session.said) == said
