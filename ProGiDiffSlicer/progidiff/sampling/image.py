"""The engine's current image: its slices in canonical view, in the model's grey values and on the model's grid."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import numpy as np
import torch
from scipy import ndimage
from torch import Tensor
from torch.nn import functional as F

from progidiff.cards import Modality, ModelCard
from progidiff.errors import InputError
from progidiff.volumes.geometry import Geometry, nearest_axes
from progidiff.volumes.slicing import SlicePlan, extract_slice, plan_slices
from progidiff.volumes.values import NotHounsfield, likely_modality, not_hounsfield, sample
from progidiff.wire.messages import ImageInfo, image_key

Normaliser = Callable[[np.ndarray], np.ndarray]


def normaliser(array: np.ndarray, card: ModelCard, modality: Modality) -> Normaliser:
    """Function that brings slices of a volume to float32 in [0, 1], by the window that the model's card gives.

    Args:
        array: the volume (slices, rows, columns), or its voxels (n,); percentiles are taken of all of it, so that its slices
            stay comparable.
        card: the model's card.
        modality: the volume's modality.

    Raises:
        InputError: the percentiles of the volume coincide.
        ModelError: the model was not made for this modality.
    """
    window = card.window(modality)
    low, high = window.low, window.high
    if window.kind == "percentile":
        low, high = (float(v) for v in np.percentile(sample(array), [window.low, window.high]))
    if not high > low:
        raise InputError("The image is uniform where the organs should be; choose an image with contrast.")
    scale = 1.0 / (high - low)
    return lambda values: np.clip((values.astype(np.float32) - low) * scale, 0, 1)


#: Share of the grid's rows and columns that the body fills where the grid is laid on it.
BODY_SHARE = 0.95
#: Finest and coarsest pixels of such a grid, mm.
PIXEL_MM = (1.3, 3.2)
#: Logit beyond the model's grid: outside for certain.
OUTSIDE = -20.0


@dataclass(frozen=True)
class ModelGrid:
    """The model's grid laid over the slices of one volume.

    Attributes:
        size: rows and columns of the model's grid.
        pixel_mm: its pixel size.
        shape_rc: rows and columns of a slice.
        spacing_rc: pixel size of a slice in mm.
        centre_rc: where the grid's centre lies, in slice pixels.
    """

    size: tuple[int, int]
    pixel_mm: float
    shape_rc: tuple[int, int]
    spacing_rc: tuple[float, float]
    centre_rc: tuple[float, float]

    def to_model(self, image: Tensor) -> Tensor:
        """A slice (H, W) in [0, 1] on the model's grid, float32 (1, 1, rows, columns); outside the slice is 0.

        Finer slices are smoothed first, so that no detail aliases.
        """
        x = image[None, None].float()
        for axis, spacing in ((2, self.spacing_rc[0]), (3, self.spacing_rc[1])):
            x = _smooth(x, 0.4 * self.pixel_mm / spacing if self.pixel_mm > 1.25 * spacing else 0.0, axis)
        rows, cols = (
            centre + (torch.arange(size, device=image.device, dtype=torch.float32) - (size - 1) / 2) * (self.pixel_mm / mm)
            for size, centre, mm in zip(self.size, self.centre_rc, self.spacing_rc, strict=True)
        )
        return _sample(x, rows, cols)

    def from_model(self, values: Tensor, outside: float) -> Tensor:
        """Values (N, rows, columns) on the model's grid at the slice's pixels, float32 (N, H, W); ``outside`` beyond it."""
        rows, cols = (
            (torch.arange(count, device=values.device) - centre) * (spacing / self.pixel_mm) + (size - 1) / 2
            for size, count, spacing, centre in zip(self.size, self.shape_rc, self.spacing_rc, self.centre_rc, strict=True)
        )
        return _sample((values.float() - outside)[None], rows, cols)[0] + outside


def _smooth(x: Tensor, sigma: float, axis: int) -> Tensor:
    if sigma <= 0:
        return x
    radius = max(1, int(3 * sigma + 0.5))
    offsets = torch.arange(-radius, radius + 1, device=x.device, dtype=x.dtype)
    kernel = torch.exp(-0.5 * (offsets / sigma) ** 2)
    kernel = kernel / kernel.sum()
    pad = (0, 0, radius, radius) if axis == 2 else (radius, radius, 0, 0)
    shape = (1, 1, -1, 1) if axis == 2 else (1, 1, 1, -1)
    return F.conv2d(F.pad(x, pad, mode="replicate"), kernel.view(shape))


def _sample(x: Tensor, rows: Tensor, cols: Tensor) -> Tensor:
    """Bilinear samples of (1, C, H, W) at the given pixel rows and columns; 0 outside."""
    h, w = x.shape[-2:]
    gy = (rows * 2 + 1) / h - 1
    gx = (cols * 2 + 1) / w - 1
    grid = torch.stack(torch.meshgrid(gy, gx, indexing="ij")[::-1], -1)[None].to(x.dtype)
    return F.grid_sample(x, grid, mode="bilinear", padding_mode="zeros", align_corners=False)


#: Normalised grey value above which a part of a slice can belong to the body; fat may be black in a narrow window.
_BODY_LEVEL = 0.06
#: Cells that the body is looked for in, in mm; thinner things than two or three (table, sheets, wires) are not the body.
_CELL_MM = 4.0
#: Parts nearer than twice this belong together: where fat is black, nothing joins the organs to the wall around them.
_JOIN_MM = 16.0
#: Widths of arms, mm.
_ARM_MM = (40.0, 130.0)
#: Groups of parts smaller than this share of the largest one (an arm) are not the body; both legs are.
_GROUP_SHARE = 0.3


@dataclass(frozen=True)
class BodyBox:
    """Where the body lies on slices: centre (row, column) in pixels, and height and width in mm."""

    centre_rc: tuple[float, float]
    size_mm: tuple[float, float]


def body_box(slices: list[np.ndarray], spacing_rc: tuple[float, float]) -> BodyBox:
    """The body's bounding box over some normalised slices.

    Neither the table nor an arm beside the body pulls it away, and a display window in which fat is black does not make the
    body fall to pieces. Shoulders or hips on a few slices of many do not widen it: each side is where three quarters of the
    slices have it or less. Falls back to the whole image.

    Args:
        slices: float (H, W) each, in [0, 1].
        spacing_rc: pixel size in mm.
    """
    shape = slices[0].shape
    cell = max(1, round(_CELL_MM / spacing_rc[0])), max(1, round(_CELL_MM / spacing_rc[1]))
    boxes = []
    for image in slices:
        cells = _body_cells(_cell_means(image, cell) > _BODY_LEVEL)
        rows, cols = np.flatnonzero(cells.mean(1) > 0.02), np.flatnonzero(cells.mean(0) > 0.02)
        if len(rows) > 1 and len(cols) > 1:
            boxes.append([-rows[0] * cell[0], (rows[-1] + 1) * cell[0], -cols[0] * cell[1], (cols[-1] + 1) * cell[1]])
    if not boxes:
        boxes = [[0, shape[0], 0, shape[1]]]
    top, bottom, left, right = (float(v) for v in np.quantile(np.array(boxes, float), 0.75, axis=0) * (-1, 1, -1, 1))
    bottom, right = min(bottom, float(shape[0])), min(right, float(shape[1]))
    return BodyBox(
        ((top + bottom - 1) / 2, (left + right - 1) / 2),
        ((bottom - top) * spacing_rc[0], (right - left) * spacing_rc[1]),
    )


def lay_grid(
    card: ModelCard, plane: str, slices: list[np.ndarray], shape_rc: tuple[int, int], spacing_rc: tuple[float, float]
) -> ModelGrid:
    """The grid that a model wants over slices of one volume.

    Args:
        card: the model's card: a square of fixed pixels, or a rectangle that the body's width fills.
        plane: plane of the slices.
        slices: normalised slices, float (H, W) each, on which the body is looked for.
        shape_rc: rows and columns of a slice.
        spacing_rc: pixel size of a slice in mm.
    """
    body = body_box(slices, spacing_rc)
    size = card.grid_size(plane)
    pixel_mm = card.spacing_mm
    if card.body_grids:
        fitting = [mm / (side * BODY_SHARE) for mm, side in zip(body.size_mm, size, strict=True)]
        # a coronal slice goes on above and below: only its width tells the body's size
        pixel_mm = float(np.clip(max(fitting) if plane == "axial" else fitting[1], *PIXEL_MM))
    return ModelGrid(size, pixel_mm, shape_rc, spacing_rc, body.centre_rc)


def _cell_means(image: np.ndarray, cell: tuple[int, int]) -> np.ndarray:
    padded = np.pad(image, [(0, -size % count) for size, count in zip(image.shape, cell, strict=True)], mode="edge")
    return np.asarray(padded.reshape(padded.shape[0] // cell[0], cell[0], -1, cell[1]).mean((1, 3)))


def _body_cells(inside: np.ndarray) -> np.ndarray:
    """The cells of the largest groups of parts, thin parts left out."""
    thick = ndimage.binary_opening(inside, np.ones((3, 3)))
    if not thick.any():
        thick = inside
    near = ndimage.distance_transform_edt(~thick) * _CELL_MM <= _JOIN_MM
    groups, count = ndimage.label(near)
    if count > 1:
        sizes = np.bincount(groups[thick], minlength=count + 1)
        thick = np.asarray((sizes >= _GROUP_SHARE * sizes.max())[groups] & thick)
    return _without_arms(thick)


def _without_arms(cells: np.ndarray) -> np.ndarray:
    """The cells without an outermost part that has the size and the round shape of an arm and lies beside a larger trunk.

    Where fat is black the outermost part of a trunk is its wall, which is thin, or an organ larger than an arm.
    """
    parts, count = ndimage.label(cells)
    out = cells
    places = ndimage.find_objects(parts)
    columns = np.flatnonzero(cells.any(0))
    for number, (rows, cols) in enumerate(places, 1):
        height, width = ((part.stop - part.start) * _CELL_MM for part in (rows, cols))
        outermost = cols.start == columns[0] or cols.stop == columns[-1] + 1
        round_ = 0.5 < width / height < 2
        like_an_arm = outermost and round_ and _ARM_MM[0] <= width <= _ARM_MM[1] and height <= _ARM_MM[1] * 1.3
        part = parts == number
        if count > 1 and like_an_arm and part.sum() < _GROUP_SHARE * cells.sum() and part[rows, cols].mean() > 0.6:
            out = out & ~part
    return out


#: Slices on which the body is looked for.
_LOOKS = 7


@dataclass(frozen=True, eq=False)
class LoadedImage:
    """A volume made ready for sampling.

    Attributes:
        array: numeric (K, J, I), as given.
        plan: how it is cut into slices.
        backwards: whether slices are counted against the anatomical direction (from left, posterior and inferior).
        grid: the model's grid on its slices.
        normalise: scanner values to [0, 1].
        modality: as given, or guessed.
        guessed: whether the modality was guessed.
        values: what the values are where they should be Hounsfield units and cannot be, or ``None``.
        corrected: whether the caller wanted such values to be corrected.
        stated: as given.
        voxel_ml: volume of a voxel in mL.
        info: what clients are told.
    """

    array: np.ndarray
    plan: SlicePlan
    backwards: bool
    grid: ModelGrid
    normalise: Normaliser
    modality: Modality
    guessed: bool
    values: NotHounsfield | None
    corrected: bool
    stated: str | None
    voxel_ml: float
    info: ImageInfo

    def pixels(self, index: int) -> Tensor:
        """Slice ``index`` on the model's grid, float32 (1, 1, rows, columns) in [0, 1] on the CPU."""
        canonical = np.ascontiguousarray(extract_slice(self.array, self.plan, index))
        return self.grid.to_model(torch.from_numpy(self.normalise(canonical)))

    def position_mm(self, index: int) -> float:
        """Place of slice ``index`` along the patient: a slice has the same noise however the array is ordered."""
        return (self.plan.count - 1 - index if self.backwards else index) * self.plan.slice_spacing


