"""``progidiff evaluate`` and ``accuracy``: volumes in 3-D, slices in 2-D, named sets, kept results, report and files."""

from __future__ import annotations

import csv
import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image
from typer.testing import CliRunner

from progidiff.cli import evaluate as evaluate_command
from progidiff.cli.app import app, program
from progidiff.curation import CuratedSet, NewCase
from progidiff.datasets.slices import LabelledSlice, NamedSets, SliceFolder
from progidiff.errors import CancelledError, DatasetError
from progidiff.evaluation import evaluate
from progidiff.evaluation.cases import EvaluationCase, cases_of_folder
from progidiff.evaluation.evaluate import EvaluationDocument, evaluate_cases, to_csv
from progidiff.evaluation.examples import draw_examples
from progidiff.evaluation.measuring import EvaluationSettings, measure_case
from progidiff.evaluation.metrics import dice, hd95, metric_library
from progidiff.evaluation.report import render_evaluation
from progidiff.evaluation.scoring import CaseResult
from progidiff.outputs.segmentation import write_volume
from progidiff.proposals.proposals import MEAN
from progidiff.proposals.votes import consensus
from progidiff.sampling.engine import Engine
from progidiff.volumes.reading import read_volume
from progidiff.wire.messages import ProposeRequest

from ..volume_examples import write_nnunet
from .command_support import invoke
from .conftest import phantom

SETTINGS = EvaluationSettings(proposals=3, steps=1, k=2)


def reference(shape: tuple[int, ...]) -> np.ndarray:
    """Labels of the phantom: 1 liver, 2 left kidney; every slice is another."""
    label = np.zeros(shape, np.uint8)
    y, x = np.mgrid[: shape[1], : shape[2]]
    for k in range(shape[0]):
        label[k][((y - 11 - k / 2) / 5) ** 2 + ((x - 10) / 6) ** 2 < 1] = 1
        label[k][((y - 20) / 3) ** 2 + ((x - 23 + k / 2) / 4) ** 2 < 1] = 2
    return label


def write_set(folder: Path, cases: int = 2, **more: int) -> Path:
    """nnU-Net raw set of phantoms with liver, left kidney and an absent spleen."""
    made = {}
    for number in range(cases):
        array, affine = phantom(3 + number)
        label = reference(array.shape)
        if more:
            label[0, :4] = more["ignore"]
        made[f"c{number}"] = (array, label)
    return write_nnunet(folder, made, affine, {"liver": 1, "left kidney": 2, "spleen": 3, "pancreas": 4, **more})


def write_slices(folder: Path) -> Path:
    """Slice folder of three slices of two patients."""
    array, _ = phantom(3)
    folder.mkdir()
    entries = []
    for k, label in enumerate(reference(array.shape)):
        np.save(folder / f"i{k}.npy", array[k])
        Image.fromarray(label).save(folder / f"m{k}.png")
        entries.append({"image": f"i{k}.npy", "mask": f"m{k}.png", "patient": f"p{k // 2}"})
    labels = {"1": "liver", "2": "left kidney", "3": "spleen"}
    settings = {"modality": "CT", "spacing_mm": [4.0, 3.5], "labels": labels, "spacing_exact": False}
    (folder / "manifest.json").write_text(json.dumps({**settings, "slices": entries}), "utf-8")
    return folder


@pytest.fixture(scope="module")
def loaded(responsive_folder: Path) -> Engine:
    return Engine.load(responsive_folder, "cpu")


