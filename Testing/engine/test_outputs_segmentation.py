"""The segmentation file itself: a valid NRRD for every reader, exact numbers, escaped tags."""

from __future__ import annotations

import gzip
from pathlib import Path

import numpy as np
import pytest
import SimpleITK as sitk

from progidiff.outputs.segmentation import Segment, assign_layers, escape_tag, unescape_tag, write_seg_nrrd
from progidiff.volumes.reading import read_volume
from progidiff.volumes.slicing import PackedMask

from ..volume_examples import GEOMETRIES, oblique

RED = (1.0, 0.0, 0.0)


def parse(path: Path) -> tuple[dict[str, str], np.ndarray]:
    """Header fields and key/value pairs, and the voxels in file order, read by the book."""
    head, _, data = path.read_bytes().partition(b"\n\n")
    fields = {}
    for line in head.decode("utf-8").splitlines()[1:]:
        if not line.startswith("#"):
            key, _, value = line.partition(":=") if ":=" in line else line.partition(": ")
            fields[key] = value
    sizes = [int(n) for n in fields["sizes"].split()]
    return fields, np.frombuffer(gzip.decompress(data), np.uint8).reshape(sizes[::-1])


def test_layers_are_the_fastest_axis_and_numbers_are_exact(tmp_path: Path) -> None:
    geometry = oblique()
    masks = [np.random.default_rng(n).random(geometry.shape_kji) < 0.4 for n in range(3)]
    write_seg_nrrd(tmp_path / "a.seg.nrrd", [Segment(str(n), m, RED) for n, m in enumerate(masks)], geometry)
    fields, voxels = parse(tmp_path / "a.seg.nrrd")
    assert fields["sizes"] == "3 9 8 6"
    assert fields["kinds"] == "list domain domain domain"
    assert fields["space"] == "left-posterior-superior"
    for n, mask in enumerate(masks):
        layer, label = int(fields[f"Segment{n}_Layer"]), int(fields[f"Segment{n}_LabelValue"])
        np.testing.assert_array_equal(voxels[..., layer] == label, mask)
    none, *vectors = fields["space directions"].split()
    assert none == "none"
    stored = np.array([[float(x) for x in v.strip("()").split(",")] for v in [*vectors, fields["space origin"]]])
    np.testing.assert_array_equal(stored.T, geometry.affine_lps[:3])


@pytest.mark.parametrize("name", ["PSR", "oblique", "single slice"])
def test_simpleitk_reads_layers_as_components(name: str, tmp_path: Path) -> None:
    geometry = GEOMETRIES[name]
    mask = np.random.default_rng(0).random(geometry.shape_kji) < 0.5
    write_seg_nrrd(tmp_path / "a.seg.nrrd", [Segment("a", mask, RED), Segment("b", mask, RED)], geometry)
    image = sitk.ReadImage(str(tmp_path / "a.seg.nrrd"))
    assert image.GetNumberOfComponentsPerPixel() == 2
    np.testing.assert_array_equal(sitk.GetArrayFromImage(image)[..., 1] == 1, mask)
    assert image.GetMetaData("Segment1_Name") == "b"
    # one layer is a plain label map for other readers
    which = np.random.default_rng(5).integers(0, 4, geometry.shape_kji)
    write_seg_nrrd(tmp_path / "b.seg.nrrd", [Segment(f"part {n}", which == n, RED) for n in (1, 2, 3)], geometry)
    volume = read_volume(tmp_path / "b.seg.nrrd")
    np.testing.assert_array_equal(volume.array, which)
    assert volume.geometry.is_close(geometry, tolerance_mm=1e-9)


def test_layers_are_as_few_as_first_fit_allows() -> None:
    shape = (2, 3, 9)
    masks = [np.zeros(shape, bool) for _ in range(4)]
    masks[0][0, :, :5] = True
    masks[1][0, :, 4:] = True  # overlaps 0
    masks[2][1] = True  # overlaps neither
    packed = [PackedMask.from_array(m) for m in masks]
    assert assign_layers(packed) == [(0, 1), (1, 1), (0, 2), (0, 3)]


def test_identifiers(tmp_path: Path) -> None:
    mask = np.ones(oblique().shape_kji, bool)
    segments = [Segment("a", mask, RED), Segment("b", mask, RED, id="Segment_1"), Segment("c", mask, RED)]
    write_seg_nrrd(tmp_path / "a.seg.nrrd", segments, oblique())
    fields, _ = parse(tmp_path / "a.seg.nrrd")
    assert [fields[f"Segment{n}_ID"] for n in range(3)] == ["Segment_2", "Segment_1", "Segment_3"]
    with pytest.raises(ValueError, match="twice"):
        write_seg_nrrd(tmp_path / "b.seg.nrrd", [segments[1], segments[1]], oblique())
    with pytest.raises(ValueError, match="does not fit"):
        write_seg_nrrd(tmp_path / "b.seg.nrrd", [Segment("a", np.ones((2, 2, 2), bool), RED)], oblique())
    assert not (tmp_path / "b.seg.nrrd").exists()


PIECES = ["|", ":", "%", "%7C", "%3A", "%25", "%0D", "\r", "\n", "\\", "7C", "25", "a", "é", " ", "3A", "%2", "5"]


def test_escaped_tags_are_safe_and_come_back() -> None:
    rng = np.random.default_rng(0)
    for _ in range(500):
        text = "".join(rng.choice(PIECES, size=rng.integers(0, 7)))
        for key in (False, True):
            escaped = escape_tag(text, key=key)
            assert "|" not in escaped
            assert not (key and ":" in escaped)
            assert unescape_tag(escaped) == text


@pytest.mark.parametrize("text", ["0.913", "C:\\Users", "100 %", "SCT^10200004^Liver~^^~", "größer als 5 %", "50%2"])
def test_ordinary_values_stay_readable(text: str) -> None:
    assert escape_tag(text) == text
