"""Batches from labelled data: the engine's own pictures, partial labels, splits by patient, bounded memory, exact resume."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from progidiff.cards import Window
from progidiff.datasets.slices import LabelledSlice
from progidiff.errors import DatasetError, ModelError
from progidiff.sampling.image import lay_grid, normaliser
from progidiff.training.batches import (
    DatasetBatches,
    MixedBatches,
    TrainingBatch,
    augment,
    painted_batches,
    split_stacks,
    validation_batches,
    without_margin,
)
from progidiff.training.sources import TrainingData, choose_vocabulary, make_source, make_validation, open_data
from progidiff.training.stacks import Stack, margin_of, open_dataset, prepare, stacks_of

from ..volume_examples import write_nnunet
from .conftest import tiny_card

VOCABULARY = ["liver", "spleen", "left kidney"]
SIZE, PIXEL = 32, 8.0


def labelled(patient: str, seed: int = 0, **changes: Any) -> LabelledSlice:
    """A body with a liver on the image's left and a left kidney on its right; the spleen is not labelled."""
    rng = np.random.default_rng(seed)
    rows, cols = np.mgrid[:60, :70]
    body = np.hypot((rows - 30) / 24, (cols - 34) / 30) < 1
    liver, kidney = np.hypot(rows - 28, cols - 20) < 9, np.hypot(rows - 36, cols - 50) < 5
    image = np.where(body, 20.0, -1000.0) + 100 * liver + 150 * kidney + rng.normal(0, 5, body.shape)
    labels = {"liver": liver & body, "left kidney": kidney & body}
    fields: dict[str, Any] = {
        "image": image.astype(np.float32),
        "spacing_rc": (4.0, 4.0),
        "labels": labels,
        "labelled": frozenset(labels),
        "patient": patient,
        "modality": "CT",
        "slice_id": f"{patient}-{seed}",
    }
    return LabelledSlice(**fields | changes)


def stacks(patients: int = 4, slices: int = 2) -> list[Stack]:
    return stacks_of([labelled(f"p{p}", 10 * p + s) for p in range(patients) for s in range(slices)])


def same(a: TrainingBatch, b: TrainingBatch) -> bool:
    return all(torch.equal(getattr(a, n), getattr(b, n)) for n in ("images", "masks", "known"))


def write_cases(folder: Path, cases: Sequence[str], **description: Any) -> Path:
    """CT cases of three slices with a liver (1) and a left kidney (2), in RAS order."""
    made = {}
    for number, case in enumerate(cases):
        item = labelled(case, number)
        values = item.labels["liver"] * 1 + item.labels["left kidney"] * 2
        made[case] = tuple(np.repeat(a[None, ::-1, ::-1], 3, 0) for a in (item.image, values))
    return write_nnunet(folder, made, np.diag([4.0, 4.0, 5.0, 1.0]), {"liver": 1, "left_kidney": 2}, **description)


def write_slices(folder: Path, patients: Sequence[str], target: str = "spleen") -> Path:
    folder.mkdir(parents=True)
    rows = []
    for number, patient in enumerate(patients):
        item = labelled(patient, number)
        np.save(folder / f"{number}.npy", item.image)
        np.save(folder / f"{number}_mask.npy", item.labels["liver"].astype(np.uint8))
        rows.append({"image": f"{number}.npy", "mask": f"{number}_mask.npy", "patient": patient})
    content = {"modality": "CT", "spacing_mm": [4, 4], "labels": {"1": target}, "slices": rows}
    (folder / "manifest.json").write_text(json.dumps(content), "utf-8")
    return folder


def test_pictures_are_those_that_the_engine_makes() -> None:
    item = labelled("p")
    prepared = prepare(stacks_of([item])[0], tiny_card())
    normal = normaliser(item.image[None], tiny_card(), "CT")(item.image)
    grid = lay_grid(tiny_card(), "axial", [normal], (60, 70), item.spacing_rc)
    wanted = grid.to_model(torch.from_numpy(normal))
    image, masks, known = prepared.slice(0)
    cut, inner = without_margin(image[None], masks[None], margin_of(tiny_card()))
    assert cut.shape == (1, 1, SIZE, SIZE)
    assert torch.allclose(cut, wanted, atol=6e-4)  # half precision in memory
    liver = grid.to_model(torch.from_numpy(item.labels["liver"].astype(np.float32)))[0, 0] > 0.5
    assert torch.equal(inner[0, 0], liver)
    assert known.tolist() == [True, False, True]
    assert not masks[1].any()
    assert prepared.images.shape[-1] == SIZE + 2 * margin_of(tiny_card())


