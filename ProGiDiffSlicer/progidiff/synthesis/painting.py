"""Painting of images on tissue maps: CT phases, MR sequences, and looks that no scanner has.

Every tissue, and the unlabelled body, is first divided into parts of its own shades; in the looks beyond CT each part also
gets a signed affine map of its intensities. A network that has seen enough of that finds organs by their shape and place in
contrasts that it never saw (domain randomisation, arXiv 2107.09559; parts within labels, arXiv 2403.15609).
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn import functional as F

from progidiff.synthesis.fields import Shape, blur, normal, smooth_noise, smooth_parcels, uniform, voronoi_parcels
from progidiff.synthesis.tissues import COUNT, INDEX, ORGANS, TISSUES

CT_WINDOW = (-160.0, 240.0)
AIR = -1000.0
#: Kinds of parts that a tissue is divided into, by each of the two divisions.
_KINDS = 4
_GUT = tuple(INDEX[name] for name in ("stomach", "duodenum", "colon", "small bowel", "bowel"))
_BONE = tuple(INDEX[name] for name in ("bone", "vertebra"))
_KIDNEYS = (INDEX["right kidney"], INDEX["left kidney"])


@dataclass(frozen=True)
class Anatomy:
    """What slices are painted on.

    Attributes:
        tissues: int64 (B, H, W), tissue indices.
        wall: float (B, H, W), signed distance to the body's muscular wall in mm, negative inside.
        skin: float (B, H, W), signed distance to the skin in mm, negative inside.
        pixel_mm: float (B,), size of a pixel.
        around: int64 (B, H, W) each, the tissues a little above and below, which thick slices mix in; may be empty.
        supine: whether rows run from front to back, so that gas gathers in the upper ones.
    """

    tissues: Tensor
    wall: Tensor
    skin: Tensor
    pixel_mm: Tensor
    around: tuple[Tensor, ...] = ()
    supine: bool = True

    @property
    def batch(self) -> int:
        return len(self.tissues)

    @property
    def shape(self) -> Shape:
        rows, columns = self.tissues.shape[-2:]
        return rows, columns


@dataclass(frozen=True)
class Painted:
    """A painted slice before the scanner: attenuation, and what was painted where.

    Attributes:
        hu: float (B, H, W), attenuation with inner structure but without noise and blur.
        tissues: int64 (B, H, W), tissue indices, the unlabelled body divided into fat, muscle and bowel; air is "airway".
        base: float (B, H, W), mean attenuation of the tissue at each pixel.
        parts: int64 (2, B, H, W), two divisions of the picture, each into parts of :data:`_KINDS` kinds.
    """

    hu: Tensor
    tissues: Tensor
    base: Tensor
    parts: Tensor


def _is(tissues: Tensor, members: tuple[int, ...]) -> Tensor:
    table = torch.zeros(COUNT, dtype=torch.bool, device=tissues.device)
    table[list(members)] = True
    return table[tissues]


def _gather(table: Tensor, keys: Tensor) -> Tensor:
    """Values (B, H, W) of a table (B, K) at keys (B, H, W)."""
    return torch.gather(table, 1, keys.flatten(1)).view(keys.shape)


def _share(mask: Tensor, side: int) -> Tensor:
    """Share of a mask (B, H, W) within a square of ``side`` pixels around each pixel."""
    return F.avg_pool2d(mask.float()[:, None], side, 1, side // 2, count_include_pad=False)[:, 0]


def _divisions(anatomy: Anatomy, generator: torch.Generator) -> Tensor:
    """Two divisions of each picture, a coarse and a fine one; int64 (2, B, H, W)."""
    b, shape = anatomy.batch, anatomy.shape
    cells = torch.randint(4, 9, (1,), generator=generator, device=generator.device)
    coarse = smooth_parcels(b, shape, _KINDS, int(cells), generator)
    if float(uniform((1,), 0, 1, generator)) < 0.5:
        fine = voronoi_parcels(b, shape, int(torch.randint(40, 120, (1,), generator=generator)), _KINDS, generator)
    else:
        fine = smooth_parcels(b, shape, _KINDS, int(torch.randint(12, 24, (1,), generator=generator)), generator)
    return torch.stack([coarse, fine])


def paint_attenuation(anatomy: Anatomy, generator: torch.Generator) -> Painted:
    """Attenuation of tissue maps in one of four contrast phases, with inner structure but without noise and blur."""
    b, shape, device = anatomy.batch, anatomy.shape, anatomy.tissues.device

    def chance(p: float) -> Tensor:
        return uniform((b, 1, 1), 0, 1, generator) < p

    phase = torch.multinomial(torch.tensor([0.22, 0.18, 0.45, 0.15], device=device), b, True, generator=generator)
    means = torch.tensor([t.hu for t in TISSUES], device=device)
    spread = torch.tensor([t.spread for t in TISSUES], device=device)
    lut = means.T[phase] + normal((b, COUNT), generator) * spread
    lut[:, _KIDNEYS[1]] = lut[:, _KIDNEYS[0]] + normal((b,), generator) * 6
    # Some patients: a fatty liver, or the whole table shuffled a little further, so that no order of organs is certain.
    lut = lut + (uniform((b, 1), 0, 1, generator) < 0.25) * normal((b, COUNT), generator) * 30
    parts = _divisions(anatomy, generator)

    # The unlabelled body: fat around and between the organs, a ring of muscle, loops of bowel and vessels.
    wall, skin = anatomy.wall, anatomy.skin
    empty, inside = anatomy.tissues == 0, wall < 0
    ring = inside & (wall > -uniform((b, 1, 1), 3, 13, generator)) & chance(0.75)
    field = smooth_noise(b, 1, shape, 13, generator)[:, 0] + 0.6 * smooth_noise(b, 1, shape, 28, generator)[:, 0]
    level = uniform((b, 1, 1), -0.5, 2.0, generator)
    loops = inside & (wall < -6) & (field > level)
    tissues = torch.where(empty & loops, INDEX["bowel"], anatomy.tissues)
    tissues = torch.where(empty & ring, INDEX["muscle"], tissues)
    tissues = torch.where(skin >= 0, INDEX["airway"], tissues)

    base = _gather(lut, tissues)
    mixed = base
    if anatomy.around:  # thick slices: partial volume with what lies above and below
        sides = [torch.where(around > 0, _gather(lut, around), _gather(lut, tissues)) for around in anatomy.around]
        weight = uniform((b, 1, 1), 0.0, 0.33, generator) * chance(0.6)
        mixed = base * (1 - weight * len(sides)) + weight * torch.stack(sides).sum(0)
    uneven = torch.tensor([t.uneven for t in TISSUES], device=device)
    hu = mixed
    for part, scale in zip(parts, (1.0, 0.7), strict=True):
        shifts = normal((b, _KINDS * COUNT), generator) * uneven.repeat(_KINDS)
        gain = uniform((b, 1, 1), 0.2, 1.4, generator) * chance(0.75) * scale
        hu = hu + _gather(shifts, part * COUNT + tissues) * gain
    hu = hu + smooth_noise(b, 1, shape, 8, generator)[:, 0] * 4 + smooth_noise(b, 1, shape, 22, generator)[:, 0] * 4
    hu = _inner_structure(hu, tissues, anatomy, generator)
    rim = (skin < 0) & (skin > -2.6) & (tissues == 0)
    hu = torch.where(rim, 10 + normal((b, 1, 1), generator) * 15, hu)
    return Painted(torch.where(skin >= 0, AIR, hu), tissues, base, parts)


def _inner_structure(hu: Tensor, tissues: Tensor, anatomy: Anatomy, generator: torch.Generator) -> Tensor:
    """Renal medulla, contents and gas of the gut, vessels, lesions, fat within the pancreas, marrow."""
    b, shape = anatomy.batch, anatomy.shape
    rows = torch.arange(shape[0], device=hu.device, dtype=torch.float32)[None, :, None]

    def chance(p: float) -> Tensor:
        return uniform((b, 1, 1), 0, 1, generator) < p

    def noise(cells: int) -> Tensor:
        return smooth_noise(b, 1, shape, cells, generator)[:, 0]

    kidney = _is(tissues, _KIDNEYS)
    medulla = kidney & (_share(kidney, 7) + noise(40) * 0.05 > uniform((b, 1, 1), 0.75, 1.0, generator))
    hu = hu - (medulla & chance(0.6)) * uniform((b, 1, 1), 10, 130, generator)

    contents = noise(18)
    for members in ((INDEX["stomach"],), (INDEX["colon"],), _GUT[1:2] + _GUT[3:]):
        gut = _is(tissues, members)
        lumen = gut & (_share(gut, 3) > uniform((b, 1, 1), 0.6, 1.0, generator))
        filling = torch.tensor([8.0, 30.0, 60.0, 130.0, 260.0, 20.0], device=hu.device)
        filling = filling[torch.randint(0, 6, (b,), generator=generator, device=hu.device)][:, None, None]
        mottled = contents * uniform((b, 1, 1), 3, 30, generator) + noise(45) * uniform((b, 1, 1), 0, 25, generator)
        hu = torch.where(lumen & chance(0.65), filling + mottled, hu)
        # Gas rises to the front of a patient who lies on the back, and ends in a level.
        first = torch.where(gut, rows, torch.full_like(rows, 1e4)).amin((1, 2))[:, None, None]
        last = torch.where(gut, rows, torch.full_like(rows, -1.0)).amax((1, 2))[:, None, None]
        level = first + uniform((b, 1, 1), -0.5, 1.1, generator) * (last - first).clamp_min(0)
        flat = (rows + contents * uniform((b, 1, 1), 0, 1.5, generator) < level) & anatomy.supine
        bubbles = contents + 0.5 * noise(40) > uniform((b, 1, 1), 0.3, 2.5, generator)
        gas = lumen & torch.where(chance(0.55), flat, bubbles)
        hu = torch.where(gas & chance(0.75), uniform((b, 1, 1), -990, -600, generator), hu)

    liver = tissues == INDEX["liver"]
    vessels = noise(26).abs() < uniform((b, 1, 1), 0.02, 0.16, generator)
    hu = hu + (liver & vessels & chance(0.7)) * (normal((b, 1, 1), generator) * 25 + 8)
    solid = (tissues > 0) & (tissues <= INDEX["pancreas"])
    spots = noise(10) > uniform((b, 1, 1), 1.7, 3.2, generator)
    hu = hu + (solid & spots & chance(0.4)) * normal((b, 1, 1), generator) * 50
    fatty = (tissues == INDEX["pancreas"]) & chance(0.5)  # lobulated pancreas: fat between the lobules
    hu = hu - fatty * (noise(45) > 0.8) * uniform((b, 1, 1), 20, 110, generator)

    bone = _is(tissues, _BONE)
    marrow = bone & (_share(bone, 3) > 0.99)
    hu = (
        hu
        - (marrow & chance(0.8)) * uniform((b, 1, 1), 20, 200, generator)
        + (bone & ~marrow) * uniform((b, 1, 1), 0, 350, generator)
    )
    lung = tissues == INDEX["lung"]
    hu = torch.where(
        lung & (noise(36) > uniform((b, 1, 1), 1.5, 2.6, generator)), uniform((b, 1, 1), -200, 60, generator), hu
    )
    pool = _is(tissues, (INDEX["urinary bladder"], INDEX["gallbladder"])) & chance(0.12)  # contrast or stones at the bottom
    return torch.where(pool & (contents > 0.7), uniform((b, 1, 1), 90, 400, generator), hu)


def _signed_parts(image: Tensor, painted: Painted, generator: torch.Generator) -> Tensor:
    """Every part with an affine map of its own grey values, now and then inverted; organs are told apart by less."""
    b = len(image)
    organ = torch.zeros(COUNT, device=image.device)
    organ[1 : len(ORGANS) + 1] = 1.0
    calm = organ * uniform((b, 1), 0.5, 1.0, generator)  # how much less the organs are divided, per picture
    for part, probability in zip(painted.parts, (0.7, 0.5), strict=True):
        count = _KINDS * COUNT
        quiet = 1 - calm.repeat(1, _KINDS)
        gain = 1 + (uniform((b, count), 0.4, 1.6, generator) - 1) * quiet
        sign = torch.where(uniform((b, count), 0, 1, generator) < 0.25 * quiet, -1.0, 1.0)
        shift = normal((b, count), generator) * (0.04 + 0.2 * quiet)
        keys = part * COUNT + painted.tissues
        changed = ((image - 0.5) * _gather(gain * sign, keys) + 0.5 + _gather(shift, keys)).clamp(0, 1)
        on = (uniform((b, 1, 1), 0, 1, generator) < probability) & (painted.hu > -400)
        image = torch.where(on, changed, image)
    return image


def sequence_contrast(painted: Painted, generator: torch.Generator) -> Tensor:
    """The look of an MR sequence: T1, T2, with and without fat, opposed phase; float (B, H, W) in [0, 1]."""
    b, device = len(painted.hu), painted.hu.device
    signal = torch.tensor([t.signal for t in TISSUES], device=device)  # (T, sequences)
    which = torch.randint(0, signal.shape[1], (b,), generator=generator, device=device)
    lut = signal.T[which] + normal((b, COUNT), generator) * 0.07
    lut[:, _KIDNEYS[1]] = lut[:, _KIDNEYS[0]]
    detail = ((painted.hu - painted.base) / 220).clamp(-0.4, 0.4) * (0.5 + normal((b, 1, 1), generator))
    image = (_gather(lut, painted.tissues) + detail * (painted.hu > -400)).clamp(0, 1)
    image = torch.where(painted.hu <= -400, uniform((b, 1, 1), 0, 0.06, generator), image)
    opposed = (which == 2)[:, None, None]  # water and fat cancel where they share a voxel: dark lines around organs
    fat = (painted.tissues == 0).float()
    border = (_share(fat > 0, 3) - 0.5).abs() < 0.2
    return torch.where(opposed & border, image * 0.35, image)


def mr_curve(hu: Tensor, generator: torch.Generator) -> Tensor:
    """An MR-like look: grey value as a random smooth, often non-monotonic function of attenuation; float in [0, 1].

    Water-rich tissue may be bright or dark, fat bright, suppressed or in between; bone and air are dark.
    """
    b = hu.shape[0]
    knots = uniform((b, 12), 0, 1, generator)
    position = ((hu + 200) / 500).clamp(0, 0.999) * 11
    low = position.floor().long()
    frac = position - low
    image = _gather(knots, low) * (1 - frac) + _gather(knots, (low + 1).clamp_max(11)) * frac
    return torch.where(hu < -400, uniform((b, 1, 1), 0, 0.08, generator), image)


def random_contrast(painted: Painted, generator: torch.Generator) -> Tensor:
    """Any look at all: a random grey value per tissue; float (B, H, W) in [0, 1]."""
    b = len(painted.hu)
    lut = uniform((b, COUNT), 0, 1, generator)
    lut[:, _KIDNEYS[1]] = lut[:, _KIDNEYS[0]]  # left and right look alike on every modality
    detail = ((painted.hu - painted.base) / 400).clamp(-0.3, 0.3) * normal((b, 1, 1), generator)
    image = _gather(lut, painted.tissues) + detail
    return torch.where(painted.hu <= AIR + 1, uniform((b, 1, 1), 0, 0.06, generator), image).clamp(0, 1)


def mr_image(painted: Painted, generator: torch.Generator) -> Tensor:
    """A picture of an MR scanner, real or impossible; float (B, H, W) in [0, 1]."""
    look = float(uniform((1,), 0, 1, generator))
    if look < 0.4:
        image = sequence_contrast(painted, generator)
        image = _signed_parts(image, painted, generator) if look < 0.15 else image
    elif look < 0.65:
        image = _signed_parts(mr_curve(painted.hu, generator), painted, generator)
    else:
        image = _signed_parts(random_contrast(painted, generator), painted, generator)
    return mr_look(image, generator)


def recoloured(image: Tensor, painted: Painted, generator: torch.Generator) -> Tensor:
    """A real MR image in other contrasts: its grey values are divided into clusters, each with a signed affine map.

    The clusters are cuts of the grey values at random quantiles, a k-means on one feature that needs no iterations.
    """
    b = len(image)
    quantiles = uniform((_KINDS - 1,), 0.3, 0.98, generator).sort().values
    cuts = torch.quantile(image.flatten(1)[:, ::7], quantiles, dim=1).T[:, :, None, None]  # (B, K - 1, 1, 1)
    cluster = (image[:, None] > cuts).sum(1)
    gain = uniform((b, _KINDS), 0.5, 1.6, generator)
    sign = torch.where(uniform((b, _KINDS), 0, 1, generator) < 0.3, -1.0, 1.0)
    shift = normal((b, _KINDS), generator) * 0.25
    changed = ((image - 0.5) * _gather(gain * sign, cluster) + 0.5 + _gather(shift, cluster)).clamp(0, 1)
    dark = image < 0.05
    changed = torch.where(dark, image, changed)
    image = torch.where(uniform((b, 1, 1), 0, 1, generator) < 0.5, changed, image)
    return mr_look(_signed_parts(image, painted, generator), generator)


def add_table(hu: Tensor, generator: torch.Generator, probability: float = 0.5) -> Tensor:
    """A scanner's table in the air below some patients: one or two thin arcs; HU (B, H, W) in and out."""
    b, height, width = hu.shape
    rows = torch.arange(height, device=hu.device, dtype=torch.float32)
    columns = torch.arange(width, device=hu.device, dtype=torch.float32)
    in_body = (hu > -300).any(2)  # (B, H): rows that the body reaches
    back = torch.where(in_body, rows, rows.new_zeros(())).amax(1)[:, None, None]
    column = (columns[None, None, :] - width / 2 - normal((b, 1, 1), generator) * 8) / (width / 2)
    top = back + uniform((b, 1, 1), -2, 12, generator) - column**2 * uniform((b, 1, 1), 0, 40, generator)
    below = rows[None, :, None] - top
    thickness = uniform((b, 1, 1), 0.5, 2.5, generator)
    second = (below - uniform((b, 1, 1), 8, 22, generator)).abs() < thickness
    arc = (below.abs() < thickness) | (second & (uniform((b, 1, 1), 0, 1, generator) < 0.5))
    arc = arc & (column.abs() < uniform((b, 1, 1), 0.5, 1.1, generator)) & (hu < -500)
    arc = arc & (uniform((b, 1, 1), 0, 1, generator) < probability)
    return torch.where(arc, uniform((b, 1, 1), -400, 500, generator), hu)


