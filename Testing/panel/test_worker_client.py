"""Requests to a real worker process through QProcess: order, cancelling, and an event loop that stays free."""

from __future__ import annotations

from typing import Any

import numpy as np
import psutil
import pytest
import qt

from progidiff.errors import InputError
from progidiff.wire.messages import (
    DoneEvent,
    ImageReply,
    Loaded,
    RankingEvent,
    SliceEvent,
    WarningEvent,
    image_key,
)
from ProGiDiffSlicerLib.worker.client import WorkerState

from ..slicer_host import collected_exceptions
from .worker_support import (
    LIVER,
    Client,
    CountingProcess,
    Record,
    Spin,
    finished,
    phantom,
    reach_loading,
    reach_proposing,
    reach_sending,
    scripted,
    worker,
)

pytestmark = pytest.mark.usefixtures("app")
ALL = ["load", "set_image", "propose"]


def succeeded(record: Record) -> bool:
    return record.outcomes == [(kind, "succeeded") for kind in ALL]


def test_a_run_submitted_at_once_starts_the_worker_and_runs_in_order(spin: Spin) -> None:
    with worker() as client:
        assert client.state is WorkerState.STOPPED
        run = client.run()
        assert client.state is WorkerState.STARTING
        assert run.ends == []
        spin(lambda: run.done)
        assert succeeded(run)
        loaded, image, done = (value for _, _, value in run.ends)
        assert [type(each) for each in (loaded, image, done)] == [Loaded, ImageReply, DoneEvent]
        assert (client.loaded, client.loaded_from, client.image) == (loaded, ("work", "cpu"), image)
        assert client.hello is not None
        slices = run.of(SliceEvent)
        assert [event.slice_index for event in slices] == [0, 1, 2]
        volume = phantom()
        assert all(np.array_equal(s.masks[0], volume[s.slice_index] > 0.2 * volume.max()) for s in slices)
        assert [event.target for event in run.of(RankingEvent)] == ["liver"]
        assert [event.code for event in run.of(WarningEvent)] == ["batch_halved"]
        assert client.states == ["starting", "ready", "busy", "ready"]


# What the worker refuses in a mode, how many calls succeed before, and the code.
REFUSED = {"missing": (0, "model"), "refuse_image": (1, "input"), "memory": (2, "memory")}


@pytest.mark.parametrize("mode", REFUSED)
def test_a_call_that_is_refused_takes_those_behind_it_along_and_the_worker_goes_on(mode: str, spin: Spin) -> None:
    good, code = REFUSED[mode]
    with worker() as client:
        run = finished(client.run(mode), spin)
        assert run.outcomes == [(kind, "succeeded" if place < good else "failed") for place, kind in enumerate(ALL)]
        assert (run.failure.kind, run.failure.code) == ("remote", code)
        assert (client.loaded is not None, client.image is not None) == (good > 0, good > 1)
        assert client.state is WorkerState.READY
        assert client.failures == []
        again = finished(client.run(), spin)
        assert succeeded(again)


def test_an_image_that_the_worker_holds_is_not_sent_again(spin: Spin) -> None:
    volume = phantom((8, 64, 64))
    with worker(process_factory=CountingProcess) as client:
        first = finished(client.run(image=volume), spin)
        sent = CountingProcess.last.bytes_written
        assert sent > volume.nbytes
        second = finished(client.run(image=volume.copy()), spin)
        assert CountingProcess.last.bytes_written - sent < 2000
        other = finished(client.run(image=volume + 1), spin)
        assert CountingProcess.last.bytes_written - sent > volume.nbytes
        assert [succeeded(run) for run in (first, second, other)] == [True] * 3


def test_an_image_that_the_worker_has_lost_is_sent_after_all(spin: Spin) -> None:
    volume = phantom((8, 64, 64))
    with worker(process_factory=CountingProcess) as client:
        finished(client.run(image=volume), spin)
        held = client.image
        finished(Record(client.set_image(volume + 1, np.eye(4), "CT")), spin)
        client.image = held
        sent = CountingProcess.last.bytes_written
        again = finished(Record(client.set_image(volume, np.eye(4), "CT")), spin)
        assert again.outcomes == [("set_image", "succeeded")]
        assert client.image is not None
        assert held is not None
        assert client.image.key == held.key
        assert CountingProcess.last.bytes_written - sent > volume.nbytes


@pytest.mark.parametrize(
    ("volume", "affine", "says"),
    [
        (np.zeros((4, 4)), np.eye(4), "three axes"),
        (np.zeros((2, 4, 4, 3), np.uint8), np.eye(4), "scalar volume"),
        (np.zeros((2, 4, 4), complex), np.eye(4), "plain numbers"),
        (np.zeros((2, 4, 4)), np.full((4, 4), np.nan), "position in space"),
    ],
)
def test_what_is_no_volume_is_refused_at_once(volume: np.ndarray, affine: np.ndarray, says: str) -> None:
    with worker() as client:
        with pytest.raises(InputError, match=says):
            client.set_image(volume, affine)
        assert client.state is WorkerState.STOPPED


