"""What is judged before anything long begins: the plane, the prompt, empty paths, and a place that another run writes to."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import nibabel as nib
import numpy as np
import pytest
import SimpleITK as sitk

from progidiff.errors import OutputError
from progidiff.evaluation.cases import cases_of_folder
from progidiff.evaluation.evaluate import evaluate_cases
from progidiff.evaluation.measuring import EvaluationSettings
from progidiff.outputs.document import read_document
from progidiff.places import claimed, sample_volume
from progidiff.sampling.engine import Engine
from progidiff.training.stacks import open_dataset, stacks_of

from .command_support import ENVIRONMENT, invoke, organs

SAMPLE = sample_volume()


def thin(source: Path, out: Path, pixel_mm: float = 3.0, slice_mm: float = 2.2) -> Path:
    """The same CT on a usual thin-slice grid: its slices are closer together than its pixels are large."""
    image = sitk.ReadImage(str(source))
    spacing = (pixel_mm, pixel_mm, slice_mm)
    sizes = zip(image.GetSize(), image.GetSpacing(), spacing, strict=True)
    filter_ = sitk.ResampleImageFilter()
    filter_.SetOutputSpacing(spacing)
    filter_.SetSize([int((count - 1) * old / new) + 1 for count, old, new in sizes])
    filter_.SetOutputOrigin(image.GetOrigin())
    filter_.SetOutputDirection(image.GetDirection())
    filter_.SetDefaultPixelValue(-1024)
    sitk.WriteImage(filter_.Execute(image), str(out))
    return out


def everything(folder: Path) -> dict[str, np.ndarray]:
    """The voxels of all volumes of a result."""
    return {path.name: np.asarray(nib.load(path).dataobj) for path in sorted(folder.glob("*.nii.gz"))}


# -- the plane --


@pytest.mark.slow
@pytest.mark.parametrize("source", ["sample volume", "permissive/totalsegmentator_tests/example_ct_sm.nii.gz"])
def test_a_thin_slice_ct_is_read_axially_unasked(source: str, request: pytest.FixtureRequest, tmp_path: Path) -> None:
    found = SAMPLE if source == "sample volume" else request.getfixturevalue("shared_data") / source
    image = thin(found, tmp_path / "thin.nii.gz")
    options = ("--prompt", "liver", "--proposals", 2, "--steps", 1, "--slices", "18:22", "--device", "cpu")
    results = []
    for name, plane in (("unasked", ()), ("axial", ("--plane", "axial"))):
        ran = invoke("propose", image, "--out", tmp_path / name, *options, *plane)
        assert ran.exit_code == 0, ran.output
        document = read_document(tmp_path / name / "proposals.json")
        assert (document.input.plane, document.input.slice_count) == ("axial", sitk.ReadImage(str(image)).GetDepth())
        assert "plane" not in {warning.code for warning in document.warnings}
        results.append(everything(tmp_path / name))
    assert results[0].keys() == results[1].keys()
    assert any(array.any() for array in results[0].values()), "there is something to compare"
    for name in results[0]:
        np.testing.assert_array_equal(results[0][name], results[1][name])


@pytest.mark.slow
@pytest.mark.parametrize("plane", ["coronal", None])
def test_a_strange_plane_is_the_first_warning_of_the_command(
    responsive_folder: Path, make_phantom: Callable[..., Any], tmp_path: Path, plane: str | None
) -> None:
    """Asked for, or because the scan was clearly acquired so."""
    array, affine = make_phantom(4)
    array[:, :, 20:22] = 600
    affine = np.diag([3.0, 9.0, 3.0, 1.0]) if plane is None else affine
    path = tmp_path / "ct.nii.gz"
    nib.save(nib.Nifti1Image(array.T + 1024, affine), path)
    options = ("--prompt", "liver", "--proposals", 2, "--steps", 1, "--slices", "3:5", "--model", responsive_folder)
    asked = ("--plane", plane) if plane else ()
    ran = invoke("propose", path, "--out", tmp_path / "out", "--modality", "CT", "--device", "cpu", *options, *asked)
    assert ran.exit_code == 0, ran.output
    warnings = [line for line in ran.stderr.splitlines() if line.startswith("Warning: ")]
    assert warnings[0] == "Warning: The slices are coronal, but this model was trained on axial ones."
    assert warnings[1].endswith("The option for that is --correct-values.")
    codes = [warning.code for warning in read_document(tmp_path / "out" / "proposals.json").warnings]
    assert codes[:2] == ["plane", "values"], "all of them are in the record"


@pytest.mark.slow
def test_a_ct_in_other_values_gives_the_masks_of_the_same_ct_in_hounsfield_units(shared_data: Path, tmp_path: Path) -> None:
    image = sitk.ReadImage(str(shared_data / "permissive/totalsegmentator_tests/example_ct_sm.nii.gz"))[:, :, 13:17]
    ct = sitk.GetArrayFromImage(image).astype(np.float32)
    made = {
        "hu": ct.astype(np.int16),
        "shifted": (ct + 1024).clip(0).astype(np.uint16),
        "unit": ((np.clip(ct, -160, 240) + 160) / 400).astype(np.float32),
    }
    found = {}
    for name, values in made.items():
        path = tmp_path / f"{name}.nii.gz"
        written = sitk.GetImageFromArray(values)
        written.CopyInformation(image)
        sitk.WriteImage(written, str(path))
        options = ("--prompt", "liver", "--proposals", 2, "--steps", 1, "--modality", "CT", "--device", "cpu")
        for more in ((), ("--correct-values",)):
            ran = invoke("propose", path, "--out", tmp_path / f"{name}{len(more)}", *options, *more)
            assert ran.exit_code == 0, ran.output
            assert ("cannot be Hounsfield units" in ran.stderr) == (name != "hu" and not more)
            found[name, len(more)] = everything(tmp_path / f"{name}{len(more)}")["ensemble_liver.nii.gz"] > 0
    right = found["hu", 0]
    assert right.any()
    for name in ("shifted", "unit"):
        assert (found[name, 0] & right).sum() < 0.8 * right.sum() or found[name, 0].sum() > 1.2 * right.sum()
        assert np.mean(found[name, 1] == right) > 0.9999
    np.testing.assert_array_equal(found["hu", 1], right)


def write_set(folder: Path, affine: np.ndarray, added: int = 0) -> Path:
    """nnU-Net raw set of one CT with a block of liver, 40 x 36 x 12 voxels."""
    for part in ("imagesTr", "labelsTr"):
        (folder / part).mkdir(parents=True)
    image = np.random.default_rng(0).normal(20, 10, (40, 36, 12)).astype(np.float32)
    image[:6] = -1000
    label = np.zeros(image.shape, np.uint8)
    label[20:34, 10:24, 3:9] = 1
    nib.save(nib.Nifti1Image(image + 80 * label + added, affine), folder / "imagesTr" / "c_0000.nii.gz")
    nib.save(nib.Nifti1Image(label, affine), folder / "labelsTr" / "c.nii.gz")
    content = {"labels": {"background": 0, "liver": 1}, "channel_names": {"0": "CT"}, "file_ending": ".nii.gz"}
    (folder / "dataset.json").write_text(json.dumps(content), "utf-8")
    return folder


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
        (["propose", "a.nii.gz", "--prompt", "liver", "--out="], "The path after --out is empty"),
        (["propose", "a.nii.gz", "--prompt", "liver", "--out", "x", "--model", " "], "The path after --model is empty"),
        (["propose", "--overwrite", "", "--prompt", "liver", "--out", "x"], "The path of the input is empty"),
        (["next", "--folder", "", "--prompt", "liver", "--out", "x.json"], "The path after --folder is empty"),
        (["next", "--folder", "x", "--prompt", "liver", "--out", ""], "The path after --out is empty"),
        (["evaluate", "--data", "", "--out", "x"], "The path after --data is empty"),
        (["adapt", "--cases", "", "--out", "x"], "The path after --cases is empty"),
        (["adapt", "--cases", "x", "--out", ""], "The path after --out is empty"),
        (["train", "base", "--data", "", "--out", "x"], "The path after --data is empty"),
        (["train", "control", "--data", "x", "--out", ""], "The path after --out is empty"),
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
        assert other.stdout is not None
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
