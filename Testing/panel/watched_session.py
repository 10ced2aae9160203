"""A session with a scripted client that remembers what it said, and fixtures with it."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

import numpy as np
import pytest

from progidiff.volumes.slicing import SlicePlan, plan_slices
from ProGiDiffSlicerLib.idle import IdleQueue
from ProGiDiffSlicerLib.session import ProposalSession, RunRequest

from ..proposal_examples import random_masks, ranking_event, slice_event
from ..volume_examples import GEOMETRIES
from .session_support import FakeClient, add_volume, run_request, segment_array

Spin = Callable[..., None]
GEOMETRY = GEOMETRIES["LPS"]
PLAN: SlicePlan = plan_slices(GEOMETRY)
MASKS = random_masks(GEOMETRY, 5, share=0.6)
SIGNALS = ("stateChanged", "preview", "ranked", "finished", "failed", "cancelled", "dropped", "warned", "storeChanged")


class Watched(ProposalSession):
    """A session that remembers what it said."""

    def __init__(self, scene: Any, client: FakeClient, **options: Any) -> None:
        super().__init__(scene, client, IdleQueue(), **options)
        self.said: list[tuple[Any, ...]] = []
        self.progress: list[tuple[float, str, float | None]] = []
        for name in SIGNALS:
            getattr(self, name).connect(self._listener(name))
        self.progressChanged.connect(lambda *values: self.progress.append(values))

    def _listener(self, name: str) -> Callable[..., None]:
        return lambda *values: self.said.append((name, *values))

    def heard(self, name: str) -> list[tuple[Any, ...]]:
        return [values[1:] for values in self.said if values[0] == name]


@pytest.fixture
def client() -> FakeClient:
    return FakeClient()


@pytest.fixture
def session(scene: Any, client: FakeClient) -> Iterator[Watched]:
    watched = Watched(scene, client)
    yield watched
    watched.cleanup()


@pytest.fixture
def volume(scene: Any) -> Any:
    return add_volume(scene, GEOMETRY, "Bauch 肝")


def request(volume: Any, prompt: str = "liver", **options: Any) -> RunRequest:
    return run_request(volume, prompt, **{"proposals": 5, **options})


def send(client: FakeClient, slices: range | None = None, masks: np.ndarray = MASKS, **more: Any) -> None:
    for index in range(PLAN.count) if slices is None else slices:
        client.call.event.emit(slice_event(masks, PLAN, index, **more))


def run_through(session: Watched, client: FakeClient, volume: Any, **options: Any) -> None:
    session.start(request(volume, **options))
    client.reach_propose()
    send(client)
    client.call.event.emit(ranking_event(MASKS, GEOMETRY))
    client.finish()


def shown(session: Watched, spin: Spin, number: int) -> np.ndarray:
    spin(lambda: not session.proposals.busy)
    return segment_array(session.proposals.node, session.proposals.segment_id(number), GEOMETRY.shape_kji)
