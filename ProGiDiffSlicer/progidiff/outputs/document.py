"""``proposals.json``: the written record of one request, with a documented, checked schema.

A reader of this file needs nothing but pydantic: ``ProposalsDocument.model_validate_json(text)``.
"""

from __future__ import annotations

from dataclasses import dataclass
from datetime import UTC, datetime
from pathlib import Path
from typing import Annotated, Literal

from pydantic import BaseModel, ConfigDict, Field, ValidationError

from progidiff import __version__
from progidiff.errors import InputError
from progidiff.wire.request import ProposeRequest

DOCUMENT_NAME = "proposals.json"
FORMAT_VERSION = "1.0"


class DocumentPart(BaseModel):
    """Base of the document's parts: finite numbers only; fields that a later minor version adds are
    ignored.
    """

    model_config = ConfigDict(extra="ignore", allow_inf_nan=False, protected_namespaces=())


class InputRecord(DocumentPart):
    """The image: file or folder name (without its path), geometry, and the slices that were looked at.

    Attributes:
        name: file or folder name.
        content_hash: the worker's hash of voxels and geometry.
        modality: as DICOM codes it, ``"CT"``, ``"MR"`` or another; ``None`` where the file does not tell.
        size_ijk: voxels along I, J, K.
        spacing_mm: millimetres along I, J, K.
        orientation: patient directions of I, J, K, e.g. ``"LPS"``.
        plane: view the slices are cut in.
        slices: half-open range along the slice axis.
        slice_count: slices of the whole volume along that axis.
    """

    name: str
    content_hash: str = ""
    modality: str | None = None
    size_ijk: tuple[int, int, int]
    spacing_mm: tuple[float, float, float]
    orientation: str
    plane: str
    slices: tuple[int, int]
    slice_count: int = Field(ge=1)


@dataclass(frozen=True, kw_only=True)
class RequestRecord(ProposeRequest):
    """What was asked for, and by which words; with the model this repeats the result.

    A field that results of earlier versions lack has its default.
    """

    prompts: Annotated[list[str], Field(min_length=1)]
    correct_values: bool = False


class ModelRecord(DocumentPart):
    """The model that answered, from its card."""

    id: str
    name: str = ""
    licence: str = ""
    adapter_id: str | None = None
    device: str = ""


class ProposalRecord(DocumentPart):
    """One sample of one target over the requested slices.

    Attributes:
        index: number of the noise field, from 0; ``seed`` and ``index`` repeat the mask whatever the number
            of proposals.
        rank: 1 is best; ``None`` for a near-duplicate of a ranked proposal.
        score: agreement with the other proposals in [0, 1]; made without ground truth, it is not an accuracy.
        duplicate_of: index of the ranked proposal that this one repeats (Dice above 0.98), or ``None``.
        weight: how many proposals a ranked one stands for, itself included; 0 for a near-duplicate.
        segment: name of its segment in ``proposals.seg.nrrd``, or ``None`` where it was not put forward.
        random_pick: the one of the k best that a seeded draw chose (RandTop-k).
        dropped_pieces, dropped_ml: pieces of the sampled mask that were dropped as not the organ's, and their volume.
        filled_ml: volume of its holes that were filled.
    """

    index: int = Field(ge=0)
    rank: int | None = Field(default=None, ge=1)
    score: float
    seed: int
    millilitres: float = Field(ge=0)
    empty: bool
    duplicate_of: int | None = None
    weight: int = Field(ge=0)
    segment: str | None = None
    random_pick: bool = False
    dropped_pieces: int = Field(default=0, ge=0)
    dropped_ml: float = Field(default=0.0, ge=0)
    filled_ml: float = Field(default=0.0, ge=0)


class VolumeSpread(DocumentPart):
    """Volume over all proposals, in millilitres.

    ``sd`` is the sample standard deviation (0 for one proposal), ``low`` and ``high`` are the 5th and 95th
    percentile.
    """

    mean: float
    sd: float
    median: float
    low: float
    high: float


class EnsembleVolumes(DocumentPart):
    """Volumes in millilitres of the masks made from all proposals together.

    ``consensus``: voxels in enough proposals for the highest expected Dice (the mask in ``consensus_<target>.nii.gz``),
    ``None`` in results of earlier versions. ``mean_probability``: mean of the proposals' probabilities above 0.5 (the
    mask in ``ensemble_<target>.nii.gz``). ``majority``: voxels in more than half of the proposals. ``staple``: STAPLE
    (Warfield 2004), ``None`` in results of earlier versions where it was left out.
    """

    consensus: float | None = None
    mean_probability: float
    majority: float
    staple: float | None = None


class TargetRecord(DocumentPart):
    """Everything about one target. ``found`` is false where the best-ranked proposal is empty."""

    target: str
    name: str
    prompt: str
    snomed_code: str = ""
    found: bool
    empty_share: float = Field(ge=0, le=1)
    mean_pairwise_dice: float | None = None
    stop_reason: str
    volume_ml: VolumeSpread
    ensembles_ml: EnsembleVolumes
    agreement_file: str
    ensemble_file: str
    consensus_file: str = ""
    proposals: list[ProposalRecord]

    def ranked(self) -> list[ProposalRecord]:
        """Distinct proposals, best first."""
        return sorted((p for p in self.proposals if p.rank is not None), key=lambda p: p.rank or 0)


class WarningRecord(DocumentPart):
    """Something to know that did not stop the request."""

    code: str
    message: str


class ProposalsDocument(DocumentPart):
    """The whole of ``proposals.json``. Times are in seconds, memory in MiB, volumes in millilitres."""

    format: Literal["progidiff-proposals"] = "progidiff-proposals"
    format_version: str = FORMAT_VERSION
    program_version: str = __version__
    created: datetime = Field(default_factory=lambda: datetime.now(UTC).replace(microsecond=0))
    input: InputRecord
    request: RequestRecord
    model: ModelRecord
    targets: list[TargetRecord]
    warnings: list[WarningRecord] = []
    timing_s: dict[str, float] = {}
    peak_memory_mb: float | None = None
    files: list[str] = []

    def to_json(self) -> str:
        """Readable JSON text; names stay as they are written (no ASCII escapes)."""
        return self.model_dump_json(indent=2) + "\n"


def read_document(path: Path) -> ProposalsDocument:
    """Read a ``proposals.json``.

    Raises:
        InputError: the file is missing, is not this format, or breaks the schema.
    """
    try:
        text = path.read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        raise InputError(f'"{path}" cannot be read ({error}); choose the {DOCUMENT_NAME} of a result folder.') from error
    try:
        return ProposalsDocument.model_validate_json(text)
    except ValidationError as error:
        first = error.errors(include_url=False, include_input=False)[0]
        where = ".".join(str(step) for step in first["loc"]) or "the file"
        raise InputError(
            f'"{path}" is not a {DOCUMENT_NAME} of this program ({where}: {first["msg"]}); choose another file.'
        ) from None
