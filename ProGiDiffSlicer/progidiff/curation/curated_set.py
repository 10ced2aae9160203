"""The curated set itself: adding, listing, removing, checking, and the index that nnU-Net reads."""

from __future__ import annotations

import json
import os
import secrets
import shutil
import time
import uuid
from collections.abc import Callable, Iterable, Iterator
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeAlias

import numpy as np

from progidiff.curation import transfer
from progidiff.curation.case import (
    FIELDS,
    FILE_ENDING,
    FORMAT_VERSION,
    IDENTIFIER,
    CuratedCase,
    Modality,
    NewCase,
    case_files,
    digest,
    explained,
    move,
    parse_case,
    read_image,
    replace,
    sync_folder,
    volume_key,
    write_image,
    write_json,
)
from progidiff.errors import DatasetError, InputError, why_left_out
from progidiff.places import flush
from progidiff.targets import catalog
from progidiff.volumes.geometry import Geometry

SET_FOLDER, SET_NAME = "progidiff-set", "set.json"
DATASETS: dict[Modality, str] = {"CT": "Dataset701_ProGiDiffCT", "MR": "Dataset702_ProGiDiffMR"}
STAGING = ".staging-"
_PARTS = ("imagesTr", "labelsTr", "cases", "removed")
_INDEX_TRIES = 20
#: What is younger may still be in somebody's hands.
SETTLED_S = 3600.0
_ALIKE_MM = 1e-3


@dataclass(frozen=True)
class Problem:
    """Something that is not as it should be.

    Attributes:
        case: id of the case, or the name of a leftover.
        message: a sentence.
        harmless: a leftover of an interrupted action; no case is affected.
        repaired: whether it was put right.
    """

    case: str
    message: str
    harmless: bool = False
    repaired: bool = False


# The class has a method of this name.
Cases: TypeAlias = list[CuratedCase]
Names: TypeAlias = list[str]
Paths: TypeAlias = list[Path]
Problems: TypeAlias = list[Problem]