def load_image(
    array_kji: np.ndarray,
    affine: np.ndarray,
    modality: str | None,
    plane: str | None,
    card: ModelCard,
    correct_values: bool = False,
) -> LoadedImage:
    """Make a volume ready for a model.

    Args:
        array_kji: numeric (K, J, I); HU for CT, any unit for MR.
        affine: (4, 4), IJK to RAS in mm.
        modality: "CT" or "MR"; any other code of DICOM, or ``None``, to guess from the values.
        plane: plane of the slices, or ``None`` for the one that suits volume and model.
        card: the model's card.
        correct_values: take values that cannot be Hounsfield units for what they look like.

    Raises:
        InputError: the geometry or the values cannot be used.
        ModelError: the model was not made for this modality.
    """
    _check_values(array_kji)
    k, j, i = array_kji.shape
    geometry = Geometry((i, j, k), affine)
    plan = plan_slices(geometry, plane, card.planes)
    in_order = np.moveaxis(array_kji, plan.axis, 0)
    known = _modality(in_order, modality, card)
    values = _values(in_order, known, modality not in ("CT", "MR"), card)
    normalise = normaliser(in_order, card, known)
    if correct_values and values is not None and known == "CT":
        normalise = _after(values, normalise)
    if not any(np.ptp(normalise(extract_slice(array_kji, plan, s))) > 0 for s in range(plan.count)):
        seen = "" if values is None else f"; its values look like {values.looks}"
        raise InputError(
            f"The image shows no contrast in the model's window{seen}; check its modality, or choose another image."
        )
    backwards = nearest_axes(geometry.affine)[2 - plan.axis][1] < 0
    looks = np.linspace(0, plan.count - 1, min(plan.count, _LOOKS)).round().astype(int)
    places = plan.count - 1 - looks if backwards else looks
    looked_at = [normalise(extract_slice(array_kji, plan, int(s))) for s in places]
    return LoadedImage(
        array=array_kji,
        plan=plan,
        backwards=backwards,
        grid=lay_grid(card, plan.plane, looked_at, plan.shape_rc, plan.spacing_rc),
        normalise=normalise,
        modality=known,
        guessed=modality not in ("CT", "MR"),
        stated=modality,
        values=values,
        corrected=correct_values,
        voxel_ml=geometry.voxel_volume_ml,
        info=ImageInfo(
            content_hash=image_key(array_kji, geometry.affine, modality, plane, correct_values),
            plane=plan.plane,
            slice_count=plan.count,
            slice_shape=plan.shape_rc,
            spacing_rc=plan.spacing_rc,
            slice_spacing=plan.slice_spacing,
        ),
    )


