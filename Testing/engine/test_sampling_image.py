"""The current image: checks, grey values, conditioning, and independence of how the array is ordered."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from typing import Any

import numpy as np
import pytest
import torch

from progidiff.cards import ModelCard, Window
from progidiff.errors import InputError, ModelError
from progidiff.sampling.image import load_image, normaliser
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
