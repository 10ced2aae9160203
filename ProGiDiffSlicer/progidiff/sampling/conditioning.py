"""What the denoiser is told, encoded once per prompt and once per slice, and whether a target is on a slice at all.

Presence is asked of the image encoder's segmentation head before proposals are sampled.
The denoiser draws an organ wherever it is told to: it is trained to draw masks, and hardly ever answers with an empty one.
The image encoder's segmentation head sees the same features and knows better. A proposal's mask is drawn in two parts, then:
first whether the target is there, then, if so, where. Each proposal has a threshold of its own for the first part, the same
on all slices of a volume: a bold proposal follows the organ to its last doubtful slice, a cautious one ends earlier, and
neither has holes that come and go from slice to slice by chance.
"""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Callable, Mapping
from dataclasses import dataclass

import torch
from torch import Tensor

from progidiff.cards import Modality
from progidiff.model.folder import ProGiDiffModel
from progidiff.model.networks import encode_text, tokenize

#: Area over which the presence of a target is judged; a third of a cross-section of the smallest organs.
PRESENCE_MM2 = 50.0
#: Mean probability over that area from which a target counts as there for certain, so that a quarter is an even chance. This
#: leans towards drawing: an organ that is left out is worse for its reader than one proposal too many.
_CERTAIN = 0.5


def presence_of(logits: Tensor, pixel_mm: float) -> Tensor:
    """How likely targets are there, in [0, 1]: twice the mean probability of their likeliest 50 mm², at most 1.

    Args:
        logits: (V, S, S) of the segmentation head on one slice.
        pixel_mm: pixel size of the model's grid.

    Returns:
        float32 (V,), on the CPU.
    """
    pixels = max(1, round(PRESENCE_MM2 / pixel_mm**2))
    likeliest = logits.float().flatten(1).topk(min(pixels, logits[0].numel()), dim=1).values
    return (torch.sigmoid(likeliest).mean(1) / _CERTAIN).clamp_max(1.0).cpu()


def presence_threshold(proposal: int) -> float:
    """Presence above which proposal number ``proposal`` shows a target, in (0, 1).

    Van der Corput's sequence in base 2: the first one decides at even odds, and whatever the number of proposals, the share
    of them that show the target is its presence as near as that number allows.
    """
    value, digit, rest = 0.0, 0.5, proposal + 1
    while rest:
        value += digit * (rest & 1)
        rest, digit = rest >> 1, digit / 2
    return value


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
