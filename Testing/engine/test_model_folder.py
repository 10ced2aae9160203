"""Model folders: saving, loading, and finding the default one."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from progidiff.errors import ModelError, OutputError
from progidiff.model.folder import ProGiDiffModel, load_model, save_model
from progidiff.model.networks import MaskDecoder
from progidiff.places import _default_candidates, default_model_folder, model_size

UNET = Path("unet", "diffusion_pytorch_model.safetensors")
TEXT = Path("text_encoder", "model.safetensors")


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
    assert "mask_decoder/diffusion_pytorch_model.safetensors" in card.sha256
    again = load_model(tmp_path / "copy")
    assert again.mask_decoder is not None
    assert again.card == card
    assert_same_weights(model, again)
    text = "liver"
    assert again.tokenizer(text).input_ids == model.tokenizer(text).input_ids
    assert again.scheduler.config.timestep_spacing == "trailing"


def test_tiny_autoencoder_and_word_level_tokenizer(folder: Path, tmp_path: Path) -> None:
    from diffusers import AutoencoderTiny
    from tokenizers import Tokenizer
    from tokenizers.models import WordLevel
    from tokenizers.pre_tokenizers import Whitespace
    from transformers import PreTrainedTokenizerFast

    model = load_model(folder)
    words = Tokenizer(WordLevel({"[PAD]": 0, "[UNK]": 1, "left": 2, "kidney": 3}, unk_token="[UNK]"))
    words.pre_tokenizer = Whitespace()
    model.tokenizer = PreTrainedTokenizerFast(tokenizer_object=words, pad_token="[PAD]", unk_token="[UNK]")
    model.vae = AutoencoderTiny(
        encoder_block_out_channels=(8, 8, 8),
        decoder_block_out_channels=(8, 8, 8),
        num_encoder_blocks=(1, 1, 1),
        num_decoder_blocks=(1, 1, 1),
    ).eval()
    save_model(model, tmp_path / "small")
    again = load_model(tmp_path / "small")
    assert type(again.vae).__name__ == "AutoencoderTiny"
    assert again.tokenizer("left kidney spleen").input_ids == [2, 3, 1]
    assert_same_weights(model, again)


def test_half_precision_on_disk_halves_the_size(folder: Path, tmp_path: Path) -> None:
    model = load_model(folder)
    save_model(model, tmp_path / "half", weights_dtype=torch.float16)
    weights = [sum(p.stat().st_size for p in f.rglob("*.safetensors")) for f in (folder, tmp_path / "half")]
    assert weights[1] < 0.65 * weights[0]
    assert model_size(tmp_path / "half") > weights[1]
    again = load_model(tmp_path / "half")
    assert again.dtype == torch.float32
    for key, value in model.unet.state_dict().items():
        assert torch.equal(again.unet.state_dict()[key], value.half().float())


def test_dtype_on_load(folder: Path) -> None:
    model = load_model(folder, dtype=torch.bfloat16)
    assert {net.dtype for net in (model.vae, model.unet, model.controlnet, model.text_encoder)} == {torch.bfloat16}


def test_no_path_of_this_machine_is_written(folder: Path, tmp_path: Path) -> None:
    save_model(load_model(folder), tmp_path / "copy")
    for path in (tmp_path / "copy").rglob("*.json"):
        assert str(tmp_path) not in path.read_text(encoding="utf-8"), path.name


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


def test_model_size_of_a_missing_folder(tmp_path: Path) -> None:
    with pytest.raises(ModelError):
        model_size(tmp_path / "nowhere")
