"""The real worker with the real engine: what arrives is what the engine makes; adapters are swapped without a trace."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest
import torch
from typer.testing import CliRunner

from progidiff.cli.app import app
from progidiff.errors import CancelledError
from progidiff.model.adapter import add_lora, lora_state, save_adapter
from progidiff.model.folder import load_model
from progidiff.outputs.document import read_document
from progidiff.outputs.segmentation import write_volume
from progidiff.places import weights_hash
from progidiff.sampling.engine import Engine
from progidiff.volumes.geometry import Geometry
from progidiff.wire.client import ClientState, RemoteError, WorkerClient
from progidiff.wire.messages import DoneEvent, Event, ProposeRequest, RankingEvent, SliceEvent

pytestmark = pytest.mark.slow  # one worker, which loads torch, serves all tests
REQUEST = ProposeRequest(("liver",), proposals=3, steps=2, seed=1)
IMAGE = np.random.default_rng(0).normal(20, 60, (2, 40, 44)).astype(np.float32)
AFFINE = np.diag([-1.5, -1.5, 5.0, 1.0])


def write_adapter(model_folder: Path, out: Path, seed: int, **other: object) -> Path:
    """An adapter that changes the answer: random low-rank layers."""
    model = load_model(model_folder)
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for parameter in add_lora(model, 2, 2.0):
            parameter.copy_(torch.randn(parameter.shape, generator=generator) * 0.5)
    one = {"training": 1, "validation": 1}
    fields = {
        "adapter_id": out.name, "name": out.name, "base_model_id": model.card.model_id,
        "base_sha256": weights_hash(model.card.sha256), "rank": 2, "alpha": 2.0, "layers": "all", "modalities": ["CT"],
        "vocabulary": ["liver"], "cases": one, "patients": one, "steps": 1, "best_step": 1, "seconds": 1.0,
        "device": "cpu", "seed": 0, "better": True, "reason": "It is better.", **other,
    }  # fmt: skip
    save_adapter(lora_state(model), fields, out)
    return out


@pytest.fixture(scope="module")
def adapters(tiny_model_folder: Path, tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    folder = tmp_path_factory.mktemp("adapters")
    return {
        "one": write_adapter(tiny_model_folder, folder / "one", 1),
        "two": write_adapter(tiny_model_folder, folder / "zwei ä", 2),
        "worse": write_adapter(tiny_model_folder, folder / "worse", 3, better=False, reason="It is not better."),
        "foreign": write_adapter(tiny_model_folder, folder / "foreign", 4, base_model_id="other", base_sha256="0" * 64),
    }


@pytest.fixture(scope="module")
def started() -> Iterator[WorkerClient]:
    with WorkerClient(env={"OMP_NUM_THREADS": "1"}, heartbeat_timeout=300, start_timeout=300) as client:
        yield client


@pytest.fixture
def client(started: WorkerClient, tiny_model_folder: Path) -> WorkerClient:
    """One worker serves all tests; each loads the model anew, without an adapter."""
    started.load(tiny_model_folder, "cpu")
    started.set_image(IMAGE, AFFINE, "CT")
    assert started.status().adapter_id is None
    return started


def answer(client: WorkerClient) -> tuple[np.ndarray, str | None]:
    """Mean probability of the slices, and the adapter that the worker says it used."""
    events = list(client.propose(REQUEST))
    parts = [e.mean_probability for e in events if isinstance(e, SliceEvent) and e.mean_probability is not None]
    return np.stack(parts), next(e.adapter_id for e in events if isinstance(e, DoneEvent))


def test_the_worker_gives_what_the_engine_gives(client: WorkerClient, tiny_model_folder: Path) -> None:
    def masks(events: list[Event]) -> dict[tuple[int, int], bytes]:
        found = [event for event in events if isinstance(event, SliceEvent)]
        return {(event.slice_index, event.first_proposal): event.masks.tobytes() for event in found}

    remote = list(client.propose(REQUEST))
    engine = Engine.load(tiny_model_folder, "cpu")
    assert client.set_image(IMAGE, AFFINE, "CT") == engine.set_image(IMAGE, AFFINE, "CT")
    local: list[Event] = []
    engine.propose(REQUEST, local.append, lambda: False)
    assert masks(remote) == masks(local)
    assert any(isinstance(event, SliceEvent) and event.masks.any() for event in local)
    assert [e for e in remote if isinstance(e, RankingEvent)] == [e for e in local if isinstance(e, RankingEvent)]


def test_what_ends_a_request_leaves_the_worker_at_work(client: WorkerClient) -> None:
    stream = client.propose(ProposeRequest(("liver",), proposals=500, steps=50))
    next(stream)
    assert client.cancel()
    with pytest.raises(CancelledError):
        list(stream)
    with pytest.raises(RemoteError, match="liver"):
        list(client.propose(ProposeRequest(("spleen",))))
    assert client.state is ClientState.READY
    assert answer(client)[1] is None


def test_adapters_are_swapped_in_the_warm_worker_and_leave_no_trace(
    client: WorkerClient, adapters: dict[str, Path], tiny_model_folder: Path
) -> None:
    base, used = answer(client)
    assert used is None
    loaded = client.load_adapter(adapters["one"])
    assert loaded.adapter_id == "one"
    assert loaded.card["reason"] == "It is better."
    assert client.status().adapter_id == "one"
    one, used = answer(client)  # the image is still there: no second transfer
    assert used == "one"
    assert not np.array_equal(one, base)
    client.load_adapter(adapters["two"])
    two, _ = answer(client)
    assert not np.array_equal(two, one)
    client.unload_adapter()
    again, used = answer(client)
    assert used is None
    assert client.status().adapter_id is None
    assert np.array_equal(again, base)
    client.load_adapter(adapters["two"])
    assert np.array_equal(answer(client)[0], two)
    client.load(tiny_model_folder, "cpu")  # another model forgets it
    assert client.status().adapter_id is None


def test_a_refused_adapter_leaves_the_one_in_use(client: WorkerClient, adapters: dict[str, Path]) -> None:
    client.load_adapter(adapters["one"])
    for name, code, reason in (
        ("foreign", "adapter", 'made for the model "other"'),
        ("worse", "adapter_worse", "It is not better"),
    ):
        with pytest.raises(RemoteError, match=reason) as refusal:
            client.load_adapter(adapters[name])
        assert refusal.value.code == code
        assert client.status().adapter_id == "one"
    with pytest.raises(RemoteError, match="is no adapter"):
        client.load_adapter(adapters["one"].parent)
    assert client.load_adapter(adapters["worse"], even_if_worse=True).adapter_id == "worse"


def test_the_command_uses_a_worse_adapter_only_where_it_is_told_to(
    adapters: dict[str, Path], tiny_model_folder: Path, tmp_path: Path
) -> None:
    image, out = tmp_path / "ct.nii.gz", tmp_path / "out"
    write_volume(image, IMAGE, Geometry((44, 40, 2), AFFINE))
    command = ["propose", str(image), "--prompt", "liver", "--model", str(tiny_model_folder), "--out", str(out)]
    command += ["--proposals", "2", "--steps", "1", "--modality", "CT", "--adapter", str(adapters["worse"])]
    refused = CliRunner().invoke(app, command)
    assert refused.exit_code == 2
    assert "It is not better." in refused.output
    assert refused.output.strip().endswith("The option for that is --even-if-worse.")
    assert not out.exists()
    used = CliRunner().invoke(app, [*command, "--even-if-worse"])
    assert used.exit_code == 0, used.output
    assert "nothing shows that it helps" in used.output
    assert read_document(out / "proposals.json").model.adapter_id == "worse"
