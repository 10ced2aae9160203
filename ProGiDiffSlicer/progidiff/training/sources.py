"""From data sets and synthetic sources to what a training run needs: batches, validation, vocabulary, provenance."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch

from progidiff.cards import ModelCard, TrainingSource
from progidiff.datasets.nnunet import NnUNetDataset
from progidiff.datasets.slices import SliceFolder, read_json
from progidiff.errors import DatasetError
from progidiff.synthesis.labelmaps import LabelVolume, load_permissive
from progidiff.synthesis.tissues import PHANTOM_TARGETS, VOCABULARY
from progidiff.training.batches import (
    BatchSource,
    DatasetBatches,
    MixedBatches,
    TrainingBatch,
    painted_batches,
    split_stacks,
    validation_batches,
)
from progidiff.training.stacks import Stack, open_dataset, stacks_of
from progidiff.volumes.slicing import USUAL_PLANES

PHANTOMS = "phantoms"
_VALIDATION_SEED = 999
_MOST_TOGETHER = 8


@dataclass(frozen=True)
class TrainingData:
    """What to train on.

    Attributes:
        folders: nnU-Net raw folders and slice folders.
        synthetic: ``"phantoms"``, a folder of label data to paint on (see :func:`load_label_volumes`), or ``None``.
        synthetic_share: share of synthetic images where there are data sets as well.
        validation_share: share of the patients that are held out; 0 for none.
        plane: plane of the slices of volumes; ``None`` for the one that suits each volume and ``known``.
        known: the planes of the model that is trained.
        correct_values: take values of a CT that cannot be Hounsfield units for what they look like.
    """

    folders: tuple[Path, ...] = ()
    synthetic: str | Path | None = None
    synthetic_share: float = 0.3
    validation_share: float = 0.2
    plane: str | None = None
    known: tuple[str, ...] = USUAL_PLANES
    correct_values: bool = False


@dataclass
class OpenData:
    """Opened data: everything known before the first picture is read."""

    data: TrainingData
    datasets: list[NnUNetDataset | SliceFolder]
    volumes: list[LabelVolume] | None
    labelled: frozenset[str]
    train: list[Stack] = field(default_factory=list)
    held_out: list[Stack] = field(default_factory=list)

    @property
    def stored_modalities(self) -> list[str]:
        """Modalities of the data sets."""
        return sorted({m for d in self.datasets for m in _modalities(d)})

    @property
    def modalities(self) -> list[str]:
        """Modalities that a model learns from the data; synthetic slices have the looks of both."""
        return ["CT", "MR"] if self.volumes is not None else self.stored_modalities

    def fingerprint(self) -> str:
        """Digest of which cases these are and how they are divided; names cannot be read from it."""
        parts: dict[str, Any] = {
            "train": [(s.name, s.patient) for s in self.train],
            "held out": [(s.name, s.patient) for s in self.held_out],
            "volumes": None if self.volumes is None else [v.name for v in self.volumes],
            "share": self.data.synthetic_share if self.datasets and self.volumes is not None else None,
        }
        if self.data.plane is not None or self.data.correct_values:
            parts |= {"plane": self.data.plane, "corrected": self.data.correct_values}
        return hashlib.sha256(json.dumps(parts).encode()).hexdigest()

    def provenance(self) -> list[TrainingSource]:
        """Entries for the card's ``trained_on``."""
        found = [
            TrainingSource(name=_name(d), licence=_licence(d), what=what, n=len(d))
            for d in self.datasets
            for what in ["labelled volumes" if isinstance(d, NnUNetDataset) else "labelled slices"]
        ]
        if self.volumes is not None:
            phantoms = "procedural abdominal phantoms"
            found.append(TrainingSource(name=phantoms, licence="Apache-2.0", what="generated slices"))
        for v in self.volumes or []:
            what = "slices of one patient's label volume"
            found.append(TrainingSource(name=v.name, licence=v.licence, what=what, n=len(v.slices)))
        return found


def open_data(data: TrainingData, seed: int = 0, tell: Callable[[str], None] = lambda sentence: None) -> OpenData:
    """Open the data sets and divide their patients.

    The same patient identifier in two sets is taken for one patient, so that nobody is on both sides. ``tell`` is
    told what a user should know of the labels.

    Raises:
        DatasetError: nothing to train on, a folder that is no data set, or too few patients to hold some out.
    """
    if not data.folders and data.synthetic is None:
        raise DatasetError("There is nothing to train on; name a data set or a synthetic source.")
    if not 0 <= data.validation_share < 1:
        raise DatasetError(f"The share of held-out patients must be at least 0 and below 1, not {data.validation_share:g}.")
    if not 0 < data.synthetic_share < 1:
        raise DatasetError(f"The share of synthetic images must be between 0 and 1, not {data.synthetic_share:g}.")
    datasets = [open_dataset(Path(folder), data.plane, data.known, data.correct_values, tell) for folder in data.folders]
    volumes = None if data.synthetic is None else load_label_volumes(data.synthetic)
    painted = frozenset[str]() if volumes is None else PHANTOM_TARGETS.union(*(v.known for v in volumes))
    labelled = painted.union(*(d.labelled_targets for d in datasets))
    opened = OpenData(data, datasets, volumes, labelled)
    stacks = [stack for d in datasets for stack in stacks_of(d)]
    if stacks:
        if data.validation_share and len({s.patient for s in stacks}) < 2:
            raise DatasetError(
                "All images are of one patient, so none can be held out; add patients, or hold out a share of 0."
            )
        opened.train, opened.held_out = split_stacks(stacks, data.validation_share, seed)
    return opened


