"""Cases out of a set, as a data set for nnU-Net, and into it from another set."""

from __future__ import annotations

import json
import shutil
import uuid
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np

from progidiff.curation.case import FILE_ENDING, CuratedCase, Modality, digest, explained, patient_groups, write_image
from progidiff.errors import DatasetError, OutputError, why_left_out
from progidiff.places import replaced_folder
from progidiff.volumes.geometry import Geometry

if TYPE_CHECKING:
    from progidiff.curation.curated_set import CuratedSet

_FOLDS = 5


@dataclass(frozen=True)
class Exported:
    """What was exported.

    Attributes:
        folder: the data set.
        targets: its labels, in the order of their numbers.
        cases: how many.
        left_out: cases of the modality in which not all targets are known.
        patients: groups of cases that belong together.
        damaged: id and reason of each case that cannot be read and was left out.
    """

    folder: Path
    targets: tuple[str, ...]
    cases: int
    left_out: int
    patients: int
    damaged: tuple[tuple[str, str], ...] = ()


@dataclass(frozen=True)
class Merged:
    """What came of merging: ids of cases that were added, that were there already, that had been removed here, and that
    exist here with another content (which are left alone); and id and reason of each that is damaged and was left out.
    """

    added: tuple[str, ...]
    present: tuple[str, ...]
    removed: tuple[str, ...]
    conflicts: tuple[str, ...]
    damaged: tuple[tuple[str, str], ...] = ()


def export(kept: CuratedSet, out: Path, modality: Modality, targets: Iterable[str] | None = None) -> Exported:
    """Write a clean nnU-Net data set (raw layout, version 2) of the cases that know all of some targets.

    In a curated case every other target is unknown, which nnU-Net has no notion of; so only cases in which every exported
    target is known are written, with consecutive numbers. ``splits_final.json`` is nnU-Net's own file of folds; here they
    keep the cases of a patient together.

    Args:
        kept: the set.
        out: new or empty folder, such as ``nnUNet_raw/Dataset123_Liver``.
        modality: "CT" or "MR".
        targets: by default the target with the most cases.

    Raises:
        DatasetError: no case knows all targets, or none that does can be read.
        OutputError: the folder holds something, or cannot be written.
    """
    out = Path(out)
    cases = [case for case in kept.list() if case.modality == modality]
    wanted = tuple(targets) if targets is not None else _commonest(cases)
    chosen = [case for case in cases if wanted and set(wanted) <= set(case.targets)]
    if not chosen:
        raise DatasetError(f"No {modality} case of this set knows {' and '.join(wanted) or 'any target'}; choose others.")
    if out.exists() and (not out.is_dir() or any(out.iterdir())):
        raise OutputError(f'"{out}" holds something already; choose a new or empty folder.')
    written: list[CuratedCase] = []
    damaged: list[tuple[str, str]] = []
    with replaced_folder(out, "data set") as fresh:
        for part in ("imagesTr", "labelsTr"):
            (fresh / part).mkdir(parents=True)
        for case in chosen:
            try:
                _image, affine, masks = case.read()
            except Exception as error:  # one case among many
                damaged.append((case.id, why_left_out(case.id, error)))
                continue
            written.append(case)
            shutil.copyfile(case.image_path, fresh / "imagesTr" / case.image_path.name)
            label = sum(masks[target].astype(np.uint8) * np.uint8(number) for number, target in enumerate(wanted, 1))
            grid = Geometry(tuple(reversed(masks[wanted[0]].shape)), affine)  # type: ignore[arg-type]
            write_image(fresh / "labelsTr" / case.label_path.name, np.asarray(label, dtype=np.uint8), grid)
        if not written:
            raise DatasetError(f"None of the {len(chosen)} cases can be read; of the first one: {damaged[0][1]}")
        groups = patient_groups(written)
        index = {
            "channel_names": {"0": modality},
            "labels": {"background": 0, **{target: number for number, target in enumerate(wanted, 1)}},
            "numTraining": len(written),
            "file_ending": FILE_ENDING,
        }
        (fresh / "dataset.json").write_text(json.dumps(index, indent=1, ensure_ascii=False), encoding="utf-8")
        folds = _folds(groups)
        if folds:
            (fresh / "splits_final.json").write_text(json.dumps(folds, indent=1), encoding="utf-8")
        if out.exists():
            out.rmdir()  # where somebody has put something meanwhile, this fails
    left_out = len(cases) - len(chosen)
    return Exported(out, wanted, len(written), left_out, len(set(groups.values())), tuple(damaged))


