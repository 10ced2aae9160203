"""From cases to an adapter: split by patient, early stop, cancel that keeps the best, resume, card, command line."""

from __future__ import annotations

import base64
import io
import json
import shutil
import subprocess
import sys
from dataclasses import fields, replace
from pathlib import Path
from typing import Any

import nibabel as nib
import numpy as np
import pytest
import torch
from packaging.requirements import Requirement
from PIL import Image
from safetensors.torch import load_file
from Testing.alone import alone
from typer.testing import CliRunner

from progidiff.cards import load_adapter_card
from progidiff.cli.app import app
from progidiff.curation import CuratedSet, NewCase
from progidiff.errors import CancelledError, DatasetError, ModelError, OutputError
from progidiff.model.adapter import lora_state
from progidiff.model.folder import load_model
from progidiff.places import ADAPTER_CARD_NAME, ADAPTER_WEIGHTS_NAME
from progidiff.sampling.engine import Engine
from progidiff.training.adapt import adapt
from progidiff.training.run import Watch
from progidiff.training.stacks import open_cases
from progidiff.training.tuning import TuneSettings, TuneStage, tune
from progidiff.wire.messages import AdaptDone, AdaptRequest, AdaptStep, Cancel

from .worker_pipe import Peer, environment, tell

TINY = TuneSettings(
    steps=4,
    rank=2,
    learning_rate=1e-2,
    images=2,
    prompts_per_image=1,
    validate_every=2,
    validation_images=4,
    replay_share=0.3,
)
REQUEST = AdaptRequest(
    cases=(),
    out="",
    validation_share=0.34,
    device="cpu",
    phantoms=1,
    **{entry.name: getattr(TINY, entry.name) for entry in fields(TINY) if hasattr(AdaptRequest, entry.name)},
)
QUIET = Watch(log=lambda line: None)


def request(cases: Path, model: Path, out: Path, work: Path | None = None, **more: Any) -> AdaptRequest:
    return replace(REQUEST, cases=(str(cases),), model=str(model), out=str(out), work=work and str(work), **more)


@pytest.fixture(scope="module")
def model(trained_folder: Path) -> Path:
    return trained_folder


def block(number: int) -> tuple[np.ndarray, np.ndarray]:
    """CT (K, J, I) with a bright block, and the block."""
    image = np.random.default_rng(number).normal(20, 10, (3, 36, 40)).astype(np.float32)
    mask = np.zeros(image.shape, dtype=bool)
    mask[:, 10:24, 20:34] = True
    return image + 80 * mask, mask


