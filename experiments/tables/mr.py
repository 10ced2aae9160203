"""From CT to MR with few cases: LoRA, full fine-tuning, training from scratch and a U-Net, for the same CPU time."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import numpy as np

from experiments.matched import UNET_OPTIONS, remembered
from experiments.tables.setup import TableResult, TableSetup
from experiments.tables.twins import TWIN_IS, TWIN_TUNED, UNET_TUNED
from experiments.transfer import (
    DEFAULT_METHODS,
    METHODS,
    RETENTION_EVERY,
    RETENTION_PROPOSALS,
    SETS,
    Run,
    Scores,
    Transfer,
)

NAME = "mr"
TITLE = "From CT to MR with few cases, all methods trained for the same CPU time"
OPTIONS = {
    "seconds": "CPU seconds of training per run (default 20)",
    "draws": "random draws of training and test patients (default 3)",
    "sizes": "numbers of training cases, separated by commas (default 1,2,5,10)",
    "sets": f"sets, separated by commas (default {','.join(SETS)})",
    "methods": f"of {', '.join(METHODS)}, separated by commas (default {','.join(DEFAULT_METHODS)})",
    "retention": "numbers of cases after which the CT accuracy is measured again (default the smallest and the largest)",
    "print-only": "1 prints what the work folder holds, without further runs",
    **UNET_OPTIONS,
}


def run(setup: TableSetup) -> TableResult:
    """Measure what is missing, run by run; each result is kept at once."""
    transfer = Transfer(setup)
    print_only = setup.whole("print-only", 0, 0, 1) == 1
    runs = transfer.runs()
    results: list[dict[str, Any]] = []
    for place, one in enumerate(runs):
        path = setup.work / NAME / f"{transfer.key(one)}.json"
        if print_only and not path.is_file():
            continue
        cases = f"{one.size} case{'s' if one.size > 1 else ''}"
        setup.progress(f"run {place + 1} of {len(runs)}: {METHODS[one.method]}, {one.set}, {cases}, draw {one.draw + 1}")
        results.append(remembered(path, _measuring(transfer, one)))
    return table(transfer, results, len(runs))


def _measuring(transfer: Transfer, one: Run) -> Callable[[], dict[str, Any]]:
    return lambda: transfer.measure(one)


def table(transfer: Transfer, results: Sequence[dict[str, Any]], wanted: int) -> TableResult:
    """The table of the results there are."""
    rows: list[list[str]] = []
    facts: dict[str, Any] = {"runs": [{k: v for k, v in r.items() if k != "test"} | means(r["test"]) for r in results]}
    for name in transfer.sets:
        zero = _zero_row(transfer, name)
        facts.setdefault("zero_shot", {})[name] = zero
        rows.append([SETS.get(name, name), "0", "zero-shot", str(transfer.draws), *_cells(zero), "–"])
        for size in transfer.sizes:
            for method in transfer.methods:
                chosen = [r for r in results if (r["set"], r["size"], r["method"]) == (name, size, method)]
                if chosen:
                    kept = [r["ct"] for r in chosen if "ct" in r]
                    cells = _cells([means(r["test"]) for r in chosen])
                    rows.append([SETS.get(name, name), str(size), METHODS[method], str(len(chosen)), *cells, _spread(kept)])
        rows.append([])
    before = transfer.ct_before()
    facts["ct_before"] = before
    header = ["set", "cases", "method", "draws", "rank 1", f"best of {transfer.proposals}", "CT afterwards"]
    return TableResult(NAME, TITLE, _notes(transfer, results, wanted, before), header, rows, facts)


def means(scores: Scores) -> dict[str, float]:
    """Mean Dice over test slices."""
    return {figure: float(np.mean([s[figure] for s in scores])) for figure in ("rank1", "best")}


def _zero_row(transfer: Transfer, name: str) -> list[dict[str, float]]:
    """The untouched model on each draw's test patients."""
    scores, places = transfer.zero_shot(name), transfer.places(name)
    tests = [{places[p] for p in transfer.draw(name, draw).test} for draw in range(transfer.draws)]
    return [means([s for s in scores if s["patient"] in test]) for test in tests]


def _cells(found: Sequence[dict[str, float]]) -> list[str]:
    return [_spread([one[figure] for one in found]) for figure in ("rank1", "best")]


def _spread(values: Sequence[float]) -> str:
    """Mean, and the lowest and highest of the draws."""
    if not values:
        return "–"
    mean = f"{np.mean(values):.3f}"
    return mean if len(values) == 1 else f"{mean} ({min(values):.3f}-{max(values):.3f})"


def _notes(transfer: Transfer, results: Sequence[dict[str, Any]], wanted: int, before: dict[str, float]) -> list[str]:
    setup, notes = transfer.setup, []
    if len(results) < wanted:
        done = f"{len(results)} of {wanted} runs are done"
        notes.append(f"Unfinished: {done}; the column draws says how many each row rests on.")
    for name in transfer.sets:
        drawn = [transfer.draw(name, draw).test for draw in range(transfer.draws)]
        tests = [[item for item in transfer.items[name] if item.patient in test] for test in drawn]
        slices, patients = [len(t) for t in tests], [len({i.patient for i in t}) for t in tests]
        notes.append(
            f"{SETS.get(name, name)}: {len(transfer.items[name])} slices of {len(transfer.places(name))} patients (by the"
            f" number in their file names); tested per draw on {_range(slices)} slices of {_range(patients)} patients that"
            " are in no training. A case is a patient, with one or two slices."
        )
    seen = {m: [r["images"] for r in results if r["method"] == m] for m in transfer.methods}
    pictures = "; ".join(f"{METHODS[m]} {_range(values)}" for m, values in seen.items() if values)
    notes += [
        f"{transfer.seconds:g} CPU seconds in one thread per run, the last weights, no validation patients; seed"
        f" {setup.seed}. Pictures seen: {pictures}. A share of {transfer.replay:.0%} of them are synthetic phantoms, for"
        " every method.",
        f"Dice over the test slices, mean over draws (lowest-highest draw). Rank 1 of {transfer.proposals} proposals in"
        f" {setup.steps} steps; for U-Nets and the twin the plain mask, and the best of as many samples (U-Nets: Monte-Carlo"
        " dropout; twin: test-time augmentation).",
    ]
    if UNET_TUNED in transfer.methods:
        notes.append(f"The U-Net's pre-training: {transfer.pretrained.unet[2]}.")
    if TWIN_TUNED in transfer.methods:
        notes.append(f"Image-only twin: {TWIN_IS}.")
    known = {"model": "model", **METHODS}
    notes.append(
        f"CT afterwards: rank 1 of {RETENTION_PROPOSALS} (others: plain mask) on every {RETENTION_EVERY}th CURVAS slice,"
        f" mean of targets. Before: {', '.join(f'{known[what]} {value:.3f}' for what, value in before.items())}."
    )
    return notes


def _range(values: Sequence[int]) -> str:
    return f"{min(values)}" if min(values) == max(values) else f"{min(values)}-{max(values)}"
