"""Slicer's own MRML library opens our segmentations: names, colours, terminology, tags, masks and place."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from progidiff.outputs.segmentation import Segment, unescape_tag, write_seg_nrrd, write_volume
from progidiff.volumes.geometry import Geometry
from progidiff.volumes.reading import Volume, read_volume
from progidiff.volumes.slicing import PackedMask

from ..panel.accept_support import array_of, tag
from ..volume_examples import GEOMETRIES, oblique, oriented, ramp

slicer = pytest.importorskip("slicer", reason="needs slicer-core (pip install slicer-core)")
if not hasattr(slicer, "vtkMRMLSegmentationStorageNode"):
    pytest.skip("this slicer is not slicer-core with segmentations", allow_module_level=True)

LIVER = (
    "Segmentation category and type - 3D Slicer General Anatomy list~SCT^123037004^Anatomical Structure"
    "~SCT^10200004^Liver~^^~Anatomic codes - DICOM master list~^^~^^"
)
LABELMAP = "Binary labelmap"


def load(path: Path) -> Any:
    """The segmentation node that Slicer makes of a file."""
    scene = slicer.vtkMRMLScene()
    node = scene.AddNewNodeByClass("vtkMRMLSegmentationNode", "read")
    storage = scene.AddNewNodeByClass("vtkMRMLSegmentationStorageNode")
    storage.SetFileName(str(path))
    assert storage.ReadData(node) == 1
    _SCENES.append(scene)  # a node does not keep its scene alive
    return node


_SCENES: list[Any] = []


def segments_of(node: Any) -> list[Any]:
    segmentation = node.GetSegmentation()
    return [segmentation.GetNthSegment(n) for n in range(segmentation.GetNumberOfSegments())]


def image_to_world(image: Any) -> np.ndarray:
    import vtk

    matrix = vtk.vtkMatrix4x4()
    image.GetImageToWorldMatrix(matrix)
    return array_of(matrix)


def mask_of(segment: Any, geometry: Geometry) -> np.ndarray:
    """The segment as Slicer holds it, (K, J, I); fails where it is not on the grid."""
    from vtk.util.numpy_support import vtk_to_numpy

    image = segment.GetRepresentation(LABELMAP)
    i0, i1, j0, j1, k0, k1 = image.GetExtent()
    full = np.zeros(geometry.shape_kji, dtype=bool)
    if i1 < i0:
        return full
    np.testing.assert_allclose(image_to_world(image), geometry.affine, rtol=0, atol=1e-9)
    values = vtk_to_numpy(image.GetPointData().GetScalars()).reshape(k1 - k0 + 1, j1 - j0 + 1, i1 - i0 + 1)
    full[k0 : k1 + 1, j0 : j1 + 1, i0 : i1 + 1] = values == segment.GetLabelValue()
    return full


def random_masks(geometry: Geometry, count: int, share: float = 0.3) -> list[np.ndarray]:
    rng = np.random.default_rng(11)
    return [rng.random(geometry.shape_kji) < share for _ in range(count)]


def write_and_load(path: Path, segments: Sequence[Segment], geometry: Geometry) -> list[Any]:
    write_seg_nrrd(path, segments, geometry)
    return segments_of(load(path))


@pytest.mark.parametrize("name", GEOMETRIES)
def test_overlapping_masks_are_exact_on_every_grid(name: str, tmp_path: Path) -> None:
    geometry = GEOMETRIES[name]
    masks = random_masks(geometry, 5)
    segments = [Segment(f"liver {n}", mask, (0.1 * n, 0.5, 1.0)) for n, mask in enumerate(masks)]
    loaded = write_and_load(tmp_path / "a.seg.nrrd", segments, geometry)
    assert len(loaded) == len(masks)
    for segment, mask in zip(loaded, masks, strict=True):
        np.testing.assert_array_equal(mask_of(segment, geometry), mask)


@pytest.mark.parametrize("name", ["PSR", "oblique", "single slice", "odd widths"])
def test_disjoint_masks_share_a_layer_and_stay_exact(name: str, tmp_path: Path) -> None:
    geometry = GEOMETRIES[name]
    which = np.random.default_rng(5).integers(0, 4, geometry.shape_kji)
    segments = [Segment(f"part {n}", which == n, (1.0, 0.0, 0.0)) for n in (1, 2, 3)]
    loaded = write_and_load(tmp_path / "a.seg.nrrd", segments, geometry)
    assert [s.GetLabelValue() for s in loaded] == [1, 2, 3]
    assert len({s.GetRepresentation(LABELMAP) for s in loaded}) == 1
    for n, segment in zip((1, 2, 3), loaded, strict=True):
        np.testing.assert_array_equal(mask_of(segment, geometry), which == n)


def test_mixture_of_shared_and_own_layers(tmp_path: Path) -> None:
    geometry = oblique((13, 11, 7))
    a, b, c = random_masks(geometry, 3, share=0.2)
    masks = [a, b & ~a, c, np.zeros_like(a), a]
    segments = [Segment(str(n), mask, (0.0, 0.0, 1.0)) for n, mask in enumerate(masks)]
    loaded = write_and_load(tmp_path / "a.seg.nrrd", segments, geometry)
    for segment, mask in zip(loaded, masks, strict=True):
        np.testing.assert_array_equal(mask_of(segment, geometry), mask)


def test_names_colours_terminology_and_identifiers(tmp_path: Path) -> None:
    geometry = oblique()
    names = ["Leber (Rang 1, Größe 1,5 L)", "foie | rang 2 : 0.91", "肝臓 3", "печень \\ 4", "two\nlines", "50 % sure %7C"]
    colors = [(221 / 255, 130 / 255, 101 / 255), (0.0, 1.0, 0.5), (1 / 3, 2 / 3, 1.0)] * 2
    segments = [
        Segment(name, mask, color, LIVER) for name, mask, color in zip(names, random_masks(geometry, 6), colors, strict=True)
    ]
    path = tmp_path / "Größe 肝" / "proposals.seg.nrrd"
    path.parent.mkdir()
    write_seg_nrrd(path, segments, geometry)
    node = load(path)
    for n, segment in enumerate(segments_of(node)):
        assert segment.GetName() == names[n]
        assert not segment.GetNameAutoGenerated()
        assert not segment.GetColorAutoGenerated()
        np.testing.assert_allclose(segment.GetColor(), colors[n], atol=1e-8)
        assert tag(segment, slicer.vtkSegment.GetTerminologyEntryTagName()) == LIVER
        assert node.GetSegmentation().GetNthSegmentID(n) == f"Segment_{n + 1}"


def test_terminology_is_understood_by_slicers_terminology(tmp_path: Path) -> None:
    logic_class = getattr(slicer, "vtkSlicerTerminologiesModuleLogic", None)
    if logic_class is None:
        pytest.skip("this slicer-core has no terminology logic")
    mask = np.ones(oblique().shape_kji, bool)
    (segment,) = write_and_load(tmp_path / "a.seg.nrrd", [Segment("liver", mask, (1, 0, 0), LIVER)], oblique())
    entry = slicer.vtkSlicerTerminologyEntry()
    assert logic_class().DeserializeTerminologyEntry(tag(segment, "TerminologyEntry"), entry)
    assert entry.GetTypeObject().GetCodeValue() == "10200004"
    assert entry.GetTypeObject().GetCodeMeaning() == "Liver"


TAGS = {
    "ProGiDiff.score": "0.913",
    "ProGiDiff.prompt": "liver | left kidney; pancreas: all",
    "ProGiDiff:model|id": "a%7Cb%3A%25",
    "100%": "50% | 100%25",
    "ProGiDiff.json": '{"seed": 0, "order": [1, 2], "path": "C:\\\\Users\\\\Lékař\\n"}',
    "ProGiDiff.lines": "first\nsecond\r\nthird\\n",
    "ProGiDiff.empty": "",
    "ProGiDiff.colons": "::",
    "ProGiDiff.bars": "||",
}


def test_tags_come_back_exactly(tmp_path: Path) -> None:
    mask = np.ones(oblique().shape_kji, bool)
    segments = [Segment("liver", mask, (1, 0, 0), LIVER, TAGS), Segment("spleen", mask, (0, 1, 0))]
    first, _ = write_and_load(tmp_path / "a.seg.nrrd", segments, oblique())
    for key, value in TAGS.items():
        stored_key = next(k for k in _stored_keys(tmp_path / "a.seg.nrrd") if unescape_tag(k) == key)
        stored = tag(first, stored_key)
        assert stored is not None, key
        assert unescape_tag(stored) == value, key
    # Text without the special characters stays readable for everybody.
    assert tag(first, "ProGiDiff.score") == "0.913"


def _stored_keys(path: Path) -> list[str]:
    header = path.read_bytes().partition(b"\n\n")[0].decode()
    line = next(line for line in header.splitlines() if line.startswith("Segment0_Tags:="))
    return [part.partition(":")[0] for part in line.removeprefix("Segment0_Tags:=").split("|") if part]


def test_packed_masks_and_no_segments_at_all(tmp_path: Path) -> None:
    geometry = oblique()
    (mask,) = random_masks(geometry, 1)
    (loaded,) = write_and_load(tmp_path / "a.seg.nrrd", [Segment("liver", PackedMask.from_array(mask), (1, 0, 0))], geometry)
    np.testing.assert_array_equal(mask_of(loaded, geometry), mask)
    assert write_and_load(tmp_path / "none.seg.nrrd", [], geometry) == []


def test_only_empty_segments(tmp_path: Path) -> None:
    nothing = np.zeros(oblique().shape_kji, bool)
    segments = [Segment(n, nothing, (1, 0, 0), LIVER) for n in ("liver 1", "liver 2")]
    loaded = write_and_load(tmp_path / "a.seg.nrrd", segments, oblique())
    assert [s.GetName() for s in loaded] == ["liver 1", "liver 2"]
    assert not any(mask_of(s, oblique()).any() for s in loaded)


def test_more_segments_than_labels_in_a_layer(tmp_path: Path) -> None:
    geometry = oriented("LPS", (30, 20, 1), (1.0, 1.0, 1.0))
    segments = []
    for n in range(300):
        mask = np.zeros(geometry.shape_kji, bool)
        mask[0, n // 30, n % 30] = True
        segments.append(Segment(str(n), mask, (0.5, 0.5, 0.5)))
    loaded = write_and_load(tmp_path / "a.seg.nrrd", segments, geometry)
    for segment, expected in zip(loaded, segments, strict=True):
        np.testing.assert_array_equal(mask_of(segment, geometry), expected.mask)


def test_reference_geometry_is_the_images(tmp_path: Path) -> None:
    geometry = oblique()
    mask = np.zeros(geometry.shape_kji, bool)
    mask[2, 3, 4] = True
    write_seg_nrrd(tmp_path / "a.seg.nrrd", [Segment("liver", mask, (1, 0, 0))], geometry)
    converter = slicer.vtkSegmentationConverter
    segmentation = load(tmp_path / "a.seg.nrrd").GetSegmentation()
    stored = segmentation.GetConversionParameter(converter.GetReferenceImageGeometryParameterName())
    image = slicer.vtkOrientedImageData()
    assert converter.DeserializeImageGeometry(stored, image, False)
    np.testing.assert_allclose(image_to_world(image), geometry.affine, rtol=0, atol=1e-9)
    assert image.GetExtent() == (0, 8, 0, 7, 0, 5)


@pytest.mark.parametrize("suffix", [".nii.gz", ".nrrd"])
@pytest.mark.parametrize("name", GEOMETRIES)
def test_segments_lie_on_the_volume_as_slicer_reads_it(name: str, suffix: str, tmp_path: Path) -> None:
    """The user's image through Slicer's volume reader, our result of it through its segmentation reader."""
    geometry = GEOMETRIES[name]
    write_volume(tmp_path / f"image{suffix}", ramp(geometry), geometry)
    volume = read_volume(tmp_path / f"image{suffix}")
    mask = volume.array > np.median(volume.array)
    (segment,) = write_and_load(tmp_path / "a.seg.nrrd", [Segment("x", mask, (1, 0, 0))], volume.geometry)
    _assert_same_place(tmp_path / f"image{suffix}", segment, volume)
    np.testing.assert_array_equal(mask_of(segment, volume.geometry), mask)


def _assert_same_place(image: Path, segment: Any, volume: Volume) -> None:
    """The image shows, at the place of each voxel of the segment's grid, the value that we read there.

    Indices may differ: Slicer turns left-handed images around on loading.
    """
    import vtk
    from vtk.util.numpy_support import vtk_to_numpy

    scene = slicer.vtkMRMLScene()
    node = scene.AddNewNodeByClass("vtkMRMLScalarVolumeNode")
    storage = scene.AddNewNodeByClass("vtkMRMLVolumeArchetypeStorageNode")
    storage.SetFileName(str(image))
    storage.SetSingleFile(True)
    assert storage.ReadData(node) == 1
    matrix = vtk.vtkMatrix4x4()
    node.GetRASToIJKMatrix(matrix)
    to_shown = array_of(matrix)
    shown = vtk_to_numpy(node.GetImageData().GetPointData().GetScalars())
    shown = shown.reshape(node.GetImageData().GetDimensions()[::-1])

    on_grid = image_to_world(segment.GetRepresentation(LABELMAP))
    k, j, i = np.indices(volume.array.shape).reshape(3, -1)
    at = (to_shown @ on_grid @ np.stack([i, j, k, np.ones_like(i)]))[:3]
    nearest = np.rint(at).astype(int)
    np.testing.assert_allclose(at, nearest, rtol=0, atol=1e-3)
    np.testing.assert_array_equal(shown[nearest[2], nearest[1], nearest[0]], volume.array.ravel())


@pytest.mark.parametrize(("scan", "labels"), [("example_ct_sm", "example_seg"), ("example_mr_sm", "example_seg_mr")])
def test_real_labels_on_real_scans(scan: str, labels: str, shared_data: Path, tmp_path: Path) -> None:
    folder = shared_data / "permissive" / "totalsegmentator_tests"
    volume = read_volume(folder / f"{scan}.nii.gz")
    label_array = read_volume(folder / f"{labels}.nii.gz").array
    values = [int(v) for v in np.unique(label_array) if v]
    # Every organ as it is, and the largest three once more, as overlapping proposals would be.
    largest = sorted(values, key=lambda v: -np.count_nonzero(label_array == v))[:3]
    masks = [label_array == v for v in values + largest]
    segments = [Segment(f"organ {n}", mask, (0.2, 0.4, 0.6), LIVER) for n, mask in enumerate(masks)]
    loaded = write_and_load(tmp_path / "a.seg.nrrd", segments, volume.geometry)
    assert len(loaded) == len(masks) > 20
    for segment, mask in zip(loaded, masks, strict=True):
        np.testing.assert_array_equal(mask_of(segment, volume.geometry), mask)
    _assert_same_place(folder / f"{scan}.nii.gz", loaded[0], volume)


def test_slicer_saves_it_again_without_loss(tmp_path: Path) -> None:
    geometry = oblique()
    masks = random_masks(geometry, 3)
    segments = [Segment(f"liver {n}", mask, (0.25, 0.5, 0.75), LIVER, TAGS) for n, mask in enumerate(masks)]
    write_seg_nrrd(tmp_path / "a.seg.nrrd", segments, geometry)
    node = load(tmp_path / "a.seg.nrrd")
    storage = node.GetScene().AddNewNodeByClass("vtkMRMLSegmentationStorageNode")
    storage.SetFileName(str(tmp_path / "b.seg.nrrd"))
    assert storage.WriteData(node) == 1
    for segment, mask in zip(segments_of(load(tmp_path / "b.seg.nrrd")), masks, strict=True):
        np.testing.assert_array_equal(mask_of(segment, geometry), mask)
        for key in _stored_keys(tmp_path / "b.seg.nrrd"):
            if key != "TerminologyEntry":
                assert unescape_tag(tag(segment, key) or "") == TAGS[unescape_tag(key)]
