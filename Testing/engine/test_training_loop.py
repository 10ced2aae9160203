"""The training loop: losses, prompts, resuming bit for bit; a stopped run keeps its checkpoint, foreign ones are refused."""

from __future__ import annotations

import copy
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from diffusers import AutoencoderKL, AutoencoderTiny, UNet2DConditionModel
from safetensors.torch import load_file, save_file
from transformers import CLIPTextConfig, CLIPTextModel

from progidiff.errors import CancelledError, ModelError, OutputError
from progidiff.model.networks import ControlBranch, ImageEncoder, MaskDecoder, tokenize
from progidiff.synthesis.source import SyntheticSource
from progidiff.training.batches import SyntheticBatches, TrainingBatch, pick_prompts
from progidiff.training.diffusion import BaseStage, ControlStage
from progidiff.training.loop import CHECKPOINT_NAME, LoopSettings, Stage, draw_curve, learning_rate_at, run_stage
from progidiff.training.small import make_schedule, make_tokenizer
from progidiff.training.stages import (
    AutoencoderStage,
    EncoderStage,
    decoded_loss,
    dice_loss,
    neighbourhood,
    segmentation_loss,
    soft_dice,
    velocity_loss,
)

SIZE = 32
TARGETS = ("liver", "spleen", "kidneys")
STAGES = ("autoencoder", "autoencoder of pictures", "base", "encoder", "control", "control on its own estimates")
SETTINGS = LoopSettings(steps=6, images=2, warmup=2, checkpoint_every=100, validate_every=2, log_every=2, seed=5)


def source(seed: int) -> SyntheticBatches:
    return SyntheticBatches(SyntheticSource([], {"axial": (SIZE, SIZE)}, 11.0, seed=seed), TARGETS)


def build(name: str) -> Stage:
    """A tiny stage; the same weights at every call."""
    torch.manual_seed(0)
    validation = [source(9).batch(2)]
    if name == "autoencoder of pictures":
        vae: Any = AutoencoderKL(
            block_out_channels=(8, 8, 8), down_block_types=("DownEncoderBlock2D",) * 3, norm_num_groups=4,
            up_block_types=("UpDecoderBlock2D",) * 3,
        )  # fmt: skip
    else:
        vae = AutoencoderTiny(1, 1, (8, 8, 8), (8, 8, 8), num_encoder_blocks=(0, 1, 1), num_decoder_blocks=(1, 1, 1))
    decoder = MaskDecoder(hidden_channels=8)
    if name.startswith("autoencoder"):
        return AutoencoderStage(vae, decoder, source(1), validation, frozen=name != "autoencoder")
    encoder = ImageEncoder(
        block_out_channels=(8, 16, 16), feature_channels=8, hint_channels=16, text_dim=16, norm_num_groups=4,
        classes=len(TARGETS),
    )  # fmt: skip
    if name == "encoder":
        return EncoderStage(encoder, source(1), validation)
    unet = UNet2DConditionModel(
        sample_size=8, block_out_channels=(16, 32), layers_per_block=1, cross_attention_dim=16, attention_head_dim=2,
        down_block_types=("DownBlock2D", "CrossAttnDownBlock2D"), up_block_types=("CrossAttnUpBlock2D", "UpBlock2D"),
        norm_num_groups=8,
    )  # fmt: skip
    tokenizer = make_tokenizer(TARGETS)
    text = CLIPTextConfig(
        vocab_size=len(tokenizer), hidden_size=16, intermediate_size=16, num_hidden_layers=1, num_attention_heads=2,
        max_position_embeddings=8, projection_dim=16, bos_token_id=0, eos_token_id=0, pad_token_id=0,
    )  # fmt: skip
    shared: dict[str, Any] = {
        "vae": vae, "unet": unet, "decoder": None if "without" in name else decoder, "schedule": make_schedule(),
        "tokens": tokenize(tokenizer, TARGETS, torch.device("cpu")), "text_encoder": CLIPTextModel(text),
        "latent_shift": [0.1] * 4, "latent_scale": [1.2] * 4, "source": source(1), "validation": validation,
        "prompts_per_image": 2,
    }  # fmt: skip
    if name == "base":
        return BaseStage(**shared)
    own = {"recycled": 0.5, "dice_weight": 0.3} if "estimates" in name else {}
    return ControlStage(ControlBranch.from_unet(unet), encoder, **shared, **own)


def weights(stage: Stage) -> dict[str, torch.Tensor]:
    return {key: value.clone() for key, value in stage.trainable.state_dict().items()}


