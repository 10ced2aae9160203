"""Where the voxels of a volume lie in the patient, and which anatomical axis each axis of its grid runs along.

numpy only: Slicer's own Python has no nibabel.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np

from progidiff.errors import InputError

if TYPE_CHECKING:
    import SimpleITK as sitk


# ITK, NRRD and DICOM point to the patient's Left and Posterior, Slicer and NIfTI to the Right and Anterior.
LPS_FROM_RAS = np.diag([-1.0, -1.0, 1.0, 1.0])

# Cosine between two grid axes above which a grid counts as sheared. A gantry tilt of one degree is 0.017;
# affines that went through 32-bit headers are below 1e-5.
MAX_SHEAR = 1e-3


@dataclass(frozen=True, eq=False)
class Geometry:
    """A regular, possibly oblique grid.

    Attributes:
        shape_ijk: number of voxels along i, j and k (an array of the volume has shape ``shape_ijk[::-1]``).
        affine: float64 (4, 4), maps (i, j, k, 1) of voxel centres to RAS millimetres; read-only.

    Raises:
        InputError: when the affine is not finite, has a zero spacing, is singular or is sheared.
    """

    shape_ijk: tuple[int, int, int]
    affine: np.ndarray

    def __post_init__(self) -> None:
        affine = np.array(self.affine, dtype=np.float64)
        shape = tuple(int(n) for n in self.shape_ijk)
        if affine.shape != (4, 4) or len(shape) != 3 or min(shape) < 1:
            raise InputError("The image is not a three-dimensional grid; export it as a single 3-D volume.")
        if not np.isfinite(affine).all():
            raise InputError("The image's position or spacing is not a number; export it again with its geometry.")
        if not np.array_equal(affine[3], [0.0, 0.0, 0.0, 1.0]):
            raise InputError("The image's affine is not a rigid grid (its last row is not 0 0 0 1); export it again.")
        spacing = np.linalg.norm(affine[:3, :3], axis=0)
        if (spacing <= 1e-9).any():
            raise InputError(
                f"The image has a voxel spacing of zero ({_millimetres(spacing)}); "
                "correct the spacing in its header or export it again."
            )
        axes = affine[:3, :3] / spacing
        if abs(np.linalg.det(axes)) < 1e-6:
            raise InputError("The image's axes do not span space (singular affine); export it again with its geometry.")
        cosines = axes.T @ axes - np.eye(3)
        if np.abs(cosines).max() > MAX_SHEAR:
            raise InputError(
                "The image's grid is sheared, as with a tilted gantry; "
                "resample it to a rectangular grid (in Slicer: harden its transform) and use the result."
            )
        affine.setflags(write=False)
        object.__setattr__(self, "shape_ijk", shape)
        object.__setattr__(self, "affine", affine)

    @property
    def shape_kji(self) -> tuple[int, int, int]:
        """Shape of the volume's numpy array."""
        i, j, k = self.shape_ijk
        return (k, j, i)

    @property
    def spacing(self) -> tuple[float, float, float]:
        """Distance of neighbouring voxel centres along i, j and k in millimetres."""
        i, j, k = (float(s) for s in np.linalg.norm(self.affine[:3, :3], axis=0))
        return (i, j, k)

    @property
    def voxel_volume_ml(self) -> float:
        """Volume of a voxel in millilitres."""
        return float(abs(np.linalg.det(self.affine[:3, :3]))) / 1000.0

    @property
    def orientation(self) -> str:
        """Where i, j and k grow to, e.g. ``"LPS"``; the nearest anatomical directions for an oblique grid."""
        return "".join(("LR", "PA", "IS")[ras][sign > 0] for ras, sign in nearest_axes(self.affine))

    @property
    def affine_lps(self) -> np.ndarray:
        """float64 (4, 4), maps (i, j, k, 1) to LPS millimetres, as ITK, NRRD and DICOM mean them."""
        return LPS_FROM_RAS @ self.affine

    def is_close(self, other: Geometry, tolerance_mm: float = 1e-3) -> bool:
        """Whether the shapes are equal and no voxel centre is further apart than ``tolerance_mm``."""
        if self.shape_ijk != other.shape_ijk:
            return False
        # The distance between two affine images of a box is largest at one of its corners.
        corners = np.array([[i, j, k, 1] for i in (0, 1) for j in (0, 1) for k in (0, 1)], dtype=np.float64)
        corners[:, :3] *= np.array(self.shape_ijk) - 1
        apart = corners @ (self.affine - other.affine).T
        return bool(np.linalg.norm(apart[:, :3], axis=1).max() <= tolerance_mm)

    @classmethod
    def from_sitk(cls, image: sitk.Image | sitk.ImageFileReader) -> Geometry:
        """Geometry of a 3-D SimpleITK image, or of a reader that has read an image's information."""
        affine = np.eye(4)
        affine[:3, :3] = np.array(image.GetDirection()).reshape(3, 3) * np.array(image.GetSpacing())
        affine[:3, 3] = image.GetOrigin()
        i, j, k = image.GetSize()
        return cls((i, j, k), LPS_FROM_RAS @ affine)

    def to_sitk(self, array: np.ndarray) -> sitk.Image:
        """SimpleITK image of ``array`` (K, J, I) on this grid; bool becomes uint8."""
        if array.shape != self.shape_kji:
            raise ValueError(f"array of shape {array.shape} does not fit a grid of shape {self.shape_kji}")
        import SimpleITK as sitk  # a good part of the time in which Slicer's panel opens, which does not need it

        image = sitk.GetImageFromArray(array.astype(np.uint8) if array.dtype == bool else array)
        lps = self.affine_lps
        image.SetOrigin(lps[:3, 3].tolist())
        image.SetSpacing(self.spacing)
        image.SetDirection((lps[:3, :3] / np.array(self.spacing)).ravel().tolist())
        return image


def _millimetres(spacing: np.ndarray) -> str:
    return " × ".join(f"{s:g}" for s in spacing) + " mm"


def nearest_axes(affine: np.ndarray) -> list[tuple[int, int]]:
    """The RAS axis (0 R, 1 A, 2 S) that each of i, j and k is nearest to, and the sign it grows with; one to one.

    Same result as ``nibabel.io_orientation``: directions are compared after taking the rotation nearest to the affine.

    Args:
        affine: float (4, 4), IJK to RAS; regular.
    """
    directions = affine[:3, :3] / np.linalg.norm(affine[:3, :3], axis=0)
    left, _, right = np.linalg.svd(directions)
    rotation = left @ right
    found = {}
    # The axis that is clearest chooses first, so that an oblique grid's other axes take what is left.
    for ijk in np.argsort(-np.abs(rotation).max(0), kind="stable"):
        ras = int(np.argmax(np.abs(rotation[:, ijk])))
        found[int(ijk)] = (ras, 1 if rotation[ras, ijk] > 0 else -1)
        rotation[ras] = 0
    return [found[ijk] for ijk in range(3)]
