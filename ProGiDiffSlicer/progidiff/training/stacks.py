"""Labelled slices as the model sees them: grouped by volume, normalised and laid on the model's grid as at inference.

A case of a curated set labels its own targets, and everything else in it is unknown.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from progidiff.cards import ModelCard
from progidiff.curation import CuratedCase, CuratedSet, patient_groups
from progidiff.datasets.nnunet import Case, NnUNetDataset
from progidiff.datasets.slices import MANIFEST_NAME, LabelledSlice, Modality, SliceFolder, with_unions
from progidiff.errors import DatasetError, InputError
from progidiff.sampling.image import ModelGrid, lay_grid, normaliser
from progidiff.volumes.geometry import Geometry
from progidiff.volumes.slicing import USUAL_PLANES, extract_slice, plan_slices

#: A target with no more pixels than this on the model's grid counts as absent, as in :func:`batches.pick_prompts`.
MIN_PIXELS = 15
#: Of slices without any known target, every fourth is kept: they teach what absence looks like, but volumes hold many.
_EMPTY_STEP = 4
#: Slices whose common bounding box places the grid, as the engine does it.
_CENTRE_SLICES = 7


@dataclass(frozen=True)
class Stack:
    """Slices of one volume (or of one patient's pictures), read when they are needed.

    Attributes:
        name: name within its data set.
        patient: the unit of splits.
        labelled: targets that at least one slice labels.
        read: reads the slices.
    """

    name: str
    patient: str
    labelled: frozenset[str]
    read: Callable[[], Sequence[LabelledSlice]]


@dataclass(frozen=True)
class PreparedStack:
    """Slices on the model's grid with a margin around it, packed.

    Attributes:
        images: float16 (n, P, Q) in [0, 1]; P and Q are the grid's rows and columns and twice its margin.
        masks: uint8 (n, V, bytes), bits of bool (P, Q) per target of the vocabulary.
        known: bool (n, V), whether the target is labelled on the slice.
        present: bool (n, V), whether it is known and covers more than :data:`MIN_PIXELS` pixels.
        is_mr: whether it is MR.
        plane: plane of the slices.
        patient: the patient.
        pixel_mm: pixel size of the grid.
    """

    images: np.ndarray
    masks: np.ndarray
    known: np.ndarray
    present: np.ndarray
    is_mr: bool
    plane: str
    patient: str
    pixel_mm: float

    @property
    def bytes(self) -> int:
        """Memory that it takes."""
        return self.images.nbytes + self.masks.nbytes

    def __len__(self) -> int:
        """Number of slices."""
        return len(self.images)

    def slice(self, index: int) -> tuple[Tensor, Tensor, Tensor]:
        """Image float32 (P, Q), masks bool (V, P, Q), known bool (V,)."""
        rows, columns = self.images.shape[-2:]
        bits = np.unpackbits(self.masks[index], axis=-1, count=rows * columns)
        masks = torch.from_numpy(bits.reshape(-1, rows, columns)).bool()
        return torch.from_numpy(self.images[index]).float(), masks, torch.from_numpy(self.known[index])


def open_dataset(
    folder: Path,
    plane: str | None = None,
    known: Sequence[str] = USUAL_PLANES,
    correct_values: bool = False,
    tell: Callable[[str], None] = lambda sentence: None,
) -> NnUNetDataset | SliceFolder:
    """A data set by its folder: nnU-Net raw (``dataset.json``) or slices with a manifest (``manifest.json``).

    ``plane``, ``known`` and ``correct_values`` are about volumes, see :class:`NnUNetDataset`; slices are what they are.
    ``tell`` is told what a user should know of its labels and values.

    Raises:
        DatasetError: it is neither.
    """
    if (folder / MANIFEST_NAME).is_file():
        return SliceFolder(folder)
    if (folder / "dataset.json").is_file():
        return NnUNetDataset(folder, plane=plane, known=known, correct_values=correct_values, tell=tell)
    raise DatasetError(
        f"'{folder}' is no data set; name an nnU-Net raw folder (with dataset.json) or a slice folder"
        f" (with {MANIFEST_NAME})."
    )


def stacks_of(data: NnUNetDataset | SliceFolder | Iterable[LabelledSlice]) -> list[Stack]:
    """The stacks of a data set; single slices of one patient, size, modality and plane form one stack."""
    if isinstance(data, NnUNetDataset):
        labelled = data.labelled_targets
        return [Stack(c.name, data.patient_of(c), labelled, partial(_slices_of, data, c)) for c in data.cases]
    groups: dict[tuple[object, ...], list[tuple[str, str, frozenset[str], Callable[[], LabelledSlice]]]] = {}
    if isinstance(data, SliceFolder):
        for entry in data.manifest.slices:
            s = data.manifest.settings(entry)
            group = (entry.patient, s.modality, s.window, s.plane, s.spacing_mm, s.transpose)
            member = (entry.id or entry.image, entry.patient, data.labelled_in(entry), partial(data.read, entry))
            groups.setdefault(group, []).append(member)
    else:
        for item in data:
            alike: tuple[object, ...] = (item.patient, item.modality, item.window, item.plane, item.spacing_rc)
            groups.setdefault(alike, []).append((item.slice_id, item.patient, item.labelled, partial(_given, item)))
    return [
        Stack(m[0][0], m[0][1], frozenset[str]().union(*(x[2] for x in m)), partial(_read_all, [x[3] for x in m]))
        for m in groups.values()
    ]


def _slices_of(data: NnUNetDataset, case: Case) -> list[LabelledSlice]:
    return list(data.slices(case))


def _given(item: LabelledSlice) -> LabelledSlice:
    return item


def _read_all(readers: Sequence[Callable[[], LabelledSlice]]) -> list[LabelledSlice]:
    return [read() for read in readers]


def margin_of(card: ModelCard) -> int:
    """Pixels kept around the grid, so that augmentation can shift and turn without running out of picture."""
    return max(max(size) for size in (*card.body_grids.values(), (card.image_size,))) // 16


def prepare(stack: Stack, card: ModelCard, spare_empty: bool = True) -> PreparedStack | None:
    """Read a stack and bring it onto the model's grid; ``None`` where no slice labels a target of the vocabulary.

    Args:
        stack: the stack.
        card: grid, windows and vocabulary of the model.
        spare_empty: leave out most slices that show no known target.

    Raises:
        DatasetError: the images cannot be read or are uniform.
        ModelError: the model was not made for the modality.
    """
    slices = list(stack.read())
    if not slices:
        return None
    first = slices[0]
    images = _normalised(stack, slices, card)
    look = np.linspace(0, len(images) - 1, min(len(images), _CENTRE_SLICES)).round().astype(int)
    alike = len({image.shape for image in images}) == 1
    margin = margin_of(card)

    def laid(slices: list[np.ndarray], spacing_rc: tuple[float, float]) -> ModelGrid:
        rows, columns = slices[0].shape
        grid = lay_grid(card, first.plane, slices, (rows, columns), spacing_rc)
        return replace(grid, size=(grid.size[0] + 2 * margin, grid.size[1] + 2 * margin))

    common = laid([images[int(i)] for i in look], first.spacing_rc) if alike else None
    rows: list[tuple[np.ndarray, np.ndarray, np.ndarray, np.ndarray]] = []
    empty = 0
    for item, image in zip(slices, images, strict=True):
        # The grid of the engine, with a margin: the pixels inside are the same as at inference.
        grid = common or laid([image], item.spacing_rc)
        masks = np.zeros((len(card.vocabulary), *grid.size), dtype=bool)
        known = np.array([target in item.labelled and target in item.labels for target in card.vocabulary])
        for v, target in enumerate(card.vocabulary):
            if known[v] and item.labels[target].any():
                mask = torch.from_numpy(np.ascontiguousarray(item.labels[target], dtype=np.float32))
                masks[v] = (grid.to_model(mask)[0, 0] > 0.5).numpy()
        if not known.any():
            continue
        present = known & (masks.sum((1, 2)) > MIN_PIXELS)
        if not present.any():
            empty += 1
            if spare_empty and empty % _EMPTY_STEP != 1:
                continue
        pixels = grid.to_model(torch.from_numpy(np.ascontiguousarray(image)))[0, 0].numpy().astype(np.float16)
        pixel_mm = grid.pixel_mm
        rows.append((pixels, np.packbits(masks.reshape(len(masks), -1), axis=-1), known, present))
    if not rows:
        return None
    pixels, bits, labelled, shown = (np.stack(column) for column in zip(*rows, strict=True))
    return PreparedStack(pixels, bits, labelled, shown, first.modality == "MR", first.plane, stack.patient, pixel_mm)


def _normalised(stack: Stack, slices: Sequence[LabelledSlice], card: ModelCard) -> list[np.ndarray]:
    """float32 images in [0, 1]; percentiles are taken of the whole stack, as the engine takes them of a volume."""
    first = slices[0]
    if first.window == "display" and first.modality == "CT":
        card.window("CT")  # refuses a model that was not made for CT
        return [item.image for item in slices]
    values = np.concatenate([item.image.reshape(-1) for item in slices])
    try:
        normalise = normaliser(values, card, first.modality)
    except InputError as error:
        raise DatasetError(f"The images of '{stack.name}' are uniform; leave them out.") from error
    return [normalise(item.image) for item in slices]


def open_cases(
    folders: Iterable[Path],
    plane: str | None = None,
    known: Sequence[str] = USUAL_PLANES,
    correct_values: bool = False,
    tell: Callable[[str], None] = lambda sentence: None,
) -> tuple[list[Stack], list[Modality]]:
    """Stacks of curated sets, nnU-Net raw folders and slice folders, and their modalities.

    How volumes of nnU-Net folders are cut and read is told by the other arguments, see :class:`NnUNetDataset`; a curated
    case keeps the plane that it was saved with.

    Raises:
        DatasetError: a folder that is none of these, or holds no case.
    """
    stacks: list[Stack] = []
    modalities: set[Modality] = set()
    for folder in folders:
        if CuratedSet.is_set(folder):
            cases, damaged = CuratedSet(folder).list(), CuratedSet(folder).damaged()
            if damaged:
                tell(f'{len(damaged)} cases are damaged and left out; "progidiff curate verify" says why.')
            if not cases:
                raise DatasetError(f"The curated set '{folder}' holds no case yet; save some training examples first.")
            groups = patient_groups(cases)
            stacks += [curated_stack(case, groups[case.id]) for case in cases]
            modalities |= {_modality(case.modality) for case in cases}
            continue
        data = open_dataset(folder, plane, known, correct_values, tell)
        stacks += stacks_of(data)
        if isinstance(data, NnUNetDataset):
            modalities.add(data.modality)
        elif isinstance(data, SliceFolder):
            modalities |= {_modality(data.manifest.settings(entry).modality) for entry in data.manifest.slices}
    return stacks, sorted(modalities)


def curated_stack(case: CuratedCase, patient: str) -> Stack:
    """The stack of one case; nothing is read before its turn."""
    labelled = frozenset(with_unions({target: np.zeros(1, dtype=bool) for target in case.targets}))
    return Stack(case.id, patient, labelled, partial(_read, case, patient))


def _read(case: CuratedCase, patient: str) -> list[LabelledSlice]:
    image, affine, masks = case.read()
    plan = plan_slices(Geometry(image.shape[::-1], affine), case.plane)
    labelled = frozenset(with_unions(masks))
    found = []
    for index in range(plan.count):
        labels = with_unions({target: extract_slice(mask, plan, index) for target, mask in masks.items()})
        found.append(
            LabelledSlice(
                image=np.ascontiguousarray(extract_slice(image, plan, index), dtype=np.float32),
                spacing_rc=plan.spacing_rc,
                labels=labels,
                labelled=labelled,
                patient=patient,
                modality=_modality(case.modality),
                slice_id=f"{case.id}_{index}",
                plane=plan.plane,
            )
        )
    return found


def _modality(name: str | None) -> Modality:
    return "MR" if name == "MR" else "CT"
