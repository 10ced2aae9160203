"""The current image: checks, grey values, conditioning, any order of the array, and its slices on the model's grid."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from typing import Any

import numpy as np
import pytest
import torch

from progidiff.cards import ModelCard, Window
from progidiff.errors import InputError, ModelError
from progidiff.sampling.image import ModelGrid, body_box, lay_grid, load_image, normaliser
from progidiff.training.default import empty_card
from progidiff.volumes.geometry import Geometry
from progidiff.volumes.slicing import insert_slice, plan_slices
from progidiff.volumes.values import likely_modality

Run = Callable[..., Any]


@pytest.fixture
def card(engine: Any) -> ModelCard:
    return engine.card  # type: ignore[no-any-return]


def test_ct_window_is_in_hounsfield_units(card: ModelCard) -> None:
    window = card.windows["CT"]
    assert (window.low, window.high) == (-160, 240)
    values = np.array([[-2000, -160, 40, 240, 3000]], np.int16)
    scaled = normaliser(np.zeros((2, 3, 4)), card, "CT")(values)
    assert scaled.dtype == np.float32
    assert scaled == pytest.approx(np.array([[0, 0, 0.5, 1, 1]]))


def test_mr_window_is_of_the_whole_volume(card: ModelCard) -> None:
    card = replace(card, windows={**card.windows, "MR": Window(kind="percentile", low=10, high=90)})
    volume = np.arange(8000, dtype=np.float32).reshape(20, 20, 20) * 3 + 7
    scale = normaliser(volume, card, "MR")
    low, high = np.percentile(volume, [10, 90])
    assert scale(np.array([low, (low + high) / 2, high])) == pytest.approx([0, 0.5, 1], abs=1e-3)
    assert float(scale(volume[0]).mean()) < 0.01 < 0.99 < float(scale(volume[-1]).mean()), "slices stay comparable"
    assert scale(1e4 * volume) == pytest.approx(1)


def test_percentiles_of_a_large_volume_do_not_see_its_columns_only(card: ModelCard) -> None:
    """A volume that is thinned out still counts dark and bright columns alike; a step along memory would count one kind."""
    volume = np.zeros((20, 512, 512), np.int16)
    volume[:, :, 1::2] = 1000
    scale = normaliser(np.broadcast_to(volume[:1], (80, 512, 512)), card, "MR")
    assert scale(np.array([0, 500, 1000])) == pytest.approx([0, 0.5, 1])


@pytest.mark.parametrize(
    ("name", "expected"),
    [("air and body", "CT"), ("body only", "CT"), ("magnitudes", "MR"), ("z-scores", "MR"), ("unsigned", "MR")],
)
def test_modality_is_guessed_from_the_values(name: str, expected: str) -> None:
    rng = np.random.default_rng(0)
    shape = (12, 40, 40)
    volumes = {
        "air and body": np.where(rng.random(shape) < 0.5, -1000, 40),
        "body only": np.where(rng.random(shape) < 0.1, -100, 50) + rng.normal(0, 10, shape),
        "magnitudes": rng.gamma(2, 200, shape),
        "z-scores": rng.normal(0, 1, shape),
        "unsigned": rng.integers(0, 4095, shape).astype(np.uint16),
    }
    assert likely_modality(volumes[name]) == expected


def test_guess_and_strange_plane_are_said(engine: Any, run_engine: Run, make_phantom: Run) -> None:
    volume, affine = make_phantom()
    engine.set_image(volume, affine, None, "coronal")
    warnings = {w.code: w.message for w in run_engine(engine, slices=(15, 16), steps=1).warnings}
    assert "CT" in warnings["modality"]
    assert "coronal" in warnings["plane"]
    assert "axial" in warnings["plane"]
    engine.set_image(volume, affine, "CT")
    assert run_engine(engine, slices=(0, 1), steps=1).warnings == []


def test_only_modality_of_a_model_needs_no_guess(card: ModelCard, make_phantom: Run) -> None:
    volume, affine = make_phantom()
    single = replace(card, modalities=["CT"], windows={"CT": card.windows["CT"]})
    clipped = np.clip(volume, -40, None)
    assert likely_modality(clipped) == "MR"
    image = load_image(clipped, affine, None, None, single)
    assert (image.modality, image.guessed) == ("CT", True)


def _damaged(make_phantom: Run, how: str) -> np.ndarray:
    volume: np.ndarray = make_phantom(40)[0]
    if how == "NaN":
        volume[37, 3, 3] = np.nan
    elif how == "infinite":
        volume[1, 0, 0] = np.inf
    elif how == "uniform":
        volume[:] = 40
    elif how == "outside of the window":
        volume += 5000
    elif how == "4D":
        return volume[..., None]
    elif how == "mask":
        return volume > 0
    elif how == "complex":
        return volume.astype(np.complex64)
    return volume


@pytest.mark.parametrize("how", ["NaN", "infinite", "uniform", "outside of the window", "4D", "mask", "complex"])
def test_unusable_image_is_refused_in_one_sentence(engine: Any, make_phantom: Run, how: str) -> None:
    with pytest.raises(InputError, match=r"^[^\n]*\.$"):
        engine.set_image(_damaged(make_phantom, how), np.diag([3.5, 4, 7, 1]), "CT")


def test_a_modality_that_the_model_lacks_is_refused(card: ModelCard, make_phantom: Run) -> None:
    single = replace(card, modalities=["CT"], windows={"CT": card.windows["CT"]})
    with pytest.raises(ModelError, match="not for MR"):
        load_image(*make_phantom(), "MR", None, single)


def test_an_image_that_is_neither_ct_nor_mr_is_named_as_what_it_is(engine: Any, run_engine: Run, make_phantom: Run) -> None:
    engine.set_image(*make_phantom(), "PT")
    (warning,) = run_engine(engine, slices=(0, 1), steps=1).warnings
    assert warning.code == "modality"
    assert "is PT, but this model was made for CT and MR" in warning.message
    assert "values look like CT" in warning.message
    engine.set_image(*make_phantom(), None)
    (warning,) = run_engine(engine, slices=(0, 1), steps=1).warnings
    assert "does not say its modality" in warning.message


def test_refused_image_leaves_the_old_one(engine: Any, run_engine: Run, make_phantom: Run) -> None:
    before = run_engine(engine, slices=(0, 1)).masks("liver")[0]
    with pytest.raises(InputError):
        engine.set_image(_damaged(make_phantom, "NaN"), np.diag([3.5, 4, 7, 1]), "CT")
    assert np.array_equal(run_engine(engine, slices=(0, 1)).masks("liver")[0], before)


def test_contrast_in_any_one_slice_will_do(card: ModelCard, make_phantom: Run) -> None:
    volume, affine = make_phantom(30)
    volume[:11] = volume[12:] = -1000
    assert load_image(volume, affine, "CT", None, card).info.slice_count == 30


# -- conditioning ----------------------------------------------------------------------------------------------------


def _count_calls(network: torch.nn.Module) -> list[int]:
    calls: list[int] = []
    network.register_forward_pre_hook(lambda _, args, kwargs: calls.append(1), with_kwargs=True)
    return calls


@pytest.mark.slow
@pytest.mark.parametrize("adaptive", [False, True])
def test_image_and_text_are_encoded_once_and_never_per_step(engine: Any, run_engine: Run, adaptive: bool) -> None:
    image, text, unet = (_count_calls(getattr(engine.model, n)) for n in ("image_encoder", "text_encoder", "unet"))
    run_engine(engine, "liver", "spleen", proposals=9, steps=3, batch_size=4, adaptive=adaptive)
    assert len(image) == 4, "once per slice"
    assert len(text) == 2, "once per prompt"
    assert len(unet) >= 3 * 2 * 9 * 4 / 4
    run_engine(engine, "spleen", seed=5)
    assert (len(image), len(text)) == (4, 2), "the same image and prompt stay encoded"


@pytest.mark.slow
def test_another_image_is_encoded_anew(engine: Any, run_engine: Run, make_phantom: Run) -> None:
    first = run_engine(engine).masks("liver")
    image = _count_calls(engine.model.image_encoder)
    volume, affine = make_phantom()
    engine.set_image(volume.copy(), affine, "CT")
    run_engine(engine)
    assert len(image) == 0, "the same content"
    engine.set_image(volume[::-1].copy(), affine, "CT")
    second = run_engine(engine).masks("liver")
    assert len(image) == 4
    assert any(not np.array_equal(first[index], second[index]) for index in first), "the image must matter"


def test_prompt_may_name_the_modality(engine: Any, run_engine: Run, make_phantom: Run) -> None:
    engine.model.card = replace(engine.card, prompt_template="{target} in {modality}")
    text = _count_calls(engine.model.text_encoder)
    volume, affine = make_phantom()
    masks = []
    for modality in ("CT", "MR"):
        engine.set_image(volume, affine, modality)
        masks.append(run_engine(engine, slices=(0, 1), steps=1).masks("liver")[0])
    assert len(text) == 2
    assert not np.array_equal(*masks)


# -- orientation -----------------------------------------------------------------------------------------------------


def _reordered(
    array: np.ndarray, affine: np.ndarray, order: tuple[int, int, int], flips: tuple[int, ...]
) -> tuple[Any, Any]:
    """The same voxels with their i, j, k axes permuted, then some of them reversed."""
    ijk = array.transpose(2, 1, 0).transpose(order)
    moved = affine.copy()
    moved[:3, :3] = affine[:3, list(order)]
    for axis in flips:
        moved[:3, 3] += moved[:3, axis] * (ijk.shape[axis] - 1)
        moved[:3, axis] *= -1
        ijk = np.flip(ijk, axis)
    return np.ascontiguousarray(ijk.transpose(2, 1, 0)), moved


def _back(array: np.ndarray, order: tuple[int, int, int], flips: tuple[int, ...]) -> np.ndarray:
    ijk = np.flip(array.transpose(2, 1, 0), flips) if flips else array.transpose(2, 1, 0)
    return ijk.transpose(np.argsort(order)).transpose(2, 1, 0)


def _volume_masks(engine: Any, run_engine: Run, array: np.ndarray, affine: np.ndarray, modality: str) -> np.ndarray:
    """Proposals of the liver as an array (N, K, J, I) in the array's own order."""
    engine.set_image(array, affine, modality)
    plan = plan_slices(Geometry(array.shape[::-1], affine))  # type: ignore[arg-type]
    masks = np.zeros((3, *array.shape), bool)
    for index, found in run_engine(engine, proposals=3).masks("liver").items():
        for volume, mask in zip(masks, found, strict=True):
            insert_slice(volume, plan, index, mask)
    return masks


