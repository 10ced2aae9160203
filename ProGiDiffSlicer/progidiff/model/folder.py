"""Loading a model folder: a diffusers folder with ProGiDiff's own networks and a model card."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Any

from progidiff.cards import ModelCard, load_card
from progidiff.errors import ModelError
from progidiff.model.bundle import ProGiDiffModel, check_fit
from progidiff.model.checks import find_weights, read_json, sha256_of
from progidiff.model.components import (
    ACCEPTED,
    NETWORKS,
    OPTIONAL,
    load_network,
    load_scheduler,
    load_tokenizer,
    require_folder,
    resolve_class,
    weight_stem,
)
from progidiff.model.saving import save_model
from progidiff.places import INDEX_NAME, default_model_folder, model_size

if TYPE_CHECKING:
    import torch

__all__ = [
    "ProGiDiffModel",
    "check_fit",
    "default_model_folder",
    "load_model",
    "model_size",
    "save_model",
]

Progress = Callable[[str, float], None]
# Share of loading time that goes into checksums, for the progress bar only.
_CHECKSUM_SHARE = 0.4


def load_model(
    folder: Path | None = None,
    device: str | torch.device = "cpu",
    dtype: torch.dtype | None = None,
    progress: Progress | None = None,
) -> ProGiDiffModel:
    """Load a model folder, strictly, locally and without opening any pickle.

    Args:
        folder: the model folder; :func:`default_model_folder` by default.
        device: where the networks go.
        dtype: their floating-point type; float32 by default.
        progress: told a phase and a fraction in [0, 1].

    Raises:
        ModelError: anything missing, damaged, foreign, unsafe or not matching the card.
    """
    report = progress or _silent
    folder = default_model_folder() if folder is None else Path(folder)
    report("checking the model folder", 0.0)
    card = load_card(folder)
    index = read_json(folder / INDEX_NAME)
    components = [name for name in ACCEPTED if name not in OPTIONAL or name in index]
    for name in components:
        if name not in index:
            raise ModelError(f'The model\'s {INDEX_NAME} does not name "{name}"; copy the whole model folder again.')
    weights = {
        name: find_weights(require_folder(folder, name), weight_stem(name)) for name in components if name in NETWORKS
    }
    _check_sums(folder, card, [path for files in weights.values() for path in files], report)

    report("loading the libraries", _CHECKSUM_SHARE)
    classes = {name: resolve_class(name, index[name]) for name in components}
    sizes = {name: sum(path.stat().st_size for path in files) for name, files in weights.items()}
    parts: dict[str, Any] = {}
    done = 0
    for name in weights:
        report(f"loading {name}", _CHECKSUM_SHARE + (1 - _CHECKSUM_SHARE) * done / max(sum(sizes.values()), 1))
        try:
            parts[name] = load_network(folder, name, classes[name], dtype).to(device)
        except (RuntimeError, AssertionError) as error:  # no such device, or too little memory on it
            reason = str(error).strip().splitlines()[0]
            raise ModelError(f'The model cannot be put on "{device}" ({reason}); choose another device.') from error
        done += sizes[name]
    model = ProGiDiffModel(
        **{"mask_decoder": None, **parts},
        tokenizer=load_tokenizer(folder),
        scheduler=load_scheduler(folder),
        card=card,
        folder=folder,
    )
    check_fit(model)
    report("the model is loaded", 1.0)
    return model


def _silent(phase: str, fraction: float) -> None:
    """Progress for nobody."""


def _check_sums(folder: Path, card: ModelCard, files: list[Path], report: Progress) -> None:
    total = max(sum(path.stat().st_size for path in files), 1)
    before = 0

    def tell(done: int) -> None:
        report("checking the weights", _CHECKSUM_SHARE * ((before + done) / total))

    for path in files:
        key = path.relative_to(folder).as_posix()
        digest = sha256_of(path, tell)
        if card.sha256.get(key) != digest:
            raise ModelError(
                f'The weight file "{key}" is not the one that the model card describes (its checksum'
                " differs); copy the whole model folder again."
            )
        before += path.stat().st_size
