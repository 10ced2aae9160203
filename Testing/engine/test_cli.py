"""The program as a whole: thin commands, progress, what is judged before anything long begins, and refusals in one line."""

from __future__ import annotations

import io
import json
import os
import shlex
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import nibabel as nib
import numpy as np
import pytest
from typer.testing import Result

import progidiff
from progidiff.cli.common import one_line, split_command
from progidiff.cli.view import PlainLines, progress_view, remaining, slice_text
from progidiff.errors import InputError, OutputError
from progidiff.evaluation.cases import cases_of_folder
from progidiff.evaluation.evaluate import evaluate_cases
from progidiff.evaluation.measuring import EvaluationSettings
from progidiff.outputs.document import read_document
from progidiff.places import claimed, sample_volume
from progidiff.sampling.engine import Engine
from progidiff.training.stacks import open_dataset, stacks_of
from progidiff.wire.messages import ProgressEvent

from ..volume_examples import write_nnunet
from .command_support import ENVIRONMENT, ct, invoke, listing, organs, propose
from .conftest import phantom

HEAVY = ("torch", "diffusers", "transformers", "accelerate", "peft", "monai", "scipy")


def run_python(program: str, *arguments: str) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "-c", program, *arguments]
    return subprocess.run(command, capture_output=True, text=True, encoding="utf-8", env=ENVIRONMENT, check=False)


def loaded_after(arguments: list[str], unwanted: tuple[str, ...]) -> str:
    """Names of ``unwanted`` modules that a command has imported, as text; the command must succeed."""
    program = (
        "import sys\n"
        "from progidiff.cli.app import app\n"
        "try:\n    app(prog_name='progidiff')\n"
        "except SystemExit as end:\n    assert not end.code, end.code\n"
        f"print('LOADED', sorted(set({unwanted!r}) & set(sys.modules)), file=sys.stderr)"
    )
    ran = run_python(program, *arguments)
    assert ran.returncode == 0, ran.stderr
    return ran.stderr.splitlines()[-1]


@pytest.mark.parametrize("arguments", [["--help"], ["propose", "--help"]])
def test_help_imports_nothing_heavy(arguments: list[str]) -> None:
    assert loaded_after(arguments, (*HEAVY, "numpy", "SimpleITK", "matplotlib")) == "LOADED []"


@pytest.mark.slow
def test_propose_imports_no_networks(tmp_path: Path) -> None:
    arguments = ["propose", str(ct(tmp_path / "ct.nii.gz")), "--prompt", "liver", "--out", str(tmp_path / "out")]
    heavy = tuple(name for name in HEAVY if name != "scipy")
    assert loaded_after([*arguments, "--worker-command", organs()], heavy) == "LOADED []"


def test_help_lists_every_command_and_what_is_missing_or_out_of_range_is_refused() -> None:
    text = " ".join(invoke("--help").stdout.split())
    for name in ("propose", "info", "doctor", "worker", "not a medical device"):
        assert name in text
    assert invoke("--version").stdout == f"progidiff {progidiff.__version__}\n"
    for option in ("--proposals=0", "--top-k=0", "--steps=101", "--seed=-1", "--scheduler=euler", "--device=tpu"):
        ran = invoke("propose", "x.nii.gz", "--prompt", "liver", "--out", "o", option)
        assert ran.exit_code == 2
        assert option.partition("=")[0] in ran.stderr
    for lacking in (["x.nii.gz", "--out", "o"], ["x.nii.gz", "--prompt", "liver"]):
        assert invoke("propose", *lacking).exit_code == 2


@pytest.mark.slow
def test_info_tells_of_a_model_and_refuses_what_is_none(tiny_model_folder: Path, tmp_path: Path) -> None:
    assert "liver" in invoke("info", "--model", tiny_model_folder).stdout
    assert json.loads(invoke("info", "--model", tiny_model_folder, "--json").stdout)["trainable_parameters"] > 0
    both = invoke("info", "--config", "sd15", "--model", tmp_path)
    assert both.exit_code == 2
    assert len(both.stderr.splitlines()) == 1
    nothing = invoke("info", "--model", tmp_path / "nowhere", "--json")
    assert nothing.exit_code == 2
    assert json.loads(nothing.stdout)["error"]["code"] == "model"


def test_worker_commands_are_split_like_a_shell_does() -> None:
    assert split_command(None) is None
    assert split_command("ssh 'gpu host' python -m") == ["ssh", "gpu host", "python", "-m"]
    for bad in ("", "  ", "ssh 'host"):
        with pytest.raises(InputError, match="worker command"):
            split_command(bad)


