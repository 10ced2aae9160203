"""Tables whose methods are trained: patients apart, equal terms, figures of known masks, and runs that go on."""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from experiments import matched, transfer
from experiments.stock_hint import StockHint
from experiments.tables import controls, cross_validation, encoder, mr, setup
from experiments.tables.setup import TableSetup
from experiments.unet import make_unet
from progidiff.datasets.slices import LabelledSlice
from progidiff.errors import DatasetError, InputError, ModelError
from progidiff.evaluation.accuracy import TwinNetwork
from progidiff.model.folder import load_model
from progidiff.synthesis.source import SyntheticSource
from progidiff.training import diffusion
from progidiff.training.batches import SyntheticBatches, TrainingBatch

PATIENTS = 6


def made_up(name: str) -> list[LabelledSlice]:
    """Two slices of each of six patients with a bright liver; MR where the name says so."""
    items = []
    for n in range(2 * PATIENTS):
        liver = np.zeros((30, 34), bool)
        liver[6:18, 4 + n : 16 + n] = True
        image = np.random.default_rng(n).normal(20, 15, liver.shape).astype(np.float32) + 90 * liver
        modality: Any = "MR" if name.endswith("mr") else "CT"
        labels, who = {"liver": liver}, f"{name} {n // 2}"
        items.append(LabelledSlice(image, (3.5, 4.0), labels, frozenset(labels), who, modality, slice_id=f"{name} {n}"))
    return items


