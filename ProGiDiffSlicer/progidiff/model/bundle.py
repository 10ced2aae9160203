"""A loaded model, and whether its parts belong together."""

from __future__ import annotations

from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

from progidiff.cards import ModelCard
from progidiff.errors import ModelError
from progidiff.model.components import NETWORKS, quiet_libraries

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
