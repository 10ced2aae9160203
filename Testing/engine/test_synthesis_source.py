"""Synthetic slices: repeatable, in range, with organs where they belong and with labels that fit the picture."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch

from progidiff.errors import DatasetError
from progidiff.synthesis.fields import blur, linear_values, nearest_values, plane_coordinates, smooth_noise, voronoi_parcels
from progidiff.synthesis.labelmaps import (
    LabelVolume,
    blend,
    load_permissive,
    load_spl_atlas,
    make_volume,
    pack,
    split_duodenum,
    unpack,
)
from progidiff.synthesis.painting import drop_organs
from progidiff.synthesis.phantoms import phantom_tissues
from progidiff.synthesis.source import BODY_GRIDS, Plane, SyntheticSource
from progidiff.synthesis.tissues import INDEX, ORGANS, TISSUES, VOCABULARY, tissue_of
from progidiff.training.batches import ReusedBatches, SyntheticBatches

SIZE, PIXEL = 64, 6.0
SQUARE: dict[Plane, tuple[int, int]] = {"axial": (SIZE, SIZE)}


def toy_volume(image: bool = False) -> LabelVolume:
    """A body of 300 mm with a liver on the image's left, a left kidney on its right, both as blocks."""
    tissues = np.zeros((6, 60, 80), np.uint8)
    tissues[:, 15:40, 12:35] = INDEX["liver"]
    tissues[:, 30:45, 52:64] = INDEX["left kidney"]
    rows, cols = np.mgrid[:60, :80]
    body = np.broadcast_to(np.hypot((rows - 29.5) / 25, (cols - 39.5) / 37) < 1, tissues.shape)
    tissues[body & (np.hypot((rows - 29.5) / 25, (cols - 39.5) / 37) > 0.93)] = INDEX["muscle"]
    pixels = np.where(tissues > 0, 100.0, np.where(body, -100.0, -1000.0)) if image else None
    return make_volume("toy", "CT", tissues, (5.0, 4.0, 4.0), "none", body=body, image=pixels)


def columns(mask: torch.Tensor) -> float:
    return float(torch.nonzero(mask)[:, 1].float().mean())


def test_the_same_seed_gives_the_same_slices() -> None:
    one, two, other = (SyntheticSource([toy_volume()], SQUARE, PIXEL, seed=seed) for seed in (3, 3, 4))
    a, b, c = one.batch(4), two.batch(4), other.batch(4)
    assert torch.equal(a.images, b.images)
    assert torch.equal(a.tissues, b.tissues)
    assert not torch.equal(a.images, c.images)
    assert not torch.equal(a.images, one.batch(4).images)


def test_a_restored_source_goes_on_where_it_was() -> None:
    first = SyntheticSource([toy_volume(image=True)], SQUARE, PIXEL, seed=1)
    first.batch(3)
    state = first.state()
    wanted = first.batch(3)
    second = SyntheticSource([toy_volume(image=True)], SQUARE, PIXEL, seed=77)
    second.restore(state)
    found = second.batch(3)
    assert torch.equal(found.images, wanted.images)
    assert torch.equal(found.tissues, wanted.tissues)


@pytest.mark.parametrize("kind", ["phantoms", "labels", "labels and image"])
def test_slices_have_the_promised_types_and_ranges(kind: str) -> None:
    volumes = [] if kind == "phantoms" else [toy_volume(image="image" in kind)]
    made = SyntheticSource(volumes, SQUARE, PIXEL, seed=2).batch(6)
    assert made.images.shape == (6, 1, SIZE, SIZE)
    assert made.images.dtype == torch.float32
    assert made.images.isfinite().all()
    assert 0 <= float(made.images.min()) <= float(made.images.max()) <= 1
    assert made.images.flatten(1).std(1).min() > 0.02  # no empty pictures
    assert made.tissues.dtype == torch.int64
    assert 0 <= int(made.tissues.min()) <= int(made.tissues.max()) < len(TISSUES)


def test_phantoms_need_no_data_and_show_every_organ() -> None:
    organs = SyntheticSource([], SQUARE, PIXEL, seed=0).batch(24).tissues
    share = {name: float((organs == i).flatten(1).any(1).float().mean()) for i, name in enumerate(ORGANS, 1)}
    assert min(share.values()) > 0.2
    assert share["gallbladder"] < 1.0  # absence is taught as well


