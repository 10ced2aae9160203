"""Held-out phantoms as labelled slices: procedural anatomy drawn with seeds that training never uses."""

from __future__ import annotations

import numpy as np

from progidiff.datasets.slices import LabelledSlice
from progidiff.synthesis.source import SyntheticSource
from progidiff.synthesis.tissues import PHANTOM_TARGETS, VOCABULARY

HELD_OUT_SEED = 20_260_000


def held_out_phantoms(count: int, size: int = 160, pixel_mm: float = 2.4) -> list[LabelledSlice]:
    """``count`` painted phantoms with all organs labelled; every one counts as a patient of its own."""
    source = SyntheticSource([], {"axial": (size, size)}, pixel_mm, "cpu", HELD_OUT_SEED)
    items = []
    for n in range(count):
        batch = source.batch(1)
        labels = {name: batch.mask(name)[0].numpy() for name in VOCABULARY if name in PHANTOM_TARGETS}
        items.append(
            LabelledSlice(
                image=np.asarray(batch.images[0, 0].numpy(), np.float32),
                spacing_rc=(pixel_mm, pixel_mm),
                labels=labels,
                labelled=frozenset(labels),
                patient=f"phantom {n}",
                modality="CT",
                window="display",
                slice_id=f"phantom {n}",
            )
        )
    return items
