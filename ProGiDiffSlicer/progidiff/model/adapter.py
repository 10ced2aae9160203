"""LoRA adapters (arXiv 2106.09685, peft) of the control branch and the image encoder: adding, saving, using, removing.

In training the low-rank layers stand beside the frozen ones. In use they are added into the weights, so that an adapter
costs no time per step; the touched weights are kept aside, and removing the adapter puts those very tensors back.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import cast

import torch
from peft import LoraConfig, inject_adapter_in_model
from peft.tuners.tuners_utils import BaseTunerLayer
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor, nn

from progidiff.cards import AdapterCard, Layers, load_adapter_card, save_card
from progidiff.errors import AdapterError, OutputError
from progidiff.model.components import sha256_of
from progidiff.model.folder import ProGiDiffModel
from progidiff.places import ADAPTER_CARD_NAME, ADAPTER_WEIGHTS_NAME, holds_files, replaced_folder, weights_hash

_PEFT_NAME = "default"
#: Networks that an adapter reaches: what the paper trains, and nothing of the frozen backbone.
ADAPTED = ("controlnet", "image_encoder")
_ATTENTION = ("to_q", "to_k", "to_v", "to_out.0")


def adapted_layers(network: nn.Module, layers: Layers) -> list[str]:
    """Names of the layers of a network that get low-rank partners.

    With ``"attention"`` a network without attention, such as the image encoder, gets them at its convolutions: a change of
    scanner or modality is a change of the input's statistics, and that is where the input is read.
    """
    names = [name for name, module in network.named_modules() if isinstance(module, nn.Linear | nn.Conv2d)]
    attention = [name for name in names if name.endswith(_ATTENTION)]
    return attention if layers == "attention" and attention else names


def add_lora(model: ProGiDiffModel, rank: int, alpha: float, layers: Layers = "all") -> list[nn.Parameter]:
    """Put trainable low-rank layers beside the frozen ones of control branch and image encoder.

    The new layers change nothing at first (B is zero).

    Returns:
        the trainable parameters.
    """
    trainable: list[nn.Parameter] = []
    for name in ADAPTED:
        network = getattr(model, name)
        network.requires_grad_(False)
        config = LoraConfig(r=rank, lora_alpha=alpha, target_modules=adapted_layers(network, layers))  # type: ignore[arg-type]
        inject_adapter_in_model(config, network, _PEFT_NAME)
        trainable += [p for p in network.parameters() if p.requires_grad]
    return trainable


def lora_state(model: ProGiDiffModel) -> dict[str, Tensor]:
    """The low-rank matrices, float32 on the CPU, as ``<network>.<layer>.lora_A`` and ``.lora_B``."""
    state: dict[str, Tensor] = {}
    for name in ADAPTED:
        for layer, module in _lora_layers(getattr(model, name)):
            for part in ("lora_A", "lora_B"):
                weight = getattr(module, part)[_PEFT_NAME].weight
                state[f"{name}.{layer}.{part}"] = weight.detach().float().cpu().contiguous().clone()
    return state


def take_lora_off(model: ProGiDiffModel) -> None:
    """Take the low-rank layers off; the frozen ones stand where they stood, untouched."""
    for name in ADAPTED:
        network = getattr(model, name)
        for layer, module in _lora_layers(network):
            network.set_submodule(layer, module.get_base_layer())
        for leftover in ("peft_config", "active_adapter"):
            network.__dict__.pop(leftover, None)
        network.requires_grad_(False)


def _lora_layers(network: nn.Module) -> list[tuple[str, BaseTunerLayer]]:
    return [(name, m) for name, m in network.named_modules() if isinstance(m, BaseTunerLayer)]


def save_adapter(state: dict[str, Tensor], fields: dict[str, object], folder: Path) -> AdapterCard:
    """Write an adapter's folder all at once, replacing an earlier adapter there.

    Args:
        state: as of :func:`lora_state`.
        fields: the card's fields without ``sha256``.
        folder: a new or empty folder, or an earlier adapter.

    Raises:
        OutputError: the folder holds something else, or cannot be written.
    """
    folder = Path(folder).absolute()
    check_adapter_folder(folder)
    with replaced_folder(folder, "adapter", (OSError, SafetensorError)) as fresh:
        weights = fresh / ADAPTER_WEIGHTS_NAME
        save_file(state, weights, metadata={"format": "pt"})
        card = AdapterCard.read({**fields, "sha256": sha256_of(weights)})
        save_card(card, fresh)
        weights.chmod((fresh / ADAPTER_CARD_NAME).stat().st_mode)  # safetensors writes for its own user alone
    return card


def check_adapter_folder(folder: Path) -> None:
    """Refuse a place for an adapter before training, not after.

    Raises:
        OutputError: the folder holds something that is no adapter.
    """
    if folder.exists() and not (folder / ADAPTER_CARD_NAME).is_file() and (not folder.is_dir() or holds_files(folder)):
        raise OutputError(f'"{folder}" holds something that is no adapter; choose a new or empty folder for the adapter.')


@dataclass(frozen=True)
class AppliedAdapter:
    """An adapter in use.

    Attributes:
        card: its card.
    """

    card: AdapterCard
    _weights: tuple[tuple[nn.Parameter, Tensor, Tensor], ...]
    """Parameter, the base's tensor, the tensor with the adapter."""

    def remove(self) -> None:
        """Put the base's own tensors back, bit for bit."""
        for parameter, original, _ in self._weights:
            parameter.data = original

    def again(self) -> AppliedAdapter:
        """Put the tensors with the adapter in again, after :meth:`remove`."""
        for parameter, _, adapted in self._weights:
            parameter.data = adapted
        return self