def _check_values(array: np.ndarray) -> None:
    if array.ndim != 3:
        raise InputError("The image is not a single 3-D volume; choose one frame or channel of it.")
    if array.dtype.kind not in "iuf":
        raise InputError(f"The image holds {array.dtype} and not grey values; choose a CT or MR volume.")
    # one plane at a time: a mask of a whole volume would need a quarter of its memory again
    if array.dtype.kind == "f" and not all(np.isfinite(part).all() for part in array):
        raise InputError("The image holds values that are not numbers (NaN or infinite); replace them first.")


def _modality(array: np.ndarray, stated: str | None, card: ModelCard) -> Modality:
    """The stated modality, or a guess among those of the model."""
    if stated in ("CT", "MR"):
        card.window(stated)  # raises where there is none
        return "MR" if stated == "MR" else "CT"
    return card.modalities[0] if len(card.modalities) == 1 else likely_modality(array)


def _values(array: np.ndarray, modality: Modality, guessed: bool, card: ModelCard) -> NotHounsfield | None:
    """What should be Hounsfield units and is not.

    Of an image that does not say its modality and does not look like a CT only what no MR looks like, as those are scaled.
    """
    if modality == "CT":
        return not_hounsfield(array) if card.window("CT").kind == "hu" else None
    found = not_hounsfield(array) if guessed and "CT" in card.modalities else None
    return found if found is not None and found.scale == 1.0 else None


def _after(values: NotHounsfield, normalise: Normaliser) -> Normaliser:
    return lambda part: normalise(values.corrected(part))
