"""What real labels give: the control stage goes on with CURVAS patients and is measured on other CURVAS patients.

Usage: python -m experiments.research_ct DATA WORK [STEPS], where DATA holds research/curvas_ct_multirater.

The set is licensed for non-commercial use (CC BY-NC): this measures, and nothing that it trains may be shipped. Weights
stay in memory; WORK gets checkpoints and curves, to be deleted afterwards.
"""

from __future__ import annotations

import sys
from pathlib import Path

import torch

from experiments.shared_slices import load_shared
from progidiff.datasets.slices import LabelledSlice, split_by_patient
from progidiff.evaluation.accuracy import FIGURES, score_slices, summarise
from progidiff.model.folder import load_model
from progidiff.model.networks import tokenize
from progidiff.sampling.engine import Engine
from progidiff.training.batches import DatasetBatches
from progidiff.training.diffusion import ControlStage
from progidiff.training.loop import LoopSettings, run_stage
from progidiff.training.stacks import stacks_of

SEED = 0


def main(data: Path, work: Path, steps: int) -> None:
    """Measure the bundled model on held-out patients, train on the others, measure again."""
    items = load_shared(data, "curvas")
    training, held_out = split_by_patient(sorted({item.patient for item in items}), 0.3, SEED)
    test = [item for item in items if item.patient in held_out]
    model = load_model()
    print(f"training: {len(items) - len(test)} slices of {len(training)} patients; held out: {len(test)} of {len(held_out)}")
    report("bundled model, zero-shot", Engine(model), test)

    card = model.card
    tokens = tokenize(model.tokenizer, [card.prompt(t) for t in card.vocabulary], model.device)
    stacks = stacks_of([item for item in items if item.patient in training])
    stage = ControlStage(
        model.controlnet,
        model.image_encoder,
        vae=model.vae,
        unet=model.unet,
        decoder=model.mask_decoder,
        schedule=model.scheduler,
        tokens=tokens,
        text_encoder=model.text_encoder,
        latent_shift=card.latent_shift,
        latent_scale=card.latent_scale,
        source=DatasetBatches(stacks, card, seed=SEED),
        validation=[],
        prompts_per_image=4,
    )
    torch.manual_seed(SEED)
    settings = LoopSettings(steps, 4, 3e-4, validate_every=10**9, seed=SEED)
    run_stage(stage, settings, work, lambda line: print(line, flush=True))
    report(f"after {steps} steps on real labels", Engine(model), test)


def report(title: str, engine: Engine, items: list[LabelledSlice]) -> None:
    """Print one line per target."""
    scores, _ = score_slices(engine, "curvas", items, absent=False)
    print(title)
    for row in summarise(scores):
        figures = "  ".join(f"{name} {row[name]:.3f}" for name in FIGURES if name != "twin")
        print(f"  {row['target']:10s} slices {row['slices']:3d} patients {row['patients']:2d}  {figures}")


if __name__ == "__main__":
    if len(sys.argv) not in (3, 4):
        sys.exit(__doc__)
    main(Path(sys.argv[1]), Path(sys.argv[2]), int(sys.argv[3]) if len(sys.argv) == 4 else 300)
