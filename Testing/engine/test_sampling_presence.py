"""Presence: a target that the segmentation head does not find on a slice is left out, unless it is asked for everywhere."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from progidiff.errors import ModelError
from progidiff.model.folder import load_model, save_model
from progidiff.sampling.conditioning import presence_of, presence_threshold
from progidiff.sampling.engine import Engine

Run = Callable[..., Any]


@pytest.fixture
def headed(headed_folder: Path, make_phantom: Run) -> Engine:
    """An engine whose head finds the liver for certain, the spleen never and the left kidney with presence 0.3."""
    loaded = Engine.load(headed_folder, "cpu")
    loaded.set_image(*make_phantom(), "CT")
    return loaded


def test_presence_is_judged_by_the_likeliest_area() -> None:
    logits = torch.full((3, 20, 20), -30.0)
    logits[0, 3:6, 4:7] = 0.0  # nine pixels of 2.4 mm: 50 mm² at even odds
    logits[1, 3, 4] = 30.0  # a speck
    assert presence_of(logits, 2.4).tolist() == pytest.approx([1.0, 2 / 9, 0.0])
    assert presence_of(logits, 1.0).tolist() == pytest.approx([2 * 9 * 0.5 / 50, 2 / 50, 0.0])
    assert presence_of(logits, 100.0).tolist() == pytest.approx([1.0, 1.0, 0.0])  # a pixel is the least


def test_as_many_proposals_show_a_target_as_it_is_likely() -> None:
    thresholds = [presence_threshold(i) for i in range(64)]
    assert thresholds[:4] == [0.5, 0.25, 0.75, 0.125]
    assert len(set(thresholds)) == 64
    for count in (4, 16, 50, 64):
        for presence in (0.0, 0.1, 0.5, 0.9, 1.0):
            shown = sum(presence > threshold for threshold in thresholds[:count]) / count
            assert shown == pytest.approx(presence, abs=3 / count)
    assert all(0 < threshold < 1 for threshold in thresholds)  # certainty either way is the same for every proposal


def test_an_absent_target_is_left_out_and_costs_nothing(headed: Engine, run_engine: Run) -> None:
    rows: list[int] = []
    headed.model.unet.register_forward_pre_hook(lambda _, args: rows.append(len(args[0])))
    result = run_engine(headed, "spleen", proposals=6, steps=2)
    assert rows == []
    assert all(not masks.any() for masks in result.masks("spleen").values())
    ranking = result.rankings["spleen"]
    assert ranking.empty_share == 1.0
    assert ranking.millilitres == [0.0] * 6
    assert [w.code for w in result.warnings] == ["empty"]
    events = [event for event in result.slices if event.target == "spleen" and event.complete]
    assert len(events) == 4
    assert all(not e.masks.any() and not e.mean_probability.any() for e in events)


@pytest.mark.slow
def test_what_is_found_is_sampled_as_ever(headed: Engine, engine: Any, run_engine: Run) -> None:
    """The same weights but for the head: the liver's masks are those of the model that has none."""
    for index, masks in run_engine(engine, "liver", proposals=5).masks("liver").items():
        np.testing.assert_array_equal(run_engine(headed, "liver", proposals=5).masks("liver")[index], masks)


@pytest.mark.slow
@pytest.mark.parametrize("batch_size", [None, 1, 3, 16])
def test_a_doubtful_target_is_in_some_proposals_and_in_the_same_ones_on_every_slice(
    headed: Engine, engine: Any, run_engine: Run, batch_size: int | None
) -> None:
    everything = run_engine(engine, "left kidney", "liver", proposals=8, batch_size=batch_size)
    result = run_engine(headed, "left kidney", "liver", proposals=8, batch_size=batch_size)
    shown = [1, 3, 7]  # thresholds 0.25, 0.125 and 0.0625 of a presence of 0.3
    for index, masks in result.masks("left kidney").items():
        wanted = everything.masks("left kidney")[index].copy()
        wanted[[i for i in range(8) if i not in shown]] = False
        np.testing.assert_array_equal(masks, wanted)
        np.testing.assert_array_equal(result.masks("liver")[index], everything.masks("liver")[index])
    assert result.rankings["left kidney"].empty_share == 5 / 8
    assert result.rankings["left kidney"].empty[result.rankings["left kidney"].order[0]]
    assert "empty" in [w.code for w in result.warnings]


@pytest.mark.slow
def test_everywhere_means_everywhere(headed: Engine, engine: Any, run_engine: Run) -> None:
    wanted = run_engine(engine, "spleen", proposals=4)
    result = run_engine(headed, "spleen", proposals=4, everywhere=True)
    assert all(np.array_equal(result.masks("spleen")[index], masks) for index, masks in wanted.masks("spleen").items())
    assert wanted.rankings["spleen"].millilitres == result.rankings["spleen"].millilitres


def test_another_adapter_is_asked_again(headed: Engine, run_engine: Run) -> None:
    """What the head said belongs to the weights that it said it with."""
    assert run_engine(headed, "spleen").rankings["spleen"].empty_share == 1.0
    head = headed.model.image_encoder.segmentation_head
    head.bias.data += 20.0
    headed._conditioner.forget_slices()
    assert run_engine(headed, "spleen").rankings["spleen"].empty_share < 1.0


def test_a_head_for_other_targets_is_refused(headed_folder: Path, tmp_path: Path) -> None:
    model = load_model(headed_folder)
    model.image_encoder.learn_classes(2)
    with pytest.raises(ModelError, match="the image encoder's targets is 2, the card's is 3"):
        save_model(model, tmp_path / "model")


@pytest.mark.slow
def test_the_bundled_model_leaves_out_what_is_not_there(run_engine: Run) -> None:
    """Slices of soft tissue without any organ; of these three the model has seen slices without them."""
    engine = Engine.load(None, "cpu")
    tissue = np.full((2, 128, 128), -1000.0, dtype=np.float32)
    rows, columns = np.mgrid[:128, :128] - 63.5
    body = (rows / 40) ** 2 + (columns / 55) ** 2 < 1
    tissue[:, body] = np.random.default_rng(0).normal(40, 20, (2, body.sum()))
    engine.set_image(tissue, np.diag([3.0, 3.0, 5.0, 1.0]), "CT")
    targets = ("right kidney", "pancreas", "gallbladder")
    left_out = run_engine(engine, *targets, proposals=4)
    drawn = run_engine(engine, *targets, proposals=4, everywhere=True)
    for target in targets:
        assert left_out.rankings[target].empty_share == 1.0, target
    assert any(drawn.rankings[target].empty_share < 1.0 for target in targets)
