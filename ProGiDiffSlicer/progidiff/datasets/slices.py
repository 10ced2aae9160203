"""Labelled 2-D slices, folders of them with a manifest, label names as target keys, and splits by patient."""

from __future__ import annotations

import json
import re
from codecs import BOM_UTF8
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path, PurePosixPath
from typing import Annotated, Any, Literal

import numpy as np
from PIL import Image, UnidentifiedImageError
from pydantic import AfterValidator, BaseModel, ConfigDict, Field, ValidationError, model_validator

from progidiff.errors import DatasetError
from progidiff.targets.catalog import catalog, find_target, part_of

Modality = Literal["CT", "MR"]
#: Smallest labelled area that counts as present, in mm²; slivers at an organ's very end say little about a model.
MIN_AREA_MM2 = 100.0


@dataclass(frozen=True, eq=False)
class LabelledSlice:
    """One slice in canonical orientation with the organs that its data set labels.

    Attributes:
        image: float32 (rows, columns); axial slices run anterior to posterior and patient right to left,
            coronal slices superior to inferior and patient right to left.
        spacing_rc: pixel size in mm, (row, column).
        labels: target key -> bool (rows, columns); a labelled target that is absent here has an all-false
            mask.
        labelled: the targets that the data set labels. Any other target is unknown in this slice, never
            background.
        patient: patient identifier, the unit of every split and of every confidence interval.
        modality: ``"CT"`` or ``"MR"``.
        window: ``None`` for Hounsfield units or raw MR values, ``"display"`` for an image that was
            windowed before and is scaled to [0, 1].
        second_labels: the masks of a second rater for the same slice, or ``None``.
        slice_id: a name that is unique within the data set.
        plane: ``"axial"``, ``"coronal"`` or ``"sagittal"``.
        spacing_exact: ``False`` where the source gives no pixel size and ``spacing_rc`` is a typical value.
    """

    image: np.ndarray
    spacing_rc: tuple[float, float]
    labels: Mapping[str, np.ndarray]
    labelled: frozenset[str]
    patient: str
    modality: Modality
    window: Literal["display"] | None = None
    second_labels: Mapping[str, np.ndarray] | None = None
    slice_id: str = ""
    plane: str = "axial"
    spacing_exact: bool = True


def present_targets(item: LabelledSlice, vocabulary: Sequence[str]) -> list[str]:
    """Targets of the vocabulary that are labelled and at least :data:`MIN_AREA_MM2` large on a slice."""
    pixel = item.spacing_rc[0] * item.spacing_rc[1]
    return [t for t in vocabulary if t in item.labelled and item.labels[t].sum() * pixel >= MIN_AREA_MM2]


@dataclass(frozen=True)
class NamedSets:
    """Labelled slice sets that commands know by name, handed in by whoever has them.

    Attributes:
        read: folder and name of a set -> its slices; raises DatasetError where it is not there.
        usual: what is measured where no set is named.
        folder: where the sets lie when no folder is named.
    """

    read: Callable[[Path, str], list[LabelledSlice]]
    usual: tuple[str, ...]
    folder: Path


class SliceFolder:
    """A folder of 2-D slices (PNG, JPEG, NPY or NPZ) described by its `manifest.json`.

    The manifest's fields are those of :class:`progidiff.datasets.slices.Manifest`. Slices are read one
    at a time.

    Attributes:
        folder: the folder.
        manifest: its checked manifest.
        labelled_targets: targets that at least one slice labels.

    Raises:
        DatasetError: the manifest is missing or invalid.
    """

    def __init__(self, folder: Path) -> None:
        self.folder = Path(folder)
        self.manifest = read_manifest(self.folder)
        self.labelled_targets = frozenset[str]().union(
            *(_labelled(self.manifest.settings(entry)) for entry in self.manifest.slices)
        )

    def __len__(self) -> int:
        """Number of slices."""
        return len(self.manifest.slices)

    def __iter__(self) -> Iterator[LabelledSlice]:
        """The slices, in the manifest's order."""
        for entry in self.manifest.slices:
            yield self.read(entry)

    @property
    def patients(self) -> frozenset[str]:
        """All patients."""
        return frozenset(entry.patient for entry in self.manifest.slices)

    def labelled_in(self, entry: SliceEntry) -> frozenset[str]:
        """Targets that a slice of the manifest labels."""
        return _labelled(self.manifest.settings(entry))

    def read(self, entry: SliceEntry) -> LabelledSlice:
        """Read one slice of the manifest.

        Raises:
            DatasetError: a file that is missing, unreadable, not 2-D, of another size than its image, or
                with values that the manifest does not explain.
        """
        settings = self.manifest.settings(entry)
        # The manifest has checked that both are given, there or here.
        assert settings.spacing_mm is not None
        assert settings.modality is not None
        image = _turn(_grey(_load(self.folder / entry.image), entry.image, settings.window), settings)
        row_mm, column_mm = settings.spacing_mm[::-1] if settings.transpose else settings.spacing_mm
        second = None if entry.second_mask is None else self._masks(entry.second_mask, settings, image.shape)
        return LabelledSlice(
            image=image,
            spacing_rc=(row_mm, column_mm),
            labels=self._masks(entry.mask, settings, image.shape),
            labelled=_labelled(settings),
            patient=entry.patient,
            modality=settings.modality,
            window=settings.window,
            second_labels=second,
            slice_id=entry.id or entry.image,
            plane=settings.plane,
            spacing_exact=settings.spacing_exact,
        )

    def _masks(self, name: str, settings: SliceSettings, shape: tuple[int, ...]) -> dict[str, np.ndarray]:
        stored = _turn(_load(self.folder / name), settings)
        if stored.shape[:2] != shape:
            raise DatasetError(f"The mask '{name}' and its image differ in size; export them again on one grid.")
        masks = _decode(stored, settings, name)
        for target in settings.labelled or ():
            masks.setdefault(target, np.zeros(shape, dtype=bool))
        return {target: mask for target, mask in with_unions(masks).items() if target in _labelled(settings)}


