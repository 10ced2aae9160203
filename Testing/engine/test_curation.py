"""The curated set: what is saved comes back, nobody is named, nothing is lost, and nnU-Net can read it."""

from __future__ import annotations

import json
import os
import sys
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import SimpleITK as sitk
from typer.testing import CliRunner

from progidiff.cli.app import app
from progidiff.curation import CuratedSet, patient_groups, patient_key, volume_key
from progidiff.datasets.nnunet import NnUNetDataset
from progidiff.errors import DatasetError, InputError, OutputError

from .curation_kills import example, killed_at_every_step, random_kills

CT = "Dataset701_ProGiDiffCT"
needs_fork = pytest.mark.skipif(not hasattr(os, "fork"), reason="the system has no fork")


@pytest.fixture
def kept(tmp_path: Path) -> CuratedSet:
    return CuratedSet(tmp_path / "Sätze" / "set")


def index(kept: CuratedSet) -> dict[str, object]:
    content: dict[str, object] = json.loads((kept.folder / CT / "dataset.json").read_text("utf-8"))
    return content


def test_a_case_comes_back_as_it_was_saved(kept: CuratedSet) -> None:
    turn = np.array([[0.6, -0.8, 0, 3], [0.8, 0.6, 0, -4], [0, 0, 5, 7], [0, 0, 0, 1]]) @ np.diag([-0.7, 0.9, 1, 1])
    new = replace(
        example(1), affine=turn, prompt="Leber; Niere", code={"code": "1"}, proposal={"seed": 4, "rank": 1}, edited=True,
        editor="ab", model_id="m", adapter_id="a", dice_to_proposal=0.9, patient_key="f" * 32,
    )  # fmt: skip
    identifier = kept.add(new)
    (case,) = kept.list()
    assert case.id == identifier
    assert (case.targets, case.modality, case.plane) == (("liver",), "CT", "axial")
    image, affine, masks = case.read()
    assert image.dtype == new.image.dtype
    np.testing.assert_array_equal(image, new.image)
    np.testing.assert_array_equal(affine, turn)
    np.testing.assert_array_equal(masks["liver"], new.masks["liver"])
    facts = case.facts
    assert (facts["prompt"], facts["code"], facts["proposal"]) == ("Leber; Niere", {"code": "1"}, {"seed": 4, "rank": 1})
    assert (facts["edited"], facts["editor"], facts["dice_to_proposal"]) == (True, "ab", 0.9)
    assert (facts["model_id"], facts["adapter_id"], case.patient_key) == ("m", "a", "f" * 32)
    assert kept.counts() == {"liver": 1}
    assert kept.verify() == []


def test_remove_and_restore_undo_each_other(kept: CuratedSet) -> None:
    one, two = kept.add(example(1)), kept.add(example(2))
    for _ in range(2):
        kept.remove(one)
    assert [case.id for case in kept.list()] == [two]
    assert kept.removed() == [one]
    assert index(kept)["numTraining"] == 1
    kept.restore(one)
    kept.restore(one)
    assert {case.id for case in kept.list()} == {one, two}
    assert kept.verify(older_than_s=0) == []
    for unknown in ("0" * 32, "../../etc", ""):
        with pytest.raises(DatasetError, match="There is no case"):
            kept.remove(unknown)


def test_an_interrupted_removal_is_finished_or_undone(kept: CuratedSet) -> None:
    one, two = kept.add(example(1)), kept.add(example(2))
    for identifier in (one, two):  # as after a kill between the first and the second move
        os.rename(kept.folder / CT / "cases" / f"{identifier}.json", kept.folder / CT / "removed" / f"{identifier}.json")
    assert kept.list() == []
    assert {p.harmless for p in kept.verify(older_than_s=0)} == {True}
    kept.restore(one)
    assert [case.id for case in kept.list()] == [one]
    assert all(p.repaired for p in kept.verify(repair=True, older_than_s=0))
    assert kept.verify(older_than_s=0) == []
    kept.restore(two)
    assert len(kept.list()) == 2


