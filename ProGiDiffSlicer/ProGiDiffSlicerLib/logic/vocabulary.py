"""What a model can be asked for, known before any worker runs: read from its card, a JSON file, without torch."""

from __future__ import annotations

import json
from functools import lru_cache
from pathlib import Path

from progidiff.errors import ModelError
from progidiff.locations import CARD_NAME, default_model_folder


def card_vocabulary(folder: str | None) -> tuple[str, ...] | None:
    """Targets of the model in a folder (``None``: the one that the worker takes then), in the order of its card.

    ``None`` where the card cannot be read from here, as of a model on the machine of a remote worker; the worker then says
    what it knows, or why it cannot.
    """
    try:
        card = (Path(folder) if folder else default_model_folder()) / CARD_NAME
        return _read(str(card), card.stat().st_mtime_ns)
    except (OSError, ModelError):
        return None


@lru_cache(maxsize=8)
def _read(card: str, _changed: int) -> tuple[str, ...]:
    try:
        words = json.loads(Path(card).read_text(encoding="utf-8"))["vocabulary"]
    except (ValueError, KeyError, TypeError) as error:
        raise ModelError("The model card cannot be read.") from error
    if not isinstance(words, list) or not all(isinstance(word, str) for word in words):
        raise ModelError("The model card lists no targets.")
    return tuple(words)
