"""The manifest of a folder of 2-D slices."""

from __future__ import annotations

import re
from codecs import BOM_UTF8
from pathlib import Path, PurePosixPath
from typing import Annotated, Literal

from pydantic import AfterValidator, BaseModel, ConfigDict, Field, ValidationError, model_validator

from progidiff.datasets.naming import read_json, target_of
from progidiff.errors import DatasetError
from progidiff.targets.catalog import part_of

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