DAMAGES: dict[str, tuple[Callable[[CuratedSet, str], object], str]] = {
    "image changed": (lambda k, i: (k.folder / CT / "imagesTr" / f"{i}_0000.nii.gz").write_bytes(b"x"), "checksum differs"),
    "label map gone": (lambda k, i: (k.folder / CT / "labelsTr" / f"{i}.nii.gz").unlink(), "label is missing"),
    "file no JSON": (lambda k, i: (k.folder / CT / "cases" / f"{i}.json").write_text("{"), "is damaged"),
    "infinite label": (lambda k, i: _change(k, i, labels={"liver": float("inf")}), "is damaged"),
    "no plane": (lambda k, i: _change(k, i, without="plane"), "is damaged"),
    "a name in it": (lambda k, i: _change(k, i, patient_name="Jane"), "says more than a case may"),
    "another number": (lambda k, i: _change(k, i, labels={"liver": 77}), "not the set's"),
}


def _change(kept: CuratedSet, identifier: str, without: str = "", **changes: object) -> None:
    path = kept.folder / CT / "cases" / f"{identifier}.json"
    facts = {**json.loads(path.read_text("utf-8")), **changes}
    facts.pop(without, None)
    path.write_text(json.dumps(facts), "utf-8")


def test_verify_tells_of_damage_and_the_others_stay(kept: CuratedSet) -> None:
    good, bad = kept.add(example(0)), {damage: kept.add(example(n)) for n, damage in enumerate(DAMAGES, 1)}
    for damage, case in bad.items():
        DAMAGES[damage][0](kept, case)
    problems = kept.verify(older_than_s=0)
    shown = CliRunner().invoke(app, ["curate", "verify", str(kept.folder), "--older-than", "0"])
    assert shown.exit_code == 1
    for damage, case in bad.items():
        sentence = DAMAGES[damage][1]
        assert any(p.case == case and sentence in p.message and not p.harmless for p in problems), damage
        assert sentence in shown.output
    assert good in {case.id for case in kept.list()}
    assert not any(p.case == good for p in problems)


@pytest.mark.parametrize(
    ("change", "sentence"),
    [
        ({"masks": {"liver": np.zeros((3, 12, 14), bool)}}, "is empty"),
        ({"masks": {"liver": np.ones((3, 12, 14), bool), "spleen": np.ones((3, 12, 14), bool)}}, "must not overlap"),
        ({"masks": {"liver": np.ones((2, 12, 14), bool)}}, "grid"),
        ({"masks": {"flux capacitor": np.ones((3, 12, 14), bool)}}, "before flux capacitor was known"),
        ({"image": np.full((3, 12, 14), np.nan)}, "not numbers"),
        ({"modality": "US"}, "CT or MR"),
    ],
)
def test_what_cannot_be_learnt_from_is_refused(change: dict[str, object], sentence: str, kept: CuratedSet) -> None:
    with pytest.raises(InputError, match=sentence):
        kept.add(replace(example(1), **change))  # type: ignore[arg-type]
    assert kept.list() == []
    assert not list(kept.folder.glob(".staging-*"))


def test_foreign_folders_are_left_alone(tmp_path: Path) -> None:
    (tmp_path / "letters.txt").write_text("mine")
    with pytest.raises(DatasetError, match="holds other files"):
        CuratedSet(tmp_path).add(example(1))
    assert [p.name for p in tmp_path.iterdir()] == ["letters.txt"]
    with pytest.raises(DatasetError, match="is no curated set"):
        CuratedSet(tmp_path).verify()


