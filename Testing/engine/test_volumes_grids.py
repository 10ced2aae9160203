"""The grid of a volume, and its canonical slices: spacing, orientation, comparison, SimpleITK; ranges of slices."""

from __future__ import annotations

import nibabel as nib
import numpy as np
import pytest

from progidiff.errors import InputError
from progidiff.volumes.geometry import Geometry, nearest_axes
from progidiff.volumes.slicing import PackedMask, extract_slice, insert_slice, parse_slice_range, plan_slices

from ..volume_examples import GEOMETRIES, oblique, oriented, ramp


@pytest.mark.parametrize("name", ["LPS", "RAS", "PSR", "ARI"])
def test_orientation_names_where_i_j_and_k_grow_to(name: str) -> None:
    assert GEOMETRIES[name].orientation == name


def test_spacing_and_voxel_volume() -> None:
    assert oblique().spacing == pytest.approx((0.7, 0.7, 2.5))
    assert oblique().voxel_volume_ml == pytest.approx(0.7 * 0.7 * 2.5 / 1000)
    assert oblique().orientation == "LPI", "the nearest one"
    rounded = oblique().affine.astype(np.float32).astype(np.float64)
    assert Geometry(oblique().shape_ijk, rounded).is_close(oblique()), "rounding to 32 bits is no shear"


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


def _changed(entries: dict[tuple[int, int], float]) -> np.ndarray:
    affine = np.eye(4)
    for at, value in entries.items():
        affine[at] = value
    return affine


@pytest.mark.parametrize(
    ("affine", "says"),
    [
        (_changed({(1, 1): 0.0}), "spacing of zero"), (_changed({(0, 3): np.nan}), "not a number"),
        (_changed({(0, 1): 1.0, (1, 1): 0.0}), "singular"), (_changed({(1, 2): 0.2}), "sheared"),
        (_changed({(3, 0): 1.0}), "last row"),
    ],
)  # fmt: skip
def test_unusable_affines_are_refused_in_one_sentence(affine: np.ndarray, says: str) -> None:
    with pytest.raises(InputError, match=says) as caught:
        Geometry((4, 4, 4), affine)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize("seed", range(8))
def test_nearest_axes_are_those_of_nibabel(seed: int) -> None:
    rng = np.random.default_rng(seed)
    turned, _ = np.linalg.qr(rng.normal(size=(3, 3)))
    affine = np.eye(4)
    affine[:3, :3] = turned * rng.uniform(0.3, 5, 3)
    expected = [(int(ras), int(sign)) for ras, sign in nib.orientations.io_orientation(affine)]
    assert nearest_axes(affine) == expected


PLANES = ["axial", "coronal", "sagittal"]
# RAS direction in which rows, columns must grow.
VIEW = {"axial": ((0, -1, 0), (-1, 0, 0)), "coronal": ((0, 0, -1), (-1, 0, 0)), "sagittal": ((0, 0, -1), (0, -1, 0))}


def _positions(geometry: Geometry) -> np.ndarray:
    """RAS position of each voxel, (K, J, I, 3)."""
    k, j, i = np.meshgrid(*(np.arange(n) for n in geometry.shape_kji), indexing="ij")
    ones = np.ones_like(i)
    return np.stack([i, j, k, ones], axis=-1) @ geometry.affine.T[:, :3]


@pytest.mark.parametrize("plane", PLANES)
@pytest.mark.parametrize("name", ["LPS", "PSR", "ARI", "oblique"])
def test_rows_and_columns_grow_in_the_canonical_directions(name: str, plane: str) -> None:
    geometry = GEOMETRIES[name]
    plan = plan_slices(geometry, plane)
    by_axis = [extract_slice(_positions(geometry)[..., n], plan, 1) for n in range(3)]
    assert by_axis[0].shape == plan.shape_rc
    steps = [np.stack([np.diff(a, axis=n).mean() for a in by_axis]) for n in (0, 1)]
    for step, direction, spacing in zip(steps, VIEW[plane], plan.spacing_rc, strict=True):
        assert np.linalg.norm(step) == pytest.approx(spacing)
        # The nearest of the six anatomical directions is the wanted one.
        assert np.argmax(np.abs(step)) == np.argmax(np.abs(direction))
        assert step @ np.array(direction) > 0


@pytest.mark.parametrize("plane", PLANES)
@pytest.mark.parametrize("name", ["PSR", "oblique", "single slice"])
def test_slices_put_back_give_the_volume(name: str, plane: str) -> None:
    geometry = GEOMETRIES[name]
    plan = plan_slices(geometry, plane)
    array = ramp(geometry)
    rebuilt = np.zeros_like(array)
    for index in range(plan.count):
        insert_slice(rebuilt, plan, index, extract_slice(array, plan, index).copy())
    np.testing.assert_array_equal(rebuilt, array)
    for beyond in (-1, plan.count):
        with pytest.raises(IndexError):
            extract_slice(array, plan, beyond)
    with pytest.raises(InputError, match="axial, coronal, sagittal"):
        plan_slices(geometry, "transversal")


