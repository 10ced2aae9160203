"""Model folders: what a card may say, saving, loading, finding the default one, and a sentence for each way to be wrong."""

from __future__ import annotations

import json
import os
import pickle
import shutil
import subprocess
import sys
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

from progidiff.cards import Accuracy, TrainingSource, TrainingStage, load_card, make_card, save_card
from progidiff.errors import ModelError, OutputError
from progidiff.model.components import NETWORKS, check_weight_file, sha256_of
from progidiff.model.folder import ProGiDiffModel, load_model, save_model
from progidiff.model.networks import MaskDecoder
from progidiff.places import CARD_NAME, _default_candidates, default_model_folder, model_size

from .conftest import write_tiny_sd


def fields(**changes: Any) -> dict[str, Any]:
    return {
        "model_id": "tiny-1",
        "name": "Tiny",
        "licence": "Apache-2.0",
        "modalities": ["CT", "MR"],
        "planes": ["axial", "coronal"],
        "vocabulary": ["liver", "left kidney"],
        "prompt_template": "the {target} in {modality}",
        "windows": {"CT": {"kind": "hu", "low": -160, "high": 240}, "MR": {"kind": "percentile", "low": 1, "high": 99}},
        "image_size": 256,
        "spacing_mm": 1.5,
        "latent_shift": [0.1, -0.2],
        "latent_scale": [0.5, 2.0],
        "trained_on": [TrainingSource(name="phantoms", licence="Apache-2.0", what="label maps", n=100)],
        "training": [TrainingStage(stage="base", steps=10, seconds=1.5, device="cpu", seeds=[0, 1])],
        "accuracy": [Accuracy(set="held-out", target="liver", metric="dice", value=0.91, n_slices=7, n_patients=3)],
        "trainable_parameters": 123,
        "notes": "Leber und Milz, gemäß Vorlage",
        "sha256": {"unet/diffusion_pytorch_model.safetensors": "0" * 64},
        **changes,
    }


def test_card_round_trip_keeps_every_field(tmp_path: Path) -> None:
    card = make_card(fields())
    save_card(card, tmp_path)
    assert load_card(tmp_path) == card
    assert [path.name for path in tmp_path.iterdir()] == [CARD_NAME]


def test_card_keeps_fields_of_a_later_minor_version(tmp_path: Path) -> None:
    save_card(make_card(fields(format_version="1.7", adapter_of="other")), tmp_path)
    card = load_card(tmp_path)
    save_card(card, tmp_path)
    written = json.loads((tmp_path / CARD_NAME).read_text(encoding="utf-8"))
    assert (written["format_version"], written["adapter_of"]) == ("1.7", "other")


def test_prompt_and_window_of_a_modality() -> None:
    card = make_card(fields())
    assert card.prompt("liver") == "the liver in CT"
    assert card.prompt("liver", "MR") == "the liver in MR"
    assert card.window("MR").kind == "percentile"
    assert card.window().high == 240
    only_ct = make_card(fields(modalities=["CT"], windows={"CT": fields()["windows"]["CT"]}))
    with pytest.raises(ModelError, match="made for CT, not for MR"):
        only_ct.window("MR")


@pytest.mark.parametrize(
    ("changes", "part_of_message"),
    [
        ({"format_version": "2.0"}, "format version 2.0"),
        ({"licence": "(absent)"}, "licence: missing"),
        ({"modalities": ["US"]}, "modalities.0"),
        ({"windows": {"CT": {"kind": "hu", "low": 1, "high": 0}}}, "not below its high end"),
        ({"windows": {"CT": {"kind": "hu", "low": -160, "high": 240}}}, "no window for MR"),
        ({"windows": {"CT": {"kind": "percentile", "low": -1, "high": 99}}}, "within 0 and 100"),
        ({"latent_scale": [1.0]}, "differ in length"),
        ({"latent_scale": [0.0, 1.0]}, "latent_scale.0"),
        ({"prediction_type": "epsilon"}, "prediction_type"),
        ({"prompt_template": "an organ"}, "prompt template"),
        ({"vocabulary": ["liver", "liver"]}, "twice"),
        ({"image_size": 0}, "image_size"),
        ({"sha256": {"a": "abc"}}, "sha256.a"),
    ],
)
def test_a_wrong_card_is_refused_in_one_line(tmp_path: Path, changes: dict[str, Any], part_of_message: str) -> None:
    good = make_card(fields()).to_dict()
    (tmp_path / CARD_NAME).write_text(json.dumps({k: v for k, v in (good | changes).items() if v != "(absent)"}), "utf-8")
    with pytest.raises(ModelError, match=part_of_message) as caught:
        load_card(tmp_path)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize("content", [b"", b"[]", b"\xff\xfe\x00"])