def test_left_and_right_are_those_of_a_radiological_view() -> None:
    organs = SyntheticSource([], SQUARE, PIXEL, seed=5).batch(24).tissues
    left, right, liver = (ORGANS.index(name) + 1 for name in ("left kidney", "right kidney", "liver"))
    both = [o for o in organs if (o == left).any() and (o == right).any() and (o == liver).any()]
    assert len(both) > 8
    # The patient's left is on the image's right; the liver is on the patient's right.
    assert all(columns(o == left) > columns(o == right) for o in both)
    assert np.mean([columns(o == liver) < columns(o == left) for o in both]) == 1.0


def test_label_volumes_are_not_mirrored() -> None:
    source = SyntheticSource([toy_volume()], SQUARE, PIXEL, seed=6, phantom_share=0.0)
    organs = source.batch(16).tissues
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
    made = SyntheticSource(volumes, SQUARE, PIXEL, seed=8).batch(24)
    masks = made.tissues == ORGANS.index("liver") + 1
    right = contrast(made.images, masks)
    wrong = contrast(made.images, masks.roll(1, 0))  # another slice's labels
    assert len(right) > 8
    assert np.mean([c > 0.05 for c in right]) > 0.6
    assert np.median(right) > 1.3 * np.median(wrong)


def test_kidneys_are_the_union_and_unpainted_targets_stay_unknown() -> None:
    batches = SyntheticBatches(
        SyntheticSource([], SQUARE, PIXEL, seed=1), ("kidneys", "left kidney", "duodenum", "right kidney")
    )
    made = batches.batch(6)
    assert torch.equal(made.masks[:, 0], made.masks[:, 1] | made.masks[:, 3])
    assert made.known.tolist() == [[True, True, False, True]] * 6
    assert not made.masks[:, 2].any()
    assert set(VOCABULARY) > {*ORGANS, "kidneys", "duodenum"}


def test_dropped_organs_vanish_whole() -> None:
    tissues = torch.from_numpy(toy_volume().tissues).long()
    dropped = drop_organs(tissues, torch.Generator().manual_seed(0), probability=0.5)
    for before, now in zip(tissues, dropped, strict=True):
        for organ in (INDEX["liver"], INDEX["left kidney"]):
            assert int((now == organ).sum()) in (0, int((before == organ).sum()))
    assert not torch.equal(dropped, tissues)


def test_straight_coordinates_without_strength() -> None:
    offsets = plane_coordinates(2, (8, 8), torch.full((2,), 3.0), torch.Generator().manual_seed(0), strength=0.0)
    axis = (torch.arange(8) - 3.5) * 3.0
    assert torch.allclose(offsets[0, :, 0, 1], axis)
    assert torch.allclose(offsets[1, 0, :, 2], axis)
    assert float(offsets[..., 0].abs().max()) == 0.0


def test_sampling_a_volume_at_its_own_voxels_gives_it_back() -> None:
    volume = torch.arange(4 * 5 * 5).reshape(4, 5, 5).float()
    rows, cols = torch.meshgrid(torch.arange(5.0), torch.arange(5.0), indexing="ij")
    voxel = torch.stack([torch.full_like(rows, 2.0), rows, cols], -1)[None]
    assert torch.equal(nearest_values(volume, voxel)[0], volume[2])
    assert torch.allclose(linear_values(volume, voxel)[0], volume[2], atol=1e-4)
    assert torch.equal(nearest_values(volume, voxel - torch.tensor([9.0, 0, 0]))[0], volume[0])  # the border goes on


def test_fields_have_unit_deviation_and_blur_keeps_the_mean() -> None:
    generator = torch.Generator().manual_seed(0)
    field = smooth_noise(3, 2, (40, 48), 6, generator)
    assert torch.allclose(field.std((-2, -1)), torch.ones(3, 2), atol=1e-4)
    x = torch.rand(2, 1, 32, 32, generator=generator)
    blurred = blur(x, torch.tensor([0.0, 1.5]))
    assert torch.allclose(blurred[0], x[0], atol=1e-5)
    assert float(blurred[1].std()) < 0.5 * float(x[1].std())
    assert float(blurred[1].mean()) == pytest.approx(float(x[1].mean()), abs=0.02)


def test_phantom_tissues_are_known_ones_inside_the_body() -> None:
    pixel, half = torch.full((4,), PIXEL), torch.full((4,), 140.0)
    tissues, wall = phantom_tissues(4, (SIZE, SIZE), pixel, torch.Generator().manual_seed(1), half)
    assert 0 <= int(tissues.min()) <= int(tissues.max()) < len(TISSUES)
    organ = (tissues > 0) & (tissues <= len(ORGANS))
    assert float((wall[organ] < 8).float().mean()) > 0.99


