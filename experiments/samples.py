"""Samples of a segmenter on labelled slices, kept on disk so that every table measures the same ones and can be resumed."""

from __future__ import annotations

import hashlib
import json
import zipfile
from collections.abc import Callable, Iterable, Mapping, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import asdict, dataclass, field
from io import BytesIO
from pathlib import Path

import numpy as np

from progidiff.datasets.slices import LabelledSlice
from progidiff.errors import InputError
from progidiff.evaluation.cases import as_volume
from progidiff.places import atomic_file
from progidiff.proposals.masks import bounding_box
from progidiff.proposals.ranking import Ranking, rank
from progidiff.proposals.votes import gram_matrix
from progidiff.sampling.conditioning import Conditioner
from progidiff.sampling.engine import CPU_BATCH, CUDA_BATCH, Engine
from progidiff.sampling.image import load_image
from progidiff.sampling.sampler import Sampler, SamplingRun
from progidiff.volumes.slicing import SlicePlan
from progidiff.wire.messages import ProposeRequest, SliceEvent

#: Probability below which a pixel is not kept; far less than any threshold or bin that a table uses.
_FAINT = 0.005
#: Levels that probabilities are kept with.
_LEVELS = 256
_FORMAT = 1


@dataclass(frozen=True)
class SampleSettings:
    """What a set of samples was made with; equal settings give equal samples.

    Attributes:
        set: name of the labelled set.
        model: checksum of the segmenter's weights, adapter included (see :func:`progidiff.sampling.engine.weights_key`).
        proposals: N.
        steps: denoising steps; 0 where there are none.
        seed: seed of the noise.
        variant: anything else that changes the samples, e.g. an ablation or ``"mc-dropout"``.
        everywhere: proposals that are also drawn where their target seems absent.
    """

    set: str
    model: str
    proposals: int
    steps: int = 4
    seed: int = 0
    variant: str = ""
    everywhere: bool = False

    @property
    def key(self) -> str:
        """Name of the folder, 16 hexadecimal digits."""
        text = json.dumps({"format": _FORMAT, **asdict(self)}, sort_keys=True)
        return hashlib.sha256(text.encode()).hexdigest()[:16]


@dataclass(frozen=True, eq=False)
class Samples:
    """N masks of one target on one slice, at the slice's own pixels.

    Attributes:
        masks: bool (N, rows, columns).
        probabilities: number of samples n -> mean probability of the first n, float (rows, columns); N is always there
            where the segmenter gives probabilities at all.
        spacing_rc: pixel size in mm.
        ranking: order and scores without ground truth (soft Dice confidence).
    """

    masks: np.ndarray
    probabilities: Mapping[int, np.ndarray]
    spacing_rc: tuple[float, float]
    ranking: Ranking = field(init=False)

    def __post_init__(self) -> None:
        object.__setattr__(self, "ranking", rank(gram_matrix(self.masks)))

    @property
    def count(self) -> int:
        """N."""
        return len(self.masks)

    @property
    def mean_probability(self) -> np.ndarray | None:
        """Mean probability of all samples, float (rows, columns), or ``None`` where it was not kept."""
        return self.probabilities.get(self.count)

    def first(self, count: int) -> Samples:
        """The first ``count`` samples, ranked among themselves."""
        if not 1 <= count <= self.count:
            raise ValueError(f"There are {self.count} samples, not {count}.")
        known = {n: p for n, p in self.probabilities.items() if n <= count}
        return Samples(self.masks[:count], known, self.spacing_rc)


class SampleStore:
    """Samples of one segmenter on one set, a file per slice and target under ``work/samples/<key>/``.

    Names of files are digests, so that nothing of a patient can be read from them.

    Args:
        work: folder for everything that tables keep.
        settings: what the samples are made with.
    """

    def __init__(self, work: Path, settings: SampleSettings) -> None:
        self.settings = settings
        self.folder = Path(work) / "samples" / settings.key

    def _path(self, slice_id: str, target: str) -> Path:
        return self.folder / f"{hashlib.sha256(f'{slice_id}|{target}'.encode()).hexdigest()[:24]}.npz"

    def has(self, slice_id: str, target: str) -> bool:
        """Whether samples of this slice and target are kept."""
        return self._path(slice_id, target).is_file()

    def get(self, slice_id: str, target: str) -> Samples | None:
        """The samples of a target on a slice; ``None`` where they are not kept. A damaged file is removed: it is a cache."""
        path = self._path(slice_id, target)
        try:
            with np.load(path, allow_pickle=False) as data:
                shape = tuple(int(v) for v in data["shape"])
                r0, r1, c0, c1 = (int(v) for v in data["box"])
                masks = np.zeros(shape, dtype=bool)
                masks[:, r0:r1, c0:c1] = np.unpackbits(data["bits"], axis=-1, count=c1 - c0).view(bool)
                probabilities = {}
                for count, part in zip(data["counts"], data["probability"], strict=True):
                    probabilities[int(count)] = np.zeros(shape[1:], dtype=np.float32)
                    probabilities[int(count)][r0:r1, c0:c1] = part
                spacing = data["spacing"]
        except FileNotFoundError:
            return None
        except (OSError, ValueError, KeyError, EOFError, zipfile.BadZipFile):
            path.unlink(missing_ok=True)
            return None
        return Samples(masks, probabilities, (float(spacing[0]), float(spacing[1])))

    def put(
        self,
        slice_id: str,
        target: str,
        masks: np.ndarray,
        probabilities: Mapping[int, np.ndarray],
        spacing_rc: tuple[float, float],
    ) -> None:
        """Keep samples: masks bool (N, rows, columns) and mean probabilities by number of samples.

        Raises:
            OutputError: the folder cannot be written to.
        """
        seen = np.logical_or.reduce(masks)
        for probability in probabilities.values():
            seen = seen | (probability > _FAINT)
        rows, columns = box = bounding_box(seen) or (slice(0, 0), slice(0, 0))
        inside = [_coarse(p[box]) for p in probabilities.values()]
        buffer = BytesIO()
        np.savez_compressed(
            buffer,
            bits=np.packbits(masks[(slice(None), *box)], axis=-1),
            box=np.array([rows.start, rows.stop, columns.start, columns.stop]),
            shape=np.array(masks.shape),
            counts=np.array(list(probabilities), dtype=np.int64),
            probability=np.stack(inside)
            if inside
            else np.zeros((0, rows.stop - rows.start, columns.stop - columns.start), np.float16),
            spacing=np.array(spacing_rc, dtype=np.float64),
        )
        if not self.folder.is_dir():
            self.folder.mkdir(parents=True, exist_ok=True)
            (self.folder / "about.json").write_text(json.dumps(asdict(self.settings), indent=1), encoding="utf-8")
        with atomic_file(self._path(slice_id, target)) as path:
            path.write_bytes(buffer.getvalue())


