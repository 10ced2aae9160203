"""Test connection: a worker of its own has to answer and to load the model; the one that works is left alone."""

from __future__ import annotations

import sys
from collections.abc import Callable
from types import SimpleNamespace
from typing import Any, ClassVar

import pytest

from progidiff import __version__
from progidiff.wire.conversation import WorkerFailure
from progidiff.wire.messages import Loaded
from ProGiDiffSlicerLib.setup.card import read_card
from ProGiDiffSlicerLib.setup.connection import ConnectionTest, Trial, readiness
from ProGiDiffSlicerLib.setup.settings import Settings
from ProGiDiffSlicerLib.setup.status import engine_status
from ProGiDiffSlicerLib.worker.calls import Call
from ProGiDiffSlicerLib.worker.client import WorkerClient
from ProGiDiffSlicerLib.worker.command import WorkerCommand

from .setup_examples import CARD, MemoryStore
from .worker_support import children

pytestmark = pytest.mark.usefixtures("app")
Spin = Callable[..., None]


class StillClient:
    """A worker that does nothing by itself."""

    made: ClassVar[list[StillClient]] = []

    def __init__(self, command: Callable[[], WorkerCommand]) -> None:
        self.command = command
        self.hello: Any = None
        self.asked: list[tuple[str | None, str]] = []
        self.stopped = 0
        self.call = Call("load", lambda call: None)
        StillClient.made.append(self)

    def load(self, folder: str | None, device: str) -> Call:
        self.asked.append((folder, device))
        return self.call

    def stop(self, wait: bool = False) -> None:
        self.stopped += 1
        self.call.end_cancelled()

    def answer(self, version: str = __version__, card: dict[str, Any] | None = None) -> None:
        self.hello = SimpleNamespace(version=version, python="3.12.1")
        self.call.succeed(Loaded("remote", ("liver",), "cuda:0", CARD if card is None else card))


class Bench:
    def __init__(self, factory: Any = StillClient) -> None:
        StillClient.made = []
        self.settings = Settings(MemoryStore())
        self.settings.workerKind, self.settings.commandText = "command", "ssh gpu python -m progidiff worker"
        self.test = ConnectionTest(self.settings, factory)
        self.trials: list[Trial] = []
        self.test.ended.connect(self.trials.append)

    @property
    def client(self) -> StillClient:
        return StillClient.made[-1]


def test_a_worker_that_answers_and_loads() -> None:
    bench = Bench()
    bench.settings.modelFolder, bench.settings.device = "/srv/model", "cuda"
    assert StillClient.made == [], "nothing is started before the button"
    bench.test.start()
    assert bench.test.running
    assert bench.client.asked == [("/srv/model", "cuda")]
    assert bench.client.command().program == "ssh"
    bench.client.answer()
    (trial,) = bench.trials
    assert trial.worked
    assert trial.message == "The worker answers: Python 3.12.1, Remote model loaded on cuda:0."
    assert trial.card is not None
    assert trial.card.vocabulary == ["liver"]
    assert bench.client.stopped == 1
    assert not bench.test.running
    ready = readiness(bench.settings, engine_status())
    assert (ready.ready, ready.card) == (True, None), "a folder over there is not looked for here"
    bench.settings.commandText = "ssh other python -m progidiff worker"
    assert not readiness(bench.settings, engine_status()).ready, "another command is another worker"


def test_a_worker_that_fails_takes_its_earlier_success_back() -> None:
    bench = Bench()
    bench.settings.testedWorker = bench.settings.worker_key()
    bench.test.start()
    bench.client.call.fail(WorkerFailure("exit", "The worker ended.", "denied"))
    assert bench.trials == [Trial(False, "The worker ended.", "denied")]
    assert bench.settings.testedWorker == ""
    assert bench.client.stopped == 1


@pytest.mark.parametrize(
    ("answer", "worked", "told"),
    [
        ({"version": "9.9"}, True, f"It is version 9.9 and this is {__version__}; install the same version on both sides."),
        ({"card": {"format_version": "7"}}, False, "another version of ProGiDiff"),
    ],
)
def test_a_worker_of_another_version(answer: dict[str, Any], worked: bool, told: str) -> None:
    bench = Bench()
    bench.test.start()
    bench.client.answer(**answer)
    (trial,) = bench.trials
    assert trial.worked is worked
    assert told in trial.message
    assert bool(bench.settings.testedWorker) is worked


def test_cancelled_and_started_again() -> None:
    bench = Bench()
    bench.test.start()
    bench.test.start()
    assert len(StillClient.made) == 1
    first = bench.client
    bench.test.cancel()
    assert (first.stopped, bench.test.running, bench.trials) == (1, False, [])
    bench.test.start()
    first.answer()
    assert bench.trials == [], "what the cancelled worker still says is not heard"
    bench.client.answer()
    assert len(bench.trials) == 1


def test_settings_changed_meanwhile_are_not_what_was_tested() -> None:
    bench = Bench()
    bench.test.start()
    bench.settings.device = "cpu"
    bench.client.answer()
    assert bench.settings.testedWorker != bench.settings.worker_key()


@pytest.mark.slow
def test_the_real_worker_loads_the_bundled_model(spin: Spin) -> None:
    bench = Bench(WorkerClient)
    bench.settings.workerKind, bench.settings.pythonPath, bench.settings.device = "python", sys.executable, "cpu"
    before = children()
    bench.test.start()
    spin(lambda: bool(bench.trials), 120)
    bench.test.cleanup()
    (trial,) = bench.trials
    assert trial.worked, trial
    assert children() == before, "the worker of the test is left behind"
    assert trial.message.startswith("The worker answers: Python 3.")
    here = read_card()
    assert trial.card is not None
    assert (trial.card.name, trial.card.accuracy) == (here.name, here.accuracy)
