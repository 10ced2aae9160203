"""One component of a model folder: its weight files, looked at before any library opens them, and strict loading.

safetensors is the one accepted format: it holds numbers and nothing that runs.
"""

from __future__ import annotations

import hashlib
import importlib
import json
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any

from safetensors import SafetensorError, safe_open

from progidiff.errors import ModelError
from progidiff.places import INDEX_NAME

if TYPE_CHECKING:
    import torch

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


OWN_LIBRARY = "progidiff.model.networks"

# Component -> classes that may stand in its place, as model_index.json writes them. A closed list: a model
# folder cannot name any other code.
ACCEPTED: dict[str, tuple[tuple[str, str], ...]] = {
    "vae": (("diffusers", "AutoencoderKL"), ("diffusers", "AutoencoderTiny")),
    "unet": (("diffusers", "UNet2DConditionModel"),),
    "controlnet": ((OWN_LIBRARY, "ControlBranch"),),
    "image_encoder": ((OWN_LIBRARY, "ImageEncoder"),),
    "mask_decoder": ((OWN_LIBRARY, "MaskDecoder"),),
    "text_encoder": (("transformers", "CLIPTextModel"),),
    "tokenizer": (("transformers", "AutoTokenizer"),),
    "scheduler": (("diffusers", "DDIMScheduler"),),
}
OPTIONAL = ("mask_decoder",)
NETWORKS = ("vae", "unet", "controlnet", "image_encoder", "mask_decoder", "text_encoder")


def weight_stem(component: str) -> str:
    """File name of a component's weights without suffix, as its library chooses it."""
    return "model" if component == "text_encoder" else "diffusion_pytorch_model"


def resolve_class(component: str, entry: object) -> type[Any]:
    """Class of a component from its ``[library, class]`` entry of ``model_index.json``.

    Raises:
        ModelError: a class outside :data:`ACCEPTED`.
    """
    for library, name in ACCEPTED[component]:
        if entry == [library, name]:
            resolved: type[Any] = getattr(importlib.import_module(library), name)
            return resolved
    accepted = " or ".join(name for _, name in ACCEPTED[component])
    raise ModelError(
        f'The model\'s {INDEX_NAME} gives "{component}" as {entry!r}, but only {accepted} is supported;'
        " choose a model folder made by ProGiDiffSlicer."
    )


def index_entry(component: str, part: object) -> list[str]:
    """``[library, class]`` of a component for ``model_index.json``.

    Raises:
        ModelError: a class that could not be loaded again.
    """
    accepted = ACCEPTED[component]
    for library, name in accepted:
        # Every tokenizer is read back by AutoTokenizer, whichever class it is.
        if component == "tokenizer" or type(part).__name__ == name:
            return [library, name]
    raise ModelError(
        f'A {type(part).__name__} cannot be saved as "{component}"; use a {" or ".join(name for _, name in accepted)}.'
    )


def require_folder(folder: Path, component: str, config_name: str = "config.json") -> Path:
    """Subfolder of a component, with its config file present.

    Raises:
        ModelError: the subfolder or its config is missing.
    """
    sub = folder / component
    if not sub.is_dir():
        raise ModelError(
            f'The model folder "{folder}" lacks its subfolder "{component}"; copy the whole model folder again.'
        )
    read_json(sub / config_name)
    return sub


