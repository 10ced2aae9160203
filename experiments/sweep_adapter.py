"""The sweep that the defaults of ``progidiff adapt`` come from: learning rate, rank, layers and replay, on real MR slices.

Usage: python -m experiments.sweep_adapter DATA WORK [STEPS [SETS]], where DATA holds permissive/kidney_t2w_mr and
research/pancreas_t2w_mr, and SETS names one of kidney_mr,pancreas_mr or both. One setting is changed at a time. Five
patients are trained on, others measured; finished runs are kept in WORK/sweep.json, so an interrupted sweep goes on. Nothing
that is trained on the research set may be shipped: the weights stay in memory.
"""

from __future__ import annotations

import json
import sys
import tempfile
from collections.abc import Sequence
from dataclasses import asdict, replace
from pathlib import Path

from experiments.shared_slices import load_shared
from progidiff.datasets.slices import split_by_patient
from progidiff.evaluation.accuracy import score_slices, summarise
from progidiff.evaluation.cases import held_out_phantoms
from progidiff.model.folder import load_model
from progidiff.sampling.engine import Engine
from progidiff.training.run import Watch
from progidiff.training.stacks import stacks_of
from progidiff.training.tuning import TuneSettings, tune

SETS = ("pancreas_mr", "kidney_mr")
CASES, SEED, PROPOSALS, PHANTOMS = 5, 0, 6, 4
MIDDLE = TuneSettings(learning_rate=3e-3, rank=8, layers="all", replay_share=0.25, patience=None, seed=SEED)
VARIANTS: tuple[dict[str, object], ...] = (
    {},
    {"learning_rate": 1e-2},
    {"learning_rate": 1e-3},
    {"replay_share": 0.0},
    {"layers": "attention"},
    {"rank": 2},
    {"rank": 32},
)


def main(data: Path, work: Path, steps: int, sets: Sequence[str]) -> None:
    """Run what is missing, and print the table."""
    work.mkdir(parents=True, exist_ok=True)
    path = work / "sweep.json"
    found: dict[str, dict[str, float]] = json.loads(path.read_text()) if path.exists() else {}
    for change in (None, *VARIANTS):
        for name in sets:
            key = f"{name} {'base' if change is None else json.dumps(change)} {steps}"
            if key not in found:
                settings = None if change is None else replace(MIDDLE, steps=steps, **change)  # type: ignore[arg-type]
                found[key] = measure(data, name, settings)
                path.write_text(json.dumps(found, indent=1))
            row = "  ".join(f"{k} {v:.3f}" for k, v in found[key].items())
            print(f"{name:12s} {'base' if change is None else change or 'middle'}  {row}", flush=True)


def measure(data: Path, name: str, settings: TuneSettings | None) -> dict[str, float]:
    """Figures on the patients that are left after training on some, and on phantoms."""
    items = load_shared(data, name)
    training, test = split_by_patient([item.patient for item in items], 0.5, SEED)
    chosen = sorted(training)[:CASES]
    model = load_model()
    result: dict[str, float] = {}
    if settings is not None:
        stacks = stacks_of([item for item in items if item.patient in chosen])
        with tempfile.TemporaryDirectory() as folder:
            tuned = tune(model, stacks, [], Path(folder), settings, Watch(log=lambda line: None), items[0].modality)
        result["seconds"] = tuned.seconds
    engine = Engine(model)
    test_items = [item for item in items if item.patient in test]
    scores, _ = score_slices(engine, name, test_items, PROPOSALS, absent=False)
    row = summarise(scores)[0]
    kept, _ = score_slices(engine, "phantoms", held_out_phantoms(PHANTOMS), 2, absent=False)
    for figure in ("rank1", "ensemble", "best"):
        result[figure] = float(row[figure])  # type: ignore[arg-type]
    result["phantoms"] = sum(s.rank1 for s in kept) / len(kept)
    return result


if __name__ == "__main__":
    if not 3 <= len(sys.argv) <= 5:
        sys.exit(__doc__)
    print(json.dumps(asdict(MIDDLE)))
    chosen = sys.argv[4].split(",") if len(sys.argv) == 5 else SETS
    main(Path(sys.argv[1]), Path(sys.argv[2]), int(sys.argv[3]) if len(sys.argv) > 3 else 80, chosen)
