"""The model card and the adapter card: what a model folder and a LoRA adapter say of themselves, as JSON beside the weights.

Standard library only: the engine and the module inside Slicer read cards with the same strict reader.
"""

from __future__ import annotations

import json
import math
import re
import string
from collections.abc import Callable, Iterable, Mapping
from dataclasses import MISSING, dataclass, field, fields
from datetime import UTC, datetime
from numbers import Integral, Real
from pathlib import Path
from types import UnionType
from typing import Annotated, Any, ClassVar, Literal, Self, TypeVar, Union, get_args, get_origin, get_type_hints

from progidiff.errors import AdapterError, ModelError
from progidiff.places import ADAPTER_CARD_NAME, CARD_NAME, default_model_folder, replaced_file

Modality = Literal["CT", "MR"]
Plane = Literal["axial", "coronal", "sagittal"]
PredictionType = Literal["v_prediction", "sample"]
Layers = Literal["attention", "all"]


class CardError(ValueError):
    """A card that cannot be used: ``field`` is the dotted path of what is wrong, "" for the whole."""

    def __init__(self, where: str, reason: str) -> None:
        super().__init__(f"{where}: {reason}" if where else reason)
        self.field, self.reason = where, reason


class CardVersionError(CardError):
    """A card of another major version of its format; ``reason`` is that version."""


def _rule(holds: Callable[[Any], bool], reason: str) -> Callable[[Any], None]:
    """What a value has to satisfy, to be written behind its type in ``Annotated``."""

    def check(value: Any) -> None:
        if not holds(value):
            raise CardError("", reason)

    return check


_POSITIVE = _rule(lambda value: value > 0, "must be greater than 0")
_SOME = _rule(lambda value: len(value) > 0, "must not be empty")
Count = Annotated[int, _rule(lambda value: value >= 0, "must be 0 or more")]
Number = Annotated[int, _rule(lambda value: value >= 1, "must be 1 or more")]
Seconds = Annotated[float, _rule(lambda value: value >= 0, "must be 0 or more")]
Share = Annotated[float, _rule(lambda value: 0 <= value <= 1, "must lie within 0 and 1")]
Text = Annotated[str, _SOME]
Sha256 = Annotated[str, _rule(re.compile(r"[0-9a-f]{64}").fullmatch, "must be 64 hexadecimal digits")]
Version = Annotated[str, _rule(re.compile(r"\d+\.\d+").fullmatch, "must be two numbers with a point between them")]


@dataclass(frozen=True, kw_only=True)
class _Checked:
    """Base of the cards and their parts: every value is checked against its annotation, however it is made.

    Attributes:
        others: fields that a later minor version adds; they are written again.
    """

    others: dict[str, Any] = field(default_factory=dict)

    def __post_init__(self) -> None:
        for name, kind in _kinds(type(self)).items():
            object.__setattr__(self, name, _value(kind, getattr(self, name), name))
        self._check()

    def _check(self) -> None:
        """Whether the fields go together."""

    @classmethod
    def read(cls, content: object) -> Self:
        """A part from its JSON content; parts that are made already may stand in it.

        Raises:
            CardError: a field is missing or wrong.
        """
        if not isinstance(content, Mapping):
            raise CardError("", "must be a JSON object")
        kinds = _kinds(cls)
        for each in fields(cls):
            if each.name in kinds and each.name not in content and each.default is each.default_factory is MISSING:
                raise CardError(each.name, "missing")
        known = {name: value for name, value in content.items() if name in kinds}
        return cls(**known, others={name: value for name, value in content.items() if name not in kinds})

    def to_dict(self) -> dict[str, Any]:
        """The part as JSON content, which :meth:`read` reads."""
        return {name: _plain(getattr(self, name)) for name in _kinds(type(self))} | self.others


_KNOWN_KINDS: dict[type, dict[str, Any]] = {}


def _kinds(part: type[_Checked]) -> dict[str, Any]:
    """Types of a part's fields, in the order of the file."""
    if part not in _KNOWN_KINDS:
        hints = get_type_hints(part, include_extras=True)
        _KNOWN_KINDS[part] = {each.name: hints[each.name] for each in fields(part) if each.name != "others"}
    return _KNOWN_KINDS[part]


