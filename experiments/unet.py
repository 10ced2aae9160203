"""The control of every table: MONAI's U-Net, trained for a stated CPU time, and the samples that dropout and test-time
augmentation draw from it."""

from __future__ import annotations

import json
import math
import time
from collections.abc import Callable, Iterable, Sequence
from copy import deepcopy
from pathlib import Path

import numpy as np
import torch
from diffusers.training_utils import EMAModel
from monai.networks.nets import BasicUNet
from torch import Tensor, nn
from torch.nn import functional as F

from experiments.samples import SampleStore
from progidiff.cards import ModelCard
from progidiff.datasets.slices import LabelledSlice
from progidiff.errors import ModelError
from progidiff.evaluation.cases import on_grid
from progidiff.sampling.image import OUTSIDE, ModelGrid
from progidiff.training.batches import BatchSource
from progidiff.training.loop import load_checkpoint, save_checkpoint
from progidiff.training.stages import segmentation_loss

#: Channels per level; 1.3 million parameters, of the order of what the bundled model trains.
FEATURES = (16, 32, 64, 128, 160, 16)
#: Share of activations that dropout leaves out, while training and while sampling.
DROPOUT = 0.1
IMAGES, PEAK, WARMUP = 8, 1.5e-3, 60
_CHECKPOINT_S = 60.0

#: Samples of a network on a slice: masks bool (n, V, H, W) and mean probability float32 (V, H, W), at the slice's pixels.
Drawn = tuple[np.ndarray, np.ndarray]
Sampling = Callable[[nn.Module, LabelledSlice, ModelCard, int, int], Drawn]


def make_unet(classes: int, dropout: float = DROPOUT, seed: int = 0) -> BasicUNet:
    """A fresh U-Net: images (B, 1, S, S) to logits (B, classes, S, S)."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        return BasicUNet(2, 1, classes, features=FEATURES, dropout=dropout)


class _Training:
    """What a checkpoint needs to know of the training."""

    name = "unet"

    def __init__(self, network: nn.Module, batches: BatchSource) -> None:
        self.trainable = nn.ModuleDict({"unet": network})
        self._batches = batches

    def source_state(self) -> Tensor:
        return self._batches.state()

    def restore_source(self, state: Tensor) -> None:
        self._batches.restore(state)

    def loss(self, count: int) -> tuple[Tensor, dict[str, float]]:
        batch = self._batches.batch(count)
        return segmentation_loss(self.trainable["unet"](batch.images), batch.masks, batch.known), {}

    def validate(self) -> dict[str, float]:
        return {}


def train_unet(
    batches: BatchSource,
    classes: int,
    cpu_seconds: float,
    seed: int,
    work: Path,
    init: nn.Module | None = None,
    learning_rate: float = PEAK,
    dropout: float = DROPOUT,
    progress: Callable[[str], None] = lambda line: None,
    images: int = IMAGES,
    warmup: int = WARMUP,
) -> nn.Module:
    """Train a U-Net until ``cpu_seconds`` of this process's CPU time have been spent on it, resumed runs included.

    Loss, optimiser, learning rate and averaging of the weights are those of the image encoder's pre-training, so only the
    network differs. CPU time, and not wall time, because a busy machine must not decide a comparison.

    Args:
        batches: training pictures.
        classes: targets per picture, V.
        cpu_seconds: the budget, the making of the pictures included.
        seed: seed of weights and dropout.
        work: folder of this training's checkpoint; a finished training is only loaded.
        init: a network to begin with, e.g. for fine-tuning; copied.
        learning_rate: its peak (linear warm-up, cosine decay to 2 % over the budget).
        dropout: share of activations that are left out; of a network made here.
        progress: told a line now and then.
        images: pictures per step.
        warmup: steps in which the learning rate rises.

    Returns:
        The network in evaluation mode, with averaged weights.

    Raises:
        ModelError: the folder holds another training.
        OutputError: the checkpoint cannot be written.
    """
    work.mkdir(parents=True, exist_ok=True)
    run = {"classes": classes, "cpu_seconds": cpu_seconds, "seed": seed, "learning_rate": learning_rate}
    run |= {} if (images, warmup) == (IMAGES, WARMUP) else {"images": images, "warmup": warmup}
    _claim(work / "settings.json", run)
    torch.manual_seed(seed)
    network = make_unet(classes, dropout, seed) if init is None else deepcopy(init).requires_grad_(True)
    training = _Training(network, batches)
    parameters = list(network.parameters())
    optimizer = torch.optim.AdamW(parameters, learning_rate, weight_decay=1e-4)
    ema = EMAModel(parameters, decay=0.998, use_ema_warmup=True, inv_gamma=1.0, power=0.75)
    checkpoint, clock = work / "checkpoint.safetensors", work / "seconds.json"
    step = load_checkpoint(checkpoint, training, parameters, optimizer, ema)
    # Seconds by step, written before the checkpoint: whichever checkpoint is there, its time is known.
    spent = float(json.loads(clock.read_text())[str(step)]) if step else 0.0
    last = saved = time.process_time()
    network.train()
    recent: list[float] = []
    while spent < cpu_seconds:
        for group in optimizer.param_groups:
            cosine = 0.02 + 0.49 * (1 + math.cos(math.pi * spent / cpu_seconds))
            group["lr"] = learning_rate * min(1.0, (step + 1) / warmup) * cosine
        loss, _ = training.loss(images)
        optimizer.zero_grad(set_to_none=True)
        loss.backward()  # type: ignore[no-untyped-call]
        torch.nn.utils.clip_grad_norm_(parameters, 1.0)
        optimizer.step()
        ema.step(parameters)
        recent.append(float(loss.detach()))
        now = time.process_time()
        spent, last, step = spent + now - last, now, step + 1
        if now - saved > _CHECKPOINT_S or spent >= cpu_seconds:
            before = json.loads(clock.read_text()) if clock.exists() else {}
            clock.write_text(json.dumps(before | {str(step): spent}))
            save_checkpoint(checkpoint, step, training, parameters, optimizer, ema)
            progress(f"U-Net: {step} steps, {spent / 60:.1f} of {cpu_seconds / 60:.1f} CPU min, loss {np.mean(recent):.3f}")
            recent.clear()
            saved = now
    ema.copy_to(parameters)
    return network.eval()


def images_seen(work: Path) -> int:
    """How many pictures a finished training in ``work`` has seen."""
    images = json.loads((work / "settings.json").read_text()).get("images", IMAGES)
    return int(images * max(int(step) for step in json.loads((work / "seconds.json").read_text())))


def _claim(path: Path, run: dict[str, float]) -> None:
    if not path.exists():
        path.write_text(json.dumps(run), encoding="utf-8")
    elif json.loads(path.read_text(encoding="utf-8")) != run:
        raise ModelError(f"The folder '{path.parent}' holds the U-Net of another training; choose another or empty it.")


@torch.inference_mode()
def unet_probability(network: nn.Module, item: LabelledSlice, card: ModelCard) -> np.ndarray:
    """Probability per target without dropout or augmentation, float32 (V, H, W) at the slice's pixels."""
    grid, pixels = on_grid(item, card)
    return np.asarray(torch.sigmoid(grid.from_model(network.eval()(pixels)[0], OUTSIDE)).numpy())


