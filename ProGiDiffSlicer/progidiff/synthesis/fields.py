"""Smooth random fields and warps, batched in torch so that they run where the training runs."""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn import functional as F


def uniform(shape: tuple[int, ...], low: float, high: float, generator: torch.Generator) -> Tensor:
    """Uniform random numbers in [low, high)."""
    return torch.rand(shape, generator=generator, device=generator.device) * (high - low) + low


def normal(shape: tuple[int, ...], generator: torch.Generator) -> Tensor:
    """Standard normal random numbers."""
    return torch.randn(shape, generator=generator, device=generator.device)


def smooth_noise(batch: int, channels: int, size: int, cells: int, generator: torch.Generator) -> Tensor:
    """Random field (batch, channels, size, size) of unit deviation that varies over about ``size / cells`` pixels."""
    coarse = normal((batch, channels, cells + 3, cells + 3), generator)
    fine = F.interpolate(coarse, scale_factor=float(-(-size // cells)), mode="bicubic", align_corners=False)
    start = (fine.shape[-1] - size) // 2
    field = fine[..., start : start + size, start : start + size]
    return field / field.std((-2, -1), keepdim=True).clamp_min(1e-6)


def blur(x: Tensor, sigma: Tensor) -> Tensor:
    """Gaussian blur of (B, C, H, W) with one sigma (pixels) per sample, truncated at 4 pixels."""
    offsets = torch.arange(-4, 5, device=x.device, dtype=x.dtype)
    kernel = torch.exp(-0.5 * (offsets / sigma.clamp_min(1e-3)[:, None]) ** 2)
    kernel = kernel / kernel.sum(1, keepdim=True)
    b, c, h, w = x.shape
    rows = kernel.repeat_interleave(c, 0)[:, None, :, None]
    cols = kernel.repeat_interleave(c, 0)[:, None, None, :]
    y = F.pad(x, (4, 4, 4, 4), mode="replicate").reshape(1, b * c, h + 8, w + 8)
    y = F.conv2d(F.conv2d(y, rows, groups=b * c), cols, groups=b * c)
    return y.reshape(b, c, h, w)


def plane_coordinates(
    batch: int, size: int, pixel_mm: float, scale: Tensor, generator: torch.Generator, strength: float = 1.0
) -> Tensor:
    """Physical coordinates of randomly tilted, scaled, sheared and elastically warped slices.

    Args:
        batch: number of slices.
        size: pixels per side.
        pixel_mm: pixel size in mm.
        scale: float (batch,), source mm per mm of the slice (below 1 enlarges the body).
        generator: source of randomness; its device is used.
        strength: 0 gives straight centred slices, 1 the full augmentation.

    Returns:
        float (batch, size, size, 3): (z, row, column) offsets in mm from the slice's centre.
    """
    device = generator.device
    axis = (torch.arange(size, device=device, dtype=torch.float32) - (size - 1) / 2) * pixel_mm
    y, x = torch.meshgrid(axis, axis, indexing="ij")

    def amount(sd: float) -> Tensor:
        return normal((batch, 1, 1), generator) * sd * strength

    scale = scale[:, None, None]
    angle, shear = amount(0.08), amount(0.04)
    ys, xs = y * scale * torch.exp(amount(0.08)), x * scale * torch.exp(amount(0.05))
    rows = torch.cos(angle) * ys - torch.sin(angle) * xs + shear * xs + amount(13.0)
    cols = torch.sin(angle) * ys + torch.cos(angle) * xs + amount(14.0)
    z = amount(0.08) * ys + amount(0.08) * xs
    for cells, in_plane, through in ((3, 10.0, 9.0), (6, 5.5, 4.0), (12, 2.2, 0.0)):
        field = smooth_noise(batch, 3, size, cells, generator)
        gain = uniform((batch, 1, 1), 0.15, 1.0, generator) * strength
        rows = rows + field[:, 0] * gain * in_plane * scale
        cols = cols + field[:, 1] * gain * in_plane * scale
        z = z + field[:, 2] * gain * through
    return torch.stack([z, rows, cols], -1)


def sample_volume(volume: Tensor, voxel: Tensor, nearest: bool) -> Tensor:
    """Values of a volume (D, H, W) at voxel coordinates (B, S, S, 3) in (z, row, column); outside is the border value.

    Returns float (B, S, S).
    """
    extent = torch.tensor([s - 1 for s in volume.shape], device=volume.device, dtype=torch.float32).clamp_min(1.0)
    grid = (voxel / extent * 2 - 1).flip(-1)[None].clamp(-1.5, 1.5)
    mode = "nearest" if nearest else "bilinear"
    out = F.grid_sample(volume[None, None].float(), grid, mode=mode, padding_mode="border", align_corners=True)
    return out[0, 0]
