"""What the denoiser is told: encoded once per prompt and once per slice, never per step."""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Callable, Mapping
from dataclasses import dataclass

import torch
from torch import Tensor

from progidiff.cards import Modality
from progidiff.model.folder import ProGiDiffModel
from progidiff.model.networks import encode_text, tokenize
from progidiff.sampling.presence import presence_of

#: Slices whose features are kept: those of one batch, those that adaptive sampling comes back to, and those a user steps
#: between.
FEATURES_KEPT = 64


@dataclass(frozen=True)
class PromptCode:
    """A prompt as the networks read it: hidden states (1, L, D) and their mean over real tokens (1, D)."""

    states: Tensor
    pooled: Tensor


class Conditioner:
    """Codes of prompts, kept for the model's lifetime, and of the current image's latest :data:`FEATURES_KEPT` slices."""

    def __init__(self, model: ProGiDiffModel) -> None:
        self._model = model
        self._prompts: dict[str, PromptCode] = {}
        self._features: OrderedDict[int, Tensor] = OrderedDict()
        self._presence: dict[int, dict[str, float]] = {}

    @torch.inference_mode()
    def prompt(self, target: str, modality: Modality) -> PromptCode:
        """Text code of a target, in the card's prompt template."""
        text = self._model.card.prompt(target, modality)
        if text not in self._prompts:
            tokens = tokenize(self._model.tokenizer, [text], self._model.device)
            self._prompts[text] = PromptCode(*encode_text(self._model.text_encoder, *tokens))
        return self._prompts[text]

    def forget_slices(self) -> None:
        """Forget the slices; for another image or other weights."""
        self._features.clear()
        self._presence.clear()

    @torch.inference_mode()
    def features(self, index: int, pixels: Callable[[], Tensor]) -> Tensor:
        """Image features (1, F, h, w) of slice ``index``, made from ``pixels()`` (1, 1, S, S) at the first time."""
        if index not in self._features:
            self._features[index] = self._model.image_encoder(pixels().to(self._model.device, self._model.dtype))
            while len(self._features) > FEATURES_KEPT:
                self._features.popitem(last=False)
        self._features.move_to_end(index)
        return self._features[index]

    @torch.inference_mode()
    def presence(self, index: int, pixels: Callable[[], Tensor], pixel_mm: float) -> Mapping[str, float]:
        """How likely each target is on slice ``index``, in [0, 1]; empty for a model without a segmentation head.

        ``pixel_mm`` is the pixel size of the model's grid on the slice.
        """
        encoder, card = self._model.image_encoder, self._model.card
        if not encoder.config.classes:
            return {}
        if index not in self._presence:
            logits = encoder.segment(self.features(index, pixels))[0]
            self._presence[index] = dict(zip(card.vocabulary, presence_of(logits, pixel_mm).tolist(), strict=True))
        return self._presence[index]

    @torch.inference_mode()
    def hint(self, features: Tensor, prompt: PromptCode) -> Tensor:
        """Hint of one slice's features (1, F, h, w) for one prompt: (1, hint channels, h, w)."""
        return self._model.image_encoder.hint(features, prompt.pooled.to(features.dtype))


@torch.inference_mode()
def predict(model: ProGiDiffModel, noisy: Tensor, timestep: Tensor, states: Tensor, hint: Tensor) -> Tensor:
    """The frozen UNet's prediction under the control branch.

    Args:
        model: the loaded model.
        noisy: (B, C, h, w) in the model's dtype.
        timestep: int64 (B,).
        states: (B, L, D) text states.
        hint: (B, hint channels, h, w); it stands in place of diffusers' condition image.

    Returns:
        (B, C, h, w) in the model's dtype.
    """
    down, mid = model.controlnet(noisy, timestep, states, hint, return_dict=False)
    return model.unet(
        noisy,
        timestep,
        states,
        down_block_additional_residuals=list(down),
        mid_block_additional_residual=mid,
        return_dict=False,
    )[0]
