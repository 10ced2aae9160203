"""The card of the model that the settings name, and in words why there is none that can be used.

The worker checks the folder in full, weights included, before it loads it; this tells a person what the folder is.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from slicer.i18n import tr as _

from progidiff.cards import CardError, CardVersionError, ModelCard
from progidiff.errors import ModelError
from progidiff.places import CARD_NAME, INDEX_NAME, default_model_folder


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


def read_card(folder: str | Path | None = None) -> ModelCard:
    """Read the card of a model folder; ``None`` or "" is the bundled model.

    Raises:
        ModelError: there is no such folder, it holds no model or not all of it, or its card cannot be used.
    """
    place = Path(folder) if folder else bundled_folder()
    if not place.is_dir():
        raise ModelError(_('There is no folder "{folder}"; choose an existing model folder.').format(folder=place))
    if not (place / INDEX_NAME).is_file() or not (place / CARD_NAME).is_file():
        text = _('The folder "{folder}" holds no ProGiDiff model; choose the folder with {card} and {index} in it.')
        raise ModelError(text.format(folder=place.name, card=CARD_NAME, index=INDEX_NAME))
    card = card_of(_json(place / CARD_NAME))
    # components that the index names and that have no folder, or an empty one
    parts = [name for name in _json(place / INDEX_NAME) if not name.startswith("_")]
    missing = [name for name in parts if not (place / name).is_dir() or not any((place / name).iterdir())]
    if missing:
        text = _("The model folder lacks {parts}; copy the whole folder again.")
        raise ModelError(text.format(parts=", ".join(missing)))
    return card


def card_of(content: dict[str, Any]) -> ModelCard:
    """A card from its JSON content, as the worker sends it too.

    Raises:
        ModelError: another version of the format, or a field is not what it has to be.
    """
    try:
        return ModelCard.read(content)
    except CardVersionError as error:
        text = _("This model is for another version of ProGiDiff; update the extension or choose another model.")
        raise ModelError(text) from error
    except CardError as error:
        text = _("The model card is damaged ({field}); copy the model folder again.")
        raise ModelError(text.format(field=error.field or error.reason)) from error


def _json(path: Path) -> dict[str, Any]:
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        text = _('The file "{name}" of the model cannot be read; copy the model folder again.')
        raise ModelError(text.format(name=path.name)) from error
    if not isinstance(content, dict):
        raise ModelError(_('The file "{name}" of the model is damaged; copy the model folder again.').format(name=path.name))
    return content
