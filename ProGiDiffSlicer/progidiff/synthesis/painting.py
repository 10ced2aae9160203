"""Painting of images on tissue maps: CT phases, MR looks, fully random contrast (domain randomisation, arXiv 2107.09559)."""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn import functional as F

from progidiff.synthesis.fields import blur, normal, smooth_noise, uniform
from progidiff.synthesis.tissues import INDEX, TISSUES

CT_WINDOW = (-160.0, 240.0)
AIR = -1000.0


def paint_attenuation(tissues: Tensor, outline: Tensor, generator: torch.Generator) -> Tensor:
    """Attenuation maps of tissue maps, with inner structure but without noise and blur.

    Args:
        tissues: int64 (B, S, S), tissue indices.
        outline: float (B, S, S), signed distance to the body's muscular wall in mm, negative inside.
        generator: source of randomness.

    Returns:
        float (B, S, S) in HU.
    """
    b, size = tissues.shape[0], tissues.shape[-1]
    phase = torch.multinomial(torch.tensor([0.25, 0.2, 0.55], device=tissues.device), b, True, generator=generator)
    means = torch.tensor([t.hu for t in TISSUES], device=tissues.device)  # (T, 3)
    spread = torch.tensor([t.spread for t in TISSUES], device=tissues.device)
    lut = means.T[phase] + normal((b, len(TISSUES)), generator) * spread
    lut[:, INDEX["left kidney"]] = lut[:, INDEX["right kidney"]] + normal((b,), generator) * 6
    # Some patients: fatty liver, or the whole table shuffled a little further, so that order of organs is no certainty.
    loose = uniform((b, 1), 0, 1, generator) < 0.25
    lut = lut + loose * normal((b, len(TISSUES)), generator) * 35
    hu = torch.gather(lut, 1, tissues.flatten(1)).view_as(outline)

    fat = -100 + normal((b, 1, 1), generator) * 10
    wall = uniform((b, 1, 1), 2, 35, generator)  # subcutaneous fat, mm
    empty = tissues == 0
    inside = outline < 0
    hu = torch.where(empty, torch.where(outline < wall, fat + smooth_noise(b, 1, size, 20, generator)[:, 0] * 6, AIR), hu)
    skin = (outline >= wall) & (outline < wall + 3)
    hu = torch.where(empty & skin, fat * 0 + 10, hu)
    # Unlabelled soft tissue between the organs: bowel loops, mesentery, vessels.
    blobs = smooth_noise(b, 1, size, 14, generator)[:, 0]
    blobs = blobs + 0.6 * smooth_noise(b, 1, size, 30, generator)[:, 0]
    level = uniform((b, 1, 1), -0.6, 1.8, generator)
    soft = uniform((b, 1, 1), 5, 110, generator) + smooth_noise(b, 1, size, 9, generator)[:, 0] * 15
    hu = torch.where(empty & inside & (outline < -6) & (blobs > level), soft, hu)
    return _inner_structure(hu, tissues, generator)


