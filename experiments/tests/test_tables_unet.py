"""The U-Net of the tables: trained for a CPU time, resumed, and sampled by dropout and by altered copies."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from experiments import unet
from experiments.samples import SampleSettings, SampleStore
from progidiff.cards import ModelCard, make_card
from progidiff.datasets.slices import LabelledSlice
from progidiff.errors import ModelError
from progidiff.evaluation.accuracy import PlainSegmenter
from progidiff.training.batches import TrainingBatch
from progidiff.training.stages import segmentation_loss

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
    return make_card(
        {
            "model_id": "tiny", "name": "tiny", "licence": "Apache-2.0", "modalities": ["CT"],
            "vocabulary": ["liver", "spleen"], "windows": {"CT": {"kind": "hu", "low": 0, "high": 100}},
            "image_size": SIZE, "spacing_mm": 4.0, "latent_shift": [0.0], "latent_scale": [1.0], "trainable_parameters": 1,
        }
    )  # fmt: skip


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


@pytest.mark.slow
@pytest.mark.usefixtures("cpu_clock")
def test_it_learns_from_weights_that_are_copied(tmp_path: Path) -> None:
    fresh = unet.make_unet(2)
    before = {name: value.clone() for name, value in fresh.state_dict().items()}
    tuned = unet.train_unet(Squares(), 2, 60.0, 0, tmp_path, init=fresh)
    for name, value in fresh.state_dict().items():
        torch.testing.assert_close(value, before[name])
    batch = Squares(9).batch(8)
    with torch.no_grad():
        losses = [float(segmentation_loss(n.eval()(batch.images), batch.masks, batch.known)) for n in (fresh, tuned)]
    assert losses[1] < losses[0] - 0.2


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
    assert samples is not None
    masks, mean = unet.mc_dropout_samples(network, item, card, 4, 5)
    np.testing.assert_array_equal(samples.masks, masks[:, 0])
    np.testing.assert_allclose(samples.mean_probability, mean[0], atol=0.006)  # type: ignore[arg-type]
    assert draw() == 0
