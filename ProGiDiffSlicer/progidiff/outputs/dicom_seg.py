"""DICOM SEG: segments on the grid of a DICOM series, as an object that a PACS takes beside that series.

Nothing is resampled or moved: every frame lies on one image of the series, which it names. Patient and study are those of
the images; what highdicom writes is a Segmentation of type BINARY (DICOM PS3.3 A.51).
"""

from __future__ import annotations

import io
import logging
import uuid
import warnings
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from copy import copy
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from progidiff import __version__
from progidiff.errors import InputError
from progidiff.outputs.segmentation import Segment, assign_layers
from progidiff.targets.catalog import Code, target_for
from progidiff.volumes.geometry import MAX_SHEAR, Geometry
from progidiff.volumes.slicing import PackedMask

if TYPE_CHECKING:
    from pydicom.dataset import Dataset

# Share of a voxel by which an image may lie off the grid that was read from it; positions in headers are rounded.
_OFF_GRID = 0.25

# Tags of a segment that say how it was made, in the order in which they become parameters of the algorithm.
_ORIGIN = ("model", "adapter", "prompt", "seed", "proposal", "ensemble")
_PARAMETERS = (*_ORIGIN, "rank", "score", "edited")

# Required by the standard, if only as empty; anonymised images often lack them.
_MAY_BE_EMPTY = (
    "PatientID",
    "PatientName",
    "PatientBirthDate",
    "PatientSex",
    "AccessionNumber",
    "StudyID",
    "StudyDate",
    "StudyTime",
    "ReferringPhysicianName",
)
_DATES = ("PatientBirthDate", "StudyDate", "StudyTime")
_REQUIRED = ("StudyInstanceUID", "SeriesInstanceUID", "SOPInstanceUID", "SOPClassUID", "FrameOfReferenceUID")

_LONG_STRING = 64


def read_headers(files: Sequence[Path | io.BytesIO]) -> list[Dataset]:
    """Headers of DICOM images, without their pixels.

    Args:
        files: paths, or files in memory, which may end before their pixels.

    Raises:
        InputError: one cannot be read, or this Python lacks what reads and writes them.
    """
    try:
        import highdicom  # noqa: F401  (asked for here, so that its absence is told before anything is read)
        import pydicom
    except ImportError as error:
        raise InputError(
            "Writing DICOM SEG needs the package highdicom, which the worker's Python lacks or cannot load; "
            "use Slicer 5.12 or later, or choose the Python of an environment in which progidiff is installed."
        ) from error

    headers = []
    with _quiet():
        for number, file in enumerate(files, start=1):
            name = file.name if isinstance(file, Path) else f"header {number}"
            try:
                header = pydicom.dcmread(file, stop_before_pixels=True, force=True)
                # Names in another character set are text from here on; the result is written in UTF-8.
                header.decode()
            except Exception as error:  # whatever a damaged file makes the library raise
                raise InputError(f"The DICOM image {name} cannot be read; export or copy the series again.") from error
            header.SpecificCharacterSet = "ISO_IR 192"
            for keyword in _MAY_BE_EMPTY:
                if keyword not in header:
                    setattr(header, keyword, "")
            meta = getattr(header, "file_meta", None) or {}
            for keyword in ("SOPClassUID", "SOPInstanceUID"):
                if not header.get(keyword):
                    setattr(header, keyword, meta.get(f"MediaStorage{keyword}", ""))
            headers.append(header)
    return headers


