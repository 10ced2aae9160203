"""Procedural abdominal phantoms: tissue maps from random smooth shapes at anatomical places, batched in torch."""

from __future__ import annotations

import math

import torch
from torch import Tensor

from progidiff.synthesis.fields import Shape, normal, uniform
from progidiff.synthesis.tissues import INDEX

#: centre (column, row) and radii as fractions of half the body's width; typical angle; chance to be in the slice.
_ORGANS: tuple[tuple[str, float, float, float, float, float, float], ...] = (
    ("bowel", 0.30, 0.05, 0.22, 0.10, 0.3, 0.8),
    ("bowel", -0.15, -0.32, 0.30, 0.09, 0.0, 0.6),
    ("stomach", 0.32, -0.26, 0.25, 0.17, 0.5, 0.75),
    ("liver", -0.42, -0.10, 0.38, 0.36, 0.2, 0.95),
    ("spleen", 0.62, 0.10, 0.15, 0.23, -0.3, 0.75),
    ("duodenum", -0.17, 0.03, 0.08, 0.09, 0.0, 0.6),
    ("pancreas", 0.08, -0.05, 0.26, 0.065, -0.25, 0.75),
    ("gallbladder", -0.25, -0.16, 0.08, 0.10, 0.3, 0.55),
    ("left kidney", 0.38, 0.24, 0.13, 0.15, 0.3, 0.8),
    ("right kidney", -0.38, 0.26, 0.13, 0.15, -0.3, 0.8),
)


def _blob(grid: Tensor, centre: Tensor, radii: Tensor, angle: Tensor, rough: float, generator: torch.Generator) -> Tensor:
    """Star-shaped region per sample: an ellipse whose radius is a random Fourier series; bool (B, S, S)."""
    offset = grid - centre[:, None, None, :]
    x, y = offset[..., 0], offset[..., 1]
    c, s = torch.cos(angle)[:, None, None], torch.sin(angle)[:, None, None]
    u = (c * x + s * y) / radii[:, 0, None, None]
    v = (-s * x + c * y) / radii[:, 1, None, None]
    theta = torch.atan2(v, u)
    edge = torch.ones_like(u)
    for k in range(1, 6):
        gain = normal((len(u), 1, 1), generator) * rough / (k + 1)
        edge = edge + gain * torch.cos(k * theta + uniform((len(u), 1, 1), 0, 2 * math.pi, generator))
    return torch.hypot(u, v) < edge


def phantom_tissues(
    batch: int, shape: Shape, pixel_mm: Tensor, generator: torch.Generator, half: Tensor
) -> tuple[Tensor, Tensor]:
    """Tissue maps of random phantoms.

    Args:
        batch: number of slices.
        shape: rows and columns of a slice.
        pixel_mm: float (batch,), pixel size in mm.
        generator: source of randomness; its device is used.
        half: float (batch,), half the width of the body's muscular wall in mm.

    Returns:
        tissues, int64 (batch, rows, columns); wall, float (batch, rows, columns), approximate signed distance to the
        muscular wall in mm.
    """
    device = generator.device
    axes = [torch.arange(side, device=device, dtype=torch.float32) - (side - 1) / 2 for side in shape]
    rows, cols = (axis[None] * pixel_mm[:, None, None] for axis in torch.meshgrid(*axes, indexing="ij"))
    grid = torch.stack([cols, rows], -1)
    shift = normal((batch, 2), generator) * 8
    depth = half * uniform((batch,), 0.62, 0.82, generator)

    def place(cx: float, cy: float, rx: float, ry: float, angle: float, jitter: float, rough: float) -> Tensor:
        scale = torch.stack([half, depth / 0.72], -1)
        centre = shift + scale * (torch.tensor([cx, cy], device=device) + normal((batch, 2), generator) * jitter)
        grow = torch.exp(normal((batch, 1), generator) * 0.18 + normal((batch, 2), generator) * 0.12)
        radii = scale * torch.tensor([rx, ry], device=device) * grow
        return _blob(grid, centre, radii, angle + normal((batch,), generator) * 0.25, rough, generator)

    zero = torch.zeros(batch, device=device)
    radius = torch.hypot(
        (cols - shift[:, 0, None, None]) / half[:, None, None], (rows - shift[:, 1, None, None]) / depth[:, None, None]
    )
    wall = (radius - 1) * depth[:, None, None]
    cavity = _blob(grid, shift, torch.stack([half, depth], -1) * 0.9, zero, 0.03, generator)
    tissues = torch.zeros(batch, *shape, dtype=torch.int64, device=device)
    tissues[(wall < 0) & ~cavity] = INDEX["muscle"]
    for name, cx, cy, rx, ry, angle, chance in _ORGANS:
        region = place(cx, cy, rx, ry, angle, 0.05, 0.22) & cavity
        present = uniform((batch, 1, 1), 0, 1, generator) < chance
        tissues[region & present] = INDEX[name]
    for side in (-1.0, 1.0):
        tissues[place(side * 0.20, 0.42, 0.13, 0.11, 0.0, 0.02, 0.15) & (wall < 0)] = INDEX["muscle"]
    tissues[place(0.0, 0.36, 0.15, 0.15, 0.0, 0.02, 0.08)] = INDEX["bone"]
    tissues[place(0.0, 0.52, 0.05, 0.05, 0.0, 0.01, 0.08)] = INDEX["spinal cord"]
    tissues[place(0.05, 0.15, 0.065, 0.075, 0.0, 0.015, 0.06)] = INDEX["aorta"]
    tissues[place(-0.12, 0.16, 0.08, 0.065, 0.0, 0.015, 0.12)] = INDEX["inferior vena cava"]
    return tissues, wall
