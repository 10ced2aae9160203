"""The real worker with the real engine on a tiny untrained model: what arrives is what the engine makes."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest

from progidiff.errors import CancelledError
from progidiff.wire.client import ClientState, RemoteError, WorkerClient
from progidiff.wire.messages import DoneEvent, Event, ProposeRequest, RankingEvent, SliceEvent

pytestmark = pytest.mark.slow  # one worker, which loads torch, serves all tests
LIVER = ProposeRequest(("liver",), proposals=3, top_k=2, steps=2, seed=5)
AFFINE = np.diag([-1.5, -1.5, 5.0, 1.0])


def abdomen() -> np.ndarray:
    """A bright ellipse in air, in Hounsfield units."""
    k, j, i = np.meshgrid(np.arange(3), np.arange(40), np.arange(44), indexing="ij")
    body = ((j - 20) / 16) ** 2 + ((i - 22) / 19) ** 2 < 1
    return np.where(body, 40 + 5 * np.sin(i / 3 + k), -1000).astype(np.int16)


@pytest.fixture(scope="module")
def client(tiny_model_folder: Path) -> Iterator[WorkerClient]:
    with WorkerClient(env={"OMP_NUM_THREADS": "1"}, heartbeat_timeout=300, start_timeout=300) as started:
        phases: list[str] = []
        loaded = started.load(tiny_model_folder, "cpu", lambda event: phases.append(event.phase))
        assert loaded.vocabulary == ("liver",)
        assert loaded.card["image_size"] == 32
        assert phases, "loading reports its progress"
        started.set_image(abdomen(), AFFINE, "CT")
        yield started


def masks_of(events: list[Event]) -> dict[tuple[int, int], np.ndarray]:
    """Mask by slice and proposal; later events replace earlier ones."""
    return {
        (event.slice_index, event.first_proposal + n): mask
        for event in events
        if isinstance(event, SliceEvent)
        for n, mask in enumerate(event.masks)
    }


def test_the_worker_gives_what_the_engine_gives(client: WorkerClient, tiny_model_folder: Path) -> None:
    from progidiff.sampling.engine import Engine

    remote = list(client.propose(LIVER))
    engine = Engine.load(tiny_model_folder, "cpu", lambda phase, fraction: None)
    info = engine.set_image(abdomen(), AFFINE, "CT")
    assert client.set_image(abdomen(), AFFINE, "CT") == info
    local: list[Event] = []
    engine.propose(LIVER, local.append, lambda: False)

    ours, theirs = masks_of(remote), masks_of(local)
    assert set(ours) == {(k, n) for k in range(3) for n in range(3)} == set(theirs)
    for place, mask in theirs.items():
        assert mask.shape == info.slice_shape
        np.testing.assert_array_equal(ours[place], mask)
    assert [e for e in remote if isinstance(e, RankingEvent)] == [e for e in local if isinstance(e, RankingEvent)]
    assert isinstance(remote[-1], DoneEvent)
    assert remote[-1].timing.keys() == local[-1].timing.keys()  # type: ignore[union-attr]


def test_a_running_request_is_cancelled_and_the_next_one_works(client: WorkerClient) -> None:
    stream = client.propose(ProposeRequest(("liver",), proposals=500, steps=50))
    next(stream)
    assert client.cancel()
    with pytest.raises(CancelledError):
        list(stream)
    assert isinstance(list(client.propose(LIVER))[-1], DoneEvent)


def test_a_target_or_a_folder_that_cannot_be_used_is_a_remote_error(client: WorkerClient, tmp_path: Path) -> None:
    with pytest.raises(RemoteError, match="liver"):
        list(client.propose(ProposeRequest(("spleen",))))
    with pytest.raises(RemoteError) as refusal:
        client.load(tmp_path)
    assert refusal.value.code == "model"
    assert client.state is ClientState.READY
    assert client.status().state == "empty"