def after(steps: int) -> Callable[[], bool]:
    """Cancels once so many steps are done."""
    asked = iter(range(1, 100))
    return lambda: next(asked) >= steps


def quiet(line: str) -> None:
    """A log for nobody."""


@pytest.mark.slow
@pytest.mark.parametrize("name", STAGES)
def test_a_stopped_stage_goes_on_bit_for_bit(name: str, tmp_path: Path) -> None:
    straight: Any = build(name)
    before = weights(straight)
    parts = ("unet", "vae", "text_encoder") if name == "control" else ()
    frozen = {part: copy.deepcopy(getattr(straight, part).state_dict()) for part in parts}
    curve = run_stage(straight, SETTINGS, tmp_path / "straight", quiet)
    for part, state in frozen.items():
        assert all(torch.equal(state[key], value) for key, value in getattr(straight, part).state_dict().items()), part

    with pytest.raises(CancelledError, match="step 3 of 6"):
        run_stage(build(name), SETTINGS, tmp_path / "stopped", quiet, after(3))
    resumed = build(name)
    with torch.no_grad():  # what stood in the networks before must not matter
        for parameter in resumed.trainable.parameters():
            if parameter.requires_grad:
                parameter.add_(0.5)
    torch.rand(17)
    lines: list[str] = []
    seen: list[tuple[str, int, int]] = []
    again = run_stage(resumed, SETTINGS, tmp_path / "stopped", lines.append, progress=lambda *step: seen.append(step))

    assert f"{straight.name}: resumed at step 3 of 6" in lines
    assert seen == [(straight.name, step, 6) for step in (3, 4, 5, 6)]
    assert again == curve
    assert [point["step"] for point in curve] == [2, 4, 6]
    found, wanted = weights(resumed), weights(straight)
    assert found.keys() == wanted.keys()
    assert all(torch.equal(found[key], wanted[key]) for key in wanted)
    assert any(not torch.equal(before[key], wanted[key]) for key in wanted)
    one, two = (load_file(tmp_path / run / CHECKPOINT_NAME) for run in ("straight", "stopped"))
    assert all(torch.equal(one[key], two[key]) for key in one)
    assert (tmp_path / "stopped" / "curve.png").stat().st_size > 1000


@pytest.mark.parametrize("follows", [True, False])
def test_a_head_that_follows_does_not_shape_the_features(follows: bool) -> None:
    def gradients(weight: float) -> tuple[torch.Tensor, torch.Tensor | None]:
        stage: Any = build("control")
        stage.head_follows, stage.segmentation_weight = follows, weight
        torch.manual_seed(3)
        stage.loss(2)[0].backward()
        return stage.encoder.stem.weight.grad, stage.encoder.segmentation_head.weight.grad

    (stem, head), (stem_without, head_without) = gradients(0.5), gradients(0.0)
    assert torch.equal(stem, stem_without) == follows
    assert head.any()
    assert head_without is None


def test_decoded_estimate_of_the_true_velocity_is_the_mask_itself() -> None:
    stage: Any = build("control")
    batch = source(3).batch(2)
    masks = batch.masks[:, :1].float()
    clean = stage.clean_latents(masks)
    noisy, t, velocity = stage.noisy(clean)
    estimate = stage.clean_estimate(velocity, noisy, t)
    assert torch.allclose(estimate, clean, atol=1e-4)
    assert torch.allclose(stage.decode(estimate), stage.decoder(stage.vae.encode(masks * 2 - 1).latents), atol=1e-3)


def test_latent_statistics_bring_mask_latents_to_unit_scale() -> None:
    stage: Any = build("autoencoder")
    torch.manual_seed(0)
    shift, scale = stage.latent_statistics(batches=4, count=4)
    torch.manual_seed(0)
    stage.source = source(1)
    again = stage.latent_statistics(batches=4, count=4)
    assert (shift, scale) == again
    assert len(shift) == len(scale) == 4
    assert all(s > 0 for s in scale)


def test_a_finished_stage_is_not_trained_again(tmp_path: Path) -> None:
    first = build("encoder")
    curve = run_stage(first, SETTINGS, tmp_path, quiet)
    again = build("encoder")
    assert run_stage(again, SETTINGS, tmp_path, quiet, lambda: True) == curve
    assert all(torch.equal(a, b) for a, b in zip(weights(first).values(), weights(again).values(), strict=True))


