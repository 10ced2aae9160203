"""What strict loading refuses: one clear sentence for each way in which a model folder can be wrong."""

from __future__ import annotations

import json
import os
import pickle
import shutil
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from progidiff.cards import load_card, save_card
from progidiff.errors import ModelError
from progidiff.model.components import NETWORKS, check_weight_file, sha256_of
from progidiff.model.folder import load_model
from progidiff.places import CARD_NAME

UNET = Path("unet", "diffusion_pytorch_model.safetensors")
TEXT = Path("text_encoder", "model.safetensors")


@pytest.fixture
def folder(tiny_model_folder: Path, tmp_path: Path) -> Path:
    return Path(shutil.copytree(tiny_model_folder, tmp_path / "model"))


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


@pytest.mark.parametrize("component", [*NETWORKS[:4], "text_encoder", "tokenizer", "scheduler"])
def test_a_missing_subfolder(folder: Path, component: str) -> None:
    shutil.rmtree(folder / component)
    assert f'lacks its subfolder "{component}"' in failure(folder)


@pytest.mark.parametrize(
    "file",
    [
        "model_index.json",
        "unet/config.json",
        "tokenizer/tokenizer.json",
        "scheduler/scheduler_config.json",
        str(UNET),
    ],
)
def test_a_missing_file(folder: Path, file: str) -> None:
    (folder / file).unlink()
    assert Path(file).name in failure(folder)


@pytest.mark.parametrize("file", ["model_index.json", "unet/config.json", "tokenizer/tokenizer.json"])
@pytest.mark.parametrize("content", ["", "{", "<html></html>", "[1]"])
def test_a_damaged_json_file(folder: Path, file: str, content: str) -> None:
    (folder / file).write_text(content, encoding="utf-8")
    failure(folder)


def test_missing_card_and_missing_folder(folder: Path, tmp_path: Path) -> None:
    (folder / CARD_NAME).unlink()
    assert f"no {CARD_NAME}" in failure(folder)
    assert "There is no model folder" in failure(tmp_path / "nowhere")


class Bomb:
    """Unpickling this runs code."""

    def __reduce__(self) -> tuple[object, tuple[str, ...]]:
        return os.mkdir, (self.where,)

    def __init__(self, where: str) -> None:
        self.where = where


@pytest.mark.parametrize("name", ["diffusion_pytorch_model.bin", "model.ckpt", "weights.pt", "weights.pth"])
def test_pickled_weights_are_refused_unopened(folder: Path, tmp_path: Path, name: str) -> None:
    (folder / UNET).unlink()
    (folder / "unet" / name).write_bytes(pickle.dumps(Bomb(str(tmp_path / "exploded"))))
    message = failure(folder)
    assert "pickled" in message
    assert name in message
    assert not (tmp_path / "exploded").exists()


@pytest.mark.parametrize("protocol", [2, 4, "zip"])
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
        (b"\r\n  <html></html>", "web page"),
        (b"not weights at all", "truncated or damaged"),
        (b"\xff" * 100, "truncated or damaged"),
    ],
)
def test_a_weight_file_that_is_something_else(folder: Path, content: bytes, part_of_message: str) -> None:
    (folder / UNET).write_bytes(content)
    refresh_checksums(folder)
    message = failure(folder)
    assert part_of_message in message
    assert UNET.as_posix() in message


@pytest.mark.parametrize("keep", [4, 60, 0.5, -1])
def test_truncated_weights(folder: Path, keep: float) -> None:
    whole = (folder / UNET).read_bytes()
    (folder / UNET).write_bytes(whole[: int(len(whole) * keep) if isinstance(keep, float) else keep])
    refresh_checksums(folder)
    assert "truncated or damaged" in failure(folder)


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


def test_weights_unknown_to_the_card(folder: Path) -> None:
    card = load_card(folder)
    card = replace(card, sha256={key: value for key, value in card.sha256.items() if not key.startswith("vae/")})
    save_card(card, folder)
    assert "vae/" in failure(folder)


