"""What the values of a volume look like: those of a CT, and whether they can be Hounsfield units. Numpy alone."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

import numpy as np

#: Percentiles are taken of about this many voxels; a regular part of a large volume gives the same ones.
_SAMPLE = 4_000_000
#: Fat lies near -100 HU and fills more than 2 % of any slice of a body; MR and ultrasound hold no such negative values.
_CT_BELOW = -50.0
#: What is displayed of an abdomen, in Hounsfield units: what values that were scaled for display are taken for.
WINDOW = (-160.0, 240.0)
#: Shares of voxels: fewer are noise, so many are a part of the picture.
_FEW, _SOME = 0.001, 0.01
#: Soft tissue, fat to contrast-filled vessels, in Hounsfield units.
_TISSUE = (-150.0, 250.0)


@dataclass(frozen=True)
class NotHounsfield:
    """Values of a CT that cannot be Hounsfield units.

    Attributes:
        looks: what they look like, as a part of a sentence.
        scale, offset: Hounsfield units are ``scale * values + offset``; a scale of 0 stands for not known.
    """

    looks: str
    scale: float = 0.0
    offset: float = 0.0

    @property
    def known(self) -> bool:
        """Whether they can be corrected."""
        return self.scale > 0

    @property
    def warning(self) -> str:
        """What a person should know."""
        then = "They should be corrected." if self.known else "Convert them first."
        return f"The values of a CT cannot be Hounsfield units; they look like {self.looks}. {then}"

    def corrected(self, values: np.ndarray) -> np.ndarray:
        """The values in Hounsfield units, float32 of the same shape; as they are where that is not known."""
        found = np.asarray(values, np.float32)
        return found * np.float32(self.scale) + np.float32(self.offset) if self.known else found


def likely_modality(array: np.ndarray) -> Literal["CT", "MR"]:
    """CT where the values reach down to fat and air in Hounsfield units, otherwise MR (which is scaled by percentiles)."""
    return "CT" if float(np.percentile(sample(array), 2)) < _CT_BELOW else "MR"


def not_hounsfield(array: np.ndarray) -> NotHounsfield | None:
    """What the values of a CT are where they cannot be Hounsfield units; ``None`` where they can.

    A body has fat and lungs or is surrounded by air, all of which are negative. A part of an organ may have no negative
    value, but then it has those of soft tissue.
    """
    values = sample(array).reshape(-1)
    low, high = float(values.min()), float(values.max())
    if np.mean(values < _CT_BELOW) > _FEW or not high > low:
        return None
    largest = 1.0 if low >= -0.01 and high <= 1.01 else 255.0
    # an organ cut out of its body has zeros around it as well, but hardly ever a 255
    if largest == 1.0 or (low == 0 and high == largest and np.mean(values == 0) > _SOME):
        return _scaled(largest, saturated=bool(np.mean(values >= high) > _FEW))
    inside = values[values > 200]
    shifted = (inside > 1000 + _TISSUE[0]) & (inside < 1024 + _TISSUE[1])
    if inside.size and shifted.sum() > 0.1 * values.size and shifted.mean() > 0.5:
        added = _added(values)
        return NotHounsfield(f"Hounsfield units with {added} added", 1.0, -float(added))
    if np.percentile(values, 75) > 3100:
        return NotHounsfield("numbers in a unit of their own")
    return None


def sample(array: np.ndarray) -> np.ndarray:
    """Every slice of an array (slices, rows, columns), thinned within the slices when there are very many voxels.

    A plain list of voxels is taken as it is.
    """
    inner = array.ndim - 1
    if inner == 0:
        return array
    step = int(np.ceil(max(1.0, array.size / _SAMPLE) ** (1 / inner)))
    return array[(slice(None), *(slice(None, None, step),) * inner)]


def _scaled(largest: float, saturated: bool) -> NotHounsfield:
    """Bone and contrast are cut off where an abdomen was windowed for display; over a wider range nothing is."""
    span = f"grey values from 0 to {largest:g}"
    if not saturated:
        return NotHounsfield(f"{span} over a range that is not known")
    low, high = WINDOW
    return NotHounsfield(f"{span}, as windowed for display from {low:g} to {high:g} HU", (high - low) / largest, low)


def _added(values: np.ndarray) -> int:
    """What was added: scanners store 1024 more; with 1000 more, air is 0 and not 24."""
    air = values[(values > 0) & (values < 100)]
    if air.size <= _SOME * values.size:
        return 1024
    counts, edges = np.histogram(air, bins=25, range=(0, 100))
    return 1000 if edges[counts.argmax()] < 12 else 1024