@pytest.fixture(scope="module")
def cases(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """nnU-Net raw: three patients."""
    folder = tmp_path_factory.mktemp("raw") / "Dataset007_Livers"
    for part in ("imagesTr", "labelsTr"):
        (folder / part).mkdir(parents=True)
    for number in range(3):
        image, mask = block(number)
        affine = np.diag([8.0, 8.0, 20.0, 1.0])
        nib.save(nib.Nifti1Image(image.T, affine), folder / "imagesTr" / f"secret{number}_0000.nii.gz")
        nib.save(nib.Nifti1Image(mask.T.astype(np.uint8), affine), folder / "labelsTr" / f"secret{number}.nii.gz")
    content = {"labels": {"background": 0, "liver": 1}, "channel_names": {"0": "CT"}, "file_ending": ".nii.gz"}
    (folder / "dataset.json").write_text(json.dumps(content), "utf-8")
    return folder


@pytest.fixture
def requirements() -> list[str]:
    """Names of the packages that Setup sees to."""
    path = Path(__file__).resolve().parents[2] / "ProGiDiffSlicer" / "Resources" / "requirements.txt"
    return [Requirement(line).name for line in path.read_text("utf-8").splitlines() if line and not line.startswith("#")]


def add_case(folder: Path, number: int, target: str = "liver", **other: Any) -> str:
    """Save a block as a training example."""
    image, mask = block(number)
    new = NewCase(
        **{
            "image": image, "affine": np.diag([-8.0, -8.0, 20.0, 1.0]), "masks": {target: mask}, "modality": "CT",
            "plane": "axial", "prompt": target, "code": None, "proposal": None, "edited": True, "editor": "",
            "model_id": "m", "adapter_id": None, "dice_to_proposal": None, "volume_key": f"{number:032x}",
            "patient_key": None, **other,
        }
    )  # fmt: skip
    return CuratedSet(folder).add(new)


@pytest.mark.slow
def test_an_adapter_says_what_it_was_made_of(model: Path, cases: Path, tmp_path: Path) -> None:
    events: list[dict[str, Any]] = []
    lines: list[str] = []
    card = adapt(request(cases, model, tmp_path / "mine"), Watch(lines.append), tell(events))
    assert card == load_adapter_card(tmp_path / "mine")
    assert (card.cases.training, card.cases.validation, card.patients.training) == (2, 1, 2)
    assert card.targets.keys() == {"liver"}
    assert card.vocabulary == ["liver"]
    assert card.modalities == ["CT"]
    assert (card.rank, card.alpha, card.layers) == (2, 2.0, "all")
    assert card.before["liver"].n_slices == card.after["liver"].n_slices == 3
    assert card.retention is not None
    assert card.retention.n == 1
    assert card.better == (card.after["liver"].dice > card.before["liver"].dice)
    assert ("not better" in card.reason) != card.better
    assert not (tmp_path / "mine-training").exists()
    assert (tmp_path / "mine" / "curve.png").is_file()

    kinds = [e["event"] for e in events]
    assert kinds[0] == "start"
    assert kinds[-2:] == ["picture", "done"]
    assert events[0]["targets"] == {"liver": {"training": 2, "validation": 1}}
    assert [e["step"] for e in events if e["event"] == "step"] == [1, 2, 3, 4]
    assert [e["step"] for e in events if e["event"] == "validation"] == [0, 2, 4]
    assert events[-1]["adapter_id"] == card.adapter_id == events[0]["adapter_id"]
    picture = Image.open(io.BytesIO(base64.b64decode(events[-2]["png"])))
    assert picture.width > 1.5 * picture.height
    json.dumps(events)
    # names of cases are known to the user's own set and to nobody else
    written = b"".join(p.read_bytes() for p in (tmp_path / "mine").rglob("*") if p.is_file())
    assert b"secret" not in written
    assert not any("secret" in line for line in lines)


@pytest.mark.slow
def test_the_adapter_works_on_the_model_it_was_made_for(model: Path, cases: Path, tmp_path: Path) -> None:
    adapt(request(cases, model, tmp_path / "a", steps=2), QUIET)
    engine = Engine.load(model, "cpu")
    card = engine.load_adapter(tmp_path / "a", even_if_worse=True)
    assert engine.adapter == card


@pytest.mark.slow
def test_the_segmentation_head_learns_along(model: Path, cases: Path, tmp_path: Path) -> None:
    """It has to say where a target is on the pictures that the adapter is for."""
    parts, (stacks, _) = load_model(model), open_cases([cases])
    tune(parts, stacks, [], tmp_path / "work", replace(TINY, steps=2), QUIET)
    layers = lora_state(parts)
    assert layers["image_encoder.segmentation_head.lora_B"].any()
    assert layers["image_encoder.stem.lora_B"].any()


@pytest.mark.slow
def test_validation_leaves_out_what_proposals_leave_out(headed_folder: Path, tmp_path: Path) -> None:
    """The head finds the liver everywhere, the spleen nowhere, and the left kidney in one of four samples."""
    curves = []
    for target in ("liver", "spleen", "left kidney"):
        for number in range(3):
            add_case(tmp_path / target, number, target)
        for folder in (headed_folder, None):
            parts = load_model(headed_folder)
            if folder is None:
                parts.image_encoder.segmentation_head.bias.data.fill_(20.0)
            stacks, _ = open_cases([tmp_path / target])
            settings = replace(TINY, steps=1, learning_rate=1e-9, validate_every=1)
            work = tmp_path / f"{target} {folder is None}"
            curves.append(tune(parts, stacks[:2], stacks[2:], work, settings, QUIET).curve[0]["dice"])
    assert curves[0] == curves[1] > 0
    assert curves[2] == 0 < curves[3]
    assert 0 < curves[4] < curves[5]


@pytest.mark.slow
def test_the_best_weights_are_kept_not_the_last(model: Path, cases: Path, tmp_path: Path) -> None:
    """A learning rate that ruins the model: the untouched base, step 0, has to win or tie, and training to end early."""
    wild = replace(TINY, learning_rate=1.0, steps=40, validate_every=1, patience=2)
    tuned = []
    stacks, _ = open_cases([cases])
    parts = load_model(model)
    before = {k: v.clone() for k, v in parts.controlnet.state_dict().items()}
    tuned = tune(parts, stacks[:2], stacks[2:], tmp_path / "work", wild, QUIET)
    assert tuned.steps < 40
    best = max(tuned.curve, key=lambda point: (point["dice"], -point["step"]))
    assert tuned.best_step == best["step"]
    after = {k.replace(".base_layer", ""): v for k, v in parts.controlnet.state_dict().items() if ".lora_" not in k}
    assert all(torch.equal(v, after[k]) for k, v in before.items())


@pytest.mark.slow
def test_cancel_keeps_the_best_so_far_and_the_same_call_goes_on(
    model: Path, cases: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Validations of a made-up course: the second one, at step 1, is the best; after the fourth one it is cancelled."""
    course = [0.1, 0.5, 0.3, 0.2, 0.4, 0.4]
    seen: list[dict[str, Any]] = []
    monkeypatch.setattr(TuneStage, "validate", lambda stage: {"dice": course.pop(0)})
    watch = Watch(log=lambda line: None, cancelled=lambda: len(course) <= 2)
    places = {"cases": cases, "model": model, "out": tmp_path / "a", "work": tmp_path / "work"}
    eager = request(**places, steps=40, validate_every=1, patience=40)
    card = adapt(eager, watch, tell(seen))
    assert seen[-1]["cancelled"]
    assert (card.best_step, card.steps) == (1, 4)
    kept = load_file(tmp_path / "a" / ADAPTER_WEIGHTS_NAME)
    best = load_file(tmp_path / "work" / "best.safetensors")
    assert sorted(float(t.sum()) for t in kept.values()) == pytest.approx(sorted(float(t.sum()) for t in best.values()))
    assert (tmp_path / "work" / "checkpoint.safetensors").is_file()

    more: list[dict[str, Any]] = []
    again = adapt(replace(eager, steps=5), QUIET, tell(more))
    assert [e["step"] for e in more if e["event"] == "step"] == [5]
    assert (again.adapter_id, again.best_step) == (card.adapter_id, 1)  # what came later was not better
    assert not (tmp_path / "work").exists()


@pytest.mark.slow
def test_cancel_before_anything_is_better_writes_no_adapter(model: Path, cases: Path, tmp_path: Path) -> None:
    watch = Watch(log=lambda line: None, cancelled=lambda: True)
    with pytest.raises(CancelledError, match="goes on from here"):
        adapt(request(cases, model, tmp_path / "a", work=tmp_path / "work"), watch)
    assert not (tmp_path / "a").exists()
    assert (tmp_path / "work" / "checkpoint.safetensors").is_file()


@pytest.mark.slow
def test_one_patient_alone_leaves_the_question_open(model: Path, tmp_path: Path) -> None:
    add_case(tmp_path / "set", 1)
    add_case(tmp_path / "set", 2, volume_key=f"{1:032x}")
    lines: list[str] = []
    card = adapt(request(tmp_path / "set", model, tmp_path / "a", steps=2), Watch(lines.append))
    assert not card.better
    assert "nobody knows" in card.reason
    assert any("one patient" in line for line in lines)
    assert (card.cases.training, card.cases.validation) == (2, 0)
    assert card.before == card.after == {}


def test_curated_cases_are_split_by_patient(tmp_path: Path) -> None:
    for number, volume in enumerate((1, 1, 2, 3)):
        add_case(tmp_path / "set", number, volume_key=f"{volume:032x}", patient_key="f" * 32 if volume > 1 else None)
    stacks, modalities = open_cases([tmp_path / "set"])
    assert modalities == ["CT"]
    assert len(stacks) == 4
    assert sorted(sum(s.patient == p for s in stacks) for p in {s.patient for s in stacks}) == [2, 2]


def test_a_curated_case_reads_back_slice_by_slice(tmp_path: Path) -> None:
    add_case(tmp_path / "set", 5, target="left kidney")
    (stack,), _ = open_cases([tmp_path / "set"])
    assert stack.labelled == {"left kidney"}
    slices = stack.read()
    image, mask = block(5)
    assert len(slices) == 3
    np.testing.assert_allclose(slices[1].image, image[1], atol=1e-3)
    assert np.array_equal(slices[1].labels["left kidney"], mask[1])
    assert slices[1].spacing_rc == (8.0, 8.0)


def refusals(tmp_path: Path, cases: Path) -> dict[str, tuple[dict[str, Any], type[Exception], str]]:
    (tmp_path / "notes").mkdir()
    (tmp_path / "notes" / "mine.txt").write_text("mine")
    (tmp_path / "empty").mkdir()
    return {
        "a folder of something else": ({"out": tmp_path / "notes"}, OutputError, "no adapter"),
        "no cases": ({"cases": tmp_path / "empty"}, DatasetError, "no data set"),
        "an unknown target": ({"targets": ("spline",)}, DatasetError, "does not know spline"),
        "a target without labels": ({"targets": ("spleen",)}, DatasetError, "No case labels"),
        "no steps": ({"steps": 0}, ModelError, "at least one step"),
        "no model": ({"model": tmp_path / "nowhere"}, ModelError, "no model folder"),
    }


@pytest.mark.parametrize(
    "what",
    ["a folder of something else", "no cases", "an unknown target", "a target without labels", "no steps", "no model"],
)
def test_what_cannot_be_done_is_said_at_once(what: str, model: Path, cases: Path, tmp_path: Path) -> None:
    change, kind, reason = refusals(tmp_path, cases)[what]
    call: dict[str, Any] = {"cases": cases, "model": model, "out": tmp_path / "a", **change}
    with pytest.raises(kind, match=reason):
        adapt(request(**call), QUIET)
    assert not (tmp_path / "a").exists()


@pytest.mark.slow
def test_a_bad_case_is_left_out_and_named(model: Path, cases: Path, tmp_path: Path) -> None:
    folder = tmp_path / "Dataset008"
    shutil.copytree(cases, folder)
    image, mask = block(7)
    affine = np.diag([8.0, 8.0, 20.0, 1.0])
    nib.save(nib.Nifti1Image(image.T * np.nan, affine), folder / "imagesTr" / "nan_0000.nii.gz")
    nib.save(nib.Nifti1Image(mask.T.astype(np.uint8), affine), folder / "labelsTr" / "nan.nii.gz")
    (folder / "labelsTr" / "lost.nii.gz").write_bytes((folder / "labelsTr" / "nan.nii.gz").read_bytes())
    log: list[str] = []
    events: list[dict[str, Any]] = []
    card = adapt(request(folder, model, tmp_path / "a"), Watch(log=log.append), tell(events))
    assert card.cases.training + card.cases.validation == 3
    assert card.notes == "2 of 5 cases could not be used and were left out."
    assert events[-1]["reason"] == f"{card.reason} {card.notes}"
    (start,) = (event for event in events if event["event"] == "start")
    reasons = {entry["case"]: entry["reason"] for entry in start["left_out"]}
    assert set(reasons) == {"nan", "lost"}
    assert "not finite" in reasons["nan"]
    assert "is missing" in reasons["lost"]
    assert "2 of 5 cases cannot be used and are left out." in log
    assert not any("lost" in line or "nan_0" in line for line in log)
    # and from the command line
    result = CliRunner().invoke(app, command("--cases", folder, "--model", model, "--out", tmp_path / "b"))
    assert result.exit_code == 0, result.output
    assert "Left out: lost: The image of case 'lost' is missing" in result.stdout


def test_a_damaged_curated_case_is_told(tmp_path: Path) -> None:
    bad, good = add_case(tmp_path, 1), add_case(tmp_path, 2)
    next(tmp_path.rglob(f"cases/{bad}.json")).write_text("{")
    said: list[str] = []
    stacks, _ = open_cases([tmp_path], tell=said.append)
    assert [stack.name for stack in stacks] == [good]
    assert said == ['1 cases are damaged and left out; "progidiff curate verify" says why.']


def test_cases_of_which_none_can_be_used_end_in_one_sentence(model: Path, cases: Path, tmp_path: Path) -> None:
    folder = tmp_path / "Dataset009"
    shutil.copytree(cases, folder)
    for path in (folder / "labelsTr").iterdir():
        label = nib.load(path)
        nib.save(nib.Nifti1Image(np.zeros(label.shape, np.uint8), label.affine), path)
    with pytest.raises(DatasetError, match="are empty, or show nothing"):
        adapt(request(folder, model, tmp_path / "a"), QUIET)
    shutil.rmtree(folder / "imagesTr")
    with pytest.raises(DatasetError, match="None of the 3 cases can be used; of the first one: The image of case"):
        adapt(request(folder, model, tmp_path / "a"), QUIET)
    assert not (tmp_path / "a").exists()


@pytest.mark.slow
def test_another_runs_work_folder_is_refused(model: Path, cases: Path, tmp_path: Path) -> None:
    watch = Watch(log=lambda line: None, cancelled=lambda: True)
    with pytest.raises(CancelledError):
        adapt(request(cases, model, tmp_path / "a", work=tmp_path / "work"), watch)
    with pytest.raises(ModelError, match="another settings"):
        adapt(request(cases, model, tmp_path / "a", work=tmp_path / "work", rank=3), QUIET)


def command(*arguments: object) -> list[str]:
    return [
        "adapt", "--steps", "2", "--rank", "2", "--validate-every", "1", "--images", "2", "--device", "cpu",
        *map(str, arguments),
    ]  # fmt: skip


@pytest.mark.slow
def test_the_command_prints_before_and_after(model: Path, cases: Path, tmp_path: Path) -> None:
    arguments = command("--cases", cases, "--model", model, "--out", tmp_path / "a", "--pictures", tmp_path / "seen")
    result = CliRunner().invoke(app, arguments)
    assert result.exit_code == 0, result.output
    assert "Dice of the first-ranked proposal on held-out cases, a" in result.output
    assert "Retention on 5 held-out phantoms" in result.output
    assert list((tmp_path / "seen").glob("*.png"))


@pytest.mark.slow
def test_json_lines_are_one_object_each(model: Path, cases: Path, tmp_path: Path) -> None:
    result = CliRunner().invoke(app, command("--cases", cases, "--model", model, "--out", tmp_path / "a", "--json"))
    assert result.exit_code == 0, result.output
    events = [json.loads(line) for line in result.stdout.splitlines()]
    assert [events[0]["event"], events[-1]["event"]] == ["start", "done"]
    assert (tmp_path / "a" / ADAPTER_WEIGHTS_NAME).is_file()
    refused = CliRunner().invoke(app, command("--cases", tmp_path, "--model", model, "--out", tmp_path / "b", "--json"))
    assert refused.exit_code == 2
    last = json.loads(refused.stdout.splitlines()[-1])
    assert (last["event"], last["code"]) == ("error", "dataset")


@pytest.mark.slow
def test_the_end_of_the_pipe_ends_a_command_which_keeps_the_best(model: Path, cases: Path, tmp_path: Path) -> None:
    arguments = command("--cases", cases, "--model", model, "--out", tmp_path / "a", "--validation-share", 0, "--json")
    arguments[arguments.index("--steps") + 1] = "100000"
    process = subprocess.Popen(
        [sys.executable, "-P", "-m", "progidiff", *arguments], stdin=subprocess.PIPE, stdout=subprocess.PIPE,
        stderr=subprocess.DEVNULL, text=True, env=environment(),
    )  # fmt: skip
    assert process.stdin is not None
    assert process.stdout is not None
    try:
        for line in process.stdout:
            if json.loads(line)["event"] == "step":
                break
        process.stdin.close()
        events = [json.loads(line) for line in process.stdout]
        assert process.wait(timeout=120) == 0
    finally:
        process.kill()
        process.stdout.close()
    assert events[-1]["event"] == "done"
    assert events[-1]["cancelled"]
    assert (tmp_path / "a" / ADAPTER_CARD_NAME).is_file()


@pytest.mark.slow
@pytest.mark.parametrize("how", ["cancel", "end of input"])
def test_a_worker_that_is_asked_to_stop_or_left_alone_keeps_the_best(
    how: str, model: Path, cases: Path, tmp_path: Path
) -> None:
    asked = request(cases, model, tmp_path / "a", steps=100_000, validation_share=0.0)
    with Peer([sys.executable, "-P", "-m", "progidiff", "worker"]) as peer:
        peer.send(asked, 1)
        peer.reply(1, AdaptStep, 280)
        if how == "cancel":
            peer.send(Cancel(1), 2)
            assert peer.reply(1, AdaptDone, 280).cancelled
        peer.close_input()
        assert peer.wait(280) == 0
        assert str(cases).encode() not in peer.log
    assert load_adapter_card(tmp_path / "a").cases.training == 3


@pytest.mark.slow
def test_what_slicer_installs_is_enough_to_tune_and_to_choose(
    model: Path, cases: Path, tmp_path: Path, requirements: list[str]
) -> None:
    """The panel's second process runs in a Python that has the packages of Resources/requirements.txt alone."""
    out = tmp_path / "mine"
    options = ["--steps", "1", "--images", "1", "--rank", "2", "--validate-every", "1", "--device", "cpu", "--json"]
    for number in (1, 2):
        add_case(tmp_path / "set", number)
    given = ["--cases", str(tmp_path / "set"), "--model", str(model), "--out", str(out), *options]
    done = run_alone(requirements, "adapt", *given)
    assert done.returncode == 0, done.stderr
    assert json.loads(done.stdout.splitlines()[-1])["event"] == "done"
    assert (out / "curve.png").is_file()
    given = ["--folder", str(cases / "imagesTr"), "--model", str(model), "--out", str(tmp_path / "next.json")]
    options = ["--prompt", "liver", "--proposals", "2", "--steps", "1", "--slices", "1", "--closer", "0", "--modality", "CT"]
    done = run_alone(requirements, "next", *given, *options, "--device", "cpu")
    assert done.returncode == 0, done.stderr


def run_alone(packages: list[str], *arguments: str) -> subprocess.CompletedProcess[str]:
    """Run the program where there is nothing but ``packages`` and what they require."""
    command = alone(packages, *arguments)
    return subprocess.run(command, capture_output=True, text=True, timeout=300, check=False, stdin=subprocess.DEVNULL)