@torch.inference_mode()
def mc_dropout_samples(network: nn.Module, item: LabelledSlice, card: ModelCard, count: int, seed: int) -> Drawn:
    """Masks with dropout left on (Gal and Ghahramani, arXiv 1506.02142); every sample drops activations of its own."""
    grid, pixels = on_grid(item, card)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        network.eval()
        for module in network.modules():
            if isinstance(module, nn.Dropout):
                module.train()
        try:
            return _collect(grid, (network(pixels) for _ in range(count)))
        finally:
            network.eval()


@torch.inference_mode()
def tta_samples(network: nn.Module, item: LabelledSlice, card: ModelCard, count: int, seed: int) -> Drawn:
    """Masks of randomly altered copies of the slice, brought back to it (test-time augmentation, arXiv 1807.07356).

    Rotation within 8 degrees, scale within 7 %, shift within 4 % of the width, gamma 0.75 to 1.33 and noise of 0.02. No
    mirroring: left and right are different organs.
    """
    grid, pixels = on_grid(item, card)
    generator = torch.Generator().manual_seed(seed)

    def altered() -> Iterable[Tensor]:
        for _ in range(count):
            turn, scale, gamma, row, column = (2 * torch.rand(5, generator=generator) - 1).tolist()
            angle, factor = math.radians(8) * turn, 1 + 0.07 * scale
            cos, sin = math.cos(angle) * factor, math.sin(angle) * factor
            forward = torch.tensor([[cos, -sin, 0.08 * column], [sin, cos, 0.08 * row], [0.0, 0.0, 1.0]])
            noise = 0.02 * torch.randn(pixels.shape, generator=generator)
            copy = (_warp(pixels, forward).clamp(0, 1) ** (4 / 3) ** gamma + noise).clamp(0, 1)
            yield _warp(network(copy) - OUTSIDE, torch.linalg.inv(forward)) + OUTSIDE

    network.eval()
    return _collect(grid, altered())


def _warp(x: Tensor, matrix: Tensor) -> Tensor:
    """Bilinear samples of (1, C, S, S) under an affine map of the square [-1, 1]², matrix (3, 3); 0 outside."""
    grid = F.affine_grid(matrix[None, :2], list(x.shape), align_corners=False)
    return F.grid_sample(x, grid, mode="bilinear", padding_mode="zeros", align_corners=False)


def _collect(grid: ModelGrid, logits: Iterable[Tensor]) -> Drawn:
    masks, total, count = [], torch.zeros(()), 0
    for one in logits:
        native = grid.from_model(one[0], OUTSIDE)
        masks.append((native > 0).numpy())
        total = total + torch.sigmoid(native)
        count += 1
    return np.stack(masks), np.asarray((total / count).numpy(), np.float32)


def sample_unet_into(
    store: SampleStore,
    network: nn.Module,
    card: ModelCard,
    items: Iterable[LabelledSlice],
    targets: Callable[[LabelledSlice], Sequence[str]],
    how: Sampling,
    progress: Callable[[int], None] = lambda done: None,
) -> int:
    """Draw what a store lacks; the number of pairs of slice and target that were drawn now.

    Args:
        store: where the samples go; its settings give their number and seed.
        network: the trained network, a U-Net or the image-only twin; its classes are the card's vocabulary.
        card: card of the diffusion model that it is compared with: same grid, window and vocabulary.
        items: labelled slices.
        targets: the targets wanted on a slice.
        how: :func:`mc_dropout_samples` or :func:`tta_samples`.
        progress: told the number of slices done.
    """
    made, count = 0, store.settings.proposals
    for done, item in enumerate(items):
        missing = [t for t in targets(item) if not store.has(item.slice_id, t)]
        if missing:
            masks, probability = how(network, item, card, count, store.settings.seed)
            for target in missing:
                v = card.vocabulary.index(target)
                store.put(item.slice_id, target, masks[:, v], {count: probability[v]}, item.spacing_rc)
                made += 1
        progress(done + 1)
    return made
