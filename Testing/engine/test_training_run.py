"""From data to model folder: base and control, small and full-size-shaped, resumed, refused, and from the command line."""

from __future__ import annotations

import json
import os
import re
import signal
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from typer.testing import CliRunner

from progidiff.cli.app import app
from progidiff.cli.common import interruptible
from progidiff.errors import CancelledError, DatasetError, ModelError, OutputError
from progidiff.model.folder import load_model
from progidiff.model.networks import encode_text, tokenize
from progidiff.sampling.engine import Engine
from progidiff.synthesis.tissues import VOCABULARY
from progidiff.training import small
from progidiff.training.run import RunSettings, TrainingData, Watch, train_base, train_control
from progidiff.wire.messages import ProposeRequest, SliceEvent

from ..volume_examples import write_nnunet
from .conftest import TINY_RUN

TINY = RunSettings(**TINY_RUN)
PHANTOMS = TrainingData(synthetic="phantoms")
QUIET = Watch(log=lambda line: None)


def write_cases(folder: Path, cases: int) -> Path:
    """nnU-Net raw CT cases with a block of liver."""
    label = np.zeros((3, 36, 40), np.uint8)
    label[:, 10:24, 20:34] = 1
    images = [np.random.default_rng(n).normal(20, 10, label.shape).astype(np.float32) + 80 * label for n in range(cases)]
    made = {f"c{n}": (image, label) for n, image in enumerate(images)}
    return write_nnunet(folder, made, np.diag([8.0, 8.0, 20.0, 1.0]), {"liver": 1})


def test_base_makes_a_model_that_says_what_it_is(trained_folder: Path) -> None:
    model = load_model(trained_folder)
    assert model.card.model_id == "model-base"
    assert model.card.licence == "Apache-2.0"
    assert [(s.stage, s.steps) for s in model.card.training] == [("autoencoder", 2), ("base", 2)]
    assert [s.name for s in model.card.trained_on] == ["procedural abdominal phantoms"]
    assert len(model.card.vocabulary) == 10
    assert "fresh copy" in model.card.notes
    assert model.card.latent_scale != [1.0] * 4
    # an untrained control branch leaves the backbone alone
    z, t, states = torch.randn(1, 4, 8, 8), torch.tensor([500]), torch.randn(1, 8, 64)
    down, mid = model.controlnet(z, t, states, torch.randn(1, 32, 8, 8), return_dict=False)
    assert not any(bool(d.any()) for d in [*down, mid])


@pytest.mark.slow
def test_control_on_real_cases_makes_a_model_that_proposes(trained_folder: Path, tmp_path: Path) -> None:
    data = TrainingData((write_cases(tmp_path / "Dataset007_Livers", 3),), validation_share=0.34)
    lines: list[str] = []
    card = train_control(trained_folder, data, tmp_path / "out", tmp_path / "work", TINY, Watch(lines.append))
    assert card.vocabulary == ["liver"]
    assert any("cannot be asked for" in line and "spleen" in line for line in lines)
    assert not any("c0" in line or "c1" in line for line in lines)
    assert [s.stage for s in card.training] == ["autoencoder", "base", "encoder", "control"]
    assert [(s.name, s.n) for s in card.trained_on] == [("procedural abdominal phantoms", None), ("Dataset007_Livers", 3)]
    assert card.modalities == ["CT"]
    assert card.planes == ["axial"]
    coronal = TrainingData(data.folders, validation_share=0.34, plane="coronal")
    with pytest.raises(ModelError, match="another data"):
        train_control(trained_folder, coronal, tmp_path / "out 2", tmp_path / "work", TINY, QUIET)
    with pytest.raises(ModelError, match="another kind"):
        train_base(PHANTOMS, tmp_path / "out 2", tmp_path / "work", TINY, QUIET)
    asked = train_control(trained_folder, coronal, tmp_path / "coronal", tmp_path / "work 2", TINY, QUIET)
    assert asked.planes == ["coronal"]
    curve = json.loads((tmp_path / "work" / "control" / "curve.json").read_text())
    assert {"step", "dice", "twin"} == curve[-1].keys()
    assert (tmp_path / "work" / "control" / "curve.png").is_file()
    # As a name, that is: checksums are made of such letters, too.
    assert re.search(r"\bc[01]\b", (tmp_path / "work" / "run.json").read_text()) is None

    old, new = load_model(trained_folder), load_model(tmp_path / "out")
    assert (old.image_encoder.config.classes, new.image_encoder.config.classes) == (10, 1)
    assert all(torch.equal(a, b) for a, b in zip(old.unet.parameters(), new.unet.parameters(), strict=True))
    changed = zip(old.controlnet.parameters(), new.controlnet.parameters(), strict=True)
    assert any(not torch.equal(a, b) for a, b in changed)
    engine = Engine.load(tmp_path / "out", "cpu")
    volume = np.random.default_rng(0).normal(20, 50, (2, 36, 40)).astype(np.float32)
    engine.set_image(volume, np.diag([-8.0, -8.0, 20.0, 1.0]), "CT")
    events: list[Any] = []
    engine.propose(ProposeRequest(("liver",), proposals=2, steps=1), events.append, lambda: False)
    assert any(isinstance(event, SliceEvent) for event in events)


