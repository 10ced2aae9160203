"""CT per organ on patients that no training saw: the tuned model against a U-Net, in patient-level cross-validation."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from experiments.matched import (
    FIGURES,
    UNET_OPTIONS,
    digest,
    empty_folder,
    fold_lora_in,
    load_trained,
    one_thread,
    only,
    patient_folds,
    records_of,
    remembered,
    save_trained,
    tune_unet,
)
from experiments.samples import SampleSettings, SampleStore, propose_into
from experiments.tables.proposals import MAIN
from experiments.tables.records import Record, cell, fact, groups, interval, numbers, size
from experiments.tables.setup import TableResult, TableSetup
from experiments.tables.twins import TWIN_IS, TWIN_TUNED, UNET_TUNED, Pretrained
from experiments.unet import mc_dropout_samples, sample_unet_into, tta_samples
from progidiff.datasets.slices import LabelledSlice, present_targets
from progidiff.model.folder import load_model
from progidiff.sampling.engine import Engine, weights_key
from progidiff.training.run import Watch
from progidiff.training.stacks import stacks_of
from progidiff.training.tuning import TuneSettings, tune

NAME = "cross-validation"
TITLE = "CT per organ: 3-fold cross-validation by patient on CURVAS"
SET = "curvas"
FOLDS = 3
DIFFUSION = {"zero-shot": "bundled model, zero-shot", "full": "ProGiDiff, tuned", "lora": "ProGiDiff, LoRA"}
TWIN = "image-only twin, zero-shot, test-time augmentation"
UNETS = {
    "unet": "U-Net from scratch",
    UNET_TUNED: "U-Net, pre-trained, then tuned",
    TWIN_TUNED: "image-only twin, tuned",
}
SAMPLERS = {"mc-dropout": ("MC dropout", mc_dropout_samples), "tta": ("test-time augmentation", tta_samples)}
DEFAULT_METHODS = ("zero-shot", "full", "unet", UNET_TUNED, TWIN_TUNED)
PROPOSALS = 16
OPTIONS = {
    "seconds": "CPU seconds of training per fold and method (default 120)",
    "methods": f"of {', '.join([*DIFFUSION, *UNETS])}, separated by commas (default {','.join(DEFAULT_METHODS)})",
    "every": "measure (and train on) every n-th slice (default 1)",
    **UNET_OPTIONS,
}


def samplers(method: str) -> list[str]:
    """Ways of sampling a network that has one mask; the twin has no dropout to leave on."""
    return ["tta"] if method == TWIN_TUNED else list(SAMPLERS)


class CrossValidation:
    """What the methods share: slices, folds, budget.

    Args:
        setup: data, work folder and options.
    """

    def __init__(self, setup: TableSetup) -> None:
        self.setup = setup
        self.seconds = setup.number("seconds", 120, 0.01, 1e6)
        self.every = setup.whole("every", 1, 1, 1000)
        self.count = setup.proposals or PROPOSALS
        self.model = load_model(setup.model)
        self.card = self.model.card
        self.pretrained = Pretrained(setup, self.model)
        self.base = weights_key(Engine(self.model))
        self.items = setup.items(SET, self.every)
        self.folds = patient_folds([item.patient for item in self.items], FOLDS, setup.seed)
        self.replay = TuneSettings().replay_share

    def divided(self, fold: int) -> tuple[list[LabelledSlice], list[LabelledSlice]]:
        """Slices to train on and held-out slices; no patient is in both."""
        held = self.folds[fold]
        return [i for i in self.items if i.patient not in held], [i for i in self.items if i.patient in held]

    def targets(self, item: LabelledSlice) -> list[str]:
        """Targets that are measured on a slice."""
        return present_targets(item, self.card.vocabulary)

    def key(self, method: str) -> str:
        """Key of a method's weights over all folds."""
        if method == "zero-shot":
            return self.base
        start = self.pretrained.start_of(method)[1]
        return digest(NAME, self.base, start, method, self.seconds, self.setup.seed, self.every, self.replay)

    def store(self, method: str, sampler: str = "") -> SampleStore:
        """Out-of-fold samples of a method: those of each slice come from the fold in which its patient was held out."""
        steps = 0 if sampler else self.setup.steps
        return SampleStore(
            self.setup.work, SampleSettings(SET, self.key(method), self.count, steps, self.setup.seed, sampler)
        )

    def missing(self, store: SampleStore, items: Sequence[LabelledSlice]) -> bool:
        """Whether a store lacks samples of some of the slices."""
        return any(not store.has(item.slice_id, target) for item in items for target in self.targets(item))

    def zero_shot(self) -> list[Record]:
        """Figures of the model as it is; of the first samples that other tables share, where they are all there."""
        engine, own = Engine(self.model), self.store("zero-shot")
        shared = self.setup.store(engine, SET, MAIN)
        if self.count < MAIN and self.missing(own, self.items) and not self.missing(shared, self.items):
            return records_of(shared, SET, self.items, self.targets, self.count)
        self._propose(engine, own, self.items, DIFFUSION["zero-shot"])
        return self.records(own)

    def twin_records(self) -> list[Record]:
        """Figures of the twin's test-time augmentation; none without a twin."""
        given = self.pretrained.twin
        if given is None:
            return []
        store = SampleStore(self.setup.work, SampleSettings(SET, f"twin {given[1]}", self.count, 0, self.setup.seed, "tta"))
        told = self.setup.counted(TWIN, len(self.items))
        sample_unet_into(store, given[0], self.card, self.items, self.targets, tta_samples, told)
        return self.records(store)

    def _propose(self, engine: Engine, store: SampleStore, items: Sequence[LabelledSlice], what: str) -> None:
        propose_into(store, engine, items, self.targets, progress=self.setup.counted(what, len(items)))

    def diffusion(self, method: str, fold: int) -> dict[str, float]:
        """Tune on a fold's patients and sample the held-out ones; pictures seen in training."""
        training, held = self.divided(fold)
        store = self.store(method)
        folder = self.setup.work / NAME / f"{self.key(method)}-{fold}"
        model, what = load_model(self.setup.model), f"{DIFFUSION[method]}, fold {fold + 1}"

        def train() -> dict[str, float]:
            self.setup.progress(f"{what}: training, {self.seconds:g} CPU s")
            settings = TuneSettings(
                method=method,  # type: ignore[arg-type]
                cpu_seconds=self.seconds,
                patience=None,
                seed=self.setup.seed + fold,
            )
            with one_thread():
                watch = Watch(log=lambda line: None)
                tuned = tune(model, stacks_of(training), [], empty_folder(folder), settings, watch, "CT")
            if method == "lora":
                fold_lora_in(model)
            save_trained(model, folder / "trained.safetensors")
            return {"images": tuned.steps * settings.images}

        about = folder / "about.json"
        if not load_trained(model, folder / "trained.safetensors"):
            about.unlink(missing_ok=True)
        how = remembered(about, train)
        if self.missing(store, held):
            self._propose(Engine(model), store, held, what)
        return how

    def unet(self, method: str, fold: int) -> dict[str, float]:
        """Train a U-Net on a fold's patients and draw its samples of the held-out ones; pictures seen in training."""
        training, held = self.divided(fold)
        folder = self.setup.work / NAME / f"{self.key(method)}-{fold}"
        start, _ = self.pretrained.start_of(method)
        what = f"{UNETS[method]}, fold {fold + 1}"
        self.setup.progress(f"{what}: training, {self.seconds:g} CPU s")
        seed = self.setup.seed + fold
        with one_thread():
            network, images = tune_unet(stacks_of(training), self.card, self.seconds, seed, folder, start)
        known = [t for t in self.card.vocabulary if any(t in self.targets(item) for item in held)]
        small, card = only(network, self.card, known)
        for sampler in samplers(method):
            draw, store = SAMPLERS[sampler][1], self.store(method, sampler)
            if self.missing(store, held):
                progress = self.setup.counted(f"{what}, {sampler}", len(held))
                sample_unet_into(store, small, card, held, self.targets, draw, progress)
        return {"images": images}

    def records(self, store: SampleStore) -> list[Record]:
        """Figures of a method on all slices."""
        return records_of(store, SET, self.items, self.targets)