def test_mr_percentiles_are_those_of_the_whole_stack() -> None:
    dim, bright = labelled("p", 1, modality="MR"), labelled("p", 2, modality="MR")
    bright = labelled("p", 2, modality="MR", image=bright.image + 500)
    together = prepare(stacks_of([dim, bright])[0], tiny_card())
    assert together.is_mr
    assert together.images[1].mean() > together.images[0].mean() + 0.2
    shown = labelled("p", image=np.full((60, 70), 0.5, np.float32), window="display")
    prepared = prepare(stacks_of([shown])[0], tiny_card())
    assert float(prepared.images[0][SIZE // 2, SIZE // 2]) == 0.5, "windowed pictures are taken as they are"


def test_what_cannot_be_used_is_refused_or_left_out() -> None:
    with pytest.raises(ModelError, match="not for MR"):
        prepare(
            stacks_of([labelled("p", modality="MR")])[0],
            tiny_card(windows={"CT": Window(kind="hu", low=0, high=1)}, modalities=["CT"]),
        )
    with pytest.raises(DatasetError, match="uniform"):
        prepare(stacks_of([labelled("p", modality="MR", image=np.ones((60, 70), np.float32))])[0], tiny_card())
    assert prepare(stacks_of([labelled("p")])[0], tiny_card(vocabulary=["aorta"])) is None
    with pytest.raises(DatasetError, match="no cases"):
        DatasetBatches([], tiny_card())


@pytest.mark.slow
def test_empty_label_maps_teach_nothing() -> None:
    nothing = np.zeros((60, 70), bool)
    empty = [labelled(f"p{n}", n, labels={"liver": nothing, "left kidney": nothing}) for n in range(4)]
    foreign = [labelled("f", 5, labels={"aorta": nothing}, labelled=frozenset({"aorta"}))]
    for cache_mb, more in ((0.01, []), (1000.0, foreign)):
        source = DatasetBatches(stacks_of([*empty, *more]), tiny_card(), seed=1, cache_mb=cache_mb)
        with pytest.raises(DatasetError, match="are empty, or show nothing large enough"):
            [source.batch(2) for _ in range(12)]
        # a case without the organ is an example like any other, beside one that shows it
        source = DatasetBatches(stacks_of([*empty, labelled("shows", 9)]), tiny_card(), seed=1, cache_mb=cache_mb)
        for _ in range(12):
            source.batch(2)
        resumed = DatasetBatches(stacks_of([*empty, labelled("shows", 9)]), tiny_card(), seed=1, cache_mb=cache_mb)
        resumed.restore(source.state())
        for _ in range(12):
            resumed.batch(2)


def test_batches_are_labelled_in_part_and_never_mirrored() -> None:
    made = DatasetBatches(stacks(), tiny_card(), seed=1).batch(12)
    assert made.images.shape == (12, 1, SIZE, SIZE)
    assert made.masks.shape == (12, 3, SIZE, SIZE)
    assert made.masks.dtype == torch.bool
    assert made.known.tolist() == [[True, False, True]] * 12
    assert 0 <= float(made.images.min()) <= float(made.images.max()) <= 1
    for masks in made.masks:
        liver, kidney = (torch.nonzero(masks[v])[:, 1].float().mean() for v in (0, 2))
        assert liver < kidney


def test_labels_move_with_the_picture() -> None:
    made = DatasetBatches(stacks(), tiny_card(), seed=2).batch(16)
    inside, body = [], []
    for image, masks in zip(made.images[:, 0], made.masks, strict=True):
        ring = torch.nn.functional.max_pool2d(masks[0][None, None].float(), 5, 1, 2)[0, 0].bool() & ~masks[0]
        inside.append(float(image[masks[0]].mean()))
        body.append(float(image[ring].mean()))
    assert np.mean(np.array(inside) > np.array(body) + 0.05) > 0.9
    assert not torch.equal(made.masks[0], made.masks[1])


def test_augmentation_is_seeded_and_changes_only_what_it_should() -> None:
    images, masks, mr = torch.rand(2, 36, 36), torch.rand(2, 3, 36, 36) > 0.5, torch.tensor([True, False])
    one, two = (augment(images, masks, mr, 2, torch.full((2,), PIXEL), torch.Generator().manual_seed(4)) for _ in range(2))
    assert torch.equal(one[0], two[0])
    assert torch.equal(one[1], two[1])
    none = augment(images, masks, mr, 2, torch.full((2,), PIXEL), torch.Generator(), strength=0)
    assert torch.equal(none[0][:, 0], images[:, 2:-2, 2:-2])
    assert torch.equal(none[1], masks[..., 2:-2, 2:-2])


@pytest.mark.parametrize("cache_mb", [100.0, 0.03])
def test_a_restored_source_goes_on_exactly(cache_mb: float) -> None:
    straight = DatasetBatches(stacks(), tiny_card(), seed=3, cache_mb=cache_mb)
    states, batches = [], []
    for _ in range(8):
        states.append(straight.state())
        batches.append(straight.batch(3))
    for place in (0, 5):
        other = DatasetBatches(stacks(), tiny_card(), seed=3, cache_mb=cache_mb)
        other.batch(5)
        other.restore(states[place])
        assert all(same(other.batch(3), batch) for batch in batches[place:])


def test_memory_is_bounded_and_every_case_has_its_turn() -> None:
    read: list[str] = []

    def counted(stack: Stack) -> Stack:
        return Stack(stack.name, stack.patient, stack.labelled, lambda: (read.append(stack.name), stack.read())[1])

    size = prepare(stacks()[0], tiny_card())
    source = DatasetBatches([counted(s) for s in stacks(6)], tiny_card(), seed=0, cache_mb=2.5 * size.bytes / 1e6)
    for _ in range(40):
        source.batch(2)
        held = [p for p in source._cache.values() if p is not None]
        assert sum(p.bytes for p in source._window) <= 2.5 * size.bytes
        assert len(held) <= 3  # those in use and the one that comes next
    assert len(set(read)) == 6
    roomy = DatasetBatches([counted(s) for s in stacks(6)], tiny_card(), seed=0)
    read.clear()
    for _ in range(40):
        roomy.batch(2)
    assert len(read) == 6  # what fits is read once


def test_a_patient_is_never_on_both_sides() -> None:
    items = [labelled(f"p{p}", p, modality=m) for p in range(6) for m in ("CT", "MR")]
    train, held_out = split_stacks(stacks_of(items), 0.3, seed=1)
    assert len(train) + len(held_out) == 12
    assert held_out
    assert not {s.patient for s in train} & {s.patient for s in held_out}
    everything = stacks_of(items)
    assert split_stacks(everything, 0) == (everything, [])


def test_planes_of_a_grid_on_the_body_are_never_mixed() -> None:
    """Coronal slices of a data set, and axial phantoms beside them."""
    body = tiny_card(planes=["axial", "coronal"], body_grids={"axial": (32, 48), "coronal": (48, 48)})
    coronal = DatasetBatches(stacks_of([labelled("p", n, plane="coronal") for n in range(3)]), body, seed=1)
    assert coronal.batch(3).images.shape == (3, 1, 48, 48)
    mixed = MixedBatches([coronal, painted_batches([], body, seed=2)], [0.6, 0.4], seed=3)
    seen = [tuple(mixed.batch(4).images.shape) for _ in range(12)]
    assert set(seen) == {(4, 1, 48, 48), (4, 1, 32, 48)}
    both = [labelled("p", 1, plane="coronal"), labelled("q", 2)]
    found, again = (validation_batches(stacks_of(both), body) for _ in range(2))
    assert all(same(a, b) for a, b in zip(found, again, strict=True))
    assert {tuple(b.masks.shape[-2:]) for b in found} == {(32, 48), (48, 48)}


def test_mixed_sources_keep_their_shares_and_resume() -> None:
    def make() -> MixedBatches:
        synthetic = painted_batches([], tiny_card(), seed=2)
        return MixedBatches([DatasetBatches(stacks(), tiny_card(), seed=1), synthetic], [0.75, 0.25], seed=3)

    source = make()
    known = torch.cat([source.batch(8).known for _ in range(10)])
    assert 0.12 < float(known.all(1).float().mean()) < 0.4  # only synthetic slices know the spleen
    state, other = source.state(), make()
    wanted = source.batch(6)
    other.restore(state)
    assert same(other.batch(6), wanted)
    for foreign in (torch.zeros(3, dtype=torch.uint8), torch.full((64,), 255, dtype=torch.uint8), state[:-1]):
        with pytest.raises(RuntimeError):
            other.restore(foreign)


def test_folders_are_recognised_and_divided(tmp_path: Path) -> None:
    volumes = open_dataset(write_cases(tmp_path / "Dataset001", ["a", "b"]))
    assert [(s.name, s.patient) for s in stacks_of(volumes)] == [("a", "a"), ("b", "b")]
    pictures = stacks_of(open_dataset(write_slices(tmp_path / "slices", ["p", "q", "p"])))
    assert [(s.patient, len(s.read())) for s in pictures] == [("p", 2), ("q", 1)]
    with pytest.raises(DatasetError, match=r"dataset\.json"):
        open_dataset(tmp_path)
    alone = (write_cases(tmp_path / "alone", ["only"]),)
    with pytest.raises(DatasetError, match="one patient"):
        open_data(TrainingData(alone))
    opened = open_data(TrainingData(alone, "phantoms", validation_share=0))
    assert opened.held_out == []
    assert (opened.stored_modalities, opened.modalities) == (["CT"], ["CT", "MR"]), "phantoms ask no MR of a model"


def test_everything_together(tmp_path: Path) -> None:
    folders = (write_cases(tmp_path / "d1", ["a", "b", "c"], licence="CC0"), write_slices(tmp_path / "s1", ["b", "x", "y"]))
    opened = open_data(TrainingData(folders, "phantoms", validation_share=0.4), seed=1)
    assert {"liver", "left kidney", "spleen", "aorta"} <= opened.labelled
    sides = [{s.patient for s in side} for side in (opened.train, opened.held_out)]
    assert not sides[0] & sides[1]  # "b" is in both sets
    assert sides[0] | sides[1] == {"a", "b", "c", "x", "y"}
    assert [(s.name, s.licence, s.n) for s in opened.provenance()] == [
        ("d1", "CC0", 3),
        ("s1", "not stated by the data set", 3),
        ("procedural abdominal phantoms", "Apache-2.0", None),
    ]
    cpu = torch.device("cpu")
    made = make_source(opened, tiny_card(), cpu, 0).batch(12)
    assert {tuple(row) for row in made.known.tolist()} >= {(True, True, True), (True, False, True), (False, True, False)}
    held_out = make_validation(opened, tiny_card(), cpu, 8, 0)
    assert not any(batch.known.all(1).any() for batch in held_out)  # real slices only
    digest = opened.fingerprint()
    assert digest == open_data(TrainingData(folders, "phantoms", validation_share=0.4), seed=1).fingerprint()
    assert digest != open_data(TrainingData(folders, "phantoms", validation_share=0.2), seed=1).fingerprint()


@pytest.mark.parametrize(
    ("data", "message"),
    [
        (TrainingData(), "nothing to train on"),
        (TrainingData(synthetic="phantoms", validation_share=1.0), "held-out"),
        (TrainingData(synthetic="phantoms", synthetic_share=0.0), "synthetic images"),
        (TrainingData(synthetic=Path("nowhere")), "permissive"),
        (TrainingData(folders=(Path("nowhere"),)), "no data set"),
    ],
)
def test_data_that_cannot_be_used(data: TrainingData, message: str) -> None:
    with pytest.raises(DatasetError, match=message):
        open_data(data)


def test_the_vocabulary_is_what_is_labelled_and_can_be_read() -> None:
    from progidiff.training.small import make_tokenizer

    words = make_tokenizer(["liver", "left kidney", "spleen"])
    data = frozenset({"liver", "spleen", "duodenum"})
    assert choose_vocabulary(data, ("spleen", "left kidney", "liver"), words) == ["spleen", "liver"]
    assert choose_vocabulary(data, (), None) == ["liver", "spleen", "duodenum"]
    with pytest.raises(DatasetError, match="train a new base model"):
        choose_vocabulary(frozenset({"duodenum"}), ("liver",), words)
