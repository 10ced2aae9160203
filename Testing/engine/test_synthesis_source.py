"""Synthetic slices: repeatable, in range, with organs where they belong and with labels that fit the picture."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch

from progidiff.errors import DatasetError
from progidiff.synthesis.fields import blur, plane_coordinates, sample_volume, smooth_noise
from progidiff.synthesis.labelmaps import LabelVolume, load_permissive, load_spl_atlas, split_duodenum
from progidiff.synthesis.painting import drop_organs
from progidiff.synthesis.phantoms import phantom_tissues
from progidiff.synthesis.source import SyntheticSource
from progidiff.synthesis.tissues import INDEX, ORGANS, TISSUES, VOCABULARY, tissue_of
from progidiff.training.batches import SyntheticBatches

SIZE, PIXEL = 64, 6.0


def toy_volume(image: bool = False) -> LabelVolume:
    """A body of 300 mm with a liver on the image's left, a left kidney on its right, both as blocks."""
    tissues = np.zeros((6, 60, 80), np.uint8)
    tissues[:, 15:40, 12:35] = INDEX["liver"]
    tissues[:, 30:45, 52:64] = INDEX["left kidney"]
    rows, cols = np.mgrid[:60, :80]
    outline = (np.hypot((rows - 29.5) / 25, (cols - 39.5) / 37) - 1) * 100
    pixels = np.where(tissues > 0, 100.0, np.where(outline < 0, -100.0, -1000.0)).astype(np.float32) if image else None
    spacing = (5.0, 4.0, 4.0)
    stack = np.broadcast_to(outline.astype(np.float32), tissues.shape).copy()
    return LabelVolume("toy", "CT", tissues, stack, pixels, spacing, np.arange(6), "none")


def columns(mask: torch.Tensor) -> float:
    return float(torch.nonzero(mask)[:, 1].float().mean())


def test_the_same_seed_gives_the_same_slices() -> None:
    one, two, other = (SyntheticSource([toy_volume()], SIZE, PIXEL, seed=seed) for seed in (3, 3, 4))
    a, b, c = one.batch(4), two.batch(4), other.batch(4)
    assert torch.equal(a.images, b.images)
    assert torch.equal(a.organs, b.organs)
    assert not torch.equal(a.images, c.images)
    assert not torch.equal(a.images, one.batch(4).images)


def test_a_restored_source_goes_on_where_it_was() -> None:
    first = SyntheticSource([toy_volume(image=True)], SIZE, PIXEL, seed=1)
    first.batch(3)
    state = first.state()
    wanted = first.batch(3)
    second = SyntheticSource([toy_volume(image=True)], SIZE, PIXEL, seed=77)
    second.restore(state)
    found = second.batch(3)
    assert torch.equal(found.images, wanted.images)
    assert torch.equal(found.organs, wanted.organs)


@pytest.mark.parametrize("kind", ["phantoms", "labels", "labels and image"])
def test_slices_have_the_promised_types_and_ranges(kind: str) -> None:
    volumes = [] if kind == "phantoms" else [toy_volume(image="image" in kind)]
    made = SyntheticSource(volumes, SIZE, PIXEL, seed=2).batch(6)
    assert made.images.shape == (6, 1, SIZE, SIZE)
    assert made.images.dtype == torch.float32
    assert made.images.isfinite().all()
    assert 0 <= float(made.images.min()) <= float(made.images.max()) <= 1
    assert made.images.flatten(1).std(1).min() > 0.02  # no empty pictures
    assert made.organs.dtype == torch.int64
    assert 0 <= int(made.organs.min()) <= int(made.organs.max()) <= len(ORGANS)


def test_phantoms_need_no_data_and_show_every_organ() -> None:
    organs = SyntheticSource([], SIZE, PIXEL, seed=0).batch(24).organs
    share = {name: float((organs == i).flatten(1).any(1).float().mean()) for i, name in enumerate(ORGANS, 1)}
    assert min(share.values()) > 0.2
    assert share["gallbladder"] < 1.0  # absence is taught as well


