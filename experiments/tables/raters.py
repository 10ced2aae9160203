"""Whether the spread of proposals is the spread of radiologists, beside what dropout and test-time augmentation give."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import replace
from typing import Any

import numpy as np

from experiments.matched import UNET_OPTIONS
from experiments.samples import Samples, SampleSettings, SampleStore
from experiments.tables import cross_validation
from experiments.tables.proposals import kept_numbers, main_proposals, pairs, shared_store
from experiments.tables.records import MEAN, Record, cell, fact, groups, interval, numbers, size
from experiments.tables.setup import TableResult, TableSetup
from experiments.tables.twins import TWIN_IS, Pretrained
from experiments.unet import DROPOUT, mc_dropout_samples, sample_unet_into, tta_samples, unet_probability
from progidiff.cards import ModelCard
from progidiff.datasets.slices import LabelledSlice, present_targets
from progidiff.evaluation.metrics import dice
from progidiff.proposals.masks import bounding_box
from progidiff.proposals.votes import agreement, gram_matrix, mean_pairwise_dice

NAME = "raters"
TITLE = "Proposals against two radiologists (CURVAS)"
OPTIONS = {
    **UNET_OPTIONS,
    "seconds": "as given to the table cross-validation, whose models get rows of their own",
}
SET = "curvas"
#: Samples of every method that is compared.
COMPARED = 20
#: Bins of the calibration error, and how far the box around both raters' masks reaches beyond them.
BINS, MARGIN_MM = 10, 20.0

FIGURES = {
    "ged": "GED",
    "best_second": "best Dice with rater 2",
    "rank1_second": "rank-1 Dice with rater 2",
    "best_first": "best Dice with rater 1",
    "rank1_first": "rank-1 Dice with rater 1",
    "covered": "disagreement covered",
    "uncertain": "uncertain area / organ",
    "ece": "ECE of agreement",
    "brier": "Brier of agreement",
    "ece_probability": "ECE of mean probability",
    "diversity": "pairwise Dice",
}


def calibration_error(confidence: np.ndarray, truth: np.ndarray, bins: int = BINS) -> float:
    """Expected calibration error: mean over pixels of the gap between confidence and truth of their bin.

    Args:
        confidence: float in [0, 1], any shape; bins are equally wide, 1 belongs to the last one.
        truth: same shape; the share of raters that marked the pixel.
        bins: number of bins.
    """
    place = np.minimum((confidence.ravel() * bins).astype(int), bins - 1)
    said = np.bincount(place, confidence.ravel().astype(np.float64), bins)
    true = np.bincount(place, truth.ravel().astype(np.float64), bins)
    return float(np.abs(said - true).sum() / confidence.size)


def measure(samples: Samples, first: np.ndarray, second: np.ndarray) -> dict[str, float]:
    """Figures of one pair of slice and target.

    Args:
        samples: the samples.
        first, second: the two raters' masks, bool (rows, columns); not both empty.

    Returns:
        ``covered``: share of the pixels on which the raters differ where the samples differ as well (NaN where the raters
        agree everywhere). ``uncertain``: area where samples differ over the raters' mean area. ``human``: Dice of both
        raters.
        Calibration is taken in the box around both masks, :data:`MARGIN_MM` wider, against the mean of both raters.
    """
    masks, top = samples.masks, samples.ranking.order[0]
    both = np.stack([first, second])
    share = agreement(masks)
    unsure = (share > 0) & (share < 1)
    differ = first ^ second
    box = bounding_box(first | second, *(round(MARGIN_MM / spacing) for spacing in samples.spacing_rc))
    assert box is not None
    truth = both[(slice(None), *box)].mean(axis=0)
    probability = samples.mean_probability
    with_first, with_second = ([dice(mask, rater) for mask in masks] for rater in both)
    return {
        "ged": generalized_energy_distance(masks, both),
        "best_second": max(with_second),
        "rank1_second": with_second[top],
        "best_first": max(with_first),
        "rank1_first": with_first[top],
        "covered": float(unsure[differ].mean()) if differ.any() else float("nan"),
        "uncertain": float(unsure.sum() / both.sum(axis=(1, 2)).mean()),
        "ece": calibration_error(share[box], truth),
        "brier": float(((share[box] - truth) ** 2).mean()),
        "ece_probability": float("nan") if probability is None else calibration_error(probability[box], truth),
        "diversity": mean_pairwise_dice(gram_matrix(masks)),
        "human": dice(first, second),
    }


def run(setup: TableSetup) -> TableResult:
    """Measure the model, the U-Net's two kinds of samples, and out-of-fold models whose samples are in the work folder."""
    engine = setup.engine()
    card = engine.card
    items = [item for item in setup.items(SET) if item.second_labels is not None]
    most = main_proposals(setup)
    compared = min(COMPARED, most)
    records: dict[str, list[Record]] = {}

    def add(method: str, item: LabelledSlice, target: str, samples: Samples) -> None:
        assert item.second_labels is not None
        setup.progress(f"measuring {method}")
        values = measure(samples, item.labels[target], item.second_labels[target])
        records.setdefault(method, []).append(Record(SET, target, item.patient, values))

    store = shared_store(setup, engine, SET, items)
    for item, target, samples in pairs(store, items, card.vocabulary):
        for count in sorted({n for n in kept_numbers(most) if n in (compared, most)}):
            add(f"proposals, N = {count}", item, target, samples.first(count))
        top = samples.masks[samples.first(compared).ranking.order[0]]
        add(f"rank 1 of {compared} alone", item, target, Samples(top[None], {}, samples.spacing_rc))

    pretrained = Pretrained(setup, engine.model)
    network, key, how_trained = pretrained.unet
    for method, how in (("mc-dropout", mc_dropout_samples), ("tta", tta_samples)):
        drawn = SampleStore(setup.work, SampleSettings(SET, f"unet {key}", compared, 0, setup.seed, method))
        sample_unet_into(drawn, network, card, items, _wanted(card), how, setup.counted(f"U-Net {method}", len(items)))
        for item, target, samples in pairs(drawn, items, card.vocabulary):
            add(f"U-Net, {_LONG[method]}, N = {compared}", item, target, samples)
    for item in items:
        probability = unet_probability(network, item, card)
        for target in present_targets(item, card.vocabulary):
            one = probability[card.vocabulary.index(target)]
            add("U-Net, one mask", item, target, Samples(one[None] > 0.5, {1: one}, item.spacing_rc))
    if pretrained.twin is not None:
        twin, key = pretrained.twin
        drawn = SampleStore(setup.work, SampleSettings(SET, f"twin {key}", compared, 0, setup.seed, "tta"))
        told = setup.counted("image-only twin, tta", len(items))
        sample_unet_into(drawn, twin, card, items, _wanted(card), tta_samples, told)
        for item, target, samples in pairs(drawn, items, card.vocabulary):
            add(f"image-only twin, {_LONG['tta']}, N = {compared}", item, target, samples)
    for method, kept in out_of_fold(setup):
        for item in items:
            for target in present_targets(item, card.vocabulary):
                found = kept.get(item.slice_id, target)
                if found is not None:
                    add(f"{method}, out of fold, N = {found.count}", item, target, found)
    rows, facts = _rows(records, setup.seed)
    first = next(iter(records.values()))
    notes = [
        f"Model {card.model_id}, seed {setup.seed}, {setup.steps} steps; slices that a second radiologist drew, targets "
        "with at least 1 cm² by rater 1. n counts pairs of slice and target, and patients.",
        numbers(first),
        f"U-Net: MONAI BasicUNet, dropout {DROPOUT:g}, {how_trained}, seed {setup.seed}; the same grid and window as the "
        f"model. Image-only twin: {TWIN_IS}."
        " Nothing was trained on CURVAS except where the row says out of fold: there by models of other patients.",
        "GED: squared generalised energy distance, d = 1 - IoU, all pairs with themselves included; lower is better, and a "
        "single mask has no spread to its credit. Disagreement covered: share of the pixels on which the raters differ "
        "where the samples are not unanimous; to be read with the uncertain area (relative to the organ), since a wide band "
        "covers anything.",
        f"ECE: {BINS} equal bins over the pixels of the box around both raters' masks widened by {MARGIN_MM:g} mm, against "
        "the mean of the raters; per pair, then averaged as every figure. Intervals: 95 %, bootstrap over patients.",
        "Both radiologists corrected one machine draft, so their true spread is wider than what is measured here.",
    ]
    head = ["target", "n", "samples", *FIGURES.values(), "Dice of the raters"]
    return TableResult(NAME, TITLE, notes, head, rows, facts)