@pytest.mark.parametrize(
    ("label", "tissue"),
    [
        ("kidney_left", "left kidney"),
        ("right kidney", "right kidney"),
        ("portal_vein_and_splenic_vein", "portal vein"),
        ("colon_and_ileum", "bowel"),
        ("right_psoas_muscle", "iliopsoas"),
        ("urinary_bladder", "urinary bladder"),
        ("inferior_vena_cava", "inferior vena cava"),
        ("iliac_artery_left", "artery"),
        ("vertebrae_L1", "vertebra"),
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


@pytest.mark.slow
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


@pytest.mark.slow
def test_a_grid_on_the_body_is_filled_by_it_and_all_planes_are_painted() -> None:
    deep = toy_volume()
    tall = replace(deep, **{key: np.repeat(getattr(deep, key), 8, 0) for key in ("tissues", "wall", "skin")})
    source = SyntheticSource([tall], seed=3, phantom_share=0.0, strength=0.0)
    seen = {tuple(made.images.shape[-2:]) for made in (source.batch(2) for _ in range(40))}
    assert seen == set(BODY_GRIDS.values())
    wide = [made for made in (source.batch(4) for _ in range(8)) if made.images.shape[-2:] == BODY_GRIDS["axial"]]
    columns = [torch.nonzero(tissues.any(0))[:, 0] for made in wide for tissues in made.tissues]
    spans = [int(found[-1] - found[0]) for found in columns]
    # the wall is 296 mm wide, with up to 35 mm of fat on either side; now and then the widest organ was taken out
    assert np.median(spans) > 0.6 * 160
    assert max(spans) <= 160


def test_unlabelled_targets_of_a_volume_stay_unknown() -> None:
    half = replace(toy_volume(), known=frozenset({"liver"}))
    made = SyntheticSource([half], SQUARE, PIXEL, seed=1, phantom_share=0.0).batch(3)
    assert made.known.sum(1).tolist() == [1, 1, 1]
    assert bool(made.known[:, VOCABULARY.index("liver")].all())


def test_parts_divide_every_picture() -> None:
    parts = voronoi_parcels(2, (30, 40), 30, 4, torch.Generator().manual_seed(0))
    assert parts.shape == (2, 30, 40)
    assert parts.unique().tolist() == [0, 1, 2, 3]


@pytest.mark.slow
def test_reused_slices_resume_exactly_and_are_varied() -> None:
    first, again = (
        ReusedBatches(SyntheticSource([], SQUARE, PIXEL), ("liver", "kidneys"), seed=5, visits=1) for _ in range(2)
    )
    for _ in range(20):  # past the first shard
        first.batch(6)
    state = first.state()
    wanted = first.batch(6)
    again.restore(state)
    found = again.batch(6)
    assert torch.equal(found.images, wanted.images)
    assert torch.equal(found.masks, wanted.masks)
    assert not torch.equal(first.batch(6).images, wanted.images)
    assert 0 <= float(found.images.min()) <= float(found.images.max()) <= 1


def test_a_blend_has_organs_between_two_patients() -> None:
    one = toy_volume()
    moved = np.roll(one.tissues, 6, axis=2)
    moved[one.tissues == INDEX["muscle"]] = INDEX["muscle"]
    other = make_volume("other", "CT", moved, one.spacing, "none")
    between = blend(one, other, 0.5)
    middle = [np.argwhere(v.tissues == INDEX["liver"])[:, 2].mean() for v in (one, between, other)]
    assert middle[0] < middle[2]
    sizes = [(v.tissues == INDEX["liver"]).sum() for v in (one, between, other)]
    assert 0.7 * sizes[2] < sizes[1] < 1.4 * sizes[2]
    assert between.wall is other.wall


def test_packed_volumes_come_back_and_share_what_they_share(tmp_path: Path) -> None:
    one = toy_volume(image=True)
    twin = replace(one, name="twin", image=None, known=frozenset({"liver"}))
    pack([one, twin], tmp_path / "volumes.npz")
    found = unpack(tmp_path / "volumes.npz")
    assert [v.name for v in found] == ["toy", "twin"]
    assert np.array_equal(found[0].tissues, one.tissues)
    assert found[0].image is not None
    assert found[1].image is None
    assert found[1].wall is found[0].wall
    assert (found[1].known, found[1].spacing) == (twin.known, twin.spacing)
    with pytest.raises(DatasetError, match="pack them again"):
        unpack(tmp_path / "nothing.npz")


def test_a_folder_without_label_volumes_is_refused(tmp_path: Path) -> None:
    with pytest.raises(DatasetError, match="permissive"):
        load_permissive(tmp_path)
