"""Data sets in nnU-Net's raw format (https://github.com/MIC-DKFZ/nnUNet, documentation/dataset_format.md)."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from progidiff.datasets.slices import LabelledSlice, Modality, read_json, target_of, with_unions
from progidiff.errors import DatasetError, InputError
from progidiff.targets.catalog import part_of
from progidiff.volumes.slicing import USUAL_PLANES, extract_slice, plan_slices
from progidiff.volumes.values import not_hounsfield

if TYPE_CHECKING:
    from progidiff.volumes.reading import Volume

FILE_ENDINGS = (".nii.gz", ".nii", ".nrrd", ".mha", ".mhd")

_MR_CHANNELS = frozenset({"mr", "mri", "t1", "t2", "t1w", "t2w", "flair", "adc", "dwi", "t1ce", "t1gd"})
_MOST_LISTED = 8
_BACKGROUND = frozenset({"background", "bg", "unlabelled", "unlabeled"})


@dataclass(frozen=True)
class Case:
    """Paths of one labelled case."""

    name: str
    image: Path
    label: Path


class NnUNetDataset:
    """The labelled cases of an nnU-Net raw folder (`dataset.json`, `imagesTr`, `labelsTr`), slice by slice.

    Both forms of `dataset.json` are read: version 2 (``"labels": {"liver": 1}``, also regions such as
    ``"kidney": [1, 2]``, and an "ignore" label) and version 1 (``"labels": {"1": "liver"}``, images
    without a channel number). Only one case is in memory at a time.

    Args:
        folder: the data set's folder, e.g. ``Dataset005_Abdomen``.
        channel: which image channel to use where there are several.
        modality: ``"CT"`` or ``"MR"``; ``None`` takes it from the channel's name.
        patient_of: case name -> patient; by default every case is a patient of its own.
        plane: plane of the slices; ``None`` takes the one that suits each volume and ``known``.
        known: the planes of the model that the slices are for.
        correct_values: take values of a CT that cannot be Hounsfield units for what they look like.
        tell: told each of the ``warnings`` once, when it is noticed, and once where values of a CT that is read cannot be
            Hounsfield units.

    Attributes:
        cases: the labelled cases, by name.
        modality: ``"CT"`` or ``"MR"``.
        labels: target key -> the values that mean it.
        ignored_values: values of the "ignore" label; nothing is known about their voxels.
        labelled_targets: the targets that this set labels (with unions such as "kidneys"); all others are
            unknown in it, never background.
        warnings: sentences about labels that were left out or mean something else than their names say; more may come
            while the label maps are read.

    Raises:
        DatasetError: a folder that is not such a data set, or that labels no known target.
    """

    def __init__(
        self,
        folder: Path,
        channel: int = 0,
        modality: Modality | None = None,
        patient_of: Callable[[str], str] | None = None,
        plane: str | None = None,
        known: Sequence[str] = USUAL_PLANES,
        correct_values: bool = False,
        tell: Callable[[str], None] = lambda sentence: None,
    ) -> None:
        self.folder = Path(folder)
        self.channel = channel
        self.plane = plane
        self.known = tuple(known)
        self.correct_values = correct_values
        self._told = False
        self.warnings: list[str] = []
        self._tell = tell
        self._patient_of = patient_of or (lambda name: name)
        description = _read_description(self.folder)
        named = list(_named_labels(description, self.folder.name))
        self._values = frozenset({0}.union(*(ids for _, ids in named)))
        self.labels, self.ignored_values = self._read_labels(named)
        if not self.labels:
            raise DatasetError(
                f"No label of '{self.folder.name}' names a known organ; check the names under 'labels' in dataset.json."
            )
        self.labelled_targets = frozenset(with_unions({key: np.zeros(1, dtype=bool) for key in self.labels}))
        self.modality: Modality = modality or self._modality(description)
        self.cases = self._find_cases(description)

    def __len__(self) -> int:
        """Number of labelled cases."""
        return len(self.cases)

    def __iter__(self) -> Iterator[LabelledSlice]:
        """All slices of all cases, in the order of the cases' names."""
        for case in self.cases:
            yield from self.slices(case)

    @property
    def patients(self) -> frozenset[str]:
        """All patients."""
        return frozenset(self._patient_of(case.name) for case in self.cases)

    def patient_of(self, case: Case) -> str:
        """Patient of a case."""
        return self._patient_of(case.name)

    def volume(self, case: Case) -> tuple[Volume, Volume]:
        """Image and label map of one case, on one grid; the label map holds whole numbers, a CT Hounsfield units where its
        values were corrected.

        Raises:
            DatasetError: one of them cannot be read, or they do not fit each other.
        """
        image, label = self._read(case.image), self._read(case.label)
        if not image.geometry.is_close(label.geometry):
            raise DatasetError(
                f"The label map of case '{case.name}' does not lie on its image's grid; resample it to the image."
            )
        if label.array.dtype.kind == "f" and not np.array_equal(label.array, np.rint(label.array)):
            raise DatasetError(f"The label map of case '{case.name}' holds values that are no whole numbers; check it.")
        unnamed = sorted({int(value) for value in np.unique(label.array)} - self._values)
        if unnamed:
            values = ", ".join(map(str, unnamed[:_MOST_LISTED])) + (" and more" if len(unnamed) > _MOST_LISTED else "")
            self._warn(
                f"Label maps of '{self.folder.name}' hold values that dataset.json does not name ({values}); their voxels"
                " count as background, so name the values under 'labels' if they are an organ."
            )
        return self._in_hounsfield(image) if self.modality == "CT" else image, label

    def slices(self, case: Case) -> Iterator[LabelledSlice]:
        """The slices of one case, in canonical orientation; slices with voxels of the "ignore" label are
        left out.

        Raises:
            DatasetError: an image or a label map that cannot be read, or that do not lie on the same grid.
        """
        image, label = self.volume(case)
        plan = plan_slices(image.geometry, self.plane, self.known)
        for index in range(plan.count):
            values = extract_slice(label.array, plan, index)
            if self.ignored_values and np.isin(values, self.ignored_values).any():
                continue
            masks = {target: np.isin(values, ids) for target, ids in self.labels.items()}
            yield LabelledSlice(
                image=np.ascontiguousarray(extract_slice(image.array, plan, index), dtype=np.float32),
                spacing_rc=plan.spacing_rc,
                labels=with_unions(masks),
                labelled=self.labelled_targets,
                patient=self._patient_of(case.name),
                modality=self.modality,
                slice_id=f"{case.name}_{index}",
                plane=plan.plane,
            )

    def _in_hounsfield(self, image: Volume) -> Volume:
        odd = not_hounsfield(image.array)
        if odd is None:
            return image
        if self.correct_values and odd.known:
            return replace(image, array=odd.corrected(image.array))
        if not self._told:
            self._told = True
            self._tell(odd.warning)
        return image

    def _read(self, path: Path) -> Volume:
        if path.parent.name.startswith("images") and not path.is_file():
            name = path.name.rpartition("_")[0]
            raise DatasetError(f"The image of case '{name}' is missing; it should be '{path}'.")
        from progidiff.volumes.reading import read_volume  # brings the libraries that read files

        try:
            return read_volume(path, allow_uniform=path.parent.name.startswith("labels"))
        except InputError as error:
            raise DatasetError(f"In data set '{self.folder.name}': {error}") from error

    def _read_labels(
        self, named: Sequence[tuple[str, tuple[int, ...]]]
    ) -> tuple[dict[str, tuple[int, ...]], tuple[int, ...]]:
        found: dict[str, tuple[int, ...]] = {}
        spelled: dict[str, str] = {}
        unknown: list[tuple[str, tuple[int, ...]]] = []
        ignored: tuple[int, ...] = ()
        for name, ids in named:
            target = target_of(name)
            if name.lower() == "ignore":
                ignored = ids
            elif target is None:
                unknown += [(name, ids)] if name.lower() not in _BACKGROUND and ids != (0,) else []
            elif 0 in ids:
                raise DatasetError(
                    f"dataset.json of '{self.folder.name}' gives '{name}' the value 0, which is the background; correct it."
                )
            else:
                if target in found:
                    both = f"'{spelled[target]}' and '{name}'"
                    self._warn(f"The labels {both} both mean {target}; their voxels are taken together.")
                found[target] = tuple(sorted({*found.get(target, ()), *ids}))
                spelled.setdefault(target, name)
        for name, ids in unknown:
            self._warn_of_unknown(name, ids, found, spelled)
        return found, ignored

    def _warn_of_unknown(
        self, name: str, ids: tuple[int, ...], found: Mapping[str, tuple[int, ...]], spelled: Mapping[str, str]
    ) -> None:
        organ = part_of(name)
        keys = () if organ is None else (organ.key,) if organ.key in found else organ.parts
        own = {value for key in keys for value in found.get(key, ())}
        if organ is None or not own:
            self._warn(f"The label '{name}' names no known organ and is left out.")
        elif more := sorted({*ids}.difference(*found.values())):
            label = json.dumps({spelled.get(organ.key, organ.key): sorted({*own, *more})}, ensure_ascii=False)[1:-1]
            values = ", ".join(map(str, more))
            self._warn(
                f"The label '{name}' is no organ of its own: voxels of the value {values} count as not {organ.key}."
                f" Where they are a part of it, write {label} under 'labels' in dataset.json."
            )

    def _warn(self, sentence: str) -> None:
        if sentence not in self.warnings:
            self.warnings.append(sentence)
            self._tell(sentence)

    def _modality(self, description: dict[str, Any]) -> Modality:
        channels = description.get("channel_names", description.get("modality"))
        name = channels.get(str(self.channel)) if isinstance(channels, dict) else None
        word = str(name).lower().replace("-", " ").replace("_", " ").split()[:1]
        if word == ["ct"]:
            return "CT"
        if word and word[0] in _MR_CHANNELS:
            return "MR"
        raise DatasetError(
            f"'{self.folder.name}' does not say whether channel {self.channel} is CT or MR; "
            "name it so under 'channel_names' in dataset.json."
        )

    def _find_cases(self, description: dict[str, Any]) -> tuple[Case, ...]:
        ending = description.get("file_ending")
        endings = (ending,) if isinstance(ending, str) else FILE_ENDINGS
        labels = self.folder / "labelsTr"
        cases = []
        for path in sorted(labels.iterdir()) if labels.is_dir() else []:
            suffix = next((e for e in endings if path.name.endswith(e)), None)
            # macOS leaves "._" companions in archives that were packed there.
            if suffix is None or path.name.startswith("."):
                continue
            name = path.name.removesuffix(suffix)
            cases.append(Case(name, self._image(name, suffix), path))
        if not cases:
            raise DatasetError(f"'{labels}' holds no label maps ({', '.join(endings)}); add the labelled cases there.")
        return tuple(cases)

    def _image(self, name: str, suffix: str) -> Path:
        folder = self.folder / "imagesTr"
        with_channel = folder / f"{name}_{self.channel:04d}{suffix}"
        if with_channel.is_file():
            return with_channel
        without = folder / f"{name}{suffix}"
        if self.channel == 0 and without.is_file():
            return without
        return with_channel


