"""The session with a scripted client: frames of a sequence."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import slicer

from progidiff.volumes.slicing import plan_slices
from progidiff.wire.messages import ProgressEvent, RankingEvent

from ..proposal_examples import random_masks, ranking_event, slice_event
from ..volume_examples import oriented
from .session_support import FakeClient, add_sequence, segment_array
from .watched_session import (
    Spin,
    Watched,
    client,
    request,
    session,
    volume,
)

__all__ = ["client", "session", "volume"]


FRAME_GEOMETRY = oriented("LPS", (6, 5, 4), (1.0, 1.0, 2.5))
FRAME_PLAN = plan_slices(FRAME_GEOMETRY)


def frame_masks(number: int) -> np.ndarray:
    return random_masks(FRAME_GEOMETRY, 3, seed=number, share=0.8)


def send_frame(client: FakeClient, number: int) -> RankingEvent:
    masks = frame_masks(number)
    for index in range(FRAME_PLAN.count):
        client.call.event.emit(slice_event(masks, FRAME_PLAN, index))
    ranking = ranking_event(masks, FRAME_GEOMETRY)
    client.call.event.emit(ranking)
    client.finish()
    return ranking


@pytest.fixture
def heart(scene: Any) -> tuple[Any, Any]:
    arrays = [np.full(FRAME_GEOMETRY.shape_kji, 100 * n, np.int16) for n in range(3)]
    return add_sequence(scene, FRAME_GEOMETRY, arrays)


def shown_frame(session: Watched, spin: Spin, number: int) -> np.ndarray:
    spin(lambda: not session.proposals.busy)
    return segment_array(session.proposals.node, session.proposals.segment_id(number), FRAME_GEOMETRY.shape_kji)


def test_results_of_this_frame_land_on_it_whatever_is_shown(
    session: Watched, client: FakeClient, heart: tuple[Any, Any], spin: Spin
) -> None:
    proxy, browser = heart
    browser.SetSelectedItemNumber(1)
    session.start(request(proxy))
    browser.SetSelectedItemNumber(2)
    client.answer_load()
    assert (client.values[0] == 100).all(), "the frame that was shown when the run began"
    client.answer_image()
    ranking = send_frame(client, 1)
    assert session.heard("dropped") == []
    assert session.store is None, "another frame is shown"
    assert list(session.stores) == [1]
    browser.SetSelectedItemNumber(1)
    assert session.store is session.stores[1]
    best = ranking.order[0]
    np.testing.assert_array_equal(shown_frame(session, spin, best), frame_masks(1)[best])
    assert session.proposals.node.GetDisplayNode().GetVisibility()
    browser.SetSelectedItemNumber(0)
    assert session.store is None
    assert not session.proposals.node.GetDisplayNode().GetVisibility()


def test_all_frames_one_after_another(session: Watched, client: FakeClient, heart: tuple[Any, Any], spin: Spin) -> None:
    proxy, browser = heart
    session.start(request(proxy, frames="all"))
    client.answer_load()
    rankings = []
    for number in range(3):
        assert (client.values[0] == 100 * number).all()
        client.answer_image()
        client.call.event.emit(ProgressEvent("sampling", 0.5, 1, 1, 4, "liver", 10.0))
        fraction, text, eta = session.progress[-1]
        assert text == f"frame {number + 1}/3, slice 2/4"
        assert number / 3 < fraction < (number + 1) / 3
        assert eta is not None
        assert eta >= 10.0 * (3 - number)
        rankings.append(send_frame(client, number))
    assert session.heard("finished") == [()]
    assert client.kinds == ["load", *["set_image", "propose"] * 3]
    assert sorted(session.stores) == [0, 1, 2]  # type: ignore[type-var]
    assert {store.model_id for store in session.stores.values()} == {"fake"}
    assert {store.prompt for store in session.stores.values()} == {"liver"}
    for number in (2, 0, 1):
        browser.SetSelectedItemNumber(number)
        assert session.store is session.stores[number]
        best = rankings[number].order[0]
        np.testing.assert_array_equal(shown_frame(session, spin, best), frame_masks(number)[best])


def test_a_crash_in_the_second_frame_keeps_the_first(session: Watched, client: FakeClient, heart: tuple[Any, Any]) -> None:
    proxy, _browser = heart
    session.start(request(proxy, frames="all"))
    client.answer_load()
    client.answer_image()
    send_frame(client, 0)
    client.answer_image()
    client.call.event.emit(slice_event(frame_masks(1), FRAME_PLAN, 0))
    client.crash()
    assert session.stores[0]["liver"].ranked
    assert session.stores[1]["liver"].received == 1
    assert len(session.heard("failed")) == 1


def test_a_run_on_one_frame_keeps_those_of_the_others(session: Watched, client: FakeClient, heart: tuple[Any, Any]) -> None:
    proxy, browser = heart
    for number in (0, 2):
        browser.SetSelectedItemNumber(number)
        session.start(request(proxy))
        if client.call.kind == "load":
            client.answer_load()
        client.answer_image()
        send_frame(client, number)
    assert sorted(session.stores) == [0, 2]  # type: ignore[type-var]
    assert session.store is session.stores[2]


def test_a_frame_that_changed_is_dropped(session: Watched, client: FakeClient, heart: tuple[Any, Any]) -> None:
    proxy, browser = heart
    session.start(request(proxy))
    client.reach_propose()
    data = browser.GetSequenceNode(proxy).GetNthDataNode(0)
    slicer.util.arrayFromVolume(data)[:] = 5
    slicer.util.arrayFromVolumeModified(data)
    client.call.event.emit(slice_event(frame_masks(0), FRAME_PLAN, 0))
    assert "was changed" in session.heard("dropped")[0][0]
