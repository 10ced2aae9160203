"""Samples on disk, and the U-Net of the tables: what is put comes back, only what is missing is made."""

from __future__ import annotations

import json
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from Testing.engine.conftest import tiny_card

from experiments import unet
from experiments.samples import SampleSettings, SampleStore, absent_targets, propose_into
from progidiff.cards import ModelCard, Window
from progidiff.datasets.slices import LabelledSlice, present_targets
from progidiff.errors import InputError, ModelError
from progidiff.evaluation.accuracy import Ablation, PlainSegmenter, disturbed_state
from progidiff.evaluation.cases import as_volume
from progidiff.sampling.engine import Engine, weights_key
from progidiff.training.batches import TrainingBatch
from progidiff.wire.messages import ProposeRequest, RankingEvent, SliceEvent

SETTINGS = SampleSettings("set", "weights", 5)
TARGETS = ("liver", "spleen")


def slices(count: int = 2) -> list[LabelledSlice]:
    """Noisy slices of 30 x 34 pixels with a bright liver; the spleen is labelled and absent."""
    made = []
    for n in range(count):
        liver = np.zeros((30, 34), bool)
        liver[6:18, 5 + n : 17 + n] = True
        image = np.random.default_rng(n).normal(20, 15, liver.shape).astype(np.float32) + 90 * liver
        labels = {"liver": liver, "spleen": np.zeros_like(liver)}
        made.append(LabelledSlice(image, (3.5, 4.0), labels, frozenset(labels), f"patient {n}", "CT", slice_id=f"s{n}"))
    return made


@pytest.fixture
def both() -> tuple[np.ndarray, dict[int, np.ndarray]]:
    masks = np.random.default_rng(0).random((5, 20, 31)) > 0.6
    masks[:, :4] = masks[:, :, 27:] = False
    probability = np.zeros((20, 31), np.float32)
    probability[4:, :27] = np.random.default_rng(1).random((16, 27))
    return masks, {2: probability, 5: probability / 2}


def test_what_is_put_comes_back(tmp_path: Path, both: tuple[np.ndarray, dict[int, np.ndarray]]) -> None:
    store = SampleStore(tmp_path, SETTINGS)
    assert store.get("one", "liver") is None
    store.put("one", "liver", *both, (0.8, 0.7))
    samples = SampleStore(tmp_path, SETTINGS).get("one", "liver")
    np.testing.assert_array_equal(samples.masks, both[0])
    assert samples.spacing_rc == (0.8, 0.7)
    assert sorted(samples.probabilities) == [2, 5]
    for count, probability in samples.probabilities.items():
        np.testing.assert_allclose(probability, both[1][count], atol=0.005)
        np.testing.assert_array_equal(probability > 0.5, both[1][count] > 0.5)  # the cut is exact
    assert samples.mean_probability is samples.probabilities[5]
    assert samples.first(2).mean_probability is samples.probabilities[2]
    assert samples.first(3).mean_probability is None
    assert len(samples.first(3).ranking.scores) == 3
    assert store.get("one", "spleen") is None
    store.put("one", "spleen", np.zeros_like(both[0]), {}, (1.0, 1.0))
    empty = store.get("one", "spleen")
    assert (empty.masks.shape, empty.masks.any(), empty.ranking.empty_share) == (both[0].shape, False, 1.0)
    with pytest.raises(ValueError, match="5 samples, not 6"):
        samples.first(6)


def test_other_settings_are_another_store(tmp_path: Path, both: tuple[np.ndarray, dict[int, np.ndarray]]) -> None:
    SampleStore(tmp_path, SETTINGS).put("one", "liver", *both, (1.0, 1.0))
    for change in ({"set": "x"}, {"model": "x"}, {"proposals": 6}, {"steps": 8}, {"seed": 1}, {"variant": "x"}):
        assert SampleStore(tmp_path, replace(SETTINGS, **change)).get("one", "liver") is None  # type: ignore[arg-type]


def test_names_tell_nothing_and_damage_is_forgotten(tmp_path: Path, both: tuple[np.ndarray, dict[int, np.ndarray]]) -> None:
    store = SampleStore(tmp_path, SETTINGS)
    store.put("doe_jane_17", "liver", *both, (1.0, 1.0))
    written = [p for p in tmp_path.rglob("*") if p.is_file()]
    assert len(written) == 2
    assert not any("doe" in str(p.relative_to(tmp_path)) or b"doe" in p.read_bytes() for p in written)
    (file,) = [p for p in written if p.suffix == ".npz"]
    file.write_bytes(file.read_bytes()[:60])
    assert store.get("doe_jane_17", "liver") is None
    assert not store.has("doe_jane_17", "liver")  # so that the next run makes it again


@pytest.fixture
def loaded(responsive_folder: Path) -> Engine:
    return Engine.load(responsive_folder, "cpu")