@pytest.mark.parametrize("file", [UNET, TEXT, Path("controlnet", UNET.name), Path("image_encoder", UNET.name)])
def test_missing_weights_are_an_error(folder: Path, file: Path) -> None:
    key = sorted(load_file(folder / file))[0]
    rewrite(folder, file, lambda tensors: tensors.pop(key))  # type: ignore[arg-type,return-value]
    message = failure(folder)
    assert "missing" in message
    assert key in message


@pytest.mark.parametrize("file", [UNET, TEXT, Path("controlnet", UNET.name)])
def test_surplus_weights_are_an_error(folder: Path, file: Path) -> None:
    rewrite(folder, file, lambda tensors: tensors.update(surplus=torch.zeros(1)))
    assert "unexpected: surplus" in failure(folder)


@pytest.mark.parametrize("file", [UNET, TEXT, Path("image_encoder", UNET.name)])
def test_weights_of_another_shape_are_an_error(folder: Path, file: Path) -> None:
    key = sorted(load_file(folder / file))[0]
    rewrite(folder, file, lambda tensors: tensors.update({key: torch.zeros(3, 5, 7)}))
    assert key in failure(folder)


def test_weights_of_another_component_are_an_error(folder: Path) -> None:
    shutil.copy(folder / "vae" / UNET.name, folder / UNET)
    refresh_checksums(folder)
    assert "do not fit a UNet2DConditionModel" in failure(folder)


def test_another_class_in_a_config_is_an_error(folder: Path) -> None:
    path = folder / "unet" / "config.json"
    config = json.loads(path.read_text(encoding="utf-8"))
    path.write_text(json.dumps({**config, "_class_name": "FluxTransformer2DModel"}), encoding="utf-8")
    assert "is a FluxTransformer2DModel" in failure(folder)


@pytest.mark.parametrize(
    ("component", "entry"),
    [
        ("unet", ["diffusers", "FluxTransformer2DModel"]),
        ("controlnet", ["diffusers", "ControlNetModel"]),
        ("image_encoder", ["os", "system"]),
        ("tokenizer", None),
    ],
)
def test_only_known_classes_are_loaded(folder: Path, component: str, entry: object) -> None:
    path = folder / "model_index.json"
    index = json.loads(path.read_text(encoding="utf-8"))
    path.write_text(json.dumps({**index, component: entry}), encoding="utf-8")
    assert f'"{component}"' in failure(folder)


def test_a_component_absent_from_the_index(folder: Path) -> None:
    path = folder / "model_index.json"
    index = json.loads(path.read_text(encoding="utf-8"))
    del index["controlnet"]
    path.write_text(json.dumps(index), encoding="utf-8")
    assert 'does not name "controlnet"' in failure(folder)


def test_components_of_different_models_do_not_pass(folder: Path, tmp_path: Path, make_tiny_sd: Callable[..., Path]) -> None:
    make_tiny_sd(tmp_path / "sd48", block_out_channels=(8, 32))
    shutil.rmtree(folder / "unet")
    shutil.copytree(tmp_path / "sd48" / "unet", folder / "unet")
    refresh_checksums(folder)
    assert "do not belong together" in failure(folder)


def test_card_and_schedule_must_agree(folder: Path) -> None:
    save_card(replace(load_card(folder), prediction_type="sample"), folder)
    assert "prediction type" in failure(folder)


def test_a_damaged_weight_index(folder: Path) -> None:
    for weight_map in ({}, {"x": "../vae/diffusion_pytorch_model.safetensors"}, {"x": 3}, []):
        index = folder / "unet" / "diffusion_pytorch_model.safetensors.index.json"
        index.write_text(json.dumps({"weight_map": weight_map}), encoding="utf-8")
        assert "weight index" in failure(folder)


def test_quantised_weights_are_refused(folder: Path) -> None:
    path = folder / "unet" / "config.json"
    config = json.loads(path.read_text(encoding="utf-8"))
    path.write_text(json.dumps({**config, "quantization_config": {"quant_method": "gguf"}}), encoding="utf-8")
    assert "quantised" in failure(folder)