def _labelled(settings: SliceSettings) -> frozenset[str]:
    named = settings.labelled if settings.labelled is not None else (settings.labels or {}).values()
    return frozenset(with_unions({target: np.zeros(1, dtype=bool) for target in named}))


def _load(path: Path) -> np.ndarray:
    """An array (R, C) or (R, C, 3) from a picture, an NPY file or the only array of an NPZ file."""
    try:
        if path.suffix.lower() in (".npy", ".npz"):
            data = np.load(path, allow_pickle=False)
            if isinstance(data, np.ndarray):
                array = data
            else:
                with data:
                    if len(data.files) != 1:
                        raise DatasetError(f"'{path.name}' holds {len(data.files)} arrays; store one array per file.")
                    array = data[data.files[0]]
        else:
            with Image.open(path) as picture:
                colour = picture.mode in ("P", "RGBA", "LA", "CMYK", "YCbCr", "PA")
                array = np.asarray(picture.convert("RGB") if colour else picture)
    except FileNotFoundError:
        raise DatasetError(f"The file '{path}' is missing; add it or take its slice out of the manifest.") from None
    except (OSError, ValueError, EOFError, UnidentifiedImageError) as error:
        raise DatasetError(f"The file '{path}' cannot be read as an image or array; export it again.") from error
    if not (array.ndim == 2 or (array.ndim == 3 and array.shape[2] == 3)) or array.dtype.kind not in "biuf":
        raise DatasetError(
            f"'{path.name}' is not a single 2-D slice but has the shape {array.shape}; store one slice per file."
        )
    return array


def _grey(array: np.ndarray, name: str, window: str | None) -> np.ndarray:
    """float32 (R, C); already windowed images are scaled to [0, 1] by the range of their type."""
    if array.ndim == 3:
        if np.ptp(array, axis=2).max() > 8:
            raise DatasetError(f"The image '{name}' is in colour; export it in grey levels.")
        array = np.rint(array.mean(axis=2)).astype(array.dtype)
    image = array.astype(np.float32)
    if not np.isfinite(image).all():
        raise DatasetError(f"The image '{name}' holds values that are not numbers; export it again.")
    if window is None:
        return image
    if array.dtype.kind in "iu":
        # Pillow opens 16-bit greyscale pictures as int32.
        return image / (255.0 if array.dtype == np.uint8 else 65535.0)
    if array.dtype.kind == "f" and (image.min() < 0 or image.max() > 1):
        raise DatasetError(f"The image '{name}' is called windowed, but its values leave [0, 1]; scale it or drop 'window'.")
    return image


def _turn(array: np.ndarray, settings: SliceSettings) -> np.ndarray:
    if settings.transpose:
        array = array.swapaxes(0, 1)
    return np.ascontiguousarray(array[:: -1 if settings.flip_rows else 1, :: -1 if settings.flip_cols else 1])


