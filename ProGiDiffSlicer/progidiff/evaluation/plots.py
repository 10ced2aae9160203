"""Plots of an evaluation as PNG bytes: Dice by organ, Dice by number of proposals, calibration, and score against Dice."""

from __future__ import annotations

import io
from collections.abc import Sequence
from typing import TYPE_CHECKING

import numpy as np

from progidiff.evaluation.scoring import CALIBRATION_BINS, CaseResult
from progidiff.evaluation.summary import MEAN, TargetSummary
from progidiff.outputs.report import OUTLINES

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

_DPI = 120
_BLUE, _ORANGE, _PURPLE, _GREEN = OUTLINES[0].colour, OUTLINES[1].colour, OUTLINES[2].colour, OUTLINES[4].colour
_GREY = "#777777"


def dice_plot(rows: Sequence[TargetSummary], cases: Sequence[CaseResult], proposals: int) -> bytes:
    """Rank-1 Dice of every case as dots and a box, by target, with the means of the consensus and of the best of N."""
    shown = [row for row in rows if row.cases and row.target != MEAN]
    figure, axes = _figure(max(4.5, 1.2 + 0.85 * len(shown)), 3.9)
    rng = np.random.default_rng(0)  # spreads the dots sideways, the same way each time
    for place, row in enumerate(shown):
        values = [t.answers["rank1"].dice or 0.0 for c in cases for t in c.targets if t.target == row.target and t.present]
        if len(values) > 4:
            box = axes.boxplot([values], positions=[place], widths=0.62, showfliers=False, patch_artist=True)
            box["boxes"][0].set(facecolor="#e8f2f9", edgecolor=_GREY)
            box["medians"][0].set(color="#000000")
        spread = rng.uniform(-0.2, 0.2, len(values)) if len(values) > 1 else np.zeros(1)
        axes.plot(place + spread, values, ".", color="#0072b2", markersize=4, alpha=0.65, zorder=3)
    places = range(len(shown))
    consensus = [row.answers["consensus"].dice.mean or 0.0 for row in shown]
    best = [row.answers["best"].dice.mean or 0.0 for row in shown]
    axes.plot(
        places, consensus, "D", color=_ORANGE, markeredgecolor="black", markersize=5, zorder=4, label="consensus, mean"
    )
    axes.plot(
        places, best, "^", color=_GREEN, markersize=6, label=f"best of {proposals}, mean", zorder=4, markeredgecolor="black"
    )
    axes.plot([], [], ".", color="#0072b2", label="rank 1, one case")
    axes.set_xticks(list(places), [f"{row.target}\nn = {row.cases}" for row in shown], rotation=40, ha="right")
    axes.set_xlim(-0.6, len(shown) - 0.4)
    _share(axes, "Dice")
    axes.legend(frameon=False, fontsize=8, loc="upper center", bbox_to_anchor=(0.5, 1.13), ncols=3)
    return _png(figure)


def curve_plot(row: TargetSummary, k: int) -> bytes:
    """Mean Dice of a row by number of proposals."""
    figure, axes = _figure(4.5, 3.6)
    numbers = [point.proposals for point in row.curve]
    lines = (
        ("best", "best of n", _GREEN, "-^"),
        ("rand_top_k", f"RandTop-{k}", _PURPLE, "-s"),
        ("rank1", "rank 1", "#0072b2", "-o"),
        ("mean", "mean of proposals", _GREY, "--"),
    )
    for field, name, colour, style in lines:
        axes.plot(numbers, [getattr(point, field) for point in row.curve], style, color=colour, markersize=4, label=name)
    axes.set_xscale("log", base=2)
    axes.set_xticks(numbers, [str(n) for n in numbers])
    axes.minorticks_off()
    axes.set_xlabel("number of proposals n")
    axes.set_ylabel("Dice")
    axes.grid(axis="y", color="#dddddd", linewidth=0.6)
    axes.legend(frameon=False, fontsize=8)
    return _png(figure)


def calibration_plot(row: TargetSummary) -> bytes:
    """Share of reference pixels by mean probability."""
    figure, axes = _figure(3.9, 3.6)
    pixels = np.asarray(row.calibration.pixels, dtype=np.float64)
    used = pixels > 0
    predicted = np.asarray(row.calibration.predicted)[used] / pixels[used]
    observed = np.asarray(row.calibration.positive)[used] / pixels[used]
    axes.plot([0, 1], [0, 1], "--", color=_GREY, linewidth=1)
    edges = np.arange(CALIBRATION_BINS)[used] / CALIBRATION_BINS
    axes.bar(edges, pixels[used] / pixels.sum(), 1 / CALIBRATION_BINS, align="edge", color="#e3e3e3", zorder=0)
    axes.plot(predicted, observed, "-o", color="#0072b2", markersize=4)
    axes.set_xlim(0, 1)
    axes.set_xlabel("mean probability (bars: share of pixels)")
    _share(axes, "share in the reference")
    return _png(figure)


def score_plot(cases: Sequence[CaseResult]) -> bytes:
    """Score of the first-ranked proposal, made without the reference, against its Dice."""
    figure, axes = _figure(3.9, 3.6)
    pairs = [(t.scores[t.first], t.answers["rank1"].dice or 0.0) for c in cases for t in c.targets if t.present and t.scores]
    axes.plot([x for x, _ in pairs], [y for _, y in pairs], ".", color="#0072b2", markersize=4, alpha=0.6)
    axes.set_xlim(0, 1)
    axes.set_xlabel("score of rank 1, without the reference")
    _share(axes, "Dice of rank 1")
    return _png(figure)


def _share(axes: Axes, name: str) -> None:
    axes.set_ylim(-0.02, 1.02)
    axes.set_ylabel(name)
    axes.grid(axis="y", color="#dddddd", linewidth=0.6)
    axes.set_axisbelow(True)


def _figure(width: float, height: float) -> tuple[Figure, Axes]:
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    figure = Figure(figsize=(width, height), dpi=_DPI, facecolor="white", layout="constrained")
    FigureCanvasAgg(figure)
    axes = figure.add_subplot()
    axes.spines[["top", "right"]].set_visible(False)
    axes.tick_params(labelsize=8)
    return figure, axes


def _png(figure: Figure) -> bytes:
    buffer = io.BytesIO()
    figure.savefig(buffer, format="png", metadata={"Software": None})
    return buffer.getvalue()