def _read_description(folder: Path) -> dict[str, Any]:
    path = folder / "dataset.json"
    try:
        description = read_json(path)
    except FileNotFoundError:
        raise DatasetError(f"'{folder}' is not an nnU-Net data set: it has no dataset.json.") from None
    except (OSError, ValueError) as error:
        raise DatasetError(f"'{path}' cannot be read as JSON ({error}); correct it.") from error
    if not isinstance(description, dict) or not isinstance(description.get("labels"), dict):
        raise DatasetError(f"'{path}' has no table 'labels'; add one such as {{\"background\": 0, \"liver\": 1}}.")
    return description


def _named_labels(description: dict[str, Any], dataset: str) -> Iterator[tuple[str, tuple[int, ...]]]:
    """Name and values of every label, from ``{"liver": 1}``, ``{"kidneys": [2, 3]}`` (v2) or ``{"1":
    "liver"}`` (v1).

    Raises:
        DatasetError: an entry that is neither, a negative value, or one value with two names.
    """
    owner: dict[int, str] = {}
    for key, value in description["labels"].items():
        if isinstance(value, str) and key.removeprefix("-").isdecimal():
            name, ids = value, (int(key),)
        elif isinstance(value, int) and not isinstance(value, bool):
            name, ids = key, (value,)
        elif isinstance(value, list) and value and all(isinstance(v, int) for v in value):
            name, ids = key, tuple(value)
        else:
            raise DatasetError(f"The label '{key}: {value}' in dataset.json of '{dataset}' is neither a number nor a name.")
        if min(ids) < 0:
            raise DatasetError(
                f"dataset.json of '{dataset}' gives '{name}' the negative value {min(ids)}; values of labels begin at 0."
            )
        if not isinstance(value, list) and owner.setdefault(ids[0], name) != name:
            raise DatasetError(
                f"dataset.json of '{dataset}' gives the value {ids[0]} to both '{owner[ids[0]]}' and '{name}'; name it once."
            )
        yield name, ids
