"""Values of a CT that cannot be Hounsfield units: found, named, corrected; and real ones never taken for such."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest

from progidiff.places import resource_folders
from progidiff.sampling.engine import Engine
from progidiff.volumes.reading import read_volume
from progidiff.volumes.values import not_hounsfield

from .conftest import phantom, sample

SAMPLE = next(folder for folder in resource_folders() if folder.is_dir()) / "SampleData" / "synthetic_abdomen_ct.nii.gz"
REAL_CT = (
    "permissive/totalsegmentator_tests/example_ct.nii.gz",
    "permissive/totalsegmentator_example_ct_dicom/example_ct_dicom",
    "research/amos_ct_slices/amos_0001_slices61-70_img.nii.gz",
)
REAL_MR = ("permissive/totalsegmentator_tests/example_mr_sm.nii.gz",)


def crops(array: np.ndarray, count: int = 50) -> list[np.ndarray]:
    """Boxes out of a volume, most of them without any air."""
    rng = np.random.default_rng(0)
    found = []
    for _ in range(count):
        sizes = [int(rng.integers(max(2, n // 12), max(3, n // 2))) for n in array.shape]
        starts = [int(rng.integers(0, n - size + 1)) for n, size in zip(array.shape, sizes, strict=True)]
        found.append(array[tuple(slice(a, a + n) for a, n in zip(starts, sizes, strict=True))])
    return found


def windowed(array: np.ndarray, low: float, high: float) -> np.ndarray:
    """0 to 1 between two Hounsfield units."""
    return (np.clip(array, low, high) - low) / (high - low)


def check_hounsfield(array: np.ndarray) -> None:
    """Nothing that is made of real Hounsfield units is taken for something else."""
    rng = np.random.default_rng(1)
    streaks = array.copy()
    streaks[rng.random(array.shape) < 0.002] = 30_000
    contrast = array + np.where(array > 80, 400, 0)
    tissue, organs = (np.where((array > low) & (array < high), array, 0) for low, high in ((-150, 300), (0, 250)))
    for made in (array, streaks, contrast, tissue, organs, *crops(array)):
        assert not_hounsfield(made) is None


def check_found(array: np.ndarray) -> None:
    """What was made of Hounsfield units is named, and corrected to what it was."""
    for added in (1024, 1000):
        for made in (array + added, np.clip(array + added, 0, None)):
            odd = not_hounsfield(made)
            assert odd.looks == f"Hounsfield units with {added} added"
            np.testing.assert_allclose(odd.corrected(made), np.maximum(array, made.min() - added), atol=0.1)
    unit = windowed(array, -160, 240)
    for made, looks in ((unit, "from 0 to 1,"), (np.round(unit * 255).astype(np.uint8), "from 0 to 255,")):
        odd = not_hounsfield(made)
        assert looks in odd.looks
        np.testing.assert_allclose(odd.corrected(made), np.clip(array, -160, 240), atol=1)


def test_the_sample_volume() -> None:
    array = read_volume(SAMPLE).array.astype(np.float32)
    check_hounsfield(array)
    check_found(array)


@pytest.mark.slow
@pytest.mark.parametrize("name", REAL_CT, ids=lambda name: Path(name).name)
def test_real_ct(shared_data: Path, name: str) -> None:
    array = read_volume(shared_data / name).array.astype(np.float32)
    check_hounsfield(array)
    check_found(array)


@pytest.mark.parametrize("name", REAL_MR, ids=lambda name: Path(name).name)
def test_real_mr_does_not_look_like_a_shifted_ct(shared_data: Path, name: str) -> None:
    assert not_hounsfield(read_volume(shared_data / name).array) is None


def test_a_range_that_is_not_known_is_not_corrected() -> None:
    array = read_volume(SAMPLE).array.astype(np.float32)
    odd = not_hounsfield(windowed(array, -1024, 3071))
    assert not odd.known
    assert "Convert them first" in odd.warning


@pytest.fixture
def body() -> tuple[np.ndarray, np.ndarray]:
    """A phantom in Hounsfield units with some bone, and its affine."""
    array, affine = phantom(4)
    array[:, 24:27, 14:19] = 600
    return array, affine


def said(run: Any) -> dict[str, str]:
    return {warning.code: warning.message for warning in run.warnings}


@pytest.mark.slow
@pytest.mark.parametrize("kind", ["shifted", "unit"])
def test_the_engine_says_it_and_corrects_it_where_that_is_wanted(
    engine: Engine, body: tuple[np.ndarray, np.ndarray], kind: str
) -> None:
    array, affine = body
    made = {"shifted": array + 1024, "unit": windowed(array, -160, 240)}[kind].astype(np.float32)

    def masks(values: np.ndarray, modality: str | None, correct: bool) -> tuple[np.ndarray, dict[str, str]]:
        engine.set_image(values, affine, modality, None, correct)
        run = sample(engine, steps=1, proposals=3)
        return np.stack(list(run.masks("liver").values())), said(run)

    right, nothing = masks(array.astype(np.float32), "CT", False)
    assert nothing.keys() <= {"empty", "disagreement"}
    wrong, warned = masks(made, "CT", False)
    assert "cannot be Hounsfield units" in warned["values"]
    assert not np.array_equal(wrong, right)
    corrected, told = masks(made, "CT", True)
    assert "values" not in told
    assert "were taken for" in told["values_corrected"]
    assert np.mean(corrected == right) > 0.999
    _, kept = masks(array.astype(np.float32), "CT", True)
    assert "they can be Hounsfield units" in kept["values_kept"]


def test_a_shifted_ct_that_does_not_say_its_modality_is_not_silently_an_mr(
    engine: Engine, body: tuple[np.ndarray, np.ndarray]
) -> None:
    array, affine = body
    engine.set_image((array + 1024).astype(np.float32), affine, None)
    assert "1024 added; say so where it is one" in said(sample(engine, steps=1))["modality"]
    engine.set_image((array + 1024).astype(np.float32), affine, None, None, True)
    assert "it is not known to be a CT" in said(sample(engine, steps=1))["values_kept"]
    engine.set_image(array.astype(np.float32), affine, None, "sagittal")
    assert [w.code for w in sample(engine, slices=(15, 16), steps=1).warnings][:2] == ["plane", "modality"]
