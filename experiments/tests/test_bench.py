"""The benchmark: both sides sample the same masks, and the figures are put together rightly. Nothing here is timed."""

from __future__ import annotations

import json
import math
from dataclasses import replace
from pathlib import Path

import numpy as np
import psutil
import pytest
import torch
from Testing.engine.conftest import tiny_card
from typer.testing import CliRunner

from experiments.__main__ import app
from experiments.bench import BenchReport, BenchSettings, as_text, run_bench
from experiments.bench.measuring import check_agreement, measure
from experiments.bench.random_sd import memory_problem
from experiments.bench.reference import PipelineReference
from experiments.bench.results import Agreement, ModelResult, Row, Spread
from experiments.bench.scene import Scene
from experiments.bench.sides import EngineSide, PipelineBatch, PipelineLoop, Sample
from progidiff.errors import InputError
from progidiff.model.folder import ProGiDiffModel, load_model, save_model
from progidiff.sampling.engine import Engine
from progidiff.training import small

STEPS, PROPOSALS, SLICE_SIZE = 3, 3, 48


def wake(model: ProGiDiffModel) -> ProGiDiffModel:
    """Give the control branch's zero convolutions weights, so that the hint matters, and the samples some contrast."""
    generator = torch.Generator().manual_seed(3)
    with torch.no_grad():
        for block in (*model.controlnet.controlnet_down_blocks, model.controlnet.controlnet_mid_block):
            block.weight.copy_(torch.randn(block.weight.shape, generator=generator) * 0.3)
    return model


def bundled_like() -> ProGiDiffModel:
    """The bundled model's architecture at 32 pixels: words as tokens, mask decoder, latents scaled per channel."""
    torch.manual_seed(0)
    names = ["liver", "left kidney"]
    tokenizer = small.make_tokenizer(names)
    card = tiny_card(
        vocabulary=names, spacing_mm=12.0, latent_shift=[0.1, -0.2, 0.0, 0.3], latent_scale=[0.8, 1.2, 1.0, 0.5]
    )
    model = small.make_model(32, tokenizer, card)
    for network in model.networks.values():
        network.eval().requires_grad_(False)
    return wake(model)


@pytest.fixture(scope="module", params=["autoencoder", "mask decoder"])
def model(request: pytest.FixtureRequest, tiny_model_folder: Path) -> ProGiDiffModel:
    """A Stable-Diffusion-like model without a mask decoder, and one like the bundled model."""
    if request.param == "mask decoder":
        return bundled_like()
    model = wake(load_model(tiny_model_folder))
    model.card = replace(model.card, spacing_mm=12.0)  # 32 pixels that cover the phantom
    return model


@pytest.fixture(scope="module")
def scene(model: ProGiDiffModel) -> Scene:
    return Scene.make(model, SLICE_SIZE)


@pytest.fixture(scope="module")
def reference(scene: Scene) -> PipelineReference:
    return PipelineReference(scene.model, scene.prompt)


def engine_side(scene: Scene) -> EngineSide:
    return EngineSide(scene, Engine(scene.model), STEPS, PROPOSALS)


def same(a: np.ndarray, b: np.ndarray) -> bool:
    """Equal up to pixels that lie on the boundary within rounding."""
    return a.shape == b.shape and float((a == b).mean()) > 0.999


@pytest.mark.slow
def test_engine_and_pipeline_sample_the_same_masks(scene: Scene, reference: PipelineReference) -> None:
    agreement = check_agreement(scene, engine_side(scene), reference, PROPOSALS, STEPS)
    assert agreement.proposals == PROPOSALS
    assert agreement.equal_pixels > 0.999
    assert agreement.lowest_dice > 0.99
    assert (agreement.autoencoder_dice is None) == (scene.model.mask_decoder is None)
    masks = engine_side(scene).run(0, 0, PROPOSALS).masks
    assert 0.001 < masks.mean() < 0.999  # neither empty nor full masks: their agreement means something
    assert not np.array_equal(masks[0], masks[1])