def test_packed_bounds_and_overlap() -> None:
    mask = np.zeros((5, 6, 11), dtype=bool)
    assert PackedMask.from_array(mask).bounds() is None
    mask[1:3, 4, 2:10] = True
    other = np.zeros_like(mask)
    other[3, 4, 2:10] = True
    packed, beside = PackedMask.from_array(mask), PackedMask.from_array(other)
    assert packed.bounds() == ((1, 2), (4, 4), (2, 9))
    assert not packed.overlaps(beside)
    other[2, 4, 9] = True
    assert packed.overlaps(PackedMask.from_array(other))


@pytest.mark.parametrize(
    ("codes", "shape", "spacing", "plane", "axis"),
    [
        ("LPS", (9, 8, 6), (0.7, 0.7, 5.0), "axial", 0), ("LPS", (9, 8, 6), (0.7, 4.0, 0.7), "coronal", 1),
        ("PSR", (9, 8, 6), (0.7, 0.7, 4.0), "sagittal", 0),
        ("PSR", (9, 8, 6), (1.0, 1.0, 1.0), "axial", 1),  # isotropic
        ("RAS", (9, 8, 6), (1.05, 1.05, 1.0), "axial", 0),  # as good as isotropic
        ("RAS", (9, 8, 6), (3.0, 3.0, 2.2), "axial", 0),  # slices closer together than pixels are large
        ("LPS", (9, 8, 6), (0.8, 0.8, 0.5), "axial", 0),
        ("RAS", (9, 8, 6), (3.0, 3.0, 1.0), "axial", 0),  # thick both ways: neither is clear
        ("LPS", (9, 8, 6), (1.0, 1.45, 1.0), "axial", 0), ("LPS", (9, 8, 6), (1.0, 1.5, 1.0), "coronal", 1),
        ("LPS", (9, 8, 6), (1.0, 1.5, 1.2), "axial", 0),
        ("LPS", (9, 8, 1), (3.0, 3.0, 1.0), "axial", 0),  # one slice, however thin
        ("LPS", (1, 8, 9), (1.0, 3.0, 3.0), "sagittal", 2),
    ],
)  # fmt: skip
def test_acquisition_axis(
    codes: str, shape: tuple[int, int, int], spacing: tuple[float, float, float], plane: str, axis: int
) -> None:
    plan = plan_slices(oriented(codes, shape, spacing))
    assert (plan.plane, plan.axis) == (plane, axis)
    assert plan.count == shape[2 - axis]
    assert plan.slice_spacing == pytest.approx(spacing[2 - axis])


@pytest.mark.parametrize(
    ("known", "spacing", "plane"),
    [
        (("coronal",), (1.0, 1.0, 1.0), "coronal"),
        (("coronal",), (1.0, 1.0, 1.4), "coronal"),
        (("coronal", "axial"), (1.0, 1.0, 1.0), "coronal"),
        (("coronal",), (1.0, 1.0, 5.0), "axial"),  # clearly acquired so, whatever the model knows
        (("axial", "sagittal"), (4.0, 1.0, 1.0), "sagittal"),
    ],
)
def test_a_model_gets_the_planes_of_its_card(
    known: tuple[str, ...], spacing: tuple[float, float, float], plane: str
) -> None:
    assert plan_slices(oriented("LPS", (9, 8, 6), spacing), None, known).plane == plane
    assert plan_slices(oriented("LPS", (9, 8, 6), spacing), "axial", known).plane == "axial"


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("all", range(112)), ("40", range(40, 41)), ("30:50", range(30, 50)), (":5", range(5)), ("110:", range(110, 112)),
    ],
)  # fmt: skip
def test_slice_ranges(text: str, expected: range) -> None:
    assert parse_slice_range(text, 112) == expected


@pytest.mark.parametrize(
    ("text", "says"),
    [
        ("", "not a range"), ("-3", "not a range"), ("a:b", "not a range"), ("٣", "not a range"),
        ("99999999999999999999", "not a range"), ("100:113", "beyond"), ("50:30", "empty"),
    ],
)  # fmt: skip
def test_nonsense_slice_ranges(text: str, says: str) -> None:
    with pytest.raises(InputError, match=says) as caught:
        parse_slice_range(text, 112)
    assert "112 slices, 0 to 111" in str(caught.value)