def _decode(stored: np.ndarray, settings: SliceSettings, name: str) -> dict[str, np.ndarray]:
    """Masks by target from pixel values or colours."""
    labels = dict(settings.labels or {})
    in_colour = next(iter(labels)).startswith("#")
    if in_colour != (stored.ndim == 3):
        if in_colour:
            raise DatasetError(f"The mask '{name}' is not in colour, but the manifest gives colours; give pixel values.")
        if np.ptp(stored, axis=2).max() > 8:
            raise DatasetError(f"The mask '{name}' is in colour, but the manifest gives pixel values; give colours.")
        stored = stored[..., 0]
    if stored.dtype.kind == "f" and not np.array_equal(stored, np.rint(stored)):
        raise DatasetError(f"The mask '{name}' holds values that are no whole numbers; store one number per label.")
    packed = stored.astype(np.int64)
    if in_colour:
        packed = (packed[..., 0] << 16) | (packed[..., 1] << 8) | packed[..., 2]
    unique, inverse = np.unique(packed, return_inverse=True)
    codes = np.array([int(label.removeprefix("#"), 16 if in_colour else 10) for label in labels] + [0])
    distance = ((_channels(unique, in_colour)[:, None] - _channels(codes, in_colour)[None]) ** 2).sum(axis=2)
    if settings.mask_match == "exact" and distance.min(axis=1).any():
        strange = int(unique[distance.min(axis=1) > 0][0])
        raise DatasetError(
            f"The mask '{name}' holds the value {f'#{strange:06x}' if in_colour else strange}, "
            "which the manifest does not explain; add it to 'labels' or set 'mask_match' to 'nearest'."
        )
    # Zero may itself be a label; argmin takes the first, so that a label wins over the background.
    index = distance.argmin(axis=1)[inverse].reshape(packed.shape)
    masks: dict[str, np.ndarray] = {}
    for i, target in enumerate(labels.values()):
        mask = index == i
        masks[target] = masks[target] | mask if target in masks else mask
    return masks


def _channels(packed: np.ndarray, in_colour: bool) -> np.ndarray:
    """int64 (n, 3) of red, green and blue, or (n, 1) of pixel values."""
    shifts = (16, 8, 0) if in_colour else (0,)
    return np.stack([(packed >> shift) & 0xFF if in_colour else packed for shift in shifts], axis=1)


MANIFEST_NAME = "manifest.json"


def _inside(path: str) -> str:
    pure = PurePosixPath(path)
    if pure.is_absolute() or ".." in pure.parts or "\\" in path or re.match(r"[A-Za-z]:", path):
        raise ValueError(f"'{path}' must be a path inside the folder, with forward slashes")
    return path


def _known_target(name: str) -> str:
    key = target_of(name)
    if key is None:
        organ = part_of(name)
        offer = "" if organ is None else f"; where it is a part of the {organ.key}, give it that name"
        raise ValueError(f"'{name}' is no organ that is known{offer}")
    return key


def _label_value(text: str) -> str:
    if not re.fullmatch(r"\d+|#[0-9a-fA-F]{6}", text):
        raise ValueError(f"'{text}' is neither a pixel value such as 3 nor a colour such as #ff0000")
    return text.lower()


InnerPath = Annotated[str, AfterValidator(_inside)]
TargetName = Annotated[str, AfterValidator(_known_target)]
LabelValue = Annotated[str, AfterValidator(_label_value)]
Millimetres = Annotated[float, Field(gt=0, lt=100)]


class SliceSettings(BaseModel):
    """How images and masks are to be read; given for the whole folder and, where a slice differs, for the
    slice.

    Attributes:
        modality: "CT" or "MR".
        spacing_mm: pixel size (row, column) in mm of the stored picture, before ``transpose``.
        labels: pixel value ("3") or colour ("#ff0000") of the mask -> organ name. Several may mean the
            same organ.
        labelled: organs that were drawn in this set; by default those of ``labels``. All others are unknown.
        mask_match: "exact", or "nearest" for anti-aliased or JPEG-compressed masks: a pixel belongs to
            the nearest of the label values and the background (0 or black).
        window: null for Hounsfield units or raw MR values, "display" for images that were windowed before.
        plane: plane of the slices after the flips.
        transpose, flip_rows, flip_cols: what brings the stored picture to canonical orientation, in this
            order.
        spacing_exact: false where ``spacing_mm`` is only a typical value.
    """

    model_config = ConfigDict(extra="forbid", frozen=True)

    modality: Literal["CT", "MR"] | None = None
    spacing_mm: tuple[Millimetres, Millimetres] | None = None
    labels: dict[LabelValue, TargetName] | None = None
    labelled: tuple[TargetName, ...] | None = None
    mask_match: Literal["exact", "nearest"] = "exact"
    window: Literal["display"] | None = None
    plane: Literal["axial", "coronal", "sagittal"] = "axial"
    transpose: bool = False
    flip_rows: bool = False
    flip_cols: bool = False
    spacing_exact: bool = True

    @model_validator(mode="after")
    def _one_kind_of_value(self) -> SliceSettings:
        if self.labels and len({value.startswith("#") for value in self.labels}) > 1:
            raise ValueError("labels are either all pixel values or all colours")
        return self


