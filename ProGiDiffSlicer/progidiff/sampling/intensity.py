"""From scanner values to the [0, 1] that the model was trained on."""

from __future__ import annotations

from collections.abc import Callable

import numpy as np

from progidiff.cards import Modality, ModelCard
from progidiff.errors import InputError
from progidiff.volumes.values import sample

Normaliser = Callable[[np.ndarray], np.ndarray]


def normaliser(array: np.ndarray, card: ModelCard, modality: Modality) -> Normaliser:
    """Function that brings slices of a volume to float32 in [0, 1], by the window that the model's card gives.

    Args:
        array: the volume (slices, rows, columns), or its voxels (n,); percentiles are taken of all of it, so that its slices
            stay comparable.
        card: the model's card.
        modality: the volume's modality.

    Raises:
        InputError: the percentiles of the volume coincide.
        ModelError: the model was not made for this modality.
    """
    window = card.window(modality)
    low, high = window.low, window.high
    if window.kind == "percentile":
        low, high = (float(v) for v in np.percentile(sample(array), [window.low, window.high]))
    if not high > low:
        raise InputError("The image is uniform where the organs should be; choose an image with contrast.")
    scale = 1.0 / (high - low)
    return lambda values: np.clip((values.astype(np.float32) - low) * scale, 0, 1)