def apply_adapter(model: ProGiDiffModel, folder: Path) -> AppliedAdapter:
    """Add an adapter into the weights of a loaded model that has none in use.

    Everything is checked before anything is changed.

    Args:
        model: the base model.
        folder: the adapter's folder.

    Raises:
        AdapterError: made for another base, another rank than its card says, damaged, or with layers that the base lacks.
    """
    card = load_adapter_card(folder)
    check_base(card, model)
    state = _read_weights(folder, card)
    deltas = [(parameter, _checked(name, parameter, a, b, card)) for name, parameter, a, b in _pairs(model, state)]
    weights = []
    for parameter, (a, b) in deltas:
        original = parameter.data
        delta = _delta(a, b, original.shape) * (card.alpha / card.rank)
        adapted = torch.empty_like(original)  # in the original's memory format; the original itself stays as it is
        adapted.copy_(original.float() + delta.to(original.device))
        weights.append((parameter, original, adapted))
    return AppliedAdapter(card, tuple(weights)).again()


def check_base(card: AdapterCard, model: ProGiDiffModel) -> None:
    """Refuse an adapter of another base model.

    Raises:
        AdapterError: it was made for another model, or for other weights of the same name.
    """
    if card.base_sha256 == weights_hash(model.card.sha256):
        return
    if card.base_model_id == model.card.model_id:
        raise AdapterError(
            f'The adapter "{card.name}" was made for other weights of the model "{card.base_model_id}" than those that are'
            " loaded; tune again on the loaded model, or load the one it was made for."
        )
    raise AdapterError(
        f'The adapter "{card.name}" was made for the model "{card.base_model_id}", but "{model.card.model_id}" is loaded;'
        " load that model, or choose another adapter."
    )


def _read_weights(folder: Path, card: AdapterCard) -> dict[str, Tensor]:
    path = folder / ADAPTER_WEIGHTS_NAME
    if not path.is_file():
        raise AdapterError(f'The adapter "{card.name}" lacks its file {ADAPTER_WEIGHTS_NAME}; copy the whole folder again.')
    try:
        if sha256_of(path) != card.sha256:
            raise AdapterError(
                f'The weights of the adapter "{card.name}" are not those that its card describes (the checksum differs);'
                " copy the whole folder again."
            )
        with safe_open(path, framework="pt") as file:
            return {key: file.get_tensor(key) for key in file.keys()}  # noqa: SIM118 - not a dictionary
    except (OSError, SafetensorError) as error:
        raise AdapterError(
            f'The weights of the adapter "{card.name}" cannot be read ({error}); copy the whole folder again.'
        ) from error


def _pairs(model: ProGiDiffModel, state: dict[str, Tensor]) -> Iterator[tuple[str, nn.Parameter, Tensor, Tensor]]:
    """Layer name, weight, A and B; every tensor of the file has to find its place."""
    rest = dict(state)
    for network in ADAPTED:
        for layer, module in getattr(model, network).named_modules():
            a, b = (rest.pop(f"{network}.{layer}.{part}", None) for part in ("lora_A", "lora_B"))
            if isinstance(a, Tensor) and isinstance(b, Tensor) and isinstance(module, nn.Linear | nn.Conv2d):
                yield f"{network}.{layer}", cast(nn.Parameter, module.weight), a, b
            elif a is not None or b is not None:
                raise AdapterError(f"The adapter does not fit the model at {network}.{layer}; choose another adapter.")
    if rest or not state:
        where = next(iter(rest), "any layer")
        raise AdapterError(f"The adapter has weights for {where}, which the model lacks; choose another adapter.")


def _checked(name: str, weight: Tensor, a: Tensor, b: Tensor, card: AdapterCard) -> tuple[Tensor, Tensor]:
    if a.shape[0] != card.rank or b.dim() < 2 or b.shape[1] != card.rank:
        raise AdapterError(
            f'The adapter "{card.name}" has rank {a.shape[0]} at {name}, but its card says {card.rank};'
            " its files do not belong together, so copy the whole folder again."
        )
    fits = a.shape[1:] == weight.shape[1:] and b.shape[0] == weight.shape[0] and b.shape[2:].numel() == 1
    if not fits or not torch.isfinite(a).all() or not torch.isfinite(b).all():
        raise AdapterError(f'The adapter "{card.name}" does not fit the model at {name}; choose another adapter.')
    return a.float(), b.float()


def _delta(a: Tensor, b: Tensor, shape: torch.Size) -> Tensor:
    """B A of a linear layer, or of a convolution whose A reads the kernel and whose B is 1x1."""
    return (b.flatten(1) @ a.flatten(1)).reshape(shape)
