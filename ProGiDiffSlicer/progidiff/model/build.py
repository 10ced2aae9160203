"""Building an untrained ProGiDiff model around a frozen Stable Diffusion backbone (arXiv 2601.16060).

This includes the space in which masks are denoised: the noise schedule and the scaling of mask latents.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from progidiff.cards import TrainingSource, Window, make_card
from progidiff.errors import ModelError
from progidiff.model.components import (
    load_network,
    load_tokenizer,
    quiet_libraries,
    read_json,
    require_folder,
    weight_stem,
)
from progidiff.model.folder import ProGiDiffModel, Progress, save_model
from progidiff.model.parameters import (
    BACKBONES,
    SD_IMAGE_ENCODER,
    backbone_name,
)
from progidiff.places import INDEX_NAME

if TYPE_CHECKING:
    import torch
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


DEFAULT_WINDOWS: Mapping[str, Window] = {
    "CT": Window(kind="hu", low=-160, high=240),
    "MR": Window(kind="percentile", low=0.5, high=99.5),
}
_SD_LICENCE = "that of the Stable Diffusion weights it was built from (CreativeML Open RAIL-M, or as their publisher states)"


def build_from_stable_diffusion(
    sd_folder: Path,
    out: Path,
    *,
    image_size: int = 512,
    spacing_mm: float = 0.8,
    modalities: Sequence[str] = ("CT",),
    vocabulary: Sequence[str] = (),
    prompt_template: str = "segmentation mask of the {target}",
    licence: str = _SD_LICENCE,
    image_encoder: Mapping[str, Any] | None = None,
    calibration_masks: np.ndarray | None = None,
    seed: int = 0,
    dtype: torch.dtype | None = None,
    progress: Progress | None = None,
) -> ProGiDiffModel:
    """Build a model folder from a local Stable Diffusion 1.x or 2.x diffusers folder.

    The backbone (autoencoder, UNet, text encoder, tokenizer) is taken over as it is; the control branch
    starts as a copy of the UNet's encoder with zero convolutions, so that it changes nothing yet; the image
    encoder is fresh; the noise schedule is converted by :func:`zero_snr_scheduler`; mask latents are measured
    by :func:`measure_mask_latents`.

    Args:
        sd_folder: diffusers folder with safetensors weights (plain or ``fp16`` files); only local files are
            read.
        out: the new model folder (new, empty, or an earlier model, which is replaced).
        image_size: network input, pixels; a multiple of the autoencoder's stride.
        spacing_mm: in-plane spacing that slices are resampled to, mm.
        modalities: ``"CT"`` and/or ``"MR"``.
        vocabulary: canonical targets, when they are known already.
        prompt_template: text with ``{target}``.
        licence: licence of the result; that of the weights by default.
        image_encoder: ImageEncoder arguments other than stride, hint_channels and text_dim; the SD size by
            default.
        calibration_masks: bool (N, H, W), H and W multiples of the stride; eight seeded ellipses by default.
        seed: of the fresh weights and the default calibration masks.
        dtype: of the weights, float32 by default.
        progress: told a phase and a fraction in [0, 1].

    Returns:
        the model as saved, on the CPU.

    Raises:
        ModelError: not a usable Stable Diffusion folder, or settings that do not fit it.
        OutputError: ``out`` cannot be written.
    """
    report = progress or (lambda phase, fraction: None)
    sd_folder = Path(sd_folder)
    report("reading the Stable Diffusion folder", 0.0)
    backbone = _load_backbone(sd_folder, dtype)
    vae, unet, text_encoder = backbone["vae"], backbone["unet"], backbone["text_encoder"]
    stride = 2 ** (len(vae.config.block_out_channels) - 1)
    if image_size % stride:
        raise ModelError(f"The image size {image_size} is not a multiple of the autoencoder's stride {stride}; choose one.")

    report("making the control branch and the image encoder", 0.4)
    controlnet, encoder = _fresh_networks(unet, stride, SD_IMAGE_ENCODER if image_encoder is None else image_encoder, seed)

    report("measuring mask latents", 0.5)
    masks = ellipses(8, image_size, seed) if calibration_masks is None else calibration_masks
    shift, scale = measure_mask_latents(vae, masks)
    scheduler, was = _converted_scheduler(sd_folder)
    known = backbone_name(unet.config)
    title = BACKBONES[known].title if known else "Stable Diffusion"
    card = make_card(
        {
            "model_id": f"progidiff-{known or 'sd'}-untrained",
            "name": f"ProGiDiff around {title}, not trained yet",
            "licence": licence,
            "modalities": list(modalities),
            "vocabulary": list(vocabulary),
            "prompt_template": prompt_template,
            "windows": {modality: DEFAULT_WINDOWS[modality] for modality in modalities if modality in DEFAULT_WINDOWS},
            "image_size": image_size,
            "spacing_mm": spacing_mm,
            "latent_shift": shift,
            "latent_scale": scale,
            "prediction_type": scheduler.config.prediction_type,
            "trained_on": [
                TrainingSource(
                    name=f"{title} (frozen backbone)",
                    licence=licence,
                    what="image-text pairs, by its publisher",
                )
            ],
            "trainable_parameters": 0,
            "notes": (
                f"The frozen backbone was trained for {was} prediction on its publisher's noise schedule; the"
                " schedule here has zero terminal SNR with v-prediction. The control branch and image"
                " encoder are untrained."
            ),
        }
    )
    model = ProGiDiffModel(
        vae=vae,
        unet=unet,
        controlnet=controlnet,
        image_encoder=encoder,
        text_encoder=text_encoder,
        tokenizer=backbone["tokenizer"],
        scheduler=scheduler,
        mask_decoder=None,
        card=card,
    )
    report("writing the model folder", 0.7)
    save_model(model, out)
    report("the model is built", 1.0)
    return model


def _fresh_networks(unet: Any, stride: int, settings: Mapping[str, Any], seed: int) -> tuple[Any, Any]:
    """Control branch copied from the UNet, seeded image encoder; leaves the caller's random state alone."""
    import torch

    from progidiff.model.networks import ControlBranch, ImageEncoder

    with torch.random.fork_rng(devices=[]), quiet_libraries():
        torch.manual_seed(seed)
        controlnet = ControlBranch.from_unet(unet)
        try:
            encoder = ImageEncoder(
                **{
                    **settings,
                    "stride": stride,
                    "hint_channels": unet.config.block_out_channels[0],
                    "text_dim": unet.config.cross_attention_dim,
                }
            )
        except (TypeError, ValueError) as error:
            raise ModelError(f"The image encoder cannot be built ({error}); correct its settings.") from error
        fresh = (controlnet, encoder)
        for network in fresh:
            network.to(unet.dtype).eval().requires_grad_(False)
        return fresh


