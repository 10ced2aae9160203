"""The result file of ``progidiff next``: what was measured, and with what, so that an interrupted search goes on."""

from __future__ import annotations

import hashlib
import os
from datetime import UTC, datetime
from pathlib import Path
from typing import Literal

from pydantic import Field, ValidationError

from progidiff import __version__
from progidiff.errors import OutputError
from progidiff.outputs.document import DocumentPart
from progidiff.places import atomic_file

FORMAT_VERSION = "1.0"


class TargetItem(DocumentPart):
    """One target in one volume; the numbers are those of :mod:`progidiff.active.disagreement`.

    Attributes:
        disagreement: presence x (pairwise + entropy) / 2.
        presence, pairwise, entropy: its parts.
        empty_share: share of proposals without a pixel.
        slice: the most uncertain slice, an index along the slice axis of the stored array.
        ras: centre of the doubt on it, in RAS millimetres.
        slices: the slices that were looked at.
    """

    disagreement: float
    presence: float
    pairwise: float
    entropy: float
    empty_share: float
    slice: int
    ras: tuple[float, float, float]
    slices: list[int]


class Item(DocumentPart):
    """One volume. ``disagreement``, ``target``, ``slice`` and ``ras`` are those of the target that disagrees most.

    Attributes:
        path: relative to the searched folder, with forward slashes.
        fingerprint: digest of the content.
        notes: sentences such as that the plane is not one the model was trained on.
        seconds: time that it took.
    """

    path: str = ""
    disagreement: float
    target: str
    slice: int
    ras: tuple[float, float, float]
    plane: str
    slice_count: int
    per_target: dict[str, TargetItem]
    notes: list[str] = Field(default_factory=list)
    fingerprint: str = ""
    seconds: float = 0.0


class Unmeasured(DocumentPart):
    """A volume that could not be measured, and why."""

    path: str
    reason: str


class Basis(DocumentPart):
    """What the numbers depend on besides the volumes; other settings make other numbers."""

    model_id: str
    weights: str
    adapter_id: str | None = None
    targets: list[str] = Field(min_length=1)
    proposals: int
    steps: int
    slices: int
    closer: int
    seed: int
    modality: str | None = None
    plane: str = "as acquired"  # what earlier versions took, in which finely cut volumes came out otherwise
    correct_values: bool = False


class NextDocument(DocumentPart):
    """The whole file; ``volumes`` are ranked, the most uncertain first."""

    format: Literal["progidiff-next"] = "progidiff-next"
    format_version: str = FORMAT_VERSION
    program_version: str = __version__
    created: datetime = Field(default_factory=lambda: datetime.now(UTC).replace(microsecond=0))
    settings: Basis
    complete: bool = False
    volumes: list[Item] = Field(default_factory=list)
    failures: list[Unmeasured] = Field(default_factory=list)

    def ranked(self) -> list[Item]:
        """The volumes, the most uncertain first; equal ones by path."""
        return sorted(self.volumes, key=lambda item: (-item.disagreement, item.path))

    def write(self, path: Path) -> None:
        """Write it in place of an earlier one, whole or not at all.

        Raises:
            OutputError: it cannot be written.
        """
        self.volumes = self.ranked()
        try:
            path.parent.mkdir(parents=True, exist_ok=True)
        except OSError as error:
            raise OutputError(f"The folder {path.parent} cannot be made ({error.strerror}); choose another file.") from error
        with atomic_file(path) as staged:
            staged.write_text(self.model_dump_json(indent=1) + "\n", encoding="utf-8")


def read_or_begin(path: Path, settings: Basis) -> tuple[NextDocument, str]:
    """The document to go on with, and a sentence where an earlier one was put aside.

    A file that was measured with another model, adapter, prompt or other settings is renamed and kept.

    Raises:
        OutputError: the file is something else, which is not overwritten, or cannot be read or renamed.
    """
    try:
        text = path.read_text(encoding="utf-8")
    except FileNotFoundError:
        return NextDocument(settings=settings), ""
    except (OSError, UnicodeDecodeError) as error:
        raise OutputError(f"{path} cannot be read as a result of this command; choose another file.") from error
    try:
        known = NextDocument.model_validate_json(text)
    except ValidationError as error:
        raise OutputError(f"{path} is not a result of this command; choose another file, or remove it.") from error
    if known.settings == settings:
        return known, ""
    aside = path.with_name(f"{path.stem}-{hashlib.sha256(text.encode()).hexdigest()[:8]}{path.suffix}")
    try:
        os.replace(path, aside)
    except OSError as error:
        raise OutputError(f"{path} cannot be renamed ({error.strerror}); choose another file.") from error
    what = _difference(known.settings, settings)
    return NextDocument(
        settings=settings
    ), f"The earlier result was made with {what}; it is kept as {aside.name}, this one starts anew."


def _difference(before: Basis, now: Basis) -> str:
    if (before.model_id, before.weights, before.adapter_id) != (now.model_id, now.weights, now.adapter_id):
        return "another model or adapter"
    return "another prompt" if before.targets != now.targets else "other settings"
