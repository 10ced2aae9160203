"""Between a slice's own pixels and the model's grid: no shift, no mirror image, nothing invented outside."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from progidiff.sampling.image import ModelGrid, body_box, lay_grid
from progidiff.training.default import empty_card

# name, shape, spacing (mm), centre (pixels): the grid has 160 pixels of 2.4 mm, 384 mm in all
LAYOUTS = {
    "finer": ((512, 512), (0.75, 0.75), (255.5, 255.5)),
    "coarser": ((90, 80), (4.1, 4.5), (44.5, 39.5)),
    "same": ((160, 160), (2.4, 2.4), (79.5, 79.5)),
    "anisotropic": ((120, 301), (3.0, 1.1), (59.5, 150.0)),
    "odd": ((257, 131), (1.3, 2.7), (128.0, 65.0)),
    "off centre": ((400, 400), (0.9, 0.9), (170.25, 231.75)),
    "larger than the grid": ((700, 600), (0.9, 0.8), (349.5, 299.5)),
}


def _grid(name: str) -> ModelGrid:
    shape, spacing, centre = LAYOUTS[name]
    return ModelGrid((160, 160), 2.4, shape, spacing, centre)


def _ellipse(grid: ModelGrid, centre_mm: tuple[float, float], radii_mm: tuple[float, float]) -> np.ndarray:
    """An ellipse at a place given in mm from the grid's centre, on the slice's pixels."""
    r = (np.arange(grid.shape_rc[0]) - grid.centre_rc[0]) * grid.spacing_rc[0] - centre_mm[0]
    c = (np.arange(grid.shape_rc[1]) - grid.centre_rc[1]) * grid.spacing_rc[1] - centre_mm[1]
    return np.asarray((r[:, None] / radii_mm[0]) ** 2 + (c[None, :] / radii_mm[1]) ** 2 < 1)


@pytest.mark.parametrize("name", LAYOUTS)
def test_mask_survives_the_way_to_the_model_and_back(name: str) -> None:
    grid = _grid(name)
    mask = _ellipse(grid, (-31, 47), (38, 22))  # nothing symmetric: a flip or a transposition would show
    on_grid = grid.to_model(torch.from_numpy(mask.astype(np.float32)))
    assert on_grid.shape == (1, 1, 160, 160)
    back = grid.from_model(on_grid[:, 0] * 2 - 1, outside=-1.0)
    assert back.shape == (1, *grid.shape_rc)
    found = (back[0] > 0).numpy()
    assert 2 * (found & mask).sum() / (found.sum() + mask.sum()) > 0.96


@pytest.mark.parametrize("name", LAYOUTS)
def test_mask_lies_where_it_should_on_the_model_grid(name: str) -> None:
    """Against the same ellipse drawn on the model's own pixels, independently of the code under test."""
    grid = _grid(name)
    on_grid = grid.to_model(torch.from_numpy(_ellipse(grid, (20, -35), (45, 30)).astype(np.float32)))[0, 0].numpy() > 0.5
    mm = (np.arange(160) - 79.5) * 2.4
    drawn = ((mm[:, None] - 20) / 45) ** 2 + ((mm[None, :] + 35) / 30) ** 2 < 1
    assert 2 * (on_grid & drawn).sum() / (on_grid.sum() + drawn.sum()) > 0.96


@pytest.mark.parametrize("name", LAYOUTS)
@pytest.mark.parametrize("place_mm", [(0.0, 0.0), (-100.3, 77.7), (61.1, -120.2)])
def test_landmark_comes_back_within_half_a_model_pixel(name: str, place_mm: tuple[float, float]) -> None:
    grid = _grid(name)
    row, col = (round(c + mm / s) for c, mm, s in zip(grid.centre_rc, place_mm, grid.spacing_rc, strict=True))
    picture = np.zeros(grid.shape_rc, np.float32)
    picture[row, col] = 1
    back = grid.from_model(grid.to_model(torch.from_numpy(picture))[:, 0], outside=0.0)[0].numpy()
    assert back.max() > 0, "the landmark must not fall between the samples"
    rows, cols = np.indices(back.shape)
    found = (rows * back).sum() / back.sum(), (cols * back).sum() / back.sum()
    for at, wanted, spacing in zip(found, (row, col), grid.spacing_rc, strict=True):
        assert abs(at - wanted) * spacing <= 1.2


