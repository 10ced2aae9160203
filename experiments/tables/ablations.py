"""What the noisy state, the steps, the prompt and the modality are worth: accuracy with each of them taken away."""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager
from dataclasses import replace
from typing import Any

import numpy as np

from experiments.samples import Samples, SampleStore, absent_targets, propose_into
from experiments.tables.proposals import SETS, SETS_OPTION, main_proposals, pairs, shared_store, thinned
from experiments.tables.records import MEAN, Record, cell, fact, groups, interval, numbers, size
from experiments.tables.setup import TableResult, TableSetup
from experiments.tables.twins import TWIN_IS
from progidiff.datasets.slices import LabelledSlice, present_targets
from progidiff.errors import InputError
from progidiff.evaluation.accuracy import Ablation, PlainSegmenter, disturbed_state, image_only_twin
from progidiff.evaluation.cases import as_volume
from progidiff.evaluation.metrics import dice, proposal_scores
from progidiff.proposals.votes import gram_matrix, mean_pairwise_dice
from progidiff.sampling.engine import Engine
from progidiff.sampling.image import load_image

NAME = "ablations"
TITLE = "Accuracy without the noisy state, with fewer steps, and with the wrong modality"
OPTIONS = {
    **SETS_OPTION,
    "every": "measure every n-th slice of each set (default 1)",
    "number": "proposals per pair of slice and target (default 10)",
    "mr": "set to present as CT (default totalsegmentator_mr; none for none)",
}
NUMBER = 10
STEPS = (1, 2, 8)
BASELINE = "as it is"
EVERYWHERE = "drawn everywhere"
OWN = "right modality"

FIGURES = {
    "rank1": "rank 1",
    "rank1_change": "change of rank 1",
    "rand_top_3": "RandTop-3",
    "best": "best of N",
    "mean": "mean",
    "ensemble": "mean probability",
    "diversity": "pairwise Dice",
}
ABSENT_FIGURES = {
    "rank1_full": "rank 1 not empty",
    "share_full": "proposals not empty",
    "area_cm2": "area of rank 1 in cm², where not empty",
    "everywhere_rank1_full": "rank 1 not empty, drawn everywhere",
    "everywhere_share_full": "proposals not empty, drawn everywhere",
    "twin_full": "twin not empty",
    "twin_area_cm2": "area of the twin's mask in cm², where not empty",
}


def measure(samples: Samples, truth: np.ndarray) -> dict[str, float]:
    """Dice of the proposals of one pair of slice and target, and how alike they are."""
    scores = proposal_scores([dice(mask, truth) for mask in samples.masks], samples.ranking, k=3)
    probability = samples.mean_probability
    return {
        "rank1": scores.rank1,
        "rand_top_3": scores.rand_top_k,
        "best": scores.best,
        "mean": scores.mean,
        "ensemble": float("nan") if probability is None else dice(probability > 0.5, truth),
        "diversity": mean_pairwise_dice(gram_matrix(samples.masks)) if samples.count > 1 else float("nan"),
    }


def measure_absent(samples: Samples, everywhere: Samples, twin: np.ndarray | None) -> dict[str, float]:
    """Figures of a prompt for an organ that is not there; 1 and 0 are yes and no.

    Args:
        samples: the proposals.
        everywhere: the proposals as they are where none is left empty for the organ's absence.
        twin: the twin's mask, if there is a twin.
    """
    nan = float("nan")
    cm2 = samples.spacing_rc[0] * samples.spacing_rc[1] / 100
    area = float(samples.masks[samples.ranking.order[0]].sum()) * cm2
    values = {
        "rank1_full": float(area > 0),
        "share_full": 1.0 - samples.ranking.empty_share,
        "area_cm2": area if area > 0 else nan,
        "everywhere_rank1_full": float(everywhere.masks[everywhere.ranking.order[0]].any()),
        "everywhere_share_full": 1.0 - everywhere.ranking.empty_share,
    }
    twin_area = nan if twin is None else float(twin.sum()) * cm2
    full = nan if twin is None else float(twin_area > 0)
    return values | {"twin_full": full, "twin_area_cm2": twin_area if twin_area > 0 else nan}


