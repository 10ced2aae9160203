"""A plain U-Net beside the bundled model: MONAI's BasicUNet on the same pictures, measured on the same slices.

Usage: python Utilities/plain_unet.py DATA WORK MINUTES [SET ...], where DATA holds the permissive label maps and the
labelled real images. Training stops after MINUTES of CPU time in all; an interrupted run goes on from its checkpoint.
The loss, the batches and the learning rate are those of the image encoder's pre-training, so only the network differs.
"""

from __future__ import annotations

import sys
from pathlib import Path

import numpy as np

from progidiff.datasets.shared_slices import load_shared
from progidiff.evaluation.metrics import dice
from progidiff.evaluation.samples import present_targets
from progidiff.evaluation.twin import PlainSegmenter
from progidiff.evaluation.unet import images_seen, train_unet
from progidiff.model.card import ModelCard
from progidiff.model.folder import load_model
from progidiff.synthesis.labelmaps import load_permissive
from progidiff.synthesis.source import SyntheticSource
from progidiff.training.batches import SyntheticBatches


def report(name: str, data: Path, segmenter: PlainSegmenter, card: ModelCard) -> None:
    """Print Dice per target and the mean over the targets of a set."""
    found: dict[str, list[float]] = {}
    for item in load_shared(data, name):
        for target in present_targets(item, card.vocabulary):
            found.setdefault(target, []).append(dice(segmenter(item, target), item.labels[target]))
    means = {target: float(np.mean(values)) for target, values in found.items()}
    print(name, "  ".join(f"{t} {m:.3f} ({len(found[t])})" for t, m in means.items()))
    print(f"{name} mean of targets {np.mean(list(means.values())):.3f}")


def main(data: Path, work: Path, minutes: float, sets: list[str]) -> None:
    """Train, then measure on the sets."""
    card = load_model().card
    source = SyntheticSource(load_permissive(data), card.image_size, card.spacing_mm, "cpu", 7)
    batches = SyntheticBatches(source, card.vocabulary)
    network = train_unet(batches, len(card.vocabulary), minutes * 60, 0, work, dropout=0.0, progress=print)
    print(f"{sum(p.numel() for p in network.parameters()):,} parameters, {images_seen(work):,} images seen")
    for name in sets or ["curvas", "amos"]:
        report(name, data, PlainSegmenter(network, card), card)


if __name__ == "__main__":
    if len(sys.argv) < 4:
        sys.exit(__doc__)
    main(Path(sys.argv[1]), Path(sys.argv[2]), float(sys.argv[3]), sys.argv[4:])
