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

from .conftest import phantom, sample


@pytest.fixture
def card(engine: Any) -> ModelCard:
    return engine.card  # type: ignore[no-any-return]


def test_windows_are_in_hounsfield_units_and_of_the_whole_volume(card: ModelCard) -> None:
    scaled = normaliser(np.zeros((2, 3, 4)), card, "CT")(np.array([[-2000, -160, 40, 240, 3000]], np.int16))
    assert scaled.dtype == np.float32
    assert scaled == pytest.approx(np.array([[0, 0, 0.5, 1, 1]]))
    assert (card.windows["CT"].low, card.windows["CT"].high) == (-160, 240)
    card = replace(card, windows={**card.windows, "MR": Window(kind="percentile", low=10, high=90)})
    volume = np.arange(8000, dtype=np.float32).reshape(20, 20, 20) * 3 + 7
    scale = normaliser(volume, card, "MR")
    low, high = np.percentile(volume, [10, 90])
    assert scale(np.array([low, (low + high) / 2, high])) == pytest.approx([0, 0.5, 1], abs=1e-3)
    assert float(scale(volume[0]).mean()) < 0.01 < 0.99 < float(scale(volume[-1]).mean()), "slices stay comparable"
    assert scale(1e4 * volume) == pytest.approx(1)
    # a volume that is thinned out still counts dark and bright columns alike
    columns = np.zeros((1, 512, 512), np.int16)
    columns[:, :, 1::2] = 1000
    scale = normaliser(np.broadcast_to(columns, (80, 512, 512)), card, "MR")
    assert scale(np.array([0, 500, 1000])) == pytest.approx([0, 0.5, 1], abs=1e-3)


def test_modality_is_guessed_from_the_values() -> None:
    rng, shape = np.random.default_rng(0), (12, 40, 40)
    air_and_body = np.where(rng.random(shape) < 0.5, -1000, 40)
    body_only = np.where(rng.random(shape) < 0.1, -100, 50) + rng.normal(0, 10, shape)
    magnitudes, z_scores = rng.gamma(2, 200, shape), rng.normal(0, 1, shape)
    unsigned = rng.integers(0, 4095, shape).astype(np.uint16)
    volumes = (air_and_body, body_only, magnitudes, z_scores, unsigned)
    assert [likely_modality(volume) for volume in volumes] == ["CT", "CT", "MR", "MR", "MR"]


def test_guess_and_strange_plane_are_said(engine: Any) -> None:
    volume, affine = phantom()
    engine.set_image(volume, affine, None, "coronal")
    warnings = {w.code: w.message for w in sample(engine, slices=(15, 16), steps=1).warnings}
    assert "CT" in warnings["modality"]
    assert "coronal" in warnings["plane"]
    assert "axial" in warnings["plane"]
    engine.set_image(volume, affine, "CT")
    assert sample(engine, slices=(0, 1), steps=1).warnings == []
    for modality, says in (("PT", "is PT, but this model was made for CT and MR"), (None, "does not say its modality")):
        engine.set_image(volume, affine, modality)
        (warning,) = sample(engine, slices=(0, 1), steps=1).warnings
        assert warning.code == "modality"
        assert says in warning.message


def test_only_modality_of_a_model_needs_no_guess(card: ModelCard) -> None:
    volume, affine = phantom()
    single = replace(card, modalities=["CT"], windows={"CT": card.windows["CT"]})
    clipped = np.clip(volume, -40, None)
    assert likely_modality(clipped) == "MR"
    image = load_image(clipped, affine, None, None, single)
    assert (image.modality, image.guessed) == ("CT", True)
    with pytest.raises(ModelError, match="not for MR"):
        load_image(volume, affine, "MR", None, single)


DAMAGES: dict[str, Callable[[np.ndarray], np.ndarray]] = {
    "NaN": lambda volume: np.where(volume == volume[37, 3, 3], np.nan, volume),
    "infinite": lambda volume: np.where(volume == volume[1, 0, 0], np.inf, volume),
    "uniform": lambda volume: np.full_like(volume, 40),
    "outside of the window": lambda volume: volume + 5000,
    "4D": lambda volume: volume[..., None],
    "mask": lambda volume: volume > 0,
    "complex": lambda volume: volume.astype(np.complex64),
}


def test_unusable_images_are_refused_in_one_sentence_and_leave_the_old_one(engine: Any) -> None:
    before = sample(engine, slices=(0, 1)).masks("liver")[0]
    for damage in DAMAGES.values():
        with pytest.raises(InputError, match=r"^[^\n]*\.$"):
            engine.set_image(damage(phantom(40)[0]), np.diag([3.5, 4, 7, 1]), "CT")
    assert np.array_equal(sample(engine, slices=(0, 1)).masks("liver")[0], before)


# -- conditioning ----------------------------------------------------------------------------------------------------


def _count_calls(network: torch.nn.Module) -> list[int]:
    calls: list[int] = []
    network.register_forward_pre_hook(lambda _, args, kwargs: calls.append(1), with_kwargs=True)
    return calls


