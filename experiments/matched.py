"""Comparisons on equal terms: the same patients, pictures and CPU time for every method, and one way to read samples."""

from __future__ import annotations

import hashlib
import json
import shutil
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from peft.tuners.tuners_utils import BaseTunerLayer
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from experiments.samples import Samples, SampleStore
from experiments.tables.controls import UNET_MINUTES, synthetic_unet
from experiments.tables.records import Record
from experiments.tables.setup import TableSetup
from experiments.unet import PEAK, images_seen, make_unet, train_unet
from progidiff.cards import ModelCard
from progidiff.datasets.slices import LabelledSlice
from progidiff.errors import DatasetError, InputError, ModelError
from progidiff.evaluation.metrics import dice, proposal_scores
from progidiff.model.adapter import ADAPTED, take_lora_off
from progidiff.model.folder import ProGiDiffModel
from progidiff.places import atomic_file
from progidiff.proposals.ranking import rank
from progidiff.proposals.votes import consensus, gram_matrix
from progidiff.training.batches import BatchSource, DatasetBatches, MixedBatches, painted_batches
from progidiff.training.stacks import Stack
from progidiff.training.tuning import TuneSettings

#: Figure -> head of its column.
FIGURES = {
    "rank1": "rank 1",
    "medoid": "medoid",
    "consensus": "consensus",
    "probability": "mean probability",
    "mean": "mean of samples",
    "rand_top_3": "RandTop-3",
    "best": "best of N",
}


def figures_of(samples: Samples, truth: np.ndarray) -> dict[str, float]:
    """Dice of a set of samples with a reference, by the names of :data:`FIGURES`.

    The first four need no reference; RandTop-3 (expected Dice of a random pick among the three best by the reference) and
    best-of-N do.

    Args:
        samples: N masks of one target on one slice.
        truth: bool (rows, columns).
    """
    values = [dice(mask, truth) for mask in samples.masks]
    scores = proposal_scores(values, samples.ranking, k=3)
    probability = samples.mean_probability
    return {
        "rank1": scores.rank1,
        "consensus": dice(consensus(samples.masks), truth),
        "medoid": values[rank(gram_matrix(samples.masks), "medoid").order[0]],
        "probability": float("nan") if probability is None else dice(probability > 0.5, truth),
        "mean": scores.mean,
        "rand_top_3": scores.rand_top_k,
        "best": scores.best,
    }


def records_of(
    store: SampleStore,
    name: str,
    items: Iterable[LabelledSlice],
    targets: Callable[[LabelledSlice], Sequence[str]],
    count: int | None = None,
) -> list[Record]:
    """Figures of every target of every slice from a store, of the first ``count`` samples or of all.

    Raises:
        InputError: samples are missing.
    """
    records = []
    for item in items:
        for target in targets(item):
            samples = store.get(item.slice_id, target)
            if samples is None:
                raise InputError("Samples in the work folder are damaged; run the table again, or with another --work.")
            chosen = samples if count is None else samples.first(count)
            records.append(Record(name, target, item.patient, figures_of(chosen, item.labels[target])))
    return records


@dataclass(frozen=True)
class Draw:
    """Training cases and test patients of one draw.

    Attributes:
        pool: training patients in their order; a run with n cases takes the first n, so that sizes are nested.
        test: test patients, the same for every size.
    """

    pool: tuple[str, ...]
    test: frozenset[str]


def draw_patients(patients: Iterable[str], most: int, test: int, seed: int) -> Draw:
    """Divide patients at random into a pool of ``most`` to train on and at most ``test`` others to test on.

    Raises:
        DatasetError: there are not enough patients for one test patient.
    """
    known = sorted(set(patients))
    if most < 1 or len(known) <= most:
        raise DatasetError(
            f"{len(known)} patients do not allow {most} training cases and a test patient; ask for fewer cases."
        )
    order = [known[i] for i in np.random.default_rng(seed).permutation(len(known))]
    return Draw(tuple(order[:most]), frozenset(order[most : most + test]))


def patient_folds(patients: Iterable[str], count: int, seed: int) -> list[frozenset[str]]:
    """Held-out patients of each fold of a cross-validation; every patient is held out once.

    Raises:
        DatasetError: there are fewer patients than folds.
    """
    known = sorted(set(patients))
    if not 2 <= count <= len(known):
        raise DatasetError(f"{len(known)} patients cannot be divided into {count} folds; ask for 2 to {len(known)}.")
    order = np.random.default_rng(seed).permutation(len(known))
    return [frozenset(known[i] for i in order[place::count]) for place in range(count)]


def labelled_batches(
    stacks: Sequence[Stack], card: ModelCard, seed: int, replay_share: float, strength: float = 1.0
) -> BatchSource:
    """The pictures that tuning sees, for the U-Net: augmented slices and a share of synthetic phantoms."""
    own = DatasetBatches(stacks, card, "cpu", seed, strength)
    if not replay_share:
        return own
    phantoms = painted_batches([], card, "cpu", seed + 1)
    return MixedBatches([own, phantoms], [1 - replay_share, replay_share], seed)


#: Steps in which the learning rate rises, and the peak with which a pre-trained U-Net goes on: lower than from scratch by
#: the same factor as the control branch's.
WARMUP, TUNED_PEAK = 10, PEAK * 3 / 8


