"""The space in which masks are denoised: the noise schedule and the scaling of mask latents."""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

import numpy as np

from progidiff.errors import ModelError

if TYPE_CHECKING:
    from diffusers import AutoencoderKL, AutoencoderTiny, DDIMScheduler


def zero_snr_scheduler(config: Mapping[str, Any] | None = None, prediction_type: str = "v_prediction") -> DDIMScheduler:
    """DDIM schedule that ends in pure noise and is sampled right in few steps (Lin et al., arXiv 2305.08891).

    Zero terminal SNR, ``trailing`` timesteps, and a last step that returns the prediction itself.

    Args:
        config: a diffusers scheduler config whose beta schedule is kept; Stable Diffusion's by default.
        prediction_type: ``"v_prediction"`` or ``"sample"``; epsilon has no meaning at zero SNR.
    """
    from diffusers import DDIMScheduler

    if prediction_type not in ("v_prediction", "sample"):
        raise ValueError(f"{prediction_type} prediction is undefined at zero terminal SNR")
    known = config or {}
    return DDIMScheduler(
        num_train_timesteps=int(known.get("num_train_timesteps", 1000)),
        beta_start=float(known.get("beta_start", 0.00085)),
        beta_end=float(known.get("beta_end", 0.012)),
        beta_schedule=str(known.get("beta_schedule", "scaled_linear")),
        clip_sample=False,
        set_alpha_to_one=True,
        prediction_type=prediction_type,
        timestep_spacing="trailing",
        rescale_betas_zero_snr=True,
    )


def measure_mask_latents(vae: AutoencoderKL | AutoencoderTiny, masks: np.ndarray) -> tuple[list[float], list[float]]:
    """Shift and scale per latent channel that bring the latents of ``masks`` to zero mean, unit deviation.

    Stable Diffusion's own factor leaves mask latents with a deviation of about 1.5, which makes denoising too
    easy.

    Args:
        vae: the autoencoder; a mask is shown to it as -1 (outside) and 1 (inside) in all its image channels.
        masks: bool (N, H, W), H and W multiples of the autoencoder's stride.

    Returns:
        ``(shift, scale)``; the diffusion sees ``(z - shift) * scale`` of the raw (deterministic) encoder
        output ``z``.

    Raises:
        ModelError: the masks are not a stack that the autoencoder takes, or its output does not depend on
            them.
    """
    import torch

    stride = 2 ** (len(vae.config.block_out_channels) - 1)
    if masks.ndim != 3 or masks.shape[0] == 0 or masks.shape[1] % stride or masks.shape[2] % stride:
        raise ModelError(f"Calibration masks are a stack (N, H, W) with H and W multiples of {stride}; got {masks.shape}.")
    latents = []
    with torch.inference_mode():
        for mask in masks:  # one at a time: the encoder's activations at 512 x 512 are large
            image = torch.from_numpy(mask.astype(np.float32) * 2 - 1).to(vae.device, vae.dtype)
            encoded = vae.encode(image.expand(1, vae.config.in_channels, *mask.shape))
            latents.append((encoded.latents if hasattr(encoded, "latents") else encoded.latent_dist.mode()).double())
        z = torch.cat(latents)
        mean, std = z.mean((0, 2, 3)), z.std((0, 2, 3))
    if not bool(torch.isfinite(std).all()) or not bool((std > 1e-6).all()):
        raise ModelError(
            "The autoencoder's latents do not depend on the masks, so its weights are damaged; copy them again."
        )
    return mean.tolist(), (1 / std).tolist()


def ellipses(count: int, size: int, seed: int) -> np.ndarray:
    """Organ-like masks: one tilted ellipse each, semi-axes 4-20 % of the image, bool (count, size, size)."""
    rng = np.random.default_rng(seed)
    y, x = np.mgrid[:size, :size] / size - 0.5
    masks = []
    for _ in range(count):
        (cy, cx), (a, b), angle = (
            rng.uniform(-0.25, 0.25, 2),
            rng.uniform(0.04, 0.2, 2),
            rng.uniform(0, np.pi),
        )
        u = (x - cx) * np.cos(angle) + (y - cy) * np.sin(angle)
        v = (y - cy) * np.cos(angle) - (x - cx) * np.sin(angle)
        masks.append((u / a) ** 2 + (v / b) ** 2 < 1)
    return np.stack(masks)