def load_network(
    folder: Path, component: str, cls: type[Any], dtype: torch.dtype | None = None, variant: str | None = None
) -> Any:
    """Load one network on the CPU, in evaluation mode, without gradients.

    Args:
        folder: the model folder.
        component: the subfolder in it.
        cls: a diffusers ``ModelMixin`` or transformers ``PreTrainedModel`` class.
        dtype: floating-point type of the loaded weights (float32 by default).
        variant: ``"fp16"`` where the files are named so.

    Raises:
        ModelError: missing, pickled, damaged or foreign files (missing or unexpected weights, other shapes).
    """
    import torch

    sub = require_folder(folder, component)
    find_weights(sub, weight_stem(component), variant)
    config = read_json(sub / "config.json")
    # Quantised weights would pull in further libraries, and would not match the shapes checked below.
    if config.get("quantization_config") is not None:
        raise ModelError(
            f'The model\'s "{component}" is quantised, which is not supported; get its plain safetensors files.'
        )
    written = config.get("_class_name")
    if written is not None and written != cls.__name__ and not issubclass(cls, _class_named(str(written))):
        raise ModelError(
            f'The model\'s "{component}" is a {written}, but a {cls.__name__} is needed; this folder belongs'
            " to another kind of model."
        )
    try:
        with quiet_libraries():
            network, info = cls.from_pretrained(
                str(sub),
                dtype=dtype or torch.float32,
                variant=variant,
                use_safetensors=True,
                local_files_only=True,
                ignore_mismatched_sizes=True,  # collected in info, and refused below
                output_loading_info=True,
            )
    except (ValueError, RuntimeError, TypeError, KeyError, OSError, AttributeError) as error:
        raise _foreign(component, cls, _first_line(error)) from error
    for what in ("missing_keys", "unexpected_keys", "mismatched_keys"):
        if keys := sorted(str(key[0] if isinstance(key, tuple) else key) for key in info[what]):
            raise _foreign(component, cls, f"{what.replace('_keys', '')}: {keys[0]} ({len(keys)} in all)")
    network.eval()
    network.requires_grad_(False)
    return network


def _class_named(name: str) -> type[Any]:
    """A diffusers class by name; ``type(None)``, of which nothing is a subclass, where there is none."""
    import diffusers

    found = getattr(diffusers, name, None)
    return found if isinstance(found, type) else type(None)


def _foreign(component: str, cls: type[Any], detail: str) -> ModelError:
    return ModelError(
        f'The weights of the model\'s "{component}" do not fit a {cls.__name__} with its config ({detail});'
        " the files come from different models, so copy the whole model folder again."
    )


def _first_line(error: Exception) -> str:
    line = (str(error).strip().splitlines() or [type(error).__name__])[0]
    return line if len(line) <= 200 else line[:197] + "..."


def load_tokenizer(folder: Path) -> Any:
    """Tokenizer of a model folder (``tokenizer/``): CLIP's, or any that is held in one ``tokenizer.json``.

    Raises:
        ModelError: missing or unreadable files.
    """
    from transformers import AutoTokenizer

    sub = require_folder(folder, "tokenizer", "tokenizer_config.json")
    if not (sub / "tokenizer.json").is_file() and not (sub / "vocab.json").is_file():
        raise ModelError('The model folder lacks "tokenizer/tokenizer.json"; copy the whole model folder again.')
    try:
        with quiet_libraries():
            return AutoTokenizer.from_pretrained(str(sub), local_files_only=True, trust_remote_code=False)
    except Exception as error:  # the tokenizers library raises bare Exception on damaged files
        raise ModelError(
            f"The model's tokenizer cannot be read ({_first_line(error)}); copy the whole model folder again."
        ) from error


def load_scheduler(folder: Path) -> Any:
    """DDIM noise schedule of a model folder (``scheduler/``).

    Raises:
        ModelError: missing or unreadable files.
    """
    from diffusers import DDIMScheduler

    sub = require_folder(folder, "scheduler", "scheduler_config.json")
    try:
        return DDIMScheduler.from_pretrained(str(sub), local_files_only=True)
    except (ValueError, TypeError, KeyError, OSError, NotImplementedError) as error:
        raise ModelError(
            f"The model's noise schedule cannot be read ({_first_line(error)}); copy the whole model folder again."
        ) from error


@contextmanager
def quiet_libraries() -> Iterator[None]:
    """Silence the libraries' own load reports and bars: what matters in them is raised as an error here."""
    from diffusers.utils import logging as diffusers_logging
    from transformers.utils import logging as transformers_logging

    levels = diffusers_logging.get_verbosity(), transformers_logging.get_verbosity()
    bars = transformers_logging.is_progress_bar_enabled()
    diffusers_logging.set_verbosity(diffusers_logging.CRITICAL)
    transformers_logging.set_verbosity(transformers_logging.CRITICAL)
    transformers_logging.disable_progress_bar()
    try:
        yield
    finally:
        diffusers_logging.set_verbosity(levels[0])
        transformers_logging.set_verbosity(levels[1])
        if bars:
            transformers_logging.enable_progress_bar()
