"""What ``progidiff accuracy`` measures: proposals against labels, beside the image-only twin, or without their state."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from copy import deepcopy
from dataclasses import asdict, dataclass
from typing import Any, Literal

import numpy as np
import torch
from torch import Tensor, nn

from progidiff.cards import Accuracy, ModelCard
from progidiff.datasets.slices import LabelledSlice
from progidiff.evaluation.cases import cases_of_slices, on_grid
from progidiff.evaluation.measuring import EvaluationSettings, measure_case
from progidiff.evaluation.metrics import dice
from progidiff.evaluation.scoring import TargetResult
from progidiff.evaluation.summary import patient_bootstrap
from progidiff.model.folder import ProGiDiffModel
from progidiff.model.networks import ImageEncoder
from progidiff.sampling.engine import Engine
from progidiff.sampling.image import OUTSIDE

FIGURES = ("rank1", "mean", "best", "rand_top_3", "ensemble", "twin")
NAN = float("nan")

Ablation = Literal["none", "shuffled", "noise"]
Twin = Callable[[LabelledSlice, str], np.ndarray]


@dataclass(frozen=True)
class SliceScore:
    """Figures of one target on one slice; Dice in [0, 1].

    Attributes:
        rank1: of the proposal ranked first without ground truth.
        mean: mean of all proposals.
        best: of the best proposal (best-of-N).
        rand_top_3: mean of the three best by ground truth, the expectation of the paper's RandTop-3.
        ensemble: of the mean probability cut at one half.
        diversity: mean pairwise Dice of the proposals.
        spearman: rank correlation between score and Dice.
        twin: of the image-only twin, NaN without one.
    """

    set: str
    target: str
    patient: str
    rank1: float
    mean: float
    best: float
    rand_top_3: float
    ensemble: float
    diversity: float
    spearman: float
    twin: float


@dataclass(frozen=True)
class AbsentScore:
    """A prompt for an organ that is labelled but not in the slice: share of empty proposals, and whether rank 1 is empty."""

    set: str
    target: str
    patient: str
    empty_share: float
    rank1_empty: bool


def score_slices(
    engine: Engine,
    name: str,
    items: Iterable[LabelledSlice],
    proposals: int = 16,
    steps: int = 4,
    seed: int = 0,
    twin: Twin | None = None,
    absent: bool = True,
    progress: Callable[[int], None] = lambda done: None,
) -> tuple[list[SliceScore], list[AbsentScore]]:
    """Score every labelled target of every slice, as :func:`measure_case` does.

    Args:
        engine: loaded engine.
        name: name of the set.
        items: its slices; targets outside the model's vocabulary are left out.
        proposals: N.
        steps: denoising steps.
        seed: seed of the noise.
        twin: image-only segmenter to compare with.
        absent: also prompt for targets that are labelled as absent.
        progress: told the number of slices done.
    """
    settings = EvaluationSettings(proposals, steps, seed, tolerance_mm=None, absent=absent)
    scores: list[SliceScore] = []
    absences: list[AbsentScore] = []
    for done, item in enumerate(items, 1):
        (case,) = cases_of_slices([item], name, engine.card)
        for found in measure_case(engine, case, settings).targets:
            if found.present:
                compared = NAN if twin is None else dice(twin(item, found.target), item.labels[found.target])
                scores.append(_score(name, item.patient, found, compared))
            else:
                rightly = found.answers["rank1"].presence == "TN"
                absences.append(AbsentScore(name, found.target, item.patient, found.empty_share, rightly))
        progress(done)
    return scores, absences


def _score(name: str, patient: str, found: TargetResult, twin: float) -> SliceScore:
    dices = {answer: NAN if score.dice is None else score.dice for answer, score in found.answers.items()}
    return SliceScore(
        set=name,
        target=found.target,
        patient=patient,
        rank1=dices["rank1"],
        mean=dices["mean"],
        best=dices["best"],
        rand_top_3=dices["rand_top_k"],
        ensemble=dices["ensemble"],
        diversity=found.diversity,
        spearman=NAN if found.spearman is None else found.spearman,
        twin=twin,
    )


def summarise(scores: Sequence[SliceScore]) -> list[dict[str, object]]:
    """One row per set and target: mean over slices of every figure, interval of rank-1 by patient bootstrap, n."""
    rows: list[dict[str, object]] = []
    for key in dict.fromkeys((s.set, s.target) for s in scores):
        chosen = [s for s in scores if (s.set, s.target) == key]
        by_patient: dict[str, list[float]] = {}
        for s in chosen:
            by_patient.setdefault(s.patient, []).append(s.rank1)
        interval = patient_bootstrap(by_patient)
        row: dict[str, object] = {"set": key[0], "target": key[1], "slices": len(chosen), "patients": len(by_patient)}
        for figure in (*FIGURES, "diversity", "spearman"):
            row[figure] = _mean([asdict(s)[figure] for s in chosen])
        row |= {"rank1_low": interval.low, "rank1_high": interval.high}
        rows.append(row)
    return rows


def mean_over_targets(rows: Sequence[dict[str, object]], name: str) -> dict[str, float]:
    """Mean of every figure over the targets of a set, each target counted once."""
    chosen = [r for r in rows if r["set"] == name]
    return {figure: _mean([float(r[figure]) for r in chosen]) for figure in FIGURES}  # type: ignore[arg-type]


def summarise_absent(scores: Sequence[AbsentScore]) -> list[dict[str, object]]:
    """One row per set and target: share of empty proposals, and how often the first-ranked one is rightly empty."""
    rows: list[dict[str, object]] = []
    for key in dict.fromkeys((s.set, s.target) for s in scores):
        chosen = [s for s in scores if (s.set, s.target) == key]
        rows.append(
            {
                "set": key[0],
                "target": key[1],
                "slices": len(chosen),
                "empty_share": _mean([s.empty_share for s in chosen]),
                "rank1_empty": _mean([float(s.rank1_empty) for s in chosen]),
            }
        )
    return rows


def card_entries(rows: Sequence[dict[str, object]], proposals: int) -> list[Accuracy]:
    """Figures for a model card."""
    names = {"rank1": "Dice, rank 1", "best": f"Dice, best of {proposals}"}
    return [
        Accuracy(
            set=str(row["set"]),
            target=str(row["target"]),
            metric=metric,
            value=round(float(row[figure]), 4),  # type: ignore[arg-type]
            n_slices=int(row["slices"]),  # type: ignore[call-overload]
            n_patients=int(row["patients"]),  # type: ignore[call-overload]
        )
        for row in rows
        for figure, metric in names.items()
    ]


def _mean(values: Sequence[float]) -> float:
    known = [v for v in values if not np.isnan(v)]
    return float(np.mean(known)) if known else NAN


class PlainSegmenter:
    """A network without prompt, noise or sampling, asked as the diffusion model is: same grid, window and vocabulary.

    Args:
        logits: float images (1, 1, S, S) in [0, 1] to logits (1, V, S, S), V as the card's vocabulary.
        card: card of the diffusion model that it is compared with.
    """

    def __init__(self, logits: Callable[[Tensor], Tensor], card: ModelCard) -> None:
        self._logits, self._card = logits, card
        self._last: tuple[LabelledSlice, np.ndarray] | None = None

    @torch.inference_mode()
    def __call__(self, item: LabelledSlice, target: str) -> np.ndarray:
        """Mask bool (H, W) of a target on a slice, at the slice's own pixels."""
        if self._last is None or self._last[0] is not item:
            grid, pixels = on_grid(item, self._card)
            logits = self._logits(pixels)[0]
            self._last = item, (grid.from_model(logits, outside=OUTSIDE) > 0).numpy()
        return self._last[1][self._card.vocabulary.index(target)]


