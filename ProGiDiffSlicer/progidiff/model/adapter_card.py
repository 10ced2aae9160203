"""The adapter card: what a LoRA adapter says about itself, as ``adapter_card.json`` beside its weights."""

from __future__ import annotations

import os
from datetime import UTC, datetime
from pathlib import Path
from typing import Annotated, Any, Literal

from pydantic import AwareDatetime, BaseModel, ConfigDict, Field, ValidationError

from progidiff.errors import AdapterError
from progidiff.locations import ADAPTER_CARD_NAME
from progidiff.model.card import Modality, Sha256

FORMAT_VERSION = "1.0"

Layers = Literal["attention", "all"]
Share = Annotated[float, Field(ge=0, le=1)]


class _Part(BaseModel):
    model_config = ConfigDict(extra="allow", allow_inf_nan=False)


class Counts(_Part):
    """Number of cases, or patients, that were trained on and held out."""

    training: int = Field(ge=0)
    validation: int = Field(ge=0)


class TargetScore(_Part):
    """Mean Dice of the first-ranked proposal over the held-out slices that show the target."""

    dice: Share
    n_slices: int = Field(ge=1)
    n_patients: int = Field(ge=1)


class Retention(_Part):
    """Mean Dice of the first-ranked proposal on a set of the base's own, before and after tuning."""

    set: str
    n: int = Field(ge=0)
    before: Share
    after: Share


class AdapterCard(_Part):
    """Everything needed to decide whether an adapter may be used.

    Attributes:
        format_version: ``major.minor`` of this layout; another major version is refused.
        adapter_id: unique name.
        base_model_id, base_sha256: the model that it belongs to; the hash is ``progidiff.locations.weights_hash`` of the
            checksums on its card.
        rank, alpha: of LoRA (arXiv 2106.09685): W' = W + alpha / rank * B A.
        layers: ``"attention"`` (projections of the attention blocks) or ``"all"`` (every convolution and linear layer of the
            control branch and the image encoder).
        modalities: of the cases.
        vocabulary: targets that it was tuned on.
        cases, patients: how many were trained on and held out.
        targets: cases by target.
        steps, best_step: optimiser steps, and the step whose weights were kept.
        seconds: wall time.
        before, after: by target, on the held-out cases; empty where nobody could be held out.
        mean_before, mean_after: mean over those targets.
        retention: what is left on the base's own kind of data.
        better: whether it was better than the base on the held-out cases; only such an adapter is taken into use unasked.
        reason: one sentence on it.
        sha256: checksum of the weights file.
    """

    format_version: str = Field(default=FORMAT_VERSION, pattern=r"^\d+\.\d+$")
    adapter_id: str = Field(min_length=1)
    name: str = Field(min_length=1)
    created: AwareDatetime = Field(default_factory=lambda: datetime.now(UTC).replace(microsecond=0))
    base_model_id: str
    base_sha256: Sha256
    rank: int = Field(ge=1)
    alpha: float = Field(gt=0)
    layers: Layers
    modalities: list[Modality]
    vocabulary: list[str]
    cases: Counts
    patients: Counts
    targets: dict[str, Counts] = {}
    steps: int = Field(ge=0)
    best_step: int = Field(ge=0)
    seconds: float = Field(ge=0)
    device: str
    seed: int
    settings: dict[str, Any] = {}
    before: dict[str, TargetScore] = {}
    after: dict[str, TargetScore] = {}
    mean_before: Share | None = None
    mean_after: Share | None = None
    retention: Retention | None = None
    better: bool
    reason: str
    sha256: Sha256
    notes: str = ""


def save_adapter_card(card: AdapterCard, folder: Path) -> None:
    """Write ``adapter_card.json``; a reader sees the old card or the whole new one."""
    path = folder / ADAPTER_CARD_NAME
    part = path.with_name(path.name + ".part")
    part.write_text(card.model_dump_json(indent=2) + "\n", encoding="utf-8")
    os.replace(part, path)


def load_adapter_card(folder: Path) -> AdapterCard:
    """Read the card of an adapter's folder.

    Raises:
        AdapterError: it is missing, unreadable, damaged or of a newer format.
    """
    path = folder / ADAPTER_CARD_NAME
    try:
        text = path.read_text(encoding="utf-8")
    except FileNotFoundError:
        raise AdapterError(
            f'The folder "{folder}" has no {ADAPTER_CARD_NAME}, so it is no adapter; choose one made by "progidiff adapt".'
        ) from None
    except (OSError, UnicodeDecodeError) as error:
        raise AdapterError(f'The adapter card "{path}" cannot be read ({error}); copy the adapter again.') from error
    try:
        card = AdapterCard.model_validate_json(text)
    except ValidationError as error:
        first = error.errors(include_url=False, include_input=False)[0]
        where = ".".join(str(step) for step in first["loc"])
        raise AdapterError(
            f'The adapter card "{path}" is damaged ({where}: {first["msg"]}); copy the adapter again.'
        ) from error
    if card.format_version.partition(".")[0] != FORMAT_VERSION.partition(".")[0]:
        raise AdapterError(
            f"The adapter card has format version {card.format_version}, this program reads {FORMAT_VERSION}; install a"
            " matching version of ProGiDiffSlicer."
        )
    return card