@pytest.fixture
def tables(responsive_folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> TableSetup:
    monkeypatch.setattr(setup, "load_shared", lambda folder, name: made_up(name))
    for module in (controls, encoder):
        monkeypatch.setattr(module, "load_permissive", lambda folder: [])  # phantoms alone
    work = tmp_path / "work"
    work.mkdir()
    options = {"seconds": "0.01", "unet-minutes": "0.01"}
    return TableSetup(tmp_path, work, responsive_folder, proposals=2, steps=1, device="cpu", options=options)


def with_options(tables: TableSetup, **options: str) -> TableSetup:
    return replace(tables, options={**tables.options, **{k.replace("_", "-"): v for k, v in options.items()}})


class Spy:
    """Remembers the arguments of the calls that it passes on."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch, module: Any, name: str) -> None:
        self.calls: list[tuple[Any, ...]] = []
        self._original: Callable[..., Any] = getattr(module, name)
        monkeypatch.setattr(module, name, self)

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        self.calls.append(args)
        return self._original(*args, **kwargs)


# -- figures, folds, draws --


def test_every_patient_is_held_out_once_or_drawn_for_training_alone() -> None:
    patients = [str(n) for n in range(10)]
    folds = matched.patient_folds([*patients, *patients], 3, seed=4)
    assert sorted(p for fold in folds for p in fold) == patients
    assert {len(fold) for fold in folds} == {3, 4}
    assert folds == matched.patient_folds(reversed(patients), 3, seed=4) != matched.patient_folds(patients, 3, seed=5)
    with pytest.raises(DatasetError, match="cannot be divided"):
        matched.patient_folds(patients[:2], 3, 0)
    drawn = matched.draw_patients(patients, 5, 3, seed=1)
    assert (len(drawn.pool), len(drawn.test)) == (5, 3)
    assert not drawn.test.intersection(drawn.pool)
    assert matched.draw_patients(patients, 5, 10, 1).test == frozenset(patients).difference(drawn.pool)
    with pytest.raises(DatasetError, match="fewer cases"):
        matched.draw_patients(patients, 10, 1, 0)


# -- the encoders --


@pytest.mark.parametrize(("stride", "side"), [(4, 8), (8, 4)])
def test_the_stock_block_is_diffusers_own_at_the_latent_resolution(stride: int, side: int) -> None:
    block = StockHint(1, stride, 24)
    image = torch.rand(2, 1, 32, 32)
    features = block(image)
    assert features.shape == (2, 24, side, side)
    assert not features.any()  # the last convolution starts at zero, as in ControlNet
    assert block.hint(features, torch.rand(2, 5)) is features
    widths = [(1, 16), (16, 16), (16, 32), (32, 32), (32, 96), (96, 96), (96, 256), (256, 24)]
    assert sum(p.numel() for p in block.parameters()) == sum(9 * a * b + b for a, b in widths)
    torch.nn.init.ones_(block.embedding.conv_out.weight)
    assert block(image).std() > 0
    with pytest.raises(ValueError, match="stride"):
        StockHint(1, 16, 24)


class Recording(SyntheticBatches):
    """Phantoms, and what was drawn."""

    def __init__(self, card: Any) -> None:
        super().__init__(SyntheticSource([], {"axial": card.grid_size("axial")}, card.spacing_mm, "cpu", 4), card.vocabulary)
        self.drawn: list[torch.Tensor] = []

    def batch(self, count: int) -> TrainingBatch:
        made = super().batch(count)
        self.drawn.append(made.images)
        return made


@pytest.mark.slow
@pytest.mark.usefixtures("cpu_clock")
def test_arms_see_the_same_pictures_prompts_and_noise(
    responsive_folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    noise: list[torch.Tensor] = []
    original = diffusion.ControlStage.noisy

    def noisy(self: Any, clean: torch.Tensor) -> Any:
        made = original(self, clean)
        noise.append(torch.cat([made[0].flatten(), made[1].float()]))
        return made

    monkeypatch.setattr(diffusion.ControlStage, "noisy", noisy)
    seen = {}
    for arm in ("stock", "custom"):
        noise.clear()
        model = load_model(responsive_folder)
        frozen = [p.clone() for p in model.unet.parameters()]
        encoder.fresh_arm(model, arm, seed=0)
        # as the backbone's own first layers, and silent at first
        assert torch.equal(model.controlnet.conv_in.weight, model.unet.conv_in.weight)
        assert not model.controlnet.controlnet_mid_block.weight.any()
        start = [p.clone() for p in model.image_encoder.parameters()]
        source = Recording(model.card)
        how = encoder.train_arm(model, arm, source, 2.0, 0, tmp_path / arm)
        assert how["control"] == len(source.drawn) == 2
        assert how["cpu_seconds"] >= 2.0
        assert all(torch.equal(a, b) for a, b in zip(frozen, model.unet.parameters(), strict=True))
        assert any(not torch.equal(a, b) for a, b in zip(start, model.image_encoder.parameters(), strict=True))
        seen[arm] = (source.drawn[:2], noise[:2])
    for stock, custom in zip(seen["stock"], seen["custom"], strict=True):
        assert all(torch.equal(a, b) for a, b in zip(stock, custom, strict=True))


@pytest.mark.slow
def test_encoder_table_trains_once(tables: TableSetup, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(encoder, "SETS", ("curvas",))
    own = replace(tables, options={"minutes": "0.01", "arms": "stock,pretrained", "every": "6"})
    result = encoder.run(own)
    arms = result.facts["arms"]
    assert list(arms) == ["stock", "pretrained"]
    assert arms["stock"]["curvas"]["liver"]["rank1"]["pairs"] == 2
    assert result.facts["training"]["pretrained"][0]["first"] >= 1
    assert any("pre-trained as a segmenter: 0.0" in note for note in result.notes)  # parameters of this tiny model
    monkeypatch.setattr(encoder, "train_arm", None)  # training again would fail
    assert encoder.run(own).facts == result.facts


# -- cross-validation --


@pytest.mark.slow
def test_cross_validation_measures_only_patients_that_training_did_not_see(
    tables: TableSetup, monkeypatch: pytest.MonkeyPatch
) -> None:
    tuned, sampled = Spy(monkeypatch, cross_validation, "tune"), Spy(monkeypatch, cross_validation, "propose_into")
    trained, drawn = Spy(monkeypatch, cross_validation, "tune_unet"), Spy(monkeypatch, cross_validation, "sample_unet_into")
    batches = Spy(monkeypatch, matched, "labelled_batches")
    own = with_options(tables, methods="full,unet,unet-tuned")
    result = cross_validation.run(own)
    held_out = [{item.patient for item in call[2]} for call in sampled.calls]
    learned = [{stack.patient for stack in call[1]} for call in tuned.calls]
    assert len(learned) == len(held_out) == 3
    everybody = {item.patient for item in made_up("curvas")}
    assert all(not a & b and a | b == everybody for a, b in zip(learned, held_out, strict=True))
    assert set().union(*held_out) == everybody
    # the U-Nets: two samplers for each training, in the same folds
    unet_held = [{item.patient for item in call[3]} for call in drawn.calls]
    assert unet_held == [fold for fold in held_out for _ in range(2)] * 2
    assert [{s.patient for s in call[0]} for call in batches.calls] == learned * 2
    # equal terms
    assert all(call[2] == [] for call in tuned.calls)  # no validation patients
    assert {call[4].cpu_seconds for call in tuned.calls} == {call[2] for call in trained.calls} == {0.01}
    assert [call[5] is None for call in trained.calls] == [True] * 3 + [False] * 3
    assert {batch[3] for batch in batches.calls} == {tuned.calls[0][4].replay_share}
    figures = result.facts["methods"]
    assert len(figures) == 1 + 2 * 2
    assert {f["liver"]["best"]["pairs"] for f in figures.values()} == {2 * PATIENTS}
    # nothing is trained or sampled again, and other tables find the samples
    for name in ("tune", "propose_into", "sample_unet_into"):
        monkeypatch.setattr(cross_validation, name, None)
    again = cross_validation.run(own)
    assert again.rows == result.rows
    assert again.facts == result.facts
    store = cross_validation.out_of_fold(own, "unet", "tta")
    assert all(store.has(item.slice_id, "liver") for item in made_up("curvas"))


@pytest.mark.slow
def test_an_interrupted_fold_is_sampled_by_the_weights_it_had(tables: TableSetup, monkeypatch: pytest.MonkeyPatch) -> None:
    own, done = with_options(tables, methods="lora"), []
    original = cross_validation.propose_into

    def breaks(store: Any, engine: Any, items: Any, *args: Any, **kwargs: Any) -> int:
        made = original(store, engine, list(items)[: 1 if not done else None], *args, **kwargs)
        done.append(made)
        if len(done) == 1:
            raise KeyboardInterrupt
        return made

    monkeypatch.setattr(cross_validation, "propose_into", breaks)
    trainings = Spy(monkeypatch, cross_validation, "tune")
    with pytest.raises(KeyboardInterrupt):
        cross_validation.run(own)
    cross_validation.run(own)
    assert len(trainings.calls) == 3  # the first fold was not trained twice
    assert done[:2] == [1, 3]


def test_low_rank_layers_are_folded_in_exactly(responsive_folder: Path) -> None:
    from progidiff.model.adapter import add_lora

    model, image = load_model(responsive_folder), torch.rand(1, 1, 32, 32)
    plain = model.image_encoder(image)
    torch.manual_seed(0)
    for parameter in add_lora(model, 2, 2.0):
        torch.nn.init.normal_(parameter, std=0.1)
    beside = model.image_encoder(image)
    matched.fold_lora_in(model)
    assert not any("lora" in name for name, _ in model.image_encoder.named_parameters())
    assert torch.allclose(model.image_encoder(image), beside, atol=1e-4)
    assert not torch.allclose(plain, beside, atol=1e-3)


# -- MR --


@pytest.mark.slow
def test_mr_tunes_the_twin_and_says_what_is_left_on_ct(
    tables: TableSetup, headed_folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    own = replace(tables, model=headed_folder)
    own = with_options(own, sizes="2", sets="kidney_mr", draws="1", methods="twin-tuned,unet")
    trained = Spy(monkeypatch, transfer, "tune_unet")
    result = mr.run(own)
    assert [isinstance(call[5], TwinNetwork) for call in trained.calls] == [True, False]
    kept = {run["method"]: run.get("ct") for run in result.facts["runs"]}
    assert kept["unet"] is None  # it never knew CT
    assert kept["twin-tuned"] is not None
    assert set(result.facts["ct_before"]) == {"model", "twin-tuned"}
    assert any("Before: model" in note and "image-only twin, tuned" in note for note in result.notes)


@pytest.mark.slow
def test_mr_runs_are_apart_equal_and_resumed(tables: TableSetup, monkeypatch: pytest.MonkeyPatch) -> None:
    own = with_options(tables, sizes="1,3", sets="kidney_mr", retention="3", methods="lora,unet-tuned")
    own = with_options(own, draws="2")
    tuned, batches = Spy(monkeypatch, transfer, "tune"), Spy(monkeypatch, matched, "labelled_batches")
    trained, scored = Spy(monkeypatch, transfer, "tune_unet"), Spy(monkeypatch, transfer, "score_slices")
    measured: list[transfer.Run] = []
    original = transfer.Transfer.measure

    def measure(self: transfer.Transfer, run: transfer.Run) -> dict[str, Any]:
        if len(measured) == 3:
            raise KeyboardInterrupt
        measured.append(run)
        return original(self, run)

    monkeypatch.setattr(transfer.Transfer, "measure", measure)
    with pytest.raises(KeyboardInterrupt):
        mr.run(own)
    assert not list((tables.work / "mr").glob("*-training"))  # no weights are left
    partial = mr.run(with_options(own, print_only="1"))
    assert "Unfinished: 3 of 8" in partial.notes[0]
    monkeypatch.setattr(transfer.Transfer, "measure", original)
    result = mr.run(own)
    assert len(tuned.calls) == 4
    assert len(trained.calls) == 4
    assert len(result.facts["runs"]) == 8
    assert not any("Unfinished" in note for note in result.notes)
    assert {call[4].cpu_seconds for call in tuned.calls} == {call[2] for call in trained.calls} == {0.01}
    runs = transfer.Transfer(own)
    for draw in range(2):
        small, large = (runs.cases(transfer.Run("kidney_mr", size, draw, "lora")) for size in (1, 3))
        assert [i.slice_id for i in small[1]] == [i.slice_id for i in large[1]]
        training = {i.patient for i in large[0]}
        assert {i.patient for i in small[0]} < training
        assert len(training) == 3
        assert not training & {i.patient for i in large[1]}
        assert len({i.patient for i in large[1]}) == 3
    learned = {frozenset(s.patient for s in call[1]) for call in tuned.calls}
    assert learned == {frozenset(s.patient for s in call[0]) for call in batches.calls}
    assert len(learned) == 4
    # what was known before is measured afterwards, after the larger number of cases alone
    kept = {(r["method"], r["size"]) for r in result.facts["runs"] if "ct" in r}
    assert kept == {("lora", 3), ("unet-tuned", 3)}
    ct = [call for call in scored.calls if call[1] == "curvas"]
    assert {call[3] for call in ct} == {transfer.RETENTION_PROPOSALS}
    assert {len(list(call[2])) for call in ct} == {2}
    # the untouched model is measured once
    assert sum(call[1] == "kidney_mr" and len(list(call[2])) == 2 * PATIENTS for call in scored.calls) == 1
    text = json.dumps([json.loads(p.read_text()) for p in (tables.work / "mr").glob("*.json")])
    assert "kidney_mr 0" not in text  # results name no patient
    assert {row[3] for row in result.rows if row} == {"2"}


def test_a_kept_unet_is_taken_and_another_refused(tables: TableSetup, tmp_path: Path) -> None:
    from safetensors.torch import save_file

    card, path = load_model(tables.model).card, tmp_path / "unet.safetensors"
    network = make_unet(len(card.vocabulary), seed=5)
    save_file(network.state_dict(), path)
    loaded, _, how = matched.pretrained_unet(with_options(tables, unet=str(path)), card)
    assert "from a file" in how
    image = torch.rand(1, 1, 32, 32)
    small, other = matched.only(loaded, card, ["spleen"])
    assert other.vocabulary == ["spleen"]
    assert torch.equal(small(image), network.eval()(image)[:, 1:2])
    save_file(make_unet(7).state_dict(), path)
    with pytest.raises(ModelError, match="does not hold the U-Net"):
        matched.pretrained_unet(with_options(tables, unet=str(path)), card)
    with pytest.raises(InputError, match="numbers of cases"):
        mr.run(with_options(tables, sizes="1,many"))
