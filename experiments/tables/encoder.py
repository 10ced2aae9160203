"""What the custom image encoder is worth: the same control branch trained with it and with ControlNet's stock hint block."""

from __future__ import annotations

import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch

from experiments.matched import (
    FIGURES,
    digest,
    empty_folder,
    load_trained,
    one_thread,
    records_of,
    remembered,
    save_trained,
)
from experiments.samples import SampleSettings, SampleStore, propose_into
from experiments.stock_hint import StockHint
from experiments.tables.records import Record, cell, fact, groups, interval, numbers, size
from experiments.tables.setup import TableResult, TableSetup
from progidiff.datasets.slices import LabelledSlice, present_targets
from progidiff.model.folder import ProGiDiffModel, load_model
from progidiff.model.networks import ImageEncoder, tokenize
from progidiff.sampling.engine import Engine, weights_key
from progidiff.synthesis.labelmaps import load_permissive
from progidiff.training import small
from progidiff.training.batches import BatchSource, painted_batches
from progidiff.training.diffusion import ControlStage
from progidiff.training.loop import LoopSettings, Stage, run_stage
from progidiff.training.stages import EncoderStage

NAME = "encoder"
TITLE = "Custom image encoder against ControlNet's stock hint block"
ARMS = {
    "stock": "stock hint block",
    "custom": "custom image encoder",
    "pretrained": "custom image encoder, pre-trained as a segmenter",
}
OPTIONS = {
    "minutes": "CPU minutes of training per arm and seed (default 10)",
    "seeds": "number of seeds, counted from --seed (default 1)",
    "arms": f"arms to measure, separated by commas, of {','.join(ARMS)} (default stock,custom)",
    "every": "measure every n-th slice of CURVAS; AMOS is measured whole (default 2)",
}
PROPOSALS = 8
SETS = ("curvas", "amos")
SHOWN = ("rank1", "mean", "best")
#: Share of the budget that the arm with pre-training spends on it, about that of the bundled model's recipe.
_FIRST_SHARE = 0.25
#: Images per step and peak learning rate, as in the bundled model's recipe.
_CONTROL, _ENCODER = (4, 8e-4), (8, 1.5e-3)
_UNLIMITED = 10**6

Counter = Callable[[str, dict[str, float]], None]


def fresh_arm(model: ProGiDiffModel, arm: str, seed: int) -> None:
    """Give a loaded model a fresh control branch (a copy of the backbone with zero convolutions) and a fresh encoder."""
    config = model.image_encoder.config
    model.controlnet = small.make_control(model.unet).to(model.device)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        if arm == "stock":
            encoder: Any = StockHint(config.in_channels, config.stride, config.hint_channels)
        else:
            classes = len(model.card.vocabulary) if arm == "pretrained" else 0
            encoder = ImageEncoder.from_config({**config, "classes": classes})
    model.image_encoder = encoder.to(model.device)


def train_arm(
    model: ProGiDiffModel, arm: str, source: BatchSource, seconds: float, seed: int, work: Path
) -> dict[str, float]:
    """Train a fresh arm in place for a CPU time; steps, and CPU seconds as measured.

    All arms have the diffusion losses alone, except ``"pretrained"``, whose encoder learns to segment first and, as in the
    bundled model's recipe, goes on segmenting beside the control branch.
    """
    steps: dict[str, float] = {}
    began = time.process_time()
    weight = 0.5 if arm == "pretrained" else 0.0
    if weight:
        first = EncoderStage(model.image_encoder, source, [])
        steps["first"] = _run(first, _ENCODER, seconds * _FIRST_SHARE, seed, empty_folder(work / "first"))
        seconds -= time.process_time() - began
    card = model.card
    stage = ControlStage(
        model.controlnet,
        model.image_encoder,
        vae=model.vae,
        unet=model.unet,
        decoder=model.mask_decoder,
        schedule=model.scheduler,
        tokens=tokenize(model.tokenizer, [card.prompt(t) for t in card.vocabulary], model.device),
        text_encoder=model.text_encoder,
        latent_shift=card.latent_shift,
        latent_scale=card.latent_scale,
        source=source,
        validation=[],
        prompts_per_image=4,
        segmentation_weight=weight,
        hint_weight=weight,
    )
    steps["control"] = _run(stage, _CONTROL, seconds, seed, empty_folder(work / "control"))
    stage.trainable.requires_grad_(False).eval()
    return {**steps, "cpu_seconds": time.process_time() - began}


def _run(stage: Stage, rate: tuple[int, float], seconds: float, seed: int, work: Path) -> float:
    done = [0.0]

    def count(event: str, figures: dict[str, float]) -> None:
        done[0] = max(done[0], figures["step"])

    settings = LoopSettings(
        steps=_UNLIMITED,
        images=rate[0],
        learning_rate=rate[1],
        checkpoint_every=_UNLIMITED,
        validate_every=_UNLIMITED,
        log_every=_UNLIMITED,
        seed=seed,
        cpu_seconds=seconds,
    )
    run_stage(stage, settings, work, lambda line: None, observe=count)
    return done[0]


