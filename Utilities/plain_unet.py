"""A plain U-Net beside the bundled model: MONAI's BasicUNet on the same pictures, measured on the same slices.

Usage: python Utilities/plain_unet.py DATA WORK MINUTES [SET ...], where DATA holds the permissive label maps and the
labelled real images. Training stops after MINUTES of wall time in all; an interrupted run goes on from its checkpoint.
The loss, the batches and the learning rate are those of the image encoder's pre-training, so only the network differs.
"""

from __future__ import annotations

import json
import sys
import time
from pathlib import Path

import numpy as np
import torch
from monai.networks.nets import BasicUNet
from safetensors.torch import load_file, save_file

from progidiff.datasets.shared_slices import load_shared
from progidiff.evaluation.accuracy import MIN_AREA_MM2
from progidiff.evaluation.metrics import dice
from progidiff.evaluation.twin import PlainSegmenter
from progidiff.model.card import ModelCard
from progidiff.model.folder import load_model
from progidiff.synthesis.labelmaps import load_permissive
from progidiff.synthesis.source import SyntheticSource
from progidiff.synthesis.tissues import VOCABULARY
from progidiff.training.batches import SyntheticBatches
from progidiff.training.losses import segmentation_loss

IMAGES, PEAK, CHECKPOINT_S = 8, 1.5e-3, 120.0


def train(network: BasicUNet, source: SyntheticBatches, work: Path, seconds: float) -> int:
    """Train until ``seconds`` have been spent in all; the number of images seen."""
    state_file, weights = work / "state.json", work / "unet.safetensors"
    spent, steps = 0.0, 0
    if state_file.exists():
        spent, steps = json.loads(state_file.read_text())
        network.load_state_dict(load_file(weights))
    optimizer = torch.optim.AdamW(network.parameters(), PEAK, weight_decay=1e-4)
    network.train()
    last, saved, recent = time.monotonic(), time.monotonic(), []
    while spent < seconds:
        rate = PEAK * min(1.0, (steps + 1) / 60) * (0.02 + 0.49 * (1 + np.cos(np.pi * spent / seconds)))
        for group in optimizer.param_groups:
            group["lr"] = float(rate)
        batch = source.batch(IMAGES)
        loss = segmentation_loss(network(batch.images), batch.masks, batch.known)
        optimizer.zero_grad(set_to_none=True)
        loss.backward()
        torch.nn.utils.clip_grad_norm_(network.parameters(), 1.0)
        optimizer.step()
        recent.append(float(loss.detach()))
        now = time.monotonic()
        spent, last, steps = spent + now - last, now, steps + 1
        if now - saved > CHECKPOINT_S or spent >= seconds:
            saved = now
            save_file(network.state_dict(), weights)
            state_file.write_text(json.dumps([spent, steps]))
            print(f"{steps} steps, {spent / 60:.1f} of {seconds / 60:.0f} min, loss {np.mean(recent):.4f}", flush=True)
            recent.clear()
    network.eval()
    return steps * IMAGES


def report(name: str, data: Path, segmenter: PlainSegmenter, card: ModelCard) -> None:
    """Print Dice per target and the mean over the targets of a set."""
    found: dict[str, list[float]] = {}
    for item in load_shared(data, name):
        pixel_mm2 = item.spacing_rc[0] * item.spacing_rc[1]
        for target in card.vocabulary:
            if target in item.labelled and item.labels[target].sum() * pixel_mm2 >= MIN_AREA_MM2:
                found.setdefault(target, []).append(dice(segmenter(item, target), item.labels[target]))
    means = {target: float(np.mean(values)) for target, values in found.items()}
    print(name, "  ".join(f"{t} {m:.3f} ({len(found[t])})" for t, m in means.items()))
    print(f"{name} mean of targets {np.mean(list(means.values())):.3f}")


def main(data: Path, work: Path, minutes: float, sets: list[str]) -> None:
    """Train, then measure on the sets."""
    work.mkdir(parents=True, exist_ok=True)
    torch.manual_seed(0)
    card = load_model().card
    network = BasicUNet(2, 1, len(VOCABULARY), features=(16, 32, 64, 128, 160, 16))
    print(f"{sum(p.numel() for p in network.parameters()):,} parameters")
    # Seeded by the step count, so that a resumed run sees new pictures.
    seed = 7 + int((work / "state.json").exists() and json.loads((work / "state.json").read_text())[1])
    source = SyntheticBatches(
        SyntheticSource(load_permissive(data), card.image_size, card.spacing_mm, "cpu", seed), VOCABULARY
    )
    images = train(network, source, work, minutes * 60)
    print(f"{images:,} images seen")
    for name in sets or ["curvas", "amos"]:
        report(name, data, PlainSegmenter(network, card), card)


if __name__ == "__main__":
    if len(sys.argv) < 4:
        sys.exit(__doc__)
    main(Path(sys.argv[1]), Path(sys.argv[2]), float(sys.argv[3]), sys.argv[4:])
