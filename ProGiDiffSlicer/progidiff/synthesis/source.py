"""The synthetic training source: batches of painted slices with their tissue maps, on any device."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from progidiff.synthesis import painting
from progidiff.synthesis.fields import normal, plane_coordinates, sample_volume, uniform
from progidiff.synthesis.labelmaps import LabelVolume
from progidiff.synthesis.phantoms import phantom_tissues
from progidiff.synthesis.tissues import ORGANS

#: Width of the muscular wall of adults, fat not counted, in mm.
BODY_WIDTH_MM = (235.0, 345.0)


@dataclass(frozen=True)
class SyntheticBatch:
    """Painted slices.

    Attributes:
        images: float32 (B, 1, S, S) in [0, 1].
        organs: int64 (B, S, S), 0 or 1-based index into :data:`progidiff.synthesis.tissues.ORGANS`.
    """

    images: Tensor
    organs: Tensor


class SyntheticSource:
    """Draws slices from label volumes and procedural phantoms, warps them in 3-D and paints them.

    Args:
        volumes: label volumes; empty for phantoms only.
        size: pixels per side of a slice.
        pixel_mm: pixel size in mm.
        device: where batches are made.
        seed: seed of this source's own generator.
        phantom_share: share of procedural phantoms when there are label volumes.
        strength: strength of the geometric augmentation, 0 to 1.
    """

    def __init__(
        self,
        volumes: Sequence[LabelVolume],
        size: int = 160,
        pixel_mm: float = 2.4,
        device: torch.device | str = "cpu",
        seed: int = 0,
        phantom_share: float = 0.12,
        strength: float = 1.0,
    ) -> None:
        self.size, self.pixel_mm, self.strength = size, pixel_mm, strength
        self.generator = torch.Generator(device=device).manual_seed(seed)
        self.device = self.generator.device
        self.volumes = list(volumes)
        self._tissues = [torch.from_numpy(v.tissues).to(self.device) for v in self.volumes]
        self._outlines = [torch.from_numpy(v.outline).to(self.device) for v in self.volumes]
        self._images = [None if v.image is None else torch.from_numpy(v.image).to(self.device) for v in self.volumes]
        self._bodies = [self._body(v) for v in self.volumes]
        weights = [0.5 if v.image is None else 0.3 if v.modality == "CT" else 0.2 for v in self.volumes]
        total = sum(weights) or 1.0
        shares = [phantom_share if self.volumes else 1.0, *[(1 - phantom_share) * w / total for w in weights]]
        self._shares = torch.tensor(shares, device=self.device)

    def state(self) -> Tensor:
        """State of the generator, for checkpoints that resume exactly."""
        return self.generator.get_state()

    def restore(self, state: Tensor) -> None:
        """Continue from a generator state."""
        self.generator.set_state(state)

    def batch(self, count: int) -> SyntheticBatch:
        """A batch of ``count`` painted slices."""
        which = torch.multinomial(self._shares, count, True, generator=self.generator)
        images = torch.empty(count, self.size, self.size, device=self.device)
        organs = torch.empty(count, self.size, self.size, dtype=torch.int64, device=self.device)
        for kind in which.unique().tolist():
            rows = torch.nonzero(which == kind)[:, 0]
            image, tissue = self._phantoms(len(rows)) if kind == 0 else self._slices(kind - 1, len(rows))
            images[rows] = image
            organs[rows] = torch.where(tissue <= len(ORGANS), tissue, torch.zeros_like(tissue))
        return SyntheticBatch(painting.finish(images, self.generator)[:, None], organs)

    def _phantoms(self, count: int) -> tuple[Tensor, Tensor]:
        tissues, outline = phantom_tissues(count, self.size, self.pixel_mm, self.generator)
        return self._paint(tissues, outline), tissues

    def _slices(self, index: int, count: int) -> tuple[Tensor, Tensor]:
        volume = self.volumes[index]
        spacing = torch.tensor(volume.spacing, device=self.device)
        chosen = volume.slices
        if float(uniform((1,), 0, 1, self.generator)) < 0.06:
            chosen = np.arange(volume.tissues.shape[0])
        pick = torch.randint(0, len(chosen), (count,), generator=self.generator, device=self.device)
        z = torch.from_numpy(np.ascontiguousarray(chosen)).to(self.device)[pick].float()
        z = z + uniform((count,), -0.5, 0.5, self.generator)
        row, column, width = self._bodies[index]
        scale = width / uniform((count,), *BODY_WIDTH_MM, self.generator)
        offsets = plane_coordinates(count, self.size, self.pixel_mm, scale, self.generator, self.strength)
        origin = torch.stack([z, torch.full_like(z, row), torch.full_like(z, column)], -1)
        voxel = offsets / spacing + origin[:, None, None, :]
        tissues = sample_volume(self._tissues[index], voxel, nearest=True).round().long()
        # Above and below the volume the border slice goes on; beside it there is nothing.
        limits = torch.tensor(volume.tissues.shape[1:], device=self.device) - 1.0
        excess = torch.maximum(-voxel[..., 1:], voxel[..., 1:] - limits).clamp_min(0) * spacing[1:]
        beside = (excess > 0).any(-1)
        tissues[beside] = 0
        outline = sample_volume(self._outlines[index], voxel, nearest=False)
        outline = torch.where(beside, outline.clamp_min(-4) + excess.sum(-1), outline)
        image = self._images[index]
        real = float(uniform((1,), 0, 1, self.generator)) < 0.5
        if image is None or not real:
            tissues = painting.drop_organs(tissues, self.generator)
            return self._paint(tissues, outline), tissues
        pixels = sample_volume(image, voxel, nearest=False)
        if volume.modality == "CT":
            pixels = torch.where(beside, torch.full_like(pixels, painting.AIR), pixels)
            return self._recolour(pixels, tissues), tissues
        low, high = (torch.quantile(pixels.flatten(1), q, dim=1)[:, None, None] for q in (0.01, 0.99))
        x = ((pixels - low) / (high - low).clamp_min(1e-3)).clamp(0, 1)
        flip = (uniform((count, 1, 1), 0, 1, self.generator) < 0.3) & (x > 0.05)
        return painting.mr_look(torch.where(flip, 1 - x, x), self.generator), tissues

    @staticmethod
    def _body(volume: LabelVolume) -> tuple[float, float, float]:
        """Centre (row, column) of the body in voxels and its width in mm."""
        inside = volume.outline[volume.slices] < 0
        rows, cols = np.flatnonzero(inside.any((0, 2))), np.flatnonzero(inside.any((0, 1)))
        width = float(cols[-1] - cols[0] + 1) * volume.spacing[2]
        return float(rows[0] + rows[-1]) / 2, float(cols[0] + cols[-1]) / 2, width

    def _recolour(self, hu: Tensor, tissues: Tensor) -> Tensor:
        """A real CT in another contrast phase: each organ's mean moves, its texture stays."""
        count = len(hu)
        shift = normal((count, 32), self.generator) * 30
        shift[:, 0] = normal((count,), self.generator) * 8
        shift = shift * (uniform((count, 1), 0, 1, self.generator) < 0.7)
        moved = hu + torch.gather(shift, 1, tissues.flatten(1)).view_as(hu) * (hu > -300)
        look = float(uniform((1,), 0, 1, self.generator))
        if look < 0.75:
            return painting.ct_look(moved, self.generator)
        return painting.mr_look(painting.mr_curve(moved, self.generator), self.generator)

    def _paint(self, tissues: Tensor, outline: Tensor) -> Tensor:
        hu = painting.paint_attenuation(tissues, outline, self.generator)
        look = float(uniform((1,), 0, 1, self.generator))
        if look < 0.6:
            return painting.ct_look(hu, self.generator)
        if look < 0.8:
            return painting.mr_look(painting.mr_curve(hu, self.generator), self.generator)
        return painting.mr_look(painting.random_contrast(hu, tissues, self.generator), self.generator)