class TwinNetwork(nn.Module):
    """The image-only twin: the encoder with its segmentation head, images (B, 1, S, S) to logits (B, V, S, S)."""

    def __init__(self, encoder: ImageEncoder) -> None:
        super().__init__()
        self.encoder = encoder

    def forward(self, images: Tensor) -> Tensor:
        return self.encoder.segment(self.encoder(images))


def image_only_twin(model: ProGiDiffModel) -> TwinNetwork | None:
    """A model's image-only twin, float32 on the CPU, with weights of its own; ``None`` without a segmentation head."""
    encoder = model.image_encoder
    return TwinNetwork(deepcopy(encoder).float().cpu()).eval() if encoder.config.classes else None


@contextmanager
def disturbed_state(model: ProGiDiffModel, how: Ablation, seed: int = 0) -> Iterator[None]:
    """Let the networks see another noisy state than the sampler's, at every step, for as long as the context lasts.

    Does the sampler use its state? A "diffusion" segmenter whose answer does not change when its state is destroyed is an
    image-only segmenter in disguise (after arXiv 2609.23967).

    Args:
        model: a loaded model.
        how: ``"shuffled"`` gives every row of a batch the state of another row (another proposal, prompt or slice);
            ``"noise"`` gives fresh Gaussian noise, so that nothing of the sampling so far reaches the networks;
            ``"none"`` changes nothing.
        seed: seed of permutation and noise.
    """
    if how == "none":
        yield
        return
    generator = torch.Generator().manual_seed(seed)
    seen: list[Tensor] = []

    def control(module: torch.nn.Module, args: tuple[Any, ...]) -> tuple[Any, ...]:
        state: Tensor = args[0]
        if how == "noise":
            other = torch.randn(state.shape, generator=generator).to(state.device, state.dtype)
        else:
            # a rotation by a random amount: no row keeps its own state
            shift = int(torch.randint(1, max(len(state), 2), (1,), generator=generator))
            other = state.roll(shift, 0)
        seen[:] = [other]
        return (other, *args[1:])

    def backbone(module: torch.nn.Module, args: tuple[Any, ...]) -> tuple[Any, ...]:
        return (seen[0], *args[1:])  # both networks see the same state, as always

    hooks = [model.controlnet.register_forward_pre_hook(control), model.unet.register_forward_pre_hook(backbone)]
    try:
        yield
    finally:
        for hook in hooks:
            hook.remove()