def dicom_seg(
    segments: Sequence[Segment], geometry: Geometry, headers: Sequence[Dataset], *, by_hand: bool = False
) -> bytes:
    """A DICOM SEG of the segments that are not empty; they may overlap.

    Codes come from the segments' terminology entries, the algorithm from their tags ``ProGiDiff.*``; a segment without
    ``ProGiDiff.model`` was drawn by a person. Tracking UIDs follow from the series, the segment's identifier and its origin,
    so that the same segment keeps its own, also after it was edited.

    Memory: one byte per voxel of the slices that hold something, and per segment where they overlap.

    Args:
        segments: masks on ``geometry``.
        geometry: grid of the volume that was read from the images.
        headers: of all images of the series, in any order; see :func:`read_headers`.
        by_hand: a person chose, and maybe edited, what the model proposed (SEMIAUTOMATIC in place of AUTOMATIC).

    Returns:
        The file's content.

    Raises:
        InputError: every segment is empty, the volume does not lie on the images, or these lack what a SEG needs.
    """
    packed = [s.mask if isinstance(s.mask, PackedMask) else PackedMask.from_array(s.mask) for s in segments]
    bounds = [mask.bounds() for mask in packed]
    filled = [n for n, bound in enumerate(bounds) if bound is not None]
    if not filled:
        raise InputError("Every segment is empty, so there is nothing to write as DICOM SEG.")
    with _quiet():
        images = _images_by_slice(headers, geometry)
        first = min(bound[0][0] for bound in bounds if bound is not None)
        last = max(bound[0][1] for bound in bounds if bound is not None)
        pixels = _pixels([packed[n] for n in filled], first, last)
        chosen = [segments[n] for n in filled]
        try:
            return _write(chosen, pixels, images, images[first : last + 1], geometry, by_hand)
        except (AttributeError, KeyError, TypeError, ValueError) as error:
            # Not quoted: it may hold what the header says of the patient.
            raise InputError(
                f"The DICOM images lack or contradict what a DICOM SEG needs ({type(error).__name__}); "
                "export the series again, or use the segmentation in another format."
            ) from error


def _pixels(masks: Sequence[PackedMask], first: int, last: int) -> np.ndarray:
    """Planes ``first`` to ``last`` as uint8: (K, J, I) of segments' numbers, or (K, J, I, segment) where they overlap."""
    places = assign_layers(masks)
    shape = (last + 1 - first, *masks[0].shape[1:])
    overlap = any(layer for layer, _ in places)
    pixels = np.zeros((*shape, len(masks)) if overlap else shape, dtype=np.uint8)
    for channel, (mask, (_, label)) in enumerate(zip(masks, places, strict=True)):
        for k in range(first, last + 1):
            if overlap:
                pixels[k - first, ..., channel] = mask.plane(k)
            else:
                pixels[k - first][mask.plane(k)] = label
    return pixels


def _write(
    segments: Sequence[Segment],
    pixels: np.ndarray,
    images: Sequence[Dataset],
    images_of_pixels: Sequence[Dataset],
    geometry: Geometry,
    by_hand: bool,
) -> bytes:
    import highdicom as hd

    # Dates that are none are taken over as they are, but highdicom would not take them.
    first, dates = copy(images[0]), [images[0][keyword] for keyword in _DATES]
    for date in dates:
        first.add_new(date.tag, date.VR, "")
    spacing = geometry.spacing
    lps = geometry.affine_lps[:3, :2] / spacing[:2]
    thickness = first.get("SliceThickness") or spacing[2]
    names = ", ".join(segment.name for segment in segments)
    number = first.get("SeriesNumber")
    seg = hd.seg.Segmentation(
        source_images=[first, *images[1:]],
        pixel_array=pixels,
        segmentation_type="BINARY",
        segment_descriptions=[
            _description(number, segment, str(first.SeriesInstanceUID), by_hand)
            for number, segment in enumerate(segments, start=1)
        ],
        series_instance_uid=_new_uid(),
        series_number=1000 + (int(number) if number else 0),
        sop_instance_uid=_new_uid(),
        instance_number=1,
        manufacturer="The ProGiDiffSlicer developers",
        manufacturer_model_name="ProGiDiffSlicer",
        software_versions=__version__,
        device_serial_number="1",
        content_label="PROGIDIFF",
        content_description=_line(names),
        pixel_measures=hd.PixelMeasuresSequence(
            pixel_spacing=(spacing[1], spacing[0]), slice_thickness=float(thickness), spacing_between_slices=spacing[2]
        ),
        plane_orientation=hd.PlaneOrientationSequence("PATIENT", lps.T.ravel().tolist()),
        # The images' own places, so that a viewer finds mask and image on one another.
        plane_positions=[
            hd.PlanePositionSequence("PATIENT", [float(v) for v in image.ImagePositionPatient]) for image in images_of_pixels
        ],
    )
    seg.SeriesDescription = _line(f"ProGiDiff: {names}")
    for date in dates:
        seg[date.tag] = date
    seg.SpecificCharacterSet = "ISO_IR 192"
    stream = io.BytesIO()
    seg.save_as(stream)
    return stream.getvalue()