def test_left_and_right_are_those_of_a_radiological_view() -> None:
    organs = SyntheticSource([], SIZE, PIXEL, seed=5).batch(24).organs
    left, right, liver = (ORGANS.index(name) + 1 for name in ("left kidney", "right kidney", "liver"))
    both = [o for o in organs if (o == left).any() and (o == right).any() and (o == liver).any()]
    assert len(both) > 8
    # The patient's left is on the image's right; the liver is on the patient's right.
    assert all(columns(o == left) > columns(o == right) for o in both)
    assert np.mean([columns(o == liver) < columns(o == left) for o in both]) == 1.0


def test_label_volumes_are_not_mirrored() -> None:
    source = SyntheticSource([toy_volume()], SIZE, PIXEL, seed=6, phantom_share=0.0)
    organs = source.batch(16).organs
    kidney, liver = ORGANS.index("left kidney") + 1, ORGANS.index("liver") + 1
    both = [o for o in organs if (o == kidney).any() and (o == liver).any()]
    assert len(both) > 8
    assert all(columns(o == kidney) > columns(o == liver) for o in both)


def contrast(images: torch.Tensor, masks: torch.Tensor) -> list[float]:
    """Difference of mean grey between a mask and the ring around it, by slice, where it is large enough."""
    found = []
    for image, mask in zip(images[:, 0], masks, strict=True):
        near = torch.nn.functional.max_pool2d(mask[None, None].float(), 7, 1, 3)[0, 0] > 0
        ring = near & ~mask
        if mask.sum() > 30 and ring.sum() > 30:
            found.append(abs(float(image[mask].mean() - image[ring].mean())))
    return found


@pytest.mark.parametrize("volumes", [[], [toy_volume()], [toy_volume(image=True)]], ids=["phantoms", "labels", "image"])
def test_labels_lie_where_the_organs_were_painted(volumes: list[LabelVolume]) -> None:
    made = SyntheticSource(volumes, SIZE, PIXEL, seed=8).batch(24)
    masks = made.organs == ORGANS.index("liver") + 1
    right = contrast(made.images, masks)
    wrong = contrast(made.images, masks.roll(1, 0))  # another slice's labels
    assert len(right) > 8
    assert np.mean([c > 0.05 for c in right]) > 0.6
    assert np.median(right) > 1.3 * np.median(wrong)


def test_kidneys_are_the_union_and_unpainted_targets_stay_unknown() -> None:
    batches = SyntheticBatches(
        SyntheticSource([], SIZE, PIXEL, seed=1), ("kidneys", "left kidney", "duodenum", "right kidney")
    )
    made = batches.batch(6)
    assert torch.equal(made.masks[:, 0], made.masks[:, 1] | made.masks[:, 3])
    assert made.known.tolist() == [[True, True, False, True]] * 6
    assert not made.masks[:, 2].any()
    assert set(VOCABULARY) == {*ORGANS, "kidneys"}


def test_dropped_organs_vanish_whole() -> None:
    tissues = torch.from_numpy(toy_volume().tissues).long()
    dropped = drop_organs(tissues, torch.Generator().manual_seed(0), probability=0.5)
    for before, now in zip(tissues, dropped, strict=True):
        for organ in (INDEX["liver"], INDEX["left kidney"]):
            assert int((now == organ).sum()) in (0, int((before == organ).sum()))
    assert not torch.equal(dropped, tissues)


def test_straight_coordinates_without_strength() -> None:
    offsets = plane_coordinates(2, 8, 3.0, torch.ones(2), torch.Generator().manual_seed(0), strength=0.0)
    axis = (torch.arange(8) - 3.5) * 3.0
    assert torch.allclose(offsets[0, :, 0, 1], axis)
    assert torch.allclose(offsets[1, 0, :, 2], axis)
    assert float(offsets[..., 0].abs().max()) == 0.0