@pytest.mark.skipif(sys.platform == "win32" or (hasattr(os, "geteuid") and os.geteuid() == 0), reason="rights do not bind")
def test_a_read_only_folder_is_told_in_a_sentence(kept: CuratedSet) -> None:
    kept.add(example(1))
    kept.folder.chmod(0o555)
    try:
        with pytest.raises(OutputError, match="may not write"):
            kept.add(example(2))
    finally:
        kept.folder.chmod(0o755)


def test_a_full_disk_leaves_nothing_behind(kept: CuratedSet, monkeypatch: pytest.MonkeyPatch) -> None:
    kept.add(example(1))

    def full(descriptor: int) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(os, "fsync", full)
    with pytest.raises(OutputError, match="not enough space"):
        kept.add(example(2))
    monkeypatch.undo()
    assert len(kept.list()) == 1
    assert kept.verify(older_than_s=0) == []


def test_patients_are_joined_by_volume_and_by_person(kept: CuratedSet) -> None:
    keys = [("a", None), ("a", "p"), ("b", "p"), ("c", None)]
    ids = [kept.add(replace(example(n), volume_key=v, patient_key=p)) for n, (v, p) in enumerate(keys)]
    groups = patient_groups(kept.list())
    assert groups[ids[0]] == groups[ids[1]] == groups[ids[2]] != groups[ids[3]]
    assert volume_key("s", np.zeros((1, 2, 2))) != volume_key("t", np.zeros((1, 2, 2)))
    assert patient_key("s", "Jane^Doe") not in {"Jane^Doe", patient_key("t", "Jane^Doe")}
    # the key that was given is not what is written: the set's own secret is mixed into it
    assert "a" not in {case.volume_key for case in kept.list()}


def test_nnunet_reads_the_set_and_an_export_is_a_data_set_of_what_is_known(kept: CuratedSet, tmp_path: Path) -> None:
    spleen = {"spleen": example(9).masks["liver"]}
    for n in range(5):
        kept.add(example(n))
    kept.add(replace(example(9), masks=spleen))
    (kept.folder / CT / "imagesTr" / f"{'0' * 32}_0000.nii.gz").write_bytes(b"half")
    kept.rebuild_index()
    content: Any = index(kept)
    assert (content["channel_names"], content["numTraining"]) == ({"0": "CT"}, 6)
    assert set(content["dataset"]) == {case.id for case in kept.list()}, "whole cases only"
    for entry in content["dataset"].values():
        image, label = (sitk.ReadImage(str(kept.folder / CT / path)) for path in (entry["images"][0], entry["label"]))
        assert image.GetSize() == label.GetSize()
    assert sorted(content["labels"].values()) == list(range(len(content["labels"])))
    done = kept.export(tmp_path / "Dataset123_Liver", "CT")
    assert (done.targets, done.cases, done.left_out, done.patients) == (("liver",), 5, 1, 5)
    data = NnUNetDataset(done.folder)
    assert data.labelled_targets == {"liver"}
    assert len(data.cases) == 5
    masks = sum(int(item.labels["liver"].sum()) for item in data)
    assert masks == sum(int(example(n).masks["liver"].sum()) for n in range(5))
    folds = json.loads((done.folder / "splits_final.json").read_text("utf-8"))
    assert len(folds) == 5
    assert all(not set(fold["train"]) & set(fold["val"]) for fold in folds)
    with pytest.raises(OutputError, match="holds something"):
        kept.export(done.folder, "CT")
    with pytest.raises(DatasetError, match="knows"):
        kept.export(tmp_path / "x", "CT", ["liver", "spleen"])


def test_merge_adds_and_never_overwrites(kept: CuratedSet, tmp_path: Path) -> None:
    other = CuratedSet(tmp_path / "other")
    shared = kept.add(example(1))
    theirs = [other.add(example(n)) for n in (2, 3)]
    first = kept.merge(other)
    assert set(first.added) == set(theirs)
    assert kept.verify(older_than_s=0) == []
    kept.remove(theirs[0])
    again = kept.merge(other)
    assert (again.added, again.removed, again.present) == ((), (theirs[0],), (theirs[1],))
    assert {case.id for case in kept.list()} == {shared, theirs[1]}


