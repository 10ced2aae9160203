"""Smooth random fields, parcels and warps, batched in torch so that they run where the training runs."""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn import functional as F

Shape = tuple[int, int]


def uniform(shape: tuple[int, ...], low: float, high: float, generator: torch.Generator) -> Tensor:
    """Uniform random numbers in [low, high)."""
    return torch.rand(shape, generator=generator, device=generator.device) * (high - low) + low


def normal(shape: tuple[int, ...], generator: torch.Generator) -> Tensor:
    """Standard normal random numbers."""
    return torch.randn(shape, generator=generator, device=generator.device)


def smooth_noise(batch: int, channels: int, shape: Shape, cells: int, generator: torch.Generator) -> Tensor:
    """Random field (batch, channels, H, W) of unit deviation that varies over about ``W / cells`` pixels."""
    pixels = -(-shape[1] // cells)
    coarse = normal((batch, channels, *(-(-side // pixels) + 3 for side in shape)), generator)
    fine = F.interpolate(coarse, scale_factor=float(pixels), mode="bicubic", align_corners=False)
    top, left = ((have - want) // 2 for have, want in zip(fine.shape[-2:], shape, strict=True))
    field = fine[..., top : top + shape[0], left : left + shape[1]]
    return field / field.std((-2, -1), keepdim=True).clamp_min(1e-6)


def smooth_parcels(batch: int, shape: Shape, count: int, cells: int, generator: torch.Generator) -> Tensor:
    """A division of each picture into ``count`` kinds of winding parts about ``W / cells`` wide; int64 (batch, H, W)."""
    return smooth_noise(batch, count, shape, cells, generator).argmax(1)


def voronoi_parcels(batch: int, shape: Shape, count: int, kinds: int, generator: torch.Generator) -> Tensor:
    """A division of each picture into ``count`` convex cells of ``kinds`` kinds; int64 (batch, H, W)."""
    seeds = uniform((batch, count, 2), 0, 1, generator)
    kind = torch.randint(0, kinds, (batch, count), generator=generator, device=generator.device)
    # the cells are found on a grid of half the size: their borders are straight anyway
    coarse = [-(-side // 2) for side in shape]
    rows, cols = (torch.linspace(0, 1, side, device=generator.device) for side in coarse)
    grid = torch.stack(torch.meshgrid(rows, cols * 1.4, indexing="ij"), -1).flatten(0, 1)
    seeds = seeds * torch.tensor([1.0, 1.4], device=seeds.device)
    nearest = torch.cdist(grid.expand(batch, -1, -1), seeds).argmin(-1)
    found = torch.gather(kind, 1, nearest).view(batch, *coarse)
    return found.repeat_interleave(2, 1).repeat_interleave(2, 2)[:, : shape[0], : shape[1]]


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
    batch: int, shape: Shape, pixel_mm: Tensor, generator: torch.Generator, strength: float = 1.0
) -> Tensor:
    """Physical coordinates of randomly tilted, scaled, sheared and elastically warped slices.

    Args:
        batch: number of slices.
        shape: rows and columns of a slice.
        pixel_mm: float (batch,), pixel size in mm.
        generator: source of randomness; its device is used.
        strength: 0 gives straight centred slices, 1 the full augmentation.

    Returns:
        float (batch, rows, columns, 3): (through the plane, row, column) offsets in mm from the slice's centre.
    """
    device = generator.device
    axes = [torch.arange(side, device=device, dtype=torch.float32) - (side - 1) / 2 for side in shape]
    y, x = (axis[None] * pixel_mm[:, None, None] for axis in torch.meshgrid(*axes, indexing="ij"))

    def amount(sd: float) -> Tensor:
        return normal((batch, 1, 1), generator) * sd * strength

    angle, shear = amount(0.07), amount(0.04)
    ys, xs = y * torch.exp(amount(0.06)), x * torch.exp(amount(0.05))
    size = pixel_mm[:, None, None] / 2.4  # deformations grow with the body
    rows = torch.cos(angle) * ys - torch.sin(angle) * xs + shear * xs + amount(8.0) * size
    cols = torch.sin(angle) * ys + torch.cos(angle) * xs + amount(9.0) * size
    z = amount(0.08) * ys + amount(0.08) * xs
    for cells, in_plane, through in ((3, 10.0, 9.0), (6, 5.5, 4.0), (12, 2.2, 0.0)):
        field = smooth_noise(batch, 3, shape, cells, generator)
        gain = uniform((batch, 1, 1), 0.1, 1.0, generator) * strength * size
        rows = rows + field[:, 0] * gain * in_plane
        cols = cols + field[:, 1] * gain * in_plane
        z = z + field[:, 2] * gain * through
    return torch.stack([z, rows, cols], -1)


def nearest_values(volume: Tensor, voxel: Tensor) -> Tensor:
    """Values of a volume (D, H, W) at the voxels nearest to coordinates (..., 3) in (z, row, column), of its own dtype.

    Outside the volume it is the border's value.
    """
    limits = torch.tensor(volume.shape, device=volume.device) - 1
    index = torch.minimum(voxel.round().long().clamp_min(0), limits)
    flat = (index[..., 0] * volume.shape[1] + index[..., 1]) * volume.shape[2] + index[..., 2]
    return volume.reshape(-1)[flat]


def linear_values(volume: Tensor, voxel: Tensor) -> Tensor:
    """Trilinear values of a volume (D, H, W) at voxel coordinates (B, H', W', 3) in (z, row, column); float (B, H', W').

    Outside the volume it is the border's value.
    """
    extent = torch.tensor([s - 1 for s in volume.shape], device=volume.device, dtype=torch.float32).clamp_min(1.0)
    grid = (voxel / extent * 2 - 1).flip(-1)[None].clamp(-1.5, 1.5)
    out = F.grid_sample(volume[None, None].float(), grid, mode="bilinear", padding_mode="border", align_corners=True)
    return out[0, 0]