def test_progress_tells_slice_and_time() -> None:
    event = ProgressEvent("sampling", 0.15, 11, 11, 80, "liver", eta_s=None)
    assert slice_text(event) == "slice 12/80"
    assert remaining(event, elapsed_s=3.0) == "about 17 s left"
    assert remaining(ProgressEvent("sampling", 0.15, eta_s=600), 3.0) == "about 10 min left"
    assert remaining(ProgressEvent("sampling", 0.15, eta_s=7200), 3.0) == "about 2.0 h left"
    assert remaining(ProgressEvent("sampling", 0.01), 3.0) == ""
    assert remaining(ProgressEvent("sampling", 1.0), 3.0) == ""
    assert slice_text(ProgressEvent("sampling", 1.0, 79, 80, 80)) == "slice 80/80"
    assert slice_text(ProgressEvent("loading", 0.5)) == ""


def test_a_log_file_gets_a_line_for_each_tenth() -> None:
    stream = io.StringIO()
    with progress_view(stream) as view:
        assert isinstance(view, PlainLines)
        for step in range(201):
            view.show(ProgressEvent("sampling", step / 200, step, step, 201, "liver", 1.0))
        view.show(ProgressEvent("writing", 0.0))
        view.warn("Look [here].")
    lines = stream.getvalue().splitlines()
    assert len(lines) == 13
    assert lines[0] == "sampling liver: slice 1/201, about 1 s left"
    assert lines[1].startswith("sampling liver: slice 21/201, 10 %")
    assert lines[-2:] == ["writing", "Warning: Look [here]."]


class Terminal(io.StringIO):
    """Claims to be a terminal."""

    def isatty(self) -> bool:
        return True


