"""What the denoiser is told: encoded once per prompt and once per slice, never per step."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from progidiff.model.folder import ProGiDiffModel
from progidiff.training.stages import encode_text, tokenize


@dataclass(frozen=True)
class PromptCode:
    """A prompt as the networks read it: hidden states (1, L, D) and their mean (1, D)."""

    states: Tensor
    pooled: Tensor


class Conditioner:
    """Encodes prompts (kept for the model's lifetime) and slices."""

    def __init__(self, model: ProGiDiffModel) -> None:
        self._model = model
        self._prompts: dict[str, PromptCode] = {}

    def prompt(self, target: str) -> PromptCode:
        """Text code of a target, in the card's prompt template."""
        if target not in self._prompts:
            text = self._model.card.prompt(target)
            tokens = tokenize(self._model.tokenizer, [text], self._model.device)
            self._prompts[target] = PromptCode(*encode_text(self._model.text_encoder, *tokens))
        return self._prompts[target]

    def features(self, images: Tensor) -> Tensor:
        """Image features of slices (B, 1, S, S) in [0, 1]: (B, F, h, w)."""
        return self._model.image_encoder(images.to(self._model.device, self._model.dtype))

    def hint(self, features: Tensor, target: str) -> Tensor:
        """Hint of one slice (1, F, h, w) for one prompt: (1, hint channels, h, w)."""
        return self._model.image_encoder.hint(features, self.prompt(target).pooled.to(features.dtype))


def control_residuals(
    model: ProGiDiffModel, noisy: Tensor, timestep: Tensor, states: Tensor, hint: Tensor
) -> tuple[list[Tensor], Tensor]:
    """Residuals of the control branch for the frozen UNet; the hint stands in place of diffusers' condition image."""
    down, mid = model.controlnet(noisy, timestep, states, hint, return_dict=False)
    return list(down), mid


@torch.inference_mode()
def predict(model: ProGiDiffModel, noisy: Tensor, timestep: Tensor, states: Tensor, hint: Tensor) -> Tensor:
    """The frozen UNet's prediction under the control branch, (B, C, h, w)."""
    down, mid = control_residuals(model, noisy, timestep, states, hint)
    return model.unet(
        noisy,
        timestep,
        states,
        down_block_additional_residuals=down,
        mid_block_additional_residual=mid,
        return_dict=False,
    )[0]