def test_sampling_a_volume_at_its_own_voxels_gives_it_back() -> None:
    volume = torch.arange(4 * 5 * 5).reshape(4, 5, 5).float()
    rows, cols = torch.meshgrid(torch.arange(5.0), torch.arange(5.0), indexing="ij")
    voxel = torch.stack([torch.full_like(rows, 2.0), rows, cols], -1)[None]
    for nearest in (True, False):
        assert torch.allclose(sample_volume(volume, voxel, nearest)[0], volume[2], atol=1e-4)


def test_fields_have_unit_deviation_and_blur_keeps_the_mean() -> None:
    generator = torch.Generator().manual_seed(0)
    field = smooth_noise(3, 2, 48, 6, generator)
    assert torch.allclose(field.std((-2, -1)), torch.ones(3, 2), atol=1e-4)
    x = torch.rand(2, 1, 32, 32, generator=generator)
    blurred = blur(x, torch.tensor([0.0, 1.5]))
    assert torch.allclose(blurred[0], x[0], atol=1e-5)
    assert float(blurred[1].std()) < 0.5 * float(x[1].std())
    assert float(blurred[1].mean()) == pytest.approx(float(x[1].mean()), abs=0.02)


def test_phantom_tissues_are_known_ones_inside_the_body() -> None:
    tissues, outline = phantom_tissues(4, SIZE, PIXEL, torch.Generator().manual_seed(1))
    assert 0 <= int(tissues.min()) <= int(tissues.max()) < len(TISSUES)
    organ = (tissues > 0) & (tissues <= len(ORGANS))
    assert float((outline[organ] < 8).float().mean()) > 0.99


@pytest.mark.parametrize(
    ("label", "tissue"),
    [
        ("kidney_left", "left kidney"),
        ("right kidney", "right kidney"),
        ("portal_vein_and_splenic_vein", "vein"),
        ("inferior_vena_cava", "inferior vena cava"),
        ("iliac_artery_left", "artery"),
        ("vertebrae_L1", "bone"),
        ("something odd", "other"),
    ],
)
def test_label_names_mean_tissues(label: str, tissue: str) -> None:
    assert tissue_of(label) == INDEX[tissue]


def test_the_duodenum_is_split_off_by_thickness() -> None:
    tissues = np.zeros((30, 60, 60), np.uint8)
    z, y, x = np.mgrid[:30, :60, :60]
    tissues[(z - 15) ** 2 + (y - 20) ** 2 + (x - 20) ** 2 < 13**2] = INDEX["stomach"]
    tissues[13:18, 18:23, 30:58] = INDEX["stomach"]  # a tube of 10 mm that leaves the ball
    split = split_duodenum(tissues, (2.0, 2.0, 2.0))
    assert split[15, 20, 20] == INDEX["stomach"]
    assert split[15, 20, 52] == INDEX["duodenum"]
    assert np.array_equal(split > 0, tissues > 0)
    thin = np.where(x[:, :, :] > 27, tissues, 0).astype(np.uint8)
    assert np.array_equal(split_duodenum(thin, (0.5, 0.5, 0.5)), thin)  # nothing thick: left as it is


def test_the_atlas_has_stomach_and_duodenum(shared_data: Path) -> None:
    atlas = load_spl_atlas(shared_data / "permissive" / "spl_abdominal_atlas")
    stomach, duodenum = ((atlas.tissues == INDEX[name]).sum() for name in ("stomach", "duodenum"))
    assert stomach > duodenum > 0
    # columns run patient right to left: the liver lies before the spleen, and slices run upwards to the lung
    centre = {
        n: np.argwhere(atlas.tissues == INDEX[n]).mean(0)
        for n in ("liver", "spleen", "left kidney", "right kidney", "stomach", "duodenum")
    }
    assert centre["liver"][2] < centre["spleen"][2]
    assert centre["right kidney"][2] < centre["left kidney"][2]
    assert centre["liver"][0] > centre["right kidney"][0]
    assert centre["duodenum"][2] < centre["stomach"][2]


def test_a_folder_without_label_volumes_is_refused(tmp_path: Path) -> None:
    with pytest.raises(DatasetError, match="permissive"):
        load_permissive(tmp_path)