class CuratedSet:
    """A folder of training examples: an nnU-Net raw root with one data set per modality.

    A case exists if and only if its file under ``cases/`` does, which appears last, by one rename, after image and label map
    are on the disk under random names. Whatever is killed, and whenever, no half case is ever listed. ``dataset.json`` is an
    index that is made again from these files after every change.

    Args:
        folder: the set's folder; a new or empty one becomes a set when the first case is added.
    """

    def __init__(self, folder: Path | str) -> None:
        self.folder = Path(folder)

    @staticmethod
    def is_set(folder: Path | str) -> bool:
        """Whether a folder holds a curated set."""
        return (Path(folder) / SET_FOLDER / SET_NAME).is_file()

    # What it holds --------------------------------------------------------------------------------------------------------

    def list(self) -> Cases:
        """All whole cases, by id. Damaged ones are left out; :meth:`verify` tells of them."""
        found: Cases = []
        for dataset in self._datasets():
            for path in _files(dataset / "cases"):
                try:
                    case = parse_case(path, dataset)
                except DatasetError:
                    continue
                if case.image_path.is_file() and case.label_path.is_file():
                    found.append(case)
        return sorted(found, key=lambda case: case.id)

    def damaged(self) -> dict[str, str]:
        """Why :meth:`list` leaves cases out, by their ids."""
        whole = {case.id for case in self.list()}
        found: dict[str, str] = {}
        for dataset in self._datasets():
            for path in _files(dataset / "cases"):
                if path.stem not in whole:
                    try:
                        parse_case(path, dataset)
                        found[path.stem] = (
                            f"The image or the label map of case {path.stem} is missing; restore it from a copy."
                        )
                    except DatasetError as error:
                        found[path.stem] = str(error)
        return found

    def counts(self, cases: Cases | None = None) -> dict[str, int]:
        """Number of cases by target, in the catalogue's order; of ``cases`` where they were listed already."""
        held: dict[str, int] = {}
        for case in self.list() if cases is None else cases:
            for target in case.targets:
                held[target] = held.get(target, 0) + 1
        order = [*catalog(), *held]
        return {target: held[target] for target in dict.fromkeys(order) if target in held}

    def removed(self) -> Names:
        """Ids of the cases that were removed and can be restored."""
        return sorted(path.stem for dataset in self._datasets() for path in _files(dataset / "removed"))

    def labels(self) -> dict[str, int]:
        """Values of the label maps by target; fixed when the set was made, so that nobody ever has to renumber.

        Raises:
            DatasetError: this is no set, or its description is damaged.
        """
        return {str(target): int(value) for target, value in self._description()["labels"].items()}

    # Changing it ----------------------------------------------------------------------------------------------------------

    def add(self, new: NewCase, check: Callable[[], None] = lambda: None) -> str:
        """Save a case; when this returns its id, the case is on the disk.

        Args:
            new: the case.
            check: called until the case begins to appear; what it raises leaves nothing of the case.

        Raises:
            InputError: a case that cannot be saved.
            DatasetError: the folder holds something else, or a set of another version.
            OutputError: the folder is full, read-only or gone; nothing is left of the case.
        """
        geometry = new.check()
        with explained(self.folder):
            self._make()
            table = self.labels()
            unknown = [target for target in new.masks if target not in table]
            if unknown:
                raise InputError(f"This set was made before {unknown[0]} was known; save it to a new set, and merge them.")
            label = np.zeros(new.image.shape, dtype=np.uint8 if max(table.values()) < 256 else np.uint16)
            for target, mask in new.masks.items():
                label[mask] = table[target]
            identifier = uuid.uuid4().hex
            staging = self.folder / f"{STAGING}{uuid.uuid4().hex}"
            staging.mkdir()
            try:
                staged = [staging / f"image{FILE_ENDING}", staging / f"label{FILE_ENDING}"]
                for path, array in zip(staged, (new.image, label), strict=True):
                    check()
                    write_image(path, array, geometry)
                facts = self._facts(new, identifier, table, staged)
                check()
                self._publish(identifier, DATASETS[new.modality], staged, facts, staging)
            finally:
                shutil.rmtree(staging, ignore_errors=True)
        self._refresh_index()
        return identifier

    def remove(self, identifier: str) -> None:
        """Take a case out of the set; :meth:`restore` brings it back. Done twice it changes nothing.

        Raises:
            DatasetError: there is no such case.
            OutputError: the folder cannot be changed.
        """
        dataset = self._dataset_of(identifier)
        trash = dataset / "removed"
        with explained(self.folder):
            trash.mkdir(exist_ok=True)
            if (dataset / "cases" / f"{identifier}.json").exists():
                # First what makes it a case: from here on nobody counts on the rest.
                move(dataset / "cases" / f"{identifier}.json", trash / f"{identifier}.json")
                sync_folder(dataset / "cases")
            for path in case_files(dataset, identifier):
                if path.exists():
                    move(path, trash / path.name)
            sync_folder(trash)
        self._refresh_index()

    def restore(self, identifier: str) -> None:
        """Bring a removed case back. Done twice it changes nothing.

        Raises:
            DatasetError: there is no such case.
            OutputError: the folder cannot be changed.
        """
        dataset = self._dataset_of(identifier)
        trash = dataset / "removed"
        with explained(self.folder):
            for path in case_files(dataset, identifier):
                if (trash / path.name).exists():
                    move(trash / path.name, path)
                    sync_folder(path.parent)
            if (trash / f"{identifier}.json").exists():
                move(trash / f"{identifier}.json", dataset / "cases" / f"{identifier}.json")
                sync_folder(dataset / "cases")
        self._refresh_index()

    def rebuild_index(self) -> int:
        """Write every ``dataset.json`` again from the cases; the number of cases.

        Whoever writes last lists all that is there: after writing, the cases are counted again, and if there are others by
        now, the index is written again.

        Raises:
            DatasetError: this is no set.
            OutputError: it cannot be written.
        """
        table = self.labels()
        count = 0
        with explained(self.folder):
            for modality, name in DATASETS.items():
                dataset = self.folder / name
                if not dataset.is_dir():
                    continue
                for _try in range(_INDEX_TRIES):
                    listed = [case for case in self.list() if case.modality == modality]
                    self._write_index(dataset, modality, table, listed)
                    if [case.id for case in self.list() if case.modality == modality] == [case.id for case in listed]:
                        break
                count += len(listed)
        return count

    # Looking after it -----------------------------------------------------------------------------------------------------

    def verify(self, repair: bool = False, older_than_s: float = SETTLED_S) -> Problems:
        """Check every case in full, and look for leftovers and duplicates.

        Args:
            repair: finish interrupted removals, move files that belong to no case to ``removed/``, take staging folders
                away, and write the index again. Nothing that was ever a case is deleted.
            older_than_s: only what is older is a leftover; younger files may belong to an action that is under way.

        Raises:
            DatasetError: this is no set.
            OutputError: something cannot be put right.
        """
        table = self.labels()
        problems: Problems = []
        seen: dict[tuple[str, str], str] = {}
        for dataset in self._datasets():
            for path in sorted((dataset / "cases").glob("*.json")):
                try:
                    case = parse_case(path, dataset)
                except DatasetError as error:
                    problems.append(Problem(path.stem, str(error)))
                    continue
                try:
                    problems += [Problem(case.id, message) for message in _case_problems(case, table)]
                except Exception as error:  # one case among many
                    problems.append(Problem(case.id, why_left_out("It", error)))
                twin = seen.setdefault((case.facts["image"]["sha256"], case.facts["label"]["sha256"]), case.id)
                if twin != case.id:
                    problems.append(Problem(case.id, f"It is the same as case {twin}; remove one of them.", harmless=True))
            problems += _leftovers(dataset, repair, older_than_s)
        problems += _staging(self.folder, repair, older_than_s)
        if repair:
            self.rebuild_index()
        return problems

    def export(self, out: Path, modality: Modality, targets: Iterable[str] | None = None) -> transfer.Exported:
        """Write a clean nnU-Net data set; see :func:`progidiff.curation.transfer.export`."""
        return transfer.export(self, out, modality, targets)

    def merge(self, other: CuratedSet) -> transfer.Merged:
        """Add the cases of another set; see :func:`progidiff.curation.transfer.merge`."""
        return transfer.merge(self, other)

    # ----------------------------------------------------------------------------------------------------------------------

    def _description(self) -> dict[str, Any]:
        path = self.folder / SET_FOLDER / SET_NAME
        try:
            content = json.loads(path.read_text(encoding="utf-8"))
            if str(content["format_version"]).split(".")[0] != FORMAT_VERSION.split(".")[0]:
                raise DatasetError(f'The set in "{self.folder}" is of a newer version; install that version to use it.')
            if not isinstance(content["labels"], dict) or not isinstance(content["secret"], str):
                raise TypeError
        except FileNotFoundError:
            raise DatasetError(
                f'"{self.folder}" is no curated set; name the folder that training examples were saved to.'
            ) from None
        except (OSError, ValueError, KeyError, TypeError) as error:
            raise DatasetError(f'The description of the set in "{self.folder}" is damaged; restore {SET_NAME}.') from error
        return dict(content)

    def _datasets(self) -> Paths:
        if not self.is_set(self.folder):
            return []
        return [path for name in DATASETS.values() if (path := self.folder / name).is_dir()]

    def _dataset_of(self, identifier: str) -> Path:
        if IDENTIFIER.fullmatch(identifier):
            for dataset in self._datasets():
                if any((dataset / part / f"{identifier}.json").exists() for part in ("cases", "removed")):
                    return dataset
        raise DatasetError(f'There is no case "{identifier}" in this set; "progidiff curate list" shows which there are.')

    def _make(self) -> None:
        """Make the set where there is none yet. Several people may do so at once: one of them wins, all use his."""
        if self.is_set(self.folder):
            return
        self.folder.mkdir(parents=True, exist_ok=True)
        foreign = [p.name for p in self.folder.iterdir() if not p.name.startswith(".") and p.name != SET_FOLDER]
        if foreign and not self.is_set(self.folder):
            raise DatasetError(f'"{self.folder}" holds other files; choose a new or empty folder for the training examples.')
        staging = self.folder / f"{STAGING}{uuid.uuid4().hex}"
        staging.mkdir()
        try:
            labels = {target: value for value, target in enumerate(catalog(), 1)}
            content = {"format_version": FORMAT_VERSION, "labels": labels, "secret": secrets.token_hex(32)}
            write_json(staging / SET_NAME, content)
            sync_folder(staging)
            # A folder is not renamed onto one that holds something: whoever comes second keeps the first one's set.
            with suppress(OSError):
                os.rename(staging, self.folder / SET_FOLDER)
            sync_folder(self.folder)
        finally:
            shutil.rmtree(staging, ignore_errors=True)
        self._description()

    def _facts(self, new: NewCase, identifier: str, table: dict[str, int], staged: Paths) -> dict[str, Any]:
        return {
            "format_version": FORMAT_VERSION,
            "id": identifier,
            "modality": new.modality,
            "plane": new.plane,
            "labels": {target: table[target] for target in new.masks},
            "shape_kji": [int(n) for n in new.image.shape],
            "affine": [[float(v) for v in row] for row in new.affine],
            "image": {"sha256": digest(staged[0]), "bytes": staged[0].stat().st_size},
            "label": {"sha256": digest(staged[1]), "bytes": staged[1].stat().st_size},
            "prompt": new.prompt,
            "code": None if new.code is None else dict(new.code),
            "proposal": None if new.proposal is None else dict(new.proposal),
            "edited": bool(new.edited),
            "editor": new.editor,
            "model_id": new.model_id,
            "adapter_id": new.adapter_id,
            "dice_to_proposal": None if new.dice_to_proposal is None else float(new.dice_to_proposal),
            "volume_key": volume_key(str(self._description()["secret"]), new.volume_key) if new.volume_key else identifier,
            "patient_key": new.patient_key,
        }

    def _publish(self, identifier: str, dataset_name: str, staged: Paths, facts: dict[str, Any], staging: Path) -> None:
        """Put a case in place: its voxels first, and last the file that makes it a case."""
        dataset = self.folder / dataset_name
        for part in _PARTS:
            (dataset / part).mkdir(parents=True, exist_ok=True)
        write_json(staging / f"{identifier}.json", facts)
        for path in staged:
            flush(path)
        for path, place in zip(staged, case_files(dataset, identifier), strict=True):
            move(path, place)
            sync_folder(place.parent)
        move(staging / f"{identifier}.json", dataset / "cases" / f"{identifier}.json")
        sync_folder(dataset / "cases")

    def _refresh_index(self) -> None:
        """The index follows; where it cannot, the cases are safe all the same, and it is made again at the next change."""
        with suppress(Exception):
            self.rebuild_index()

    def _write_index(self, dataset: Path, modality: Modality, table: dict[str, int], cases: Cases) -> None:
        index = {
            "channel_names": {"0": modality},
            "labels": {"background": 0, **table},
            "numTraining": len(cases),
            "file_ending": FILE_ENDING,
            "dataset": {
                case.id: {"images": [f"imagesTr/{case.image_path.name}"], "label": f"labelsTr/{case.label_path.name}"}
                for case in cases
            },
        }
        part = dataset / f".dataset-{uuid.uuid4().hex}.json"
        try:
            write_json(part, index)
            replace(part, dataset / "dataset.json")
        finally:
            part.unlink(missing_ok=True)


