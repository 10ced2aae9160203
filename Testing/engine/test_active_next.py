"""``progidiff next``: ranking a folder, going on, changed and unreadable volumes, stopping."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from typer.testing import CliRunner

import progidiff
from progidiff.active.disagreement import measure
from progidiff.active.record import NextDocument
from progidiff.active.search import find_volumes, fingerprint, rank_folder
from progidiff.cli.app import app
from progidiff.errors import InputError, OutputError
from progidiff.outputs.segmentation import write_volume
from progidiff.sampling.engine import Engine
from progidiff.volumes.geometry import Geometry
from progidiff.volumes.reading import read_volume
from progidiff.wire.messages import NextSettings

from ..volume_examples import oriented, ramp, write_dicom_series
from .worker_pipe import tell

SETTINGS = NextSettings(proposals=3, steps=1, slices=2, closer=1, modality="CT")
OPTIONS = ["--proposals", "3", "--steps", "1", "--slices", "2", "--closer", "1", "--device", "cpu"]


def write(path: Path, phantom: tuple[np.ndarray, np.ndarray], shift: float = 0.0) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    array, affine = phantom
    write_volume(path, (array + shift).astype(np.float32), Geometry(array.shape[::-1], affine))
    return path


@pytest.fixture
def folder(tmp_path: Path, make_phantom: Callable[..., Any]) -> Path:
    home = tmp_path / "Bäuche"
    write(home / "a.nii.gz", make_phantom(4))
    write(home / "unter" / "b.nrrd", make_phantom(6), 10)
    return home


@pytest.fixture(scope="module")
def loaded(responsive_folder: Path) -> Engine:
    return Engine.load(responsive_folder, "cpu")


def search(engine: Engine, folder: Path, out: Path, **more: Any) -> tuple[NextDocument, list[dict[str, Any]]]:
    events: list[dict[str, Any]] = []
    settings = more.pop("settings", SETTINGS)
    targets = more.pop("targets", ["liver", "spleen"])
    return rank_folder(engine, folder, targets, out, settings, tell(events), **more), events


def test_volumes_are_found_below_and_label_maps_are_not(folder: Path, make_phantom: Callable[..., Any]) -> None:
    write(folder / "labelsTr" / "a.nii.gz", make_phantom())
    write(folder / ".hidden" / "c.nii.gz", make_phantom())
    write(folder / "a.seg.nrrd", make_phantom())
    (folder / "notes.txt").write_text("nothing")
    assert [c.name for c in find_volumes(folder)] == ["a.nii.gz", "unter/b.nrrd"]
    empty = folder / "leer"
    empty.mkdir()
    with pytest.raises(InputError, match="no volumes"):
        find_volumes(empty)


@pytest.mark.slow
def test_results_of_a_version_that_cut_otherwise_are_measured_anew(loaded: Engine, folder: Path, tmp_path: Path) -> None:
    out = tmp_path / "next.json"
    search(loaded, folder, out)
    assert search(loaded, folder, out)[1][0]["known"] == 2
    before = json.loads(out.read_text(encoding="utf-8"))
    del before["settings"]["plane"]
    out.write_text(json.dumps(before), encoding="utf-8")
    start = search(loaded, folder, out)[1][0]
    assert start["known"] == 0
    assert "other settings" in start["message"]


def test_a_dicom_series_is_one_volume(tmp_path: Path, make_phantom: Callable[..., Any]) -> None:
    import SimpleITK as sitk

    series = tmp_path / "all" / "series"
    series.mkdir(parents=True)
    array = make_phantom(3)[0].astype(np.int16)
    for k, plane in enumerate(array):
        image = sitk.GetImageFromArray(plane[None])
        image.SetSpacing((4.0, 4.0, 7.0))
        tags = {"0008|0060": "CT", "0020|000e": "1.2.3.4", "0020|000d": "1.2.3", "0008|0016": "1.2.840.10008.5.1.4.1.1.2"}
        tags |= {"0020|0032": f"0\\0\\{7 * k}", "0020|0037": "1\\0\\0\\0\\1\\0", "0020|0013": str(k)}
        for tag, value in tags.items():
            image.SetMetaData(tag, value)
        writer = sitk.ImageFileWriter()
        writer.KeepOriginalImageUIDOn()
        writer.SetFileName(str(series / f"{k}.dcm"))
        writer.Execute(image)
    (candidate,) = find_volumes(tmp_path / "all")
    assert candidate.name == "series"
    assert read_volume(candidate.path).array.shape == array.shape
    before = fingerprint(series)
    (series / "2.dcm").write_bytes((series / "2.dcm").read_bytes()[:-2] + b"xx")
    assert fingerprint(series) != before


def test_a_series_in_parts_is_one_volume(tmp_path: Path) -> None:
    grid = oriented("LPS", (9, 8, 6), (0.75, 0.75, 2.5))
    for uid in ("1", "2"):
        write_dicom_series(tmp_path / f"scan {uid}", ramp(grid), grid, uid=uid)
    for number, path in enumerate(sorted((tmp_path / "scan 1").glob("*.dcm"))):
        (tmp_path / "scan 1" / str(number % 2)).mkdir(exist_ok=True)
        path.rename(tmp_path / "scan 1" / str(number % 2) / path.name)
    found = find_volumes(tmp_path)
    assert [c.name for c in found] == ["scan 1", "scan 2"]
    for candidate in found:
        np.testing.assert_array_equal(read_volume(candidate.path).array, ramp(grid))
    before = fingerprint(found[0].path)
    (tmp_path / "scan 1" / "next.json").write_text("{}")  # the result may lie beside the images
    assert fingerprint(found[0].path) == before
    part = next((tmp_path / "scan 1" / "1").iterdir())
    part.write_bytes(part.read_bytes()[:-2] + b"xx")
    assert fingerprint(found[0].path) != before


@pytest.mark.slow
def test_whatever_is_thrown_at_one_volume_the_others_are_measured(
    loaded: Engine, folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    write(folder / "c.nii.gz", (np.zeros((4, 8, 8), np.float32), np.eye(4)))
    thrown: dict[str, Exception] = {"a": ZeroDivisionError("Jane"), "b": MemoryError(), "c": RuntimeError("Jane")}

    def fail(path: Path) -> Any:
        if path.name.split(".")[0] in thrown:
            raise thrown[path.name.split(".")[0]]
        return read_volume(path)

    monkeypatch.setattr("progidiff.active.search.read_volume", fail)
    document, _ = search(loaded, folder, tmp_path / "next.json")
    reasons = {f.path: f.reason for f in document.failures}
    assert set(reasons) == {"a.nii.gz", "unter/b.nrrd", "c.nii.gz"}
    assert "ZeroDivisionError" in reasons["a.nii.gz"]
    assert "memory" in reasons["unter/b.nrrd"]
    assert not any("Jane" in reason or "\n" in reason for reason in reasons.values())
    assert document.complete
    del thrown["a"], thrown["b"]
    document, events = search(loaded, folder, tmp_path / "next.json")
    assert {v.path for v in document.volumes} == {"a.nii.gz", "unter/b.nrrd"}
    assert events[0]["known"] == 0


@pytest.mark.skipif(sys.platform != "linux", reason="names of any bytes are Linux's")
def test_a_name_that_is_no_text_does_not_end_the_search(loaded: Engine, folder: Path, tmp_path: Path) -> None:
    (folder / "a.nii.gz").rename(Path(os.fsdecode(os.fsencode(folder) + b"/l\xe9ber.nii.gz")))
    document, _ = search(loaded, folder, tmp_path / "next.json")
    assert [v.path for v in document.volumes] == ["unter/b.nrrd"]
    (failure,) = document.failures
    assert failure.path == "l\\xe9ber.nii.gz"
    assert "rename" in failure.reason
    assert document.complete


def test_a_pet_among_the_scans_is_named(loaded: Engine, tmp_path: Path) -> None:
    grid = oriented("LPS", (36, 32, 4), (8.0, 8.0, 9.0))
    array = np.random.default_rng(0).integers(-1000, 200, grid.shape_kji).astype(np.int16)
    write_dicom_series(tmp_path / "all" / "pet", array, grid, modality="PT")
    write_dicom_series(tmp_path / "all" / "ct", array, grid, uid="2", shifts={1: (0.0, 0.0, 0.1)})
    document, _ = search(loaded, tmp_path / "all", tmp_path / "n.json", settings=replace(SETTINGS, modality=None))
    notes = {item.path: " ".join(item.notes) for item in document.volumes}
    assert "The image is PT" in notes["pet"]
    assert "does not say" not in notes["pet"] + notes["ct"]
    assert "are rounded" in notes["ct"]


def test_the_ranking_and_its_file(loaded: Engine, folder: Path, tmp_path: Path) -> None:
    document, events = search(loaded, folder, tmp_path / "new" / "next.json")
    assert [e["event"] for e in events] == ["start", "volume", "volume", "done"]
    assert events[0] == {"event": "start", "volumes": 2, "known": 0, "message": ""}
    values = [item["disagreement"] for item in events[-1]["ranking"]]
    assert values == sorted(values, reverse=True)
    assert {item["path"] for item in events[-1]["ranking"]} == {"a.nii.gz", "unter/b.nrrd"}
    assert not events[-1]["cancelled"]
    for item in document.volumes:
        worst = item.per_target[item.target]
        assert item.disagreement == max(t.disagreement for t in item.per_target.values()) == worst.disagreement
        assert set(item.per_target) == {"liver", "spleen"}
        assert item.slice in worst.slices
    text = (tmp_path / "new" / "next.json").read_text(encoding="utf-8")
    assert NextDocument.model_validate_json(text) == document
    assert document.complete
    assert str(tmp_path) not in text  # relative paths only


def test_the_place_of_the_doubt_lies_on_its_slice(loaded: Engine, folder: Path) -> None:
    volume = read_volume(folder / "a.nii.gz")
    item = measure(loaded, volume, ["liver"], SETTINGS)
    i, j, k, _ = np.linalg.inv(volume.geometry.affine) @ np.array([*item.ras, 1.0])
    assert k == pytest.approx(item.slice)
    assert 0 <= i < volume.array.shape[2]
    assert 0 <= j < volume.array.shape[1]


def test_only_what_is_new_or_changed_is_measured_again(
    loaded: Engine, folder: Path, tmp_path: Path, make_phantom: Callable[..., Any]
) -> None:
    out = tmp_path / "next.json"
    first, _ = search(loaded, folder, out)
    again, events = search(loaded, folder, out)
    assert events[0]["known"] == 2
    assert [e["event"] for e in events] == ["start", "done"]
    assert again.volumes == first.volumes

    write(folder / "a.nii.gz", make_phantom(4), 40)  # changed
    (folder / "unter" / "b.nrrd").rename(folder / "moved.nrrd")  # the same content elsewhere
    _, events = search(loaded, folder, out)
    assert events[0]["known"] == 1
    assert [e["item"]["path"] for e in events if e["event"] == "volume"] == ["a.nii.gz"]
    assert {item["path"] for item in events[-1]["ranking"]} == {"a.nii.gz", "moved.nrrd"}


def test_another_prompt_starts_anew_and_keeps_the_earlier_result(loaded: Engine, folder: Path, tmp_path: Path) -> None:
    out = tmp_path / "next.json"
    search(loaded, folder, out)
    before = out.read_text(encoding="utf-8")
    _, events = search(loaded, folder, out, targets=["liver"])
    assert events[0]["known"] == 0
    assert "another prompt" in events[0]["message"]
    (kept,) = tmp_path.glob("next-*.json")
    assert kept.read_text(encoding="utf-8") == before
    assert kept.name in events[0]["message"]


def test_a_file_of_something_else_is_not_overwritten(loaded: Engine, folder: Path, tmp_path: Path) -> None:
    out = tmp_path / "precious.json"
    out.write_text('{"mine": 1}')
    with pytest.raises(OutputError, match="not a result of this command"):
        search(loaded, folder, out)
    assert out.read_text() == '{"mine": 1}'


def test_unreadable_volumes_are_listed_and_tried_again(
    loaded: Engine, folder: Path, tmp_path: Path, make_phantom: Callable[..., Any]
) -> None:
    (folder / "broken.nii.gz").write_bytes(b"no image")
    write(folder / "flat.nii.gz", (np.zeros((4, 8, 8), np.float32), make_phantom()[1]))
    document, events = search(loaded, folder, tmp_path / "next.json")
    assert {f.path for f in document.failures} == {"broken.nii.gz", "flat.nii.gz"}
    assert all(f.reason.endswith(".") for f in document.failures)
    assert len(document.volumes) == 2
    assert document.complete
    assert len(events[-1]["failures"]) == 2
    write(folder / "broken.nii.gz", make_phantom(4), 5)
    document, _ = search(loaded, folder, tmp_path / "next.json")
    assert [f.path for f in document.failures] == ["flat.nii.gz"]
    assert len(document.volumes) == 3


def test_stopping_keeps_what_was_measured(loaded: Engine, folder: Path, tmp_path: Path) -> None:
    out = tmp_path / "next.json"
    told: list[dict[str, Any]] = []

    def measured() -> bool:
        return any(event["event"] == "volume" for event in told)

    document = rank_folder(loaded, folder, ["liver"], out, SETTINGS, tell(told), cancelled=measured)
    assert len(document.volumes) == 1
    assert not document.complete
    finished, events = search(loaded, folder, out, targets=["liver"])
    assert events[0]["known"] == 1
    assert finished.complete
    assert len(finished.volumes) == 2


def test_a_single_proposal_cannot_disagree(loaded: Engine, folder: Path, tmp_path: Path) -> None:
    with pytest.raises(InputError, match="at least 2"):
        search(loaded, folder, tmp_path / "o.json", settings=NextSettings(proposals=1))


def test_the_command_prints_a_table_and_no_names_into_logs(responsive_folder: Path, folder: Path, tmp_path: Path) -> None:
    (folder / "broken.nii.gz").write_bytes(b"no image")
    arguments = ["next", "--folder", str(folder), "--model", str(responsive_folder), "--prompt", "liver"]
    ran = CliRunner().invoke(app, [*arguments, "--out", str(tmp_path / "o.json"), *OPTIONS, "--modality", "CT"])
    assert ran.exit_code == 0, ran.output
    assert "unter/b.nrrd" in ran.stdout
    assert "Not measured: broken.nii.gz" in ran.stdout
    assert "volume 3 of 3" in ran.stderr
    for name in ("b.nrrd", "a.nii", "broken"):
        assert name not in ran.stderr


def test_errors_are_one_json_line(responsive_folder: Path, folder: Path, tmp_path: Path) -> None:
    arguments = ["next", "--folder", str(folder), "--model", str(responsive_folder), "--prompt", "unicorn", "--json"]
    ran = CliRunner().invoke(app, [*arguments, "--out", str(tmp_path / "o.json"), *OPTIONS])
    assert ran.exit_code == 2
    (line,) = ran.stdout.splitlines()
    event = json.loads(line)
    assert (event["event"], event["code"]) == ("error", "prompt")
    assert "unicorn" in event["message"]


@pytest.mark.slow
def test_the_word_stop_on_standard_input_ends_early(responsive_folder: Path, folder: Path, tmp_path: Path) -> None:
    command = [sys.executable, "-m", "progidiff", "next", "--folder", str(folder), "--model", str(responsive_folder)]
    command += ["--prompt", "liver", "--out", str(tmp_path / "o.json"), "--json", *OPTIONS]
    env = {**os.environ, "PYTHONPATH": str(Path(progidiff.__file__).parents[1])}
    ran = subprocess.run(command, input="stop\n", capture_output=True, text=True, encoding="utf-8", env=env, check=False)
    assert ran.returncode == 0, ran.stderr
    events = [json.loads(line) for line in ran.stdout.splitlines()]
    assert [events[0]["event"], events[-1]["event"]] == ["start", "done"]
    assert events[-1]["cancelled"]