@pytest.fixture(scope="module")
def volumes(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_set(tmp_path_factory.mktemp("Daten") / "Dataset001_Phantome")


@pytest.fixture(scope="module")
def document(loaded: Engine, volumes: Path) -> EvaluationDocument:
    """What both volumes give."""
    return measured(loaded, volumes)


def measured(engine: Engine, folder: Path, **more: Any) -> EvaluationDocument:
    return evaluate_cases(engine, cases_of_folder(folder, engine.card), SETTINGS, **more)


@pytest.mark.slow
def test_volumes_are_measured_in_3d_like_the_proposals_themselves(loaded: Engine, volumes: Path) -> None:
    case = cases_of_folder(volumes, loaded.card)[1]
    result = measure_case(loaded, case, SETTINGS)
    assert (result.dimensions, result.slices, result.patient) == (3, 4, "c1")
    targets = {t.target: t for t in result.targets}
    assert set(targets) == {"liver", "left kidney", "spleen"}  # the model knows no pancreas

    volume = read_volume(volumes / "imagesTr" / "c1_0000.nii.gz")
    loaded.set_image(volume.array, volume.geometry.affine, "CT")
    ran = loaded.gather(ProposeRequest(("liver",), proposals=3, steps=1, batch_size=8))["liver"]
    order = ran.checked().order
    stack = np.stack([ran.slice_masks(k) for k in range(4)], axis=1)  # canonical slices
    # axes R, A, S: rows from anterior, columns from the right
    truth = (read_volume(volumes / "labelsTr" / "c1.nii.gz").array == 1)[:, ::-1, ::-1]
    liver = targets["liver"]
    values = [dice(mask, truth) for mask in stack]
    assert [p.dice for p in liver.proposals] == pytest.approx(values)
    assert liver.first == order[0]
    assert liver.answers["rank1"].dice == pytest.approx(values[order[0]])
    assert liver.answers["rank1"].hd95_mm == pytest.approx(hd95(stack[order[0]], truth, (7.0, 4.0, 3.5)))
    assert liver.answers["ensemble"].dice == pytest.approx(
        dice(np.stack([ran.slice_mask(MEAN, k) for k in range(4)]), truth)
    )
    assert liver.answers["consensus"].dice == pytest.approx(dice(consensus(stack), truth))
    assert liver.answers["mean"].dice == pytest.approx(np.mean(values))
    assert liver.answers["best"].dice == pytest.approx(max(values))
    assert liver.answers["rand_top_k"].dice == pytest.approx(np.mean(sorted(values)[1:]))
    assert liver.size == pytest.approx(truth.sum() * 0.098)  # 3.5 x 4 x 7 mm
    spleen = targets["spleen"]
    assert not spleen.present
    assert set(spleen.answers) == {"rank1", "medoid", "consensus", "ensemble"}
    assert spleen.answers["rank1"].presence in ("FP", "TN")


def test_voxels_of_the_ignore_label_count_neither_way(loaded: Engine, tmp_path: Path) -> None:
    folder = write_set(tmp_path / "Dataset002_Ignore", 1, ignore=9)
    image = cases_of_folder(folder, loaded.card)[0].read()
    assert image.ignored.sum() == 4 * image.array.shape[2]
    result = measure_case(loaded, cases_of_folder(folder, loaded.card)[0], SETTINGS)
    assert sum(next(t for t in result.targets if t.target == "liver").calibration.pixels) > 0


@pytest.mark.slow
def test_a_curated_case_labels_its_own_targets_only(loaded: Engine, tmp_path: Path) -> None:
    kept = CuratedSet(tmp_path / "Beispiele")
    array, affine = phantom(3)
    label = reference(array.shape)
    for target, value, patient in (("liver", 1, "p"), ("left kidney", 2, "p"), ("liver", 1, "q")):
        facts = {"volume_key": f"{target} {patient}", "patient_key": patient, "prompt": target}
        kept.add(NewCase(array, affine, {target: label == value}, "CT", "axial", **facts))
    document = measured(loaded, tmp_path / "Beispiele")
    assert sorted([t.target for t in c.targets] for c in document.cases) == [["left kidney"], ["liver"], ["liver"]]
    assert all(t.present for c in document.cases for t in c.targets)
    assert len({c.patient for c in document.cases}) == 2
    bad = document.cases[0].name
    next((tmp_path / "Beispiele").rglob(f"cases/{bad}.json")).write_text("{")
    without = measured(loaded, tmp_path / "Beispiele")
    assert [c.name for c in without.cases] == [c.name for c in document.cases[1:]]
    assert [(f.name, "is damaged" in f.reason) for f in without.failures] == [(bad, True)]
    part = next((tmp_path / "Beispiele").glob("Dataset*"))
    with pytest.raises(DatasetError, match="part of a curated set"):
        cases_of_folder(part, loaded.card)


def test_slices_are_measured_in_2d(loaded: Engine, tmp_path: Path) -> None:
    document = measured(loaded, write_slices(tmp_path / "Scheiben"))
    assert [c.dimensions for c in document.cases] == [2, 2, 2]
    row = next(r for r in document.summary if r.target == "liver")
    assert (row.cases, row.slices, row.patients) == (3, 3, 2)
    assert row.answers["rank1"].dice.low is not None
    assert "typical" in document.notes[0]
    assert next(t for t in document.cases[0].targets if t.target == "liver").answers["rank1"].dice is not None


def test_absent_organs_are_asked_for_unless_unwanted(loaded: Engine, volumes: Path) -> None:
    cases = cases_of_folder(volumes, loaded.card)[:1]
    settings = EvaluationSettings(proposals=2, steps=1, absent=False, tolerance_mm=None)
    document = evaluate_cases(loaded, cases, settings)
    assert [t.target for t in document.cases[0].targets] == ["liver", "left kidney"]
    assert document.cases[0].targets[0].answers["rank1"].nsd is None
    only = EvaluationSettings(proposals=2, steps=1, targets=("left kidney",))
    assert [t.target for t in evaluate_cases(loaded, cases, only).cases[0].targets] == ["left kidney"]


@pytest.mark.slow
def test_finished_cases_are_kept_and_changed_ones_measured_again(
    loaded: Engine, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    asked: list[str] = []

    def watched(engine: Engine, case: EvaluationCase, *more: Any) -> Any:
        asked.append(case.name)
        return measure_case(engine, case, *more)

    monkeypatch.setattr(evaluate, "measure_case", watched)
    folder, cache = write_set(tmp_path / "Dataset003_Kept"), tmp_path / "kept"
    with pytest.raises(CancelledError):
        measured(loaded, folder, cache=cache, cancelled=lambda: bool(asked) and len(list(cache.rglob("*.json"))) > 0)
    assert asked == ["c0"]
    first = measured(loaded, folder, cache=cache)
    assert asked == ["c0", "c1"]
    again = measured(loaded, folder, cache=cache)
    assert asked == ["c0", "c1"]
    assert again.cases == first.cases
    assert again.summary == first.summary
    label = read_volume(folder / "labelsTr" / "c0.nii.gz")
    write_volume(folder / "labelsTr" / "c0.nii.gz", np.roll(label.array, 3, axis=2), label.geometry)
    measured(loaded, folder, cache=cache)
    assert asked == ["c0", "c1", "c0"]
    evaluate_cases(loaded, cases_of_folder(folder, loaded.card), EvaluationSettings(proposals=2, steps=1), cache)
    assert len(asked) == 5
    for file in cache.rglob("*.json"):
        file.write_bytes(file.read_bytes()[:40])
    measured(loaded, folder, cache=cache)
    assert len(asked) == 7


@pytest.mark.slow
def test_whatever_is_thrown_at_one_case_the_others_are_measured(
    loaded: Engine, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder, cache = write_set(tmp_path / "Dataset005", cases=3), tmp_path / "cache"
    (folder / "imagesTr" / "c2_0000.nii.gz").write_bytes(b"no image")
    with monkeypatch.context() as patch:
        true = evaluate.measure_case

        def fail(engine: Engine, case: EvaluationCase, *rest: Any) -> CaseResult:
            if case.name == "c0":
                raise ZeroDivisionError("Jane")
            return true(engine, case, *rest)

        patch.setattr(evaluate, "measure_case", fail)
        document = measured(loaded, folder, cache=cache)
    reasons = {f.name: f.reason for f in document.failures}
    assert set(reasons) == {"c0", "c2"}
    assert "ZeroDivisionError" in reasons["c0"]
    assert "Jane" not in reasons["c0"]
    assert {f.set for f in document.failures} == {"Dataset005"}
    assert "Not measured: c2" in render_evaluation(document, [])
    assert [c.name for c in document.cases] == ["c1"]
    again = measured(loaded, folder, cache=cache)
    assert [c.name for c in again.cases] == ["c0", "c1"]


def test_what_is_strange_about_the_labels_is_noted_also_where_results_are_kept(loaded: Engine, tmp_path: Path) -> None:
    folder = write_set(tmp_path / "Dataset006", cases=1)
    content = json.loads((folder / "dataset.json").read_text("utf-8"))
    content["labels"] = {"background": 0, "liver": 1, "liver tumor": 5}
    (folder / "dataset.json").write_text(json.dumps(content), "utf-8")
    for _ in range(2):
        notes = "\n".join(measured(loaded, folder, cache=tmp_path / "cache").notes)
        assert "does not name (2)" in notes
        assert "'liver tumor' is no organ of its own" in notes
        assert "are empty" not in notes
    label = read_volume(folder / "labelsTr" / "c0.nii.gz")
    write_volume(folder / "labelsTr" / "c0.nii.gz", np.zeros(label.array.shape, np.uint8), label.geometry)
    assert "check whether the label maps are empty" in "\n".join(measured(loaded, folder).notes)


@pytest.mark.slow
def test_the_pictures_show_the_proposals_that_were_measured(
    loaded: Engine, volumes: Path, document: EvaluationDocument, monkeypatch: pytest.MonkeyPatch
) -> None:
    cases = cases_of_folder(volumes, loaded.card)
    examples = draw_examples(loaded, cases, document)
    kinds = [(e.target, e.kind) for e in examples]
    assert kinds == [(t, k) for t in ("liver", "left kidney") for k in ("best", "worst")]
    dices = {e.kind: e.dice for e in examples if e.target == "liver"}
    assert dices["best"] >= dices["worst"]
    assert all(e.png.startswith(b"\x89PNG") for e in examples)
    page = render_evaluation(document, examples)
    assert page.count("data:image/png") == 4 + len(examples)
    assert not any(word in page for word in ("http:", "https:", "<script"))
    monkeypatch.setattr(loaded, "set_image", lambda *arguments: 1 / 0)  # a case that went meanwhile costs its picture only
    assert draw_examples(loaded, cases, document) == []


def test_the_table_of_cases_has_a_row_for_each_target(document: EvaluationDocument) -> None:
    rows = list(csv.DictReader(to_csv(document).splitlines()))
    assert [(r["case"], r["target"]) for r in rows][:3] == [("c0", "liver"), ("c0", "spleen"), ("c0", "left kidney")]
    assert rows[0]["rank1_dice"] == f"{document.cases[0].targets[0].answers['rank1'].dice:.5g}"
    spleen = next(r for r in rows if r["target"] == "spleen")
    assert spleen["best_dice"] == ""


#: Options of a quick measurement.
QUICK = ("--device", "cpu", "--steps", 1)


@pytest.mark.slow
def test_from_the_command_line(responsive_folder: Path, volumes: Path, tmp_path: Path) -> None:
    out = tmp_path / "Ergebnis"
    arguments = ("evaluate", "--data", volumes, "--model", responsive_folder, "--out", out, "--limit", 1, "--proposals", 2)
    ran = invoke(*arguments, *QUICK)
    assert ran.exit_code == 0, ran.output
    assert metric_library() in ran.stdout
    assert "1 volume (3 slices), 1 patient" in ran.stdout
    assert "c0" not in ran.stderr
    document = EvaluationDocument.model_validate_json((out / "evaluation.json").read_text(encoding="utf-8"))
    assert [c.name for c in document.cases] == ["c0"]
    assert "only case" in (out / "report.html").read_text(encoding="utf-8").lower()
    assert len((out / "evaluation.csv").read_text(encoding="utf-8").splitlines()) == 4
    (out / "mine.txt").write_text("precious")
    refused = invoke(*arguments, *QUICK)
    assert refused.exit_code == 2
    assert "mine.txt" in refused.stderr
    (out / "mine.txt").unlink()
    again = invoke(*arguments, *QUICK, "--no-pictures", "--json")
    assert again.exit_code == 0, again.output
    assert EvaluationDocument.model_validate_json(again.stdout).cases == document.cases  # kept, not measured again
    assert (out / "report.html").read_text(encoding="utf-8").count("data:image/png") == 4
    assert not list(tmp_path.rglob("*.png"))


def accuracy_of(program: Any, model: Path, *options: object) -> Any:
    """Outcome of the accuracy command with one proposal in one step, as JSON."""
    words = ("accuracy", "--model", model, *QUICK, "--proposals", 1, "--phantoms", 1, "--json", *options)
    return CliRunner().invoke(program, [str(word) for word in words])


def test_a_set_is_a_folder_in_the_folder_of_sets(responsive_folder: Path, tmp_path: Path) -> None:
    write_set(tmp_path / "Bäuche")
    write_slices(tmp_path / "Scheiben")
    sets = ("--set", "Bäuche", "--set", tmp_path / "Scheiben", "--set", "phantoms")  # a path is taken as it is
    ran = accuracy_of(app, responsive_folder, "--data", tmp_path, *sets)
    assert ran.exit_code == 0, ran.output
    found = json.loads(ran.stdout)
    rows = {(row["set"], row["target"]): (row["slices"], row["patients"]) for row in found["targets"]}
    assert rows["Bäuche", "liver"] == (7, 2)
    assert rows["Scheiben", "liver"] == (3, 2)
    assert list(found["means"]) == ["Bäuche", "Scheiben", "phantoms"]


def test_sets_are_read_by_the_reader_that_is_handed_in(responsive_folder: Path, tmp_path: Path) -> None:
    slices = list(SliceFolder(write_slices(tmp_path / "Scheiben")))
    asked = []

    def read(folder: Path, name: str) -> list[LabelledSlice]:
        asked.append((folder, name))
        return slices

    sets = NamedSets(read, ("ours", "theirs"), tmp_path)
    own = program("own", "Measuring.", (evaluate_command,), sets)
    found = json.loads(accuracy_of(own, responsive_folder).stdout)
    assert list(found["means"]) == ["phantoms", "ours", "theirs"]
    assert asked == [(tmp_path, "ours"), (tmp_path, "theirs")]
    thinned = json.loads(accuracy_of(own, responsive_folder, "--set", "more", "--every", 2).stdout)
    assert thinned["targets"][0]["slices"] == 2
    elsewhere = program("own", "Measuring.", (evaluate_command,), NamedSets(read, ("ours",), tmp_path / "nowhere"))
    alone = accuracy_of(elsewhere, responsive_folder)
    assert list(json.loads(alone.stdout)["means"]) == ["phantoms"]
    assert "phantoms alone" in alone.stderr

    words = ("evaluate", "--set", "ours", "--shared", tmp_path, "--out", tmp_path / "out", "--limit", 1, *QUICK)
    words = (*words, "--model", responsive_folder, "--proposals", 2, "--json")
    ran = CliRunner().invoke(own, [str(word) for word in words])
    document = EvaluationDocument.model_validate_json(ran.stdout)
    assert [(c.set, c.name, c.dimensions) for c in document.cases] == [("ours", "i0.npy", 2)]


@pytest.mark.slow
@pytest.mark.parametrize(
    ("command", "options", "message"),
    [
        ("accuracy", ["--data", "{tmp}"], "Say with --set which of the sets"),
        ("accuracy", ["--data", "{tmp}", "--set", "nowhere"], "is no data set; name an nnU-Net raw folder"),
        ("accuracy", ["--data", "{tmp}/nowhere", "--set", "amos"], "give their folder with --data"),
        ("accuracy", ["--set", "{tmp}/a/set", "--set", "{tmp}/b/set"], "Two of the sets have the same name"),
        ("evaluate", [], "nothing to measure"),
        ("evaluate", ["--set", "amos"], "--shared"),
        ("evaluate", ["--data", "{set}", "--data", "{set}"], "same name"),
        ("evaluate", ["--data", "{tmp}"], "no labelled set"),
    ],
)
def test_what_cannot_be_measured_ends_in_one_sentence(
    responsive_folder: Path, volumes: Path, tmp_path: Path, command: str, options: list[str], message: str
) -> None:
    given = [option.replace("{tmp}", str(tmp_path)).replace("{set}", str(volumes)) for option in options]
    out = [] if command == "accuracy" else ["--out", str(tmp_path / "out")]
    ran = invoke(command, "--model", responsive_folder, *QUICK, *out, *given)
    assert ran.exit_code == 2
    assert message in ran.stderr
    assert len(ran.stderr.strip().splitlines()) == 1
    assert list(tmp_path.iterdir()) == []


def test_stopping_says_what_is_kept(
    responsive_folder: Path, volumes: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def stopped(*ignored: Any) -> None:
        raise CancelledError("by the user")

    monkeypatch.setattr(evaluate, "measure_case", stopped)
    ran = invoke("evaluate", "--data", volumes, "--model", responsive_folder, "--out", tmp_path / "out", "--json")
    assert ran.exit_code == 130
    assert "finished cases are kept" in ran.stderr
    assert json.loads(ran.stdout)["error"]["code"] == "cancelled"
    assert not (tmp_path / "out").exists()
