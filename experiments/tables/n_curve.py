"""How accuracy grows with the number of proposals, what ensembles make of them, and where adaptive sampling stops."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
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
from experiments.tables.records import MEAN, Record, cell, fact, groups, interval, numbers, size
from experiments.tables.setup import TableResult, TableSetup
from progidiff.evaluation.metrics import dice, proposal_scores
from progidiff.places import atomic_file
from progidiff.proposals.ranking import rank
from progidiff.proposals.votes import AdaptiveStopping, consensus, consensus_overlap, gram_matrix, majority, staple
from progidiff.sampling.engine import BLOCK, FEWEST

NAME = "n-curve"
TITLE = "Dice against the number of proposals N"
OPTIONS = {**SETS_OPTION, "every": "measure every n-th slice of each set (default 1)"}

#: Figure -> head of its column.
FIGURES = {
    "rand_top_3": "RandTop-3",
    "rank1": "rank 1",
    "best": "best of N",
    "mean": "mean",
    "probability": "mean probability",
    "consensus": "consensus",
    "majority": "majority",
    "medoid": "medoid",
    "staple": "STAPLE",
}
#: Where adaptive sampling stops, in the place of a number of proposals.
STOP = "adaptive"


def figures_at(
    samples: Samples, true_dice: Sequence[float], truth: np.ndarray, gram: np.ndarray, count: int
) -> dict[str, float]:
    """Every figure of the first ``count`` samples.

    Args:
        samples: all samples.
        true_dice: Dice of each with the truth.
        truth: bool (rows, columns).
        gram: Gram matrix of all samples.
        count: n; figures of the mean probability are NaN where it was not kept for n.
    """
    masks = samples.masks[:count]
    inner = gram[:count, :count]
    scores = proposal_scores(true_dice[:count], rank(inner), k=3)
    probability = samples.probabilities.get(count)
    medoid = rank(inner, "medoid").order[0]
    return {
        "rand_top_3": scores.rand_top_k,
        "rank1": scores.rank1,
        "best": scores.best,
        "mean": scores.mean,
        "probability": float("nan") if probability is None else dice(probability > 0.5, truth),
        "consensus": dice(consensus(masks), truth),
        "majority": dice(majority(masks), truth),
        "medoid": true_dice[medoid],
        "staple": dice(staple(masks), truth),
    }


def stopped_at(samples: Samples, gram: np.ndarray) -> int:
    """Where adaptive sampling with all samples as its maximum would have ended on this slice."""
    rule = AdaptiveStopping(block=BLOCK, minimum=min(FEWEST, samples.count), maximum=samples.count)
    count, before = 0, None
    while True:
        count += rule.next_block(count)
        after = consensus(samples.masks[:count])
        change = None if before is None else consensus_overlap(before, after).dice
        if rule.update(gram[:count, :count], change).stop:
            return count
        before = after


def measure(samples: Samples, truth: np.ndarray, counts: Sequence[int]) -> dict[str, float]:
    """Figures by ``"<n> <figure>"`` for each n, and ``"adaptive <figure>"`` with ``"adaptive n"``."""
    gram = gram_matrix(samples.masks)
    true_dice = [dice(mask, truth) for mask in samples.masks]
    values: dict[str, float] = {}
    for count in counts:
        values |= {f"{count} {k}": v for k, v in figures_at(samples, true_dice, truth, gram, count).items()}
    stop = stopped_at(samples, gram)
    values |= {f"{STOP} {k}": v for k, v in figures_at(samples, true_dice, truth, gram, stop).items()}
    values[f"{STOP} n"] = float(stop)
    values[f"{STOP} at maximum"] = float(stop == samples.count)
    return values


def run(setup: TableSetup) -> TableResult:
    """Measure every N on every set; also draws ``n-curve.png`` in the work folder."""
    engine = setup.engine()
    counts = kept_numbers(main_proposals(setup))
    every = setup.whole("every", 1, 1, 1000)
    records: list[Record] = []
    for name in setup.names("sets", SETS):
        items = setup.items(name, every)
        store = shared_store(setup, engine, name, items)
        for item, target, samples in pairs(store, items, engine.card.vocabulary):
            setup.progress(f"{name}: measuring {target}")
            records.append(Record(name, target, item.patient, measure(samples, item.labels[target], counts)))
    rows, facts = _rows(records, counts, setup.seed)
    draw(facts, counts, setup.work / f"{NAME}.png")
    notes = [
        f"Model {engine.card.model_id}, seed {setup.seed}, {setup.steps} steps, the first N of {counts[-1]} proposals; "
        f"{thinned(every)}; n counts pairs of slice and target with at least 1 cm² labelled, and patients.",
        numbers(records),
        "RandTop-3 is the expectation of a random pick among the three best by the reference (among all where N < 3). "
        "Rank 1 and the ensembles see no reference. Intervals: 95 %, bootstrap over patients; one patient has none.",
        f"adaptive: blocks of {BLOCK} from {FEWEST} on, at most {counts[-1]}, judged on each slice by itself; N is the mean "
        "number at which it stops. The mean probability is not kept at every such number.",
    ]
    return TableResult(NAME, TITLE, notes, ["set", "target", "n", "N", *FIGURES.values()], rows, facts)


def _rows(records: Sequence[Record], counts: Sequence[int], seed: int) -> tuple[list[list[str]], dict[str, Any]]:
    rows: list[list[str]] = []
    facts: dict[str, Any] = {}
    for name, target, chosen in groups(records):
        inner = facts.setdefault(name, {})[target] = {}
        for count in [*map(str, counts), STOP]:
            found = {figure: interval(chosen, f"{count} {figure}", seed) for figure in FIGURES}
            inner[count] = {figure: fact(value) for figure, value in found.items()}
            label = count
            if count == STOP:
                stop, most = (interval(chosen, f"{count} {what}", seed) for what in ("n", "at maximum"))
                inner[count] |= {"n": fact(stop), "at_maximum": fact(most)}
                label = f"{STOP}: {cell(stop, 1)}; {most.mean:.0%} at {counts[-1]}"
                if found["probability"].values < len(chosen):  # known for some slices only: no mean of all
                    found["probability"] = interval([], "")
            rows.append([name, target, size(chosen), label, *[cell(found[figure]) for figure in FIGURES]])
        rows.append([])
    return rows, facts


def draw(facts: dict[str, Any], counts: Sequence[int], path: Path) -> None:
    """Curves of the mean of targets (or of the only target), one panel per set, with adaptive stopping as open marks."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    styles = {
        "best": ("best of N", "#7f7f7f", "--"),
        "rand_top_3": ("RandTop-3 (with reference)", "#1f77b4", "-"),
        "rank1": ("rank 1 (no reference)", "#d62728", "-"),
        "consensus": ("consensus (no reference)", "#ff7f0e", "-"),
        "probability": ("mean probability", "#2ca02c", "-"),
        "staple": ("STAPLE", "#9467bd", ":"),
        "mean": ("mean proposal", "#8c564b", ":"),
    }
    figure = Figure(figsize=(4.2 * max(len(facts), 1), 3.4), dpi=90, layout="constrained")
    FigureCanvasAgg(figure)
    for place, (name, targets) in enumerate(facts.items(), 1):
        axes = figure.add_subplot(1, len(facts), place)
        curve = targets.get(MEAN) or next(iter(targets.values()))
        for key, (label, colour, line) in styles.items():
            axes.plot(counts, [curve[str(n)][key]["mean"] for n in counts], line, color=colour, label=label, marker=".")
        stop = curve[STOP]
        for key in ("rand_top_3", "rank1", "consensus"):
            axes.plot(stop["n"]["mean"], stop[key]["mean"], "o", color=styles[key][1], markerfacecolor="white")
        axes.set_xscale("log")
        axes.set_xticks(list(counts), [str(n) for n in counts])
        axes.minorticks_off()
        axes.set_xlabel("proposals N (open: adaptive)", fontsize=8)
        axes.set_ylabel("Dice, mean of targets")
        patients = curve[str(counts[-1])]["rank1"]["patients"]
        axes.set_title(f"{name}, {patients} patient{'s' if patients != 1 else ''}", fontsize=10)
        axes.grid(alpha=0.3)
        if place == 1:
            axes.legend(fontsize=7)
    with atomic_file(path) as staged:
        figure.savefig(staged)
