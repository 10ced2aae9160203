"""Whether a curated set is as it should be, and what an interrupted hand has left behind."""

from __future__ import annotations

import shutil
import time
from collections.abc import Iterator
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np

from progidiff.curation.case import FIELDS, CuratedCase, case_files, parse_case, read_image
from progidiff.curation.files import digest, explained, move
from progidiff.errors import DatasetError, why_left_out
from progidiff.volumes.geometry import Geometry

if TYPE_CHECKING:
    from progidiff.curation.curated_set import CuratedSet

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


def verify(kept: CuratedSet, repair: bool = False, older_than_s: float = SETTLED_S) -> list[Problem]:
    """Check every case in full, and look for leftovers and duplicates.

    Args:
        kept: the set.
        repair: finish interrupted removals, move files that belong to no case to ``removed/``, take staging folders away,
            and write the index again. Nothing that was ever a case is deleted.
        older_than_s: only what is older is a leftover; younger files may belong to an action that is under way.

    Raises:
        DatasetError: this is no set.
        OutputError: something cannot be put right.
    """
    table = kept.labels()
    problems: list[Problem] = []
    seen: dict[tuple[str, str], str] = {}
    for dataset in kept._datasets():
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
    problems += _staging(kept.folder, repair, older_than_s)
    if repair:
        kept.rebuild_index()
    return problems


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