def _images_by_slice(headers: Sequence[Dataset], geometry: Geometry) -> list[Dataset]:
    """The image of each slice along k.

    Raises:
        InputError: a slice has none, or the images do not say enough.
    """
    for keyword in _REQUIRED:
        if not all(header.get(keyword) for header in headers):
            raise InputError(
                f"The DICOM images do not say their {keyword}, perhaps since they were anonymised, so that no DICOM SEG can "
                "refer to them; use the original series."
            )
    if any(header.get("NumberOfFrames", 1) != 1 for header in headers):
        raise InputError(
            "The volume is one multi-frame DICOM object, for which no DICOM SEG is written; "
            "use the series of single images, or Slicer's own export to DICOM."
        )
    count_i, count_j, count_k = geometry.shape_ijk
    to_ijk = np.linalg.inv(geometry.affine_lps)
    axes = (geometry.affine_lps[:3, :2] / geometry.spacing[:2]).T.ravel()
    found: dict[int, Dataset] = {}
    for header in headers:
        try:
            position = np.array(header.ImagePositionPatient, dtype=np.float64)
            turned = np.abs(np.array(header.ImageOrientationPatient, dtype=np.float64) - axes).max() > MAX_SHEAR
            scaled = np.array(header.PixelSpacing, dtype=np.float64) / (geometry.spacing[1], geometry.spacing[0])
        except (AttributeError, TypeError, ValueError):
            continue  # no image of the stack
        at = (to_ijk @ [*position, 1.0])[:3]
        k = round(float(at[2]))
        off = np.abs(at - (0, 0, k)).max() > _OFF_GRID or np.abs(scaled - 1).max() > MAX_SHEAR
        if turned or off or (header.get("Rows"), header.get("Columns")) != (count_j, count_i):
            continue
        found.setdefault(k, header)
    if any(k not in found for k in range(count_k)):
        raise InputError(
            "The volume's voxels are not those of its DICOM images: it was moved, turned, cropped or resampled since, or an "
            "image is missing; load the series again."
        )
    return [found[k] for k in range(count_k)]


def _description(number: int, segment: Segment, series_uid: str, by_hand: bool) -> Any:
    import highdicom as hd
    from highdicom.sr import CodedConcept

    category, kind, modifier, region, region_modifier = _codes(segment.terminology)
    facts = {name: segment.tags.get(f"ProGiDiff.{name}", "") for name in _PARAMETERS}
    algorithm = None
    if facts["model"]:
        models = " + ".join(filter(None, (facts["model"], facts["adapter"])))
        algorithm = hd.AlgorithmIdentificationSequence(
            name=_line(f"ProGiDiff {models}"),
            family=CodedConcept("123110", "DCM", "Artificial Intelligence"),
            version=__version__,
            parameters={name: text for name, text in facts.items() if text},
        )
    tracked = (series_uid, segment.id or segment.name, *(facts[name] for name in _ORIGIN))
    description = hd.seg.SegmentDescription(
        segment_number=number,
        segment_label=_line(segment.name),
        segmented_property_category=_concept(category),
        segmented_property_type=_concept(kind),
        algorithm_type="MANUAL" if algorithm is None else "SEMIAUTOMATIC" if by_hand else "AUTOMATIC",
        algorithm_identification=algorithm,
        tracking_uid=f"2.25.{uuid.uuid5(uuid.NAMESPACE_OID, repr(tracked)).int}",
        tracking_id=_line(segment.name),
        anatomic_regions=None if region is None else [_concept(region)],
    )
    if modifier is not None:
        description.SegmentedPropertyTypeCodeSequence[0].SegmentedPropertyTypeModifierCodeSequence = [_concept(modifier)]
    if region is not None and region_modifier is not None:
        description.AnatomicRegionSequence[0].AnatomicRegionModifierSequence = [_concept(region_modifier)]
    description.RecommendedDisplayCIELabValue = _cielab(segment.color)
    return description


