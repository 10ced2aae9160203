"""diffusers' ``StableDiffusionControlNetPipeline`` over a ProGiDiff model's parts; the weights are shared, not copied."""

from __future__ import annotations

import copy
from types import SimpleNamespace
from typing import Any

import torch
from diffusers.image_processor import VaeImageProcessor
from torch import Tensor, nn

from progidiff.model.components import quiet_libraries
from progidiff.model.folder import ProGiDiffModel
from progidiff.model.networks import ControlBranch, ImageEncoder, encode_text, tokenize
from progidiff.sampling.denoise import make_scheduler


class HintBlock(nn.Module):
    """The image encoder in the place of ControlNet's stock hint block: run wherever that would run, on the condition image.

    Args:
        encoder: the model's image encoder.
        pooled: pooled text (1, D) of the prompt. The stock block sees the image alone; with guidance, both halves of a
            batch get the prompt's hint, as they would share the stock block's.
    """

    def __init__(self, encoder: ImageEncoder, pooled: Tensor) -> None:
        super().__init__()
        self.encoder = encoder
        self.pooled = pooled

    def forward(self, image: Tensor) -> Tensor:
        """Hint (B, hint channels, h, w) of condition images (B, 1, S, S)."""
        return self.encoder.hint(self.encoder(image), self.pooled.to(image.dtype).expand(len(image), -1))


class ScaledAutoencoder(nn.Module):
    """The model's autoencoder with the card's scale and shift per channel, where the pipeline divides by one factor."""

    def __init__(self, model: ProGiDiffModel) -> None:
        super().__init__()
        self.vae = model.vae
        self.config = SimpleNamespace(
            scaling_factor=1.0,
            block_out_channels=model.vae.config.block_out_channels,
            latent_channels=model.vae.config.latent_channels,
        )
        self.device, self.dtype = model.device, model.dtype
        self.scale = torch.tensor(model.card.latent_scale, device=model.device).view(1, -1, 1, 1)
        self.shift = torch.tensor(model.card.latent_shift, device=model.device).view(1, -1, 1, 1)

    def decode(self, latents: Tensor, return_dict: bool = False, generator: torch.Generator | None = None) -> tuple[Tensor]:
        """Images in about [-1, 1] of scaled latents."""
        return (self.vae.decode((latents / self.scale + self.shift).to(self.dtype), return_dict=False)[0],)


class PipelineReference:
    """The pipeline as its documentation uses it, for one prompt.

    Args:
        model: a loaded model; its networks are used as they are.
        prompt: text of the prompt.
    """

    def __init__(self, model: ProGiDiffModel, prompt: str) -> None:
        self._model, self._prompt = model, prompt
        with torch.inference_mode():
            _, pooled = encode_text(model.text_encoder, *tokenize(model.tokenizer, [prompt], model.device))
        self._block = HintBlock(model.image_encoder, pooled)
        self._pipeline = _pipeline(model, _with_hint_block(model.controlnet, self._block))
        # The model's own control branch takes a hint as its condition; it must not be resized like an image.
        self._hinted = _pipeline(model, model.controlnet)
        self._hinted.control_image_processor = VaeImageProcessor(do_resize=False, do_normalize=False)

    @torch.inference_mode()
    def hint(self, image: Tensor) -> Tensor:
        """Hint (1, hint channels, h, w) of a slice on the model's grid, (1, 1, S, S)."""
        hint: Tensor = self._block(image)
        return hint

    def call(self, condition: Tensor, noise: Tensor, steps: int, guidance: float = 1.0, *, ready: bool = False) -> Tensor:
        """Mask logits float32 (n, S, S): one ``__call__`` for all rows of ``noise``.

        The pipeline gives the autoencoder's images in [0, 1]; they are read as the engine reads such images.

        Args:
            condition: slice on the model's grid (1, 1, S, S) or, when ``ready``, its :meth:`hint`.
            noise: (n, C, h, w).
            steps: denoising steps.
            guidance: the pipeline's ``guidance_scale``; 1 is none.
            ready: whether ``condition`` is the hint.
        """
        images = self._run(condition, noise, steps, guidance, ready, "pt")
        return 4 * (2 * images.mean(1).float() - 1)

    def latents(self, condition: Tensor, noise: Tensor, steps: int) -> Tensor:
        """The pipeline's samples before they are decoded, float32 (n, C, h, w)."""
        return self._run(condition, noise, steps, 1.0, False, "latent").float()

    def _run(self, condition: Tensor, noise: Tensor, steps: int, guidance: float, ready: bool, output: str) -> Tensor:
        pipeline = self._hinted if ready else self._pipeline
        images: Tensor = pipeline(
            self._prompt,
            image=condition,
            num_inference_steps=steps,
            guidance_scale=guidance,
            num_images_per_prompt=len(noise),
            latents=noise.to(self._model.dtype),
            output_type=output,
            return_dict=False,
        )[0]
        return images


def _with_hint_block(branch: ControlBranch, block: HintBlock) -> ControlBranch:
    """The same control branch (its weights, not a copy of them) with another hint block."""
    twin = copy.copy(branch)
    twin._modules = dict(branch._modules)
    twin.add_module("controlnet_cond_embedding", block)
    return twin


def _pipeline(model: ProGiDiffModel, branch: ControlBranch) -> Any:
    text_encoder = copy.copy(model.text_encoder)
    text_encoder.config = copy.copy(model.text_encoder.config)
    # the model was trained with padding masked out; the pipeline asks this flag
    text_encoder.config.use_attention_mask = True
    with quiet_libraries():
        # imported here because its import tells at length about image processors that are not used
        from diffusers import StableDiffusionControlNetPipeline

        pipeline = StableDiffusionControlNetPipeline(
            vae=ScaledAutoencoder(model),
            text_encoder=text_encoder,
            tokenizer=model.tokenizer,
            unet=model.unet,
            controlnet=branch,
            scheduler=make_scheduler(model.scheduler, "ddim", 1),  # the engine's; the pipeline sets its steps
            safety_checker=None,
            feature_extractor=None,
            requires_safety_checker=False,
        )
    pipeline.set_progress_bar_config(disable=True)
    return pipeline
