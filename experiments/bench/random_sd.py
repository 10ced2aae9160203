"""A model of Stable Diffusion's size with random weights: nothing is downloaded, and times do not depend on them."""

from __future__ import annotations

from typing import Any

import psutil
import torch
from torch import nn

from progidiff.cards import make_card
from progidiff.errors import InputError
from progidiff.model.build import DEFAULT_WINDOWS, zero_snr_scheduler
from progidiff.model.components import quiet_libraries
from progidiff.model.folder import ProGiDiffModel
from progidiff.model.networks import ControlBranch
from progidiff.model.parameters import BACKBONES, parameter_table
from progidiff.model.parameters import _published as published_networks
from progidiff.training.small import make_tokenizer

IMAGE_SIZE = 512
_GIB = 1024**3
#: A decoder at 512 × 512 keeps a few feature maps of 256 channels at a time, 268 MB each in float32.
_BYTES_PER_PROPOSAL = 1 * _GIB


def memory_problem(name: str, device: torch.device, proposals: int) -> str | None:
    """One sentence when building and sampling would not fit into memory, else ``None``."""
    weights = 4 * sum(row.parameters for row in parameter_table(name))
    needed = 1.15 * weights + proposals * _BYTES_PER_PROPOSAL * (0.5 if device.type == "cuda" else 1.0)
    free = torch.cuda.mem_get_info()[0] if device.type == "cuda" else psutil.virtual_memory().available
    if needed <= free:
        return None
    where = "on the CUDA device" if device.type == "cuda" else "of memory"
    return (
        f"{BACKBONES[name].title} with {proposals} proposals needs about {needed / _GIB:.0f} GiB {where}, and"
        f" {free / _GIB:.0f} GiB are free; close other programs or ask for fewer --proposals."
    )


def random_model(
    name: str, device: torch.device, dtype: torch.dtype, proposals: int, image_size: int = IMAGE_SIZE
) -> ProGiDiffModel:
    """The networks of ``progidiff info --config NAME`` with random weights.

    The tokenizer is a stand-in of words that pads to CLIP's 77 tokens. The control branch's zero convolutions get small
    random weights, so that its residuals count in the check that both sides sample the same.

    Args:
        name: ``"sd15"`` or ``"sd21"``.
        device: where the networks are made.
        dtype: their floating-point type.
        proposals: how many are to be sampled, for the check of memory.
        image_size: pixels per side of the model's grid.

    Raises:
        InputError: there is too little memory.
    """
    if problem := memory_problem(name, device, proposals):
        raise InputError(problem)
    with torch.random.fork_rng(), torch.device(device):
        torch.manual_seed(0)
        networks: dict[str, Any] = dict(published_networks(BACKBONES[name]))
        _fill_zero_convolutions(networks["controlnet"])
    with quiet_libraries():
        for network in networks.values():
            network.to(dtype).eval().requires_grad_(False)
            if device.type == "cpu":
                network.to(memory_format=torch.channels_last)  # as the engine loads every model
    template = "segmentation mask of the {target}"
    tokenizer = make_tokenizer([template.format(target="liver")])
    tokenizer.model_max_length = int(BACKBONES[name].text_encoder["max_position_embeddings"])
    card = make_card(
        {
            "model_id": f"{name}-random",
            "name": f"{BACKBONES[name].title} size, random weights",
            "licence": "none: random numbers",
            "modalities": ["CT"],
            "vocabulary": ["liver"],
            "prompt_template": template,
            "windows": {"CT": DEFAULT_WINDOWS["CT"]},
            "image_size": image_size,
            "spacing_mm": 0.8,
            "latent_shift": [0.0] * 4,
            "latent_scale": [1.0] * 4,
            "trainable_parameters": 0,
        }
    )
    return ProGiDiffModel(**networks, mask_decoder=None, tokenizer=tokenizer, scheduler=zero_snr_scheduler(), card=card)


def _fill_zero_convolutions(branch: nn.Module) -> None:
    assert isinstance(branch, ControlBranch)
    for convolution in (*branch.controlnet_down_blocks, branch.controlnet_mid_block):
        nn.init.normal_(convolution.weight, std=0.02)