_SIMPLE: dict[Any, tuple[Any, str]] = {
    str: (str, "must be a text"),
    bool: (bool, "must be true or false"),
    int: (Integral, "must be a whole number"),
    float: (Real, "must be a number"),
}


def _value(kind: Any, value: Any, where: str) -> Any:
    """A value as its annotation wants it.

    Raises:
        CardError: it is something else; the error names the field.
    """
    origin, inner = get_origin(kind), get_args(kind)
    if origin is Annotated:
        value = _value(inner[0], value, where)
        for check in inner[1:]:
            _named(where, check, value)
        return value
    if origin is Union or origin is UnionType:  # ``X | None``
        return None if value is None else _value(inner[0], value, where)
    if kind is Any:
        return value
    if origin is Literal:
        if value not in inner:
            raise CardError(where, f"must be {' or '.join(repr(each) for each in inner)}")
        return value
    if origin is list or origin is tuple:
        if not isinstance(value, list | tuple) or (origin is tuple and len(value) != len(inner)):
            raise CardError(where, "must be a list" if origin is list else f"must be a list of {len(inner)}")
        return origin(_value(inner[0], each, f"{where}.{n}") for n, each in enumerate(value))
    if origin is dict:
        if not isinstance(value, Mapping):
            raise CardError(where, "must be a JSON object")
        return {
            _value(inner[0], key, f"{where}.{key}"): _value(inner[1], each, f"{where}.{key}") for key, each in value.items()
        }
    if kind is datetime:
        return _named(where, _moment, value)
    if issubclass(kind, _Checked):
        return value if isinstance(value, kind) else _named(where, kind.read, value)
    wanted, reason = _SIMPLE[kind]
    if not isinstance(value, wanted) or (isinstance(value, bool) and kind is not bool):
        raise CardError(where, reason)
    if kind is float and not math.isfinite(value):
        raise CardError(where, "must be a finite number")
    return kind(value)


def _named(where: str, make: Callable[[Any], Any], value: Any) -> Any:
    """Call ``make``; its error names the field from here on."""
    try:
        return make(value)
    except CardError as error:
        raise CardError(f"{where}.{error.field}" if error.field else where, error.reason) from None


def _moment(value: Any) -> datetime:
    try:
        found = datetime.fromisoformat(value) if isinstance(value, str) else value
    except ValueError:
        found = None
    if not isinstance(found, datetime) or found.tzinfo is None:
        raise CardError("", "must be a date and time with its time zone")
    return found


def _plain(value: Any) -> Any:
    if isinstance(value, _Checked):
        return value.to_dict()
    if isinstance(value, datetime):
        return value.isoformat().replace("+00:00", "Z")
    if isinstance(value, list | tuple):
        return [_plain(each) for each in value]
    return {key: _plain(each) for key, each in value.items()} if isinstance(value, dict) else value


def _now() -> datetime:
    return datetime.now(UTC).replace(microsecond=0)


@dataclass(frozen=True, kw_only=True)
class _Card(_Checked):
    """Base of both cards.

    Attributes:
        format_version: ``major.minor`` of this layout; another major version is refused.
    """

    FORMAT: ClassVar[str] = "1.0"
    FILE: ClassVar[str]

    format_version: Version = FORMAT

    @classmethod
    def read(cls, content: object) -> Self:
        """A card from its JSON content.

        Raises:
            CardVersionError: it is of another major version.
            CardError: a field is missing or wrong.
        """
        version = content.get("format_version") if isinstance(content, Mapping) else None
        # looked at before anything else: nothing more is known of another version, not even how it writes its minor one
        major = re.match(r"\d+", version) if isinstance(version, str) else None
        if major is not None and major[0] != cls.FORMAT.partition(".")[0]:
            raise CardVersionError("format_version", str(version))
        return super().read(content)


_C = TypeVar("_C", bound=_Card)


