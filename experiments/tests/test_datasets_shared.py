"""The public evaluation sets: encoding, counts, and anatomy where it should be in a canonical slice."""

from __future__ import annotations

import json
from functools import cache
from pathlib import Path

import numpy as np
import pytest
from typer.testing import CliRunner

from experiments.__main__ import app
from experiments.shared_slices import SHARED_SETS, load_shared
from progidiff.errors import DatasetError
from progidiff.evaluation.cases import cases_of_slices
from progidiff.evaluation.evaluate import EvaluationDocument, evaluate_cases
from progidiff.evaluation.measuring import EvaluationSettings
from progidiff.evaluation.metrics import dice
from progidiff.sampling.engine import Engine
from progidiff.targets.catalog import catalog
from progidiff.volumes.reading import read_volume
from progidiff.volumes.slicing import extract_slice, plan_slices

load = cache(load_shared)

# Slices and patients of each set, as its source states them.
SIZES = {
    "curvas": (76, 10),
    "amos": (10, 1),
    "kits": (24, 5),
    "chaos": (20, 4),
    "msd_spleen": (18, 10),
    "pancreas_mr": (20, 15),
    "kidney_mr": (25, 21),
    "totalsegmentator_ct": (30, 1),
    "totalsegmentator_mr": (20, 1),
}


def centre(mask: np.ndarray) -> np.ndarray:
    return np.argwhere(mask).mean(axis=0) / mask.shape


def test_every_set_is_covered_here() -> None:
    assert set(SIZES) == set(SHARED_SETS)


@pytest.mark.slow
@pytest.mark.parametrize("name", SHARED_SETS)
def test_slices_are_complete_and_consistent(shared_data: Path, name: str) -> None:
    slices = load(shared_data, name)
    assert (len(slices), len({s.patient for s in slices})) == SIZES[name]
    assert {s.plane for s in slices} == {"coronal" if name == "kidney_mr" else "axial"}
    assert len({s.slice_id for s in slices}) == len(slices)
    for s in slices:
        assert s.image.dtype == np.float32
        assert s.image.flags.c_contiguous
        assert np.isfinite(s.image).all()
        assert s.labelled == set(s.labels) <= set(catalog())
        assert all(m.dtype == np.bool_ and m.shape == s.image.shape for m in s.labels.values())
        assert 0.3 < min(s.spacing_rc) <= max(s.spacing_rc) <= 3.0
        if s.window == "display":
            assert 0.0 <= s.image.min() < 0.2
            assert 0.5 < s.image.max() <= 1.0
        elif s.modality == "CT":
            assert s.image.min() <= -1000
            # The liver's Hounsfield units are where a liver's are.
            liver = s.image[s.labels["liver"]]
            assert 30 < np.median(liver) < 180


# On which side of the body each organ is seen, for a set that is not stored canonically or has several
# organs.
@pytest.mark.parametrize("name", ["amos", "totalsegmentator_ct", "totalsegmentator_mr"])
def test_sides_and_front_and_back(shared_data: Path, name: str) -> None:
    slices = load(shared_data, name)

    def column(target: str) -> float:
        return float(np.mean([centre(s.labels[target])[1] for s in slices if s.labels[target].any()]))

    def row(target: str) -> float:
        return float(np.mean([centre(s.labels[target])[0] for s in slices if s.labels[target].any()]))

    assert column("liver") < column("spleen")
    assert column("right kidney") < column("left kidney")
    assert column("inferior vena cava") < column("aorta") < column("left kidney")
    assert row("stomach") < row("aorta") < row("left kidney") + 0.1
    assert row("liver") < row("right kidney")


@pytest.mark.parametrize(
    ("name", "target", "on_left"), [("curvas", "liver", True), ("chaos", "liver", True), ("msd_spleen", "spleen", False)]
)
def test_other_sets_show_an_organ_on_its_side(shared_data: Path, name: str, target: str, on_left: bool) -> None:
    for s in load(shared_data, name):
        if s.labels[target].sum() > 4000 or name != "curvas":
            body = s.image > (0.35 if name == "chaos" else 0.2)
            assert (centre(s.labels[target])[1] < centre(body)[1] + 0.05 * (name == "curvas")) == on_left


