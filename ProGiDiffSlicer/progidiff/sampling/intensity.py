"""From scanner values to the [0, 1] that the model was trained on."""

from __future__ import annotations

from collections.abc import Callable

import numpy as np

from progidiff.errors import InputError
from progidiff.model.card import Modality, ModelCard


def guess_modality(array: np.ndarray) -> Modality:
    """CT where the values reach down to air in Hounsfield units, otherwise MR (which is scaled by percentiles)."""
    sample = array[:: max(1, array.shape[0] // 8)]
    return "CT" if float(np.percentile(sample, 2)) < -150 else "MR"


def normaliser(array: np.ndarray, card: ModelCard, modality: Modality) -> Callable[[np.ndarray], np.ndarray]:
    """Function that brings slices of a volume to float32 in [0, 1], by the window that the model's card gives.

    Args:
        array: the volume (K, J, I); percentiles are taken of all of it, so that its slices stay comparable.
        card: the model's card.
        modality: the volume's modality.

    Raises:
        InputError: the volume is uniform.
    """
    window = card.window(modality)
    low, high = window.low, window.high
    if window.kind == "percentile":
        # A volume of the usual size has millions of voxels; a regular tenth of them gives the same percentiles.
        flat = array.reshape(-1)
        low, high = (float(v) for v in np.percentile(flat[:: max(1, flat.size // 2_000_000)], [window.low, window.high]))
    if not high > low:
        raise InputError("The image is uniform where the organs should be; choose an image with contrast.")
    scale = 1.0 / (high - low)
    return lambda values: np.clip((values.astype(np.float32) - low) * scale, 0, 1)