def test_a_terminal_gets_a_bar(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("TERM", "xterm-256color")
    monkeypatch.setenv("COLUMNS", "120")
    monkeypatch.delenv("NO_COLOR", raising=False)
    stream = Terminal()
    with progress_view(stream) as view:
        view.show(ProgressEvent("sampling", 0.15, 11, 11, 80, "liver", 42.0))
        view.warn("Look [here].")
    text = stream.getvalue()
    for expected in ("sampling liver", "15%", "slice 12/80", "about 42 s left", "Look [here]."):
        assert expected in text, expected


SAMPLE = sample_volume()


# -- the plane --


@pytest.mark.slow
def test_a_strange_plane_is_the_first_warning_of_the_command(responsive_folder: Path, tmp_path: Path) -> None:
    """The scan was clearly acquired so; the values of it are corrected where that is wanted."""
    array, _ = phantom(4)
    array[:, :, 20:22] = 600
    path = tmp_path / "ct.nii.gz"
    nib.save(nib.Nifti1Image(array.T + 1024, np.diag([3.0, 9.0, 3.0, 1.0])), path)
    options = ("--prompt", "liver", "--proposals", 2, "--steps", 1, "--slices", "3:5", "--model", responsive_folder)
    for more, code in ((), "values"), (("--correct-values",), "values_corrected"):
        ran = invoke("propose", path, "--out", tmp_path / code, "--modality", "CT", "--device", "cpu", *options, *more)
        assert ran.exit_code == 0, ran.output
        warnings = [line for line in ran.stderr.splitlines() if line.startswith("Warning: ")]
        assert warnings[0] == "Warning: The slices are coronal, but this model was trained on axial ones."
        assert more or warnings[1].endswith("The option for that is --correct-values.")
        codes = [warning.code for warning in read_document(tmp_path / code / "proposals.json").warnings]
        assert codes[:2] == ["plane", code], "all of them are in the record"


def write_set(folder: Path, affine: np.ndarray, added: int = 0) -> Path:
    """nnU-Net raw set of one CT with a block of liver, 40 x 36 x 12 voxels."""
    image = np.random.default_rng(0).normal(20, 10, (12, 36, 40)).astype(np.float32)
    image[..., :6] = -1000
    label = np.zeros(image.shape, np.uint8)
    label[3:9, 10:24, 20:34] = 1
    return write_nnunet(folder, {"c": (image + 80 * label + added, label)}, affine, {"liver": 1})


THIN, CORONAL = np.diag([8.0, 8.0, 5.0, 1.0]), np.diag([5.0, 12.0, 5.0, 1.0])


@pytest.mark.slow
def test_training_and_evaluation_cut_as_the_engine_does(responsive_folder: Path, tmp_path: Path) -> None:
    loaded = Engine.load(responsive_folder, "cpu")
    other = replace(loaded.card, planes=["coronal"])
    for name, affine, known, plane, expected in (
        ("thin", THIN, loaded.card, None, "axial"),
        ("coronal", CORONAL, loaded.card, None, "coronal"),
        ("asked", CORONAL, loaded.card, "axial", "axial"),
        ("another model", THIN, other, None, "coronal"),
    ):
        folder = write_set(tmp_path / name, affine)
        (stack,) = stacks_of(open_dataset(folder, plane, known.planes))
        assert {item.plane for item in stack.read()} == {expected}
        image = cases_of_folder(folder, known, plane)[0].read()
        assert image.plan.plane == expected
        if plane is None and known is loaded.card:
            assert loaded.set_image(image.array, image.geometry.affine, "CT").plane == expected


@pytest.mark.slow
def test_an_evaluation_notes_planes_and_values_and_corrects_them(responsive_folder: Path, tmp_path: Path) -> None:
    loaded = Engine.load(responsive_folder, "cpu")
    settings = EvaluationSettings(proposals=2, steps=1, tolerance_mm=None)
    shifted = cases_of_folder(write_set(tmp_path / "shifted", CORONAL, 1024), loaded.card)
    first, second = evaluate_cases(loaded, shifted, settings).notes
    assert first == "Some cases are coronal; the model was trained on axial slices."
    assert "cannot be Hounsfield units; they look like Hounsfield units with 1024 added" in second
    assert "(1 of 1 cases)" in second
    right = evaluate_cases(loaded, cases_of_folder(write_set(tmp_path / "right", CORONAL), loaded.card), settings)
    corrected = EvaluationSettings(proposals=2, steps=1, tolerance_mm=None, correct_values=True)
    document = evaluate_cases(loaded, shifted, corrected)
    assert "were taken for" in document.notes[1]
    (one,), (other,) = right.cases[0].targets, document.cases[0].targets
    assert one.answers["ensemble"].dice == pytest.approx(other.answers["ensemble"].dice, abs=0.01)


def test_training_says_values_once_and_corrects_them(tmp_path: Path) -> None:
    said: list[str] = []
    folder = write_set(tmp_path / "shifted", THIN, 1024)
    data = open_dataset(folder, tell=said.append)
    (stack,) = stacks_of(data)
    assert max(item.image.max() for item in stack.read()) > 1000
    stack.read()
    assert len(said) == 1
    assert "1024 added" in said[0]
    (stack,) = stacks_of(open_dataset(folder, correct_values=True))
    (plain,) = stacks_of(open_dataset(write_set(tmp_path / "right", THIN)))
    for one, other in zip(stack.read(), plain.read(), strict=True):
        np.testing.assert_allclose(one.image, other.image, atol=0.01)


def test_next_notes_what_is_wrong_with_a_volume(responsive_folder: Path, tmp_path: Path) -> None:
    write_set(tmp_path / "set", CORONAL, 1024)
    counts = ("--proposals", 2, "--steps", 1, "--slices", 1, "--closer", 0)
    options = ("--prompt", "liver", "--model", responsive_folder, *counts)
    where = ("next", "--folder", tmp_path / "set" / "imagesTr", "--out", tmp_path / "next.json", "--modality", "CT")
    ran = invoke(*where, *options, "--device", "cpu")
    assert ran.exit_code == 0, ran.output
    notes = [line for line in ran.stdout.splitlines() if line.startswith("c_0000.nii.gz: ")]
    assert "coronal" in notes[0]
    assert "1024 added" in notes[1]
    again = invoke(*where, *options, "--device", "cpu", "--plane", "axial", "--correct-values")
    assert "other settings" in again.stderr
    assert json.loads((tmp_path / "next.json").read_text())["volumes"][0]["plane"] == "axial"
    assert "were taken for" in again.stdout


# -- the prompt --


@pytest.mark.parametrize("command", ["propose", "next", "evaluate"])
def test_the_prompt_is_judged_before_the_model_is_loaded(
    command: str, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    def loaded(*_arguments: object, **_more: object) -> None:
        raise AssertionError("the model was loaded")

    monkeypatch.setattr(Engine, "load", loaded)
    monkeypatch.setattr("progidiff.wire.client.WorkerClient", loaded)
    out = tmp_path / "out.json"
    asked = {
        "propose": ("propose", SAMPLE, "--out", out),
        "next": ("next", "--folder", SAMPLE.parent, "--out", out),
        "evaluate": ("evaluate", "--data", SAMPLE.parent, "--out", out),
    }[command]
    ran = invoke(*asked, "--prompt", "livver")
    assert ran.exit_code == 2, (ran.output, ran.exception)
    assert '"liver"' in ran.stderr
    assert list(tmp_path.iterdir()) == []


# -- empty paths --


@pytest.mark.parametrize(
    ("arguments", "says"),
    [
        (["propose", "", "--prompt", "liver", "--out", "x"], "The path of the input is empty"),
        (["propose", "a.nii.gz", "--prompt", "liver", "--out", ""], "The path after --out is empty"),
        (["propose", "a.nii.gz", "--prompt", "liver", "--out", "x", "--model", " "], "The path after --model is empty"),
        (["next", "--folder", "", "--prompt", "liver", "--out", "x.json"], "The path after --folder is empty"),
        (["evaluate", "--data", "", "--out", "x"], "The path after --data is empty"),
        (["adapt", "--cases", "", "--out", "x"], "The path after --cases is empty"),
        (["train", "base", "--data", "", "--out", "x"], "The path after --data is empty"),
        (["curate", "list", ""], "The path of the input is empty"),
    ],
)
def test_an_empty_path_is_refused(arguments: list[str], says: str, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.chdir(tmp_path)
    ran = invoke(*arguments)
    assert ran.exit_code == 2, (ran.output, ran.exception)
    assert ran.stderr.strip() == f"{says}; give one."
    assert list(tmp_path.iterdir()) == []


def test_an_empty_prompt_or_name_is_no_empty_path() -> None:
    assert "names no target" in invoke("propose", SAMPLE, "--prompt", "", "--out", "x").stderr


# -- two runs into one place --


@pytest.mark.parametrize("command", ["propose", "next", "evaluate", "adapt", "train base", "train control"])
def test_the_second_run_into_one_place_is_refused_at_its_start(command: str, tmp_path: Path) -> None:
    out, data = tmp_path / "results", write_set(tmp_path / "set", THIN)
    worker = organs(fail_load="It was started.")
    arguments = {
        "propose": ("propose", SAMPLE, "--prompt", "liver", "--worker-command", worker),
        "next": ("next", "--folder", data, "--prompt", "liver"),
        "evaluate": ("evaluate", "--data", data),
        "adapt": ("adapt", "--cases", data),
        "train base": ("train", "base", "--data", data),
        "train control": ("train", "control", "--data", data),
    }[command]
    with claimed(out):
        before = sorted(tmp_path.rglob("*"))
        ran = invoke(*arguments, "--out", out)
        assert sorted(tmp_path.rglob("*")) == before
    assert ran.exit_code == 2, (ran.output, ran.exception)
    assert ran.stderr.strip() == f"Another run is writing to {out}; let it end, or give another place for the results."
    assert not list(tmp_path.glob(".progidiff-*")), "nothing is left of the claim"


def test_the_training_folder_is_claimed_as_well(tmp_path: Path) -> None:
    data = write_set(tmp_path / "set", THIN)
    with claimed(tmp_path / "work"):
        ran = invoke("train", "base", "--data", data, "--out", tmp_path / "other", "--work", tmp_path / "work")
    assert "Another run is writing to" in ran.stderr


def test_a_run_that_was_killed_keeps_nobody_away(tmp_path: Path) -> None:
    out = tmp_path / "new" / "results"
    program = "import sys, time\nfrom pathlib import Path\nfrom progidiff.places import claimed\n"
    program += "with claimed(Path(sys.argv[1])):\n    print('claimed', flush=True)\n    time.sleep(60)\n"
    with subprocess.Popen([sys.executable, "-c", program, str(out)], stdout=subprocess.PIPE, env=ENVIRONMENT) as other:
        assert other.stdout.readline().strip() == b"claimed"
        with pytest.raises(OutputError, match="Another run"), claimed(out):
            pass
        other.send_signal(signal.SIGKILL if os.name == "posix" else signal.SIGTERM)
        other.wait()
        with claimed(out):
            pass
    assert not (tmp_path / "new").exists() or not list((tmp_path / "new").iterdir())


def test_two_names_of_one_place_are_one_place(tmp_path: Path) -> None:
    (tmp_path / "a").mkdir()
    (tmp_path / "link").symlink_to(tmp_path / "a", target_is_directory=True)
    with (
        claimed(tmp_path / "a" / "out"),
        pytest.raises(OutputError, match="Another run"),
        claimed(tmp_path / "link" / "out"),
    ):
        pass
    with claimed(tmp_path / "a" / "out"), claimed(tmp_path / "a" / "other"):
        pass
    assert list((tmp_path / "a").iterdir()) == []


@pytest.fixture
def image(tmp_path: Path) -> Path:
    return ct(tmp_path / "ct.nii.gz")


def refused(image: Path, *arguments: object, out: Path | None = None, lines: int | None = 1, **script: Any) -> Result:
    """Exit code 2, one line at the end (the only one unless progress was shown before), nothing new on the disk."""
    before = listing(image.parent)
    options = () if "--prompt" in arguments else ("--prompt", "liver")
    ran = propose(image, out or image.parent / "out", "--proposals", 2, *options, *arguments, **script)
    assert ran.exit_code == 2, (ran.output, ran.exception)
    said = ran.stderr.splitlines()
    assert lines is None or len(said) == lines
    assert said[-1].endswith((".", "]", "!"))
    assert "Traceback" not in ran.output
    assert listing(image.parent) == before
    return ran


def sentence(ran: Result) -> str:
    return ran.stderr.splitlines()[-1]


def missing(path: Path) -> None:
    path.unlink()


def renamed_text(path: Path) -> None:
    path.write_text("Dear colleague, please find the images attached.\n", encoding="utf-8")


# All that can be wrong with an image is tested at its reader.
@pytest.mark.parametrize("change", [missing, renamed_text])
def test_a_bad_image_is_refused_in_one_line(change: Callable[[Path], None], image: Path) -> None:
    change(image)
    ran = refused(image, "--json")
    assert image.name in sentence(ran)
    assert json.loads(ran.stdout) == {"error": {"code": "input", "message": ran.stderr.strip()}}


def test_bad_slices_are_refused_before_the_worker_starts(image: Path) -> None:
    assert "slices" in sentence(refused(image, "--slices=7:3", fail_load="not reached"))


def test_a_model_that_does_not_load(image: Path) -> None:
    ran = refused(image, "--json", fail_load="The model is damaged; copy it again.")
    assert json.loads(ran.stdout)["error"] == {"code": "model", "message": "The model is damaged; copy it again."}


@pytest.mark.parametrize(
    "worker", ["no-such-program-here", "'", "", shlex.join([sys.executable, "-c", "raise SystemExit('no torch here')"])]
)
def test_a_worker_that_does_not_start(worker: str, image: Path) -> None:
    said = sentence(refused(image, "--worker-command", worker))
    assert "worker" in said
    assert ("no torch here" in said) == ("SystemExit" in worker)


@pytest.mark.parametrize(("script", "says"), [({"crash_after": 3}, "the scripted end"), ({"skip_slice": 4}, "left out")])
def test_a_worker_that_dies_or_leaves_out_a_slice(script: dict[str, Any], says: str, image: Path) -> None:
    assert says in sentence(refused(image, lines=None, **script))


def test_places_that_cannot_be_written_to_are_refused_before_the_worker_starts(image: Path, tmp_path: Path) -> None:
    refused(image, out=image / "out", fail_load="not reached")
    assert "already holds" in sentence(refused(image, out=tmp_path, fail_load="not reached"))
    locked = tmp_path / "locked"
    locked.mkdir()
    locked.chmod(0o500)
    if os.access(locked, os.W_OK):  # as for root: take a place where nobody can write
        locked = Path("/sys")
        if not locked.is_dir():
            pytest.skip("no place is read-only for this user")
    refused(image, out=locked / "out", fail_load="not reached")
    assert not (locked / "out").exists()


@pytest.mark.slow
@pytest.mark.skipif(sys.platform == "win32", reason="signals are POSIX")
@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_ctrl_c_cancels_cleanly(number: signal.Signals, image: Path, tmp_path: Path) -> None:
    note = tmp_path / "note.txt"
    options = ["--out", str(tmp_path / "out"), "--prompt", "liver", "--json"]
    worker = ["--worker-command", organs(pause=0.5, note=str(note))]
    process = subprocess.Popen(
        [sys.executable, "-m", "progidiff", "propose", str(image), *options, *worker],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        env=ENVIRONMENT,
    )
    try:
        deadline = time.monotonic() + 120
        while not note.exists():
            assert process.poll() is None, process.communicate()
            assert time.monotonic() < deadline
            time.sleep(0.05)
        process.send_signal(number)
        stdout, stderr = process.communicate(timeout=60)
    finally:
        process.kill()
    assert process.returncode == 130
    assert stderr.splitlines()[-1] == "Cancelled; nothing was written."
    assert json.loads(stdout)["error"]["code"] == "cancelled"
    assert "Traceback" not in stderr
    assert note.read_text(encoding="utf-8") == "cancelled\n"
    assert listing(tmp_path) == ["ct.nii.gz", "note.txt"]


def test_one_line_keeps_the_sentence_and_the_cause() -> None:
    assert one_line("Stop.") == "Stop."
    assert one_line("The worker ended.\n  line 1\n  ImportError: x\n") == "The worker ended. [ImportError: x]"
    assert one_line("a\tb\x1b[31m") == "a b [31m"