@dataclass(frozen=True, kw_only=True)
class Window(_Checked):
    """Intensities mapped to [0, 1], in Hounsfield units (``"hu"``, CT) or percentiles of the volume (MR)."""

    kind: Literal["hu", "percentile"]
    low: float
    high: float

    def _check(self) -> None:
        if not self.low < self.high:
            raise CardError("", f"the window's low end {self.low:g} is not below its high end {self.high:g}")
        if self.kind == "percentile" and (self.low < 0 or self.high > 100):
            raise CardError("", "a percentile window lies within 0 and 100")


@dataclass(frozen=True, kw_only=True)
class TrainingSource(_Checked):
    """One data set the weights saw; ``n`` counts ``what``, e.g. ``"label maps"``, where it is known."""

    name: str
    licence: str
    what: str
    n: Count | None = None


@dataclass(frozen=True, kw_only=True)
class TrainingStage(_Checked):
    """One training stage, e.g. ``"base"`` or ``"control"``; ``seconds`` is wall time over resumed runs."""

    stage: str
    steps: Count
    seconds: Seconds
    device: str
    seeds: list[int]


@dataclass(frozen=True, kw_only=True)
class Accuracy(_Checked):
    """One measured figure, e.g. rank-1 Dice of ``target`` on ``set``."""

    set: str
    target: str
    metric: str
    value: float
    n_slices: Count
    n_patients: Count


@dataclass(frozen=True, kw_only=True)
class ModelCard(_Card):
    """Everything needed to use a model rightly, and to judge it.

    Attributes:
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

    FILE: ClassVar[str] = CARD_NAME

    model_id: Text
    name: Text
    licence: Text
    created: datetime = field(default_factory=_now)
    modalities: Annotated[list[Modality], _SOME]
    planes: Annotated[list[Plane], _SOME] = field(default_factory=lambda: ["axial"])
    vocabulary: list[str] = field(default_factory=list)
    prompt_template: str = "{target}"
    windows: dict[Modality, Window]
    image_size: Annotated[int, _POSITIVE]
    spacing_mm: Annotated[float, _POSITIVE]
    body_grids: dict[Plane, tuple[int, int]] = field(default_factory=dict)
    latent_shift: Annotated[list[float], _SOME]
    latent_scale: Annotated[list[Annotated[float, _POSITIVE]], _SOME]
    prediction_type: PredictionType = "v_prediction"
    trained_on: list[TrainingSource] = field(default_factory=list)
    training: list[TrainingStage] = field(default_factory=list)
    accuracy: list[Accuracy] = field(default_factory=list)
    trainable_parameters: Count
    notes: str = ""
    sha256: dict[str, Sha256] = field(default_factory=dict)

    def _check(self) -> None:
        try:
            named = {name for _, name, _, _ in string.Formatter().parse(self.prompt_template) if name is not None}
        except ValueError:
            named = set()
        if "target" not in named or named - {"target", "modality"}:
            reason = "the prompt template holds {target}, optionally {modality}, and no other field"
            raise CardError("prompt_template", reason)
        if len(set(self.vocabulary)) != len(self.vocabulary):
            raise CardError("vocabulary", "the vocabulary names a target twice")
        absent = [modality for modality in self.modalities if modality not in self.windows]
        if absent:
            raise CardError("", f"there is no window for {', '.join(absent)}")
        if len(self.latent_shift) != len(self.latent_scale):
            raise CardError("", "latent_shift and latent_scale differ in length")

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


@dataclass(frozen=True, kw_only=True)
class Counts(_Checked):
    """Number of cases, or patients, that were trained on and held out."""

    training: Count
    validation: Count


@dataclass(frozen=True, kw_only=True)
class TargetScore(_Checked):
    """Mean Dice of the first-ranked proposal over the held-out slices that show the target."""

    dice: Share
    n_slices: Number
    n_patients: Number


@dataclass(frozen=True, kw_only=True)
class Retention(_Checked):
    """Mean Dice of the first-ranked proposal on a set of the base's own, before and after tuning."""

    set: str
    n: Count
    before: Share
    after: Share


