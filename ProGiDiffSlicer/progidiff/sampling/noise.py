"""Initial noise: one field per proposal for the whole stack, whatever the batch, the device or the number of proposals."""

from __future__ import annotations

import hashlib
import math
from functools import lru_cache

import numpy as np
import torch
from torch import Tensor

#: Distance in mm over which a proposal's noise turns into an independent one. Slices a few millimetres apart share almost
#: all of their noise, so that proposal 3 on one slice goes on as proposal 3 on the next.
ANCHOR_MM = 60.0


@lru_cache(maxsize=512)
def _anchor(seed: int, target: str, proposal: int, index: int, shape: tuple[int, ...]) -> Tensor:
    """Gaussian field of one anchor plane, drawn on the CPU so that every device gets the same numbers.

    Philox takes a key of 128 bits. torch's own CPU generator keeps 32 bits of its seed, with which two of some ten
    thousand fields would coincide.
    """
    key = hashlib.blake2b(f"{seed}|{target}|{proposal}|{index}".encode(), digest_size=16).digest()
    generator = np.random.Generator(np.random.Philox(key=int.from_bytes(key, "little")))
    return torch.from_numpy(generator.standard_normal(shape, dtype=np.float32))


def proposal_noise(seed: int, target: str, proposal: int, position_mm: float, shape: tuple[int, ...]) -> Tensor:
    """Noise of a proposal on a slice: interpolated on the sphere between two independent anchor fields.

    Independent Gaussian fields of many dimensions are nearly orthogonal, so the arc between them keeps zero mean and unit
    variance (slerp between slices as in ISCS, arXiv 2602.04162).

    Args:
        seed: the request's seed.
        target: target name; proposals of different targets are independent.
        proposal: index of the proposal.
        position_mm: position of the slice along the slice axis.
        shape: (channels, rows, columns) of the latent.

    Returns:
        float32 tensor of ``shape`` on the CPU, the caller's own.
    """
    place = position_mm / ANCHOR_MM
    index = math.floor(place)
    angle = (place - index) * math.pi / 2
    first = _anchor(seed, target, proposal, index, shape)
    if angle == 0.0:
        return first.clone()
    return math.cos(angle) * first + math.sin(angle) * _anchor(seed, target, proposal, index + 1, shape)
