"""The adapters in a folder: what they say of themselves, which fit the loaded model, and putting them away."""

from __future__ import annotations

import json
import os
import uuid
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from slicer.i18n import tr as _

from progidiff.errors import AdapterError, ModelError
from progidiff.locations import ADAPTER_CARD_NAME, ADAPTER_WEIGHTS_NAME, CARD_NAME, default_model_folder, weights_hash

_TRASH = ".deleted"
_FORMAT = "1"


@dataclass(frozen=True)
class Adapter:
    """An adapter as its card describes it; the engine checks the rest when it loads it.

    Attributes:
        folder: its folder.
        name: shown to users.
        adapter_id: unique name.
        base: id of the model that it belongs to.
        base_sha256: hash of that model's weights.
        better: whether it was better than its base on held-out cases.
        reason: one sentence on that.
        summary: a few lines on what it was made of and what it gives.
    """

    folder: str
    name: str
    adapter_id: str
    base: str
    base_sha256: str
    better: bool
    reason: str
    summary: str

    def misfit(self, base_sha256: str | None) -> str:
        """Why it cannot be used with a model, as a sentence; "" where it can, or where the model is not known here."""
        if base_sha256 is None or base_sha256 == self.base_sha256:
            return ""
        return _('It was made for other weights ("{base}"); choose that model in Setup, or tune again.').format(
            base=self.base
        )


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
    return [adapter for _time, adapter in sorted(found, key=lambda pair: (-pair[0], pair[1].name))]


def read_adapter(folder: str | Path) -> Adapter:
    """An adapter by its card.

    Raises:
        AdapterError: the folder holds none, or its card is damaged or of another version.
    """
    place = Path(folder)
    try:
        card = json.loads((place / ADAPTER_CARD_NAME).read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        text = _('The folder "{folder}" holds no adapter that can be read; choose another one.')
        raise AdapterError(text.format(folder=place.name)) from error
    if not isinstance(card, dict) or str(card.get("format_version", "")).split(".")[0] != _FORMAT:
        raise AdapterError(_("This adapter is for another version of ProGiDiff; update the extension or tune again."))
    fields = ("name", "adapter_id", "base_model_id", "base_sha256", "reason")
    if any(not isinstance(card.get(field), str) for field in fields) or not (place / ADAPTER_WEIGHTS_NAME).is_file():
        raise AdapterError(_("The adapter's folder is not complete; copy it again."))
    return Adapter(
        str(place),
        card["name"],
        card["adapter_id"],
        card["base_model_id"],
        card["base_sha256"],
        card.get("better") is True,
        card["reason"],
        _summary(card),
    )


def base_hash(model_folder: str | None) -> str | None:
    """The hash by which adapters know a model on this computer; ``None`` where its card cannot be read here."""
    try:
        folder = Path(model_folder) if model_folder else default_model_folder()
        sums = json.loads((folder / CARD_NAME).read_text(encoding="utf-8"))["sha256"]
        return weights_hash({str(name): str(value) for name, value in sums.items()})
    except (ModelError, OSError, ValueError, KeyError, TypeError, AttributeError):
        return None


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


def _summary(card: dict[str, Any]) -> str:
    """What the card says, for a tool tip."""
    lines = [str(card["reason"])]
    after, before = card.get("after") or {}, card.get("before") or {}
    counts = card.get("targets") or {}
    for target, count in counts.items():
        line = _("{target}: {cases} training cases").format(target=target, cases=count.get("training", "?"))
        if target in after and target in before:
            figures = _("Dice {before:.2f} before, {after:.2f} after")
            line += ", " + figures.format(before=float(before[target]["dice"]), after=float(after[target]["dice"]))
        lines.append(line)
    kept = card.get("retention")
    if isinstance(kept, dict):
        text = _("On {what}: {before:.2f} before, {after:.2f} after")
        lines.append(text.format(what=kept.get("set", "?"), before=float(kept["before"]), after=float(kept["after"])))
    return "\n".join(lines)
