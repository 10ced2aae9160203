"""What tables compare the model with: a U-Net trained on the synthetic pictures for a stated CPU time."""

from __future__ import annotations

import hashlib
import json
from pathlib import Path

from torch import nn

from experiments.tables.setup import TableSetup
from experiments.unet import DROPOUT, FEATURES, images_seen, train_unet
from progidiff.cards import ModelCard
from progidiff.synthesis.labelmaps import load_permissive
from progidiff.training.batches import painted_batches

UNET_MINUTES = 40.0


def unet_folder(work: Path, card: ModelCard, minutes: float, seed: int) -> Path:
    """Folder of the U-Net of a model's vocabulary and grid, a budget in CPU minutes, and a seed."""
    parts = [card.vocabulary, card.image_size, card.spacing_mm, minutes, seed, FEATURES, DROPOUT]
    return work / "unet" / hashlib.sha256(json.dumps(parts).encode()).hexdigest()[:16]


def synthetic_unet(setup: TableSetup, card: ModelCard, minutes: float) -> tuple[nn.Module, str, int]:
    """The trained U-Net, its key, and the pictures it saw.

    The pictures are those of the bundled model's own training: phantoms and the label volumes in ``data/permissive``.

    Raises:
        DatasetError: the label volumes are not there.
    """
    folder = unet_folder(setup.work, card, minutes, setup.seed)
    batches = painted_batches(load_permissive(setup.data), card, "cpu", 7 + setup.seed)
    network = train_unet(batches, len(card.vocabulary), minutes * 60, setup.seed, folder, progress=setup.progress)
    return network, folder.name, images_seen(folder)