def _coarse(probability: np.ndarray) -> np.ndarray:
    """Probabilities in the middle of their level, float16: a third of the bytes, and the cut at one half is exact."""
    levels = np.ceil(np.asarray(probability, np.float64) * _LEVELS) - 0.5
    return np.where(probability > _FAINT, levels / _LEVELS, 0.0).astype(np.float16)


def absent_targets(item: LabelledSlice, vocabulary: Sequence[str]) -> list[str]:
    """Targets of the vocabulary that are labelled as not being on a slice."""
    return [t for t in vocabulary if t in item.labelled and not item.labels[t].any()]


def propose_into(
    store: SampleStore,
    engine: Engine,
    items: Iterable[LabelledSlice],
    targets: Callable[[LabelledSlice], Sequence[str]],
    checkpoints: Sequence[int] = (),
    around: Callable[[LabelledSlice], AbstractContextManager[None]] = lambda item: nullcontext(),
    progress: Callable[[int], None] = lambda done: None,
) -> int:
    """Sample what a store lacks, through the sampler that users run; whatever was sampled before is left as it is.

    Args:
        store: where the samples go; its settings say how many, in how many steps and with which seed.
        engine: the loaded engine, an adapter in use included.
        items: labelled slices.
        targets: the targets to ask for on a slice.
        checkpoints: numbers n of samples whose mean probability is kept beside that of all N.
        around: what is in force while a slice is sampled, e.g. an ablation.
        progress: told the number of slices done.

    Returns:
        Number of pairs of slice and target that were sampled now.

    Raises:
        InputError: a checkpoint beyond N, or a slice that the model cannot take.
    """
    settings = store.settings
    blocks = sorted({*checkpoints, settings.proposals})
    if blocks[0] < 1 or blocks[-1] > settings.proposals:
        raise InputError(f"Numbers of samples lie between 1 and {settings.proposals}, not at {blocks[0]} or {blocks[-1]}.")
    conditioner = Conditioner(engine.model)
    batch = CUDA_BATCH if engine.model.device.type == "cuda" else CPU_BATCH
    made = 0
    for done, item in enumerate(items):
        missing = tuple(t for t in targets(item) if not store.has(item.slice_id, t))
        if missing:
            array, affine = as_volume(item, engine.card)
            image = load_image(array, affine, item.modality, item.plane, engine.card)
            conditioner.forget_slices()
            sampler = Sampler(engine.model, image, conditioner)
            with around(item):
                for target in missing:
                    masks, probabilities = _sampled(sampler, image.plan, target, blocks, settings, batch)
                    store.put(item.slice_id, target, masks, probabilities, item.spacing_rc)
                    made += 1
        progress(done + 1)
    return made


def _sampled(
    sampler: Sampler, plan: SlicePlan, target: str, blocks: Sequence[int], settings: SampleSettings, batch: int
) -> tuple[np.ndarray, dict[int, np.ndarray]]:
    """Masks (N, H, W) of one target on the only slice, and the mean probability after each block."""
    probabilities: dict[int, np.ndarray] = {}

    def collect(event: object) -> None:
        if isinstance(event, SliceEvent) and (mean := event.mean_probability) is not None:
            probabilities[event.first_proposal + len(event.masks)] = mean

    request = ProposeRequest(
        (target,),
        proposals=settings.proposals,
        steps=settings.steps,
        seed=settings.seed,
        batch_size=batch,
        everywhere=settings.everywhere,
    )
    run = SamplingRun(request, plan, [0], batch, collect, lambda: False)
    for first, last in zip((0, *blocks[:-1]), blocks, strict=True):
        sampler.stream(run, [0], {target: range(first, last)}, keep=True)
    return run.proposals[target].slice_masks(0), probabilities