def test_a_damaged_case_is_left_out_and_named(kept: CuratedSet, tmp_path: Path) -> None:
    other = CuratedSet(tmp_path / "other")
    bad, good = (other.add(example(n)) for n in (1, 2))
    DAMAGES["image changed"][0](other, bad)
    run = CliRunner()
    kept.add(example(3))
    result = run.invoke(app, ["curate", "merge", str(kept.folder), str(other.folder)])
    assert result.exit_code == 1
    assert f"Left out: {bad}: The image of case {bad} is damaged" in result.output
    assert "1 cases added" in result.output
    assert good in {case.id for case in kept.list()}
    assert good in (kept.folder / CT / "dataset.json").read_text("utf-8")
    assert kept.verify(older_than_s=0) == []

    result = run.invoke(app, ["curate", "export", str(other.folder), str(tmp_path / "out"), "--json"])
    assert result.exit_code == 1
    record = json.loads(result.stdout)
    assert (record["cases"], [entry["case"] for entry in record["damaged"]]) == (1, [bad])
    assert [case.name for case in NnUNetDataset(tmp_path / "out").cases] == [good]
    DAMAGES["image changed"][0](other, good)
    with pytest.raises(DatasetError, match="None of the 2 cases can be read"):
        other.export(tmp_path / "none", "CT")
    assert not (tmp_path / "none").exists()

    DAMAGES["file no JSON"][0](other, bad)
    (entry,) = other.damaged().items()
    assert entry[0] == bad
    assert "is damaged" in entry[1]
    assert "1 more are damaged" in run.invoke(app, ["curate", "list", str(other.folder)]).output


def test_whatever_is_thrown_at_one_case_the_others_are_verified(kept: CuratedSet, monkeypatch: pytest.MonkeyPatch) -> None:
    ids = sorted(kept.add(example(n)) for n in (1, 2))
    monkeypatch.setattr("progidiff.curation.curated_set._grid", lambda path: 1 / 0)
    problems = kept.verify(older_than_s=0)
    assert sorted(p.case for p in problems) == ids
    assert all("ZeroDivisionError" in p.message and not p.harmless for p in problems)


def test_the_commands_speak(kept: CuratedSet, tmp_path: Path) -> None:
    identifier = kept.add(example(1))
    run = CliRunner()

    def said(*arguments: object, code: int = 0) -> str:
        result = run.invoke(app, ["curate", *map(str, arguments)])
        assert result.exit_code == code, result.output
        return result.output

    assert "1 cases of 1 patients: liver 1." in said("list", kept.folder)
    assert json.loads(said("list", kept.folder, "--json"))["counts"] == {"liver": 1}
    assert "all is well" in said("verify", kept.folder)
    assert "1 cases of 1 patients with liver" in said("export", kept.folder, tmp_path / "out")
    said("remove", kept.folder, identifier)
    assert identifier in said("list", kept.folder, "--removed")
    said("restore", kept.folder, identifier)
    assert "1 cases" in said("rebuild", kept.folder)
    said("list", tmp_path / "nowhere", code=2)


@pytest.mark.slow
@needs_fork
def test_killed_writers_lose_nothing(tmp_path: Path) -> None:
    tally = random_kills(tmp_path / "set", 12)
    print(tally)
    assert tally.kills == 12
    assert tally.saved
    assert not tally.lost | tally.half


@pytest.mark.slow
@needs_fork
@pytest.mark.parametrize("power_loss", [False, True])
def test_an_end_at_any_step_leaves_whole_cases_only(power_loss: bool, tmp_path: Path) -> None:
    tally = killed_at_every_step(tmp_path / "set", power_loss)
    print(tally)
    assert tally.kills > 20
    assert tally.saved
    assert not tally.lost | tally.half
