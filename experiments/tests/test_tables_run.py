"""Whole tables on a tiny model and made-up slices, against what another part of the program measures; and resumed."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from typer.testing import CliRunner

from experiments import samples as sampling
from experiments.__main__ import app
from experiments.tables import ablations, controls, load_table, setup
from experiments.tables.records import MEAN
from experiments.tables.setup import TableSetup, plain
from progidiff.datasets.slices import LabelledSlice
from progidiff.evaluation.accuracy import mean_over_targets, score_slices, summarise, summarise_absent
from progidiff.sampling.engine import Engine

PROPOSALS = 6


def made_up(name: str) -> list[LabelledSlice]:
    """Three slices of three patients; the second rater draws some of them a column wider. The last one has no spleen."""
    items = []
    for n in range(3):
        liver, spleen = np.zeros((2, 30, 34), bool)
        liver[6:18, 4 + n : 16 + n] = True
        spleen[12:20, 22:30] = n < 2
        image = np.random.default_rng(n).normal(20, 15, liver.shape).astype(np.float32) + 90 * liver + 60 * spleen
        labels = {"liver": liver, "spleen": spleen}
        second = {target: mask | np.roll(mask, 1, 1) for target, mask in labels.items()}
        modality: Any = "MR" if name.endswith("mr") else "CT"
        more: Any = {"second_labels": second if name == "curvas" and n else None, "slice_id": f"{name} {n}"}
        items.append(LabelledSlice(image, (3.5, 4.0), labels, frozenset(labels), f"{name} {n}", modality, **more))
    return items


@pytest.fixture(scope="module")
def loaded(responsive_folder: Path) -> Engine:
    return Engine.load(responsive_folder, "cpu")


@pytest.fixture
def tables(loaded: Engine, responsive_folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> TableSetup:
    monkeypatch.setattr(TableSetup, "engine", lambda self: loaded)  # loading takes longer than measuring
    monkeypatch.setattr(setup, "load_shared", lambda folder, name: made_up(name))
    monkeypatch.setattr(controls, "load_permissive", lambda folder: [])  # phantoms alone
    work = tmp_path / "work"
    work.mkdir()
    return TableSetup(tmp_path, work, responsive_folder, seed=3, proposals=PROPOSALS, steps=2, device="cpu")


def accuracy(tables: TableSetup, name: str, proposals: int = PROPOSALS, steps: int = 2) -> tuple[dict[str, Any], Any]:
    """Rows by target of the accuracy command's own measuring, their mean, and absences by target."""
    scores, absent = score_slices(tables.engine(), name, made_up(name), proposals, steps, tables.seed)
    rows = summarise(scores)
    return {r["target"]: r for r in rows} | {MEAN: mean_over_targets(rows, name)}, summarise_absent(absent)  # type: ignore[misc]


@pytest.mark.slow
def test_n_curve(tables: TableSetup) -> None:
    result = load_table("n-curve").run(tables)
    assert list(result.facts) == ["curvas", "amos"]
    for count in (2, PROPOSALS):
        expected, _ = accuracy(tables, "curvas", count)
        for target in ("liver", "spleen", MEAN):
            found = result.facts["curvas"][target][str(count)]
            for figure in ("rank1", "best", "mean", "rand_top_3"):
                assert found[figure]["mean"] == pytest.approx(expected[target][figure]), (target, figure)
            assert found["probability"]["mean"] == pytest.approx(expected[target]["ensemble"], abs=1e-6)
        rank1 = result.facts["curvas"]["liver"][str(count)]["rank1"]
        assert (rank1["low"], rank1["high"]) == (
            pytest.approx(expected["liver"]["rank1_low"]),
            pytest.approx(expected["liver"]["rank1_high"]),
        )
        assert (rank1["pairs"], rank1["patients"]) == (3, 3)
    assert {row[2] for row in result.rows if row and row[1] == MEAN} == {"5 / 3"}
    assert result.facts["amos"]["liver"]["adaptive"]["n"]["mean"] <= PROPOSALS
    assert (tables.work / "n-curve.png").read_bytes().startswith(b"\x89PNG")


@pytest.mark.slow
def test_tables_share_their_proposals_and_go_on(tables: TableSetup, monkeypatch: pytest.MonkeyPatch) -> None:
    first = load_table("ranking").run(tables)
    expected, _ = accuracy(tables, "amos")
    for target in ("liver", "spleen"):
        found = first.facts["amos"][target][f"{PROPOSALS} soft_dice"]
        assert found["spearman"]["mean"] == pytest.approx(expected[target]["spearman"])
        assert found["regret"]["mean"] == pytest.approx(expected[target]["best"] - expected[target]["rank1"])
        assert found["random"]["mean"] == pytest.approx(expected[target]["best"] - expected[target]["mean"])
    assert "6 medoid" in first.facts["amos"]["liver"]

    def never(*args: object) -> None:
        raise AssertionError("sampled again")

    monkeypatch.setattr(sampling, "_sampled", never)
    assert load_table("ranking").run(tables).facts == first.facts
    load_table("n-curve").run(tables)
    with pytest.raises(AssertionError):
        load_table("ranking").run(replace(tables, seed=4))