def _codes(terminology: str) -> tuple[Code, Code, Code | None, Code | None, Code | None]:
    """Category, type, its modifier, region and its modifier of a terminology entry; Slicer's default where it has none."""
    parts = (terminology.split("~") + [""] * 7)[:7]
    codes = [_code(parts[n]) for n in (1, 2, 3, 5, 6)]
    category, kind = codes[:2]
    if category is None or kind is None:
        return _codes(target_for("").terminology_entry)
    return category, kind, codes[2], codes[3], codes[4]


def _code(text: str) -> Code | None:
    scheme, _, rest = text.partition("^")
    value, _, meaning = rest.partition("^")
    return Code(scheme, value, meaning) if scheme and value and meaning else None


def _concept(code: Code) -> Any:
    from highdicom.sr import CodedConcept

    return CodedConcept(code.value, code.scheme, _line(code.meaning))


def _line(text: str) -> str:
    """Text as DICOM's LO takes it: 64 characters without backslash and control characters; here 64 bytes, as some count."""
    plain = "".join("/" if c == "\\" else c if c.isprintable() else " " for c in text).strip()
    if len(plain.encode()) > _LONG_STRING:
        plain = plain.encode()[: _LONG_STRING - 3].decode(errors="ignore") + "..."
    return plain or "-"


def _new_uid() -> str:
    return f"2.25.{uuid.uuid4().int}"


def _cielab(color: tuple[float, float, float]) -> list[int]:
    """sRGB in [0, 1] as PCS values of CIELab (D50), scaled to 16 bits as in DICOM PS3.3 C.10.7.1.1."""
    rgb = np.clip(color, 0.0, 1.0)
    linear = np.where(rgb <= 0.04045, rgb / 12.92, ((rgb + 0.055) / 1.055) ** 2.4)
    # IEC 61966-2-1, adapted to D50 by Bradford's method.
    to_xyz = [[0.4360747, 0.3850649, 0.1430804], [0.2225045, 0.7168786, 0.0606169], [0.0139322, 0.0971045, 0.7141733]]
    ratio = np.array(to_xyz) @ linear / np.array([0.96422, 1.0, 0.82521])
    x, y, z = np.where(ratio > (6 / 29) ** 3, np.cbrt(ratio), ratio * (29 / 6) ** 2 / 3 + 4 / 29)
    scaled = ((116 * y - 16) / 100, (500 * (x - y) + 128) / 255, (200 * (y - z) + 128) / 255)
    return [round(min(max(value, 0.0), 1.0) * 65535) for value in scaled]


@contextmanager
def _quiet() -> Iterator[None]:
    """Keep what the libraries say of odd values to themselves: it quotes the header, which tells of the patient."""
    from pydicom import config

    loggers = [logging.getLogger(name) for name in ("pydicom", "highdicom")]
    before = [logger.level for logger in loggers]
    with warnings.catch_warnings(), config.disable_value_validation():
        warnings.simplefilter("ignore")
        for logger in loggers:
            logger.setLevel(logging.CRITICAL + 1)
        try:
            yield
        finally:
            for logger, level in zip(loggers, before, strict=True):
                logger.setLevel(level)
