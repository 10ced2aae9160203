"""Noise fields as functions of seed, target, proposal and place; solvers against distributions known in closed form."""

from __future__ import annotations

import itertools
from typing import Any

import numpy as np
import pytest
import torch
from diffusers import DDIMScheduler
from torch import Tensor

from progidiff.errors import CancelledError, InputError
from progidiff.model.build import zero_snr_scheduler
from progidiff.sampling.denoise import ANCHOR_MM, denoise, make_scheduler, proposal_noise

SHAPE = (4, 40, 40)


def _correlation(a: torch.Tensor, b: torch.Tensor) -> float:
    return float(torch.corrcoef(torch.stack([a.flatten(), b.flatten()]))[0, 1])


@pytest.mark.parametrize("position", [0.0, 30.0, 59.9, -17.0])
def test_field_is_standard_normal_everywhere_along_the_stack(position: float) -> None:
    fields = torch.stack([proposal_noise(0, "liver", p, position, SHAPE) for p in range(12)])
    assert fields.dtype == torch.float32
    count = fields.numel()  # three standard errors
    assert abs(float(fields.mean())) < 3 / count**0.5
    assert abs(float(fields.var()) - 1) < 3 * (2 / count) ** 0.5
    assert abs(float((fields**4).mean()) - 3) < 3 * (96 / count) ** 0.5


def test_neighbouring_slices_are_alike_and_far_ones_independent() -> None:
    at = {z: proposal_noise(0, "liver", 3, z, SHAPE) for z in (0.0, 5.0, 20.0, 57.5, 62.5, 120.0, 2 * ANCHOR_MM + 200)}
    assert _correlation(at[0.0], at[5.0]) > 0.98
    assert _correlation(at[57.5], at[62.5]) > 0.98, "the noise must also go on smoothly past an anchor"
    assert 0.8 < _correlation(at[0.0], at[20.0]) < 0.95
    assert abs(_correlation(at[0.0], at[120.0])) < 0.05
    assert abs(_correlation(at[5.0], at[2 * ANCHOR_MM + 200])) < 0.05


def test_targets_proposals_and_seeds_are_independent() -> None:
    fields = [
        proposal_noise(s, t, p, 10.0, SHAPE) for s in (0, 1, 2**32, 2**40 + 1) for t in ("liver", "spleen") for p in (0, 1)
    ]
    assert max(abs(_correlation(a, b)) for a, b in itertools.combinations(fields, 2)) < 0.06


def test_field_is_repeatable_and_the_callers_own() -> None:
    state = torch.get_rng_state()
    first = proposal_noise(7, "liver", 2, 0.0, SHAPE)
    assert torch.equal(torch.get_rng_state(), state)
    kept = first.clone()
    first.zero_()
    for other in range(20):  # whatever else was drawn in between, in whatever order
        proposal_noise(7, "spleen", 19 - other, 3.0 * other, SHAPE)
    assert torch.equal(proposal_noise(7, "liver", 2, 0.0, SHAPE), kept)


MEAN, SPREAD = 0.7, 0.4
STEPS = [1, 2, 3, 4, 7, 11, 20]


def _alpha_sigma() -> tuple[np.ndarray, np.ndarray]:
    """Signal and noise levels with zero terminal SNR, float64, from the betas (Lin et al., arXiv 2305.08891)."""
    betas = np.linspace(0.00085**0.5, 0.012**0.5, 1000) ** 2
    root = np.sqrt(np.cumprod(1 - betas))
    alpha = (root - root[-1]) * root[0] / (root[0] - root[-1])
    return alpha, np.sqrt(1 - alpha**2)


def _gaussian(x: Any, alpha: Any, sigma: Any) -> tuple[Any, Any]:
    """Expected clean sample and noise at x, for clean samples from N(MEAN, SPREAD²)."""
    variance = alpha**2 * SPREAD**2 + sigma**2
    offset = x - alpha * MEAN
    return MEAN + alpha * SPREAD**2 / variance * offset, sigma / variance * offset


class _Analytic:
    """A model whose prediction is exact; notes the time steps it is asked for."""

    def __init__(self, prediction: str = "v_prediction", scheduler: DDIMScheduler | None = None) -> None:
        self.scheduler = scheduler or zero_snr_scheduler(prediction_type=prediction)
        self.dtype = torch.float32
        self.prediction = prediction
        self.asked: list[int] = []
        self.alpha, self.sigma = _alpha_sigma()

    def predict(self, noisy: Tensor, timestep: Tensor) -> Tensor:
        t = int(timestep[0])
        assert timestep.dtype == torch.int64
        assert (timestep == t).all()
        assert len(timestep) == len(noisy)
        self.asked.append(t)
        clean, noise = _gaussian(noisy.double(), self.alpha[t], self.sigma[t])
        return (clean if self.prediction == "sample" else self.alpha[t] * noise - self.sigma[t] * clean).float()


