"""Much at a time, in either direction: the event loop goes on turning, and nothing piles up."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import qt

from progidiff.wire.codec import to_frame
from progidiff.wire.frames import encode_frame
from progidiff.wire.messages import ProgressEvent, ProposeRequest, SliceEvent, image_key
from ProGiDiffSlicerLib.signals import Signal
from ProGiDiffSlicerLib.worker.calls import Image
from ProGiDiffSlicerLib.worker.client import SENDING
from ProGiDiffSlicerLib.worker.command import WorkerCommand
from ProGiDiffSlicerLib.worker.link import MOST_FRAMES_PER_TURN, MOST_PENDING, MOST_READ_PER_TURN, Link

from .worker_support import CountingProcess, Pulse, Record, Spin, finished, phantom, run_event_loop, worker

pytestmark = pytest.mark.usefixtures("app")


@pytest.mark.parametrize(
    "volume",
    [
        phantom(),
        np.asfortranarray(phantom().astype(np.float32)),
        phantom().astype(">i4"),
        phantom()[::-1, :, ::2],
        np.arange(2 * 3 * 700_000, dtype=np.uint8).reshape(2, 3, -1),
        np.arange(2_000_000, dtype=np.int8).reshape(1, 1, -1),
    ],
    ids=["int16", "fortran", "big endian", "strided", "large rows", "one row"],
)
def test_the_copy_has_the_key_and_the_voxels_of_the_volume(volume: np.ndarray) -> None:
    affine = np.diag([1.0, 2, 3, 1])
    image = Image(volume, affine, "CT", None)
    for _ in image.prepare():
        assert not image.ready
    request = image.with_voxels()
    assert request.array is not None
    assert np.array_equal(request.array, volume)
    assert not np.shares_memory(request.array, volume)
    assert image.key == image_key(volume, affine, "CT", None) == image.by_key().key


@pytest.mark.slow
def test_a_flood_of_frames_leaves_the_event_loop_free(spin: Spin) -> None:
    count = 60
    with worker(process_factory=CountingProcess) as client:
        finished(client.run("flood", request=ProposeRequest(("liver",), proposals=8, seed=0)), spin)
        process = CountingProcess.last
        flood = Record(client.propose(ProposeRequest(("liver",), proposals=8, seed=count)))
        turns: list[tuple[int, int]] = []

        def between() -> None:
            turns.append((process.bytes_read, len(flood.events)))

        timer = qt.QTimer()
        timer.setInterval(0)
        timer.connect("timeout()", between)
        timer.start()
        spin(lambda: flood.done)
        timer.stop()
        assert [event.slice_index for event in flood.events] == list(range(count))
        assert all(event.masks[0].argmax() == event.slice_index for event in flood.events)
        steps = np.diff(np.array(turns), axis=0)
        assert process.bytes_read > count * 500_000
        assert steps[:, 0].max() <= 2 * (MOST_READ_PER_TURN + (32 << 10))
        assert steps[:, 1].max() <= 2 * MOST_FRAMES_PER_TURN
        # A listener that is slower than the worker makes the worker wait, and nobody's memory grow.
        assert process.most_waiting < 16 << 20


class FullPipe:
    """A process that has already said a lot: as when the event loop stood still for a long time."""

    pending = 0

    def __init__(self, output: bytes) -> None:
        self.started, self.readable, self.written, self.log_line = (Signal() for _ in range(4))
        self.failed_to_start, self.finished = Signal(), Signal()
        self.output = memoryview(output)
        self.bytes_read = 0
        self.killed = self.released = False

    def start(self, command: WorkerCommand) -> None:
        self.readable.emit()

    def read(self, most: int) -> bytes:
        data, self.output = self.output[:most], self.output[most:]
        self.bytes_read += len(data)
        return bytes(data)

    def write(self, data: bytes) -> None:
        raise AssertionError("nothing is asked")

    def close_input(self) -> None:
        self.finished.emit(0, False)

    def kill_tree(self) -> None:
        self.killed = True

    def wait(self, milliseconds: int) -> bool:
        return True

    def release(self) -> None:
        self.released = True


@pytest.mark.parametrize("payload", [0, 400_000], ids=["small frames", "large frames"])
def test_what_waits_is_read_in_portions(payload: int, spin: Spin) -> None:
    masks = np.zeros((8, 10, payload // 10), np.bool_)
    frame = to_frame(SliceEvent("liver", 0, 0, masks) if payload else ProgressEvent("sampling", 0.5), 7)
    one = b"".join(map(bytes, encode_frame(frame.header, frame.arrays)))
    count = 5000 if not payload else 40
    process = FullPipe(one * count)
    link = Link(lambda parent: process, None, 60, 60)
    replies: list[int] = []
    link.replied.connect(lambda number, reply: replies.append(number))
    turns = [(0, 0)]
    timer = qt.QTimer()
    timer.setInterval(0)
    timer.connect("timeout()", lambda: turns.append((process.bytes_read, len(replies))))
    timer.start()
    link.start(WorkerCommand("none"))
    spin(lambda: len(replies) == count)
    timer.stop()
    nbytes, frames = np.diff(np.array(turns), axis=0).max(axis=0)
    # The two timers take turns, so two portions at most lie between two ticks of this one.
    assert nbytes <= 2 * (MOST_READ_PER_TURN + (32 << 10))
    assert frames <= 2 * MOST_FRAMES_PER_TURN
    assert len(turns) > 5
    link.close(0)
    assert process.released
    assert link.released


def test_a_slow_listener_gets_one_event_per_turn(spin: Spin) -> None:
    with worker() as client:
        pulse = Pulse(None)
        record = client.run("work", phantom((30, 16, 20)))
        ticks: list[int] = []

        def slow(event: Any) -> None:
            ticks.append(pulse.ticks)
            qt.QThread.msleep(12)  # longer than a turn's share

        record.calls[2].event.connect(slow)
        spin(lambda: record.done)
        pulse.stop()
        assert len(ticks) > 60
        assert len(set(ticks)) == len(ticks)


@pytest.mark.slow
def test_a_large_image_is_sent_in_small_writes(spin: Spin) -> None:
    volume = np.arange(40 * 512 * 512, dtype=np.int32).astype(np.int16).reshape(40, 512, 512)
    with worker(process_factory=CountingProcess) as client:
        finished(Record(client.load("work", "cpu")), spin)
        pulse = Pulse(None)
        record = finished(Record(client.set_image(volume, np.eye(4), "CT")), spin)
        pulse.stop()
        process = CountingProcess.last
        assert record.outcomes == [("set_image", "succeeded")]
        assert process.bytes_written > volume.nbytes
        assert process.longest_write <= 1 << 20
        assert process.most_pending <= MOST_PENDING + process.longest_write
        assert pulse.ticks > 20
        shares = [event.fraction for event in record.events if event.phase == SENDING]
        assert shares == sorted(shares)
        assert len(shares) > 10
        assert shares[-1] > 0.9
        assert client.image is not None
        assert client.image.key == image_key(volume, np.eye(4), "CT", None)


def test_events_keep_their_order_while_a_listener_shows_a_message_box(spin: Spin) -> None:
    log: list[str] = []

    def message_box(event: Any) -> None:
        name = f"{type(event).__name__} {getattr(event, 'slice_index', '')}"
        log.append(f"begin {name}")
        run_event_loop(15)
        log.append(f"end {name}")

    with worker() as client:
        run = client.run()
        run.calls[2].event.connect(message_box)
        spin(lambda: run.done)
    assert len(log) > 8
    assert [line.removeprefix("begin") for line in log[::2]] == [line.removeprefix("end") for line in log[1::2]]