def load_label_volumes(synthetic: str | Path) -> list[LabelVolume]:
    """Label volumes to paint on: none for ``"phantoms"``, otherwise those under ``<folder>/permissive``.

    Raises:
        DatasetError: there is no such folder.
    """
    if str(synthetic) == PHANTOMS:
        return []
    folder = Path(synthetic)
    return load_permissive(folder.parent if folder.name == "permissive" else folder)


def choose_vocabulary(labelled: frozenset[str], known: Sequence[str], tokenizer: Any | None) -> list[str]:
    """Targets to train: those of the model that the data label, then further ones that its tokenizer can read.

    Args:
        labelled: targets that the data label.
        known: the model's vocabulary; empty for a new model.
        tokenizer: the model's tokenizer, or ``None`` where one will be made for the vocabulary.

    Raises:
        DatasetError: there is none.
    """
    order = [*known, *(t for t in VOCABULARY if t not in known)]
    order += sorted(labelled.difference(order))
    chosen = [t for t in order if t in labelled and (tokenizer is None or _readable(tokenizer, t))]
    if not chosen:
        raise DatasetError(
            f"The data label {', '.join(sorted(labelled)) or 'nothing'}, none of which this model can be asked for; "
            "train a new base model on them first."
        )
    return chosen


def make_source(
    opened: OpenData,
    card: ModelCard,
    device: torch.device,
    seed: int,
    cache_mb: float = 1024.0,
    log: Callable[[str], None] | None = None,
) -> BatchSource:
    """Training batches of everything that was opened."""
    sources: list[BatchSource] = []
    stacks = usable(opened.train, card)
    if stacks:
        sources.append(DatasetBatches(stacks, card, device, seed, cache_mb=cache_mb, log=log))
    if opened.volumes is not None:
        sources.append(painted_batches(opened.volumes, card, device, seed))
    if not sources:
        raise DatasetError("No case to train on is left; hold out a smaller share of the patients.")
    share = opened.data.synthetic_share
    return sources[0] if len(sources) == 1 else MixedBatches(sources, [1 - share, share], seed)


def make_validation(opened: OpenData, card: ModelCard, device: torch.device, images: int, seed: int) -> list[TrainingBatch]:
    """Held-out patients; without data sets, synthetic slices of another seed; nothing where nobody is held out."""
    if opened.datasets:
        return validation_batches(usable(opened.held_out, card), card, device, images, seed)
    assert opened.volumes is not None
    source = painted_batches(opened.volumes, card, device, seed + _VALIDATION_SEED)
    return [source.batch(min(_MOST_TOGETHER, images - start)) for start in range(0, images, _MOST_TOGETHER)]


def planes_of(source: BatchSource, opened: OpenData) -> list[str]:
    """Planes of the slices that a source gives; phantoms and atlases are axial."""
    found = {"axial"} if opened.volumes is not None else set[str]()
    for part in source.sources if isinstance(source, MixedBatches) else [source]:
        if isinstance(part, DatasetBatches):
            found |= part.seen_planes()
    return [plane for plane in ("axial", "coronal", "sagittal") if plane in found]


def usable(stacks: Sequence[Stack], card: ModelCard) -> list[Stack]:
    """Stacks that label at least one target of the vocabulary: others would have no prompt."""
    return [s for s in stacks if s.labelled & {*card.vocabulary}]


def _readable(tokenizer: Any, target: str) -> bool:
    """Whether a tokenizer has a token for every part of a target's name."""
    return tokenizer.unk_token not in tokenizer.tokenize(target)


def _modalities(data: NnUNetDataset | SliceFolder) -> set[str]:
    if isinstance(data, NnUNetDataset):
        return {data.modality}
    return {str(data.manifest.settings(entry).modality) for entry in data.manifest.slices}


def _name(data: NnUNetDataset | SliceFolder) -> str:
    return (data.manifest.name if isinstance(data, SliceFolder) else "") or data.folder.resolve().name


def _licence(data: NnUNetDataset | SliceFolder) -> str:
    """What an nnU-Net set states; slice folders have no place for it."""
    if isinstance(data, NnUNetDataset):
        description = read_json(data.folder / "dataset.json")
        for key in ("licence", "license"):
            if isinstance(description.get(key), str) and description[key].strip():
                return str(description[key]).strip()
    return "not stated by the data set"