def _sample(model: Any, name: Any, steps: int, noise: Tensor) -> Tensor:
    return denoise(model.predict, noise, make_scheduler(model.scheduler, name, steps))


def _noise() -> Tensor:
    return torch.linspace(-2.5, 2.5, 24).reshape(2, 3, 2, 2)


@pytest.mark.parametrize("name", ["ddim", "dpmsolver++"])
def test_time_steps_are_trailing(name: Any) -> None:
    for steps in STEPS:
        model = _Analytic(scheduler=DDIMScheduler.from_config(zero_snr_scheduler().config, timestep_spacing="leading"))
        assert torch.isfinite(_sample(model, name, steps, _noise())).all()
        wanted = [round(1000 - i * 1000 / steps) - 1 for i in range(steps)]
        assert model.asked == pytest.approx(wanted, abs=1)  # 1: halves may be rounded either way
        assert model.asked[0] == 999


@pytest.mark.parametrize("prediction", ["v_prediction", "sample"])
@pytest.mark.parametrize("steps", STEPS)
def test_ddim_follows_its_equation(prediction: str, steps: int) -> None:
    """Song et al., arXiv 2010.02502, eq. 12 with eta = 0, from each time step to the next and to the clean sample last."""
    model = _Analytic(prediction)
    found = _sample(model, "ddim", steps, _noise())
    x = _noise().double().numpy()
    for t, following in zip(model.asked, [*model.asked[1:], None], strict=True):
        clean, noise = _gaussian(x, model.alpha[t], model.sigma[t])
        x = clean if following is None else model.alpha[following] * clean + model.sigma[following] * noise
    assert np.allclose(found.numpy(), x, atol=2e-3)


@pytest.mark.parametrize("name", ["ddim", "dpmsolver++"])
def test_many_steps_reach_the_distribution(name: Any) -> None:
    """The exact flow takes noise z to MEAN + SPREAD z; fewer steps come less near, DPM-Solver++ nearer than DDIM."""
    model = _Analytic()
    exact = MEAN + SPREAD * _noise()
    error = {n: float((_sample(model, name, n, _noise()) - exact).abs().max()) for n in (4, 20, 100)}
    assert error[100] < error[20] < error[4]
    assert error[100] < (0.06 if name == "ddim" else 0.03)


def _log_snr(model: _Analytic, t: int) -> float:
    return float(np.log(model.alpha[t] / model.sigma[t])) if t < 999 else -np.inf


@pytest.mark.parametrize("steps", [*STEPS, 50])
def test_dpm_solver_follows_its_equation(steps: int) -> None:
    """DPM-Solver++(2M), arXiv 2211.01095, algorithm 2, with a truly infinite log-SNR at the start; last step of first order.

    Beside an infinite first interval the correction of the second step vanishes.
    """
    model = _Analytic()
    found = _sample(model, "dpmsolver++", steps, _noise())
    x = _noise().double().numpy()
    before: tuple[Any, float] | None = None
    for t, following in itertools.pairwise(model.asked):
        clean, _ = _gaussian(x, model.alpha[t], model.sigma[t])
        h = _log_snr(model, following) - _log_snr(model, t)
        direction = clean if before is None else clean + h / before[1] / 2 * (clean - before[0])
        x = model.sigma[following] / model.sigma[t] * x - model.alpha[following] * np.expm1(-h) * direction
        before = clean, h
    last, _ = _gaussian(x, model.alpha[model.asked[-1]], model.sigma[model.asked[-1]])
    assert np.allclose(found.numpy(), last, atol=2e-3)


def test_batches_do_not_share_the_solvers_state() -> None:
    model = _Analytic()
    alone = _sample(model, "dpmsolver++", 6, _noise())
    _sample(model, "dpmsolver++", 6, -3 * _noise())
    assert torch.equal(_sample(model, "dpmsolver++", 6, _noise()), alone)


@pytest.mark.parametrize(("name", "steps"), [("ddim", 0), ("ddim", 101), ("dpmsolver++", -1), ("euler", 4)])
def test_impossible_schedules_are_refused(name: Any, steps: int) -> None:
    with pytest.raises(InputError, match=r"\.$"):
        make_scheduler(zero_snr_scheduler(), name, steps)


def test_cancel_ends_after_the_running_step() -> None:
    model = _Analytic()
    with pytest.raises(CancelledError):
        denoise(model.predict, _noise(), make_scheduler(model.scheduler, "ddim", 10), lambda: len(model.asked) == 3)
    assert len(model.asked) == 3
