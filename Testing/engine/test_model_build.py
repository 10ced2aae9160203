"""Building around Stable Diffusion: the public sizes' parameter counts, and the whole way, in tiny."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file

from progidiff.errors import ModelError
from progidiff.model.build import measure_mask_latents, zero_snr_scheduler
from progidiff.model.folder import ProGiDiffModel, load_model
from progidiff.model.networks import ControlBranch, ImageEncoder
from progidiff.model.parameters import BACKBONES, backbone_name, parameter_table, print_info

from .conftest import build_tiny, write_tiny_sd


@pytest.fixture(scope="module")
def model(tiny_model_folder: Path) -> ProGiDiffModel:
    return load_model(tiny_model_folder)


# Published parameter counts of the frozen backbones.
@pytest.mark.parametrize(
    ("config", "unet", "text_encoder"), [("sd15", 859_520_964, 123_060_480), ("sd21", 865_910_724, 340_387_840)]
)
def test_parameter_table_of_the_public_sizes(config: str, unet: int, text_encoder: int) -> None:
    rows = {row.component: row for row in parameter_table(config)}
    assert rows["unet"].parameters == unet
    assert rows["text_encoder"].parameters == text_encoder
    assert rows["vae"].parameters == 83_653_863
    assert {name for name, row in rows.items() if row.trainable} == {"controlnet", "image_encoder"}
    assert 4_000_000 <= rows["image_encoder"].parameters <= 7_100_000


@pytest.mark.slow
def test_info_of_a_configuration_and_of_a_folder(model: ProGiDiffModel, tmp_path: Path) -> None:
    info = print_info("sd15", as_json=True)
    assert json.loads(json.dumps(info)) == info
    assert info["trainable_parameters"] == sum(c["parameters"] for c in info["components"] if c["trainable"])
    assert abs(info["trainable_parameters"] / 367.13e6 - 1) < 0.01
    assert (info["within_one_percent"], info["closest_config"]) == (True, "sd15")
    assert f"{info['trainable_parameters']:,}" in str(print_info("sd15"))
    info = print_info(model.folder, as_json=True)
    assert {c["component"]: c["parameters"] for c in info["components"]} == model.parameter_counts()
    assert info["card"]["vocabulary"] == ["liver"]
    assert "liver" in str(print_info(str(model.folder)))
    for nothing in ("sd99", tmp_path):
        with pytest.raises(ModelError):
            print_info(nothing)


@pytest.mark.slow
@pytest.mark.parametrize("config", ["sd15", "sd21"])
def test_the_public_sizes_fit_together(config: str) -> None:
    """The shapes of one step at 512 x 512, on the meta device."""
    from diffusers import UNet2DConditionModel

    backbone = BACKBONES[config]
    width = backbone.unet["cross_attention_dim"]
    with torch.device("meta"), torch.inference_mode():
        unet = UNet2DConditionModel(**backbone.unet)
        control = ControlBranch.from_unet(unet)
        encoder = ImageEncoder(**backbone.image_encoder, hint_channels=320, text_dim=width)
        features = encoder(torch.empty(1, 1, 512, 512))
        latents, time, text = torch.empty(1, 4, 64, 64), torch.empty(1), torch.empty(1, 77, width)
        hint = encoder.hint(features, text.mean(1))
        assert hint.shape == (1, 320, 64, 64)
        down, mid = control(latents, time, text, hint, return_dict=False)
        out = unet(latents, time, text, down_block_additional_residuals=down, mid_block_additional_residual=mid).sample
    assert out.shape == latents.shape
    assert backbone_name(unet.config) == config


def test_the_backbone_is_taken_over_unchanged(tiny_sd: Path, model: ProGiDiffModel) -> None:
    from diffusers import AutoencoderKL, UNet2DConditionModel
    from transformers import AutoTokenizer, CLIPTextModel

    for mine, cls, name in (
        (model.unet, UNet2DConditionModel, "unet"),
        (model.vae, AutoencoderKL, "vae"),
        (model.text_encoder, CLIPTextModel, "text_encoder"),
    ):
        theirs = cls.from_pretrained(tiny_sd / name).state_dict()
        for key, value in mine.state_dict().items():
            assert torch.equal(value, theirs[key]), key
    tokenizer = AutoTokenizer.from_pretrained(tiny_sd / "tokenizer")
    assert load_model(model.folder).tokenizer("the liver").input_ids == tokenizer("the liver").input_ids


def test_the_control_branch_copies_the_unet(model: ProGiDiffModel) -> None:
    unet, control = model.unet.state_dict(), model.controlnet.state_dict()
    copied = [key for key in control if not key.startswith("controlnet_")]
    assert copied
    assert all(torch.equal(control[key], unet[key]) for key in copied)
    zero = [key for key in control if key.startswith("controlnet_")]
    assert zero
    assert all(not control[key].any() for key in zero)


def inputs(model: ProGiDiffModel) -> dict[str, torch.Tensor]:
    generator = torch.Generator().manual_seed(3)
    ids = model.tokenizer(["liver", "spleen"], padding="max_length", max_length=16, return_tensors="pt").input_ids
    text = model.text_encoder(ids).last_hidden_state
    features = model.image_encoder(torch.rand(2, 1, 32, 32, generator=generator))
    return {
        "latents": torch.randn(2, 4, 8, 8, generator=generator),
        "timestep": torch.tensor([999, 250]),
        "text": text,
        "hint": model.image_encoder.hint(features, text.mean(1)),
    }


def run(model: ProGiDiffModel, x: dict[str, torch.Tensor], control: bool) -> torch.Tensor:
    residuals: dict[str, Any] = {}
    if control:
        down, mid = model.controlnet(x["latents"], x["timestep"], x["text"], x["hint"], return_dict=False)
        residuals = {"down_block_additional_residuals": down, "mid_block_additional_residual": mid}
    return model.unet(x["latents"], x["timestep"], x["text"], **residuals).sample


@torch.inference_mode()
def test_zero_convolutions_leave_the_unet_unchanged_at_the_start(model: ProGiDiffModel) -> None:
    x = inputs(model)
    assert x["hint"].shape == (2, 16, 8, 8)
    assert x["hint"].abs().max() > 0
    assert torch.equal(run(model, x, control=True), run(model, x, control=False))


def test_the_control_branch_can_learn_from_image_and_prompt(model: ProGiDiffModel) -> None:
    """One step makes the zero convolutions non-zero; then the image and the prompt reach the output."""
    fresh = load_model(model.folder)
    fresh.controlnet.requires_grad_(True)
    optimizer = torch.optim.SGD(fresh.controlnet.parameters(), lr=1.0)
    x = {key: value.clone() for key, value in inputs(fresh).items()}
    run(fresh, x, control=True).square().mean().backward()
    optimizer.step()
    with torch.inference_mode():
        there = run(fresh, x, control=True)
        assert not torch.equal(there, run(fresh, x, control=False))
        assert not torch.equal(there, run(fresh, {**x, "hint": x["hint"].flip(0)}, control=True))


def test_the_schedule_starts_in_pure_noise_and_the_true_velocity_gives_the_clean_latent() -> None:
    scheduler = zero_snr_scheduler()
    assert float(scheduler.alphas_cumprod[-1]) == 0.0
    assert zero_snr_scheduler({"beta_schedule": "linear"}, "sample").config.beta_schedule == "linear"
    with pytest.raises(ValueError, match="undefined"):
        zero_snr_scheduler(None, "epsilon")
    clean, noise = torch.randn(1, 4, 8, 8), torch.randn(1, 4, 8, 8)
    for steps in (1, 4):
        scheduler.set_timesteps(steps)
        assert scheduler.timesteps.tolist() == [999, 749, 499, 249][:steps]
        x = scheduler.add_noise(clean, noise, scheduler.timesteps[:1])
        assert torch.allclose(x, noise, atol=1e-6)
        for t in scheduler.timesteps:
            x = scheduler.step(scheduler.get_velocity(clean, noise, t[None]), t, x).prev_sample
        assert torch.allclose(x, clean, atol=1e-4)


def test_mask_latents_have_zero_mean_and_unit_deviation(model: ProGiDiffModel) -> None:
    masks = np.zeros((3, 32, 32), bool)
    masks[0, 4:20, 8:30] = masks[1, 16:, :8] = masks[2, 10:14, 10:14] = True
    shift, scale = measure_mask_latents(model.vae, masks)
    with torch.inference_mode():
        images = torch.from_numpy(masks).float()[:, None].expand(-1, 3, -1, -1) * 2 - 1
        z = model.vae.encode(images).latent_dist.mode()
        z = (z - torch.tensor(shift)[None, :, None, None]) * torch.tensor(scale)[None, :, None, None]
    assert torch.allclose(z.mean((0, 2, 3)), torch.zeros(4), atol=1e-4)
    assert torch.allclose(z.std((0, 2, 3)), torch.ones(4), atol=1e-4)
    with pytest.raises(ModelError, match="multiples of 4"):
        measure_mask_latents(model.vae, masks[:, :30])


def test_the_same_seed_builds_the_same_model(tiny_sd: Path, tmp_path: Path, model: ProGiDiffModel) -> None:
    random, masks = torch.get_rng_state(), np.zeros((2, 32, 32), bool)
    masks[:, :16] = True
    again = build_tiny(tiny_sd, tmp_path / "a")
    assert torch.equal(torch.get_rng_state(), random)
    other = build_tiny(tiny_sd, tmp_path / "b", seed=1, calibration_masks=masks)
    assert again.card.sha256 == model.card.sha256
    assert again.card.latent_scale == model.card.latent_scale != other.card.latent_scale
    assert (other.card.latent_shift, other.card.latent_scale) == measure_mask_latents(other.vae, masks)
    assert (again.card.model_id, again.card.trained_on[0].n) == ("progidiff-sd-untrained", None)
    assert "epsilon" in again.card.notes
    key = "image_encoder/diffusion_pytorch_model.safetensors"
    assert other.card.sha256[key] != model.card.sha256[key]


def test_settings_that_do_not_fit(tiny_sd: Path, tmp_path: Path) -> None:
    with pytest.raises(ModelError, match="multiple of the autoencoder's stride 4"):
        build_tiny(tiny_sd, tmp_path / "m", image_size=30)
    with pytest.raises(ModelError, match="image encoder cannot be built"):
        build_tiny(tiny_sd, tmp_path / "m", image_encoder={"stem_patch": 3})
    with pytest.raises(ModelError, match="modalities"):
        build_tiny(tiny_sd, tmp_path / "m", modalities=("US",))
    assert not (tmp_path / "m").exists()


def test_what_is_not_a_stable_diffusion_folder(tiny_sd: Path, tmp_path: Path) -> None:
    single = tmp_path / "v1-5-pruned.safetensors"
    single.write_bytes(b"x")
    with pytest.raises(ModelError, match="single checkpoint file"):
        build_tiny(single, tmp_path / "m")
    with pytest.raises(ModelError, match="There is no Stable Diffusion folder"):
        build_tiny(tmp_path / "nowhere", tmp_path / "m")
    with pytest.raises(ModelError, match=r"model_index\.json"):
        build_tiny(tiny_sd / "unet", tmp_path / "m")
    xl = Path(shutil.copytree(tiny_sd, tmp_path / "xl"))
    (xl / "model_index.json").write_text('{"text_encoder_2": []}', encoding="utf-8")
    with pytest.raises(ModelError, match="XL"):
        build_tiny(xl, tmp_path / "m")
    with pytest.raises(ModelError, match="inpainting"):
        build_tiny(write_tiny_sd(tmp_path / "inpaint", in_channels=9), tmp_path / "m")
    (sub := Path(shutil.copytree(tiny_sd, tmp_path / "pickled")) / "unet").joinpath(
        "diffusion_pytorch_model.safetensors"
    ).rename(sub / "diffusion_pytorch_model.bin")
    with pytest.raises(ModelError, match="pickled"):
        build_tiny(tmp_path / "pickled", tmp_path / "m")


def test_the_names_in_published_folders_are_understood(tmp_path: Path, model: ProGiDiffModel) -> None:
    """Published weights are in half precision files and carry older names: of the autoencoder's attention, and CLIP's."""
    old = write_tiny_sd(tmp_path / "old", variant="fp16")
    vae, text = old / "vae" / "diffusion_pytorch_model.fp16.safetensors", old / "text_encoder" / "model.fp16.safetensors"
    renamed = {"to_q.": "query.", "to_k.": "key.", "to_v.": "value.", "to_out.0.": "proj_attn."}
    tensors = {}
    for key, value in load_file(vae).items():
        for new, before in renamed.items():
            key = key.replace(new, before)
        tensors[key] = value.clone()
    assert any("proj_attn" in key for key in tensors)
    save_file(tensors, vae, metadata={"format": "pt"})
    tensors = {f"text_model.{key}": value.clone() for key, value in load_file(text).items()}
    tensors["text_model.embeddings.position_ids"] = torch.arange(16)[None]
    save_file(tensors, text, metadata={"format": "pt"})
    built = build_tiny(old, tmp_path / "m")
    assert built.folder is not None
    for mine in (built, load_model(built.folder)):
        for name, network in model.networks.items():
            theirs = mine.networks[name].state_dict()
            assert all(torch.equal(theirs[key], value) for key, value in network.state_dict().items()), name
