"""Labelled images to evaluate on: volumes of nnU-Net folders and curated sets, slices of slice folders or in memory."""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import NoReturn

import numpy as np
import torch
from torch import Tensor

from progidiff.cards import ModelCard
from progidiff.curation import CuratedCase, CuratedSet, patient_groups
from progidiff.datasets.nnunet import Case, NnUNetDataset
from progidiff.datasets.slices import MANIFEST_NAME, LabelledSlice, SliceFolder, with_unions
from progidiff.errors import DatasetError
from progidiff.sampling.image import ModelGrid, lay_grid, normaliser
from progidiff.synthesis.source import SyntheticSource
from progidiff.synthesis.tissues import PHANTOM_TARGETS, VOCABULARY
from progidiff.volumes.geometry import Geometry
from progidiff.volumes.slicing import SlicePlan, plan_slices

HELD_OUT_SEED = 20_260_000
#: Direction (RAS) of growing columns, rows and slices for a canonical view of each plane.
_DIRECTIONS: dict[str, tuple[tuple[int, int, int], tuple[int, int, int], tuple[int, int, int]]] = {
    "axial": ((-1, 0, 0), (0, -1, 0), (0, 0, 1)),
    "coronal": ((-1, 0, 0), (0, 0, -1), (0, 1, 0)),
    "sagittal": ((0, -1, 0), (0, 0, -1), (1, 0, 0)),
}


@dataclass(frozen=True, eq=False)
class LabelledImage:
    """An image with its reference masks.

    Attributes:
        array: numeric (K, J, I), HU for CT.
        geometry: its grid.
        modality: "CT" or "MR".
        plan: how it is cut into slices; a single slice is a volume of one.
        labelled: targets that are labelled; any other target is unknown, never background.
        reference: target -> bool (K, J, I).
        ignored: bool (K, J, I), voxels of which nothing is known, or ``None``.
        notes: sentences about its labels.
    """

    array: np.ndarray
    geometry: Geometry
    modality: str
    plan: SlicePlan
    labelled: frozenset[str]
    reference: Callable[[str], np.ndarray]
    ignored: np.ndarray | None = None
    notes: tuple[str, ...] = ()


@dataclass(frozen=True)
class EvaluationCase:
    """A labelled image that is read when it is needed.

    Attributes:
        set: name of its set.
        name: its name, unique within the set.
        patient: the unit of confidence intervals.
        labelled: targets that may be labelled in it.
        fingerprint: digest of image and labels, to know whether a result that is kept still fits.
        read: reads it.
        spacing_exact: whether the pixel size is known and not only typical.
    """

    set: str
    name: str
    patient: str
    labelled: frozenset[str]
    fingerprint: Callable[[], str]
    read: Callable[[], LabelledImage]
    spacing_exact: bool = True


def cases_of_folder(folder: Path, card: ModelCard, plane: str | None = None) -> list[EvaluationCase]:
    """The cases of a curated set, an nnU-Net raw folder (volumes) or a slice folder (slices).

    Volumes are cut in ``plane``, by default in the one that suits them and the model; the others have one already.

    Raises:
        DatasetError: it is none of these, or damaged.
    """
    folder = Path(folder)
    name = folder.name or folder.resolve().name
    if CuratedSet.is_set(folder):
        curated, damaged = CuratedSet(folder).list(), CuratedSet(folder).damaged()
        if not curated and not damaged:
            raise DatasetError(f"The curated set '{folder}' holds no case yet; save some training examples first.")
        groups = patient_groups(curated)
        cases = [_curated(case, name, groups[case.id]) for case in curated]
        refused = ((case, partial(_refused, reason)) for case, reason in damaged.items())
        return cases + [EvaluationCase(name, case, case, frozenset(), refuse, refuse) for case, refuse in refused]
    if CuratedSet.is_set(folder.parent):
        raise DatasetError(
            f"'{folder}' is a part of a curated set, whose cases label single organs only; name '{folder.parent}' instead."
        )
    if (folder / MANIFEST_NAME).is_file():
        data = SliceFolder(folder)
        return [
            EvaluationCase(
                name,
                entry.id or entry.image,
                entry.patient,
                data.labelled_in(entry),
                partial(_slice_fingerprint, partial(data.read, entry)),
                partial(_slice, partial(data.read, entry), card),
                data.manifest.settings(entry).spacing_exact,
            )
            for entry in data.manifest.slices
        ]
    if (folder / "dataset.json").is_file():
        volumes = NnUNetDataset(folder, plane=plane, known=card.planes)
        return [
            EvaluationCase(
                name,
                case.name,
                volumes.patient_of(case),
                volumes.labelled_targets,
                partial(_files_fingerprint, (case.image, case.label), repr((volumes.labels, volumes.ignored_values))),
                partial(_volume, volumes, case),
            )
            for case in volumes.cases
        ]
    raise DatasetError(
        f"'{folder}' is no labelled set; name a curated set, an nnU-Net raw folder (with dataset.json) or a slice folder"
        f" (with {MANIFEST_NAME})."
    )


