"""Accuracy of proposals against labels: rank-1, mean, best-of-N and RandTop-3, with n, through the engine that users run."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from dataclasses import asdict, dataclass

import numpy as np

from progidiff.cards import Accuracy
from progidiff.datasets.slices import LabelledSlice
from progidiff.evaluation.metrics import dice, proposal_scores, spearman
from progidiff.evaluation.presenting import as_volume
from progidiff.evaluation.summaries import patient_bootstrap
from progidiff.events import ProposeRequest, RankingEvent, SliceEvent
from progidiff.ranking.ranking import Ranking
from progidiff.sampling.engine import Engine

#: Smallest labelled area that counts as present, in mm²; slivers at an organ's very end say little about a model.
MIN_AREA_MM2 = 100.0
FIGURES = ("rank1", "mean", "best", "rand_top_3", "ensemble", "twin")


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


Twin = Callable[[LabelledSlice, str], np.ndarray]


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
    """Score every labelled target of every slice.

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
    scores: list[SliceScore] = []
    absences: list[AbsentScore] = []
    for done, item in enumerate(items):
        area = item.spacing_rc[0] * item.spacing_rc[1]
        known = [t for t in engine.card.vocabulary if t in item.labelled]
        present = [t for t in known if item.labels[t].sum() * area >= MIN_AREA_MM2]
        missing = [t for t in known if not item.labels[t].any()] if absent else []
        if present or missing:
            array, affine = as_volume(item, engine.card)
            engine.set_image(array, affine, item.modality, item.plane)
            masks, probability, ranking = _propose(engine, (*present, *missing), proposals, steps, seed)
            for target in present:
                scores.append(_score(name, item, target, masks[target], probability[target], ranking[target], twin))
            for target in missing:
                event = ranking[target]
                absences.append(AbsentScore(name, target, item.patient, event.empty_share, event.empty[event.order[0]]))
        progress(done + 1)
    return scores, absences


def _propose(
    engine: Engine, targets: tuple[str, ...], proposals: int, steps: int, seed: int
) -> tuple[dict[str, np.ndarray], dict[str, np.ndarray], dict[str, RankingEvent]]:
    """Masks (N, H, W), mean probability (H, W) and ranking per target."""
    masks: dict[str, list[np.ndarray]] = {t: [] for t in targets}
    probability: dict[str, np.ndarray] = {}
    ranking: dict[str, RankingEvent] = {}

    def collect(event: object) -> None:
        if isinstance(event, SliceEvent):
            masks[event.target].append(event.masks)
            if event.mean_probability is not None:
                probability[event.target] = event.mean_probability
        elif isinstance(event, RankingEvent):
            ranking[event.target] = event

    engine.propose(ProposeRequest(targets, proposals=proposals, steps=steps, seed=seed), collect, lambda: False)
    return {t: np.concatenate(m) for t, m in masks.items()}, probability, ranking


def _score(
    name: str,
    item: LabelledSlice,
    target: str,
    masks: np.ndarray,
    probability: np.ndarray,
    event: RankingEvent,
    twin: Twin | None,
) -> SliceScore:
    truth = item.labels[target]
    values = [dice(mask, truth) for mask in masks]
    ranking = Ranking(
        tuple(event.order), tuple(event.scores), tuple(tuple(g) for g in event.groups), tuple(event.empty), "soft_dice"
    )
    figures = proposal_scores(values, ranking, k=3)
    return SliceScore(
        set=name,
        target=target,
        patient=item.patient,
        rank1=figures.rank1,
        mean=figures.mean,
        best=figures.best,
        rand_top_3=figures.rand_top_k,
        ensemble=dice(probability > 0.5, truth),
        diversity=event.mean_pairwise_dice,
        spearman=spearman(event.scores, values),
        twin=float("nan") if twin is None else dice(twin(item, target), truth),
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
    return float(np.mean(known)) if known else float("nan")