def ct_windows(batch: int, generator: torch.Generator) -> tuple[Tensor, Tensor]:
    """Low end and width of jittered soft-tissue windows, float (B,) each.

    Display windows found in the wild are among them: fat near black, or all black; narrow or wide.
    """
    low = CT_WINDOW[0] + normal((batch,), generator) * 15
    width = (CT_WINDOW[1] - CT_WINDOW[0]) * torch.exp(normal((batch,), generator) * 0.12)
    other = uniform((batch,), 0, 1, generator) < 0.4
    low = torch.where(other, low + uniform((batch,), 0, 170, generator), low)
    return low, torch.where(other, width * uniform((batch,), 0.5, 1.3, generator), width)


def ct_look(hu: Tensor, low: Tensor, width: Tensor, generator: torch.Generator, table: bool = True) -> Tensor:
    """Blur or sharpening, correlated noise, window and sometimes 8 bits; float (B, H, W) in [0, 1]."""
    b, shape = hu.shape[0], (hu.shape[1], hu.shape[2])
    hu = (add_table(hu, generator) if table else hu).clamp(-1000, 1000)
    soft = blur(hu[:, None], uniform((b,), 0.2, 0.9, generator))[:, 0]
    sharp = uniform((b, 1, 1), 0, 1, generator) < 0.15
    hu = torch.where(sharp, hu + (hu - soft).clamp(-150, 150) * uniform((b, 1, 1), 0.2, 1.0, generator), soft)
    grain = blur(normal((b, 1, *shape), generator), uniform((b,), 0.2, 0.9, generator))[:, 0]
    grain = grain / grain.std((-2, -1), keepdim=True)
    hu = hu + grain * torch.exp(uniform((b, 1, 1), 1.0, 3.5, generator))  # 3-33 HU
    return ((hu - low[:, None, None]) / width[:, None, None]).clamp(0, 1)


