"""Reading one DICOM series as a volume, through GDCM in SimpleITK."""

from __future__ import annotations

import os
import re
from collections import Counter, defaultdict
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import SimpleITK as sitk

from progidiff.errors import InputError
from progidiff.volumes.formats import bad_spacing, check_size, damaged, is_text, not_a_volume, too_large
from progidiff.volumes.geometry import LPS_FROM_RAS, MAX_SHEAR, Geometry

CLASS, INSTANCE, MODALITY = "0008|0016", "0008|0018", "0008|0060"
SERIES, NUMBER, THICKNESS = "0020|000e", "0020|0011", "0018|0050"
POSITION, ORIENTATION, SAMPLES = "0020|0032", "0020|0037", "0028|0002"
FRAMES, PIXELS = "0028|0008", "0028|0030"
_TAGS = (CLASS, INSTANCE, MODALITY, SERIES, NUMBER, THICKNESS, POSITION, ORIENTATION, SAMPLES, FRAMES, PIXELS)

# Objects that GDCM lists like images but that are not scans.
NOT_SCANS = frozenset({"SEG", "RTDOSE", "RTSTRUCT", "RTPLAN", "SR", "PR", "KO", "REG", "DOC"})

# Storage class of secondary captures, and the beginning of those of their kinds.
SCREEN_SHOT = "1.2.840.10008.5.1.4.1.1.7"

# Deviation of a slice from even spacing that is still exact: this share of the spacing, or so many mm.
UNEVEN, UNEVEN_MM = 0.02, 0.01
# Positions with one decimal put a slice, and each end of the stack, off by up to half the diagonal of a cube of 0.1 mm.
ROUNDED_MM = 0.1 * 3**0.5
# Slices nearer to each other than this lie at one place.
SAME_PLACE_MM = 0.01

# The storage class in a file's meta information, which is little-endian with explicit types in every DICOM file.
_STORAGE_CLASS = re.compile(rb"\x02\x00\x02\x00UI..([0-9.]+)", re.DOTALL)
_SHORTEST_TAIL = 6


@dataclass(frozen=True)
class _Header:
    """What the header of an image file says; ``tags`` holds those of ``_TAGS`` that are in it."""

    path: Path
    size: tuple[int, ...]
    tags: dict[str, str]

    def text(self, tag: str) -> str:
        return self.tags.get(tag, "")

    def count(self, tag: str) -> int:
        text = self.text(tag)
        return int(text) if text.isdecimal() else 1

    def numbers(self, tag: str, count: int) -> np.ndarray | None:
        try:
            values = np.array([float(v) for v in self.text(tag).split("\\")])
        except ValueError:
            return None
        return values if values.shape == (count,) and np.isfinite(values).all() else None


def is_dicom_file(path: Path) -> bool:
    """Whether the file has DICOM's preamble."""
    with path.open("rb") as stream:
        return stream.read(132)[128:] == b"DICM"


# Array, geometry, modality, sentences that a user should read, and the files of its slices.
Series = tuple[np.ndarray, Geometry, str | None, tuple[str, ...], tuple[Path, ...]]


def series_uid(folder: Path) -> str:
    """UID of the series that the first image directly in a folder belongs to; "" where there is none."""
    images = map(_image, sorted(p for p in folder.iterdir() if p.is_file()))
    return next((image.text(SERIES) for image in images if image is not None), "")


def read_folder(folder: Path, series: str | None = None) -> Series:
    """Read one image series in a folder and the folders below it; a series may be spread over several of them.

    Args:
        folder: the folder. Objects in it that are no images, such as structure sets and key objects, are passed over.
        series: number of the series, or the end of its UID; not needed where there is only one.

    Returns:
        Array (K, J, I) with the rescale slope and intercept applied, its geometry, the modality as DICOM codes it ("CT",
        "PT"; ``None`` where it is not said), sentences that a user should read, and the files in slice order.

    Raises:
        InputError: no images, no such series or several, or a series that is not one evenly spaced stack.
    """
    name = folder.name or folder.resolve().name
    found, unreadable = _image_series(folder)
    if not found:
        raise InputError(f"The folder {name} holds no DICOM images; give the folder of one series, or an image file.")
    images = _chosen(found, series, name)
    _refuse_damaged(name, images, unreadable)
    return _read(images, name, folder)