@pytest.mark.slow
def test_samples_are_those_of_the_engine(loaded: Engine, tmp_path: Path) -> None:
    items = slices()
    store = SampleStore(tmp_path, SampleSettings("set", weights_key(loaded), 7, 2, 3))
    assert propose_into(store, loaded, items, lambda item: TARGETS, (1, 4)) == 4
    for item in items:
        events: list[object] = []
        loaded.set_image(*as_volume(item, loaded.card), item.modality, item.plane)
        loaded.propose(ProposeRequest(TARGETS, proposals=7, steps=2, seed=3), events.append, lambda: False)
        ranking = {e.target: e for e in events if isinstance(e, RankingEvent)}
        for target in TARGETS:
            samples = store.get(item.slice_id, target)
            parts = [e for e in events if isinstance(e, SliceEvent) and e.target == target]
            np.testing.assert_array_equal(samples.masks, np.concatenate([e.masks for e in parts]))
            assert samples.masks.any()
            assert list(samples.ranking.order) == ranking[target].order
            assert list(samples.probabilities) == [1, 4, 7]
            assert parts[-1].mean_probability is not None
            np.testing.assert_allclose(samples.mean_probability, parts[-1].mean_probability, atol=0.006)
            # the first sample's mean probability is its own: above one half is its mask
            np.testing.assert_array_equal(samples.probabilities[1] > 0.5, samples.masks[0])


def test_only_what_is_missing_is_sampled(loaded: Engine, tmp_path: Path) -> None:
    items, entered = slices(3), []
    store = SampleStore(tmp_path, SampleSettings("set", weights_key(loaded), 2, 1))

    @contextmanager
    def around(item: LabelledSlice) -> Iterator[None]:
        entered.append(item.slice_id)
        if len(entered) == 3:
            raise KeyboardInterrupt
        yield

    with pytest.raises(KeyboardInterrupt):
        propose_into(store, loaded, items, lambda item: TARGETS, around=around)
    assert [store.has(item.slice_id, "spleen") for item in items] == [True, True, False]
    before = {p: p.stat().st_mtime_ns for p in tmp_path.rglob("*.npz")}
    done: list[int] = []
    assert propose_into(store, loaded, items, lambda item: TARGETS, progress=done.append) == 2
    assert done == [1, 2, 3]
    assert {p: p.stat().st_mtime_ns for p in before} == before
    with pytest.raises(InputError, match="between 1 and 2"):
        propose_into(store, loaded, items, lambda item: TARGETS, (3,))


def test_an_ablation_around_the_sampling_changes_the_samples(loaded: Engine, tmp_path: Path) -> None:
    def sampled(variant: str, how: Ablation) -> np.ndarray:
        store = SampleStore(tmp_path, SampleSettings("set", weights_key(loaded), 3, 2, variant=variant))
        propose_into(store, loaded, slices(1), lambda item: TARGETS, (), lambda item: disturbed_state(loaded.model, how, 1))
        samples = store.get("s0", "liver")
        return samples.masks

    assert (sampled("", "none") != sampled("noise", "noise")).any()
    np.testing.assert_array_equal(sampled("noise", "noise"), sampled("noise again", "noise"))


def test_what_is_asked_for(loaded: Engine) -> None:
    item = slices(1)[0]
    sliver = item.labels["liver"].copy()
    sliver[:] = False
    sliver[0, :7] = True  # 98 mm²
    assert present_targets(item, loaded.card.vocabulary) == ["liver"]
    assert absent_targets(item, loaded.card.vocabulary) == ["spleen"]  # the left kidney is not labelled: unknown
    small = replace(item, labels={**item.labels, "liver": sliver})
    assert present_targets(small, loaded.card.vocabulary) == []
    assert absent_targets(small, loaded.card.vocabulary) == ["spleen"]


SIZE = 32


class Squares:
    """A bright square on noise; the second target is never known."""

    def __init__(self, seed: int = 0, last: int | None = None) -> None:
        self.generator, self.made, self.last = torch.Generator().manual_seed(seed), 0, last

    def batch(self, count: int) -> TrainingBatch:
        if self.made == self.last:
            raise KeyboardInterrupt
        self.made += 1
        masks = torch.zeros(count, 2, SIZE, SIZE, dtype=torch.bool)
        for mask, (row, column) in zip(masks, torch.randint(2, 20, (count, 2), generator=self.generator), strict=True):
            mask[0, row : row + 10, column : column + 10] = True
        noise = 0.2 * torch.rand(count, 1, SIZE, SIZE, generator=self.generator)
        return TrainingBatch(noise + 0.7 * masks[:, :1], masks, torch.tensor([[True, False]]).expand(count, -1))

    def state(self) -> torch.Tensor:
        return self.generator.get_state()

    def restore(self, state: torch.Tensor) -> None:
        self.generator.set_state(state)