_LONG = {"mc-dropout": "MC dropout", "tta": "test-time augmentation"}


def _wanted(card: ModelCard) -> Callable[[LabelledSlice], Sequence[str]]:
    return lambda item: present_targets(item, card.vocabulary)


def out_of_fold(setup: TableSetup) -> Iterator[tuple[str, SampleStore]]:
    """Samples of cross-validation's models, by what they are called; a store is empty where that table was not made."""
    own = replace(setup, proposals=None, options={k: v for k, v in setup.options.items() if k in cross_validation.OPTIONS})
    for method, name in cross_validation.DIFFUSION.items():
        if method != "zero-shot":
            yield name, cross_validation.out_of_fold(own, method)
    for method, name in cross_validation.UNETS.items():
        for sampler in cross_validation.samplers(method):
            how, _ = cross_validation.SAMPLERS[sampler]
            yield f"{name}, {how}", cross_validation.out_of_fold(own, method, sampler)


def _rows(records: dict[str, list[Record]], seed: int) -> tuple[list[list[str]], dict[str, Any]]:
    rows: list[list[str]] = []
    facts: dict[str, Any] = {}
    order = [target for _, target, _ in groups(next(iter(records.values())))]
    for target in sorted(order, key=lambda t: t == MEAN):
        for method, chosen in records.items():
            inside = chosen if target == MEAN else [r for r in chosen if r.target == target]
            found = {figure: interval(inside, figure, seed) for figure in (*FIGURES, "human")}
            facts.setdefault(target, {})[method] = {figure: fact(value) for figure, value in found.items()}
            rows.append([target, size(inside), method, *[cell(value) for value in found.values()]])
        rows.append([])
    return rows, facts


def generalized_energy_distance(samples: np.ndarray, references: np.ndarray) -> float:
    """Squared generalised energy distance between proposals and raters: 2 E[d(S, Y)] - E[d(S, S')] -
    E[d(Y, Y')].

    d = 1 - IoU with d of two empty masks 0 (Kohl et al., Probabilistic U-Net, arXiv 1806.05034). The
    expectations run over all pairs, a mask with itself included; the number of samples must be stated
    beside the value.

    Args:
        samples: bool (N, ...).
        references: bool (M, ...), the raters' masks.
    """
    return (
        2.0 * float(_iou_distances(samples, references).mean())
        - float(_iou_distances(samples, samples).mean())
        - float(_iou_distances(references, references).mean())
    )


def _iou_distances(a: np.ndarray, b: np.ndarray) -> np.ndarray:
    flat_a = (np.asarray(a) != 0).reshape(len(a), -1).astype(np.float64)
    flat_b = (np.asarray(b) != 0).reshape(len(b), -1).astype(np.float64)
    both = flat_a @ flat_b.T
    union = flat_a.sum(axis=1)[:, None] + flat_b.sum(axis=1)[None, :] - both
    return np.asarray(1.0 - np.divide(both, union, out=np.ones_like(both), where=union > 0))