class _Ablations:
    """One run of the table."""

    def __init__(self, setup: TableSetup) -> None:
        self.setup = setup
        self.engine: Engine = setup.engine()
        self.vocabulary = self.engine.card.vocabulary
        self.every = setup.whole("every", 1, 1, 1000)
        self.number = setup.whole("number", min(NUMBER, main_proposals(setup)), 1, main_proposals(setup))
        network = image_only_twin(self.engine.model)
        self.twin = None if network is None else PlainSegmenter(network, self.engine.card)
        self.records: dict[tuple[str, str], list[Record]] = {}
        self.absent: list[Record] = []
        self.refused: dict[str, int] = {}

    def around(self, how: Ablation) -> Callable[[LabelledSlice], AbstractContextManager[None]]:
        """The ablation with a seed of its own per slice, so that a resumed run gives the same samples."""

        def enter(item: LabelledSlice) -> AbstractContextManager[None]:
            text = f"{self.setup.seed}|{item.slice_id}"
            return disturbed_state(self.engine.model, how, int(hashlib.sha256(text.encode()).hexdigest()[:8], 16))

        return enter

    def add(self, name: str, variant: str, item: LabelledSlice, target: str, values: dict[str, float]) -> None:
        self.records.setdefault((name, variant), []).append(Record(name, target, item.patient, values))

    def variant(
        self,
        name: str,
        items: Sequence[LabelledSlice],
        variant: str,
        steps: int | None = None,
        how: Ablation = "none",
        kind: str | None = None,
        everywhere: bool = False,
    ) -> None:
        """Sample one variant of a set and measure it."""
        kept = "" if kind is None and how == "none" else kind or how
        store = self.setup.store(self.engine, name, self.number, steps=steps, variant=kept, everywhere=everywhere)
        told = self.setup.counted(f"{name}, {variant}", len(items))
        propose_into(store, self.engine, items, lambda i: present_targets(i, self.vocabulary), (), self.around(how), told)
        for item, target, samples in pairs(store, items, self.vocabulary):
            self.add(name, variant, item, target, measure(samples, item.labels[target]))

    def baseline(self, name: str, items: Sequence[LabelledSlice]) -> None:
        """The first proposals of the shared ones, and the twin."""
        store = shared_store(self.setup, self.engine, name, items)
        for item, target, samples in pairs(store, items, self.vocabulary):
            truth = item.labels[target]
            self.add(name, BASELINE, item, target, measure(samples.first(self.number), truth))
            if self.twin is not None:
                one = Samples(self.twin(item, target)[None], {}, item.spacing_rc)
                self.add(name, "image-only twin", item, target, measure(one, truth))

    def wrong_modality(self, name: str, items: Sequence[LabelledSlice], variant: str) -> None:
        """The set as if it were of the other modality; slices that are refused are counted."""
        wrong = [replace(item, modality="MR" if item.modality == "CT" else "CT") for item in items]
        usable = [item for item in wrong if self._is_taken(item)]
        self.refused[f"{name}, {variant}"] = len(wrong) - len(usable)
        if usable:
            self.variant(name, usable, variant, kind="wrong modality")

    def _is_taken(self, item: LabelledSlice) -> bool:
        array, affine = as_volume(item, self.engine.card)
        try:
            load_image(array, affine, item.modality, item.plane, self.engine.card)
        except InputError:
            return False
        return True

    def absences(self, name: str, items: Sequence[LabelledSlice]) -> None:
        """Prompts for organs that are labelled as absent."""
        stores: list[SampleStore] = []
        for everywhere in (False, True):
            store = self.setup.store(self.engine, name, self.number, variant="absent", everywhere=everywhere)
            told = self.setup.counted(f"{name}, absent organs{', drawn everywhere' if everywhere else ''}", len(items))
            propose_into(store, self.engine, items, lambda i: absent_targets(i, self.vocabulary), progress=told)
            stores.append(store)
        for item in items:
            for target in absent_targets(item, self.vocabulary):
                samples, everywhere_too = (store.get(item.slice_id, target) for store in stores)
                if samples is None or everywhere_too is None:
                    raise InputError("Samples in the work folder are damaged; run the table again, or with another --work.")
                twin = None if self.twin is None else self.twin(item, target)
                self.absent.append(Record(name, target, item.patient, measure_absent(samples, everywhere_too, twin)))

    def changes(self, name: str) -> None:
        """Give every record the change of its rank-1 Dice from the baseline of the same slice and target."""
        base = self.records.get((name, BASELINE)) or self.records.get((name, OWN), [])
        for (own, variant), chosen in self.records.items():
            if own == name and len(chosen) == len(base) and variant not in (BASELINE, OWN):
                self.records[own, variant] = [
                    replace(r, values={**r.values, "rank1_change": r.values["rank1"] - b.values["rank1"]})
                    for r, b in zip(chosen, base, strict=True)
                ]