def merge(kept: CuratedSet, other: CuratedSet) -> Merged:
    """Add the cases of another set under their ids; nothing that is here is changed. ``remove`` undoes it, case by case.

    Keys of volumes hold within one set: cases of one volume that two sets hold are not recognised as such afterwards, unless
    they carry a patient key.

    Raises:
        DatasetError: one of them is no set, or their label tables differ.
        OutputError: this set cannot be changed.
    """
    table = other.labels()
    if not kept.is_set(kept.folder):
        raise DatasetError(f'"{kept.folder}" is no curated set; name the set to merge into.')
    if any(kept.labels().get(target, value) != value for target, value in table.items()):
        raise DatasetError("The two sets number their targets differently, because they were made by different versions.")
    here = {case.id: case for case in kept.list()}
    trash = set(kept.removed())
    added: list[str] = []
    present: list[str] = []
    removed: list[str] = []
    conflicts: list[str] = []
    damaged: list[tuple[str, str]] = []
    for case in other.list():
        own = here.get(case.id)
        if own is not None:
            same = all(own.facts[part]["sha256"] == case.facts[part]["sha256"] for part in ("image", "label"))
            (present if same else conflicts).append(case.id)
        elif case.id in trash:
            removed.append(case.id)
        else:
            try:
                _take(kept, case)
            except OutputError:
                raise
            except Exception as error:  # one case among many
                damaged.append((case.id, why_left_out(case.id, error)))
            else:
                added.append(case.id)
    if added:
        kept.rebuild_index()
    return Merged(tuple(added), tuple(present), tuple(removed), tuple(conflicts), tuple(damaged))


def _take(kept: CuratedSet, case: CuratedCase) -> None:
    from progidiff.curation.curated_set import DATASETS, STAGING

    staging = kept.folder / f"{STAGING}{uuid.uuid4().hex}"
    with explained(kept.folder):
        staging.mkdir()
        try:
            staged = [staging / "image", staging / "label"]
            for path, source, what in zip(staged, (case.image_path, case.label_path), ("image", "label"), strict=True):
                shutil.copyfile(source, path)
                if digest(path) != case.facts[what]["sha256"]:
                    raise DatasetError(f"The {what} of case {case.id} is damaged; look with 'progidiff curate verify'.")
            kept._publish(case.id, DATASETS[case.modality], staged, dict(case.facts), staging)
        finally:
            shutil.rmtree(staging, ignore_errors=True)


def _commonest(cases: list[CuratedCase]) -> tuple[str, ...]:
    counts: dict[str, int] = {}
    for case in cases:
        for target in case.targets:
            counts[target] = counts.get(target, 0) + 1
    return (max(counts, key=lambda target: (counts[target], target)),) if counts else ()


def _folds(groups: dict[str, str]) -> list[dict[str, list[str]]]:
    """nnU-Net's folds with the cases of a patient together; none where there are too few patients."""
    patients = sorted(set(groups.values()))
    if len(patients) < _FOLDS:
        return []
    held = {patient: number % _FOLDS for number, patient in enumerate(patients)}
    return [
        {
            "train": sorted(case for case, patient in groups.items() if held[patient] != fold),
            "val": sorted(case for case, patient in groups.items() if held[patient] == fold),
        }
        for fold in range(_FOLDS)
    ]
