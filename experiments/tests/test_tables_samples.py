"""Samples on disk: what comes back is what was put in, under names that tell nothing; only what is missing is sampled."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest

from experiments.samples import SampleSettings, SampleStore, absent_targets, propose_into
from progidiff.datasets.slices import LabelledSlice, present_targets
from progidiff.errors import InputError
from progidiff.evaluation.accuracy import Ablation, disturbed_state
from progidiff.evaluation.cases import as_volume
from progidiff.sampling.engine import Engine, weights_key
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
    assert samples is not None
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
    with pytest.raises(ValueError, match="5 samples, not 6"):
        samples.first(6)


def test_empty_masks_come_back(tmp_path: Path) -> None:
    store = SampleStore(tmp_path, SETTINGS)
    store.put("one", "liver", np.zeros((5, 20, 31), bool), {}, (1.0, 1.0))
    samples = store.get("one", "liver")
    assert samples is not None
    assert samples.masks.shape == (5, 20, 31)
    assert not samples.masks.any()
    assert samples.ranking.empty_share == 1.0


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
            assert samples is not None
            parts = [e for e in events if isinstance(e, SliceEvent) and e.target == target]
            np.testing.assert_array_equal(samples.masks, np.concatenate([e.masks for e in parts]))
            assert samples.masks.any()
            assert list(samples.ranking.order) == ranking[target].order
            assert list(samples.probabilities) == [1, 4, 7]
            assert samples.mean_probability is not None
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
        assert samples is not None
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
