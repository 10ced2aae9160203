"""A model folder, a diffusers folder with ProGiDiff's own networks and a model card: reading and writing it."""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

from safetensors import SafetensorError

from progidiff.cards import ModelCard, load_card, save_card
from progidiff.errors import ModelError, OutputError
from progidiff.model.components import (
    ACCEPTED,
    NETWORKS,
    OPTIONAL,
    find_weights,
    index_entry,
    load_network,
    load_scheduler,
    load_tokenizer,
    quiet_libraries,
    read_json,
    require_folder,
    resolve_class,
    sha256_of,
    weight_stem,
)
from progidiff.places import CARD_NAME, INDEX_NAME, default_model_folder, replaced_folder

if TYPE_CHECKING:
    import torch
    from diffusers import AutoencoderKL, AutoencoderTiny, DDIMScheduler, UNet2DConditionModel
    from transformers import CLIPTextModel

    from progidiff.model.networks import ControlBranch, ImageEncoder, MaskDecoder


@dataclass
class ProGiDiffModel:
    """A loaded model: everything in evaluation mode and without gradients, on one device and in one dtype.

    ``mask_decoder`` is ``None`` where masks are decoded by the autoencoder; ``folder`` is ``None`` before the
    first save.
    """

    vae: AutoencoderKL | AutoencoderTiny
    unet: UNet2DConditionModel
    controlnet: ControlBranch
    image_encoder: ImageEncoder
    text_encoder: CLIPTextModel
    tokenizer: Any
    scheduler: DDIMScheduler
    mask_decoder: MaskDecoder | None
    card: ModelCard
    folder: Path | None = field(default=None)

    @property
    def networks(self) -> dict[str, torch.nn.Module]:
        """The networks by component name, in a fixed order."""
        return {name: getattr(self, name) for name in NETWORKS if getattr(self, name) is not None}

    @property
    def device(self) -> torch.device:
        return self.unet.device

    @property
    def dtype(self) -> torch.dtype:
        return self.unet.dtype

    @property
    def stride(self) -> int:
        """Image pixels per latent token along each axis."""
        return int(self.image_encoder.config.stride)

    def to(self, device: str | torch.device | None = None, dtype: torch.dtype | None = None) -> ProGiDiffModel:
        """Move and cast every network in place; returns itself."""
        with quiet_libraries():
            for network in self.networks.values():
                network.to(device=device, dtype=dtype)
        return self

    def parameter_counts(self) -> dict[str, int]:
        """Number of parameters per network."""
        return {name: sum(p.numel() for p in net.parameters()) for name, net in self.networks.items()}

    def trainable_parameters(self) -> int:
        """Parameters that the control stage trains: control branch and image encoder."""
        counts = self.parameter_counts()
        return counts["controlnet"] + counts["image_encoder"]


def check_fit(model: ProGiDiffModel) -> None:
    """Make sure that the components belong together and to their card.

    Raises:
        ModelError: widths, latent channels, strides, schedule or vocabulary sizes do not match.
    """
    unet, control, encoder, card = (
        model.unet.config,
        model.controlnet.config,
        model.image_encoder.config,
        model.card,
    )
    text_width = model.text_encoder.config.hidden_size
    latent = model.vae.config.latent_channels
    vae_stride = 2 ** (len(model.vae.config.block_out_channels) - 1)
    decoder = None if model.mask_decoder is None else model.mask_decoder.config
    checks: list[tuple[str, object, str, object]] = [
        ("the UNet's text width", unet.cross_attention_dim, "the text encoder's", text_width),
        ("the control branch's text width", control.cross_attention_dim, "the text encoder's", text_width),
        ("the image encoder's text width", encoder.text_dim, "the text encoder's", text_width),
        (
            "the control branch's widths",
            list(control.block_out_channels),
            "the UNet's",
            list(unet.block_out_channels),
        ),
        (
            "the image encoder's hint width",
            encoder.hint_channels,
            "the UNet's first",
            unet.block_out_channels[0],
        ),
        ("the UNet's input channels", unet.in_channels, "the autoencoder's latent channels", latent),
        (
            "the control branch's input channels",
            control.in_channels,
            "the autoencoder's latent channels",
            latent,
        ),
        ("the image encoder's stride", encoder.stride, "the autoencoder's", vae_stride),
        ("the image encoder's targets", encoder.classes, "the card's", len(card.vocabulary) if encoder.classes else 0),
        ("the card's latent scales", len(card.latent_scale), "the latent channels", latent),
        (
            "the card's prediction type",
            card.prediction_type,
            "the schedule's",
            model.scheduler.config.prediction_type,
        ),
    ]
    if decoder is not None:
        checks += [
            ("the mask decoder's latent channels", decoder.latent_channels, "the autoencoder's", latent),
            ("the mask decoder's stride", decoder.stride, "the autoencoder's", vae_stride),
        ]
    for what, found, other, wanted in checks:
        if found != wanted:
            raise ModelError(
                f"The model's parts do not belong together: {what} is {found}, {other} is {wanted}; copy the"
                " whole model folder again."
            )
    words = len(model.tokenizer)
    if words > model.text_encoder.config.vocab_size:
        raise ModelError(
            f"The model's parts do not belong together: the tokenizer has {words} words, the text encoder "
            f"{model.text_encoder.config.vocab_size}; copy the whole model folder again."
        )


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