def test_same_grid_changes_no_value() -> None:
    grid = _grid("same")
    picture = torch.from_numpy(np.random.default_rng(0).random((160, 160)).astype(np.float32))
    there = grid.to_model(picture)[0, 0]
    assert torch.allclose(there, picture, atol=1e-4)
    assert torch.allclose(grid.from_model(picture[None], outside=0.0)[0], picture, atol=1e-4)


def test_finer_slices_are_smoothed_before_they_are_thinned_out() -> None:
    grid = _grid("finer")
    stripes = torch.zeros(512, 512)
    stripes[::2] = 1.0  # 1.5 mm period: invisible at 2.4 mm
    inner = grid.to_model(stripes)[0, 0, 10:-10, 10:-10]
    assert float((inner - 0.5).abs().max()) < 0.05


def test_outside_of_the_slice_is_zero_and_outside_of_the_grid_is_background() -> None:
    small = ModelGrid((160, 160), 2.4, (50, 60), (2.4, 2.4), (24.5, 29.5))
    there = small.to_model(torch.ones(50, 60))[0, 0]
    assert float(there[:54].max()) == 0
    assert float(there[106:].max()) == 0
    assert float(there[56:104, 51:109].min()) == pytest.approx(1)
    large = _grid("larger than the grid")
    back = large.from_model(torch.full((2, 160, 160), 9.0), outside=-20.0)
    assert back.shape == (2, 700, 600)
    half = 160 * 2.4 / 2
    r = np.abs(np.arange(700) - 349.5) * 0.9
    c = np.abs(np.arange(600) - 299.5) * 0.8
    beyond = (r[:, None] > half + 2.4) | (c[None, :] > half + 2.4)
    within = (r[:, None] < half - 2.4) & (c[None, :] < half - 2.4)
    assert (back[0].numpy()[beyond] == -20).all()
    assert np.allclose(back[0].numpy()[within], 9.0, atol=1e-4)


def test_logits_of_half_precision_are_taken() -> None:
    grid = _grid("coarser")
    back = grid.from_model(torch.randn(3, 160, 160).to(torch.bfloat16), outside=-20.0)
    assert back.dtype == torch.float32


#: mm per pixel
SPACING = (2.0, 2.0)


def _disc(shape: tuple[int, int], centre: tuple[float, float], radii: tuple[float, float]) -> np.ndarray:
    y, x = np.mgrid[: shape[0], : shape[1]]
    return (((y - centre[0]) / radii[0]) ** 2 + ((x - centre[1]) / radii[1]) ** 2 < 1).astype(np.float32)


def test_body_centre_passes_over_table_arms_and_marks() -> None:
    body = 0.6 * _disc((200, 240), (80, 130), (50, 70))
    table = np.zeros_like(body)
    table[150:156, 40:220] = 0.5
    arm = 0.5 * _disc((200, 240), (80, 25), (14, 14))
    mark = np.zeros_like(body)
    mark[2:6, 2:30] = 1
    assert body_box([body + table + arm + mark], SPACING).centre_rc == pytest.approx((80, 130), abs=1)