def _files(folder: Path) -> list[Path]:
    """The case files in a folder; a folder that went meanwhile holds none."""
    try:
        return sorted(path for path in folder.iterdir() if path.suffix == ".json" and IDENTIFIER.fullmatch(path.stem))
    except OSError:
        return []


def _case_problems(case: CuratedCase, table: dict[str, int]) -> Iterator[str]:
    strange = sorted(set(case.facts) - FIELDS)
    if strange:
        yield f"Its file says more than a case may ({', '.join(strange)}); make sure that it tells nothing of a patient."
    for target, value in case.label_ids.items():
        if table.get(target) != value:
            yield f"Its number for {target} is not the set's; it was copied in by hand, so use 'curate merge' instead."
    for what, path in (("image", case.image_path), ("label", case.label_path)):
        if not path.is_file():
            yield f"Its {what} is missing; restore the file, or remove the case."
            return
        if digest(path) != case.facts[what]["sha256"]:
            yield f"Its {what} was changed since it was saved (the checksum differs); restore the file, or remove the case."
            return
    try:
        labels = read_image(case.label_path)
        grids = [_grid(path) for path in (case.image_path, case.label_path)]
    except DatasetError as error:
        yield str(error)
        return
    affine = np.array(case.facts["affine"], dtype=np.float64)
    if grids[0][0] != grids[1][0] or any(np.abs(a - affine).max() > _ALIKE_MM for _shape, a in grids):
        yield "Image and label map do not lie on the grid that its file tells; remove the case."
    found = set(np.unique(labels).tolist()) - {0}
    if not found:
        yield "Its label map is empty; remove the case."
    elif found - set(case.label_ids.values()):
        yield "Its label map holds numbers that its file does not explain; remove the case."