class SliceEntry(SliceSettings):
    """One slice: its files, its patient, and the settings in which it differs from the folder's."""

    image: InnerPath
    mask: InnerPath
    patient: Annotated[str, Field(min_length=1)]
    second_mask: InnerPath | None = None
    id: str | None = None


class Manifest(SliceSettings):
    """`manifest.json`: settings for the folder and the list of slices."""

    version: Literal[1] = 1
    name: str = ""
    slices: Annotated[tuple[SliceEntry, ...], Field(min_length=1)]

    @model_validator(mode="after")
    def _complete(self) -> Manifest:
        for entry in self.slices:
            settings = self.settings(entry)
            for field in ("modality", "spacing_mm", "labels"):
                if not getattr(settings, field):
                    raise ValueError(f"'{field}' is given neither for the folder nor for the slice '{entry.image}'")
        return self

    def settings(self, entry: SliceEntry) -> SliceSettings:
        """The folder's settings with the slice's own in their place."""
        own = {name: getattr(entry, name) for name in entry.model_fields_set if name in SliceSettings.model_fields}
        base = {name: getattr(self, name) for name in SliceSettings.model_fields}
        # `labelled` follows from `labels` unless it is given beside them.
        if "labels" in own and "labelled" not in own:
            base["labelled"] = None
        return SliceSettings.model_construct(**(base | own))


def read_manifest(folder: Path) -> Manifest:
    """Read and check the manifest of a slice folder.

    Raises:
        DatasetError: it is missing or invalid; the message names the first wrong field.
    """
    path = folder / MANIFEST_NAME
    try:
        read_json(path)  # refuses what is given twice
        return Manifest.model_validate_json(path.read_bytes().removeprefix(BOM_UTF8))
    except FileNotFoundError:
        raise DatasetError(f"'{folder}' is not a slice folder: it has no {MANIFEST_NAME}.") from None
    except OSError as error:
        raise DatasetError(f"'{path}' cannot be read ({error.strerror}); check its permissions.") from error
    except ValidationError as error:
        first = error.errors()[0]
        where = ".".join(str(part) for part in first["loc"]) or "the file"
        raise DatasetError(f"'{path}' is not valid at {where}: {first['msg'].removeprefix('Value error, ')}.") from error
    except ValueError as error:
        raise DatasetError(f"'{path}' is not valid: {error}; correct it.") from error


def target_of(name: str) -> str | None:
    """Key of the one target that a label name means, e.g. "left_kidney" or "Leber"; ``None`` if it is not
    in the catalog.
    """
    target = find_target(name)
    return None if target is None else target.key


def read_json(path: Path) -> Any:
    """The content of a JSON file, with or without a byte-order mark.

    Raises:
        OSError: it cannot be read.
        ValueError: it is no JSON, or gives something twice, of which all but the last would be lost.
    """
    return json.loads(path.read_text(encoding="utf-8-sig"), object_pairs_hook=_once)


def _once(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    found = dict(pairs)
    if len(found) < len(pairs):
        twice = next(key for key, _ in pairs if sum(key == other for other, _ in pairs) > 1)
        raise ValueError(f"it gives '{twice}' twice")
    return found


def with_unions(labels: Mapping[str, np.ndarray]) -> dict[str, np.ndarray]:
    """Add the targets all of whose parts are labelled, e.g. "kidneys" where both single kidneys are.

    Args:
        labels: target key -> bool mask; all masks have one shape.
    """
    result = dict(labels)
    # Parts may be unions themselves (a lung of its lobes), so go on until nothing new is complete.
    while complete := [
        target
        for target in catalog().values()
        if target.parts and target.key not in result and result.keys() >= {*target.parts}
    ]:
        for target in complete:
            result[target.key] = np.logical_or.reduce([result[part] for part in target.parts])
    return result


def split_by_patient(ids: Iterable[str], fraction: float, seed: int = 0) -> tuple[frozenset[str], frozenset[str]]:
    """Divide patients into those to train on and those to hold out.

    Args:
        ids: patient of every slice or case; repeats and order do not matter.
        fraction: share of the patients to hold out, in (0, 1); at least one patient is on each side.
        seed: the same seed and patients give the same split.

    Returns:
        Patients for training, patients held out.

    Raises:
        DatasetError: fewer than two patients, or a fraction outside (0, 1).
    """
    if not 0.0 < fraction < 1.0:
        raise DatasetError(f"The share of held-out patients must be between 0 and 1, not {fraction:g}.")
    patients = sorted(set(ids))
    if len(patients) < 2:
        raise DatasetError("A split by patient needs at least two patients; add cases of further patients.")
    held_out = min(max(round(fraction * len(patients)), 1), len(patients) - 1)
    order = np.random.default_rng(seed).permutation(len(patients))
    return (
        frozenset(patients[i] for i in order[held_out:]),
        frozenset(patients[i] for i in order[:held_out]),
    )