def test_body_centre_of_a_narrow_window_is_that_of_all_its_pieces() -> None:
    """Fat is black: a liver, a spine, a kidney and the wall hang together by nothing, and a table lies close below."""
    pieces = [((90, 70), (40, 24)), ((130, 120), (18, 12)), ((110, 160), (18, 14)), ((95, 194), (40, 6))]
    slice_ = sum(_disc((220, 260), centre, radii) for centre, radii in pieces)
    slice_[152:154, 10:250] = 0.9
    assert body_box([slice_], SPACING).centre_rc[1] == pytest.approx((46 + 200) / 2, abs=2)
    assert body_box([slice_], SPACING).centre_rc[0] == pytest.approx((50 + 148) / 2, abs=2)


def test_body_centre_keeps_both_legs() -> None:
    legs = _disc((100, 200), (50, 60), (30, 30)) + _disc((100, 200), (50, 150), (28, 28))
    assert body_box([legs], SPACING).centre_rc[1] == pytest.approx((60 - 30 + 150 + 28) / 2, abs=1.5)


def test_body_centre_looks_at_all_slices() -> None:
    above, below = _disc((100, 100), (40, 45), (20, 20)), _disc((100, 100), (60, 55), (20, 20))
    assert body_box([above, below], SPACING).centre_rc == pytest.approx((50, 50), abs=1)


@pytest.mark.parametrize("value", [0.0, 0.05])
def test_body_centre_of_nothing_is_the_middle(value: float) -> None:
    assert body_box([np.full((11, 20), value, np.float32)], SPACING).centre_rc == (5.0, 9.5)


def test_the_grid_of_a_body_fits_it_whatever_the_window_the_arms_and_the_table() -> None:
    """The same body in a wide window, in one where fat is black, with arms and table, and as half a body."""
    card = empty_card()
    shape = (220, 300)
    fat, wall = _disc(shape, (110, 150), (72, 100)), _disc(shape, (110, 150), (64, 92))
    organs = sum(_disc(shape, (110 + dy, 150 + dx), (22, 20)) for dy, dx in ((-20, -50), (10, 45), (25, -10)))
    wide = 0.15 * fat + 0.35 * wall + 0.2 * organs
    narrow = 0.5 * (wall - _disc(shape, (110, 150), (55, 83))) + 0.5 * organs
    arms = wide + 0.5 * _disc(shape, (110, 24), (16, 16)) + 0.5 * _disc(shape, (110, 278), (16, 16))
    arms[188:190, 30:270] = 0.8
    half = wide.copy()
    half[:, 150:] = 0

    def pixel(image: np.ndarray) -> float:
        return lay_grid(card, "axial", [image.astype(np.float32)], shape, SPACING).pixel_mm

    fitting = 400 / (160 * 0.95)  # 200 pixels of 2 mm
    assert pixel(wide) == pytest.approx(fitting, rel=0.04)
    assert pixel(arms) == pytest.approx(fitting, rel=0.04)
    assert pixel(narrow) == pytest.approx(fitting * 0.92, rel=0.05)  # the body without its fat
    assert pixel(half) == pytest.approx(288 / (112 * 0.95), rel=0.04)  # the height decides
    assert pixel(wide * 0) == 3.2
    assert lay_grid(card, "axial", [wide.astype(np.float32)], shape, SPACING).size == (112, 160)


def test_the_grid_of_a_volume_does_not_widen_for_its_shoulders() -> None:
    card = empty_card()
    trunk, shoulders = (_disc((200, 300), (100, 150), radii).astype(np.float32) for radii in ((50, 75), (50, 140)))
    alone = lay_grid(card, "axial", [trunk] * 7, (200, 300), SPACING)
    with_one = lay_grid(card, "axial", [trunk] * 6 + [shoulders], (200, 300), SPACING)
    assert with_one == alone


def test_a_coronal_grid_follows_the_width_alone() -> None:
    card = empty_card()
    tall = _disc((300, 300), (150, 150), (148, 75)).astype(np.float32)
    grid = lay_grid(card, "coronal", [tall], (300, 300), SPACING)
    assert grid.size == (144, 160)
    assert grid.pixel_mm == pytest.approx(300 / (160 * 0.95), rel=0.04)
