"""Strict loading of one component of a model folder.

diffusers and transformers give absent weights random values and go on; here every weight must be there, have
its shape and have a place in the network, or loading ends in one sentence.
"""

from __future__ import annotations

import importlib
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any

from progidiff.errors import ModelError
from progidiff.model.checks import find_weights, read_json
from progidiff.places import INDEX_NAME

if TYPE_CHECKING:
    import torch

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
