"""Does the sampler use its noisy state? Accuracy with the state taken away from the networks (after arXiv 2609.23967).

A "diffusion" segmenter whose answer does not change when its state is destroyed is an image-only segmenter in disguise.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any, Literal

import torch
from torch import Tensor

from progidiff.model.folder import ProGiDiffModel

Ablation = Literal["none", "shuffled", "noise"]


@contextmanager
def disturbed_state(model: ProGiDiffModel, how: Ablation, seed: int = 0) -> Iterator[None]:
    """Let the networks see another noisy state than the sampler's, at every step, for as long as the context lasts.

    Args:
        model: a loaded model.
        how: ``"shuffled"`` gives every row of a batch the state of another row (another proposal, prompt or slice);
            ``"noise"`` gives fresh Gaussian noise, so that nothing of the sampling so far reaches the networks;
            ``"none"`` changes nothing.
        seed: seed of permutation and noise.
    """
    if how == "none":
        yield
        return
    generator = torch.Generator().manual_seed(seed)
    seen: list[Tensor] = []

    def control(module: torch.nn.Module, args: tuple[Any, ...]) -> tuple[Any, ...]:
        state: Tensor = args[0]
        if how == "noise":
            other = torch.randn(state.shape, generator=generator).to(state.device, state.dtype)
        else:
            # a rotation by a random amount: no row keeps its own state
            shift = int(torch.randint(1, max(len(state), 2), (1,), generator=generator))
            other = state.roll(shift, 0)
        seen[:] = [other]
        return (other, *args[1:])

    def backbone(module: torch.nn.Module, args: tuple[Any, ...]) -> tuple[Any, ...]:
        return (seen[0], *args[1:])  # both networks see the same state, as always

    hooks = [model.controlnet.register_forward_pre_hook(control), model.unet.register_forward_pre_hook(backbone)]
    try:
        yield
    finally:
        for hook in hooks:
            hook.remove()
