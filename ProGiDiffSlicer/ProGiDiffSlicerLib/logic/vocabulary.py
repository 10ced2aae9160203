"""What a model can be asked for, known before any worker runs: read from its card, a JSON file, without torch."""

from __future__ import annotations

import json
from functools import lru_cache
from pathlib import Path
from typing import Any, NamedTuple

from progidiff.errors import ModelError
from progidiff.locations import CARD_NAME, default_model_folder
from progidiff.volumes.slicing import USUAL_PLANES


class Card(NamedTuple):
    """The part of a model's card that the module speaks of: targets, and planes of the slices, both in its order."""

    vocabulary: tuple[str, ...]
    planes: tuple[str, ...]


def read_card(folder: str | None) -> Card | None:
    """The card of the model in a folder (``None``: the one that the worker takes then).

    ``None`` where it cannot be read from here, as of a model on the machine of a remote worker; the worker then says what it
    knows, or why it cannot.
    """
    try:
        card = (Path(folder) if folder else default_model_folder()) / CARD_NAME
        return _read(str(card), card.stat().st_mtime_ns)
    except (OSError, ModelError):
        return None


def planes_of(card: dict[str, Any]) -> tuple[str, ...]:
    """The planes that a card names; those of most models where it names none."""
    planes = card.get("planes")
    return tuple(str(plane) for plane in planes) if isinstance(planes, list) and planes else USUAL_PLANES


@lru_cache(maxsize=8)
def _read(card: str, _changed: int) -> Card:
    try:
        facts = json.loads(Path(card).read_text(encoding="utf-8"))
        words, planes = facts["vocabulary"], planes_of(facts)
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        raise ModelError("The model card cannot be read.") from error
    if not isinstance(words, list) or not all(isinstance(word, str) for word in words):
        raise ModelError("The model card lists no targets.")
    return Card(tuple(words), planes)
