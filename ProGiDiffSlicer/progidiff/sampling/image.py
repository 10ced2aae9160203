"""The engine's current image: its slices in canonical view, on the model's grid and in the model's grey values."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from progidiff.cards import Modality, ModelCard
from progidiff.errors import InputError
from progidiff.sampling.grid import ModelGrid, lay_grid
from progidiff.sampling.intensity import Normaliser, normaliser
from progidiff.volumes.geometry import Geometry, nearest_axes
from progidiff.volumes.slicing import SlicePlan, extract_slice, plan_slices
from progidiff.volumes.values import NotHounsfield, likely_modality, not_hounsfield
from progidiff.wire.messages import ImageInfo, image_key

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
