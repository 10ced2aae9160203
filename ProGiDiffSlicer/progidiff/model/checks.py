"""Looking at weight files before any library opens them: where they are, and whether they are what they claim
to be.

Standard library and safetensors only. safetensors is the one accepted format: it holds numbers and nothing
that runs.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable
from pathlib import Path

from safetensors import SafetensorError, safe_open

from progidiff.errors import ModelError

PICKLE_SUFFIXES = (".bin", ".ckpt", ".pt", ".pth", ".pkl")
_INDEX_SUFFIX = ".safetensors.index.json"


def read_json(path: Path) -> dict[str, object]:
    """Read a JSON object.

    Raises:
        ModelError: missing, unreadable or not a JSON object.
    """
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise ModelError(f'The model folder lacks "{_short(path)}"; copy the whole model folder again.') from None
    except (OSError, ValueError) as error:
        raise ModelError(
            f'The file "{_short(path)}" of the model is not readable JSON; copy the model folder again.'
        ) from error
    if not isinstance(content, dict):
        raise ModelError(f'The file "{_short(path)}" of the model is not a JSON object; copy the model folder again.')
    return content


def find_weights(folder: Path, stem: str, variant: str | None = None) -> list[Path]:
    """Weight files of one component, all of them checked by :func:`check_weight_file`.

    Args:
        folder: the component's subfolder.
        stem: ``"diffusion_pytorch_model"`` (diffusers) or ``"model"`` (transformers).
        variant: ``"fp16"`` for ``<stem>.fp16.safetensors``.

    Raises:
        ModelError: no safetensors (only pickled weights, or none), a shard is missing, or a file is damaged.
    """
    name = stem if variant is None else f"{stem}.{variant}"
    single = folder / f"{name}.safetensors"
    index = folder / (f"{stem}{_INDEX_SUFFIX}" if variant is None else f"{stem}.safetensors.index.{variant}.json")
    # Where both are there, the libraries differ in which one they take, so both have to be sound.
    files = [single] if single.is_file() else []
    if index.is_file():
        files += _shards(index)
    if not files:
        raise _no_weights(folder, single)
    for path in files:
        check_weight_file(path)
    return files


def _shards(index: Path) -> list[Path]:
    weight_map = read_json(index).get("weight_map")
    names = sorted({str(name) for name in weight_map.values()}) if isinstance(weight_map, dict) else []
    # A shard's name is a plain file name: an index must not lead out of its folder.
    if not names or any(Path(name).name != name or not name.endswith(".safetensors") for name in names):
        raise ModelError(f'The weight index "{_short(index)}" is damaged; copy the model folder again.')
    files = [index.parent / name for name in names]
    for path in files:
        if not path.is_file():
            raise ModelError(f'The model lacks the weight file "{_short(path)}"; copy the whole model folder again.')
    return files


def _no_weights(folder: Path, wanted: Path) -> ModelError:
    pickled = sorted(path.name for path in folder.glob("*") if path.suffix in PICKLE_SUFFIXES)
    if pickled:
        return ModelError(
            f'The model\'s folder "{_short(folder)}" holds only pickled weights ({pickled[0]}), which can run'
            " code when "
            f"opened and are refused; get the model's safetensors files, or convert these on a machine you"
            f" can spare."
        )
    return ModelError(f'The model lacks the weight file "{_short(wanted)}"; copy the whole model folder again.')


def check_weight_file(path: Path) -> None:
    """Make sure that ``path`` is a whole safetensors file.

    Raises:
        ModelError: unreadable, empty, a git-LFS pointer, a web page, a pickle, truncated or damaged.
    """
    name = _short(path)
    try:
        with path.open("rb") as file:
            head = file.read(512)
    except OSError as error:
        raise ModelError(f'The weight file "{name}" cannot be read ({error.strerror}); check its permissions.') from error
    if not head:
        raise ModelError(f'The weight file "{name}" is empty; copy it again.')
    if head.startswith(b"version https://git-lfs"):
        raise ModelError(
            f'The weight file "{name}" is a git-LFS pointer, not the weights; run "git lfs pull" in the'
            " model's repository and copy it again."
        )
    if head.lstrip(b"\xef\xbb\xbf \t\r\n")[:1] == b"<":
        raise ModelError(
            f'The weight file "{name}" is a web page saved under that name (a log-in or error page); download it again.'
        )
    if head[:2] == b"PK" or (head[0] == 0x80 and head[1:2] in (b"\x02", b"\x03", b"\x04", b"\x05")):
        # A safetensors header is never this long: its eighth byte is zero, which these two prefixes' is not
        # always, so the library is asked first whether the file is sound after all.
        if not _opens(path):
            raise ModelError(
                f'The weight file "{name}" is a renamed pickle, which can run code when opened and is'
                " refused; get the model's safetensors file."
            )
        return
    if not _opens(path):
        raise ModelError(f'The weight file "{name}" is truncated or damaged; copy it again.')


def _opens(path: Path) -> bool:
    """Whether safetensors accepts the header and finds exactly the bytes that it announces."""
    try:
        with safe_open(path, framework="numpy"):
            return True
    except (SafetensorError, OSError):
        return False


def sha256_of(path: Path, report: Callable[[int], None] | None = None) -> str:
    """SHA-256 of a file as hex; ``report`` is told the bytes read so far after each block of 8 MiB.

    Raises:
        ModelError: the file cannot be read.
    """
    digest = hashlib.sha256()
    done = 0
    try:
        with path.open("rb") as file:
            while block := file.read(8 << 20):
                digest.update(block)
                done += len(block)
                if report is not None:
                    report(done)
    except OSError as error:
        raise ModelError(f'The weight file "{_short(path)}" cannot be read ({error.strerror}).') from error
    return digest.hexdigest()


def _short(path: Path) -> str:
    """The last two parts of a path: enough to find the file in the model folder."""
    return "/".join(path.parts[-2:])
