"""The model card: what a model folder says about itself, as ``model_card.json``."""

from __future__ import annotations

import os
import string
from collections.abc import Iterable, Mapping, Sequence
from datetime import UTC, datetime
from pathlib import Path
from typing import Annotated, Any, Literal

from pydantic import (
    AwareDatetime,
    BaseModel,
    ConfigDict,
    Field,
    ValidationError,
    field_validator,
    model_validator,
)

from progidiff.errors import ModelError
from progidiff.locations import CARD_NAME, default_model_folder

FORMAT_VERSION = "1.0"

Modality = Literal["CT", "MR"]
Plane = Literal["axial", "coronal", "sagittal"]
PredictionType = Literal["v_prediction", "sample"]


class _Part(BaseModel):
    """Base of the card's parts: finite numbers only; fields that a later minor version adds are kept."""

    model_config = ConfigDict(extra="allow", allow_inf_nan=False, validate_assignment=True)


class Window(_Part):
    """Intensities mapped to [0, 1], in Hounsfield units (``"hu"``, CT) or percentiles of the volume (MR)."""

    kind: Literal["hu", "percentile"]
    low: float
    high: float

    @model_validator(mode="after")
    def _ordered(self) -> Window:
        if not self.low < self.high:
            raise ValueError(f"the window's low end {self.low:g} is not below its high end {self.high:g}")
        if self.kind == "percentile" and (self.low < 0 or self.high > 100):
            raise ValueError("a percentile window lies within 0 and 100")
        return self


class TrainingSource(_Part):
    """One data set the weights saw; ``n`` counts ``what``, e.g. ``"label maps"``, where it is known."""

    name: str
    licence: str
    what: str
    n: int | None = Field(default=None, ge=0)


class TrainingStage(_Part):
    """One training stage, e.g. ``"base"`` or ``"control"``; ``seconds`` is wall time over resumed runs."""

    stage: str
    steps: int = Field(ge=0)
    seconds: float = Field(ge=0)
    device: str
    seeds: list[int]


class Accuracy(_Part):
    """One measured figure, e.g. rank-1 Dice of ``target`` on ``set``."""

    set: str
    target: str
    metric: str
    value: float
    n_slices: int = Field(ge=0)
    n_patients: int = Field(ge=0)


Sha256 = Annotated[str, Field(pattern=r"^[0-9a-f]{64}$")]


class ModelCard(_Part):
    """Everything needed to use a model rightly, and to judge it.

    Attributes:
        format_version: ``major.minor`` of this layout; another major version is refused.
        vocabulary: canonical target names that may be prompted; empty for a model that is not trained yet.
        prompt_template: text given to the text encoder; holds ``{target}`` and may hold ``{modality}``.
        windows: one per modality.
        image_size: rows and columns of a square network input, pixels.
        spacing_mm: in-plane spacing the slices are resampled to, mm per pixel; a typical one where there are ``body_grids``.
        body_grids: rows and columns of the network input by plane, for a model whose grid is laid on the body: its pixels
            are as large as the body's size needs. Empty for the square of fixed pixels.
        latent_shift, latent_scale: per latent channel; the diffusion sees ``(z - shift) * scale`` of the raw
            encoder output ``z`` of a mask (the autoencoder's own ``scaling_factor`` is not applied).
        prediction_type: what the networks predict, in diffusers' terms; epsilon has no meaning at zero
            terminal SNR.
        trainable_parameters: parameters trained in the control stage (control branch and image encoder).
        sha256: checksum by path of every weight file, relative to the model folder.
    """

    format_version: str = FORMAT_VERSION
    model_id: str = Field(min_length=1)
    name: str = Field(min_length=1)
    licence: str = Field(min_length=1)
    created: AwareDatetime = Field(default_factory=lambda: datetime.now(UTC).replace(microsecond=0))
    modalities: list[Modality] = Field(min_length=1)
    planes: list[Plane] = Field(default=["axial"], min_length=1)
    vocabulary: list[str] = []
    prompt_template: str = "{target}"
    windows: dict[Modality, Window]
    image_size: int = Field(gt=0)
    spacing_mm: float = Field(gt=0)
    body_grids: dict[Plane, tuple[int, int]] = {}
    latent_shift: list[float] = Field(min_length=1)
    latent_scale: list[Annotated[float, Field(gt=0)]] = Field(min_length=1)
    prediction_type: PredictionType = "v_prediction"
    trained_on: list[TrainingSource] = []
    training: list[TrainingStage] = []
    accuracy: list[Accuracy] = []
    trainable_parameters: int = Field(ge=0)
    notes: str = ""
    sha256: dict[str, Sha256] = {}

    @field_validator("prompt_template")
    @classmethod
    def _usable_template(cls, template: str) -> str:
        fields = {name for _, name, _, _ in string.Formatter().parse(template) if name is not None}
        if "target" not in fields or fields - {"target", "modality"}:
            raise ValueError("the prompt template holds {target}, optionally {modality}, and no other field")
        return template

    @field_validator("vocabulary")
    @classmethod
    def _distinct(cls, vocabulary: list[str]) -> list[str]:
        if len(set(vocabulary)) != len(vocabulary):
            raise ValueError("the vocabulary names a target twice")
        return vocabulary

    @model_validator(mode="after")
    def _consistent(self) -> ModelCard:
        absent = [modality for modality in self.modalities if modality not in self.windows]
        if absent:
            raise ValueError(f"there is no window for {', '.join(absent)}")
        if len(self.latent_shift) != len(self.latent_scale):
            raise ValueError("latent_shift and latent_scale differ in length")
        return self

    def grid_size(self, plane: str) -> tuple[int, int]:
        """Rows and columns of the network input for slices of a plane."""
        square = (self.image_size, self.image_size)
        return next((size for known, size in self.body_grids.items() if known == plane), square)

    def prompt(self, target: str, modality: str | None = None) -> str:
        """Text for the text encoder, e.g. ``"liver"`` -> ``"segmentation mask of the liver"``."""
        return self.prompt_template.format(target=target, modality=modality or self.modalities[0])

    def strange_planes(self, planes: Iterable[str]) -> str | None:
        """What to know where some slices are of planes that the model was not trained on, as a sentence."""
        strange = sorted({*planes} - {*self.planes})
        if not strange:
            return None
        return f"The slices are {' and '.join(strange)}, but this model was trained on {' and '.join(self.planes)} ones."

    def window(self, modality: str | None = None) -> Window:
        """Window of ``modality`` (the model's first one by default).

        Raises:
            ModelError: the model was not made for this modality.
        """
        wanted = modality or self.modalities[0]
        for known, window in self.windows.items():
            if known == wanted:
                return window
        raise ModelError(
            f'The model "{self.model_id}" was made for {" and ".join(self.modalities)}, not for {wanted}; '
            "choose a model for this modality."
        )


