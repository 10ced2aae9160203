"""Adapters in the warm worker: swapped without loading the model again, refused with the reason, gone without a trace."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest
import torch
from typer.testing import CliRunner

from progidiff.cli.app import app
from progidiff.model.adapter import add_lora, lora_state, save_adapter
from progidiff.model.folder import load_model
from progidiff.outputs.document import read_document
from progidiff.outputs.segmentation import write_volume
from progidiff.places import ADAPTER_WEIGHTS_NAME, weights_hash
from progidiff.volumes.geometry import Geometry
from progidiff.wire.client import RemoteError, WorkerClient
from progidiff.wire.messages import DoneEvent, ProposeRequest, SliceEvent

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


@pytest.mark.slow
def test_adapters_are_swapped_in_the_warm_worker_and_leave_no_trace(client: WorkerClient, adapters: dict[str, Path]) -> None:
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


@pytest.mark.slow
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


@pytest.mark.slow
def test_damaged_weights_are_refused(client: WorkerClient, tiny_model_folder: Path, tmp_path: Path) -> None:
    path = write_adapter(tiny_model_folder, tmp_path / "a", 5)
    whole = (path / ADAPTER_WEIGHTS_NAME).read_bytes()
    (path / ADAPTER_WEIGHTS_NAME).write_bytes(whole[:-1] + bytes([whole[-1] ^ 1]))
    with pytest.raises(RemoteError, match="checksum") as refusal:
        client.load_adapter(path)
    assert refusal.value.code == "adapter"


@pytest.mark.slow
def test_another_model_forgets_the_adapter(client: WorkerClient, adapters: dict[str, Path], tiny_model_folder: Path) -> None:
    base, _ = answer(client)
    client.load_adapter(adapters["one"])
    client.load(tiny_model_folder, "cpu")
    assert client.status().adapter_id is None
    assert np.array_equal(answer(client)[0], base)


@pytest.mark.slow
def test_without_a_model_there_is_nothing_to_adapt(adapters: dict[str, Path]) -> None:
    with WorkerClient(env={"OMP_NUM_THREADS": "1"}) as client:
        for call in (lambda: client.load_adapter(adapters["one"]), client.unload_adapter):
            with pytest.raises(RemoteError, match="No model is loaded"):
                call()


@pytest.mark.slow
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
