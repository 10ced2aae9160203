"""Initial noise, denoising of a batch of latents, and decoding to mask logits."""

from __future__ import annotations

import hashlib
import math
from collections.abc import Callable
from functools import lru_cache

import numpy as np
import torch
from diffusers import DDIMScheduler, DPMSolverMultistepScheduler
from torch import Tensor

from progidiff.errors import CancelledError, InputError
from progidiff.model.folder import ProGiDiffModel
from progidiff.wire.request import SchedulerName

#: Distance in mm over which a proposal's noise turns into an independent one. Slices a few millimetres apart share almost
#: all of their noise, so that proposal 3 on one slice goes on as proposal 3 on the next.
ANCHOR_MM = 60.0


@lru_cache(maxsize=512)
def _anchor(seed: int, target: str, proposal: int, index: int, shape: tuple[int, ...]) -> Tensor:
    """Gaussian field of one anchor plane, drawn on the CPU so that every device gets the same numbers.

    Philox takes a key of 128 bits. torch's own CPU generator keeps 32 bits of its seed, with which two of some ten
    thousand fields would coincide.
    """
    key = hashlib.blake2b(f"{seed}|{target}|{proposal}|{index}".encode(), digest_size=16).digest()
    generator = np.random.Generator(np.random.Philox(key=int.from_bytes(key, "little")))
    return torch.from_numpy(generator.standard_normal(shape, dtype=np.float32))


def proposal_noise(seed: int, target: str, proposal: int, position_mm: float, shape: tuple[int, ...]) -> Tensor:
    """Noise of a proposal on a slice: interpolated on the sphere between two independent anchor fields.

    Independent Gaussian fields of many dimensions are nearly orthogonal, so the arc between them keeps zero mean and unit
    variance (slerp between slices as in ISCS, arXiv 2602.04162).

    Args:
        seed: the request's seed.
        target: target name; proposals of different targets are independent.
        proposal: index of the proposal.
        position_mm: position of the slice along the slice axis.
        shape: (channels, rows, columns) of the latent.

    Returns:
        float32 tensor of ``shape`` on the CPU, the caller's own.
    """
    place = position_mm / ANCHOR_MM
    index = math.floor(place)
    angle = (place - index) * math.pi / 2
    first = _anchor(seed, target, proposal, index, shape)
    if angle == 0.0:
        return first.clone()
    return math.cos(angle) * first + math.sin(angle) * _anchor(seed, target, proposal, index + 1, shape)


MAX_STEPS = 100
_ORDERS: dict[str, int] = {"ddim": 1, "dpmsolver++": 2}


def make_scheduler(schedule: DDIMScheduler, name: SchedulerName, steps: int) -> DPMSolverMultistepScheduler:
    """A fresh solver on a model's own noise schedule; it keeps state between steps, so it is never shared between batches.

    DDIM is DPM-Solver++ of first order (Lu et al., arXiv 2211.01095, section 4), and both run on diffusers' multistep
    solver. diffusers' ``DDIMScheduler`` steps by ``1000 // steps``, which misses the next trailing time step, and at the
    end the clean sample, wherever the number of steps does not divide 1000.

    Time steps are trailing whatever the model's folder says: they start where the noise is. At zero terminal SNR, where
    the log-SNR is infinite, diffusers puts a signal of 2⁻¹² in its place; beside unit noise that cannot be seen.

    Raises:
        InputError: unknown name, or steps outside 1 to 100.
    """
    if name not in _ORDERS:
        raise InputError(f'There is no scheduler "{name}"; choose "ddim" or "dpmsolver++".')
    if not 1 <= steps <= MAX_STEPS:
        raise InputError(f"The number of steps must be from 1 to {MAX_STEPS}, not {steps}.")
    scheduler = DPMSolverMultistepScheduler.from_config(
        schedule.config,
        algorithm_type="dpmsolver++",
        solver_order=_ORDERS[name],
        lower_order_final=True,
        final_sigmas_type="zero",
        timestep_spacing="trailing",
    )
    scheduler.set_timesteps(steps)
    return scheduler


@torch.inference_mode()
def denoise(
    predict: Callable[[Tensor, Tensor], Tensor],
    noise: Tensor,
    scheduler: DPMSolverMultistepScheduler,
    after_step: Callable[[], bool] = lambda: False,
) -> Tensor:
    """Samples of the mask latents, for proposals and for the validations of a training.

    Args:
        predict: noisy latents float32 (B, C, h, w) and time steps int64 (B,) to the networks' prediction.
        noise: (B, C, h, w), standard normal.
        scheduler: from :func:`make_scheduler`, unused so far.
        after_step: called after each step; returning true cancels.

    Returns:
        float32 (B, C, h, w), scaled latents.

    Raises:
        CancelledError: ``after_step`` returned true.
    """
    latents = noise.float() * scheduler.init_noise_sigma
    for t in scheduler.timesteps:
        timestep = torch.full((len(latents),), int(t), device=latents.device)
        prediction = predict(scheduler.scale_model_input(latents, t), timestep)
        latents = scheduler.step(prediction.float(), t, latents, return_dict=False)[0]
        if after_step():
            raise CancelledError("The request was cancelled.")
    return latents


@torch.inference_mode()
def decode(model: ProGiDiffModel, latents: Tensor) -> Tensor:
    """Mask logits float32 (B, S, S) of scaled latents, by the small mask decoder or, without one, by the autoencoder.

    The autoencoder shows a mask as a grey image in [-1, 1]; four times that serves as a logit.
    """
    card = model.card
    scale, shift = (torch.tensor(v, device=latents.device).view(1, -1, 1, 1) for v in (card.latent_scale, card.latent_shift))
    raw = (latents / scale + shift).to(model.dtype)
    if model.mask_decoder is not None:
        return model.mask_decoder(raw)[:, 0].float()
    return 4 * model.vae.decode(raw, return_dict=False)[0].mean(1).float()
