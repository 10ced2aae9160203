"""Whether a target is on a slice at all, asked of the image encoder's segmentation head before proposals are sampled.

The denoiser draws an organ wherever it is told to: it is trained to draw masks, and hardly ever answers with an empty one.
The image encoder's segmentation head sees the same features and knows better. A proposal's mask is drawn in two parts, then:
first whether the target is there, then, if so, where. Each proposal has a threshold of its own for the first part, the same
on all slices of a volume: a bold proposal follows the organ to its last doubtful slice, a cautious one ends earlier, and
neither has holes that come and go from slice to slice by chance.
"""

from __future__ import annotations

import torch
from torch import Tensor

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
