"""Work between events: in portions, in order, cancellable, and never two at a time."""

from __future__ import annotations

import time
from collections.abc import Generator
from typing import Any

import pytest

from ProGiDiffSlicerLib.idle import IdleQueue

from ..slicer_host import collected_exceptions
from .worker_support import Pulse, Spin, run_event_loop

pytestmark = pytest.mark.usefixtures("app")


def counting(log: list[Any], name: str, steps: int, result: Any = None, pause: float = 0.0) -> Generator[None, None, Any]:
    try:
        for step in range(steps):
            time.sleep(pause)
            log.append((name, step))
            yield
        return result
    finally:
        log.append((name, "closed"))


def test_tasks_run_one_after_another_and_hand_on_their_results(spin: Spin) -> None:
    queue = IdleQueue()
    log: list[Any] = []
    queue.submit(counting(log, "a", 3, "result"), log.append)
    second = queue.submit(counting(log, "b", 2), log.append)
    assert log == []
    assert queue.waiting == 2
    spin(lambda: second.done)
    assert log == [("a", 0), ("a", 1), ("a", 2), ("a", "closed"), "result", ("b", 0), ("b", 1), ("b", "closed"), None]
    assert queue.waiting == 0


@pytest.mark.parametrize(("budget_s", "turns"), [(0.0, 50), (3600, 1)])
def test_the_event_loop_turns_between_portions_and_short_ones_share_a_turn(budget_s: float, turns: int, spin: Spin) -> None:
    """Without a budget each portion has a turn of its own, in which the other timer ticks as well."""
    queue, pulse = IdleQueue(budget_s=budget_s), Pulse(None)
    seen: list[int] = []

    def work() -> Generator[None, None, None]:
        for _ in range(50):
            seen.append(pulse.ticks)
            yield

    task = queue.submit(work())
    spin(lambda: task.done)
    pulse.stop()
    assert len(set(seen)) == turns


def test_a_failure_is_told_and_the_queue_goes_on(spin: Spin) -> None:
    queue = IdleQueue()
    log: list[Any] = []

    def broken() -> Generator[None, None, None]:
        yield
        raise ValueError("no")

    queue.submit(broken(), log.append, lambda error: log.append(repr(error)))
    last = queue.submit(counting(log, "b", 1), log.append)
    spin(lambda: last.done)
    assert log == ["ValueError('no')", ("b", 0), ("b", "closed"), None]


def test_a_callback_that_raises_does_not_stop_the_queue(spin: Spin, monkeypatch: pytest.MonkeyPatch) -> None:
    queue = IdleQueue()
    log: list[Any] = []

    def deny(value: Any) -> None:
        raise RuntimeError("the widget is gone")

    def broken() -> Generator[None, None, None]:
        yield
        raise ValueError("nobody listens")

    queue.submit(counting(log, "a", 1), deny)
    queue.submit(broken())
    last = queue.submit(counting(log, "b", 1), log.append)
    with monkeypatch.context() as patch, collected_exceptions(patch) as raised:
        spin(lambda: last.done)
    assert log[-1] is None
    assert len(raised) == 2
    assert "the widget is gone" in raised[0]
    assert "nobody listens" in raised[1]


def test_cancelled_tasks_clean_up_and_call_nobody(spin: Spin) -> None:
    queue = IdleQueue(budget_s=0.0)
    log: list[Any] = []
    running = queue.submit(counting(log, "a", 1000), log.append, log.append)
    waiting = queue.submit(counting(log, "b", 3), log.append, log.append)
    last = queue.submit(counting(log, "c", 1), log.append)
    spin(lambda: ("a", 1) in log)
    running.cancel()
    waiting.cancel()
    assert log[-1] == ("a", "closed")
    spin(lambda: last.done)
    assert not any(entry[0] == "b" for entry in log if entry)
    assert log[-3:] == [("c", 0), ("c", "closed"), None]


def test_a_task_may_cancel_itself(spin: Spin) -> None:
    queue = IdleQueue()
    log: list[Any] = []

    def work() -> Generator[None, None, None]:
        try:
            task.cancel()
            log.append("cancelled")
            yield
            log.append("never")
        finally:
            log.append("closed")

    task = queue.submit(work(), log.append)
    last = queue.submit(counting([], "b", 1))
    spin(lambda: last.done)
    assert log == ["cancelled", "closed"]


def test_clear_cancels_everything(spin: Spin) -> None:
    queue = IdleQueue()
    log: list[Any] = []
    tasks = [queue.submit(counting(log, name, 5), log.append) for name in "ab"]
    queue.clear()
    assert all(task.done for task in tasks)
    assert queue.waiting == 0
    last = queue.submit(counting(log, "c", 1))
    spin(lambda: last.done)
    assert log == [("c", 0), ("c", "closed")]


def test_a_portion_that_runs_an_event_loop_is_not_interrupted_by_another(spin: Spin) -> None:
    queue = IdleQueue()
    log: list[str] = []

    def work() -> Generator[None, None, None]:
        log.append("opened")
        run_event_loop(30)
        log.append("closed")
        yield

    queue.submit(work())
    last = queue.submit(counting([], "b", 1), lambda _: log.append("second"))
    spin(lambda: last.done)
    assert log == ["opened", "closed", "second"]