def out_of_fold(setup: TableSetup, method: str, sampler: str = "") -> SampleStore:
    """The store of a method's out-of-fold samples, for other tables; empty where this table has not been made.

    Args:
        setup: with the options of this table.
        method: ``"full"``, ``"lora"``, ``"unet"`` or ``"unet-tuned"``.
        sampler: ``"mc-dropout"`` or ``"tta"``, for a U-Net.
    """
    return CrossValidation(setup).store(method, sampler)


def run(setup: TableSetup) -> TableResult:
    """Train and sample what is missing, fold by fold, and compare."""
    shared = CrossValidation(setup)
    methods = [m for m in setup.names("methods", DEFAULT_METHODS) if m in DIFFUSION or m in UNETS]
    methods = shared.pretrained.possible(methods)
    found: dict[str, list[Record]] = {}
    images: dict[str, list[float]] = {}
    for method in methods:
        if method == "zero-shot":
            found[DIFFUSION[method]] = shared.zero_shot()
            twin = shared.twin_records()
            found |= {TWIN: twin} if twin else {}
        else:
            step = shared.unet if method in UNETS else shared.diffusion
            images[method] = [step(method, fold)["images"] for fold in range(FOLDS)]
        if method in UNETS:
            for sampler in samplers(method):
                found[f"{UNETS[method]}, {SAMPLERS[sampler][0]}"] = shared.records(shared.store(method, sampler))
        elif method != "zero-shot":
            found[DIFFUSION[method]] = shared.records(shared.store(method))
    rows, facts = _rows(found, setup.seed)
    seen = "; ".join(f"{(DIFFUSION | UNETS)[m]} {min(n):.0f}-{max(n):.0f}" for m, n in images.items())
    divided = [shared.divided(fold) for fold in range(FOLDS)]
    notes = [
        f"{FOLDS} folds by patient: tuned on {_range([len(t) for t, _ in divided])} slices of"
        f" {_range([len({i.patient for i in t}) for t, _ in divided])} patients, measured on the others; every slice is"
        " measured by a model that saw no slice of its patient. " + numbers(next(iter(found.values()), [])),
        f"{shared.seconds:g} CPU seconds of training in one thread per fold and method, the last weights; pictures seen:"
        f" {seen}. A share of {shared.replay:.0%} are synthetic phantoms, for every method.",
        f"N = {shared.count} for every method, seed {setup.seed}, {setup.steps} steps. Rank 1, medoid, consensus and mean"
        " probability see no reference; RandTop-3 and best of N do. A dash: the mean probability of so many samples was not"
        " kept. Intervals: 95 %, bootstrap over patients.",
        "Reference: rater 1. The bundled model and the U-Net's pre-training saw none of these patients.",
    ]
    if TWIN in found or TWIN_TUNED in methods:
        notes.append(f"Image-only twin: {TWIN_IS}.")
    if UNET_TUNED in methods:
        notes.append(f"The U-Net's pre-training: {shared.pretrained.unet[2]}.")
    facts = {"methods": facts, "images": images, "seconds": shared.seconds, "proposals": shared.count}
    return TableResult(NAME, TITLE, notes, ["target", "n", "method", *FIGURES.values()], rows, facts)


def _rows(found: dict[str, list[Record]], seed: int) -> tuple[list[list[str]], dict[str, Any]]:
    rows: list[list[str]] = []
    facts: dict[str, Any] = {}
    grouped = {m: {target: chosen for _, target, chosen in groups(records)} for m, records in found.items()}
    for target in next(iter(grouped.values()), {}):
        for method, inside in grouped.items():
            values = {figure: interval(inside[target], figure, seed) for figure in FIGURES}
            facts.setdefault(method, {})[target] = {f: fact(v) for f, v in values.items()}
            rows.append([target, size(inside[target]), method, *[cell(values[figure]) for figure in FIGURES]])
        rows.append([])
    return rows, facts


def _range(values: Sequence[int]) -> str:
    return f"{min(values)}" if min(values) == max(values) else f"{min(values)}-{max(values)}"
