"""Building around Stable Diffusion: the public sizes' parameter counts, and the whole way, in tiny."""

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

from progidiff.errors import ModelError
from progidiff.model.build import measure_mask_latents, zero_snr_scheduler
from progidiff.model.folder import ProGiDiffModel, load_model
from progidiff.model.networks import ControlBranch, ImageEncoder
from progidiff.model.parameters import BACKBONES, backbone_name, parameter_table, print_info

Build = Callable[..., ProGiDiffModel]


@pytest.fixture(scope="module")
def model(tiny_model_folder: Path) -> ProGiDiffModel:
    return load_model(tiny_model_folder)


# Published parameter counts of the frozen backbones.
@pytest.mark.parametrize(
    ("config", "unet", "text_encoder"),
    [("sd15", 859_520_964, 123_060_480), ("sd21", 865_910_724, 340_387_840)],
)
def test_parameter_table_of_the_public_sizes(config: str, unet: int, text_encoder: int) -> None:
    rows = {row.component: row for row in parameter_table(config)}
    assert rows["unet"].parameters == unet
    assert rows["text_encoder"].parameters == text_encoder
    assert rows["vae"].parameters == 83_653_863
    assert {name for name, row in rows.items() if row.trainable} == {"controlnet", "image_encoder"}
    assert 4_000_000 <= rows["image_encoder"].parameters <= 7_100_000


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


def test_the_control_branch_is_a_controlnet_without_hint_block() -> None:
    from diffusers import ControlNetModel
    from diffusers.models.controlnets.controlnet import ControlNetConditioningEmbedding

    with torch.device("meta"):
        stock = ControlNetModel(cross_attention_dim=768, attention_head_dim=8)
        hint = ControlNetConditioningEmbedding(320)
    count = sum(p.numel() for p in stock.parameters()) - sum(p.numel() for p in hint.parameters())
    assert next(r for r in parameter_table("sd15") if r.component == "controlnet").parameters == count


@pytest.mark.slow
@pytest.mark.parametrize("config", ["sd15", "sd21"])
def test_info_of_a_configuration_compares_with_the_paper(config: str) -> None:
    info = print_info(config, as_json=True)
    assert isinstance(info, dict)
    assert json.loads(json.dumps(info)) == info
    assert info["trainable_parameters"] == sum(c["parameters"] for c in info["components"] if c["trainable"])
    assert abs(info["trainable_parameters"] / 367.13e6 - 1) < 0.01
    assert info["within_one_percent"]
    assert info["closest_config"] == "sd15"
    text = print_info(config)
    assert isinstance(text, str)
    assert f"{info['trainable_parameters']:,}" in text
    assert "Stable Diffusion 1.5" in text


@pytest.mark.slow
def test_info_of_a_folder(model: ProGiDiffModel) -> None:
    assert model.folder is not None
    info = print_info(model.folder, as_json=True)
    assert isinstance(info, dict)
    assert {c["component"]: c["parameters"] for c in info["components"]} == model.parameter_counts()
    assert info["trainable_parameters"] == model.trainable_parameters()
    assert info["card"]["vocabulary"] == ["liver"]
    assert "liver" in str(print_info(str(model.folder)))


def test_info_of_nonsense(tmp_path: Path) -> None:
    with pytest.raises(ModelError, match="sd15, sd21"):
        print_info("sd99")
    with pytest.raises(ModelError):
        print_info(tmp_path)


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
    assert model.folder is not None
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
    assert model.folder is not None
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


def test_the_schedule_ends_in_pure_noise(model: ProGiDiffModel) -> None:
    scheduler = model.scheduler
    assert float(scheduler.alphas_cumprod[-1]) == 0.0
    assert scheduler.config.prediction_type == "v_prediction"
    scheduler.set_timesteps(4)
    assert scheduler.timesteps.tolist() == [999, 749, 499, 249]


def test_one_step_with_the_true_velocity_gives_the_clean_latent() -> None:
    scheduler = zero_snr_scheduler()
    clean, noise = torch.randn(1, 4, 8, 8), torch.randn(1, 4, 8, 8)
    for steps in (1, 4):
        scheduler.set_timesteps(steps)
        x = scheduler.add_noise(clean, noise, scheduler.timesteps[:1])
        assert torch.allclose(x, noise, atol=1e-6)
        for t in scheduler.timesteps:
            x = scheduler.step(scheduler.get_velocity(clean, noise, t[None]), t, x).prev_sample
        assert torch.allclose(x, clean, atol=1e-4)


def test_the_converted_schedule_keeps_its_betas_and_refuses_epsilon() -> None:
    linear = zero_snr_scheduler({"beta_schedule": "linear", "beta_start": 1e-4, "beta_end": 0.02}, "sample")
    assert linear.config.beta_schedule == "linear"
    assert linear.config.prediction_type == "sample"
    with pytest.raises(ValueError, match="undefined"):
        zero_snr_scheduler(None, "epsilon")


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


