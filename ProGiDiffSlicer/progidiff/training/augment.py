"""Augmentation of labelled slices: small warps for all, and changes of look that scanners make, batched in torch."""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn import functional as F

from progidiff.synthesis.fields import blur, normal, plane_coordinates, smooth_noise, uniform

#: Real patients differ enough among themselves: half of the warps that synthetic slices need.
_WARP = 0.5


def augment(
    images: Tensor,
    masks: Tensor,
    is_mr: Tensor,
    margin: int,
    pixel_mm: Tensor,
    generator: torch.Generator,
    strength: float = 1.0,
) -> tuple[Tensor, Tensor]:
    """Warp slices and change their look. Left and right are never exchanged.

    Args:
        images: float32 (B, P, Q) in [0, 1], with a margin around the grid.
        masks: bool (B, V, P, Q).
        is_mr: bool (B,).
        margin: pixels of the margin on each side, which the result has not.
        pixel_mm: float (B,), pixel size in mm.
        generator: source of randomness; its device is that of the tensors.
        strength: 0 cuts out the centre unchanged, 1 is the full augmentation.

    Returns:
        images float32 (B, 1, H, W) in [0, 1], masks bool (B, V, H, W).
    """
    if strength <= 0:
        return without_margin(images, masks, margin)
    count, sides = len(images), torch.tensor(images.shape[-2:], device=images.device)
    shape = (images.shape[-2] - 2 * margin, images.shape[-1] - 2 * margin)
    scale = torch.exp(normal((count,), generator) * 0.08 * strength)[:, None, None, None]
    offsets = plane_coordinates(count, shape, pixel_mm, generator, _WARP * strength)[..., 1:] * scale
    grid = (offsets / pixel_mm[:, None, None, None] * 2 / (sides - 1)).flip(-1)
    warped = F.grid_sample(images[:, None], grid, mode="bilinear", padding_mode="zeros", align_corners=True)
    moved = F.grid_sample(masks.float(), grid, mode="bilinear", padding_mode="zeros", align_corners=True) > 0.5
    return change_look(warped[:, 0], is_mr, generator, strength)[:, None], moved


def without_margin(images: Tensor, masks: Tensor, margin: int) -> tuple[Tensor, Tensor]:
    """Images (B, 1, H, W) and masks (B, V, H, W) of slices with a margin, unchanged."""
    rows, columns = (slice(margin, side - margin) for side in images.shape[-2:])
    return images[:, None, rows, columns], masks[..., rows, columns]


def change_look(images: Tensor, is_mr: Tensor, generator: torch.Generator, strength: float = 1.0) -> Tensor:
    """Window (CT), contrast inversion and bias field (MR), gamma, blur, noise and resolution.

    Args:
        images: float32 (B, H, W) in [0, 1].
        is_mr: bool (B,).
        generator: source of randomness.
        strength: scales every change.

    Returns:
        float32 (B, H, W) in [0, 1].
    """
    b, shape = images.shape[0], (images.shape[1], images.shape[2])
    mr = is_mr[:, None, None]

    def chance(p: float) -> Tensor:
        return uniform((b, 1, 1), 0, 1, generator) < p

    low, width = normal((b, 1, 1), generator) * 0.05 * strength, torch.exp(normal((b, 1, 1), generator) * 0.1 * strength)
    x = torch.where(~mr & chance(0.7), ((images - low) / width).clamp(0, 1), images)
    x = torch.where(mr & chance(0.25 * strength) & (x > 0.05), 1 - x, x)  # the dark surroundings stay dark
    bias = smooth_noise(b, 1, shape, 2, generator)[:, 0] * uniform((b, 1, 1), 0, 0.35 * strength, generator)
    x = torch.where(mr & chance(0.7), (x * torch.exp(bias)).clamp(0, 1), x)
    gamma = torch.exp(normal((b, 1, 1), generator) * torch.where(mr, 0.3, 0.15) * strength)
    x = x.clamp(0, 1) ** gamma
    softer = blur(x[:, None], uniform((b,), 0.2, 0.8, generator) * strength)[:, 0]
    x = torch.where(chance(0.3), softer, x)
    grain = blur(normal((b, 1, *shape), generator), uniform((b,), 0.2, 0.8, generator))[:, 0]
    grain = grain / grain.std((-2, -1), keepdim=True)
    x = x + torch.where(chance(0.6), grain * uniform((b, 1, 1), 0.0, 0.07 * strength, generator), torch.zeros_like(x))
    coarse = F.interpolate(F.avg_pool2d(x[:, None], 2), size=shape, mode="bilinear")[:, 0]
    return torch.where(chance(0.08 * strength), coarse, x).clamp(0, 1)