def make_card(fields: Mapping[str, Any]) -> ModelCard:
    """Card from its fields.

    Raises:
        ModelError: a field is missing or wrong; the message names it.
    """
    try:
        return ModelCard.model_validate(dict(fields))
    except ValidationError as error:
        raise ModelError(f"The model card cannot be made ({_one_line(error)}); correct this setting.") from error


def save_card(card: ModelCard, folder: Path) -> None:
    """Write ``model_card.json`` into ``folder``; a reader sees the old card or the whole new one."""
    path = folder / CARD_NAME
    part = path.with_name(path.name + ".part")
    part.write_text(card.model_dump_json(indent=2) + "\n", encoding="utf-8")
    os.replace(part, path)


def load_card(folder: Path | None = None) -> ModelCard:
    """Read ``model_card.json`` of a model folder (by default the bundled model's), without loading the model.

    Raises:
        ModelError: the folder or the card is missing, is not JSON, lacks or breaks a field, or is of a newer format.
    """
    folder = default_model_folder() if folder is None else Path(folder)
    if not folder.is_dir():
        raise ModelError(f'There is no model folder "{folder}"; choose an existing one.')
    path = folder / CARD_NAME
    try:
        text = path.read_text(encoding="utf-8")
    except FileNotFoundError:
        raise ModelError(
            f'The folder "{folder}" has no {CARD_NAME}, so it is not a ProGiDiff model; choose a model'
            " folder, or build one from a Stable Diffusion folder first."
        ) from None
    except (OSError, UnicodeDecodeError) as error:
        raise ModelError(f'The model card "{path}" cannot be read ({error}); copy the model folder again.') from error
    try:
        return parse_card(text)
    except ValueError as error:
        raise ModelError(f'The model card "{path}" is damaged ({error}); copy the model folder again.') from error


def parse_card(text: str) -> ModelCard:
    """Card from its JSON text.

    Raises:
        ModelError: unknown major format version.
        ValueError: not JSON, or a field is missing or wrong; the message is one line.
    """
    try:
        version = _Version.model_validate_json(text).format_version
        if version.partition(".")[0] != FORMAT_VERSION.partition(".")[0]:
            raise ModelError(
                f"The model card has format version {version}, this program reads {FORMAT_VERSION}; install a"
                " matching version of ProGiDiffSlicer."
            )
        return ModelCard.model_validate_json(text)
    except ValidationError as error:
        raise ValueError(_one_line(error)) from error


class _Version(BaseModel):
    """The one field that every format version has."""

    format_version: str = Field(pattern=r"^\d+\.\d+$")


def _one_line(error: ValidationError) -> str:
    first = error.errors(include_url=False, include_input=False)[0]
    where = _dotted(first["loc"])
    message = first["msg"].removeprefix("Value error, ")
    return f"{where}: {message}" if where else message


def _dotted(location: Sequence[int | str]) -> str:
    return ".".join(str(step) for step in location)