def _inner_structure(hu: Tensor, tissues: Tensor, generator: torch.Generator) -> Tensor:
    """Renal cortex and medulla, gas and contents of the gut, hepatic vessels, focal lesions, slow variation everywhere."""
    b, size = tissues.shape[0], tissues.shape[-1]

    def chance(p: float) -> Tensor:
        return uniform((b, 1, 1), 0, 1, generator) < p

    kidney = (tissues == INDEX["left kidney"]) | (tissues == INDEX["right kidney"])
    depth = F.avg_pool2d(kidney.float()[:, None], 7, 1, 3)[:, 0]
    medulla = kidney & (
        depth + smooth_noise(b, 1, size, 40, generator)[:, 0] * 0.05 > uniform((b, 1, 1), 0.75, 1.0, generator)
    )
    hu = hu - (medulla & chance(0.6)) * uniform((b, 1, 1), 10, 150, generator)

    gut = (tissues == INDEX["stomach"]) | (tissues == INDEX["bowel"]) | (tissues == INDEX["duodenum"])
    contents = smooth_noise(b, 1, size, 18, generator)[:, 0]
    # Gas rises to the anterior side, fluid and contrast settle behind it.
    rise = torch.linspace(1.2, -1.2, size, device=hu.device)[None, :, None]
    gas = gut & (contents * 0.8 + rise > uniform((b, 1, 1), 0.0, 3.0, generator))
    hu = torch.where(gas & chance(0.7), uniform((b, 1, 1), -950, -600, generator), hu)
    fill = torch.tensor([10.0, 40.0, 120.0, 250.0, 20.0], device=hu.device)
    filling = fill[torch.randint(0, 5, (b,), generator=generator, device=hu.device)][:, None, None]
    lumen = gut & ~gas & (F.avg_pool2d(gut.float()[:, None], 5, 1, 2)[:, 0] > 0.95)
    hu = torch.where(lumen & chance(0.5), filling + contents * 15, hu)

    liver = tissues == INDEX["liver"]
    vessels = smooth_noise(b, 1, size, 26, generator)[:, 0].abs() < uniform((b, 1, 1), 0.02, 0.16, generator)
    hu = hu + (liver & vessels & chance(0.7)) * (normal((b, 1, 1), generator) * 25 + 8)

    solid = (tissues > 0) & (tissues <= INDEX["pancreas"])
    spots = smooth_noise(b, 1, size, 10, generator)[:, 0] > uniform((b, 1, 1), 1.7, 3.2, generator)
    hu = hu + (solid & spots & chance(0.4)) * normal((b, 1, 1), generator) * 50
    fatty = (tissues == INDEX["pancreas"]) & chance(0.5)  # lobulated pancreas: fat between the lobules
    hu = hu - fatty * (smooth_noise(b, 1, size, 45, generator)[:, 0] > 0.8) * uniform((b, 1, 1), 20, 110, generator)
    slow = smooth_noise(b, 1, size, 8, generator)[:, 0] * 5 + smooth_noise(b, 1, size, 24, generator)[:, 0] * 5
    return hu + (tissues > 0) * slow


def random_contrast(hu: Tensor, tissues: Tensor, generator: torch.Generator) -> Tensor:
    """Any look at all: a random grey value per tissue, and a random smooth curve for the rest; float (B, S, S) in [0, 1]."""
    b = hu.shape[0]
    lut = uniform((b, len(TISSUES)), 0, 1, generator)
    # left and right kidney, and the two kinds of vessel, look alike on every modality
    lut[:, INDEX["left kidney"]] = lut[:, INDEX["right kidney"]]
    values = torch.gather(lut, 1, tissues.flatten(1)).view_as(hu)
    detail = ((hu - 60) / 400).clamp(-0.3, 0.3) * normal((b, 1, 1), generator)
    rest = mr_curve(hu, generator)
    image = torch.where(tissues > 0, values + detail, rest)
    return torch.where(hu <= AIR + 1, uniform((b, 1, 1), 0, 0.06, generator), image).clamp(0, 1)


def mr_curve(hu: Tensor, generator: torch.Generator) -> Tensor:
    """An MR-like look: grey value as a random smooth, often non-monotonic function of tissue; float in [0, 1].

    Water-rich tissue may be bright or dark, fat bright, suppressed or in between; bone and air are dark.
    """
    b = hu.shape[0]
    knots = uniform((b, 12), 0, 1, generator)
    position = ((hu + 200) / 500).clamp(0, 0.999) * 11
    low = position.floor().long()
    frac = position - low
    left = torch.gather(knots, 1, low.flatten(1)).view_as(hu)
    right = torch.gather(knots, 1, (low + 1).clamp_max(11).flatten(1)).view_as(hu)
    image = left * (1 - frac) + right * frac
    return torch.where(hu < -400, uniform((b, 1, 1), 0, 0.08, generator), image)


def add_table(hu: Tensor, generator: torch.Generator, probability: float = 0.5) -> Tensor:
    """A scanner's table in the air below some patients: one or two thin arcs; HU (B, S, S) in and out."""
    b, size = hu.shape[0], hu.shape[-1]
    rows = torch.arange(size, device=hu.device, dtype=torch.float32)
    in_body = (hu > -300).any(2)  # (B, S): rows that the body reaches
    back = torch.where(in_body, rows, rows.new_zeros(())).amax(1)[:, None, None]
    column = (rows[None, None, :] - size / 2 - normal((b, 1, 1), generator) * 8) / (size / 2)
    top = back + uniform((b, 1, 1), -2, 12, generator) - column**2 * uniform((b, 1, 1), 0, 40, generator)
    below = rows[None, :, None] - top
    thickness = uniform((b, 1, 1), 0.5, 2.5, generator)
    second = (below - uniform((b, 1, 1), 8, 22, generator)).abs() < thickness
    arc = (below.abs() < thickness) | (second & (uniform((b, 1, 1), 0, 1, generator) < 0.5))
    arc = arc & (column.abs() < uniform((b, 1, 1), 0.5, 1.1, generator)) & (hu < -500)
    arc = arc & (uniform((b, 1, 1), 0, 1, generator) < probability)
    return torch.where(arc, uniform((b, 1, 1), -400, 500, generator), hu)