def read_file(path: Path) -> Series:
    """Read a DICOM file as a volume of one slice; errors and results as for ``read_folder``."""
    image = _image(path)
    if image is None:
        raise damaged(path.name, "DICOM images")
    return _read([image], path.name, path.parent)


def _read(images: list[_Header], name: str, folder: Path) -> Series:
    if any(image.count(FRAMES) > 1 for image in images):
        raise InputError(f"{name} is a multi-frame DICOM image; load it in Slicer and save the volume as NRRD or NIfTI.")
    if any(image.count(SAMPLES) > 1 for image in images):
        raise not_a_volume(name, "a colour DICOM image")
    if len({image.size for image in images}) > 1:
        raise InputError(f"The images of {name} differ in size (a scout among them?); keep only the slices of one scan.")
    check_size(name, (*images[0].size[:2], len(images)))

    images, affine, warnings = _stack(images, name, folder)
    reader = sitk.ImageSeriesReader()
    reader.SetImageIO("GDCMImageIO")
    reader.SetFileNames([str(image.path) for image in images])
    try:
        array = sitk.GetArrayFromImage(reader.Execute())
    except MemoryError as error:
        raise too_large(name) from error
    k, j, i = array.shape
    files = tuple(image.path for image in images)
    return _smallest(array), Geometry((i, j, k), LPS_FROM_RAS @ affine), _modality(images[0]), warnings, files


def _modality(image: _Header) -> str | None:
    said = image.text(MODALITY)
    return said if re.fullmatch(r"[A-Z0-9]{2,16}", said) else None


def _image_series(folder: Path) -> tuple[list[list[_Header]], list[Path]]:
    """The image series in the folder and below it, and the files that GDCM cannot read as images."""
    found: dict[str, list[_Header]] = defaultdict(list)
    unreadable = []
    for directory, _, names in sorted(os.walk(folder)):
        for path in (Path(directory, name) for name in sorted(names)):
            if path.exists() and not path.is_file():  # a pipe, which nobody may ever write to
                continue
            image = _image(path)
            if image is None:
                unreadable.append(path)
            elif image.text(MODALITY) not in NOT_SCANS:
                found[image.text(SERIES) or directory].append(image)
    every = list(found.values())
    # screen shots without a place in the patient, such as a page of the dose report, are no choice where there is a scan
    scans = [images for images in every if images[0].text(POSITION) or not images[0].text(CLASS).startswith(SCREEN_SHOT)]
    return sorted(scans or every, key=lambda images: (images[0].count(NUMBER), images[0].text(SERIES))), unreadable


def _chosen(found: list[list[_Header]], series: str | None, name: str) -> list[_Header]:
    """The wanted one of several series; the refusal lists them by facts that tell nothing of the patient."""
    if series is None and len(found) == 1:
        return found[0]
    wanted = "" if series is None else series.strip()
    chosen = [images for images in found if wanted and wanted == images[0].text(NUMBER)]
    if len(wanted) >= _SHORTEST_TAIL:
        chosen = chosen or [images for images in found if images[0].text(SERIES).endswith(wanted)]
    if len(chosen) == 1:
        return chosen[0]
    uids = [images[0].text(SERIES) for images in found]
    tail = next((n for n in range(_SHORTEST_TAIL, 65) if len({uid[-n:] for uid in uids}) == len(uids)), 64)
    listed = ", ".join(
        f"series {images[0].text(NUMBER) or 'without a number'} ({len(images)} {images[0].text(MODALITY) or 'unknown'}"
        f" image{'s'[: len(images) - 1]}, UID ending in {uid[-tail:] or 'nothing'})"
        for images, uid in zip(found, uids, strict=True)
    )
    which = "" if series is None else f', {len(chosen) or "none"} of them "{wanted}"'
    raise InputError(
        f"The folder {name} holds {len(found)} image series{which}: {listed}; choose one by its number or the end of its UID"
        ' with --series of "progidiff propose", or copy it into a folder of its own.'
    )


