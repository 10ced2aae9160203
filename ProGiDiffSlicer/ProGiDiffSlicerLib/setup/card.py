"""What a model folder says about itself, read by hand: the engine's own reader needs packages that Slicer lacks.

The worker checks the folder in full, weights included, before it loads it; this tells a person what the folder is.
"""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from slicer.i18n import tr as _

from progidiff.errors import ModelError
from progidiff.locations import CARD_NAME, INDEX_NAME, default_model_folder

_FORMAT = "1"


@dataclass(frozen=True)
class Figure:
    """One measured figure of a model, e.g. Dice of the first proposal for a target on a data set."""

    data_set: str
    target: str
    metric: str
    value: float
    patients: int


@dataclass(frozen=True)
class Card:
    """What a model is, and how good."""

    folder: str
    name: str
    model_id: str
    licence: str
    modalities: tuple[str, ...]
    vocabulary: tuple[str, ...]
    accuracy: tuple[Figure, ...]
    notes: str


def bundled_folder() -> Path:
    """Folder of the model that the worker takes when none is named, by the worker's own rule.

    Raises:
        ModelError: this installation has none.
    """
    try:
        return default_model_folder()
    except ModelError as error:
        text = _("The bundled model is not installed; reinstall ProGiDiffSlicer or choose a model folder.")
        raise ModelError(text) from error


def read_card(folder: str | Path | None = None) -> Card:
    """Read the card of a model folder; ``None`` or "" is the bundled model.

    Raises:
        ModelError: there is no such folder, it holds no model, or its card cannot be used.
    """
    place = Path(folder) if folder else bundled_folder()
    if not place.is_dir():
        raise ModelError(_('There is no folder "{folder}"; choose an existing model folder.').format(folder=place))
    if not (place / INDEX_NAME).is_file() or not (place / CARD_NAME).is_file():
        text = _('The folder "{folder}" holds no ProGiDiff model; choose the folder with {card} and {index} in it.')
        raise ModelError(text.format(folder=place.name, card=CARD_NAME, index=INDEX_NAME))
    return card_of(_json(place / CARD_NAME), str(place), _missing_parts(place))


def card_of(content: dict[str, Any], folder: str = "", missing: tuple[str, ...] = ()) -> Card:
    """A card from its JSON content, as the worker sends it too.

    Raises:
        ModelError: a newer format, parts of the model are missing, or a field is not what it has to be.
    """
    if str(content.get("format_version", "")).split(".")[0] != _FORMAT:
        raise ModelError(_("This model is for another version of ProGiDiff; update the extension or choose another model."))
    if missing:
        text = _("The model folder lacks {parts}; copy the whole folder again.")
        raise ModelError(text.format(parts=", ".join(missing)))
    try:
        return Card(
            folder,
            _text(content["name"]),
            _text(content["model_id"]),
            _text(content["licence"]),
            _texts(content["modalities"]),
            _texts(content.get("vocabulary", [])),
            tuple(_figure(entry) for entry in content.get("accuracy", [])),
            _text(content.get("notes", "")),
        )
    except (KeyError, TypeError, ValueError) as error:
        text = _("The model card is damaged ({field}); copy the model folder again.")
        raise ModelError(text.format(field=str(error).strip("'"))) from error


def _json(path: Path) -> dict[str, Any]:
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        text = _('The file "{name}" of the model cannot be read; copy the model folder again.')
        raise ModelError(text.format(name=path.name)) from error
    if not isinstance(content, dict):
        raise ModelError(_('The file "{name}" of the model is damaged; copy the model folder again.').format(name=path.name))
    return content


def _missing_parts(folder: Path) -> tuple[str, ...]:
    """Components that the index names and that have no folder, or an empty one."""
    parts = [name for name in _json(folder / INDEX_NAME) if not name.startswith("_")]
    return tuple(name for name in parts if not (folder / name).is_dir() or not any((folder / name).iterdir()))


def _figure(entry: dict[str, Any]) -> Figure:
    value, patients = entry["value"], entry["n_patients"]
    if not isinstance(value, int | float) or not isinstance(patients, int):
        raise TypeError("accuracy")
    return Figure(_text(entry["set"]), _text(entry["target"]), _text(entry["metric"]), float(value), patients)


def _text(value: Any) -> str:
    if not isinstance(value, str):
        raise TypeError("a text was expected")
    return value


def _texts(value: Any) -> tuple[str, ...]:
    if not isinstance(value, list):
        raise TypeError("a list was expected")
    return tuple(_text(entry) for entry in value)