@pytest.mark.slow
def test_all_uses_of_the_pipeline_sample_the_same_masks(scene: Scene, reference: PipelineReference) -> None:
    loop = PipelineLoop(scene, reference, STEPS).run(1, 7, PROPOSALS)
    once = PipelineLoop(scene, reference, STEPS, hint_once=True).run(1, 7, PROPOSALS)
    batch = PipelineBatch(scene, reference, STEPS, PROPOSALS).run(1, 7, PROPOSALS)
    assert loop.masks.shape == (PROPOSALS, SLICE_SIZE, SLICE_SIZE)
    assert isinstance(scene.model.controlnet.controlnet_cond_embedding, torch.nn.Identity), "the model is as it was"
    assert same(loop.masks, once.masks)
    assert same(loop.masks, batch.masks)
    assert 0 < loop.first_s < loop.total_s
    assert batch.first_s == batch.total_s
    if scene.model.mask_decoder is None:
        assert same(loop.masks, engine_side(scene).run(1, 7, PROPOSALS).masks)


class Scripted:
    """A contestant with given times."""

    warm_proposals = 1

    def __init__(self, key: str, totals: list[float], calls: list[tuple[str, int, int]], breaks: bool = False) -> None:
        self.key, self.title = key, key.title()
        self._totals, self._calls, self._breaks = totals, calls, breaks

    def run(self, index: int, seed: int, proposals: int) -> Sample:
        self._calls.append((self.key, seed, proposals))
        if self._breaks:
            raise torch.OutOfMemoryError("no more")
        total = self._totals[seed] if seed < len(self._totals) else 1.0
        return Sample(np.zeros((proposals, 4, 4), bool), total / 4, total)


@pytest.mark.slow
def test_repeats_are_interleaved_and_ratios_taken_within_them(scene: Scene) -> None:
    calls: list[tuple[str, int, int]] = []
    ours = Scripted("ours", [1.0, 2.0, 4.0], calls)
    theirs = Scripted("theirs", [10.0, 12.0, 16.0], calls)
    said: list[str] = []
    rows = measure(scene, [ours, theirs, Scripted("huge", [], calls, breaks=True)], 8, 3, said.append)
    timed = [(key, seed) for key, seed, proposals in calls if proposals == 8]
    assert timed == [("ours", 0), ("theirs", 0), ("theirs", 1), ("ours", 1), ("ours", 2), ("theirs", 2)]
    first, second, third = rows
    assert first.engine_speedup is None
    assert first.total_s == Spread(2.0, 1.0, 4.0)
    assert first.proposals_per_second == Spread(4.0, 2.0, 8.0)
    assert first.first_proposal_s == Spread(0.5, 0.25, 1.0)
    assert second.engine_speedup == Spread(6.0, 4.0, 10.0)  # 10 / 1, 12 / 2, 16 / 4
    assert first.peak_memory_mb > 10
    assert third == Row("huge", "Huge", problem="not enough memory")
    assert "repeat 2 of 3: Theirs" in said
    assert not any(line.startswith("repeat") and "Huge" in line for line in said)


def report() -> BenchReport:
    row = Row("engine", "ProGiDiff engine", Spread(8, 7, 9), Spread(2, 1.8, 2.3), Spread(0.5, 0.04, 0.6), None, 812.4, 55.2)
    slow = replace(
        row, key="pipeline_loop", title="pipeline, loop", engine_speedup=Spread(5.25, 5, 6), image_s=Spread(1, 1, 1)
    )
    lost = Row("pipeline_batch", "pipeline, one call", problem="not enough memory")
    model = ModelResult(
        "m", 7_800_000, 160, (512, 512), "liver", "float32", "mask decoder", (row, slow, lost), Agreement(4, 1, 1, 0.5)
    )
    machine: dict[str, str | int | float] = {
        "device": "cpu", "cores": 2, "threads": 2, "torch": "2", "diffusers": "0", "progidiff": "0.1.0"
    }  # fmt: skip
    return BenchReport(machine, 16, 4, 3, (model,), ("What is compared.",))


