"""The stages before diffusion, mask autoencoder and pre-training of the image encoder, and the losses of all stages."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from diffusers import AutoencoderKL, AutoencoderTiny
from torch import Tensor, nn
from torch.nn import functional as F

from progidiff.model.networks import ImageEncoder, MaskDecoder
from progidiff.training.batches import BatchSource, TrainingBatch, pick_prompts


def segmentation_loss(logits: Tensor, masks: Tensor, known: Tensor) -> Tensor:
    """Binary cross-entropy plus soft Dice per target over the known targets only.

    Args:
        logits: float (B, V, S, S).
        masks: bool (B, V, S, S).
        known: bool (B, V); unknown targets contribute nothing.
    """
    logits, truth = logits.float(), masks.float()  # sums over a picture need more than bfloat16
    weight = known.float()[:, :, None, None]
    cross = (F.binary_cross_entropy_with_logits(logits, truth, reduction="none") * weight).sum()
    cross = cross / weight.expand_as(logits).sum().clamp_min(1)
    probability = logits.sigmoid() * weight
    overlap = (probability * truth).sum((0, 2, 3))
    size = (probability + truth * weight).sum((0, 2, 3))
    dice = 1 - (2 * overlap + 1) / (size + 1)
    return cross * 4 + (dice * known.any(0)).sum() / known.any(0).sum().clamp_min(1)


def neighbourhood(masks: Tensor, stride: int, radius: int = 1) -> Tensor:
    """Latent tokens at or next to a mask; float (B, 1, S / stride, S / stride) of 0 and 1, from float masks (B, 1, S, S)."""
    near = F.max_pool2d(masks, stride)
    return (F.max_pool2d(near, 2 * radius + 1, 1, radius) > 0).float()


def velocity_loss(prediction: Tensor, velocity: Tensor, near: Tensor, weight: float = 9.0) -> Tensor:
    """Mean squared error of v (arXiv 2202.00512), with tokens near the mask counted ``1 + weight`` times.

    Most tokens of a mask are empty background; unweighted, a small organ would hardly be heard.
    """
    w = 1 + weight * near
    return ((prediction.float() - velocity) ** 2 * w).mean() / w.mean()


def decoded_loss(logits: Tensor, masks: Tensor, near: Tensor, weight: float = 9.0) -> Tensor:
    """Cross-entropy of the decoded estimate of the clean mask.

    Unlike Dice it is a proper scoring rule: at high noise the best answer stays the probability, so that samples keep their
    diversity instead of agreeing on one mask.
    """
    w = 1 + weight * F.interpolate(near, size=masks.shape[-2:], mode="nearest")
    return (F.binary_cross_entropy_with_logits(logits.float(), masks, reduction="none") * w).mean() / w.mean()


def dice_loss(logits: Tensor, masks: Tensor) -> Tensor:
    """One minus the soft Dice of each picture, averaged; float logits and masks (B, 1, S, S). Empty masks count as well."""
    probability = logits.float().sigmoid().flatten(1)
    truth = masks.flatten(1)
    overlap = (probability * truth).sum(1)
    return (1 - (2 * overlap + 10) / (probability.sum(1) + truth.sum(1) + 10)).mean()


def soft_dice(logits: Tensor, masks: Tensor) -> Tensor:
    """Mean Dice of thresholded logits against float masks (B, 1, S, S) over non-empty masks (for progress only)."""
    binary = (logits > 0).float()
    full = masks.flatten(1).sum(1) > 0
    if not bool(full.any()):
        return torch.zeros((), device=logits.device)
    overlap = 2 * (binary * masks).flatten(1).sum(1) / (binary + masks).flatten(1).sum(1).clamp_min(1)
    return overlap[full].mean()


def encode_masks(vae: AutoencoderKL | AutoencoderTiny, masks: Tensor) -> Tensor:
    """Raw latents of float masks (B, 1, S, S) in [0, 1], shown to the autoencoder as grey images in [-1, 1]."""
    images = masks.expand(-1, vae.config.in_channels, -1, -1) * 2 - 1
    encoded = vae.encode(images)
    return encoded.latents if isinstance(vae, AutoencoderTiny) else encoded.latent_dist.mode()


class SourceStage:
    """Shared by all stages: the source of batches and its state."""

    def __init__(self, source: BatchSource, validation: Sequence[TrainingBatch]) -> None:
        self.source = source
        self.validation = list(validation)

    def draw(self, count: int) -> TrainingBatch:
        """New images, made in full precision whatever the networks compute in."""
        with torch.autocast("cuda" if torch.cuda.is_available() else "cpu", enabled=False):
            return self.source.batch(count)

    def source_state(self) -> Tensor:
        return self.source.state()

    def restore_source(self, state: Tensor) -> None:
        self.source.restore(state)


class AutoencoderStage(SourceStage):
    """Mask autoencoder and small mask decoder, trained together on masks alone.

    Noise on the latents makes both decoders tolerant of latents that a few denoising steps leave imperfect.

    Args:
        vae: the autoencoder.
        decoder: the small mask decoder.
        source: training batches; only their masks are used.
        validation: batches to measure on.
        frozen: leave the autoencoder as it is (one that was trained on pictures) and train the small decoder alone.
    """

    name = "autoencoder"

    def __init__(
        self,
        vae: AutoencoderKL | AutoencoderTiny,
        decoder: MaskDecoder,
        source: BatchSource,
        validation: Sequence[TrainingBatch],
        frozen: bool = False,
    ) -> None:
        super().__init__(source, validation)
        self.vae, self.decoder, self.frozen = vae, decoder, frozen
        self.stride = 2 ** (len(vae.config.block_out_channels) - 1)
        vae.requires_grad_(not frozen)
        decoder.requires_grad_(True)
        self.trainable = nn.ModuleDict({"mask_decoder": decoder} if frozen else {"vae": vae, "mask_decoder": decoder})

    def _masks(self, batch: TrainingBatch, per_image: int) -> Tensor:
        image, target = pick_prompts(batch, per_image, absent_share=0.03)
        return batch.masks[image, target][:, None].float()

    def loss(self, count: int) -> tuple[Tensor, dict[str, float]]:
        masks = self._masks(self.draw(count), 4)
        with torch.set_grad_enabled(not self.frozen):
            raw = encode_masks(self.vae, masks)
        raw_noisy = raw + torch.randn_like(raw) * 0.1 * torch.rand(len(raw), 1, 1, 1, device=raw.device)
        near = neighbourhood(masks, self.stride)
        small = self.decoder(raw_noisy)
        if self.frozen:
            return decoded_loss(small, masks, near), {"dice": float(soft_dice(small, masks))}
        # The autoencoder's own decoder works at full resolution and is dear; a quarter of the masks is enough for it.
        part = slice(0, max(1, len(masks) // 4))
        large = self.vae.decode(raw_noisy[part]).sample
        loss = decoded_loss(small, masks, near) + decoded_loss(4 * large, masks[part], near[part])
        loss = loss + 0.01 * raw.square().mean()
        return loss, {"dice": float(soft_dice(small, masks)), "vae_dice": float(soft_dice(large, masks[part]))}

    def validate(self) -> dict[str, float]:
        if not self.validation:
            return {}
        masks = torch.cat([self._masks(b, 6) for b in self.validation])
        raw = encode_masks(self.vae, masks)
        figures = {"dice": float(soft_dice(self.decoder(raw), masks))}
        if not self.frozen:
            figures["vae_dice"] = float(soft_dice(self.vae.decode(raw).sample, masks))
        return figures

    @torch.no_grad()
    def latent_statistics(self, batches: int = 40, count: int = 8) -> tuple[list[float], list[float]]:
        """Shift and scale per channel that bring the latents at and around the masks to zero mean and unit deviation.

        Only tokens near a mask count: over all tokens the empty background would decide, and a small organ would stand far
        above the noise, an easier task than sampling is (arXiv 2504.05977).
        """
        values = []
        for _ in range(batches):
            masks = self._masks(self.draw(count), 6)
            near = neighbourhood(masks, self.stride)[:, 0] > 0
            values.append(encode_masks(self.vae, masks).permute(0, 2, 3, 1)[near])
        stacked = torch.cat(values)
        return stacked.mean(0).tolist(), (1 / stacked.std(0).clamp_min(1e-3)).tolist()


class EncoderStage(SourceStage):
    """Pre-training of the image encoder and its segmentation head as a segmenter of all targets at once.

    This is also the image-only twin that the diffusion model is compared with.
    """

    name = "encoder"

    def __init__(self, encoder: ImageEncoder, source: BatchSource, validation: Sequence[TrainingBatch]) -> None:
        super().__init__(source, validation)
        encoder.requires_grad_(True)
        self.encoder = encoder
        self.trainable = nn.ModuleDict({"encoder": encoder})
        for module in (encoder.text_scale_shift, encoder.hint_norm, encoder.hint_in, encoder.hint_out):
            module.requires_grad_(False)  # the hint is learned with the control branch

    def logits(self, images: Tensor) -> Tensor:
        return self.encoder.segment(self.encoder(images))

    def loss(self, count: int) -> tuple[Tensor, dict[str, float]]:
        batch = self.draw(count)
        return segmentation_loss(self.logits(batch.images), batch.masks, batch.known), {}

    def validate(self) -> dict[str, float]:
        return mean_dice([(self.logits(b.images) > 0, b) for b in self.validation])


def mean_dice(results: Sequence[tuple[Tensor, TrainingBatch]]) -> dict[str, float]:
    """Mean Dice over known, present targets; predictions are bool (B, V, S, S). Empty where nothing is present."""
    values: list[Tensor] = []
    for predicted, batch in results:
        overlap = 2 * (predicted & batch.masks).flatten(2).sum(-1)
        size = predicted.flatten(2).sum(-1) + batch.masks.flatten(2).sum(-1)
        present = batch.known & (batch.masks.flatten(2).sum(-1) > 15)
        values.append((overlap / size.clamp_min(1))[present])
    found = torch.cat(values) if values else torch.zeros(0)
    return {"dice": float(found.mean())} if len(found) else {}
