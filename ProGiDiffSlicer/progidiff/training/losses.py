"""Losses of the training stages."""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn import functional as F


def segmentation_loss(logits: Tensor, masks: Tensor, known: Tensor) -> Tensor:
    """Binary cross-entropy plus soft Dice per target over the known targets only.

    Args:
        logits: float (B, V, S, S).
        masks: bool (B, V, S, S).
        known: bool (B, V); unknown targets contribute nothing.
    """
    logits, truth = logits.float(), masks.float()  # sums over a picture need more than bfloat16
    weight = known.float()[:, :, None, None]
    cross = (F.binary_cross_entropy_with_logits(logits, truth, reduction="none") * weight).sum()
    cross = cross / weight.expand_as(logits).sum().clamp_min(1)
    probability = logits.sigmoid() * weight
    overlap = (probability * truth).sum((0, 2, 3))
    size = (probability + truth * weight).sum((0, 2, 3))
    dice = 1 - (2 * overlap + 1) / (size + 1)
    return cross * 4 + (dice * known.any(0)).sum() / known.any(0).sum().clamp_min(1)


def neighbourhood(masks: Tensor, stride: int, radius: int = 1) -> Tensor:
    """Latent tokens at or next to a mask; float (B, 1, S / stride, S / stride) of 0 and 1, from float masks (B, 1, S, S)."""
    near = F.max_pool2d(masks, stride)
    return (F.max_pool2d(near, 2 * radius + 1, 1, radius) > 0).float()


def velocity_loss(prediction: Tensor, velocity: Tensor, near: Tensor, weight: float = 9.0) -> Tensor:
    """Mean squared error of v (arXiv 2202.00512), with tokens near the mask counted ``1 + weight`` times.

    Most tokens of a mask are empty background; unweighted, a small organ would hardly be heard.
    """
    w = 1 + weight * near
    return ((prediction.float() - velocity) ** 2 * w).mean() / w.mean()


def decoded_loss(logits: Tensor, masks: Tensor, near: Tensor, weight: float = 9.0) -> Tensor:
    """Cross-entropy of the decoded estimate of the clean mask.

    Unlike Dice it is a proper scoring rule: at high noise the best answer stays the probability, so that samples keep their
    diversity instead of agreeing on one mask.
    """
    w = 1 + weight * F.interpolate(near, size=masks.shape[-2:], mode="nearest")
    return (F.binary_cross_entropy_with_logits(logits.float(), masks, reduction="none") * w).mean() / w.mean()


def dice_loss(logits: Tensor, masks: Tensor) -> Tensor:
    """One minus the soft Dice of each picture, averaged; float logits and masks (B, 1, S, S). Empty masks count as well."""
    probability = logits.float().sigmoid().flatten(1)
    truth = masks.flatten(1)
    overlap = (probability * truth).sum(1)
    return (1 - (2 * overlap + 10) / (probability.sum(1) + truth.sum(1) + 10)).mean()


def soft_dice(logits: Tensor, masks: Tensor) -> Tensor:
    """Mean Dice of thresholded logits against float masks (B, 1, S, S) over non-empty masks (for progress only)."""
    binary = (logits > 0).float()
    full = masks.flatten(1).sum(1) > 0
    if not bool(full.any()):
        return torch.zeros((), device=logits.device)
    overlap = 2 * (binary * masks).flatten(1).sum(1) / (binary + masks).flatten(1).sum(1).clamp_min(1)
    return overlap[full].mean()
