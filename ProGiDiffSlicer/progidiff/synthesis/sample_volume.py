"""A synthetic CT volume, painted in three dimensions on a warped label volume: the sample that ships with the project."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor
from torch.nn import functional as F

from progidiff.synthesis.fields import normal, uniform
from progidiff.synthesis.labelmaps import LabelVolume
from progidiff.synthesis.painting import AIR
from progidiff.synthesis.tissues import INDEX, ORGANS, TISSUES

PORTAL_VENOUS = 2


@dataclass(frozen=True)
class PaintedVolume:
    """A painted CT.

    Attributes:
        hu: int16 (K, J, I), Hounsfield units; axes run superior, posterior and to the patient's left.
        organs: uint8 (K, J, I), 0 or 1-based index into :data:`progidiff.synthesis.tissues.ORGANS`.
        affine: (4, 4), IJK to RAS in mm.
    """

    hu: np.ndarray
    organs: np.ndarray
    affine: np.ndarray


def _field(shape: tuple[int, int, int], cells: tuple[int, int, int], generator: torch.Generator) -> Tensor:
    """Smooth random field (D, H, W) of unit standard deviation."""
    coarse = normal((1, 1, *(c + 3 for c in cells)), generator)
    fine = F.interpolate(
        coarse, size=tuple(int(s * (c + 3) / c) for s, c in zip(shape, cells, strict=True)), mode="trilinear"
    )[0, 0]
    start = [(f - s) // 2 for f, s in zip(fine.shape, shape, strict=True)]
    field = fine[tuple(slice(o, o + s) for o, s in zip(start, shape, strict=True))]
    return field / field.std()


def paint_volume(
    volume: LabelVolume,
    spacing: tuple[float, float, float] = (3.0, 1.5, 1.5),
    shape: tuple[int, int, int] = (28, 176, 224),
    body_width_mm: float = 290.0,
    seed: int = 7,
) -> PaintedVolume:
    """Paint a portal venous CT on a label volume, warped so that its anatomy is not the atlas's own.

    Args:
        volume: the label volume.
        spacing: mm along z, rows, columns.
        shape: voxels along z, rows, columns.
        body_width_mm: width of the muscular wall after scaling.
        seed: everything random follows from it.
    """
    generator = torch.Generator().manual_seed(seed)
    tissues, outline = _warped(volume, spacing, shape, body_width_mm, generator)
    hu = _paint(tissues, outline, shape, generator)
    organs = torch.where(tissues <= len(ORGANS), tissues, torch.zeros_like(tissues))
    affine = np.diag([-spacing[2], -spacing[1], spacing[0], 1.0])
    affine[:3, 3] = [spacing[2] * (shape[2] - 1) / 2, spacing[1] * (shape[1] - 1) / 2, 0.0]
    return PaintedVolume(hu.round().to(torch.int16).numpy(), organs.to(torch.uint8).numpy(), affine)


def _warped(
    volume: LabelVolume,
    spacing: tuple[float, float, float],
    shape: tuple[int, int, int],
    body_width_mm: float,
    generator: torch.Generator,
) -> tuple[Tensor, Tensor]:
    """Tissue indices and body outline of the warped label volume on the sample's grid."""
    inside = volume.wall[volume.slices] < 0
    rows, cols = np.flatnonzero(inside.any((0, 2))), np.flatnonzero(inside.any((0, 1)))
    scale = (cols[-1] - cols[0] + 1) * volume.spacing[2] / body_width_mm
    # a little below the middle: the atlas leaves the lungs above the dome of the liver unlabelled
    centre = (
        (volume.slices[0] + volume.slices[-1]) / 2 - 8 / volume.spacing[0],
        (rows[0] + rows[-1]) / 2,
        (cols[0] + cols[-1]) / 2,
    )
    axes = [(torch.arange(n) - (n - 1) / 2) * mm * scale for n, mm in zip(shape, spacing, strict=True)]
    axes[0] = axes[0] / scale
    mm = torch.stack(torch.meshgrid(*axes, indexing="ij"), -1)
    for cells, amount in (((2, 3, 3), 6.0), ((3, 6, 6), 3.0)):
        mm = mm + torch.stack([_field(shape, cells, generator) for _ in range(3)], -1) * amount
    voxel = mm / torch.tensor(volume.spacing) + torch.tensor(centre)
    limit = torch.tensor(volume.tissues.shape) - 1.0
    grid = (voxel / limit * 2 - 1).flip(-1)[None].float()

    def at(values: np.ndarray, mode: str) -> Tensor:
        source = torch.from_numpy(values.astype(np.float32))[None, None]
        return F.grid_sample(source, grid, mode=mode, padding_mode="border", align_corners=True)[0, 0]

    excess = (torch.maximum(-voxel, voxel - limit)[..., 1:].clamp_min(0) * torch.tensor(volume.spacing[1:])).sum(-1)
    tissues = at(volume.tissues, "nearest").round().long()
    tissues[excess > 0] = 0
    return tissues, at(volume.wall, "bilinear") + excess


def _paint(tissues: Tensor, outline: Tensor, shape: tuple[int, int, int], generator: torch.Generator) -> Tensor:
    """Hounsfield units of a tissue volume."""
    mean = torch.tensor([t.hu[PORTAL_VENOUS] for t in TISSUES])
    spread = torch.tensor([t.spread for t in TISSUES])
    lut = mean + normal((len(TISSUES),), generator) * spread * 0.4
    lut[INDEX["left kidney"]] = lut[INDEX["right kidney"]]
    hu = lut[tissues]
    empty = tissues == 0
    hu = torch.where(empty & (outline >= 14), torch.full_like(hu, AIR), hu)
    hu = torch.where(empty & (outline >= 14) & (outline < 16.5), torch.full_like(hu, 10.0), hu)
    loops = _field(shape, (5, 14, 16), generator)
    hu = torch.where(empty & (outline < -8) & (loops > 0.9), 35 + 10 * loops, hu)
    kidney = (tissues == INDEX["left kidney"]) | (tissues == INDEX["right kidney"])
    depth = F.avg_pool3d(kidney.float()[None, None], (3, 9, 9), 1, (1, 4, 4))[0, 0]
    hu = hu - 45 * (kidney & (depth > 0.85))
    gut = (tissues == INDEX["stomach"]) | (tissues == INDEX["bowel"])
    rise = torch.linspace(1.5, -1.5, shape[1])[None, :, None]
    hu = torch.where(gut & (_field(shape, (4, 12, 14), generator) + rise > 1.9), torch.full_like(hu, -850.0), hu)
    vessel = _field(shape, (8, 20, 24), generator).abs() < 0.06
    hu = hu + 28 * (vessel & (tissues == INDEX["liver"]))
    hu = hu + (tissues > 0) * (_field(shape, (6, 12, 14), generator) * 5)
    blurred = F.avg_pool3d(hu[None, None], (1, 3, 3), 1, (0, 1, 1), count_include_pad=False)[0, 0]
    noise = F.avg_pool3d(normal((1, 1, *shape), generator), (1, 3, 3), 1, (0, 1, 1))[0, 0]
    return (blurred + noise / noise.std() * 11 + uniform((1,), -2, 2, generator)).clamp(-1024, 1500)
