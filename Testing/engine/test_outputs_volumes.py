"""Volumes that are written come back on the same grid, in every library."""

from __future__ import annotations

from pathlib import Path

import nibabel as nib
import numpy as np
import pytest

from progidiff.errors import OutputError
from progidiff.outputs.volumes_out import write_volume
from progidiff.volumes.reading import read_volume

from ..volume_examples import GEOMETRIES, oblique, ramp


@pytest.mark.parametrize("suffix", [".nii.gz", ".nii", ".nrrd", ".mha"])
@pytest.mark.parametrize("name", GEOMETRIES)
def test_round_trip(name: str, suffix: str, tmp_path: Path) -> None:
    geometry = GEOMETRIES[name]
    array = np.linspace(0, 1, ramp(geometry).size, dtype=np.float32).reshape(geometry.shape_kji)
    write_volume(tmp_path / f"Übersicht{suffix}", array, geometry)
    back = read_volume(tmp_path / f"Übersicht{suffix}")
    np.testing.assert_array_equal(back.array, array)
    assert back.array.dtype == np.float32
    assert back.geometry.is_close(geometry, tolerance_mm=1e-3)


@pytest.mark.parametrize("name", ["example_ct_sm", "example_mr_sm"])
def test_result_has_the_real_inputs_affine_to_the_last_bit(name: str, shared_data: Path, tmp_path: Path) -> None:
    source = shared_data / "permissive" / "totalsegmentator_tests" / f"{name}.nii.gz"
    volume = read_volume(source)
    write_volume(tmp_path / "agreement.nii.gz", volume.array > 0, volume.geometry)
    written = nib.load(tmp_path / "agreement.nii.gz")
    np.testing.assert_array_equal(written.affine, nib.load(source).affine)
    assert written.shape == nib.load(source).shape
    assert written.get_data_dtype() == np.uint8


def test_types(tmp_path: Path) -> None:
    geometry = oblique()
    for dtype, stored in ((bool, "uint8"), ("float64", "float32"), ("int16", "int16"), ("uint16", "uint16")):
        array = np.abs(ramp(geometry)).astype(dtype)
        write_volume(tmp_path / "a.nii.gz", array, geometry)
        image = nib.load(tmp_path / "a.nii.gz")
        assert image.get_data_dtype() == np.dtype(stored)
        np.testing.assert_array_equal(np.asarray(image.dataobj).T, array)


def test_refusals(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="does not fit"):
        write_volume(tmp_path / "a.nii.gz", np.zeros((2, 2, 2)), oblique())
    with pytest.raises(OutputError, match=r"\.nii\.gz"):
        write_volume(tmp_path / "a.png", ramp(oblique()), oblique())
    assert list(tmp_path.iterdir()) == []
