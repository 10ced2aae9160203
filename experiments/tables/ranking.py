"""How well the order without a reference agrees with the order by true Dice, and what that costs."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np

from experiments.samples import Samples
from experiments.tables.proposals import (
    SETS,
    SETS_OPTION,
    kept_numbers,
    main_proposals,
    pairs,
    shared_store,
    thinned,
)
from experiments.tables.records import Record, cell, fact, groups, interval, numbers, size
from experiments.tables.setup import TableResult, TableSetup
from progidiff.evaluation.metrics import dice, proposal_scores
from progidiff.proposals.ranking import rank
from progidiff.proposals.votes import gram_matrix
from progidiff.wire.request import RankingMethod

NAME = "ranking"
TITLE = "Ranking without a reference against true Dice"
OPTIONS = {**SETS_OPTION, "every": "measure every n-th slice of each set (default 1)"}
METHODS: tuple[RankingMethod, ...] = ("soft_dice", "medoid")
FIGURES = {
    "spearman": "Spearman",
    "regret": "regret of rank 1",
    "random": "regret of a random pick",
    "recovered": "share recovered",
    "shortlist_best": "regret of the best of 3 shown",
}


def measure(samples: Samples, truth: np.ndarray, method: RankingMethod) -> dict[str, float]:
    """Figures of one ranking.

    Returns:
        ``spearman``: of score and Dice. ``regret``: Dice of the best proposal less that of the first-ranked one.
        ``random``: the same for a random proposal, in expectation. ``shortlist_best``: the same for the best of the three
        that are shown first, which a reader may choose.
    """
    true_dice = [dice(mask, truth) for mask in samples.masks]
    ranking = rank(gram_matrix(samples.masks), method)
    scores = proposal_scores(true_dice, ranking, k=3)
    return {
        "spearman": scores.spearman,
        "regret": scores.regret,
        "random": scores.best - scores.mean,
        "shortlist_best": scores.best - max(true_dice[i] for i in ranking.order[:3]),
    }


def run(setup: TableSetup) -> TableResult:
    """Measure both rankings on the shared proposals, with all of them and with the first 10."""
    engine = setup.engine()
    most = main_proposals(setup)
    counts = [n for n in kept_numbers(most) if n in (10, most) and n > 1]
    every = setup.whole("every", 1, 1, 1000)
    records: dict[tuple[int, RankingMethod], list[Record]] = {(n, m): [] for n in counts for m in METHODS}
    for name in setup.names("sets", SETS):
        items = setup.items(name, every)
        store = shared_store(setup, engine, name, items)
        for item, target, samples in pairs(store, items, engine.card.vocabulary):
            setup.progress(f"{name}: measuring {target}")
            for count, method in records:
                values = measure(samples.first(count), item.labels[target], method)
                records[count, method].append(Record(name, target, item.patient, values))
    rows, facts = _rows(records, setup.seed)
    first = next(iter(records.values()), [])
    notes = [
        f"Model {engine.card.model_id}, seed {setup.seed}, {setup.steps} steps; {thinned(every)}; n counts pairs of slice "
        "and target with at least 1 cm² labelled, and patients.",
        numbers(first),
        "Regret: Dice of the best of the N proposals by the reference (the oracle), less that of the proposal in question. "
        "Share recovered: how much of a random pick's mean regret the ranking takes away (1 would be the oracle).",
        "Spearman: rank correlation of score and true Dice over the N proposals of a pair, then the mean; pairs where one "
        "side is constant have none. Intervals: 95 %, bootstrap over patients; a set of one patient has none.",
    ]
    return TableResult(NAME, TITLE, notes, ["set", "target", "n", "N", "ranking", *FIGURES.values()], rows, facts)


def recovered(records: Sequence[Record], seed: int) -> float:
    """Share of a random pick's mean regret that the ranking takes away; NaN where a random pick loses nothing."""
    random, regret = interval(records, "random", seed).mean, interval(records, "regret", seed).mean
    return 1 - regret / random if random > 0 else float("nan")


def _rows(records: dict[tuple[int, RankingMethod], list[Record]], seed: int) -> tuple[list[list[str]], dict[str, Any]]:
    rows: list[list[str]] = []
    facts: dict[str, Any] = {}
    grouped = {key: groups(chosen) for key, chosen in records.items()}
    for place, (name, target, _) in enumerate(next(iter(grouped.values()), [])):
        for (count, method), found in grouped.items():
            chosen = found[place][2]
            values = {f: interval(chosen, f, seed) for f in ("spearman", "regret", "random", "shortlist_best")}
            share = recovered(chosen, seed)
            inner = facts.setdefault(name, {}).setdefault(target, {})
            inner[f"{count} {method}"] = {**{f: fact(v) for f, v in values.items()}, "recovered": share}
            cells = [f"{share:.2f}" if f == "recovered" else cell(values[f]) for f in FIGURES]
            rows.append([name, target, size(chosen), str(count), method, *cells])
        rows.append([])
    return rows, facts