def test_a_card_that_is_no_card(tmp_path: Path, content: bytes) -> None:
    (tmp_path / CARD_NAME).write_bytes(content)
    with pytest.raises(ModelError, match="copy the model folder again"):
        load_card(tmp_path)
    (tmp_path / CARD_NAME).unlink()
    with pytest.raises(ModelError, match=f"no {CARD_NAME}"):
        load_card(tmp_path)


@pytest.fixture
def folder(tiny_model_folder: Path, tmp_path: Path) -> Path:
    return Path(shutil.copytree(tiny_model_folder, tmp_path / "model"))


def assert_same_weights(a: ProGiDiffModel, b: ProGiDiffModel) -> None:
    for name, network in a.networks.items():
        mine, theirs = network.state_dict(), b.networks[name].state_dict()
        assert mine.keys() == theirs.keys()
        for key in mine:
            assert torch.equal(mine[key], theirs[key]), f"{name}.{key}"


def test_load_gives_back_what_was_built(folder: Path) -> None:
    seen: list[tuple[str, float]] = []
    model = load_model(folder, progress=lambda phase, fraction: seen.append((phase, fraction)))
    assert model.folder == folder
    assert model.stride == 4
    assert (model.device, model.dtype) == (torch.device("cpu"), torch.float32)
    assert model.mask_decoder is None
    assert model.card.trainable_parameters == model.trainable_parameters() > 0
    for network in model.networks.values():
        assert not network.training
        assert not any(p.requires_grad for p in network.parameters())
    fractions = [fraction for _, fraction in seen]
    assert fractions == sorted(fractions)
    assert (fractions[0], fractions[-1]) == (0.0, 1.0)
    assert {f"loading {name}" for name in ("vae", "unet", "text_encoder")} <= {phase for phase, _ in seen}


def test_save_round_trip_with_mask_decoder(folder: Path, tmp_path: Path) -> None:
    model = load_model(folder)
    model.mask_decoder = MaskDecoder(latent_channels=4, stride=4, hidden_channels=8)
    card = save_model(model, tmp_path / "copy")
    assert model.folder == tmp_path / "copy"
    assert not any(str(tmp_path) in path.read_text(encoding="utf-8") for path in (tmp_path / "copy").rglob("*.json"))
    assert "mask_decoder/diffusion_pytorch_model.safetensors" in card.sha256
    again = load_model(tmp_path / "copy")
    assert again.mask_decoder is not None
    assert again.card == card
    assert_same_weights(model, again)
    assert again.tokenizer("liver").input_ids == model.tokenizer("liver").input_ids
    assert again.scheduler.config.timestep_spacing == "trailing"


def test_half_precision_on_disk_halves_the_size(folder: Path, tmp_path: Path) -> None:
    model = load_model(folder)
    save_model(model, tmp_path / "half", weights_dtype=torch.float16)
    weights = [sum(p.stat().st_size for p in f.rglob("*.safetensors")) for f in (folder, tmp_path / "half")]
    assert weights[1] < 0.65 * weights[0]
    assert model_size(tmp_path / "half") > weights[1]
    again = load_model(tmp_path / "half")
    assert again.dtype == torch.float32
    assert load_model(folder, dtype=torch.bfloat16).unet.dtype == torch.bfloat16
    for key, value in model.unet.state_dict().items():
        assert torch.equal(again.unet.state_dict()[key], value.half().float())


def test_a_device_that_is_not_there(folder: Path) -> None:
    with pytest.raises(ModelError, match="choose another device"):
        load_model(folder, device="cuda:99")


