"""Writing a model folder all at once."""

from __future__ import annotations

import json
from pathlib import Path
from typing import TYPE_CHECKING

from safetensors import SafetensorError

from progidiff.cards import ModelCard, save_card
from progidiff.errors import OutputError
from progidiff.model.bundle import ProGiDiffModel, check_fit
from progidiff.model.checks import read_json, sha256_of
from progidiff.model.components import ACCEPTED, index_entry, quiet_libraries
from progidiff.places import CARD_NAME, INDEX_NAME, replaced_folder

if TYPE_CHECKING:
    import torch

PIPELINE_NAME = "ProGiDiffModel"


def save_model(model: ProGiDiffModel, folder: Path, weights_dtype: torch.dtype | None = None) -> ModelCard:
    """Write a model folder all at once: whoever looks sees the old folder or the whole new one.

    Args:
        model: what to save; its ``card`` and ``folder`` are updated.
        folder: a new or empty folder, or an earlier model, which is replaced.
        weights_dtype: floating-point type on disk, e.g. ``torch.float16`` to halve the size; as in memory by
            default.

    Returns:
        the card as written, with checksums and the number of trainable parameters.

    Raises:
        ModelError: the components do not belong together.
        OutputError: the folder holds something else, or cannot be written.
    """
    check_fit(model)
    folder = Path(folder).absolute()
    if folder.exists() and not (folder / CARD_NAME).is_file() and (not folder.is_dir() or any(folder.iterdir())):
        raise OutputError(f'"{folder}" holds something that is not a model; choose a new or empty folder for the model.')
    with replaced_folder(folder, "model", (OSError, SafetensorError)) as fresh:
        index: dict[str, object] = {"_class_name": PIPELINE_NAME}
        with quiet_libraries():
            for name in ACCEPTED:
                part = getattr(model, name)
                if part is not None:
                    part.save_pretrained(str(fresh / name))
                    index[name] = index_entry(name, part)
        (fresh / INDEX_NAME).write_text(json.dumps(index, indent=2) + "\n", encoding="utf-8")
        for config in fresh.rglob("*config.json"):
            _forget_origin(config)
        weights = sorted(fresh.rglob("*.safetensors"))
        if weights_dtype is not None:
            for path in weights:
                _cast_file(path, weights_dtype)
        for path in weights:
            # safetensors writes for its own user alone; a model folder is often shared.
            path.chmod((fresh / INDEX_NAME).stat().st_mode)
        card = ModelCard.read(
            {
                **model.card.to_dict(),
                "sha256": {path.relative_to(fresh).as_posix(): sha256_of(path) for path in weights},
                "trainable_parameters": model.trainable_parameters(),
            }
        )
        save_card(card, fresh)
    model.card, model.folder = card, folder
    return card


def _forget_origin(path: Path) -> None:
    """Drop where a component was loaded from: a path of this machine has no place in a shared file."""
    config = read_json(path)
    kept = {key: value for key, value in config.items() if key not in ("_name_or_path", "name_or_path")}
    if kept != config:
        path.write_text(json.dumps(kept, indent=2) + "\n", encoding="utf-8")


def _cast_file(path: Path, dtype: torch.dtype) -> None:
    from safetensors.torch import load, save_file

    tensors = load(path.read_bytes())  # not memory-mapped: the file is overwritten below
    cast = {key: t.to(dtype) if t.is_floating_point() else t for key, t in tensors.items()}
    save_file(cast, path, metadata={"format": "pt"})
