"""The architecture of the bundled small model: diffusers' own classes at a size that two CPU cores can sample from."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from diffusers import AutoencoderTiny, DDIMScheduler, UNet2DConditionModel
from transformers import CLIPTextConfig, CLIPTextModel, PreTrainedTokenizerFast

from progidiff.cards import ModelCard
from progidiff.model.build import zero_snr_scheduler
from progidiff.model.folder import ProGiDiffModel
from progidiff.model.networks import ControlBranch, ImageEncoder, MaskDecoder

TEXT_DIM = 64
TEXT_TOKENS = 8
LATENT_CHANNELS = 4
STRIDE = 4
_HEADS = 4


def make_tokenizer(words: Sequence[str]) -> Any:
    """Word-level tokenizer of the vocabulary's words, padded to 8 tokens."""
    from tokenizers import Tokenizer, models, normalizers, pre_tokenizers

    specials = ["<pad>", "<unk>"]
    known = sorted({word for name in words for word in name.lower().split()})
    tokenizer = Tokenizer(models.WordLevel({w: i for i, w in enumerate([*specials, *known])}, unk_token="<unk>"))
    tokenizer.normalizer = normalizers.Lowercase()
    tokenizer.pre_tokenizer = pre_tokenizers.Whitespace()
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, unk_token="<unk>", pad_token="<pad>", model_max_length=TEXT_TOKENS
    )


def make_text_encoder(vocabulary_size: int) -> CLIPTextModel:
    """Two-layer CLIP text model."""
    return CLIPTextModel(
        CLIPTextConfig(
            vocab_size=vocabulary_size,
            hidden_size=TEXT_DIM,
            intermediate_size=2 * TEXT_DIM,
            num_hidden_layers=2,
            num_attention_heads=4,
            max_position_embeddings=TEXT_TOKENS,
            projection_dim=TEXT_DIM,
            bos_token_id=0,
            eos_token_id=0,
            pad_token_id=0,
        )
    )


def make_vae() -> AutoencoderTiny:
    """Mask autoencoder: (1, S, S) in [-1, 1] to (4, S / 4, S / 4)."""
    return AutoencoderTiny(
        in_channels=1,
        out_channels=1,
        encoder_block_out_channels=(16, 16, 16),
        decoder_block_out_channels=(16, 16, 16),
        num_encoder_blocks=(0, 1, 1),
        num_decoder_blocks=(1, 1, 1),
        latent_channels=LATENT_CHANNELS,
    )


def make_unet(size: int) -> UNet2DConditionModel:
    """Text-to-mask backbone.

    ``attention_head_dim`` counts heads in diffusers' UNet (a name kept for compatibility there); one head of 32 channels
    each. Attention sits at the coarsest level alone, where 100 tokens see the whole mask; the prompt also reaches every
    residual block through the time embedding.
    """
    return UNet2DConditionModel(
        sample_size=size // STRIDE,
        in_channels=LATENT_CHANNELS,
        out_channels=LATENT_CHANNELS,
        block_out_channels=(32, 64, 128),
        layers_per_block=1,
        down_block_types=("DownBlock2D", "DownBlock2D", "CrossAttnDownBlock2D"),
        up_block_types=("CrossAttnUpBlock2D", "UpBlock2D", "UpBlock2D"),
        cross_attention_dim=TEXT_DIM,
        attention_head_dim=(1, 2, 4),
        norm_num_groups=16,
        resnet_time_scale_shift="scale_shift",
        addition_embed_type="text",
        addition_embed_type_num_heads=_HEADS,
    )


def make_control(unet: UNet2DConditionModel) -> ControlBranch:
    """Control branch initialised from the backbone."""
    heads = {"addition_embed_type_num_heads": _HEADS} if unet.config.addition_embed_type == "text" else {}
    return ControlBranch.from_unet(unet, **heads)


def make_encoder(classes: int, coordinates: bool = False) -> ImageEncoder:
    """Image encoder at the latent's resolution, with a segmentation head for so many targets.

    ``coordinates`` let it know each pixel's place in the grid, for a grid that is laid on the body.
    """
    return ImageEncoder(stride=STRIDE, hint_channels=32, text_dim=TEXT_DIM, classes=classes, coordinates=coordinates)


def make_mask_decoder() -> MaskDecoder:
    """Latent to mask logits."""
    return MaskDecoder(latent_channels=LATENT_CHANNELS, stride=STRIDE)


def make_schedule() -> DDIMScheduler:
    """Zero-terminal-SNR schedule with v-prediction and trailing steps (arXiv 2305.08891)."""
    return zero_snr_scheduler()


def make_model(size: int, tokenizer: Any, card: ModelCard) -> ProGiDiffModel:
    """The whole model with fresh weights, for images of ``size`` x ``size`` pixels."""
    unet = make_unet(size)
    return ProGiDiffModel(
        vae=make_vae(),
        unet=unet,
        controlnet=make_control(unet),
        image_encoder=make_encoder(len(card.vocabulary)),
        text_encoder=make_text_encoder(len(tokenizer)),
        tokenizer=tokenizer,
        scheduler=make_schedule(),
        mask_decoder=make_mask_decoder(),
        card=card,
    )