def test_figures_measured_after_the_checkpoint_are_measured_again(tmp_path: Path) -> None:
    with pytest.raises(CancelledError):
        run_stage(build("encoder"), SETTINGS, tmp_path, quiet, after(3))
    path = tmp_path / "curve.json"
    path.write_text(json.dumps([*json.loads(path.read_text()), {"step": 4.0, "dice": 2.0}]))
    curve = run_stage(build("encoder"), SETTINGS, tmp_path, quiet)
    assert [point["step"] for point in curve] == [2, 4, 6]
    assert all(point["dice"] <= 1 for point in curve)


@pytest.mark.parametrize("damage", ["other stage", "other network", "other shape", "truncated", "no metadata", "short"])
def test_a_checkpoint_that_does_not_fit_is_refused(damage: str, tmp_path: Path) -> None:
    path = tmp_path / CHECKPOINT_NAME
    with pytest.raises(CancelledError):
        run_stage(build("control" if damage == "other stage" else "encoder"), SETTINGS, tmp_path, quiet, after(1))
    tensors, meta = load_file(path), {"stage": "encoder", "step": "1", "ema_step": "1"}
    if damage == "truncated":
        path.write_bytes(path.read_bytes()[:-1000])
    elif damage == "no metadata":
        save_file(tensors, path)
    elif damage == "other network":
        count = sum(key.startswith("weights.") for key in tensors)
        save_file(tensors | {f"weights.{count}": torch.zeros(3)}, path, metadata=meta)
    elif damage == "other shape":
        save_file(tensors | {"weights.0": torch.zeros(1)}, path, metadata=meta)
    elif damage == "short":
        save_file({k: v for k, v in tensors.items() if k != "random.source"}, path, metadata=meta)
    with pytest.raises(ModelError, match="delete it"):
        run_stage(build("encoder"), SETTINGS, tmp_path, quiet)


