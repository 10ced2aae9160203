"""A curated set as stacks to train on: a case labels its own targets, and everything else in it is unknown."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from functools import partial
from pathlib import Path

import numpy as np

from progidiff.curation import CuratedCase, CuratedSet, patient_groups
from progidiff.datasets.naming import with_unions
from progidiff.datasets.nnunet import NnUNetDataset
from progidiff.datasets.slices import LabelledSlice, Modality, SliceFolder
from progidiff.errors import DatasetError
from progidiff.training.stacks import Stack, open_dataset, stacks_of
from progidiff.volumes.geometry import Geometry
from progidiff.volumes.slicing import USUAL_PLANES, extract_slice, plan_slices


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
