"""What lies in folders of this computer: the card of a model, the adapters made for it, and putting those away."""

from __future__ import annotations

import json
import os
import uuid
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path

from slicer.i18n import tr as _

from progidiff.cards import AdapterCard, CardError, CardVersionError, ModelCard, load_card
from progidiff.errors import AdapterError, ModelError
from progidiff.places import ADAPTER_CARD_NAME, ADAPTER_WEIGHTS_NAME, CARD_NAME, default_model_folder, weights_hash

_TRASH = ".deleted"


@dataclass(frozen=True)
class Adapter:
    """An adapter's folder and its card; the engine checks the weights when it loads it."""

    folder: str
    card: AdapterCard

    def misfit(self, base_sha256: str | None) -> str:
        """Why it cannot be used with a model, as a sentence; "" where it can, or where the model is not known here."""
        if base_sha256 is None or base_sha256 == self.card.base_sha256:
            return ""
        text = _('It was made for other weights ("{base}"); choose that model in Setup, or tune again.')
        return text.format(base=self.card.base_model_id)

    def summary(self) -> str:
        """A few lines on what it was made of and what it gives."""
        card = self.card
        lines = [card.reason]
        for target, count in card.targets.items():
            line = _("{target}: {cases} training cases").format(target=target, cases=count.training)
            if target in card.after and target in card.before:
                figures = _("Dice {before:.2f} before, {after:.2f} after")
                line += ", " + figures.format(before=card.before[target].dice, after=card.after[target].dice)
            lines.append(line)
        if (kept := card.retention) is not None:
            text = _("On {what}: {before:.2f} before, {after:.2f} after")
            lines.append(text.format(what=kept.set, before=kept.before, after=kept.after))
        return "\n".join(lines)


def list_adapters(folder: str) -> list[Adapter]:
    """The adapters in a folder, the newest first; what cannot be read is left out."""
    found: list[tuple[float, Adapter]] = []
    try:
        places = [Path(entry.path) for entry in os.scandir(folder) if entry.is_dir() and not entry.name.startswith(".")]
    except OSError:
        return []
    for place in places:
        try:
            found.append(((place / ADAPTER_CARD_NAME).stat().st_mtime, read_adapter(place)))
        except (AdapterError, OSError):
            continue
    return [adapter for _time, adapter in sorted(found, key=lambda pair: (-pair[0], pair[1].card.name))]


def read_adapter(folder: str | Path) -> Adapter:
    """An adapter by its card.

    Raises:
        AdapterError: the folder holds none, or its card is damaged or of another version.
    """
    place = Path(folder)
    try:
        content = json.loads((place / ADAPTER_CARD_NAME).read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        text = _('The folder "{folder}" holds no adapter that can be read; choose another one.')
        raise AdapterError(text.format(folder=place.name)) from error
    try:
        card = AdapterCard.read(content)
    except CardVersionError as error:
        text = _("This adapter is for another version of ProGiDiff; update the extension or tune again.")
        raise AdapterError(text) from error
    except CardError as error:
        raise AdapterError(_("The adapter's folder is not complete; copy it again.")) from error
    if not (place / ADAPTER_WEIGHTS_NAME).is_file():
        raise AdapterError(_("The adapter's folder is not complete; copy it again."))
    return Adapter(str(place), card)


def card_here(model_folder: str | None) -> ModelCard | None:
    """The card of the model in a folder of this computer (``None``: the one that the worker takes then).

    ``None`` where it cannot be read from here, as of a model on the machine of a remote worker; the worker then says what it
    knows, or why it cannot.
    """
    try:
        folder = Path(model_folder) if model_folder else default_model_folder()
        return _card_here(folder, (folder / CARD_NAME).stat().st_mtime_ns)
    except (OSError, ModelError):
        return None


@lru_cache(maxsize=8)
def _card_here(folder: Path, _changed: int) -> ModelCard:
    return load_card(folder)


def base_hash(model_folder: str | None) -> str | None:
    """The hash by which adapters know a model on this computer; ``None`` where its card cannot be read here."""
    card = card_here(model_folder)
    return None if card is None else weights_hash(card.sha256)


def delete_adapter(adapter: Adapter) -> str:
    """Move an adapter's folder into a hidden folder beside it; where it is now.

    Raises:
        AdapterError: it cannot be moved.
    """
    place = Path(adapter.folder)
    kept = place.parent / _TRASH / f"{place.name}-{uuid.uuid4().hex[:8]}"
    return _move(place, kept, _("The adapter cannot be deleted ({reason}); close what uses it and try again."))


def restore_adapter(kept: str, folder: str) -> None:
    """Bring a deleted adapter back to where it was.

    Raises:
        AdapterError: it cannot be moved, or there is another one by now.
    """
    if Path(folder).exists():
        raise AdapterError(_("There is another adapter of this name by now; rename its folder first."))
    _move(Path(kept), Path(folder), _("The adapter cannot be brought back ({reason}); it lies in the folder .deleted."))


def _move(source: Path, place: Path, sentence: str) -> str:
    try:
        place.parent.mkdir(parents=True, exist_ok=True)
        source.rename(place)
    except OSError as error:
        raise AdapterError(sentence.format(reason=error.strerror or error)) from error
    return str(place)