@pytest.mark.slow
def test_image_and_text_are_encoded_once_and_never_per_step(own_engine: Any) -> None:
    image, text, unet = (_count_calls(getattr(own_engine.model, n)) for n in ("image_encoder", "text_encoder", "unet"))
    sample(own_engine, "liver", "spleen", proposals=9, steps=3, batch_size=4, adaptive=True)
    assert len(image) == 4, "once per slice"
    assert len(text) == 2, "once per prompt"
    assert len(unet) >= 3 * 2 * 8 * 4 / 4
    sample(own_engine, "spleen", seed=5)
    assert (len(image), len(text)) == (4, 2), "the same image and prompt stay encoded"
    own_engine.model.card = replace(own_engine.card, prompt_template="{target} in {modality}")
    masks = []
    for modality in ("CT", "MR"):  # the prompt may name the modality
        own_engine.set_image(*phantom(), modality)
        masks.append(sample(own_engine, slices=(0, 1), steps=1).masks("liver")[0])
    assert len(text) == 4
    assert not np.array_equal(*masks)


@pytest.mark.slow
def test_another_image_is_encoded_anew(own_engine: Any) -> None:
    first = sample(own_engine).masks("liver")
    image = _count_calls(own_engine.model.image_encoder)
    volume, affine = phantom()
    own_engine.set_image(volume.copy(), affine, "CT")
    sample(own_engine)
    assert len(image) == 0, "the same content"
    own_engine.set_image(volume[::-1].copy(), affine, "CT")
    second = sample(own_engine).masks("liver")
    assert len(image) == 4
    assert any(not np.array_equal(first[index], second[index]) for index in first), "the image must matter"


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


def _volume_masks(engine: Any, array: np.ndarray, affine: np.ndarray, modality: str) -> np.ndarray:
    """Proposals of the liver as an array (N, K, J, I) in the array's own order."""
    engine.set_image(array, affine, modality)
    plan = plan_slices(Geometry(array.shape[::-1], affine))  # type: ignore[arg-type]
    masks = np.zeros((3, *array.shape), bool)
    for index, found in sample(engine, proposals=3).masks("liver").items():
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
    ("codes", "order", "flips"), [("LPI", (0, 1, 2), (0, 1, 2)), ("PSR", (1, 2, 0), (0,)), ("IRP", (2, 0, 1), (0, 2))]
)
def test_same_anatomy_gives_the_same_masks_in_any_axis_order(
    engine: Any, codes: str, order: tuple[int, int, int], flips: tuple[int, ...], oblique: bool
) -> None:
    array, affine = phantom(8)  # eight: the middle of the slices that are looked at is a rounded half
    if oblique:
        affine[:3, :3] = OBLIQUE @ affine[:3, :3]
    expected = _volume_masks(engine, array, affine, "CT")
    moved, moved_affine = _reordered(array, affine, order, flips)
    assert Geometry(moved.shape[::-1], moved_affine).orientation == codes
    found = _volume_masks(engine, moved, moved_affine, "CT")
    assert np.array_equal(np.stack([_back(mask, order, flips) for mask in found]), expected)


def test_stack_that_is_counted_downwards_keeps_each_slices_noise(card: ModelCard) -> None:
    volume, affine = phantom(5)
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
def test_mask_lies_where_it_should_on_the_model_grid_and_comes_back(name: str) -> None:
    """Against the same ellipse drawn on the model's own pixels, independently of the code under test."""
    grid = _grid(name)
    mask = _ellipse(grid, (-31, 47), (38, 22))  # nothing symmetric: a flip or a transposition would show
    on_grid = grid.to_model(torch.from_numpy(mask.astype(np.float32)))
    assert on_grid.shape == (1, 1, 160, 160)
    mm = (np.arange(160) - 79.5) * 2.4
    drawn = ((mm[:, None] + 31) / 38) ** 2 + ((mm[None, :] - 47) / 22) ** 2 < 1
    there = on_grid[0, 0].numpy() > 0.5
    assert 2 * (there & drawn).sum() / (there.sum() + drawn.sum()) > 0.96
    back = grid.from_model((on_grid[:, 0] * 2 - 1).to(torch.bfloat16), outside=-1.0)
    assert (back.dtype, back.shape) == (torch.float32, (1, *grid.shape_rc))
    found = (back[0] > 0).numpy()
    assert 2 * (found & mask).sum() / (found.sum() + mask.sum()) > 0.96


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
    assert body_box([np.full((11, 20), 0.05, np.float32)], SPACING).centre_rc == (5.0, 9.5), "of nothing: the middle"
    tall = _disc((300, 300), (150, 150), (148, 75)).astype(np.float32)
    coronal = lay_grid(card, "coronal", [tall], (300, 300), SPACING)
    assert coronal.size == (144, 160)
    assert coronal.pixel_mm == pytest.approx(300 / (160 * 0.95), rel=0.04), "the width alone counts"


def test_the_grid_of_a_volume_does_not_widen_for_its_shoulders() -> None:
    card = empty_card()
    trunk, shoulders = (_disc((200, 300), (100, 150), radii).astype(np.float32) for radii in ((50, 75), (50, 140)))
    alone = lay_grid(card, "axial", [trunk] * 7, (200, 300), SPACING)
    with_one = lay_grid(card, "axial", [trunk] * 6 + [shoulders], (200, 300), SPACING)
    assert with_one == alone