def test_table_and_json_say_the_same() -> None:
    text = as_text(report())
    lines = text.splitlines()
    assert lines[0] == "16 proposals of one slice, 4 DDIM steps; median (range) of 3 interleaved runs"
    engine = next(line for line in lines if line.startswith("ProGiDiff engine "))
    assert engine.split("  ")[-1] == "812 (+55)"
    for cell in ("8.00 (7.00–9.00)", "2.00 (1.80–2.30)", "0.50 (0.040–0.60)"):
        assert cell in engine
    assert next(line for line in lines if line.startswith("pipeline, loop")).endswith("5.25 (5.00–6.00) x")
    assert "not enough memory" in next(line for line in lines if line.startswith("pipeline, one call"))
    assert "100.0000 % of the pixels of 4 masks are equal" in text
    assert lines[-1] == "What is compared."
    assert all(len(line) <= 160 for line in lines)
    plain = json.loads(json.dumps(report().as_dict()))
    assert plain["models"][0]["rows"][1]["engine_speedup"] == {"median": 5.25, "low": 5, "high": 6}
    assert plain["models"][0]["rows"][2]["problem"] == "not enough memory"
    assert report().models[0].row("pipeline_loop").engine_speedup == Spread(5.25, 5, 6)


@pytest.mark.slow
def test_command_prints_all_rows_as_json(tmp_path: Path) -> None:
    """The real thing, with a worker process."""
    save_model(bundled_like(), tmp_path / "model")
    arguments = ["bench", "--model", str(tmp_path / "model"), "--device", "cpu", "--json"]
    result = CliRunner().invoke(app, [*arguments, "--proposals", "3", "--steps", "2", "--repeats", "2"])
    assert result.exit_code == 0, result.output
    found = json.loads(result.stdout)
    assert (found["proposals"], found["steps"], found["repeats"]) == (3, 2, 2)
    (measured,) = found["models"]
    rows = {row["key"]: row for row in measured["rows"]}
    loops = ["pipeline_loop", "pipeline_loop_guidance", "pipeline_loop_hint_once"]
    assert list(rows) == ["engine", "worker", *loops, "pipeline_batch"]
    for row in rows.values():
        assert row["problem"] is None
        assert row["total_s"]["low"] <= row["total_s"]["median"] <= row["total_s"]["high"]
        assert math.isclose(row["proposals_per_second"]["high"], 3 / row["total_s"]["low"])
        assert 0 < row["first_proposal_s"]["median"] <= row["total_s"]["high"]
        assert row["peak_memory_mb"] > 0
        assert (row["engine_speedup"] is None) == (row["key"] == "engine")
        assert (row["image_s"] is None) == (row["key"] != "worker")
    assert measured["agreement"]["equal_pixels"] > 0.999
    assert measured["slice_shape"] == [512, 512]
    assert measured["target"] == "liver"


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (["--proposals", "0"], "proposals must be from 1 to"), (["--steps", "101"], "steps must be from 1 to 100"),
        (["--repeats", "0"], "repeats must be at least 1"), (["--model", "no such folder"], "no model folder"),
    ],
)  # fmt: skip
def test_command_refuses_in_one_line(arguments: list[str], words: str, tiny_model_folder: Path) -> None:
    result = CliRunner().invoke(app, ["bench", "--model", str(tiny_model_folder), "--device", "cpu", *arguments])
    assert result.exit_code == 2
    assert words in result.stderr.splitlines()[-1]
    assert result.stdout == ""


@pytest.mark.slow
def test_large_size_is_refused_where_memory_is_short(monkeypatch: pytest.MonkeyPatch, tiny_model_folder: Path) -> None:
    short = psutil.virtual_memory()._replace(available=3 << 30)
    monkeypatch.setattr(psutil, "virtual_memory", lambda: short)
    with pytest.raises(
        InputError, match=r"Stable Diffusion 1\.5 with 16 proposals needs about 2\d GiB of memory, and 3 GiB are free"
    ):
        run_bench(BenchSettings(model=tiny_model_folder, device="cpu", sd15=True, worker=False))
    monkeypatch.setattr(psutil, "virtual_memory", lambda: short._replace(available=200 << 30))
    assert memory_problem("sd15", torch.device("cpu"), 16) is None
