"""What tables compare the model with that has seen the synthetic pictures too: a U-Net, and the image-only twin.

The twin is the file that training left beside the model, or one that is fitted on the model's own encoder.
"""

from __future__ import annotations

import hashlib
import json
import shutil
from collections.abc import Sequence
from copy import deepcopy
from functools import cached_property
from pathlib import Path

import torch
from torch import nn

from progidiff.evaluation.matched import one_thread, pretrained_unet
from progidiff.evaluation.tables.setup import TableSetup
from progidiff.evaluation.twin import TWIN_NAME, ImageOnlyTwin, save_twin
from progidiff.locations import weights_hash
from progidiff.model.folder import ProGiDiffModel
from progidiff.outputs.atomic import atomic_file
from progidiff.synthesis.labelmaps import load_permissive
from progidiff.synthesis.source import SyntheticSource
from progidiff.training.batches import SyntheticBatches
from progidiff.training.loop import LoopSettings, run_stage
from progidiff.training.stages import EncoderStage

TWIN_MINUTES = 5.0
#: Methods of tables: the U-Net, and the twin, that go on from what they know of the synthetic pictures.
UNET_TUNED, TWIN_TUNED = "unet-tuned", "twin-tuned"

TWIN_OPTION = {
    "twin": f"file of the image-only twin; by default {TWIN_NAME} in the work folder, or else one that is fitted",
    "twin-minutes": f"CPU minutes of fitting a twin where there is none (default {TWIN_MINUTES:g}; 0 for no twin)",
}


class Pretrained:
    """Networks with one mask that know the synthetic pictures, made when they are asked for.

    Args:
        setup: data, work folder and options.
        model: the model that they are compared with.
    """

    def __init__(self, setup: TableSetup, model: ProGiDiffModel) -> None:
        self._setup, self._model = setup, model

    @cached_property
    def unet(self) -> tuple[nn.Module, str, str]:
        """The U-Net, its key, and what it was trained with."""
        return pretrained_unet(self._setup, self._model.card)

    @cached_property
    def twin(self) -> tuple[ImageOnlyTwin, str, str] | None:
        """The image-only twin, its key, and what it is; ``None`` where none is wanted."""
        return image_only_twin(self._setup, self._model)

    def possible(self, methods: Sequence[str]) -> list[str]:
        """Methods without the tuned twin where no twin is wanted; a twin is only made where they name it."""
        return [method for method in methods if method != TWIN_TUNED or self.twin is not None]

    def start_of(self, method: str) -> tuple[nn.Module | None, str]:
        """The network that a method's training begins with, and its key; none for one that begins from scratch."""
        if method == TWIN_TUNED and self.twin is not None:
            return self.twin[0].network, self.twin[1]
        return self.unet[:2] if method == UNET_TUNED else (None, "")


def image_only_twin(setup: TableSetup, model: ProGiDiffModel) -> tuple[ImageOnlyTwin, str, str] | None:
    """The image-only twin, a key of its weights, and what it is; ``None`` where none is wanted.

    Training the bundled model leaves a twin that was trained beside it. Where that file is not at hand, a convolution is
    fitted on the model's own image encoder, which stays as it is.

    Raises:
        DatasetError: the label volumes that the fitting needs are not there.
        InputError: the option ``twin`` names a file that does not exist.
        ModelError: it is no twin of this model.
    """
    given = setup.file("twin")
    path, what = setup.work / TWIN_NAME if given is None else given, "trained beside the model"
    if not path.is_file():
        minutes = setup.number("twin-minutes", TWIN_MINUTES, 0, 1e4)
        if minutes == 0:
            return None
        path, what = _fitted_twin(setup, model, minutes), f"fitted for {minutes:g} CPU minutes on synthetic pictures"
    key = hashlib.sha256(path.read_bytes()).hexdigest()[:16]
    encoder = type(model.image_encoder).from_config(model.image_encoder.config)
    return ImageOnlyTwin(path, encoder, model.card), key, f"the model's image encoder with a convolution on top, {what}"


def _fitted_twin(setup: TableSetup, model: ProGiDiffModel, minutes: float) -> Path:
    """File of a twin whose convolution was fitted for a CPU time, on pictures as those of :func:`synthetic_unet`."""
    card = model.card
    parts = [weights_hash(card.sha256), minutes, setup.seed]
    folder = setup.work / "twin" / hashlib.sha256(json.dumps(parts).encode()).hexdigest()[:16]
    path = folder / TWIN_NAME
    if path.is_file():
        return path
    setup.progress(f"fitting the image-only twin, {minutes:g} CPU min")
    encoder = deepcopy(model.image_encoder).float().cpu()
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(setup.seed)
        head = nn.Conv2d(encoder.config.feature_channels, len(card.vocabulary) * encoder.config.stride**2, 1)
    source = SyntheticSource(load_permissive(setup.data), card.image_size, card.spacing_mm, "cpu", 7 + setup.seed)
    stage = EncoderStage(encoder, head, SyntheticBatches(source, card.vocabulary), [])
    encoder.requires_grad_(False)
    shutil.rmtree(folder, ignore_errors=True)
    never = 10**6
    settings = LoopSettings(
        steps=never,
        images=8,
        learning_rate=3e-3,
        warmup=10,
        checkpoint_every=never,
        validate_every=never,
        log_every=never,
        seed=setup.seed,
        cpu_seconds=minutes * 60,
    )
    with one_thread():
        run_stage(stage, settings, folder / "training", lambda line: None)
    with atomic_file(path) as staged:
        save_twin(encoder, head, staged)
    return path
