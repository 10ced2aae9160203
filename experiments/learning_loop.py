"""From real MR slices to an adapter and what it gives, with the commands that a team runs: curated set, adapt, evaluate.

Usage: python -m experiments.learning_loop DATA WORK [SET [CASES]], where DATA holds the slice set SET (kidney_mr by default,
or pancreas_mr). CASES patients (5) become a curated set that the bundled model is tuned on; all others become a second set,
which no training sees, and on which the model is measured with and without the adapter. Nothing that is trained on a
research set may be shipped.
"""

from __future__ import annotations

import json
import subprocess
import sys
import time
from collections.abc import Sequence
from pathlib import Path

import numpy as np

from experiments.shared_slices import load_shared
from progidiff.cards import load_card
from progidiff.curation import CuratedSet, NewCase
from progidiff.datasets.slices import LabelledSlice
from progidiff.evaluation.cases import as_volume
from progidiff.places import ADAPTER_CARD_NAME, default_model_folder

SEED = 0


def curate(folder: Path, items: Sequence[LabelledSlice]) -> None:
    """Save slices as training examples, as the module does, unless the folder holds a set already."""
    if CuratedSet.is_set(folder):
        return
    kept, card = CuratedSet(folder), load_card(default_model_folder())
    for item in items:
        image, affine = as_volume(item, card)
        masks = {target: item.labels[target][None] for target in sorted(item.labelled) if item.labels[target].any()}
        prompt = "; ".join(masks)
        kept.add(NewCase(image, affine, masks, item.modality, item.plane, prompt, edited=True, patient_key=item.patient))


def run(*arguments: str) -> None:
    """A command of the engine, as a user gives it."""
    print(f"$ progidiff {' '.join(arguments)}", flush=True)
    subprocess.run([sys.executable, "-m", "progidiff", *arguments], check=True)


def main(data: Path, work: Path, name: str, cases: int) -> None:
    """Make the sets, tune, measure, and print one line for each target."""
    items = load_shared(data, name)
    patients = sorted({item.patient for item in items})
    order = [patients[n] for n in np.random.default_rng(SEED).permutation(len(patients))]
    training = set(order[:cases])
    own, other, adapter = work / "cases", work / "test-cases", work / "adapter"
    curate(own, [item for item in items if item.patient in training])
    curate(other, [item for item in items if item.patient not in training])
    run("curate", "verify", str(own))
    began = time.monotonic()
    if not (adapter / ADAPTER_CARD_NAME).is_file():
        run("adapt", "--cases", str(own), "--out", str(adapter))
    print(f"adapt took {time.monotonic() - began:.0f} s")
    run("evaluate", "--data", str(other), "--out", str(work / "before"), "--no-pictures")
    # An adapter that was not shown to be better is measured all the same: that is what this is for.
    given = ["--adapter", str(adapter), "--even-if-worse"]
    run("evaluate", "--data", str(other), *given, "--out", str(work / "after"), "--no-pictures")
    before, after = (json.loads((work / side / "evaluation.json").read_text())["summary"] for side in ("before", "after"))
    for base, tuned in zip(before, after, strict=True):
        figures = "  ".join(
            f"{answer} {base['answers'][answer]['dice']['mean']:.3f} to {tuned['answers'][answer]['dice']['mean']:.3f}"
            for answer in ("rank1", "consensus", "best")
        )
        print(f"{base['target']}: {base['cases']} cases of {base['patients']} patients  {figures}")


if __name__ == "__main__":
    if not 3 <= len(sys.argv) <= 5:
        sys.exit(__doc__)
    chosen = sys.argv[3] if len(sys.argv) > 3 else "kidney_mr"
    main(Path(sys.argv[1]), Path(sys.argv[2]), chosen, int(sys.argv[4]) if len(sys.argv) > 4 else 5)