def mr_look(image: Tensor, generator: torch.Generator) -> Tensor:
    """Blur, Rician-like noise, bias field, now and then ghosts of motion, and rescaling; float (B, H, W) in [0, 1]."""
    b, shape = image.shape[0], (image.shape[1], image.shape[2])
    x = blur(image[:, None], uniform((b,), 0.2, 1.0, generator))[:, 0]
    ghost = torch.roll(x, int(torch.randint(8, 40, (1,), generator=generator)), 1)
    x = x + (uniform((b, 1, 1), 0, 1, generator) < 0.12) * ghost * uniform((b, 1, 1), 0.03, 0.15, generator)
    bias = smooth_noise(b, 1, shape, 2, generator)[:, 0] * uniform((b, 1, 1), 0.0, 0.35, generator)
    x = x * torch.exp(bias)
    noise = uniform((b, 1, 1), 0.005, 0.07, generator)
    grain = blur(normal((2 * b, 1, *shape), generator), uniform((2 * b,), 0.1, 0.8, generator))[:, 0]
    real, imaginary = (grain / grain.std((-2, -1), keepdim=True)).chunk(2, 0)
    x = torch.sqrt((x + noise * real) ** 2 + (noise * imaginary) ** 2)
    top = torch.quantile(x.flatten(1), 0.99, dim=1)[:, None, None].clamp_min(1e-3)
    return (x / top).clamp(0, 1)


def finish(image: Tensor, generator: torch.Generator) -> Tensor:
    """Last touches common to all looks: gamma, and now and then a coarser acquisition; float (B, H, W) in [0, 1]."""
    b = image.shape[0]
    image = image.clamp(0, 1) ** torch.exp(normal((b, 1, 1), generator) * 0.2)
    coarse = F.interpolate(F.avg_pool2d(image[:, None], 2), size=image.shape[-2:], mode="bilinear")[:, 0]
    return torch.where(uniform((b, 1, 1), 0, 1, generator) < 0.08, coarse, image)


def drop_organs(tissues: Tensor, generator: torch.Generator, probability: float = 0.06) -> Tensor:
    """Take single organs out of some slices (painted as unlabelled), so that presence is learned from the picture."""
    drop = uniform((tissues.shape[0], COUNT), 0, 1, generator) < probability
    drop[:, 0] = False
    return torch.where(_gather(drop, tissues), torch.zeros_like(tissues), tissues)