@pytest.fixture(scope="module")
def card() -> ModelCard:
    windows = {"CT": Window(kind="hu", low=0, high=100)}
    return tiny_card(modalities=["CT"], vocabulary=["liver", "spleen"], windows=windows, spacing_mm=4.0)


class Threshold(torch.nn.Module):
    """A network whose first target is what is bright, and whose dropout leaves pixels out."""

    def __init__(self) -> None:
        super().__init__()
        self.drop = torch.nn.Dropout(0.1)

    def forward(self, images: torch.Tensor) -> torch.Tensor:
        logits = 20 * (self.drop(images) - 0.5)
        return torch.cat([logits, -20 * torch.ones_like(logits)], 1)


@pytest.fixture
def network() -> Any:
    return Threshold().eval()


@pytest.fixture(scope="module")
def item() -> LabelledSlice:
    liver = np.zeros((40, 44), bool)
    liver[14:26, 18:30] = True
    image = np.random.default_rng(0).uniform(0, 20, liver.shape).astype(np.float32) + 70 * liver
    return LabelledSlice(image, (3.2, 3.2), {"liver": liver}, frozenset({"liver"}), "p", "CT", slice_id="s")


@pytest.mark.usefixtures("cpu_clock")
def test_a_training_ends_at_its_budget_and_is_then_only_loaded(tmp_path: Path) -> None:
    batches = Squares()
    trained = unet.train_unet(batches, 2, 4.5, 0, tmp_path)
    assert not trained.training
    assert batches.made == 5
    assert unet.images_seen(tmp_path) == unet.IMAGES * 5
    assert json.loads((tmp_path / "seconds.json").read_text()) == {"5": 5.0}
    again = unet.train_unet(Squares(last=0), 2, 4.5, 0, tmp_path)
    for name, value in trained.state_dict().items():
        torch.testing.assert_close(again.state_dict()[name], value)
    with pytest.raises(ModelError, match="another training"):
        unet.train_unet(Squares(), 2, 9.0, 0, tmp_path)


def test_an_interrupted_training_goes_on(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(unet, "_CHECKPOINT_S", 0.0)
    with pytest.raises(KeyboardInterrupt):
        unet.train_unet(Squares(last=3), 2, 60.0, 0, tmp_path)
    before = json.loads((tmp_path / "seconds.json").read_text())
    assert list(before) == ["1", "2", "3"]
    with pytest.raises(KeyboardInterrupt):
        unet.train_unet(Squares(seed=9, last=2), 2, 60.0, 0, tmp_path)
    after = json.loads((tmp_path / "seconds.json").read_text())
    assert list(after) == ["1", "2", "3", "4", "5"]
    assert after["4"] > after["3"] == before["3"]


def test_it_is_seen_as_a_segmenter(network: Any, item: LabelledSlice, card: ModelCard) -> None:
    probability = unet.unet_probability(network, item, card)
    assert probability.shape == (2, 40, 44)
    mask = probability[0] > 0.5
    truth = item.labels["liver"]
    assert 2 * (mask & truth).sum() / (mask.sum() + truth.sum()) > 0.9
    np.testing.assert_array_equal(PlainSegmenter(network, card)(item, "liver"), mask)


@pytest.mark.parametrize("how", [unet.mc_dropout_samples, unet.tta_samples])
def test_samples_differ_but_mean_the_same(how: unet.Sampling, network: Any, item: LabelledSlice, card: ModelCard) -> None:
    random = torch.get_rng_state()
    masks, mean = how(network, item, card, 6, 5)
    assert masks.shape == (6, 2, 40, 44)
    assert len({mask.tobytes() for mask in masks[:, 0]}) > 1
    truth = item.labels["liver"]
    for mask in masks[:, 0]:  # altered copies are brought back to where the organ is
        assert 2 * (mask & truth).sum() / (mask.sum() + truth.sum()) > 0.7
    assert 0 <= mean.min() <= mean.max() <= 1
    again, _ = how(network, item, card, 6, 5)
    np.testing.assert_array_equal(again, masks)
    other, _ = how(network, item, card, 6, 6)
    assert (other != masks).any()
    assert torch.equal(torch.get_rng_state(), random)
    assert not any(module.training for module in network.modules())


def test_samples_go_into_a_store(network: Any, item: LabelledSlice, card: ModelCard, tmp_path: Path) -> None:
    store = SampleStore(tmp_path, SampleSettings("set", "unet", 4, 0, 5, "mc-dropout"))

    def draw() -> int:
        return unet.sample_unet_into(store, network, card, [item], lambda item: ["liver"], unet.mc_dropout_samples)

    assert draw() == 1
    samples = store.get("s", "liver")
    masks, mean = unet.mc_dropout_samples(network, item, card, 4, 5)
    np.testing.assert_array_equal(samples.masks, masks[:, 0])
    np.testing.assert_allclose(samples.mean_probability, mean[0], atol=0.006)  # type: ignore[arg-type]
    assert draw() == 0