def test_a_volume_larger_than_the_worker_takes_is_not_sent(spin: Spin) -> None:
    with worker(scripted("max_payload=20000"), process_factory=CountingProcess) as client:
        run = finished(client.run(image=phantom((4, 64, 64))), spin)
        assert run.outcomes == [("load", "succeeded"), ("set_image", "failed"), ("propose", "failed")]
        assert (run.failure.kind, run.failure.code) == ("remote", "input")
        assert "crop it" in run.failure.message
        assert CountingProcess.last.bytes_written < 4 * 64 * 64 * 2
        small = finished(client.run(), spin)
        assert succeeded(small)


def test_the_volume_is_taken_as_it_was_when_it_was_copied(spin: Spin) -> None:
    volume = phantom()
    with worker() as client:
        run = client.run(image=volume)
        # The copy is made while the worker starts, long before it can be sent.
        key = image_key(volume, np.eye(4), "CT", None)
        spin(lambda: client.state is WorkerState.READY)
        volume[:] = 0
        spin(lambda: run.done)
        assert client.image is not None
        assert client.image.key == key


def reach_starting(client: Client, spin: Spin) -> Record:
    return client.run("slow")


def reach_copying(client: Client, spin: Spin) -> Record:
    finished(Record(client.load("work", "cpu")), spin)
    record = Record(client.set_image(np.zeros((64, 512, 512), np.int16), np.eye(4)), client.propose(LIVER))
    spin(lambda: client.state is WorkerState.BUSY)
    return record


PHASES = {
    "starting": reach_starting,
    "copying": reach_copying,
    "loading": reach_loading,
    "sending": reach_sending,
    "proposing": reach_proposing,
}


@pytest.mark.slow
@pytest.mark.parametrize("phase", PHASES)
def test_cancel_at_each_phase_ends_every_call_and_the_worker_stays(phase: str, spin: Spin) -> None:
    with worker() as client:
        record = PHASES[phase](client, spin)
        already = list(record.ends)
        assert client.cancel()
        if phase == "sending":
            assert client.state is WorkerState.CANCELLING
            psutil.Process(client.pid).resume()
        spin(lambda: record.done and client.state is WorkerState.READY)
        assert all(how == "cancelled" for _, how, _ in record.ends[len(already) :])
        assert not client.cancel()
        pid = client.pid
        again = finished(client.run(), spin)
        assert succeeded(again)
        assert client.pid == pid
        assert client.failures == []
        # Nothing of the cancelled run comes late.
        assert len(record.ends) == len(record.calls)


def test_runs_in_quick_succession_leave_only_the_last_one(spin: Spin) -> None:
    with worker() as client:
        records = []
        for number in range(6):
            client.cancel()
            records.append(client.run("slow" if number < 5 else "work", phantom() + number))
            qt.QCoreApplication.processEvents()
        spin(lambda: all(record.done for record in records))
        assert all(how == "cancelled" for record in records[:-1] for _, how in record.outcomes)
        assert succeeded(records[-1])
        assert client.image is not None
        assert client.image.key == image_key(phantom() + 5, np.eye(4), "CT", None)


def test_a_waiting_call_can_be_cancelled_alone(spin: Spin) -> None:
    with worker() as client:
        run = client.run()
        run.calls[2].cancel()
        assert run.outcomes == [("propose", "cancelled")]
        run.calls[2].cancel()
        spin(lambda: run.done)
        assert run.outcomes == [("propose", "cancelled"), ("load", "succeeded"), ("set_image", "succeeded")]


def test_a_run_is_queued_behind_the_running_one(spin: Spin) -> None:
    with worker() as client:
        records = [client.run(), client.run("work", phantom() + 1)]
        spin(lambda: all(record.done for record in records))
        assert all(succeeded(record) for record in records)
        assert client.states == ["starting", "ready", "busy", "ready"]


def test_a_listener_that_raises_does_not_break_the_client(spin: Spin, monkeypatch: pytest.MonkeyPatch) -> None:
    def deny(*values: Any) -> None:
        raise RuntimeError("the widget is gone")

    with worker() as client, monkeypatch.context() as patch, collected_exceptions(patch) as raised:
        run = client.run()
        client.stateChanged.connect(deny)
        for call in run.calls:
            call.event.connect(deny)
            call.succeeded.connect(deny)
        spin(lambda: run.done)
        assert succeeded(run)
        assert client.state is WorkerState.READY
        client.stateChanged.disconnect(deny)
    assert len(raised) > 10
    assert all("the widget is gone" in text for text in raised)