def _refuse_damaged(name: str, images: Sequence[_Header], unreadable: Sequence[Path]) -> None:
    """Refuse a series with images that are cut off; at an end of the stack nobody would notice that they are missing.

    A file that cannot be read as an image belongs to the series if it is of its kind and names it; structure sets, key
    objects and the like name it too, and are of other kinds.
    """
    uid, kinds = images[0].text(SERIES).encode(), {image.text(CLASS).encode() for image in images}
    count = 0
    for path in unreadable:
        try:
            with path.open("rb") as stream:
                head = stream.read(1 << 16)
        except OSError as error:
            raise InputError(f'The file "{path.name}" in {name} cannot be opened; check its permissions.') from error
        kind = _STORAGE_CLASS.search(head[132:4096]) if head[128:132] == b"DICM" else None
        count += bool(uid) and kind is not None and kind[1] in kinds and uid in head
    if count:
        raise InputError(
            f"The folder {name} has {count} damaged image{'s'[: count - 1]} of its series; copy or export the series again."
        )


def _image(path: Path) -> _Header | None:
    """The header of a DICOM file; ``None`` when it holds no readable image."""
    if not is_text(path):
        return None
    reader = sitk.ImageFileReader()
    reader.SetImageIO("GDCMImageIO")
    reader.SetFileName(str(path))
    try:
        reader.ReadImageInformation()
        tags = {tag: str(reader.GetMetaData(tag)).strip(" \0") for tag in _TAGS if reader.HasMetaDataKey(tag)}
    except (RuntimeError, ValueError):  # whatever GDCM throws, and text in no known character set
        return None
    return _Header(path, reader.GetSize(), tags)


def _stack(images: list[_Header], name: str, folder: Path) -> tuple[list[_Header], np.ndarray, tuple[str, ...]]:
    """The images in slice order, and their IJK-to-LPS matrix (DICOM PS3.3 C.7.6.2.1.1), if they are one even stack."""
    positions = [image.numbers(POSITION, 3) for image in images]
    orientations = [image.numbers(ORIENTATION, 6) for image in images]
    if any(p is None for p in positions) or any(o is None for o in orientations):
        raise InputError(f"The images of {name} do not say where they lie in the patient; export the series again.")
    at = np.array([p for p in positions if p is not None])
    axes = np.array([o for o in orientations if o is not None])
    if np.abs(axes - axes[0]).max() > MAX_SHEAR:
        raise InputError(f"The images of {name} lie in different directions (a scout?); keep only the slices of one scan.")
    along_i, along_j = axes[0, :3], axes[0, 3:]
    normal = np.cross(along_i, along_j)
    pixel = _pixel_spacing(images, name)

    order = np.argsort(at @ normal, kind="stable")
    images, at = [images[n] for n in order], at[order]
    affine = np.eye(4)
    affine[:3, 0] = along_i * pixel[1]
    affine[:3, 1] = along_j * pixel[0]
    affine[:3, 3] = at[0]
    if len(images) == 1:
        thickness = images[0].numbers(THICKNESS, 1)
        affine[:3, 2] = normal * (thickness[0] if thickness is not None and thickness[0] > 0 else 1.0)
        return images, affine, ()
    _refuse_repeats(images, at @ normal, name, folder)
    affine[:3, 3], affine[:3, 2], warnings = _line(at, normal, name)
    return images, affine, warnings


