"""Where model folders are, and which files they are known by. Standard library only; the module in Slicer asks here too."""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Mapping
from pathlib import Path

from progidiff.errors import ModelError

ENVIRONMENT_VARIABLE = "PROGIDIFF_MODEL"
INDEX_NAME = "model_index.json"
CARD_NAME = "model_card.json"
ADAPTER_CARD_NAME = "adapter_card.json"
ADAPTER_WEIGHTS_NAME = "adapter.safetensors"


def default_model_folder() -> Path:
    """Folder of the model to use when the user names none.

    ``$PROGIDIFF_MODEL`` where it is set (whether it exists or not, so that a mistake in it is noticed);
    otherwise the first
    of these that holds a model: the repository's ``Resources/Models/default``, an installed package's own
        copy, the module's
    folder and the share folder of a Slicer installation.

    Raises:
        ModelError: there is none.
    """
    if named := os.environ.get(ENVIRONMENT_VARIABLE):
        return Path(named).expanduser()
    for candidate in _default_candidates(Path(__file__).resolve().parent):
        if (candidate / INDEX_NAME).is_file():
            return candidate
    raise ModelError(
        "The bundled model is not installed; reinstall ProGiDiffSlicer, choose a model folder, or set "
        f"{ENVIRONMENT_VARIABLE} to one."
    )


def _default_candidates(package: Path) -> list[Path]:
    """Where the bundled model can be, best first, given the folder of the ``progidiff`` package."""
    # ProGiDiffSlicer/ of the repository, site-packages, or Slicer's qt-scripted-modules
    beside = package.parent
    tail = Path("Models", "default")
    folders = [beside.parent / "Resources" / tail, package / "_resources" / tail, beside / "Resources" / tail]
    # <Slicer>/lib/Slicer-X.Y/qt-scripted-modules/progidiff  ->  <Slicer>/share/Slicer-X.Y/...
    if beside.name == "qt-scripted-modules" and len(beside.parents) > 2:
        share = beside.parents[2] / "share" / beside.parent.name
        folders += [share / kind / "ProGiDiffSlicer" / tail for kind in ("qt-scripted-modules", "qt-loadable-modules", ".")]
    return folders


def model_size(folder: Path) -> int:
    """Bytes of all files in a model folder.

    Raises:
        ModelError: there is no such folder.
    """
    if not folder.is_dir():
        raise ModelError(f'There is no model folder "{folder}"; choose an existing one.')
    return sum(path.stat().st_size for path in folder.rglob("*") if path.is_file())


def weights_hash(sha256: Mapping[str, str]) -> str:
    """One SHA-256 over the checksums of a model's weight files, as its card lists them; adapters name their base by it."""
    return hashlib.sha256(json.dumps(sorted(sha256.items())).encode()).hexdigest()