_TURN = np.radians(12)
OBLIQUE = np.array([[np.cos(_TURN), -np.sin(_TURN), 0], [np.sin(_TURN), np.cos(_TURN), 0], [0, 0, 1]]) @ np.array(
    [[1, 0, 0], [0, np.cos(0.2), -np.sin(0.2)], [0, np.sin(0.2), np.cos(0.2)]]
)


@pytest.mark.slow
@pytest.mark.parametrize("oblique", [False, True], ids=["straight", "oblique"])
@pytest.mark.parametrize(
    ("codes", "order", "flips"),
    [
        ("LPS", (0, 1, 2), (0, 1)),
        ("LPI", (0, 1, 2), (0, 1, 2)),
        ("RAI", (0, 1, 2), (2,)),
        ("PSR", (1, 2, 0), (0,)),
        ("SAL", (2, 1, 0), (2,)),
        ("IRP", (2, 0, 1), (0, 2)),
    ],
)
def test_same_anatomy_gives_the_same_masks_in_any_axis_order(
    engine: Any,
    run_engine: Run,
    make_phantom: Run,
    codes: str,
    order: tuple[int, int, int],
    flips: tuple[int, ...],
    oblique: bool,
) -> None:
    array, affine = make_phantom(8)  # eight: the middle of the slices that are looked at is a rounded half
    if oblique:
        affine[:3, :3] = OBLIQUE @ affine[:3, :3]
    expected = _volume_masks(engine, run_engine, array, affine, "CT")
    moved, moved_affine = _reordered(array, affine, order, flips)
    assert Geometry(moved.shape[::-1], moved_affine).orientation == codes
    found = _volume_masks(engine, run_engine, moved, moved_affine, "CT")
    assert np.array_equal(np.stack([_back(mask, order, flips) for mask in found]), expected)


def test_body_is_looked_for_on_the_same_slices_in_either_order(card: ModelCard, make_phantom: Run) -> None:
    """Only one slice reaches far to one side, and whether it is looked at must not depend on the direction of counting."""
    for special in range(8):
        volume, affine = make_phantom(8)
        volume[special, :, 20:] = 40
        flipped, flipped_affine = _reordered(volume, affine, (0, 1, 2), (2,))
        a, b = (load_image(v, m, "CT", None, card).grid for v, m in ((volume, affine), (flipped, flipped_affine)))
        assert a == b


def test_stack_that_is_counted_downwards_keeps_each_slices_noise(card: ModelCard, make_phantom: Run) -> None:
    volume, affine = make_phantom(5)
    flipped, flipped_affine = _reordered(volume, affine, (0, 1, 2), (2,))
    up, down = load_image(volume, affine, "CT", None, card), load_image(flipped, flipped_affine, "CT", None, card)
    assert [up.position_mm(s) for s in range(5)] == [down.position_mm(4 - s) for s in range(5)] == [0, 7, 14, 21, 28]
    assert torch.equal(up.pixels(1), down.pixels(3))


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
