"""The grid of a volume: spacing, orientation, volume, comparison, SimpleITK."""

from __future__ import annotations

import nibabel as nib
import numpy as np
import pytest

from progidiff.errors import InputError
from progidiff.volumes.axes import nearest_axes
from progidiff.volumes.geometry import Geometry

from ..volume_examples import GEOMETRIES, oblique, oriented, ramp


@pytest.mark.parametrize("name", ["LPS", "RAS", "PSR", "ARI"])
def test_orientation_names_where_i_j_and_k_grow_to(name: str) -> None:
    assert GEOMETRIES[name].orientation == name


def test_spacing_and_voxel_volume() -> None:
    assert oblique().spacing == pytest.approx((0.7, 0.7, 2.5))
    assert oblique().voxel_volume_ml == pytest.approx(0.7 * 0.7 * 2.5 / 1000)


def test_oblique_grid_has_the_nearest_orientation() -> None:
    assert oblique().orientation == "LPI"


@pytest.mark.parametrize("name", GEOMETRIES)
def test_round_trip_through_simpleitk(name: str) -> None:
    geometry = GEOMETRIES[name]
    image = geometry.to_sitk(ramp(geometry))
    back = Geometry.from_sitk(image)
    assert back.shape_ijk == geometry.shape_ijk
    np.testing.assert_allclose(back.affine, geometry.affine, rtol=0, atol=1e-12)
    corner = [n - 1 for n in geometry.shape_ijk]
    ras = (geometry.affine @ [*corner, 1])[:3]
    np.testing.assert_allclose(image.TransformIndexToPhysicalPoint(corner), ras * [-1, -1, 1], rtol=0, atol=1e-9)
    assert image[corner] == ramp(geometry)[-1, -1, -1]


def test_is_close_measures_the_farthest_voxel() -> None:
    geometry = oriented("LPS", (512, 512, 100), (0.7, 0.7, 1.0))
    affine = geometry.affine.copy()
    affine[0, 0] *= 1 + 1e-5  # 3.6 micrometres at the last column
    assert geometry.is_close(Geometry(geometry.shape_ijk, affine), tolerance_mm=1e-2)
    assert not geometry.is_close(Geometry(geometry.shape_ijk, affine), tolerance_mm=1e-3)
    assert not geometry.is_close(Geometry((512, 512, 99), geometry.affine))


def test_affine_is_a_read_only_copy() -> None:
    affine = np.eye(4)
    geometry = Geometry((2, 3, 4), affine)
    affine[0, 0] = 7.0
    assert geometry.affine[0, 0] == 1.0
    with pytest.raises(ValueError, match="read-only"):
        geometry.affine[0, 0] = 2.0


def _changed(entries: dict[tuple[int, int], float]) -> np.ndarray:
    affine = np.eye(4)
    for at, value in entries.items():
        affine[at] = value
    return affine


@pytest.mark.parametrize(
    ("affine", "says"),
    [
        (_changed({(1, 1): 0.0}), "spacing of zero"),
        (_changed({(0, 3): np.nan}), "not a number"),
        (_changed({(0, 1): 1.0, (1, 1): 0.0}), "singular"),
        (_changed({(1, 2): 0.2}), "sheared"),
        (_changed({(3, 0): 1.0}), "last row"),
    ],
)
def test_unusable_affines_are_refused_in_one_sentence(affine: np.ndarray, says: str) -> None:
    with pytest.raises(InputError, match=says) as caught:
        Geometry((4, 4, 4), affine)
    assert "\n" not in str(caught.value)


def test_32_bit_rounding_is_not_shear() -> None:
    geometry = oblique()
    rounded = geometry.affine.astype(np.float32).astype(np.float64)
    assert Geometry(geometry.shape_ijk, rounded).is_close(geometry)


@pytest.mark.parametrize("seed", range(50))
def test_nearest_axes_are_those_of_nibabel(seed: int) -> None:
    rng = np.random.default_rng(seed)
    turned, _ = np.linalg.qr(rng.normal(size=(3, 3)))
    affine = np.eye(4)
    affine[:3, :3] = turned * rng.uniform(0.3, 5, 3)
    expected = [(int(ras), int(sign)) for ras, sign in nib.orientations.io_orientation(affine)]
    assert nearest_axes(affine) == expected