def test_saving_replaces_an_earlier_model_only(folder: Path, tmp_path: Path) -> None:
    model = load_model(folder)
    (folder / "left-over.txt").write_text("old", encoding="utf-8")
    save_model(model, folder)
    assert not (folder / "left-over.txt").exists()
    load_model(folder)
    foreign = tmp_path / "patients"
    foreign.mkdir()
    (foreign / "precious.txt").write_text("keep", encoding="utf-8")
    with pytest.raises(OutputError, match="not a model"):
        save_model(model, foreign)
    assert (foreign / "precious.txt").read_text(encoding="utf-8") == "keep"


def test_a_failed_save_leaves_the_old_model(folder: Path, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    model = load_model(folder)
    before = sorted(folder.rglob("*"))

    def full_disk(*_: object, **__: object) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(type(model.scheduler), "save_pretrained", full_disk)
    with pytest.raises(OutputError, match="No space left on device"):
        save_model(model, folder)
    with pytest.raises(OutputError, match="No space left on device"):
        save_model(model, tmp_path / "new")
    assert sorted(folder.rglob("*")) == before
    assert sorted(p.name for p in tmp_path.iterdir()) == ["model"]
    load_model(folder)


@pytest.mark.slow
def test_loading_needs_no_network(folder: Path) -> None:
    """In a process of its own: offline is set before the libraries come in, and no socket is opened."""
    script = (
        "import socket, sys\n"
        "def refuse(*a, **k): raise AssertionError('network used')\n"
        "socket.socket.connect = refuse; socket.getaddrinfo = refuse\n"
        "import progidiff.model.folder as f\n"
        "assert 'torch' not in sys.modules and 'diffusers' not in sys.modules\n"
        "f.load_model(f.Path(sys.argv[1]))\n"
        "import huggingface_hub.constants as c\n"
        "assert c.HF_HUB_OFFLINE\n"
    )
    env = {key: value for key, value in os.environ.items() if not key.startswith("HF_")}
    env["PYTHONPATH"] = str(Path(sys.modules["progidiff"].__file__ or "").parents[1])
    done = subprocess.run([sys.executable, "-c", script, str(folder)], env=env, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert "MISSING" not in done.stderr


def test_an_explicit_wish_to_be_online_is_respected() -> None:
    script = "import os, progidiff.model; assert os.environ['HF_HUB_OFFLINE'] == '0'"
    env = {**os.environ, "HF_HUB_OFFLINE": "0"}
    env["PYTHONPATH"] = str(Path(sys.modules["progidiff"].__file__ or "").parents[1])
    subprocess.run([sys.executable, "-c", script], env=env, check=True)


def test_default_folder_by_environment(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setenv("PROGIDIFF_MODEL", str(tmp_path / "mine"))
    assert default_model_folder() == tmp_path / "mine"
    with pytest.raises(ModelError, match="There is no model folder"):
        load_model()


def test_default_folder_candidates(tmp_path: Path) -> None:
    repo = _default_candidates(tmp_path / "ProGiDiffSlicer" / "progidiff")
    assert repo[0] == tmp_path / "Resources" / "Models" / "default"
    wheel = _default_candidates(tmp_path / "site-packages" / "progidiff")
    assert tmp_path / "site-packages" / "progidiff" / "_resources" / "Models" / "default" in wheel
    scripted = tmp_path / "Slicer" / "lib" / "Slicer-5.12" / "qt-scripted-modules"
    slicer = _default_candidates(scripted / "progidiff")
    assert scripted / "Resources" / "Models" / "default" in slicer
    share = tmp_path / "Slicer" / "share" / "Slicer-5.12"
    assert share / "qt-loadable-modules" / "ProGiDiffSlicer" / "Models" / "default" in slicer


UNET = Path("unet", "diffusion_pytorch_model.safetensors")
TEXT = Path("text_encoder", "model.safetensors")


def rewrite(folder: Path, file: Path, change: Callable[[dict[str, torch.Tensor]], None]) -> None:
    """Change the tensors of a weight file and bring the card's checksum up to date."""
    tensors = {key: value.clone() for key, value in load_file(folder / file).items()}
    change(tensors)
    save_file(tensors, folder / file, metadata={"format": "pt"})
    refresh_checksums(folder)


def refresh_checksums(folder: Path) -> None:
    sums = {p.relative_to(folder).as_posix(): sha256_of(p) for p in folder.rglob("*.safetensors")}
    save_card(replace(load_card(folder), sha256=sums), folder)


def failure(folder: Path) -> str:
    """The message with which loading fails: one line that says what to do."""
    with pytest.raises(ModelError) as caught:
        load_model(folder)
    message = str(caught.value)
    assert "\n" not in message
    assert ";" in message
    return message


def test_sharded_weights_load(folder: Path) -> None:
    model = load_model(folder)
    before = {key: value.clone() for key, value in model.unet.state_dict().items()}
    (folder / UNET).unlink()
    model.unet.save_pretrained(folder / "unet", max_shard_size="100KB")
    assert len(list((folder / "unet").glob("*.safetensors"))) > 1
    refresh_checksums(folder)
    again = load_model(folder).unet.state_dict()
    assert all(torch.equal(again[key], value) for key, value in before.items())
    next((folder / "unet").glob("*-00001-*.safetensors")).unlink()
    assert "lacks the weight file" in failure(folder)


@pytest.mark.parametrize("component", [NETWORKS[0], "text_encoder", "tokenizer", "scheduler"])
def test_a_missing_subfolder(folder: Path, component: str) -> None:
    shutil.rmtree(folder / component)
    assert f'lacks its subfolder "{component}"' in failure(folder)


@pytest.mark.parametrize(
    "file",
    ["model_index.json", "unet/config.json", "tokenizer/tokenizer.json", "scheduler/scheduler_config.json", str(UNET)],
)
def test_a_missing_file(folder: Path, file: str) -> None:
    (folder / file).unlink()
    assert Path(file).name in failure(folder)


@pytest.mark.parametrize("file", ["model_index.json", "unet/config.json", "tokenizer/tokenizer.json"])
@pytest.mark.parametrize("content", ["{", "[1]"])
def test_a_damaged_json_file(folder: Path, file: str, content: str) -> None:
    (folder / file).write_text(content, encoding="utf-8")
    failure(folder)


class Bomb:
    """Unpickling this runs code."""

    def __reduce__(self) -> tuple[object, tuple[str, ...]]:
        return os.mkdir, (self.where,)

    def __init__(self, where: str) -> None:
        self.where = where


@pytest.mark.parametrize("name", ["diffusion_pytorch_model.bin", "weights.pt"])
def test_pickled_weights_are_refused_unopened(folder: Path, tmp_path: Path, name: str) -> None:
    (folder / UNET).unlink()
    (folder / "unet" / name).write_bytes(pickle.dumps(Bomb(str(tmp_path / "exploded"))))
    message = failure(folder)
    assert "pickled" in message
    assert name in message
    assert not (tmp_path / "exploded").exists()


@pytest.mark.parametrize("protocol", [2, "zip"])
def test_a_renamed_pickle_is_refused_unopened(folder: Path, tmp_path: Path, protocol: int | str) -> None:
    bomb = Bomb(str(tmp_path / "exploded"))
    if isinstance(protocol, int):
        (folder / UNET).write_bytes(pickle.dumps(bomb, protocol=protocol))
    else:
        torch.save(bomb, folder / UNET)
    refresh_checksums(folder)
    assert "renamed pickle" in failure(folder)
    assert not (tmp_path / "exploded").exists()


@pytest.mark.parametrize(
    ("content", "part_of_message"),
    [
        (b"", "is empty"),
        (b"version https://git-lfs.github.com/spec/v1\noid sha256:0\nsize 3\n", "git-LFS pointer"),
        (b"<!DOCTYPE html><html><body>Please log in</body></html>", "web page"),
        (b"\xff" * 100, "truncated or damaged"),
        (slice(4), "truncated or damaged"),
        (slice(-1), "truncated or damaged"),
    ],
)
def test_a_weight_file_that_is_something_else(folder: Path, content: bytes | slice, part_of_message: str) -> None:
    (folder / UNET).write_bytes(content if isinstance(content, bytes) else (folder / UNET).read_bytes()[content])
    refresh_checksums(folder)
    message = failure(folder)
    assert part_of_message in message
    assert UNET.as_posix() in message


def test_a_sound_file_whose_header_length_looks_like_a_pickle(tmp_path: Path) -> None:
    path = tmp_path / "w.safetensors"
    for pad in range(600):
        save_file({"x": torch.zeros(1)}, path, metadata={"pad": "p" * (0x0280 - 100 + pad)})
        if path.read_bytes()[:2] == b"\x80\x02":
            break
    assert path.read_bytes()[:2] == b"\x80\x02"
    check_weight_file(path)


def test_changed_weights_do_not_match_the_card(folder: Path) -> None:
    data = bytearray((folder / UNET).read_bytes())
    data[-1] ^= 1
    (folder / UNET).write_bytes(data)
    message = failure(folder)
    assert "checksum" in message
    assert UNET.as_posix() in message


def test_a_card_that_does_not_fit_or_is_not_there(folder: Path) -> None:
    card = load_card(folder)
    save_card(replace(card, sha256={key: value for key, value in card.sha256.items() if not key.startswith("vae/")}), folder)
    assert "vae/" in failure(folder)
    save_card(replace(card, prediction_type="sample"), folder)
    assert "prediction type" in failure(folder)
    (folder / CARD_NAME).unlink()
    assert f"no {CARD_NAME}" in failure(folder)
    assert "There is no model folder" in failure(folder / "nowhere")


@pytest.mark.parametrize("file", [UNET, TEXT, Path("controlnet", UNET.name), Path("image_encoder", UNET.name)])
def test_missing_surplus_and_misshapen_weights_are_an_error(folder: Path, file: Path) -> None:
    key = sorted(load_file(folder / file))[0]
    value = load_file(folder / file)[key].clone()
    rewrite(folder, file, lambda tensors: tensors.update({key: torch.zeros(3, 5, 7)}))
    assert key in failure(folder)
    rewrite(folder, file, lambda tensors: tensors.pop(key))  # type: ignore[arg-type,return-value]
    message = failure(folder)
    assert "missing" in message
    assert key in message
    rewrite(folder, file, lambda tensors: tensors.update({key: value, "surplus": torch.zeros(1)}))
    assert "unexpected: surplus" in failure(folder)


@pytest.mark.parametrize(
    ("file", "change", "says"),
    [
        ("model_index.json", {"unet": ["diffusers", "FluxTransformer2DModel"]}, '"unet"'),
        ("model_index.json", {"controlnet": ["diffusers", "ControlNetModel"]}, '"controlnet"'),
        ("model_index.json", {"image_encoder": ["os", "system"]}, '"image_encoder"'),
        ("model_index.json", {"tokenizer": None}, '"tokenizer"'),
        ("unet/config.json", {"_class_name": "FluxTransformer2DModel"}, "is a FluxTransformer2DModel"),
        ("unet/config.json", {"quantization_config": {"quant_method": "gguf"}}, "quantised"),
    ],
)
def test_only_known_classes_are_loaded(folder: Path, file: str, change: dict[str, object], says: str) -> None:
    content = json.loads((folder / file).read_text(encoding="utf-8"))
    (folder / file).write_text(json.dumps({**content, **change}), encoding="utf-8")
    assert says in failure(folder)


def test_components_of_different_models_do_not_pass(folder: Path, tmp_path: Path) -> None:
    write_tiny_sd(tmp_path / "sd48", block_out_channels=(8, 32))
    shutil.rmtree(folder / "unet")
    shutil.copytree(tmp_path / "sd48" / "unet", folder / "unet")
    refresh_checksums(folder)
    assert "do not belong together" in failure(folder)
    shutil.copy(folder / "vae" / UNET.name, folder / UNET)
    refresh_checksums(folder)
    assert "do not fit a UNet2DConditionModel" in failure(folder)


def test_a_damaged_weight_index(folder: Path) -> None:
    for weight_map in ({}, {"x": "../vae/diffusion_pytorch_model.safetensors"}, {"x": 3}, []):
        index = folder / "unet" / "diffusion_pytorch_model.safetensors.index.json"
        index.write_text(json.dumps({"weight_map": weight_map}), encoding="utf-8")
        assert "weight index" in failure(folder)