def _pixel_spacing(images: Sequence[_Header], name: str) -> np.ndarray:
    """Distance of rows and of columns in mm, for which GDCM takes 1 mm where they are not said."""
    stated = [image.numbers(PIXELS, 2) for image in images]
    known = [spacing for spacing in stated if spacing is not None]
    if len(known) < len(images):
        raise InputError(f"The images of {name} do not say how large their pixels are; export the series again.")
    if min(spacing.min() for spacing in known) <= 0:
        raise bad_spacing(name, known[0].tolist())
    if max(np.abs(spacing - known[0]).max() for spacing in known) > UNEVEN_MM:
        raise InputError(f"The images of {name} differ in the size of their pixels; keep only the slices of one scan.")
    return known[0]


def _refuse_repeats(images: Sequence[_Header], along: np.ndarray, name: str, folder: Path) -> None:
    """Refuse several images at one place: copies of a file by their names, a repeated scan by the number of its repeats."""
    places = np.concatenate([[0], np.cumsum(np.diff(along) >= SAME_PLACE_MM)])
    first: dict[tuple[int, str], _Header] = {}
    for image, place in zip(images, places.tolist(), strict=True):
        before = first.setdefault((place, image.text(INSTANCE)), image)
        if before is not image and image.text(INSTANCE):
            one, other = sorted((before.path.relative_to(folder).as_posix(), image.path.relative_to(folder).as_posix()))
            raise InputError(f'"{one}" and "{other}" in {name} are the same image; remove one of them.')
    repeats = Counter(places.tolist()).values()
    if max(repeats) > 1:
        most = f"{max(repeats)}" if min(repeats) == max(repeats) else f"up to {max(repeats)}"
        raise InputError(
            f"The {len(images)} images of {name} show {len(repeats)} slice{'s'[: len(repeats) - 1]}, each {most} times"
            " at the same place (a dynamic or repeated scan); copy the images of one repeat into a folder of its own."
        )


def _line(at: np.ndarray, normal: np.ndarray, name: str) -> tuple[np.ndarray, np.ndarray, tuple[str, ...]]:
    """The first slice's place and the step to the next, in LPS mm; a warning where they are fitted to rounded positions."""
    step = (at[-1] - at[0]) / (len(at) - 1)
    gaps = np.diff(at @ normal)
    smallest, largest = float(gaps.min()), float(gaps.max())
    off = float(np.linalg.norm(at - at[0] - np.arange(len(at))[:, None] * step, axis=1).max())
    exact = largest - smallest <= max(UNEVEN * smallest, UNEVEN_MM) and off <= max(UNEVEN * smallest, 2 * UNEVEN_MM)
    # half a distance: where a slice is missing, the gap is twice as wide
    if not exact and (off > ROUNDED_MM or largest - smallest > smallest / 2 + 1e-6):
        raise InputError(
            f"The slices of {name} are not evenly spaced ({smallest:.3g} to {largest:.3g} mm), "
            "so some may be missing; complete the series or resample it in Slicer first."
        )
    tilted = abs(float(step @ normal) / float(np.linalg.norm(step)) - 1.0) > MAX_SHEAR**2 / 2
    aside = float(np.linalg.norm(step - normal * float(step @ normal))) * (len(at) - 1)
    if tilted and aside > ROUNDED_MM:
        raise InputError(
            f"The slices of {name} are tilted against their stack (gantry tilt); "
            "load the series in Slicer, harden its transform and use the saved volume."
        )
    if exact and not tilted:
        return at[0], step, ()
    step, first = np.polyfit(np.arange(len(at)), at, 1)
    if tilted:
        step = normal * float(step @ normal)
    sentence = (
        f"The positions of the slices of {name} are rounded ({smallest:.3g} to {largest:.3g} mm apart); "
        f"they are read as evenly spaced, {np.linalg.norm(step):.4g} mm apart."
    )
    return first, step, (sentence,)


def _smallest(array: np.ndarray) -> np.ndarray:
    """GDCM returns float64 for any rescale slope; whole numbers become integers again."""
    if array.dtype.kind == "f" and np.isfinite(array).all() and np.array_equal(array, np.rint(array)):
        return array.astype(np.int32) if np.abs(array).max() < 2**31 else array
    return array
