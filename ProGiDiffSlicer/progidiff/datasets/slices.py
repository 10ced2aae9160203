"""Labelled 2-D slices, and folders of them with a manifest."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Literal

import numpy as np
from PIL import Image, UnidentifiedImageError

from progidiff.errors import DatasetError

if TYPE_CHECKING:
    from progidiff.datasets.manifest import SliceEntry, SliceSettings

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

    The manifest's fields are those of :class:`progidiff.datasets.manifest.Manifest`. Slices are read one
    at a time.

    Attributes:
        folder: the folder.
        manifest: its checked manifest.
        labelled_targets: targets that at least one slice labels.

    Raises:
        DatasetError: the manifest is missing or invalid.
    """

    def __init__(self, folder: Path) -> None:
        from progidiff.datasets.manifest import read_manifest

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
        from progidiff.datasets.naming import with_unions

        stored = _turn(_load(self.folder / name), settings)
        if stored.shape[:2] != shape:
            raise DatasetError(f"The mask '{name}' and its image differ in size; export them again on one grid.")
        masks = _decode(stored, settings, name)
        for target in settings.labelled or ():
            masks.setdefault(target, np.zeros(shape, dtype=bool))
        return {target: mask for target, mask in with_unions(masks).items() if target in _labelled(settings)}


def _labelled(settings: SliceSettings) -> frozenset[str]:
    from progidiff.datasets.naming import with_unions

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
