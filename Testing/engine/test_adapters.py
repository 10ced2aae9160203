"""Adapters in use: merged as peft computes them, swapped without a reload, removed bit for bit, refused with the reason."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file

from progidiff.cards import ModelCard, load_adapter_card
from progidiff.errors import AdapterError, OutputError, WorseAdapterError
from progidiff.model.adapter import ADAPTED, add_lora, lora_state, save_adapter, take_lora_off
from progidiff.model.components import sha256_of
from progidiff.model.folder import ProGiDiffModel, load_model, save_model
from progidiff.places import ADAPTER_CARD_NAME, ADAPTER_WEIGHTS_NAME, weights_hash
from progidiff.sampling.engine import Engine
from progidiff.synthesis.tissues import VOCABULARY
from progidiff.training import small
from progidiff.wire.messages import DoneEvent, ProposeRequest, SliceEvent

from .conftest import tiny_card


def fields(card: ModelCard, **other: Any) -> dict[str, Any]:
    """The fields of an adapter's card."""
    one = {"training": 1, "validation": 1}
    return {
        "adapter_id": "a", "name": "scanner", "base_model_id": card.model_id, "base_sha256": weights_hash(card.sha256),
        "rank": 4, "alpha": 4.0, "layers": "all", "modalities": ["CT"], "vocabulary": ["liver"], "cases": one,
        "patients": one, "steps": 1, "best_step": 1, "seconds": 1.0, "device": "cpu", "seed": 0, "better": True,
        "reason": "It is better.", **other,
    }  # fmt: skip


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A small model with random weights whose control branch speaks."""
    torch.manual_seed(0)
    card = tiny_card(licence="Apache-2.0", modalities=["CT"], vocabulary=["liver", "spleen"], spacing_mm=10.0)
    model = small.make_model(32, small.make_tokenizer(VOCABULARY), card)
    with torch.no_grad():
        for block in [*model.controlnet.controlnet_down_blocks, model.controlnet.controlnet_mid_block]:
            block.weight.normal_(0, 0.1)
    path = tmp_path_factory.mktemp("model") / "tiny"
    save_model(model, path)
    return path


def trained(model: ProGiDiffModel, seed: int = 1, rank: int = 4, layers: str = "all") -> dict[str, torch.Tensor]:
    """Low-rank matrices as training leaves them: neither of them zero. The layers stay in the model."""
    generator = torch.Generator().manual_seed(seed)
    parameters = add_lora(model, rank, float(rank), layers)  # type: ignore[arg-type]
    with torch.no_grad():
        for parameter in parameters:
            parameter.copy_(torch.randn(parameter.shape, generator=generator) * 0.2)
    return lora_state(model)


@pytest.fixture
def adapter(folder: Path, tmp_path: Path) -> Callable[..., Path]:
    """Writes an adapter for the model."""

    def write(name: str = "adapter", seed: int = 1, **other: Any) -> Path:
        model = load_model(folder)
        save_adapter(trained(model, seed), fields(model.card, adapter_id=name, **other), tmp_path / name)
        return tmp_path / name

    return write


def masks(engine: Engine) -> tuple[np.ndarray, str | None]:
    """Probability of some proposals, and the adapter that the engine says it used."""
    engine.set_image(np.random.default_rng(0).normal(20, 80, (1, 30, 30)), np.diag([10.0, 10.0, 10.0, 1.0]), "CT")
    events: list[Any] = []
    engine.propose(ProposeRequest(("liver",), proposals=3, steps=2), events.append, lambda: False)
    parts = [e.mean_probability for e in events if isinstance(e, SliceEvent) and e.mean_probability is not None]
    return parts[-1], next(e.adapter_id for e in events if isinstance(e, DoneEvent))


def state(model: ProGiDiffModel) -> dict[str, torch.Tensor]:
    return {f"{n}.{k}": v.clone() for n in ADAPTED for k, v in getattr(model, n).state_dict().items()}


@pytest.mark.slow
@pytest.mark.parametrize("layers", ["all", "attention"])
def test_merged_weights_answer_as_pefts_layers_do(layers: str, folder: Path, tmp_path: Path) -> None:
    live = load_model(folder)
    matrices = trained(live, layers=layers)
    assert any(key.startswith("image_encoder.stem") for key in matrices)
    inner = [key for key in matrices if key.startswith("controlnet.")]
    assert all("to_" in key for key in inner) == (layers == "attention")
    save_adapter(matrices, fields(live.card, layers=layers), tmp_path / "a")
    engine = Engine.load(folder, "cpu")
    base, _ = masks(engine)
    engine.load_adapter(tmp_path / "a")
    merged, used = masks(engine)
    assert used == "a"
    expected, _ = masks(Engine(live))
    np.testing.assert_allclose(merged, expected, atol=1e-4)
    assert np.abs(merged - base).max() > 0.01


@pytest.mark.slow
def test_removing_restores_the_base_bit_for_bit(folder: Path, adapter: Callable[..., Path]) -> None:
    engine = Engine.load(folder, "cpu")
    before, answer = state(engine.model), masks(engine)[0]
    networks = [id(n) for n in engine.model.networks.values()]
    engine.load_adapter(adapter("one"))
    assert not all(torch.equal(v, before[k]) for k, v in state(engine.model).items())
    engine.load_adapter(adapter("two", seed=2))  # a swap: nothing of the first one may stay
    two = masks(engine)[0]
    engine.unload_adapter()
    assert all(torch.equal(v, before[k]) for k, v in state(engine.model).items())
    again, used = masks(engine)
    assert used is None
    assert engine.adapter is None
    assert np.array_equal(again, answer)
    engine.load_adapter(adapter("two", seed=2))
    assert np.array_equal(masks(engine)[0], two)
    assert [id(n) for n in engine.model.networks.values()] == networks
    engine.unload_adapter()
    engine.unload_adapter()  # nothing to unload is no error


def test_lora_layers_come_off_without_a_trace(folder: Path) -> None:
    model = load_model(folder)
    before = state(model)
    trained(model)
    assert len(state(model)) > len(before)
    take_lora_off(model)
    after = state(model)
    assert after.keys() == before.keys()
    assert all(torch.equal(v, before[k]) for k, v in after.items())


@pytest.mark.slow
def test_a_worse_adapter_waits_for_a_word(folder: Path, adapter: Callable[..., Path]) -> None:
    engine = Engine.load(folder, "cpu")
    good, bad = adapter("good"), adapter("bad", seed=2, better=False, reason="On held-out cases it is not better.")
    engine.load_adapter(good)
    with pytest.raises(WorseAdapterError, match="not better") as caught:
        engine.load_adapter(bad)
    assert caught.value.code == "adapter_worse"
    assert engine.adapter.adapter_id == "good"
    assert engine.load_adapter(bad, even_if_worse=True).adapter_id == "bad"


def change_card(path: Path, **changes: Any) -> None:
    card = json.loads((path / ADAPTER_CARD_NAME).read_text("utf-8"))
    (path / ADAPTER_CARD_NAME).write_text(json.dumps({**card, **changes}), "utf-8")


def change_weights(path: Path, change: Callable[[dict[str, torch.Tensor]], None] | None) -> None:
    """Change the weights, or make them something else, with a card that fits them again."""
    if change is None:
        (path / ADAPTER_WEIGHTS_NAME).write_bytes(b"x" * 100)
    else:
        tensors = load_file(path / ADAPTER_WEIGHTS_NAME)
        change(tensors)
        save_file(tensors, path / ADAPTER_WEIGHTS_NAME)
    change_card(path, sha256=sha256_of(path / ADAPTER_WEIGHTS_NAME))


def rename(tensors: dict[str, torch.Tensor]) -> None:
    for key in [k for k in tensors if k.startswith("image_encoder.stem")]:
        tensors[key.replace("stem", "trunk")] = tensors.pop(key)


def poison(tensors: dict[str, torch.Tensor]) -> None:
    tensors["image_encoder.stem.lora_A"][0] = float("nan")


def widen(tensors: dict[str, torch.Tensor]) -> None:
    tensors["image_encoder.stem.lora_B"] = torch.zeros(7, 4, 1, 1)


def halve(tensors: dict[str, torch.Tensor]) -> None:
    del tensors["image_encoder.stem.lora_B"]


DAMAGES: dict[str, tuple[Callable[[Path], Any], str]] = {
    "another base": (lambda p: change_card(p, base_model_id="other", base_sha256="0" * 64), 'made for the model "other"'),
    "the base retrained": (lambda p: change_card(p, base_sha256="0" * 64), "other weights of the model"),
    "another rank": (lambda p: change_card(p, rank=8), "rank 4 at .* but its card says 8"),
    "no card": (lambda p: (p / ADAPTER_CARD_NAME).unlink(), "is no adapter"),
    "card is no JSON": (lambda p: (p / ADAPTER_CARD_NAME).write_text("{"), "is damaged"),
    "card without its verdict": (lambda p: change_card(p, better=None), "better"),
    "newer format": (lambda p: change_card(p, format_version="2.0"), "format version 2.0"),
    "no weights": (lambda p: (p / ADAPTER_WEIGHTS_NAME).unlink(), "lacks its file"),
    "weights of another file": (lambda p: (p / ADAPTER_WEIGHTS_NAME).write_bytes(b"x" * 100), "checksum differs"),
    "no safetensors": (lambda p: change_weights(p, None), "cannot be read"),
    "a layer that the base lacks": (lambda p: change_weights(p, rename), "which the model lacks"),
    "half a layer": (lambda p: change_weights(p, halve), "does not fit the model at image_encoder.stem"),
    "not a number": (lambda p: change_weights(p, poison), "does not fit the model at image_encoder.stem"),
    "another shape": (lambda p: change_weights(p, widen), "does not fit the model at image_encoder.stem"),
    "nothing": (lambda p: change_weights(p, dict.clear), "which the model lacks"),
}


@pytest.mark.slow
def test_what_does_not_fit_is_refused_and_nothing_changes(
    folder: Path, adapter: Callable[..., Path], tmp_path: Path
) -> None:
    engine = Engine.load(folder, "cpu")
    engine.load_adapter(adapter("good"))
    before = state(engine.model)
    whole = adapter("bad", seed=2)
    for damage, (break_it, reason) in DAMAGES.items():
        bad = Path(shutil.copytree(whole, tmp_path / damage))
        break_it(bad)
        with pytest.raises(AdapterError, match=reason):
            engine.load_adapter(bad)
        assert engine.adapter.adapter_id == "good", damage
        assert all(torch.equal(v, before[k]) for k, v in state(engine.model).items()), damage


@pytest.mark.slow
def test_an_adapter_replaces_an_earlier_one_and_nothing_else(
    folder: Path, adapter: Callable[..., Path], tmp_path: Path
) -> None:
    path = adapter("a", seed=1)
    first = (path / ADAPTER_WEIGHTS_NAME).read_bytes()
    card = load_adapter_card(adapter("a", seed=2))
    assert (path / ADAPTER_WEIGHTS_NAME).read_bytes() != first
    assert card.sha256 == sha256_of(path / ADAPTER_WEIGHTS_NAME)
    notes = tmp_path / "notes"
    notes.mkdir()
    (notes / "mine.txt").write_text("mine")
    with pytest.raises(OutputError, match="no adapter"):
        adapter("notes")
    assert (notes / "mine.txt").read_text() == "mine"
    assert sorted(p.name for p in tmp_path.iterdir()) == ["a", "notes"]
