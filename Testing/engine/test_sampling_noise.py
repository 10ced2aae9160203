"""Noise fields: standard normal, alike on neighbouring slices, and a function of seed, target, proposal and place only."""

from __future__ import annotations

import itertools

import pytest
import torch

from progidiff.sampling.denoise import ANCHOR_MM, proposal_noise

SHAPE = (4, 40, 40)


def _correlation(a: torch.Tensor, b: torch.Tensor) -> float:
    return float(torch.corrcoef(torch.stack([a.flatten(), b.flatten()]))[0, 1])


@pytest.mark.parametrize("position", [0.0, 5.0, 30.0, 59.9, 60.0, 333.3, -17.0])
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
    for a, b in itertools.combinations(fields, 2):
        assert abs(_correlation(a, b)) < 0.06


def test_field_is_repeatable_and_the_callers_own() -> None:
    first = proposal_noise(7, "liver", 2, 0.0, SHAPE)
    kept = first.clone()
    first.zero_()
    for other in range(20):  # whatever else was drawn in between, in whatever order
        proposal_noise(7, "spleen", 19 - other, 3.0 * other, SHAPE)
    assert torch.equal(proposal_noise(7, "liver", 2, 0.0, SHAPE), kept)


def test_field_does_not_touch_the_global_generator() -> None:
    torch.manual_seed(3)
    expected = torch.rand(4)
    torch.manual_seed(3)
    proposal_noise(11, "liver", 0, 1.0, SHAPE)
    assert torch.equal(torch.rand(4), expected)