def test_a_checkpoint_that_cannot_be_written_leaves_the_earlier_one(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(CancelledError):
        run_stage(build("encoder"), SETTINGS, tmp_path, quiet, after(2))
    before = (tmp_path / CHECKPOINT_NAME).read_bytes()

    def full(tensors: object, path: Path, metadata: object) -> None:
        path.write_bytes(b"half")
        raise OSError(28, "No space left on device")

    monkeypatch.setattr("progidiff.training.loop.save_file", full)
    with pytest.raises(OutputError, match="No space left"):
        run_stage(build("encoder"), SETTINGS, tmp_path, quiet, after(1))
    assert (tmp_path / CHECKPOINT_NAME).read_bytes() == before
    assert not list(tmp_path.glob("*.tmp"))


def test_the_learning_rate_warms_up_and_falls() -> None:
    settings = LoopSettings(steps=100, learning_rate=1.0, warmup=10)
    rates = [learning_rate_at(step, settings) for step in range(100)]
    assert rates[0] == pytest.approx(0.1)
    assert max(rates) == pytest.approx(1.0)
    assert rates.index(max(rates)) in (9, 10)
    assert rates[10:] == sorted(rates[10:], reverse=True)
    assert 0.02 <= rates[-1] < 0.03


def test_a_stage_without_validation_slices_has_an_empty_curve(tmp_path: Path) -> None:
    stage: Any = build("base")
    stage.validation = []
    curve = run_stage(stage, SETTINGS, tmp_path, quiet)
    assert curve == [{"step": 2.0}, {"step": 4.0}, {"step": 6.0}]
    draw_curve(curve, tmp_path / "none.png", "nothing")
    assert not (tmp_path / "none.png").exists()


def batch(present: list[list[bool]], known: list[list[bool]]) -> TrainingBatch:
    masks = torch.zeros(len(present), len(present[0]), 16, 16, dtype=torch.bool)
    masks[torch.tensor(present)] = torch.ones(16, 16, dtype=torch.bool)
    return TrainingBatch(torch.zeros(len(present), 1, 16, 16), masks, torch.tensor(known))


def test_unknown_targets_give_no_gradient() -> None:
    torch.manual_seed(0)
    logits = torch.randn(2, 3, 16, 16, requires_grad=True)
    masks = torch.rand(2, 3, 16, 16) > 0.5  # what stands in an unknown target's mask must not matter
    known = torch.tensor([[True, False, True], [True, False, False]])
    segmentation_loss(logits, masks, known).backward()
    heard = logits.grad.abs().sum((2, 3)) > 0
    assert torch.equal(heard, known)
    assert float(segmentation_loss(logits, masks, torch.zeros_like(known))) == 0.0


def test_segmentation_loss_falls_towards_the_truth() -> None:
    masks = torch.zeros(1, 1, 16, 16, dtype=torch.bool)
    masks[..., 4:9, 4:9] = True
    known = torch.ones(1, 1, dtype=torch.bool)
    right, wrong = (masks.float() * 2 - 1) * 8, (1 - masks.float() * 2) * 8
    assert segmentation_loss(right, masks, known) < 0.05 < 1.0 < segmentation_loss(wrong, masks, known)


def test_absent_targets_that_the_model_believes_in_are_asked_for_first() -> None:
    torch.manual_seed(0)
    images = batch([[False] * 4] * 200, [[True] * 4] * 200)
    believed = torch.tensor([[0.0, 0.9, 0.0, 0.1]]).expand(200, -1)
    _, target = pick_prompts(images, 1, believed=believed)
    share = torch.bincount(target, minlength=4) / 200
    assert share[1] > 0.7
    assert share[0] > 0
    _, evenly = pick_prompts(images, 1)
    assert (torch.bincount(evenly, minlength=4) / 200 - 0.25).abs().max() < 0.1


def test_the_dice_loss_falls_towards_the_truth_and_forgives_nothing_on_empty_masks() -> None:
    masks = torch.zeros(2, 1, 16, 16)
    masks[0, :, 4:9, 4:9] = 1
    right, nothing, everything = (masks * 2 - 1) * 9, torch.full_like(masks, -9.0), torch.full_like(masks, 9.0)
    assert dice_loss(right, masks) < 0.01 < dice_loss(nothing, masks) < dice_loss(everything, masks)


def test_tokens_near_the_mask_weigh_more() -> None:
    masks = torch.zeros(1, 1, 32, 32)
    masks[..., 12:16, 12:16] = 1
    near = neighbourhood(masks, 4)
    assert near.shape == (1, 1, 8, 8)
    assert near[0, 0, 2:5, 2:5].all()  # token (3, 3) and its neighbours
    assert near.sum() == 9
    truth = torch.zeros(1, 4, 8, 8)
    at_mask, far = truth.clone(), truth.clone()
    at_mask[..., 3, 3], far[..., 7, 7] = 1.0, 1.0
    assert velocity_loss(at_mask, truth, near) == pytest.approx(10 * float(velocity_loss(far, truth, near)))


def test_decoded_loss_is_least_at_the_true_probability() -> None:
    masks = torch.zeros(10, 1, 8, 8)
    masks[:3] = 1.0  # three of ten: the proper answer for each pixel is 0.3
    near = torch.ones(10, 1, 2, 2)
    losses = {p: float(decoded_loss(torch.full_like(masks, p).logit(), masks, near)) for p in (0.1, 0.2, 0.3, 0.4, 0.5)}
    assert min(losses, key=losses.__getitem__) == 0.3


def test_soft_dice_ignores_empty_masks() -> None:
    masks = torch.zeros(2, 1, 8, 8)
    masks[0, :, :4] = 1
    logits = masks * 2 - 1
    assert float(soft_dice(logits, masks)) == pytest.approx(1.0)
    assert float(soft_dice(-torch.ones(2, 1, 8, 8), torch.zeros(2, 1, 8, 8))) == 0.0


def test_prompts_never_name_an_unknown_target() -> None:
    torch.manual_seed(3)
    known = [[True, False, True, False], [False, False, True, True], [False, True, False, False], [False] * 4]
    present = [[True, True, False, True], [True, True, False, False], [True] * 4, [True] * 4]
    made = batch(present, known)
    for share in (0.0, 0.3, 1.0):
        for _ in range(30):
            image, target = pick_prompts(made, 3, share)
            assert made.known[image, target].all()
            assert len(image) == 9, "an image without any known target has no prompts"


def test_small_and_large_targets_are_asked_for_alike() -> None:
    torch.manual_seed(5)
    masks = torch.zeros(1, 2, 16, 16, dtype=torch.bool)
    masks[0, 0, :4, :5] = True
    masks[0, 1] = True
    made = TrainingBatch(torch.zeros(1, 1, 16, 16), masks, torch.ones(1, 2, dtype=torch.bool))
    picks = torch.cat([pick_prompts(made, 1, 0.0)[1] for _ in range(400)])
    assert 150 < int((picks == 0).sum()) < 250


def test_absent_targets_are_asked_for_as_often_as_wished() -> None:
    torch.manual_seed(6)
    made = batch([[True, False]], [[True, True]])
    picks = torch.cat([pick_prompts(made, 1, 0.25)[1] for _ in range(800)])
    assert 0.18 < float((picks == 1).float().mean()) < 0.32
