"""Losses and prompts: unknown targets are never heard, absent ones are asked for, and velocities mean what they should."""

from __future__ import annotations

import pytest
import torch

from progidiff.training.batches import TrainingBatch, pick_prompts
from progidiff.training.small import make_schedule
from progidiff.training.stages import decoded_loss, dice_loss, neighbourhood, segmentation_loss, soft_dice, velocity_loss


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
    assert logits.grad is not None
    heard = logits.grad.abs().sum((2, 3)) > 0
    assert torch.equal(heard, known)


def test_segmentation_loss_does_not_depend_on_masks_of_unknown_targets() -> None:
    torch.manual_seed(1)
    logits, known = torch.randn(1, 2, 16, 16), torch.tensor([[True, False]])
    masks = torch.rand(1, 2, 16, 16) > 0.5
    other = torch.cat([masks[:, :1], ~masks[:, 1:]], 1)
    assert segmentation_loss(logits, masks, known) == segmentation_loss(logits, other, known)


def test_segmentation_loss_of_nothing_known_is_zero_and_finite() -> None:
    loss = segmentation_loss(torch.randn(1, 2, 8, 8), torch.ones(1, 2, 8, 8).bool(), torch.zeros(1, 2, dtype=torch.bool))
    assert float(loss) == 0.0


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


@pytest.mark.parametrize("t", [0, 1, 250, 500, 900, 999])
def test_clean_latents_come_back_from_the_true_velocity(t: int) -> None:
    schedule = make_schedule()
    torch.manual_seed(2)
    clean, noise = torch.randn(2, 4, 8, 8), torch.randn(2, 4, 8, 8)
    steps = torch.tensor([t, t])
    noisy, velocity = schedule.add_noise(clean, noise, steps), schedule.get_velocity(clean, noise, steps)
    alpha = schedule.alphas_cumprod[t].sqrt()
    estimate = alpha * noisy - (1 - alpha**2).clamp_min(0).sqrt() * velocity
    assert torch.allclose(estimate, clean, atol=1e-5)


def test_the_last_step_is_pure_noise() -> None:
    schedule = make_schedule()
    clean, noise = torch.full((1, 4, 8, 8), 5.0), torch.randn(1, 4, 8, 8)
    assert torch.allclose(schedule.add_noise(clean, noise, torch.tensor([999])), noise, atol=1e-6)


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
    known = [[True, False, True, False], [False, False, True, True], [False, True, False, False]]
    present = [[True, True, False, True], [True, True, False, False], [True, True, True, True]]
    made = batch(present, known)
    for share in (0.0, 0.3, 1.0):
        for _ in range(30):
            image, target = pick_prompts(made, 3, share)
            assert made.known[image, target].all()
            assert len(image) == 9


def test_prompts_of_an_image_where_nothing_is_present_are_absent_known_ones() -> None:
    torch.manual_seed(4)
    made = batch([[False, True, False]], [[True, False, True]])
    image, target = pick_prompts(made, 8, absent_share=0.0)
    assert set(target.tolist()) == {0, 2}
    assert not made.masks[image, target].any()


def test_an_image_without_any_known_target_has_no_prompts() -> None:
    made = batch([[True, True], [True, False]], [[False, False], [True, True]])
    image, _ = pick_prompts(made, 4)
    assert set(image.tolist()) == {1}
    assert len(image) == 4


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