def ct_look(hu: Tensor, generator: torch.Generator) -> Tensor:
    """Blur, correlated noise and a jittered soft-tissue window; float (B, S, S) in [0, 1]."""
    b, size = hu.shape[0], hu.shape[-1]
    hu = blur(add_table(hu, generator).clamp(-1000, 1000)[:, None], uniform((b,), 0.2, 0.9, generator))[:, 0]
    grain = blur(normal((b, 1, size, size), generator), uniform((b,), 0.2, 0.9, generator))[:, 0]
    grain = grain / grain.std((-2, -1), keepdim=True)
    hu = hu + grain * torch.exp(uniform((b, 1, 1), 1.2, 3.6, generator))  # 3-36 HU
    low = CT_WINDOW[0] + normal((b, 1, 1), generator) * 20
    width = (CT_WINDOW[1] - CT_WINDOW[0]) * torch.exp(normal((b, 1, 1), generator) * 0.15)
    # Display windows found in the wild: fat near black, or all black; narrow or wide.
    other = uniform((b, 1, 1), 0, 1, generator) < 0.4
    low = torch.where(other, low + uniform((b, 1, 1), 0, 170, generator), low)
    width = torch.where(other, width * uniform((b, 1, 1), 0.5, 1.3, generator), width)
    return ((hu - low) / width).clamp(0, 1)


def mr_look(image: Tensor, generator: torch.Generator) -> Tensor:
    """Blur, Rician-like noise, bias field and rescaling of a grey image (B, S, S); float in [0, 1]."""
    b, size = image.shape[0], image.shape[-1]
    x = blur(image[:, None], uniform((b,), 0.2, 1.0, generator))[:, 0]
    bias = smooth_noise(b, 1, size, 2, generator)[:, 0] * uniform((b, 1, 1), 0.0, 0.35, generator)
    x = x * torch.exp(bias)
    noise = uniform((b, 1, 1), 0.005, 0.07, generator)
    grain = blur(normal((2 * b, 1, size, size), generator), uniform((2 * b,), 0.1, 0.8, generator))[:, 0]
    real, imaginary = (grain / grain.std((-2, -1), keepdim=True)).chunk(2, 0)
    x = torch.sqrt((x + noise * real) ** 2 + (noise * imaginary) ** 2)
    top = torch.quantile(x.flatten(1), 0.99, dim=1)[:, None, None].clamp_min(1e-3)
    return (x / top).clamp(0, 1)


def finish(image: Tensor, generator: torch.Generator) -> Tensor:
    """Last touches common to all looks: gamma, and now and then a coarser acquisition; float (B, S, S) in [0, 1]."""
    b, size = image.shape[0], image.shape[-1]
    image = image.clamp(0, 1) ** torch.exp(normal((b, 1, 1), generator) * 0.22)
    coarse = F.interpolate(F.avg_pool2d(image[:, None], 2), size=(size, size), mode="bilinear")[:, 0]
    return torch.where(uniform((b, 1, 1), 0, 1, generator) < 0.08, coarse, image)


def drop_organs(tissues: Tensor, generator: torch.Generator, probability: float = 0.06) -> Tensor:
    """Take single organs out of some slices (painted as unlabelled), so that presence is learned from the picture."""
    drop = uniform((tissues.shape[0], len(TISSUES)), 0, 1, generator) < probability
    drop[:, 0] = False
    gone = torch.gather(drop, 1, tissues.flatten(1)).view_as(tissues)
    return torch.where(gone, torch.zeros_like(tissues), tissues)


__all__ = ["add_table", "ct_look", "drop_organs", "finish", "mr_curve", "mr_look", "paint_attenuation", "random_contrast"]