def run(setup: TableSetup) -> TableResult:
    """Measure every variant on every set."""
    table = _Ablations(setup)
    for name in setup.names("sets", SETS):
        items = setup.items(name, table.every)
        table.baseline(name, items)
        table.variant(name, items, EVERYWHERE, everywhere=True)
        table.variant(name, items, "state shuffled between samples", how="shuffled")
        table.variant(name, items, "fresh noise for the state", how="noise")
        for steps in STEPS:
            if steps != setup.steps:
                table.variant(name, items, f"{steps} step{'s' if steps > 1 else ''}", steps=steps)
        table.wrong_modality(name, items, "CT presented as MR")
        table.absences(name, items)
        table.changes(name)
    mr = setup.options.get("mr", "totalsegmentator_mr")
    if mr != "none":
        items = setup.items(mr, table.every)
        table.variant(mr, items, OWN)
        table.wrong_modality(mr, items, "MR presented as CT")
        table.changes(mr)
    return _result(table)


def _result(table: _Ablations) -> TableResult:
    setup, card = table.setup, table.engine.card
    rows, facts = _rows(table.records, setup.seed)
    sets = dict.fromkeys(name for name, _ in table.records)
    base = [r for name in sets for r in table.records.get((name, BASELINE)) or table.records[name, OWN]]
    refused = [f"{what}: {count}" for what, count in table.refused.items() if count]
    trained = (
        "; the MR example is one of the volumes that the bundled model was trained on"
        if "totalsegmentator_mr" in sets
        else ""
    )
    notes = [
        f"Model {card.model_id}, seed {setup.seed}, N = {table.number}, {setup.steps} steps unless said; "
        f"{thinned(table.every)}. n counts pairs of slice and target with at least 1 cm² labelled, and patients; figures "
        "are means of targets.",
        numbers(base)[:-1] + trained + ".",
        "State shuffled: at every step each sample's networks see the state of another one in its batch. Fresh noise: they "
        "see noise that nothing of the sampling has touched. Change of rank 1: against the model as it is, same pairs.",
        f"Image-only twin: {TWIN_IS}; no prompt, no sampling, one mask.",
        "Slices that could not be used with the wrong modality: " + ("; ".join(refused) or "none") + ".",
        "Intervals: 95 %, bootstrap over patients; sets of one patient have none.",
    ]
    absent_rows, absent_facts = _absent_rows(table.absent, setup.seed)
    absent = TableResult(
        "absent",
        "Prompts for organs that are labelled as absent",
        [
            f"N = {table.number}; the right answer is an empty mask. Shares are of slices (rank 1, twin) or of proposals.",
            "On slices of 5 mm, 10 cm² are 5 mL.",
        ],
        ["set", "target", "n", *ABSENT_FIGURES.values()],
        absent_rows,
        absent_facts,
    )
    also = (absent,) if absent_rows else ()
    return TableResult(NAME, TITLE, notes, ["set", "variant", "n", *FIGURES.values()], rows, facts, also)


def _rows(records: dict[tuple[str, str], list[Record]], seed: int) -> tuple[list[list[str]], dict[str, Any]]:
    rows: list[list[str]] = []
    facts: dict[str, Any] = {}
    last = None
    for (name, variant), chosen in records.items():
        if last not in (None, name):
            rows.append([])
        last = name
        found = {figure: interval(chosen, figure, seed) for figure in FIGURES}
        rows.append([name, variant, size(chosen), *[cell(value) for value in found.values()]])
        inner = facts.setdefault(name, {})[variant] = {}
        for _, target, inside in groups(chosen):
            inner[target] = {figure: fact(interval(inside, figure, seed)) for figure in FIGURES}
        inner[MEAN] = {figure: fact(value) for figure, value in found.items()}
    return rows, facts


def _absent_rows(records: Sequence[Record], seed: int) -> tuple[list[list[str]], dict[str, Any]]:
    rows: list[list[str]] = []
    facts: dict[str, Any] = {}
    for name, target, chosen in groups(records):
        found = {figure: interval(chosen, figure, seed) for figure in ABSENT_FIGURES}
        facts.setdefault(name, {})[target] = {figure: fact(value) for figure, value in found.items()}
        rows.append([name, target, size(chosen), *[cell(value, 2) for value in found.values()]])
    return rows, facts
