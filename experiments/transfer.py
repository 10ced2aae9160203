"""The runs of the CT-to-MR comparison: who is trained on, who is tested, how each method is trained and measured."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Any

import numpy as np
from torch import nn

from experiments.matched import (
    WARMUP,
    Draw,
    digest,
    draw_patients,
    empty_folder,
    one_thread,
    only,
    remembered,
    tune_unet,
)
from experiments.tables.setup import TableSetup
from experiments.tables.twins import TWIN_TUNED, UNET_TUNED, Pretrained
from experiments.unet import Sampling, mc_dropout_samples, tta_samples, unet_probability
from progidiff.cards import ModelCard
from progidiff.datasets.slices import LabelledSlice, present_targets
from progidiff.errors import InputError
from progidiff.evaluation.accuracy import score_slices
from progidiff.evaluation.metrics import dice
from progidiff.model.folder import ProGiDiffModel, load_model
from progidiff.sampling.engine import Engine, weights_key
from progidiff.training.run import Watch
from progidiff.training.stacks import stacks_of
from progidiff.training.tuning import TuneSettings, tune

#: Methods by name in results and options.
METHODS = {
    "lora": "LoRA",
    "full": "full fine-tuning",
    "scratch": "from scratch",
    "unet": "U-Net from scratch",
    UNET_TUNED: "U-Net, pre-trained, then tuned",
    TWIN_TUNED: "image-only twin, tuned",
}
DEFAULT_METHODS = ("lora", "full", "scratch", "unet", TWIN_TUNED)
#: Methods with one mask: plain segmenters.
ONE_MASK = ("unet", UNET_TUNED, TWIN_TUNED)
#: Methods that start from a model that knew CT: what is left of it afterwards is measured.
KNEW_CT = ("lora", "full", UNET_TUNED, TWIN_TUNED)
SETS = {"pancreas_mr": "pancreas, axial T2w MR", "kidney_mr": "kidneys, coronal T2w MR"}
SIZES = (1, 2, 5, 10)
PROPOSALS, RETENTION_PROPOSALS, RETENTION_EVERY = 8, 4, 6
#: Most test patients of a draw.
TEST_PATIENTS = 5
#: Folder of the results within the work folder.
FOLDER = "mr"

#: Dice of one target on one slice, "rank1" and "best", with the place of its patient in the sorted list of patients.
Scores = list[dict[str, float]]


@dataclass(frozen=True)
class Run:
    """One training run."""

    set: str
    size: int
    draw: int
    method: str


class Transfer:
    """Everything that the runs share.

    Args:
        setup: data, work folder and options.
    """

    def __init__(self, setup: TableSetup) -> None:
        self.setup = setup
        self.seconds = setup.number("seconds", 20, 0.01, 1e5)
        self.draws = setup.whole("draws", 3, 1, 100)
        self.sizes = _numbers(setup, "sizes", SIZES)
        self.retention = _numbers(setup, "retention", (self.sizes[0], self.sizes[-1]))
        self.sets = setup.names("sets", list(SETS))
        self.proposals = setup.proposals or PROPOSALS
        self.replay = TuneSettings().replay_share
        self.model = load_model(setup.model)
        self.base = weights_key(Engine(self.model))
        self.items = {name: setup.items(name) for name in self.sets}
        self.pretrained = Pretrained(setup, self.model)
        self.methods = self.pretrained.possible([m for m in setup.names("methods", DEFAULT_METHODS) if m in METHODS])

    @property
    def card(self) -> ModelCard:
        return self.model.card

    @cached_property
    def ct(self) -> list[LabelledSlice]:
        """CT slices on which retention is measured."""
        return self.setup.items("curvas", RETENTION_EVERY)

    def draw(self, name: str, draw: int) -> Draw:
        """Patients of a draw; the same for every method and size."""
        patients = [item.patient for item in self.items[name]]
        return draw_patients(patients, self.sizes[-1], TEST_PATIENTS, self.setup.seed + draw)

    def cases(self, run: Run) -> tuple[list[LabelledSlice], list[LabelledSlice]]:
        """Training slices and test slices of a run; no patient is in both."""
        drawn = self.draw(run.set, run.draw)
        training = frozenset(drawn.pool[: run.size])
        items = self.items[run.set]
        return [i for i in items if i.patient in training], [i for i in items if i.patient in drawn.test]

    def runs(self) -> list[Run]:
        """All runs, draw by draw, so that an unfinished table has every method and size of the draws that are done."""
        # The ends first: they say most where time runs out.
        sizes = sorted(self.sizes, key=lambda n: (-abs(self.sizes.index(n) - (len(self.sizes) - 1) / 2), n))
        return [
            Run(name, size, draw, method)
            for draw in range(self.draws)
            for size in sizes
            for name in self.sets
            for method in self.methods
        ]

    def key(self, run: Run) -> str:
        """Name of a run's result: everything that it depends on."""
        unet = "" if run.method not in ONE_MASK else [WARMUP, self.pretrained.start_of(run.method)[1]]
        parts = [self.base, unet, self.setup.seed, self.setup.steps, self.seconds, self.proposals, self.sizes[-1]]
        return digest(FOLDER, parts, run.set, run.size, run.draw, run.method, run.size in self.retention)

    def places(self, name: str) -> dict[str, int]:
        """Patients by number, so that results name nobody."""
        return {p: i for i, p in enumerate(sorted({item.patient for item in self.items[name]}))}

    def diffusion_scores(self, model: ProGiDiffModel, name: str, items: Sequence[LabelledSlice]) -> Scores:
        """Scores of proposals on MR slices."""
        places, engine = self.places(name), Engine(model)
        found, _ = score_slices(engine, name, items, self.proposals, self.setup.steps, self.setup.seed, absent=False)
        return [{"patient": places[s.patient], "rank1": s.rank1, "best": s.best} for s in found]

    def unet_scores(self, network: nn.Module, name: str, items: Sequence[LabelledSlice], draw: Sampling) -> Scores:
        """Scores of a U-Net or the twin: its plain mask as rank 1, the best of as many samples as others have proposals."""
        places, scores = self.places(name), []
        for item in items:
            for target in present_targets(item, self.card.vocabulary):
                small, card = only(network, self.card, [target])
                truth = item.labels[target]
                plain = dice(unet_probability(small, item, card)[0] > 0.5, truth)
                masks, _ = draw(small, item, card, self.proposals, self.setup.seed)
                best = max(dice(mask, truth) for mask in masks[:, 0])
                scores.append({"patient": places[item.patient], "rank1": plain, "best": best})
        return scores

    def diffusion_ct(self, model: ProGiDiffModel) -> float:
        """Rank-1 Dice on CT, mean of targets."""
        scores, _ = score_slices(
            Engine(model), "curvas", self.ct, RETENTION_PROPOSALS, self.setup.steps, self.setup.seed, absent=False
        )
        return _mean_of_targets([(s.target, s.rank1) for s in scores])

    def unet_ct(self, network: nn.Module) -> float:
        """Dice of plain masks of a U-Net or the twin on CT, mean of targets."""
        pairs = []
        for item in self.ct:
            targets = present_targets(item, self.card.vocabulary)
            if not targets:
                continue
            small, card = only(network, self.card, targets)
            masks = unet_probability(small, item, card) > 0.5
            pairs += [(t, dice(mask, item.labels[t])) for t, mask in zip(targets, masks, strict=True)]
        return _mean_of_targets(pairs)

    def measure(self, run: Run) -> dict[str, Any]:
        """Train and measure one run."""
        training, test = self.cases(run)
        seed = self.setup.seed + run.draw
        retained = run.method in KNEW_CT and run.size in self.retention
        folder = empty_folder(self.setup.work / FOLDER / f"{self.key(run)}-training")
        stacks = stacks_of(training)
        with one_thread():
            if run.method in ONE_MASK:
                start, _ = self.pretrained.start_of(run.method)
                network, images = tune_unet(stacks, self.card, self.seconds, seed, folder, start)
                draw = tta_samples if run.method == TWIN_TUNED else mc_dropout_samples
                result = {"images": images, "test": self.unet_scores(network, run.set, test, draw)}
                if retained:
                    result["ct"] = self.unet_ct(network)
            else:
                model = load_model(self.setup.model)
                settings = TuneSettings(method=run.method, cpu_seconds=self.seconds, patience=None, seed=seed)  # type: ignore[arg-type]
                tuned = tune(model, stacks, [], folder, settings, Watch(log=_quiet), test[0].modality)
                images = tuned.steps * settings.images
                result = {"images": images, "test": self.diffusion_scores(model, run.set, test)}
                if retained:
                    result["ct"] = self.diffusion_ct(model)
        for left in folder.iterdir():
            left.unlink()  # weights are not kept: what they give is
        folder.rmdir()
        return {**vars(run), "training_slices": len(training), **result}

    def zero_shot(self, name: str) -> Scores:
        """The model as it is, on all slices of a set."""
        key = digest(FOLDER, "zero-shot", self.base, self.setup.seed, self.setup.steps, self.proposals, name)
        made = remembered(
            self.setup.work / FOLDER / f"{key}.json",
            lambda: {"test": self.diffusion_scores(self.model, name, self.items[name])},
        )
        return list(made["test"])

    def ct_before(self) -> dict[str, float]:
        """Accuracy on CT before any tuning: of the model, and of the U-Net and the twin where they take part."""
        setup = self.setup
        path = setup.work / FOLDER / f"{digest(FOLDER, 'ct', self.base, setup.seed, setup.steps)}.json"
        found = dict(remembered(path, lambda: {"model": self.diffusion_ct(self.model)}))
        for method in (UNET_TUNED, TWIN_TUNED):
            if method in self.methods:
                found[method] = self._before(method)
        return found

    def _before(self, method: str) -> float:
        network, key = self.pretrained.start_of(method)
        assert network is not None
        path = self.setup.work / FOLDER / f"{digest(FOLDER, 'ct', key)}.json"
        return float(remembered(path, lambda: {"dice": self.unet_ct(network)})["dice"])


def _quiet(line: str) -> None:
    """No log: its lines would hide the progress."""


def _numbers(setup: TableSetup, name: str, default: Sequence[int]) -> list[int]:
    """An option that lists numbers of cases, ascending.

    Raises:
        InputError: one is no number of cases.
    """
    texts = setup.names(name, [str(n) for n in default])
    if not texts or not all(text.isdigit() and int(text) for text in texts):
        raise InputError(f'The option {name} takes numbers of cases such as "1,5,10", not "{setup.options[name]}".')
    return sorted({int(text) for text in texts})


def _mean_of_targets(pairs: Sequence[tuple[str, float]]) -> float:
    means = [np.mean([v for t, v in pairs if t == target]) for target in dict.fromkeys(t for t, _ in pairs)]
    return float(np.mean(means)) if means else float("nan")