def test_curvas_has_a_second_rater_exactly_where_the_source_says(shared_data: Path) -> None:
    slices = load(shared_data, "curvas")
    second = [s for s in slices if s.second_labels is not None]
    assert len(second) == 50
    values: dict[str, list[float]] = {"liver": [], "kidneys": [], "pancreas": []}
    for s in second:
        assert set(s.second_labels) == s.labelled
        for target, found in values.items():
            if s.labels[target].any() and s.second_labels[target].any():
                found.append(dice(s.second_labels[target], s.labels[target]))
    means = {target: float(np.mean(found)) for target, found in values.items()}
    # The ranges that the source states for two radiologists.
    assert 0.80 < means["pancreas"] < 0.88
    assert 0.91 < means["kidneys"] < 0.96
    assert 0.92 < means["liver"] < 0.96


@pytest.mark.slow
def test_curvas_slices_are_those_of_the_rater_1_volumes(shared_data: Path) -> None:
    s = next(s for s in load(shared_data, "curvas") if s.slice_id == "10009_137")
    path = shared_data / "research/curvas_ct_multirater/rater1_volumes" / f"{s.patient}.nii.gz"
    volume = read_volume(path, allow_uniform=True)
    drawn = extract_slice(volume.array, plan_slices(volume.geometry, "axial"), 137)
    for target, value in {"pancreas": 1, "kidneys": 2, "liver": 3}.items():
        assert np.array_equal(s.labels[target], drawn == value)


@pytest.mark.parametrize(
    ("name", "image", "label"),
    [
        ("totalsegmentator_ct", "example_ct_sm.nii.gz", "example_seg.nii.gz"),
        ("totalsegmentator_mr", "example_mr_sm.nii.gz", "example_seg_mr.nii.gz"),
    ],
)
def test_whole_volumes_are_cut_as_the_engine_cuts_them(shared_data: Path, name: str, image: str, label: str) -> None:
    folder = shared_data / "permissive/totalsegmentator_tests"
    volume, segments = read_volume(folder / image), read_volume(folder / label)
    plan = plan_slices(volume.geometry)
    cut = {extract_slice(volume.array, plan, k).astype(np.float32).tobytes(): k for k in range(plan.count)}
    for s in load(shared_data, name):
        k = cut[s.image.tobytes()]
        assert s.spacing_rc == pytest.approx(plan.spacing_rc)
        assert np.array_equal(s.labels["liver"], extract_slice(segments.array, plan, k) == 5)


def test_unknown_and_missing_sets_end_in_one_sentence(tmp_path: Path) -> None:
    with pytest.raises(DatasetError, match="choose one of curvas"):
        load_shared(tmp_path, "imagenet")
    for name in SHARED_SETS:
        with pytest.raises(DatasetError, match=name):
            load_shared(tmp_path, name)


def test_public_slices_with_the_bundled_model(shared_data: Path) -> None:
    engine = Engine.load(None, "cpu")
    cases = cases_of_slices(load(shared_data, "amos"), "amos", engine.card)[:1]
    settings = EvaluationSettings(proposals=2, steps=2, targets=("liver", "spleen"), absent=False)
    document = evaluate_cases(engine, cases, settings)
    liver = next(row for row in document.summary if row.target == "liver")
    assert liver.answers["rank1"].dice.mean is not None
    assert liver.answers["rank1"].dice.mean > 0.6
    assert 0 < (liver.answers["rank1"].nsd.mean or 0) < 1


def test_the_commands_know_the_sets_by_name(shared_data: Path, responsive_folder: Path, tmp_path: Path) -> None:
    quick = ["--set", "amos", "--model", str(responsive_folder), "--device", "cpu", "--steps", "1", "--every", "5", "--json"]
    ran = CliRunner().invoke(app, ["accuracy", "--data", str(shared_data), "--proposals", "1", *quick])
    assert ran.exit_code == 0, ran.output
    liver = next(row for row in json.loads(ran.stdout)["targets"] if row["target"] == "liver")
    assert (liver["set"], liver["slices"], liver["patients"]) == ("amos", 2, 1)
    out = ["--out", str(tmp_path / "out"), "--proposals", "1", "--no-distances"]
    ran = CliRunner().invoke(app, ["evaluate", "--shared", str(shared_data), *out, *quick])
    assert ran.exit_code == 0, ran.output
    cases = EvaluationDocument.model_validate_json(ran.stdout).cases
    assert [(c.set, c.name) for c in cases] == [("amos", "amos_0001_61"), ("amos", "amos_0001_66")]