@pytest.mark.slow
@pytest.mark.parametrize("kind", ["base", "control"])
def test_a_stopped_run_goes_on_to_the_same_model(kind: str, trained_folder: Path, tmp_path: Path) -> None:
    def run(out: str, work: str, watch: Watch) -> None:
        if kind == "base":
            train_base(PHANTOMS, tmp_path / out, tmp_path / work, TINY, watch)
        else:
            train_control(trained_folder, PHANTOMS, tmp_path / out, tmp_path / work, TINY, watch)

    run("straight", "work", QUIET)
    for _ in range(2):  # stopped after the first step of either stage
        with pytest.raises(CancelledError):
            run("resumed", "again", Watch(lambda line: None, cancelled=lambda: True))
        assert not (tmp_path / "resumed").exists()
    run("resumed", "again", QUIET)
    one, two = load_model(tmp_path / "straight"), load_model(tmp_path / "resumed")
    assert one.card.sha256 == two.card.sha256


@pytest.mark.slow
def test_a_full_size_shaped_model_is_trained_as_well(tiny_model_folder: Path, tmp_path: Path) -> None:
    data = TrainingData((write_cases(tmp_path / "cases", 3),), validation_share=0.34)
    card = train_base(data, tmp_path / "base", tmp_path / "work", TINY, QUIET, tiny_model_folder)
    before, after = load_model(tiny_model_folder), load_model(tmp_path / "base")
    assert before.mask_decoder is None
    assert after.mask_decoder is not None
    halves = [p.half().float() for p in before.vae.parameters()]
    assert all(torch.equal(a, b) for a, b in zip(halves, after.vae.parameters(), strict=True))
    assert card.trained_on[0].name.endswith("(frozen backbone)")
    control = train_control(tiny_model_folder, data, tmp_path / "control", tmp_path / "work2", TINY, QUIET)
    assert control.vocabulary == ["liver"]
    assert load_model(tmp_path / "control").mask_decoder is None


def test_a_place_that_cannot_take_the_model_is_refused_before_training(tmp_path: Path) -> None:
    (tmp_path / "out").mkdir()
    (tmp_path / "out" / "thesis.txt").write_text("precious")
    with pytest.raises(OutputError, match="not a model"):
        train_base(PHANTOMS, tmp_path / "out", tmp_path / "work", TINY, QUIET)
    assert not (tmp_path / "work").exists()


def test_settings_that_cannot_be_served(tmp_path: Path) -> None:
    for change in ({"steps": 0}, {"image_size": 40}):
        with pytest.raises(ModelError):
            train_base(PHANTOMS, tmp_path / "o", tmp_path / "w", RunSettings(**{**TINY.__dict__, **change}), QUIET)
    if not torch.cuda.is_available():
        with pytest.raises(ModelError, match="CUDA"):
            train_base(PHANTOMS, tmp_path / "o", tmp_path / "w", RunSettings(device="cuda"), QUIET)
    with pytest.raises(DatasetError, match="nothing to train on"):
        train_base(TrainingData(), tmp_path / "o", tmp_path / "w", TINY, QUIET)


# -- the command line --


@pytest.fixture
def tiny_steps(monkeypatch: pytest.MonkeyPatch) -> None:
    """Runs of the command line at the size of the tests."""

    def settings(steps: int, first_steps: int | None, images: int, *rest: object) -> RunSettings:
        return RunSettings(**{**TINY.__dict__, "steps": steps, "first_steps": first_steps, "images": images})

    monkeypatch.setattr("progidiff.cli.learn._settings", settings)


@pytest.mark.slow
@pytest.mark.usefixtures("tiny_steps")
def test_train_base_from_the_command_line(tmp_path: Path) -> None:
    out = tmp_path / "my model"
    arguments = ["train", "base", "--synthetic", "phantoms", "--out", str(out), "--steps", "1", "--first-steps", "1"]
    result = CliRunner().invoke(app, [*arguments, "--images", "1"])
    assert result.exit_code == 0, result.output
    assert "my-model-base" in result.stdout
    assert "base 1/1" in result.stderr
    assert load_model(out).card.training[1].steps == 1
    assert (tmp_path / "my model-training" / "base" / "checkpoint.safetensors").is_file()