@dataclass(frozen=True, kw_only=True)
class AdapterCard(_Card):
    """Everything needed to decide whether an adapter may be used.

    Attributes:
        adapter_id: unique name.
        base_model_id, base_sha256: the model that it belongs to; the hash is ``progidiff.places.weights_hash`` of the
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

    FILE: ClassVar[str] = ADAPTER_CARD_NAME

    adapter_id: Text
    name: Text
    created: datetime = field(default_factory=_now)
    base_model_id: str
    base_sha256: Sha256
    rank: Number
    alpha: Annotated[float, _POSITIVE]
    layers: Layers
    modalities: list[Modality]
    vocabulary: list[str]
    cases: Counts
    patients: Counts
    targets: dict[str, Counts] = field(default_factory=dict)
    steps: Count
    best_step: Count
    seconds: Seconds
    device: str
    seed: int
    settings: dict[str, Any] = field(default_factory=dict)
    before: dict[str, TargetScore] = field(default_factory=dict)
    after: dict[str, TargetScore] = field(default_factory=dict)
    mean_before: Share | None = None
    mean_after: Share | None = None
    retention: Retention | None = None
    better: bool
    reason: str
    sha256: Sha256
    notes: str = ""


def make_card(content: Mapping[str, Any]) -> ModelCard:
    """Card from its fields.

    Raises:
        ModelError: a field is missing or wrong; the message names it.
    """
    try:
        return ModelCard.read(content)
    except CardError as error:
        raise ModelError(f"The model card cannot be made ({error}); correct this setting.") from error


def save_card(card: ModelCard | AdapterCard, folder: Path) -> None:
    """Write the card into its folder; a reader sees the old card or the whole new one."""
    text = json.dumps(card.to_dict(), indent=2, ensure_ascii=False, allow_nan=False)
    with replaced_file(folder / card.FILE) as staged:
        staged.write_text(text + "\n", encoding="utf-8")


def load_card(folder: Path | None = None) -> ModelCard:
    """Read ``model_card.json`` of a model folder (by default the bundled model's), without loading the model.

    Raises:
        ModelError: the folder or the card is missing, is not JSON, lacks or breaks a field, or is of a newer format.
    """
    folder = default_model_folder() if folder is None else Path(folder)
    if not folder.is_dir():
        raise ModelError(f'There is no model folder "{folder}"; choose an existing one.')
    absent = (
        f'The folder "{folder}" has no {CARD_NAME}, so it is not a ProGiDiff model; choose a model'
        " folder, or build one from a Stable Diffusion folder first."
    )
    return _load(ModelCard, folder, ModelError, "model", "the model folder", absent)


def load_adapter_card(folder: Path) -> AdapterCard:
    """Read the card of an adapter's folder.

    Raises:
        AdapterError: it is missing, unreadable, damaged or of a newer format.
    """
    absent = f'The folder "{folder}" has no {ADAPTER_CARD_NAME}, so it is no adapter; choose one made by "progidiff adapt".'
    return _load(AdapterCard, folder, AdapterError, "adapter", "the adapter", absent)


def _load(
    kind: type[_C], folder: Path, error_class: type[ModelError | AdapterError], word: str, what: str, absent: str
) -> _C:
    path = folder / kind.FILE
    try:
        text = path.read_text(encoding="utf-8")
    except FileNotFoundError:
        raise error_class(absent) from None
    except (OSError, UnicodeDecodeError) as error:
        raise error_class(f'The {word} card "{path}" cannot be read ({error}); copy {what} again.') from error
    try:
        content = json.loads(text)
        if isinstance(content, dict) and "format_version" not in content:
            raise CardError("format_version", "missing")
        return kind.read(content)
    except CardVersionError as error:
        raise error_class(
            f"The {word} card has format version {error.reason}, this program reads {kind.FORMAT}; install a"
            " matching version of ProGiDiffSlicer."
        ) from error
    except (ValueError, RecursionError) as error:
        raise error_class(f'The {word} card "{path}" is damaged ({error}); copy {what} again.') from error