def test_given_calibration_masks_are_used(
    tiny_sd: Path, tmp_path: Path, model: ProGiDiffModel, make_tiny_model: Build
) -> None:
    masks = np.zeros((2, 32, 32), bool)
    masks[:, :16] = True
    other = make_tiny_model(tiny_sd, tmp_path / "m", calibration_masks=masks)
    assert (other.card.latent_shift, other.card.latent_scale) == measure_mask_latents(other.vae, masks)
    assert other.card.latent_scale != model.card.latent_scale


def test_the_same_seed_builds_the_same_model(
    tiny_sd: Path, tmp_path: Path, model: ProGiDiffModel, make_tiny_model: Build
) -> None:
    again = make_tiny_model(tiny_sd, tmp_path / "a")
    other = make_tiny_model(tiny_sd, tmp_path / "b", seed=1)
    assert again.card.sha256 == model.card.sha256
    assert again.card.latent_scale == model.card.latent_scale
    key = "image_encoder/diffusion_pytorch_model.safetensors"
    assert other.card.sha256[key] != model.card.sha256[key]


def test_building_leaves_the_global_random_state_alone(tiny_sd: Path, tmp_path: Path, make_tiny_model: Build) -> None:
    torch.manual_seed(7)
    expected = torch.rand(1)
    torch.manual_seed(7)
    make_tiny_model(tiny_sd, tmp_path / "m")
    assert torch.equal(torch.rand(1), expected)


def test_the_card_of_a_fresh_model(model: ProGiDiffModel) -> None:
    card = model.card
    assert card.model_id == "progidiff-sd-untrained"
    assert "epsilon" in card.notes
    assert card.image_size == 32
    assert card.windows["CT"].kind == "hu"
    assert card.trained_on[0].n is None
    assert str(model.folder) not in json.dumps(card.to_dict())


def test_half_precision_files_are_found(
    tmp_path: Path, model: ProGiDiffModel, make_tiny_model: Build, make_tiny_sd: Callable[..., Path]
) -> None:
    built = make_tiny_model(make_tiny_sd(tmp_path / "sd", variant="fp16"), tmp_path / "m")
    assert built.parameter_counts() == model.parameter_counts()


def test_settings_that_do_not_fit(tiny_sd: Path, tmp_path: Path, make_tiny_model: Build) -> None:
    with pytest.raises(ModelError, match="multiple of the autoencoder's stride 4"):
        make_tiny_model(tiny_sd, tmp_path / "m", image_size=30)
    with pytest.raises(ModelError, match="image encoder cannot be built"):
        make_tiny_model(tiny_sd, tmp_path / "m", image_encoder={"stem_patch": 3})
    with pytest.raises(ModelError, match="modalities"):
        make_tiny_model(tiny_sd, tmp_path / "m", modalities=("US",))
    assert not (tmp_path / "m").exists()


def test_what_is_not_a_stable_diffusion_folder(
    tiny_sd: Path, tmp_path: Path, make_tiny_model: Build, make_tiny_sd: Callable[..., Path]
) -> None:
    single = tmp_path / "v1-5-pruned.safetensors"
    single.write_bytes(b"x")
    with pytest.raises(ModelError, match="single checkpoint file"):
        make_tiny_model(single, tmp_path / "m")
    with pytest.raises(ModelError, match="There is no Stable Diffusion folder"):
        make_tiny_model(tmp_path / "nowhere", tmp_path / "m")
    with pytest.raises(ModelError, match=r"model_index\.json"):
        make_tiny_model(tiny_sd / "unet", tmp_path / "m")
    xl = Path(shutil.copytree(tiny_sd, tmp_path / "xl"))
    (xl / "model_index.json").write_text('{"text_encoder_2": []}', encoding="utf-8")
    with pytest.raises(ModelError, match="XL"):
        make_tiny_model(xl, tmp_path / "m")
    with pytest.raises(ModelError, match="inpainting"):
        make_tiny_model(make_tiny_sd(tmp_path / "inpaint", in_channels=9), tmp_path / "m")
    (sub := Path(shutil.copytree(tiny_sd, tmp_path / "pickled")) / "unet").joinpath(
        "diffusion_pytorch_model.safetensors"
    ).rename(sub / "diffusion_pytorch_model.bin")
    with pytest.raises(ModelError, match="pickled"):
        make_tiny_model(tmp_path / "pickled", tmp_path / "m")


def test_the_names_in_published_folders_are_understood(
    tiny_sd: Path, tmp_path: Path, model: ProGiDiffModel, make_tiny_model: Build
) -> None:
    """Published weights carry older names: the autoencoder's attention, and CLIP's prefix and positions."""
    old = Path(shutil.copytree(tiny_sd, tmp_path / "old"))
    vae, text = (
        old / "vae" / "diffusion_pytorch_model.safetensors",
        old / "text_encoder" / "model.safetensors",
    )
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
    built = make_tiny_model(old, tmp_path / "m")
    assert built.folder is not None
    for mine in (built, load_model(built.folder)):
        for name, network in model.networks.items():
            theirs = mine.networks[name].state_dict()
            assert all(torch.equal(theirs[key], value) for key, value in network.state_dict().items()), name