def _load_backbone(folder: Path, dtype: torch.dtype | None) -> dict[str, Any]:
    """Frozen parts of a Stable Diffusion folder; its relatives with other inputs are refused."""
    if folder.is_file():
        raise ModelError(
            f'"{folder.name}" is a single checkpoint file; convert it to a diffusers folder first'
            " (diffusers' convert_original_stable_diffusion_to_diffusers.py) and name that folder."
        )
    if not folder.is_dir():
        raise ModelError(f'There is no Stable Diffusion folder "{folder}"; name a local diffusers folder.')
    if not (folder / INDEX_NAME).is_file():
        raise ModelError(f'The folder "{folder}" has no {INDEX_NAME}; name a Stable Diffusion folder in diffusers\' layout.')
    if "text_encoder_2" in read_json(folder / INDEX_NAME):
        raise ModelError(f'The folder "{folder}" holds a Stable Diffusion XL model; name a 1.x or 2.x model.')

    from diffusers import AutoencoderKL, UNet2DConditionModel
    from transformers import CLIPTextModel

    classes = {"vae": AutoencoderKL, "unet": UNet2DConditionModel, "text_encoder": CLIPTextModel}
    parts: dict[str, Any] = {
        name: load_network(folder, name, cls, dtype, _variant(folder, name)) for name, cls in classes.items()
    }
    found, latent = parts["unet"].config.in_channels, parts["vae"].config.latent_channels
    if found != latent:
        raise ModelError(
            f"The UNet takes {found} channels instead of {latent} (an inpainting, depth or image-editing"
            " model); name a plain text-to-image Stable Diffusion folder."
        )
    return {**parts, "tokenizer": load_tokenizer(folder)}


def _variant(folder: Path, component: str) -> str | None:
    """``"fp16"`` where only half-precision files were downloaded."""
    sub, stem = require_folder(folder, component), weight_stem(component)
    plain = (sub / f"{stem}.safetensors", sub / f"{stem}.safetensors.index.json")
    half = (sub / f"{stem}.fp16.safetensors", sub / f"{stem}.safetensors.index.fp16.json")
    return "fp16" if any(p.is_file() for p in half) and not any(p.is_file() for p in plain) else None


def _converted_scheduler(folder: Path) -> tuple[DDIMScheduler, str]:
    config = read_json(require_folder(folder, "scheduler", "scheduler_config.json") / "scheduler_config.json")
    try:
        return zero_snr_scheduler(config), str(config.get("prediction_type", "epsilon"))
    except (TypeError, ValueError, NotImplementedError) as error:
        raise ModelError(f"The Stable Diffusion folder's noise schedule cannot be used ({error}); copy it again.") from error
