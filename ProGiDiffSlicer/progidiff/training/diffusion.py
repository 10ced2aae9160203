"""The diffusion stages: the text-to-mask backbone, and the control branch with its image encoder."""

from __future__ import annotations

from collections.abc import Sequence
from functools import partial
from typing import Any

import torch
from diffusers import AutoencoderKL, AutoencoderTiny, DDIMScheduler, UNet2DConditionModel
from torch import Tensor, nn
from torch.nn import functional as F
from transformers import CLIPTextModel

from progidiff.model.networks import ControlBranch, ImageEncoder, MaskDecoder, encode_text
from progidiff.sampling.denoise import denoise, make_scheduler
from progidiff.training.batches import BatchSource, TrainingBatch, pick_prompts
from progidiff.training.stages import (
    SourceStage,
    decoded_loss,
    dice_loss,
    encode_masks,
    mean_dice,
    neighbourhood,
    segmentation_loss,
    soft_dice,
    velocity_loss,
)


class _DiffusionStage(SourceStage):
    """Shared by the backbone and the control stage: noisy mask latents, text, losses."""

    def __init__(
        self,
        vae: AutoencoderKL | AutoencoderTiny,
        unet: UNet2DConditionModel,
        decoder: MaskDecoder | None,
        schedule: DDIMScheduler,
        tokens: tuple[Tensor, Tensor],
        text_encoder: CLIPTextModel,
        latent_shift: Sequence[float],
        latent_scale: Sequence[float],
        source: BatchSource,
        validation: Sequence[TrainingBatch],
        prompts_per_image: int,
    ) -> None:
        super().__init__(source, validation)
        self.vae, self.unet, self.decoder, self.schedule = vae, unet, decoder, schedule
        self.tokens, self.text_encoder = tokens, text_encoder
        self.shift = torch.tensor(latent_shift, device=unet.device)[:, None, None]
        self.scale = torch.tensor(latent_scale, device=unet.device)[:, None, None]
        self.prompts_per_image = prompts_per_image
        vae.requires_grad_(False).eval()
        if decoder is not None:
            decoder.requires_grad_(False).eval()

    def clean_latents(self, masks: Tensor) -> Tensor:
        with torch.no_grad():
            return (encode_masks(self.vae, masks) - self.shift) * self.scale

    def noisy(self, clean: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Noisy latents, timesteps and velocities; timesteps are stratified over the batch."""
        count, steps = len(clean), self.schedule.config.num_train_timesteps
        noise = torch.randn_like(clean)
        strata = (torch.randperm(count, device=clean.device) + torch.rand(count, device=clean.device)) / count
        # a quarter starts at the very end, where every sample starts and where the organ has to be found
        strata = torch.where(torch.rand(count, device=clean.device) < 0.25, torch.ones_like(strata), strata)
        t = (strata * steps).long().clamp(0, steps - 1)
        return self.schedule.add_noise(clean, noise, t), t, self.schedule.get_velocity(clean, noise, t)

    def clean_estimate(self, prediction: Tensor, noisy: Tensor, t: Tensor) -> Tensor:
        """Scaled clean latents that a predicted velocity means (arXiv 2202.00512): x0 = alpha x_t - sigma v."""
        alpha = self.schedule.alphas_cumprod.to(t.device)[t].sqrt()[:, None, None, None]
        return alpha * noisy - (1 - alpha**2).clamp_min(0).sqrt() * prediction

    def decode(self, latents: Tensor) -> Tensor:
        """Mask logits (B, 1, S, S) of scaled latents; without a mask decoder, four times the autoencoder's grey image."""
        raw = latents / self.scale + self.shift
        if self.decoder is not None:
            return self.decoder(raw)
        # A full-size autoencoder needs about a gigabyte per picture.
        return torch.cat([4 * self.vae.decode(part).sample.mean(1, keepdim=True) for part in raw.split(4)])

    def diffusion_loss(
        self, prediction: Tensor, velocity: Tensor, noisy: Tensor, t: Tensor, masks: Tensor
    ) -> tuple[Tensor, dict[str, float]]:
        near = neighbourhood(masks, masks.shape[-1] // prediction.shape[-1])
        loss = velocity_loss(prediction, velocity, near)
        numbers = {"v": float(loss.detach())}
        if self.decoder is not None:
            logits = self.decode(self.clean_estimate(prediction, noisy, t))
            decoded = decoded_loss(logits, masks, near)
            numbers |= {"bce": float(decoded.detach()), "dice": float(soft_dice(logits.detach(), masks))}
            loss = loss + 0.5 * decoded
        return loss, numbers


class BaseStage(_DiffusionStage):
    """Text-to-mask backbone: learns what masks of each target look like, without an image."""

    name = "base"

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self.unet.requires_grad_(True)
        self.text_encoder.requires_grad_(True)
        self.trainable = nn.ModuleDict({"unet": self.unet, "text_encoder": self.text_encoder})

    def _step(self, batch: TrainingBatch) -> tuple[Tensor, dict[str, float]]:
        image, target = pick_prompts(batch, self.prompts_per_image)
        masks = batch.masks[image, target][:, None].float()
        noisy, t, velocity = self.noisy(self.clean_latents(masks))
        states, _ = encode_text(self.text_encoder, *self.tokens)
        prediction = self.unet(noisy, t, states[target]).sample
        return self.diffusion_loss(prediction, velocity, noisy, t, masks)

    def loss(self, count: int) -> tuple[Tensor, dict[str, float]]:
        return self._step(self.draw(count))

    def validate(self) -> dict[str, float]:
        if not self.validation:
            return {}
        torch.manual_seed(0)
        figures = [self._step(b)[1] for b in self.validation]
        return {key: sum(f[key] for f in figures) / len(figures) for key in figures[0]}


class ControlStage(_DiffusionStage):
    """The paper's stage: control branch and image encoder against the frozen backbone.

    Args:
        segmentation_weight: weight of the loss of the encoder's segmentation head, where it has one: the encoder goes on
            learning to segment beside serving the control branch.
        head_follows: that loss teaches the head alone, which then follows the features without shaping them.
        hint_weight: weight of a loss on the hint itself.
        recycled: share of the masks that are noised from the networks' own estimate in place of the true mask (recycling,
            arXiv 2308.16355): in sampling they see nothing else, and a network that only knows noisy true masks loses Dice
            at every later step.
        dice_weight: weight of a soft Dice on the decoded clean estimate, at every noise level.
    """

    name = "control"

    def __init__(
        self,
        control: ControlBranch,
        encoder: ImageEncoder,
        *args: Any,
        segmentation_weight: float = 0.5,
        head_follows: bool = False,
        hint_weight: float = 0.5,
        recycled: float = 0.0,
        dice_weight: float = 0.0,
        **kwargs: Any,
    ) -> None:
        super().__init__(*args, **kwargs)
        self.control, self.encoder = control, encoder
        self.recycled, self.dice_weight = recycled, dice_weight
        self.segmentation_weight = segmentation_weight if encoder.config.classes else 0.0
        self.head_follows, self.hint_weight = head_follows, hint_weight
        self.unet.requires_grad_(False).eval()
        self.text_encoder.requires_grad_(False).eval()
        control.requires_grad_(True)
        encoder.requires_grad_(True)
        modules: dict[str, nn.Module] = {"control": control, "encoder": encoder}
        if hint_weight:
            # Deep supervision: the hint alone has to tell where the prompt's organ is, or the control branch would have to
            # learn to look before the zero convolutions let it be heard. It takes no part in sampling.
            self.hint_head = nn.Conv2d(encoder.config.hint_channels, encoder.config.stride**2, 1).to(self.unet.device)
            modules["hint_head"] = self.hint_head
        self.trainable = nn.ModuleDict(modules)
        with torch.no_grad():
            self.states, self.pooled = encode_text(self.text_encoder, *self.tokens)

    def velocity(self, noisy: Tensor, t: Tensor, hint: Tensor, target: Tensor) -> Tensor:
        states = self.states[target]
        down, mid = self.control(noisy, t, states, hint, return_dict=False)
        return self.unet(
            noisy, t, states, down_block_additional_residuals=list(down), mid_block_additional_residual=mid
        ).sample

    def loss(self, count: int) -> tuple[Tensor, dict[str, float]]:
        batch = self.draw(count)
        features = self.encoder(batch.images)
        image, target = pick_prompts(batch, self.prompts_per_image, believed=self._believed(features))
        masks = batch.masks[image, target][:, None].float()
        clean = self.clean_latents(masks)
        noisy, t, velocity = self.noisy(clean)
        hint = self.encoder.hint(features[image], self.pooled[target])
        if self.recycled:
            noisy, t, velocity = self._with_estimates(clean, noisy, t, velocity, hint.detach(), target)
        prediction = self.velocity(noisy, t, hint, target)
        loss, numbers = self.diffusion_loss(prediction, velocity, noisy, t, masks)
        if self.dice_weight and self.decoder is not None:
            dice = dice_loss(self.decode(self.clean_estimate(prediction.float(), noisy, t)), masks)
            numbers["soft dice"] = 1 - float(dice.detach())
            loss = loss + self.dice_weight * dice
        if self.segmentation_weight:
            seen = features.detach() if self.head_follows else features
            segmentation = segmentation_loss(self.encoder.segment(seen), batch.masks, batch.known)
            numbers["seg"] = float(segmentation.detach())
            loss = loss + self.segmentation_weight * segmentation
        if self.hint_weight:
            located = decoded_loss(
                F.pixel_shuffle(self.hint_head(hint), self.encoder.config.stride),
                masks,
                neighbourhood(masks, self.encoder.config.stride),
            )
            numbers["hint"] = float(located.detach())
            loss = loss + self.hint_weight * located
        return loss, numbers

    @torch.no_grad()
    def _believed(self, features: Tensor) -> Tensor | None:
        """How much the segmentation head believes in each target, float (B, V) in [0, 1]; ``None`` without one."""
        if not self.encoder.config.classes:
            return None
        logits = self.encoder.segment(features).float().flatten(2)
        return logits.topk(min(12, logits.shape[-1]), dim=-1).values.mean(-1).sigmoid()

    @torch.no_grad()
    def _with_estimates(
        self, clean: Tensor, noisy: Tensor, t: Tensor, velocity: Tensor, hint: Tensor, target: Tensor
    ) -> tuple[Tensor, Tensor, Tensor]:
        """Some of the noisy latents made of the networks' own first estimate, with the velocity that leads to the truth."""
        steps = self.schedule.config.num_train_timesteps
        # below a quarter of the noise no sampler step begins, and the velocity to the truth would be as large as it likes
        own = (torch.rand(len(clean), device=clean.device) < self.recycled) & (t >= steps // 4)
        if not bool(own.any()):
            return noisy, t, velocity
        start, pure = torch.full_like(t[own], steps - 1), torch.randn_like(clean[own])
        estimate = self.clean_estimate(self.velocity(pure, start, hint[own], target[own]).float(), pure, start)
        noisy, velocity = noisy.clone(), velocity.clone()
        noisy[own] = self.schedule.add_noise(estimate, torch.randn_like(estimate), t[own])
        alpha = self.schedule.alphas_cumprod.to(t.device)[t[own]].sqrt()[:, None, None, None]
        velocity[own] = (alpha * noisy[own] - clean[own]) / (1 - alpha**2).clamp_min(1e-4).sqrt()
        return noisy, t, velocity

    @torch.no_grad()
    def sample(self, images: Tensor, steps: int = 4, seed: int = 0) -> Tensor:
        """One sample per image and target; mask logits (B, V, S, S). For validation; proposals come from the engine."""
        features = self.encoder(images)
        out = []
        for v in range(len(self.states)):
            target = torch.full((len(images),), v, device=images.device)
            hint = self.encoder.hint(features, self.pooled[target])
            generator = torch.Generator().manual_seed(seed + v)
            shape = (len(images), self.unet.config.in_channels, *hint.shape[-2:])
            noise = torch.randn(shape, generator=generator).to(images.device)
            z = denoise(
                partial(self.velocity, hint=hint, target=target), noise, make_scheduler(self.schedule, "ddim", steps)
            )
            out.append(self.decode(z)[:, 0])
        return torch.stack(out, 1)

    def validate(self) -> dict[str, float]:
        figures = mean_dice([(self.sample(b.images) > 0, b) for b in self.validation])
        if self.segmentation_weight:
            twin = mean_dice([(self.encoder.segment(self.encoder(b.images)) > 0, b) for b in self.validation])
            if twin:
                figures["twin"] = twin["dice"]
        return figures