def cases_of_slices(items: Iterable[LabelledSlice], name: str, card: ModelCard) -> list[EvaluationCase]:
    """Slices in memory as cases of a set ``name``."""
    return [
        EvaluationCase(
            name,
            item.slice_id,
            item.patient,
            item.labelled,
            partial(_slice_fingerprint, partial(_given, item)),
            partial(_slice, partial(_given, item), card),
            item.spacing_exact,
        )
        for item in items
    ]


def _given(item: LabelledSlice) -> LabelledSlice:
    return item


def _slice(read: Callable[[], LabelledSlice], card: ModelCard) -> LabelledImage:
    item = read()
    array, affine = as_volume(item, card)
    geometry = Geometry((array.shape[2], array.shape[1], 1), affine)
    plan = plan_slices(geometry, item.plane)
    labels = item.labels
    return LabelledImage(array, geometry, item.modality, plan, item.labelled, lambda target: labels[target][None])


def _volume(data: NnUNetDataset, case: Case) -> LabelledImage:
    image, label = data.volume(case)
    values = label.array
    ids = _ids_with_unions(data.labels)
    ignored = np.isin(values, data.ignored_values) if data.ignored_values else None
    return LabelledImage(
        image.array,
        image.geometry,
        data.modality,
        plan_slices(image.geometry, data.plane, data.known),
        data.labelled_targets,
        lambda target: np.isin(values, ids[target]),
        ignored if ignored is not None and ignored.any() else None,
        tuple(data.warnings),
    )


def _ids_with_unions(labels: Mapping[str, Sequence[int]]) -> dict[str, list[int]]:
    """Values of every target and of unions such as "kidneys", without a mask of the volume for each."""
    values = np.array(sorted({value for ids in labels.values() for value in ids}))
    flags = with_unions({target: np.isin(values, ids) for target, ids in labels.items()})
    return {target: values[flag].tolist() for target, flag in flags.items()}


def _refused(reason: str) -> NoReturn:
    raise DatasetError(reason)


def _curated(case: CuratedCase, name: str, patient: str) -> EvaluationCase:
    labelled = frozenset(with_unions({target: np.zeros(1, dtype=bool) for target in case.targets}))
    mark, read = partial(_curated_fingerprint, case), partial(_read_curated, case)
    return EvaluationCase(name, case.id, patient, labelled, mark, read)


def _read_curated(case: CuratedCase) -> LabelledImage:
    array, affine, masks = case.read()
    every = with_unions(masks)
    geometry = Geometry(array.shape[::-1], affine)
    plan = plan_slices(geometry, case.plane)
    return LabelledImage(array, geometry, case.modality, plan, frozenset(every), every.__getitem__)


def _curated_fingerprint(case: CuratedCase) -> str:
    image = _read_curated(case)
    digest = hashlib.blake2b(np.ascontiguousarray(image.array).tobytes(), digest_size=16)
    for target in sorted(image.labelled):
        digest.update(target.encode() + np.packbits(image.reference(target)).tobytes())
    return digest.hexdigest()


def _slice_fingerprint(read: Callable[[], LabelledSlice]) -> str:
    item = read()
    facts = repr((item.image.shape, item.spacing_rc, item.modality, item.window, item.plane, sorted(item.labelled)))
    digest = hashlib.blake2b(facts.encode() + np.ascontiguousarray(item.image).tobytes(), digest_size=16)
    for target in sorted(item.labels):
        digest.update(target.encode() + np.packbits(item.labels[target]).tobytes())
    return digest.hexdigest()


def _files_fingerprint(paths: Sequence[Path], more: str) -> str:
    from progidiff.active.search import fingerprint

    digest = hashlib.blake2b(more.encode(), digest_size=16)
    for path in paths:
        digest.update(fingerprint(path).encode())
    return digest.hexdigest()


def as_volume(item: LabelledSlice, card: ModelCard) -> tuple[np.ndarray, np.ndarray]:
    """A slice as a volume of one slice.

    An already windowed CT slice is brought back to Hounsfield units by the model's own window, so that it passes through
    the same code as a scan; what the window cut off stays cut off.

    Args:
        item: the slice.
        card: card of the model that will see it.

    Returns:
        float32 array (1, rows, columns) and affine (4, 4), IJK to RAS in mm.
    """
    pixels = item.image.astype(np.float32)
    if item.window == "display" and item.modality == "CT":
        window = card.window("CT")
        pixels = pixels * (window.high - window.low) + window.low
    affine = np.eye(4)
    steps = (item.spacing_rc[1], item.spacing_rc[0], 5.0)
    for axis, (direction, step) in enumerate(zip(_DIRECTIONS[item.plane], steps, strict=True)):
        affine[:3, axis] = np.array(direction) * step
    return pixels[None], affine


def on_grid(item: LabelledSlice, card: ModelCard) -> tuple[ModelGrid, Tensor]:
    """A slice as the networks see it: the model's grid, and the pixels on it, float32 (1, 1, S, S) in [0, 1] on the CPU."""
    array, _ = as_volume(item, card)
    image = normaliser(array, card, item.modality)(array[0])
    shape = (image.shape[0], image.shape[1])
    grid = lay_grid(card, item.plane, [image], shape, item.spacing_rc)
    return grid, grid.to_model(torch.from_numpy(image))


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