def tune_unet(
    stacks: Sequence[Stack],
    card: ModelCard,
    seconds: float,
    seed: int,
    work: Path,
    init: nn.Module | None,
) -> tuple[nn.Module, int]:
    """A U-Net trained on cases as :func:`progidiff.training.tuning.tune` does it with its defaults.

    The same pictures in the same order, as many per step, the same warm-up; from scratch without ``init``, which may also be
    the image-only twin's network.

    Returns:
        the network, and the pictures that it saw.
    """
    like = TuneSettings()
    batches = labelled_batches(stacks, card, seed, like.replay_share, like.strength)
    peak = PEAK if init is None else TUNED_PEAK
    network = train_unet(batches, len(card.vocabulary), seconds, seed, work, init, peak, images=like.images, warmup=WARMUP)
    return network, images_seen(work)


class _Pick(nn.Module):
    """Some channels of a network's output."""

    def __init__(self, channels: Sequence[int]) -> None:
        super().__init__()
        self.channels = list(channels)

    def forward(self, x: Tensor) -> Tensor:
        return x[:, self.channels]


def only(network: nn.Module, card: ModelCard, targets: Sequence[str]) -> tuple[nn.Module, ModelCard]:
    """A segmenter that answers for some targets of its vocabulary alone, and a card that says so; far less to resample."""
    picked = nn.Sequential(network, _Pick([card.vocabulary.index(target) for target in targets]))
    return picked.eval(), replace(card, vocabulary=list(targets))


def pretrained_unet(setup: TableSetup, card: ModelCard) -> tuple[nn.Module, str, str]:
    """The U-Net that knows the synthetic pictures: the network, a key of its weights, and what it was trained with.

    Options of the table: ``unet`` names a file of weights to take, ``unet-minutes`` is the budget of training it otherwise.

    Raises:
        ModelError: the file holds another network.
    """
    path = setup.file("unet")
    if path is None:
        minutes = setup.number("unet-minutes", UNET_MINUTES, 0.01, 1e4)
        with one_thread():
            network, key, images = synthetic_unet(setup, card, minutes)
        return network, key, f"{minutes:g} CPU minutes on synthetic pictures ({images:,} of them)"
    network = make_unet(len(card.vocabulary))
    try:
        network.load_state_dict(load_file(path))
    except (SafetensorError, OSError, RuntimeError) as error:
        raise ModelError(f"'{path}' does not hold the U-Net of these tables; leave the option unet out.") from error
    key = hashlib.sha256(path.read_bytes()).hexdigest()[:16]
    return network.eval(), key, "weights from a file, trained on synthetic pictures"


UNET_OPTIONS = {
    "unet-minutes": f"CPU minutes of the U-Net's training on synthetic pictures (default {UNET_MINUTES:g})",
    "unet": "file of weights of a U-Net that was trained on synthetic pictures, instead of training one",
}


def fold_lora_in(model: ProGiDiffModel) -> None:
    """Add the low-rank layers of a tuning into the weights, and take them off."""
    for name in ADAPTED:
        for module in getattr(model, name).modules():
            if isinstance(module, BaseTunerLayer):
                module.merge()  # type: ignore[operator]
    take_lora_off(model)


@contextmanager
def one_thread() -> Iterator[None]:
    """Torch computes in one thread, so that CPU seconds mean the same on every machine's number of cores."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        yield
    finally:
        torch.set_num_threads(before)


def digest(*parts: Any) -> str:
    """16 hexadecimal digits of whatever JSON can hold."""
    return hashlib.sha256(json.dumps(parts, sort_keys=True).encode()).hexdigest()[:16]


def remembered(path: Path, make: Callable[[], Mapping[str, Any]]) -> dict[str, Any]:
    """A result that is made once and kept as JSON; a damaged file is made again.

    Raises:
        OutputError: the file cannot be written.
    """
    found = _kept(path)
    if found is not None:
        return found
    made = dict(make())
    path.parent.mkdir(parents=True, exist_ok=True)
    with atomic_file(path) as staged:
        staged.write_text(json.dumps(made, indent=1), encoding="utf-8")
    return made


def _kept(path: Path) -> dict[str, Any] | None:
    try:
        found = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return None  # not made yet, or damaged: it is only a cache
    return found if isinstance(found, dict) else None


def empty_folder(folder: Path) -> Path:
    """A folder without what an interrupted run left there: a budget in CPU time is spent in one go, or begun again."""
    shutil.rmtree(folder, ignore_errors=True)
    folder.mkdir(parents=True)
    return folder


def save_trained(model: ProGiDiffModel, path: Path) -> None:
    """Keep control branch and image encoder, what training changes."""
    path.parent.mkdir(parents=True, exist_ok=True)
    tensors = {
        f"{name}.{key}": value.detach().cpu().contiguous()
        for name, network in (("control", model.controlnet), ("encoder", model.image_encoder))
        for key, value in network.state_dict().items()
    }
    with atomic_file(path) as staged:
        save_file(tensors, staged)


def load_trained(model: ProGiDiffModel, path: Path) -> bool:
    """Take up what :func:`save_trained` kept, for networks of the same layout; whether there was such a file."""
    try:
        tensors = load_file(path)
    except (OSError, SafetensorError):
        return False  # not made yet, or damaged: it is trained again
    for name, network in (("control", model.controlnet), ("encoder", model.image_encoder)):
        network.load_state_dict({k.removeprefix(f"{name}."): v for k, v in tensors.items() if k.startswith(f"{name}.")})
        network.eval().requires_grad_(False)
    return True