def _samples(setup: TableSetup, arm: str, seed: int, seconds: float, every: int) -> tuple[list[Record], dict[str, float]]:
    """Records of one arm and seed, and how it was trained; whatever the work folder holds is taken from there."""
    model = load_model(setup.model)
    base = weights_key(Engine(model))
    count = setup.proposals or PROPOSALS
    key = digest(base, NAME, arm, seed, seconds)
    folder = setup.work / NAME / key
    fresh_arm(model, arm, seed)
    parameters = {"encoder_parameters": sum(p.numel() for p in model.image_encoder.parameters())}

    def train() -> dict[str, float]:
        setup.progress(f"training {ARMS[arm]}, {seconds / 60:.0f} CPU min")
        card = model.card
        source = painted_batches(load_permissive(setup.data), card, "cpu", 4 + seed)
        with one_thread():
            how = train_arm(model, arm, source, seconds, seed, folder)
        save_trained(model, folder / "trained.safetensors")
        return {**how, **parameters}

    weights, about = folder / "trained.safetensors", folder / "about.json"
    if not load_trained(model, weights):
        about.unlink(missing_ok=True)
    how = remembered(about, train)
    engine, records = Engine(model), []

    def targets(item: LabelledSlice) -> list[str]:
        return present_targets(item, engine.card.vocabulary)

    for name in SETS:
        items = setup.items(name, every if name == "curvas" else 1)
        store = SampleStore(setup.work, SampleSettings(name, key, count, setup.steps, setup.seed, everywhere=True))
        propose_into(store, engine, items, targets, progress=setup.counted(f"{ARMS[arm]} on {name}", len(items)))
        records += records_of(store, name, items, targets)
    return records, how


def run(setup: TableSetup) -> TableResult:
    """Train what is missing, sample what is missing, and compare."""
    minutes = setup.number("minutes", 10, 0.01, 1e4)
    seeds = [setup.seed + i for i in range(setup.whole("seeds", 1, 1, 100))]
    arms = [arm for arm in setup.names("arms", ("stock", "custom")) if arm in ARMS]
    every = setup.whole("every", 2, 1, 1000)
    found: dict[str, list[Record]] = {}
    trained: dict[str, list[dict[str, float]]] = {}
    for seed in seeds:
        for arm in arms:
            records, how = _samples(setup, arm, seed, minutes * 60, every)
            found.setdefault(arm, []).extend(records)
            trained.setdefault(arm, []).append(how)
    rows, facts = _rows(found, setup.seed)
    notes = [
        f"Each arm: {minutes:g} CPU minutes in one thread, {len(seeds)} seed{'s' if len(seeds) > 1 else ''}, the same frozen"
        " backbone, a fresh control branch copied from it, the same synthetic pictures in the same order, the same losses."
        " Proposals are drawn everywhere, for every arm.",
        *[_describe(arm, trained[arm]) for arm in arms],
        f"N = {setup.proposals or PROPOSALS}, {setup.steps} steps; every {every}. slice of CURVAS. n counts pairs of slice"
        " and target (once per seed), and patients. " + numbers(next(iter(found.values()), [])),
        "Rank 1 sees no reference. Intervals: 95 %, bootstrap over patients; AMOS is one patient and has none. The paper"
        " gives 70.72 and 75.03 per cent average Dice for the two, with Stable Diffusion's networks and its own data.",
    ]
    facts = {"arms": facts, "training": trained, "minutes": minutes, "seeds": seeds}
    return TableResult(NAME, TITLE, notes, ["set", "target", "n", "arm", *[FIGURES[f] for f in SHOWN]], rows, facts)


def _describe(arm: str, trained: list[dict[str, float]]) -> str:
    steps = ", ".join(f"{how['control']:.0f}" for how in trained)
    before = ", ".join(f"{how['first']:.0f}" for how in trained if "first" in how)
    first = f" after {before} of pre-training" if before else ""
    return f"{ARMS[arm]}: {trained[0]['encoder_parameters'] / 1e6:.2f} million parameters; control steps {steps}{first}."


def _rows(found: dict[str, list[Record]], seed: int) -> tuple[list[list[str]], dict[str, Any]]:
    rows: list[list[str]] = []
    facts: dict[str, Any] = {}
    grouped = {arm: {(name, target): chosen for name, target, chosen in groups(records)} for arm, records in found.items()}
    for key in next(iter(grouped.values()), {}):
        for arm, inside in grouped.items():
            values = {figure: interval(inside[key], figure, seed) for figure in SHOWN}
            facts.setdefault(arm, {}).setdefault(key[0], {})[key[1]] = {f: fact(v) for f, v in values.items()}
            rows.append([*key, size(inside[key]), ARMS[arm], *[cell(values[figure]) for figure in SHOWN]])
        rows.append([])
    return rows, facts