@pytest.mark.slow
def test_ablations(tables: TableSetup) -> None:
    options = {"sets": "curvas", "number": "4", "mr": "my mr"}
    result = load_table("ablations").run(replace(tables, options=options))
    facts = result.facts["curvas"]
    for variant, steps in (("as it is", 2), ("1 step", 1), ("8 steps", 8)):
        expected, absent = accuracy(tables, "curvas", 4, steps)
        for figure in ("rank1", "best", "rand_top_3", "mean"):
            # other proposals in the batch, other rounding: a pixel on the edge may turn
            assert facts[variant][MEAN][figure]["mean"] == pytest.approx(expected[MEAN][figure], abs=2e-3), (variant, figure)
        if variant == "as it is":
            (found,) = result.also[0].facts["curvas"].values()
            assert found["share_full"]["mean"] == pytest.approx(1 - absent[0]["empty_share"])
            assert found["rank1_full"]["mean"] == pytest.approx(1 - absent[0]["rank1_empty"])
    assert "2 steps" not in facts
    base = facts["as it is"]["liver"]["rank1"]["mean"]
    for variant in ("fresh noise for the state", "state shuffled between samples", "CT presented as MR"):
        values = facts[variant]["liver"]
        assert values["rank1_change"]["mean"] == pytest.approx(values["rank1"]["mean"] - base)
    assert facts["fresh noise for the state"] != facts["as it is"]
    assert list(result.facts["my mr"]) == ["right modality", "MR presented as CT"]
    assert result.facts["my mr"]["right modality"][MEAN]["rank1"]["pairs"] == 5


@pytest.mark.slow
def test_raters(tables: TableSetup) -> None:
    quick = replace(tables, options={"unet-minutes": "0.02"})
    result = load_table("raters").run(quick)
    assert {row[0] for row in result.rows if row} == {"liver", "spleen", MEAN}
    facts = result.facts[MEAN]
    n = f"N = {PROPOSALS}"
    alone = f"rank 1 of {PROPOSALS} alone"
    unets = [f"U-Net, MC dropout, {n}", f"U-Net, test-time augmentation, {n}", "U-Net, one mask"]
    assert list(facts) == [f"proposals, {n}", alone, *unets]
    # of the slices with a second rater: two livers of 12 x 12 and 12 x 13 pixels, one spleen of 8 x 8 and 8 x 9
    assert facts[alone]["human"]["mean"] == pytest.approx((24 / 25 + 16 / 17) / 2)
    assert facts[alone]["human"]["pairs"] == 3
    assert facts[alone]["uncertain"]["mean"] == 0.0
    assert facts[alone]["covered"]["mean"] == 0.0
    assert facts[alone]["best_first"] == facts[alone]["rank1_first"] == facts[f"proposals, {n}"]["rank1_first"]
    assert facts[f"proposals, {n}"]["best_first"]["mean"] >= facts[alone]["best_first"]["mean"]
    assert plain(load_table("raters").run(quick).facts) == plain(result.facts)  # nothing is trained or drawn again


@pytest.mark.slow
def test_ablations_say_what_drawing_everywhere_changes(
    tables: TableSetup, headed_folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(TableSetup, "engine", lambda self: Engine.load(headed_folder, "cpu"))
    own = replace(tables, model=headed_folder, options={"sets": "curvas", "mr": "none", "number": "3"})
    result = load_table("ablations").run(own)
    facts = result.facts["curvas"]
    # the head never finds the spleen: it is left empty, but where it is asked for everywhere
    assert facts[ablations.BASELINE]["spleen"]["best"]["mean"] == 0.0
    assert facts[ablations.EVERYWHERE]["spleen"]["best"]["mean"] > 0.0
    for figure in ("rank1", "rand_top_3", "best", "mean"):
        assert facts[ablations.EVERYWHERE]["liver"][figure] == facts[ablations.BASELINE]["liver"][figure]
    absent = result.also[0].facts["curvas"]["spleen"]
    assert absent["rank1_full"]["mean"] == absent["share_full"]["mean"] == 0.0
    assert absent["everywhere_share_full"]["mean"] > 0.0
    assert absent["twin_full"]["mean"] == 0.0


def test_the_command_writes_and_prints(tables: TableSetup) -> None:
    options = ["--data", str(tables.data), "--work", str(tables.work), "--model", str(tables.model), "--proposals", "3"]
    options += ["--steps", "1", "--device", "cpu", "--option", "sets=amos"]
    shown = CliRunner().invoke(app, ["table", "ranking", *options])
    assert shown.exit_code == 0, shown.output
    assert "soft_dice" in shown.output
    assert "amos 0" not in shown.output + (tables.work / "ranking.json").read_text("utf-8")  # no patients, no slices
    as_json = CliRunner().invoke(app, ["table", "ranking", *options, "--json"])
    printed = json.loads(as_json.stdout)
    assert printed["facts"] == json.loads((tables.work / "ranking.json").read_text("utf-8"))["facts"]
    assert [Path(f).name for f in printed["files"]] == ["ranking.json", "ranking.md"]