def _grid(path: Path) -> tuple[tuple[int, ...], np.ndarray]:
    import SimpleITK as sitk  # not when Slicer's panel opens

    image = sitk.ReadImage(str(path))
    return tuple(image.GetSize()), Geometry.from_sitk(image).affine


def _leftovers(dataset: Path, repair: bool, older_than_s: float) -> list[Problem]:
    """Images and label maps without a case: of an addition or a removal that was interrupted."""
    known = {p.stem for p in (dataset / "cases").glob("*.json")}
    found = []
    for folder in ("imagesTr", "labelsTr"):
        for path in sorted((dataset / folder).glob("*.nii.gz")):
            identifier = path.name.split(".")[0].removesuffix("_0000")
            expected = path in case_files(dataset, identifier)
            if (expected and identifier in known) or _age(path) < older_than_s:
                continue
            repaired = False
            if repair:
                with explained(dataset), suppress(FileExistsError):
                    (dataset / "removed").mkdir(exist_ok=True)
                    move(path, dataset / "removed" / path.name)
                    repaired = True
            found.append(Problem(path.name, "It belongs to no case: saving or removing it was interrupted.", True, repaired))
    for path in sorted(dataset.glob(".dataset-*.json")):
        if _age(path) >= older_than_s:
            if repair:
                path.unlink(missing_ok=True)
            found.append(Problem(path.name, "It is left of an interrupted writing of the index.", True, repair))
    return found


def _staging(folder: Path, repair: bool, older_than_s: float) -> list[Problem]:
    found = []
    for path in sorted(folder.glob(".staging-*")):
        if _age(path) >= older_than_s:
            if repair:
                shutil.rmtree(path, ignore_errors=True)
            found.append(
                Problem(path.name, "It is left of an interrupted saving, which was not told as done.", True, repair)
            )
    return found


def _age(path: Path) -> float:
    try:
        return time.time() - path.stat().st_mtime
    except OSError:  # it went meanwhile: somebody is at work on it
        return -1.0
