"""The synthetic training source: batches of painted slices with their tissue maps, on any device."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from types import MappingProxyType
from typing import Literal

import numpy as np
import torch
from scipy import ndimage
from torch import Tensor

from progidiff.sampling.image import BODY_SHARE, PIXEL_MM
from progidiff.synthesis import painting
from progidiff.synthesis.fields import Shape, linear_values, nearest_values, normal, plane_coordinates, uniform
from progidiff.synthesis.labelmaps import LabelVolume
from progidiff.synthesis.painting import Anatomy
from progidiff.synthesis.phantoms import phantom_tissues
from progidiff.synthesis.tissues import COUNT, INDEX, PHANTOM_TARGETS, TARGETS, VOCABULARY

Plane = Literal["axial", "coronal"]
#: Rows and columns of grids that are laid on the body, by plane.
BODY_GRIDS: Mapping[Plane, Shape] = MappingProxyType({"axial": (112, 160), "coronal": (144, 160)})
#: Share of coronal batches, and how far a volume has to reach from head to foot to be cut that way, mm.
_CORONAL_SHARE, _TALL_MM = 0.1, 150.0
#: Fat that is darker than this hides the skin: the body is then found by its muscular wall, HU.
_FAT_SEEN_HU = -76.0
#: Organs that lie and stretch most differently from one person to the next; they are moved more often.
_RESTLESS = frozenset(INDEX[name] for name in ("stomach", "gallbladder", "colon"))


@dataclass(frozen=True)
class SyntheticBatch:
    """Painted slices.

    Attributes:
        images: float32 (B, 1, H, W) in [0, 1].
        tissues: int64 (B, H, W), indices of :data:`progidiff.synthesis.tissues.TISSUES`.
        known: bool (B, V), which targets of :data:`progidiff.synthesis.tissues.VOCABULARY` are labelled on each slice.
    """

    images: Tensor
    tissues: Tensor
    known: Tensor

    def mask(self, target: str) -> Tensor:
        """Where a target is, bool (B, H, W); empty for one that the source does not know."""
        table = torch.zeros(COUNT, dtype=torch.bool, device=self.tissues.device)
        table[[INDEX[name] for name in TARGETS.get(target, ())]] = True
        return table[self.tissues]


@dataclass(frozen=True)
class _Frame:
    """Where the grid lies on each slice.

    Attributes:
        centre: float (B, 2), row and column of the body's middle, mm from the top left of the volume.
        size: float (B, 2), height and width of the body in mm.
        cut: float (B, 4), the field of view: mm from the centre to the top, bottom, left and right, where the picture ends.
    """

    centre: Tensor
    size: Tensor
    cut: Tensor


class _Volume:
    """A label volume on a device, with what is asked of it again and again."""

    def __init__(self, volume: LabelVolume, device: torch.device) -> None:
        self.volume = volume
        self.tissues = torch.from_numpy(volume.tissues).to(device)
        self.wall = torch.from_numpy(volume.wall).to(device)
        self.skin = None if volume.skin is None else torch.from_numpy(volume.skin).to(device)
        self.image = None if volume.image is None else torch.from_numpy(volume.image).to(device)
        self.spacing = torch.tensor(volume.spacing, device=device)
        self.known = torch.tensor([name in volume.known for name in VOCABULARY], device=device)
        inside = volume.wall < 0 if volume.skin is None else volume.skin < 0
        self.skin_box, self.wall_box = (_boxes(m, volume.spacing, device) for m in (inside, volume.wall < 0))
        sizes = np.bincount(volume.tissues.ravel(), minlength=COUNT)
        self.slices_of = [
            np.flatnonzero((volume.tissues == t).any((1, 2)))
            for t in sorted({INDEX[n] for name in volume.known for n in TARGETS[name]})
            if sizes[t]
        ]
        shaped = [t for t in range(1, INDEX["heart"] + 1) if sizes[t] > 100 and t != INDEX["lung"]]
        centres = np.array(ndimage.center_of_mass(volume.tissues > 0, volume.tissues, shaped)).reshape(-1, 3)
        ml = sizes[shaped] * float(np.prod(volume.spacing))
        self.centres = torch.tensor(centres * volume.spacing, dtype=torch.float32, device=device)
        self.radii = torch.tensor((ml * 3 / (4 * np.pi)) ** (1 / 3), dtype=torch.float32, device=device)
        self.restless = torch.tensor([3.0 if t in _RESTLESS else 1.0 for t in shaped], device=device)


def _boxes(inside: np.ndarray, spacing: Sequence[float], device: torch.device) -> Tensor:
    """Box of each plane's mask in mm, (D, 4): first and last row and column; an empty plane gets the volume's."""
    out = np.empty((len(inside), 4), np.float32)
    whole = _box(np.asarray(inside.any(0)), spacing)
    for k, plane in enumerate(inside):
        out[k] = _box(plane, spacing) if plane.sum() > 100 else whole
    return torch.from_numpy(out).to(device)


def _box(plane: np.ndarray, spacing: Sequence[float]) -> list[float]:
    rows, cols = np.flatnonzero(plane.any(1)), np.flatnonzero(plane.any(0))
    if not len(rows):
        return [0, (plane.shape[0] - 1) * spacing[1], 0, (plane.shape[1] - 1) * spacing[2]]
    return [rows[0] * spacing[1], rows[-1] * spacing[1], cols[0] * spacing[2], cols[-1] * spacing[2]]


class SyntheticSource:
    """Draws slices from label volumes and procedural phantoms, warps them in 3-D and paints them.

    Args:
        volumes: label volumes; empty for phantoms only.
        grids: rows and columns of a slice by plane; each batch is of one plane, most are axial.
        pixel_mm: pixel size in mm; ``None`` lays the grid on the body of each slice.
        device: where batches are made.
        seed: seed of this source's own generator.
        phantom_share: share of procedural phantoms when there are label volumes.
        strength: strength of the geometric augmentation, 0 to 1.
    """

    def __init__(
        self,
        volumes: Sequence[LabelVolume],
        grids: Mapping[Plane, Shape] = BODY_GRIDS,
        pixel_mm: float | None = None,
        device: torch.device | str = "cpu",
        seed: int = 0,
        phantom_share: float = 0.06,
        strength: float = 1.0,
    ) -> None:
        self.grids, self.pixel_mm, self.strength = dict(grids), pixel_mm, strength
        self.generator = torch.Generator(device=device).manual_seed(seed)
        self.device = self.generator.device
        self.volumes = [_Volume(v, self.device) for v in volumes]
        weights = [v.weight for v in volumes]
        phantoms = phantom_share if volumes else 1.0
        shares = [phantoms, *((1 - phantoms) * w / sum(weights) for w in weights)]
        tall = [v.weight if len(v.tissues) * v.spacing[0] >= _TALL_MM else 0.0 for v in volumes]
        self._shares: dict[Plane, Tensor] = {"axial": torch.tensor(shares, device=self.device)}
        if "coronal" in grids and any(tall):
            self._shares["coronal"] = torch.tensor([0.0, *tall], device=self.device)
        self.plane: Plane = "axial"  # of the batch that is made

    def state(self) -> Tensor:
        """State of the generator, for checkpoints that resume exactly."""
        return self.generator.get_state()

    def restore(self, state: Tensor) -> None:
        """Continue from a generator state."""
        self.generator.set_state(state)

    def batch(self, count: int) -> SyntheticBatch:
        """A batch of ``count`` painted slices, all of one plane."""
        coronal = "coronal" in self._shares and float(uniform((1,), 0, 1, self.generator)) < _CORONAL_SHARE
        self.plane = "coronal" if coronal else "axial"
        which = torch.multinomial(self._shares[self.plane], count, True, generator=self.generator)
        images = torch.empty(count, *self.shape, device=self.device)
        tissues = torch.empty(count, *self.shape, dtype=torch.int64, device=self.device)
        known = torch.empty(count, len(VOCABULARY), dtype=torch.bool, device=self.device)
        for kind in which.unique().tolist():
            rows = torch.nonzero(which == kind)[:, 0]
            images[rows], tissues[rows], known[rows] = (
                self._phantoms(len(rows)) if kind == 0 else self._slices(self.volumes[kind - 1], len(rows))
            )
        return SyntheticBatch(painting.finish(images, self.generator)[:, None], tissues, known)

    @property
    def shape(self) -> Shape:
        """Rows and columns of the batch that is made."""
        return self.grids[self.plane]

    # Looks ------------------------------------------------------------------------------------------------------------

    def _look(self, count: int, ct_share: float = 0.6) -> tuple[Tensor, Tensor] | None:
        """CT windows of some slices, or ``None`` for an MR look."""
        if float(uniform((1,), 0, 1, self.generator)) < ct_share:
            return painting.ct_windows(count, self.generator)
        return None

    def _paint(self, anatomy: Anatomy, window: tuple[Tensor, Tensor] | None) -> Tensor:
        painted = painting.paint_attenuation(anatomy, self.generator)
        if window is not None:
            return painting.ct_look(painted.hu, *window, self.generator, table=anatomy.supine)
        return painting.mr_image(painted, self.generator)

    def _fat_hides(self, count: int, window: tuple[Tensor, Tensor] | None) -> Tensor:
        """On which slices fat is black, so that the body seems to end at its muscular wall; bool (B,)."""
        if window is None:
            return torch.zeros(count, dtype=torch.bool, device=self.device)
        return window[0] > _FAT_SEEN_HU

    # Slices of phantoms -----------------------------------------------------------------------------------------------

    def _phantoms(self, count: int) -> tuple[Tensor, Tensor, Tensor]:
        window = self._look(count)
        half = uniform((count,), 120, 165, self.generator)
        fat = uniform((count,), 2, 35, self.generator)
        width = 2 * (half + torch.where(self._fat_hides(count, window), torch.zeros_like(fat), fat))
        pixel = self._pixels(torch.stack([width * 0.72, width], 1))
        tissues, wall = phantom_tissues(count, self.shape, pixel, self.generator, half)
        anatomy = Anatomy(tissues, wall, wall - fat[:, None, None], pixel)
        known = torch.tensor([name in PHANTOM_TARGETS for name in VOCABULARY], device=self.device)
        return self._paint(anatomy, window), tissues, known.expand(count, -1)

    # Slices of label volumes ------------------------------------------------------------------------------------------

    def _slices(self, volume: _Volume, count: int) -> tuple[Tensor, Tensor, Tensor]:
        real = volume.image is not None and float(uniform((1,), 0, 1, self.generator)) < 0.5
        is_ct = volume.volume.modality == "CT"
        window = self._look(count, (0.8 if is_ct else 0.0) if real else 0.6)
        z = self._places(volume, count)
        fat = uniform((count,), 2, 35, self.generator)
        own_skin = volume.skin is not None and (real or float(uniform((1,), 0, 1, self.generator)) < 0.6)
        frame = self._frame(volume, z, torch.zeros_like(fat) if own_skin else fat, own_skin, self._fat_hides(count, window))
        pixel = self._pixels(frame.size)
        offsets = plane_coordinates(count, self.shape, pixel, self.generator, self.strength)
        mm = self._positions(volume, z, frame.centre, offsets)
        if not real:
            mm = self._moved_organs(volume, mm)
        voxel = mm / volume.spacing
        outside = self._outside(volume, voxel)
        tissues = nearest_values(volume.tissues, voxel).long()
        tissues[outside] = 0
        wall = self._distance(volume, volume.wall, voxel)
        skin = (
            self._distance(volume, volume.skin, voxel) if own_skin and volume.skin is not None else wall - fat[:, None, None]
        )
        around: list[Tensor] = []
        if not real:
            through = uniform((count, 1, 1), 1.0, 3.5, self.generator) / volume.spacing[self._axis]
            for sign in (-1.0, 1.0):
                beside = voxel.clone()
                beside[..., self._axis] += sign * through
                around.append(nearest_values(volume.tissues, beside).long().masked_fill_(outside, 0))
            kept = painting.drop_organs(tissues, self.generator)
            gone = tissues != kept
            around = [torch.where(gone, torch.zeros_like(t), t) for t in around]
            tissues = kept
            if self.plane == "axial":
                hanging = self._stomach_for_colon(count)
                tissues, *around = (
                    torch.where(hanging & (t == INDEX["colon"]), INDEX["stomach"], t) for t in (tissues, *around)
                )
        anatomy = Anatomy(tissues, wall, skin, pixel, tuple(around), self.plane == "axial")
        if self.plane == "axial" and not real:
            anatomy = self._with_arms(anatomy, frame)
        image = self._real(volume, anatomy, voxel, outside, window) if real else self._paint(anatomy, window)
        unseen = self._unseen(frame, pixel)
        if self.plane == "coronal":  # beyond the first and last slice there is no picture
            unseen = unseen | (voxel[..., 0] < -0.5) | (voxel[..., 0] > len(volume.tissues) - 0.5)
        image = image.masked_fill(unseen, 0.0)
        tissues = tissues.masked_fill(unseen, 0)
        return image, tissues, volume.known.expand(count, -1)

    def _real(
        self, volume: _Volume, anatomy: Anatomy, voxel: Tensor, outside: Tensor, window: tuple[Tensor, Tensor] | None
    ) -> Tensor:
        """The volume's own image in other contrasts."""
        assert volume.image is not None
        pixels = linear_values(volume.image, voxel)
        painted = painting.paint_attenuation(anatomy, self.generator)
        if volume.volume.modality == "MR":
            return painting.recoloured(pixels.masked_fill(outside, 0.0), painted, self.generator)
        # a CT in another contrast phase: each organ's mean moves, its texture stays
        shift = normal((len(pixels), COUNT), self.generator) * 30
        shift[:, 0] *= 0.25
        shift = shift * (uniform((len(pixels), 1), 0, 1, self.generator) < 0.7)
        moved = pixels + torch.gather(shift, 1, anatomy.tissues.flatten(1)).view_as(pixels) * (pixels > -300)
        moved = moved.masked_fill(outside, painting.AIR)
        if window is not None:
            return painting.ct_look(moved, *window, self.generator)
        return painting.mr_image(replace(painted, hu=moved), self.generator)

    @property
    def _axis(self) -> int:
        """Axis of the volume that runs through the plane."""
        return 0 if self.plane == "axial" else 1

    def _places(self, volume: _Volume, count: int) -> Tensor:
        """Where the slices lie along the axis through them, in voxels; float (B,).

        Half of them are slices of the abdomen, some are any slices of the body, the rest hold a target chosen first, so that
        small organs are met as often as large ones.
        """
        depth = volume.tissues.shape[self._axis]
        if self.plane == "coronal":
            first, last = (volume.skin_box[:, 0].median(), volume.skin_box[:, 1].median())
            place = (first + (last - first) * uniform((count,), 0.1, 0.95, self.generator)) / volume.spacing[1]
            return place.clamp(0, depth - 1)
        kinds = uniform((count,), 0, 1, self.generator).tolist()
        draws = uniform((count, 2), 0, 1, self.generator).tolist()
        places = []
        for kind, (draw, other) in zip(kinds, draws, strict=True):
            found = volume.volume.slices
            if kind < 0.18:
                found = np.arange(depth)
            elif kind < 0.5 and volume.slices_of:
                found = volume.slices_of[int(other * len(volume.slices_of))]
            places.append(float(found[int(draw * len(found))]))
        jitter = uniform((count,), -0.5, 0.5, self.generator)
        return torch.tensor(places, device=self.device) + jitter

    def _frame(self, volume: _Volume, z: Tensor, fat: Tensor, own_skin: bool, hidden: Tensor) -> _Frame:
        """Where the body lies, as it would be found on the pictures.

        Args:
            volume: the volume.
            z: float (B,), places of the slices.
            fat: float (B,), mm between wall and skin, 0 where the volume has its own skin.
            own_skin: whether it has.
            hidden: bool (B,), whether the fat is black.
        """
        count = len(z)

        def body(index: Tensor) -> Tensor:
            box = (volume.skin_box if own_skin else volume.wall_box)[index]
            grow = torch.stack([-fat, fat, -fat, fat], 1)
            return torch.where(hidden[:, None], volume.wall_box[index], box + grow)

        if self.plane == "axial":
            index = z.round().long().clamp(0, len(volume.wall_box) - 1)
            box = body(index)
            # a volume's grid is laid over all its slices, a single slice's over itself
            span = (150 / volume.spacing[0]).round().long()
            far = index + ((uniform((count,), -1, 1, self.generator)) * span).long()
            other = body(far.clamp(0, len(volume.wall_box) - 1))
            low, high = torch.minimum(box, other), torch.maximum(box, other)
            union = torch.stack([low[:, 0], high[:, 1], low[:, 2], high[:, 3]], 1)
            box = torch.where(uniform((count, 1), 0, 1, self.generator) < 0.5, union, box)
            top, bottom, left, right = box.unbind(1)
        else:
            box = body(torch.randint(0, len(volume.wall_box), (count,), generator=self.generator, device=self.device))
            left, right = box[:, 2], box[:, 3]
            ends = (len(volume.tissues) - 1) * volume.spacing[0]
            width = right - left
            height = width * self.shape[0] / self.shape[1] * BODY_SHARE
            middle = (
                uniform((count,), 0, 1, self.generator) * (ends - height).clamp_min(0) + height.clamp_max(float(ends)) / 2
            )
            top, bottom = middle - height / 2, middle + height / 2
        centre = torch.stack([(top + bottom) / 2, (left + right) / 2], 1)
        size = torch.stack([bottom - top, right - left], 1)
        return self._with_field_of_view(centre, size)

    def _with_field_of_view(self, centre: Tensor, size: Tensor) -> _Frame:
        """Now and then a field of view that leaves out a part of the body; the grid is laid on what is left."""
        count = len(centre)
        narrow = (uniform((count, 1), 0, 1, self.generator) < 0.12 * self.strength) & (self.plane == "axial")
        share = uniform((count, 4), -0.25, 0.3, self.generator).clamp_min(0) * narrow
        start = torch.stack(
            [centre[:, 0] - size[:, 0] * (0.5 - share[:, 0]), centre[:, 1] - size[:, 1] * (0.5 - share[:, 2])], 1
        )
        end = torch.stack(
            [centre[:, 0] + size[:, 0] * (0.5 - share[:, 1]), centre[:, 1] + size[:, 1] * (0.5 - share[:, 3])], 1
        )
        left = end - start
        far = torch.full_like(share, 1e4)
        half = torch.stack([left[:, 0], left[:, 0], left[:, 1], left[:, 1]], 1) / 2
        return _Frame((start + end) / 2, left, torch.where(share > 0, half, far))

    def _unseen(self, frame: _Frame, pixel: Tensor) -> Tensor:
        """Pixels beyond the field of view, bool (B, H, W)."""
        rows, cols = ((torch.arange(side, device=self.device) - (side - 1) / 2) for side in self.shape)
        y, x = rows[None, :, None] * pixel[:, None, None], cols[None, None, :] * pixel[:, None, None]
        top, bottom, left, right = (part[:, None, None] for part in frame.cut.unbind(1))
        return (y < -top) | (y > bottom) | (x < -left) | (x > right)

    def _pixels(self, size: Tensor) -> Tensor:
        """Pixel size of each slice in mm, float (B,), for bodies of ``size`` (B, 2); a little wrong, sometimes more."""
        if self.pixel_mm is not None:
            return torch.full((len(size),), self.pixel_mm, device=self.device)
        grid = torch.tensor(self.shape, device=self.device) * BODY_SHARE
        fitting = size / grid
        pixel = fitting.amax(1) if self.plane == "axial" else fitting[:, 1]
        wrong = torch.exp(normal((len(size),), self.generator) * 0.05)
        worse = torch.exp(uniform((len(size),), -0.2, 0.3, self.generator))
        wrong = torch.where(uniform((len(size),), 0, 1, self.generator) < 0.1, worse, wrong)
        return pixel.clamp(*PIXEL_MM) * (1 + (wrong - 1) * self.strength)

    def _positions(self, volume: _Volume, z: Tensor, centre: Tensor, offsets: Tensor) -> Tensor:
        """Places (B, H, W, 3) along the volume's axes (z, row, column) in mm, of offsets in the picture."""
        through = (z * volume.spacing[self._axis])[:, None, None] + offsets[..., 0]
        down, across = centre[:, None, None, 0] + offsets[..., 1], centre[:, None, None, 1] + offsets[..., 2]
        if self.plane == "axial":
            return torch.stack([through, down, across], -1)
        # a coronal picture has the head above: its rows run against the volume's first axis
        top = (len(volume.tissues) - 1) * volume.spacing[0]
        return torch.stack([top - down, through, across], -1)

    def _moved_organs(self, volume: _Volume, mm: Tensor) -> Tensor:
        """Places warped around two organs, which grow, shrink and move while their neighbours give way."""
        for _ in range(2):
            pick = torch.multinomial(volume.restless, len(mm), True, generator=self.generator)
            centre, radius = volume.centres[pick][:, None, None], volume.radii[pick][:, None, None, None].clamp_min(8)
            away = mm - centre
            near = torch.exp(-away.square().sum(-1, keepdim=True) / (2 * (1.3 * radius) ** 2))
            grow = (normal((len(mm), 1, 1, 1), self.generator) * 0.22).clamp(-0.45, 0.45)
            stretch = (normal((len(mm), 1, 1, 3), self.generator) * 0.12).clamp(-0.25, 0.25)
            # along the body organs differ most: a stomach may reach from the diaphragm to below the kidneys
            reach = torch.tensor([2.0, 1.0, 1.0], device=self.device)
            move = (normal((len(mm), 1, 1, 3), self.generator) * 0.2).clamp(-0.4, 0.4) * reach * radius
            mm = mm + near * ((grow + stretch) * away + move) * self.strength
        return mm

    def _stomach_for_colon(self, count: int) -> Tensor:
        """Where some slices have a stomach in place of the colon, bool (B, H, W): in front, on the patient's left.

        In many people a long stomach hangs there down to the kidneys; in the few whole patients it is the colon's place.
        """
        rows, cols = (torch.linspace(-0.5, 0.5, side, device=self.device) for side in self.shape)
        here = uniform((count, 1, 1), 0, 1, self.generator) < 0.5 * self.strength
        back, right, left = (
            uniform((count, 1, 1), low, high, self.generator) for low, high in ((-0.2, 0.1), (-0.15, 0.1), (0.15, 0.5))
        )
        return here & (rows[None, :, None] < back) & (cols[None, None, :] > right) & (cols[None, None, :] < left)

    def _outside(self, volume: _Volume, voxel: Tensor) -> Tensor:
        """Places in front of, behind or beside the volume: there is nothing there; above and below the border goes on."""
        limits = torch.tensor(volume.tissues.shape[1:], device=self.device) - 1.0
        return ((voxel[..., 1:] < 0) | (voxel[..., 1:] > limits)).any(-1)

    def _distance(self, volume: _Volume, field: Tensor, voxel: Tensor) -> Tensor:
        limits = torch.tensor(volume.tissues.shape[1:], device=self.device) - 1.0
        excess = torch.maximum(-voxel[..., 1:], voxel[..., 1:] - limits).clamp_min(0) * volume.spacing[1:]
        values = nearest_values(field, voxel).float()
        beside = excess.sum(-1)
        return torch.where(beside > 0, values.clamp_min(-4) + beside, values)

    def _with_arms(self, anatomy: Anatomy, frame: _Frame) -> Anatomy:
        """Arms beside some bodies, partly within the picture."""
        count = anatomy.batch
        some = uniform((count, 1, 1), 0, 1, self.generator) < 0.1 * self.strength
        if not bool(some.any()):
            return anatomy
        rows, cols = ((torch.arange(side, device=self.device) - (side - 1) / 2) for side in self.shape)
        y, x = (axis * anatomy.pixel_mm[:, None, None] for axis in (rows[None, :, None], cols[None, None, :]))
        tissues, skin = anatomy.tissues, anatomy.skin
        for side in (-1.0, 1.0):
            radius = uniform((count, 1, 1), 32, 50, self.generator)
            middle = side * (frame.size[:, 1, None, None] / 2 + radius + uniform((count, 1, 1), 2, 25, self.generator))
            away = torch.hypot(x - middle, y - uniform((count, 1, 1), -40, 60, self.generator)) - radius
            arm = some & (away < 0) & (skin >= 0)
            tissues = torch.where(arm & (away < -8), INDEX["muscle"], tissues)
            tissues = torch.where(arm & (away < -(radius - 11)), INDEX["bone"], tissues)
            skin = torch.where(some, torch.minimum(skin, away), skin)
        return replace(anatomy, tissues=tissues, skin=skin)
