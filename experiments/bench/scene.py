"""What is sampled from: a phantom CT of the usual matrix size, and its slices as the model sees them."""

from __future__ import annotations

from dataclasses import dataclass, field
from itertools import count

import numpy as np
import torch
from torch import Tensor

from progidiff.errors import ModelError
from progidiff.model.folder import ProGiDiffModel
from progidiff.sampling.denoise import proposal_noise
from progidiff.sampling.image import OUTSIDE, LoadedImage, load_image
from progidiff.synthesis.painting import AIR, Anatomy, paint_attenuation
from progidiff.synthesis.phantoms import phantom_tissues

#: Runs take these slices in turn.
SLICES = 4
SLICE_MM = 5.0
PLANE = "axial"
FIELD_MM = 400.0


@dataclass(frozen=True)
class Scene:
    """A phantom, made ready for one model.

    Attributes:
        model: the model that samples.
        target: canonical name of the target asked for.
        array: int16 (K, J, I), HU.
        affine: (4, 4), IJK to RAS in mm.
        modality: modality that engines are told.
        image: the phantom as the engine makes it ready.
    """

    model: ProGiDiffModel
    target: str
    array: np.ndarray
    affine: np.ndarray
    modality: str
    image: LoadedImage
    _numbers: count[int] = field(default_factory=count)

    @classmethod
    def make(cls, model: ProGiDiffModel, size: int = 512) -> Scene:
        """A phantom of ``size`` × ``size`` pixels; the target is the liver where the model knows it.

        Raises:
            ModelError: the model has no vocabulary.
        """
        card = model.card
        if not card.vocabulary:
            raise ModelError(f'The model "{card.model_id}" knows no target yet; choose a trained one.')
        target = "liver" if "liver" in card.vocabulary else card.vocabulary[0]
        pixel = FIELD_MM / size
        generator = torch.Generator().manual_seed(0)
        pixels = torch.full((SLICES,), pixel)
        tissues, wall = phantom_tissues(SLICES, (size, size), pixels, generator, torch.linspace(130, 155, SLICES))
        painted = paint_attenuation(Anatomy(tissues, wall, wall - 20, pixels), generator)
        array = painted.hu.round().clamp(-1024, 3000).to(torch.int16).numpy()
        affine = np.diag([-pixel, -pixel, SLICE_MM, 1.0])
        modality = "CT" if "CT" in card.modalities else "MR"
        return cls(model, target, array, affine, modality, load_image(array, affine, modality, PLANE, card))

    @property
    def prompt(self) -> str:
        """The target in the card's prompt template."""
        return self.model.card.prompt(self.target, self.image.modality)

    def new_volume(self) -> np.ndarray:
        """The phantom with another value of air in a corner voxel, so that nothing known of an earlier one can be used."""
        array = self.array.copy()
        array[0, 0, 0] = int(AIR) - next(self._numbers) % 24
        return array

    def pixels(self, index: int) -> Tensor:
        """A slice on the model's grid, (1, 1, S, S) in [0, 1], on the model's device and in its dtype."""
        return self.image.pixels(index).to(self.model.device, self.model.dtype)

    def native_masks(self, logits: Tensor) -> np.ndarray:
        """Masks at the slice's own pixels, bool (n, H, W), of logits (n, S, S) on the model's grid."""
        return np.asarray((self.image.grid.from_model(logits, outside=OUTSIDE) > 0).cpu().numpy())

    def noise(self, index: int, seed: int, proposals: int) -> Tensor:
        """The engine's noise of the first ``proposals`` proposals on a slice, float32 (proposals, C, h, w)."""
        rows, columns = (side // self.model.stride for side in self.image.grid.size)
        shape = (self.model.unet.config.in_channels, rows, columns)
        position = self.image.position_mm(index)
        fields = [proposal_noise(seed, self.target, p, position, shape) for p in range(proposals)]
        return torch.stack(fields).to(self.model.device)
