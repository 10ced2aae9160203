"""What is sampled from: a phantom CT of usual matrix size, and its slices as the model sees them."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from progidiff.sampling.engine import Engine
from progidiff.sampling.noise import proposal_noise
from progidiff.synthesis.painting import paint_attenuation
from progidiff.synthesis.phantoms import phantom_tissues
from progidiff.volumes.slicing import extract_slice

#: Runs take these slices in turn, so that consecutive runs never find their slice encoded already.
SLICES = 4
SLICE_MM = 5.0
FIELD_MM = 400.0
#: What lies beyond the model's grid is far outside of every mask; the value that the engine uses.
OUTSIDE = -20.0


@dataclass(frozen=True)
class Scene:
    """An engine with its current image, and the target asked for.

    Attributes:
        engine: engine whose current image is the volume.
        target: canonical name of the target.
        array: int16 (K, J, I), HU.
        affine: (4, 4), IJK to RAS in mm.
        modality: modality that the engine is told.
    """

    engine: Engine
    target: str
    array: np.ndarray
    affine: np.ndarray
    modality: str

    @classmethod
    def make(cls, engine: Engine, size: int = 512) -> Scene:
        """A phantom of ``size`` × ``size`` pixels as the engine's current image; the liver where the model knows it."""
        card = engine.card
        target = "liver" if "liver" in card.vocabulary or not card.vocabulary else card.vocabulary[0]
        pixel = FIELD_MM / size
        generator = torch.Generator().manual_seed(0)
        tissues, outline = phantom_tissues(SLICES, size, pixel, generator)
        hu = paint_attenuation(tissues, outline, generator).round().clamp(-1024, 3000)
        affine = np.diag([-pixel, -pixel, SLICE_MM, 1.0])
        modality = "CT" if "CT" in card.modalities else "MR"
        scene = cls(engine, target, hu.to(torch.int16).numpy(), affine, modality)
        scene.set_image()
        return scene

    @property
    def prompt(self) -> str:
        """The target in the card's prompt template."""
        return self.engine.card.prompt(self.target)

    def set_image(self) -> None:
        """Make the volume the engine's image anew: nothing of its slices is encoded yet."""
        self.engine.set_image(self.array, self.affine, self.modality)

    def model_image(self, index: int) -> Tensor:
        """A slice on the model's grid, (1, 1, S, S) in [0, 1], made by the engine's own steps."""
        image = self.engine._image
        assert image is not None
        canonical = np.ascontiguousarray(extract_slice(image.array, image.plan, index))
        pixels = torch.from_numpy(image.normalise(canonical)).to(self.engine.model.device)
        return image.grid.to_model(pixels)

    def native_masks(self, logits: Tensor) -> np.ndarray:
        """Masks at the slice's own pixels, bool (n, H, W), of logits (n, S, S) on the model's grid."""
        image = self.engine._image
        assert image is not None
        return np.asarray((image.grid.from_model(logits, outside=OUTSIDE) > 0).cpu().numpy())

    def noise(self, index: int, seed: int, proposals: int) -> Tensor:
        """The engine's noise of proposals 0 to ``proposals`` - 1 on a slice, float32 (proposals, C, h, w), on the model's device."""
        model = self.engine.model
        side = self.engine.card.image_size // model.stride
        shape = (model.unet.config.in_channels, side, side)
        fields = [proposal_noise(seed, self.target, p, index * SLICE_MM, shape) for p in range(proposals)]
        return torch.stack(fields).to(model.device)