@pytest.mark.usefixtures("tiny_steps")
def test_ctrl_c_keeps_a_checkpoint_and_ends_with_130(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from progidiff.training.stages import AutoencoderStage

    loss: Callable[..., Any] = AutoencoderStage.loss

    def interrupted(self: AutoencoderStage, count: int) -> Any:
        os.kill(os.getpid(), signal.SIGINT)
        return loss(self, count)

    monkeypatch.setattr(AutoencoderStage, "loss", interrupted)
    arguments = [
        "train",
        "base",
        "--synthetic",
        "phantoms",
        "--out",
        str(tmp_path / "m"),
        "--steps",
        "2",
        "--first-steps",
        "2",
    ]
    result = CliRunner().invoke(app, arguments)
    assert result.exit_code == 130
    assert "step 1 of 2" in result.stderr
    assert "go on" in result.stderr
    assert (tmp_path / "m-training" / "autoencoder" / "checkpoint.safetensors").is_file()
    assert not (tmp_path / "m").exists()
    assert signal.getsignal(signal.SIGINT) is signal.default_int_handler


def test_a_second_ctrl_c_interrupts_at_once() -> None:
    told: list[str] = []
    with interruptible("Stopping.", told.append) as asked:
        assert not asked()
        os.kill(os.getpid(), signal.SIGINT)
        assert asked()
        with pytest.raises(KeyboardInterrupt):
            os.kill(os.getpid(), signal.SIGINT)
    assert len(told) == 1


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["base"], "nothing to train on"),
        (["base", "--data", "nowhere"], "no data set"),
        (["control", "--model", "nowhere", "--synthetic", "phantoms"], "no model folder"),
        (["default", "--data", "nowhere"], "no folder"),
        (["default", "--data", "nowhere", "--phantoms-only"], "not both"),
        (["default", "--phantoms-only", "--from", "nowhere"], "no model folder"),
    ],
)
def test_bad_input_is_one_line_and_exit_code_2(arguments: list[str], message: str, tmp_path: Path) -> None:
    result = CliRunner().invoke(app, ["train", *arguments, "--out", str(tmp_path / "m"), "--device", "cpu"])
    assert result.exit_code == 2
    assert message in result.stderr
    assert len(result.stderr.strip().splitlines()) == 1
    assert not list(tmp_path.iterdir())


@pytest.mark.slow
def test_train_default_runs_every_stage_and_assembles(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from progidiff.training import default
    from progidiff.training.batches import ReusedBatches
    from progidiff.training.stages import AutoencoderStage

    monkeypatch.setattr(default, "BODY_GRIDS", {"axial": (32, 48)})
    monkeypatch.setattr(ReusedBatches, "_SHARD", 8)
    monkeypatch.setattr(default, "DefaultSteps", lambda: type("Steps", (), dict.fromkeys(default.STAGES, 1))())
    monkeypatch.setattr(AutoencoderStage, "latent_statistics", lambda stage: ([0.0] * 4, [1.0] * 4))
    arguments = ["--phantoms-only", "--device", "cpu", "--work", str(tmp_path / "work"), "--out", str(tmp_path / "out")]
    result = CliRunner().invoke(app, ["train", "default", *arguments])
    assert result.exit_code == 0, result.output
    card = load_model(tmp_path / "out").card
    assert [s.stage for s in card.training] == list(default.STAGES)
    again = CliRunner().invoke(app, ["train", "default", *arguments])
    assert again.exit_code == 0
    assert "resumed at step 1 of 1" in again.stderr
    assert load_model(tmp_path / "out").card.sha256 == card.sha256


def test_going_on_from_a_model_keeps_its_answers_and_adds_targets(tmp_path: Path) -> None:
    from progidiff.training.default import DefaultRecipe, empty_card

    torch.manual_seed(3)
    known = ["spleen", "liver"]
    start = small.make_model(160, small.make_tokenizer(known), empty_card(vocabulary=known, body_grids={}))
    recipe = DefaultRecipe(tmp_path, [], start=start)
    image = torch.rand(1, 1, 112, 160)
    with torch.no_grad():
        before = start.image_encoder.segment(start.image_encoder(image))[0]
        after = recipe.encoder.segment(recipe.encoder(image))[0]
        words = [
            encode_text(m, *tokenize(t, known, torch.device("cpu")))[0]
            for m, t in ((start.text_encoder, start.tokenizer), (recipe.text_encoder, recipe.tokenizer))
        ]
    places = [VOCABULARY.index(name) for name in known]
    torch.testing.assert_close(after[places], before)
    torch.testing.assert_close(words[1], words[0])
    assert (after[VOCABULARY.index("colon")] < 0).all()  # new targets are not there until they are learned
    assert len(after) == len(VOCABULARY)


def test_going_on_from_a_model_of_another_architecture_is_refused(tmp_path: Path, tiny_model_folder: Path) -> None:
    from progidiff.training.default import DefaultRecipe

    with pytest.raises(ModelError, match="not built as the bundled model"):
        DefaultRecipe(tmp_path, [], start=load_model(tiny_model_folder))
