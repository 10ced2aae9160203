"""From scanner values to the [0, 1] that the model was trained on."""

from __future__ import annotations

from collections.abc import Callable

import numpy as np

from progidiff.errors import InputError
from progidiff.model.card import Modality, ModelCard

Normaliser = Callable[[np.ndarray], np.ndarray]

#: Percentiles are taken of about this many voxels; a regular part of a large volume gives the same ones.
_SAMPLE = 4_000_000
#: Fat lies near -100 HU and fills more than 2 % of any slice of a body; MR and ultrasound hold no such negative values.
_CT_BELOW = -50.0


def guess_modality(array: np.ndarray) -> Modality:
    """CT where the values reach down to fat and air in Hounsfield units, otherwise MR (which is scaled by percentiles)."""
    return "CT" if float(np.percentile(_sample(array), 2)) < _CT_BELOW else "MR"


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
        low, high = (float(v) for v in np.percentile(_sample(array), [window.low, window.high]))
    if not high > low:
        raise InputError("The image is uniform where the organs should be; choose an image with contrast.")
    scale = 1.0 / (high - low)
    return lambda values: np.clip((values.astype(np.float32) - low) * scale, 0, 1)


def _sample(array: np.ndarray) -> np.ndarray:
    """Every slice of an array (slices, rows, columns), thinned within the slices when there are very many voxels.

    A plain list of voxels is taken as it is.
    """
    inner = array.ndim - 1
    if inner == 0:
        return array
    step = int(np.ceil(max(1.0, array.size / _SAMPLE) ** (1 / inner)))
    return array[(slice(None), *(slice(None, None, step),) * inner)]
