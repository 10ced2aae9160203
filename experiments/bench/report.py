"""The benchmark's table for people."""

from __future__ import annotations

import textwrap

from experiments.bench.results import BenchReport, ModelResult, Row, Spread

_HEADINGS = ("", "proposals/s", "all {n} (s)", "first (s)", "memory (MiB)", "engine is faster by")
_WIDTH = 125


def as_text(report: BenchReport) -> str:
    """The report as lines of text: one table per model, then what was compared."""
    machine = report.machine
    lines = [
        f"{report.proposals} proposals of one slice, {report.steps} DDIM steps; median (range) of {report.repeats}"
        f" interleaved run{'' if report.repeats == 1 else 's'}",
        f"{machine['device']}, {machine['threads']} of {machine['cores']} cores; torch {machine['torch']}, diffusers"
        f" {machine['diffusers']}, progidiff {machine['progidiff']}",
    ]
    for model in report.models:
        lines += ["", *_model_lines(model, report.proposals)]
    for note in report.notes:
        lines += ["", textwrap.fill(note, _WIDTH)]
    return "\n".join(lines)


def _model_lines(model: ModelResult, proposals: int) -> list[str]:
    size, (rows, cols) = model.image_size, model.slice_shape
    title = (
        f"{model.model_id}: {model.parameters / 1e6:.1f} M parameters, {model.dtype}, {size} x {size} model pixels, slices"
        f' of {rows} x {cols}, "{model.target}", engine decodes with the {model.decoder}'
    )
    table = [tuple(heading.format(n=proposals) for heading in _HEADINGS), *(_cells(row) for row in model.rows)]
    widths = [max(len(line[i]) for line in table) for i in range(len(_HEADINGS))]
    lines = [title, *("  ".join(f"{cell:<{w}}" for cell, w in zip(line, widths, strict=True)).rstrip() for line in table)]
    lines.insert(2, "  ".join("-" * width for width in widths))
    for row in model.rows:
        lines += [] if row.image_s is None else [f"{row.title}: new volume sent and set in {_spread(row.image_s)} s"]
    check = model.agreement
    same = (
        f"same noise, same decoder: {100 * check.equal_pixels:.4f} % of the pixels of {check.proposals} masks are equal,"
        f" lowest Dice {check.lowest_dice:.4f}"
    )
    if check.autoencoder_dice is not None:
        same += f"; mean Dice of the engine's masks with the autoencoder's {check.autoencoder_dice:.4f}"
    return [*lines, same]


def _cells(row: Row) -> tuple[str, ...]:
    if row.problem is not None:
        return (row.title, row.problem, "", "", "", "")
    memory = "" if row.peak_memory_mb is None else f"{row.peak_memory_mb:.0f}"
    if row.working_memory_mb is not None:
        memory += f" (+{row.working_memory_mb:.0f})"
    return (
        row.title,
        _spread(row.proposals_per_second),
        _spread(row.total_s),
        _spread(row.first_proposal_s),
        memory,
        f"{_spread(row.engine_speedup)} x" if row.engine_speedup is not None else "",
    )


def _spread(spread: Spread | None) -> str:
    return "" if spread is None else f"{_number(spread.median)} ({_number(spread.low)}–{_number(spread.high)})"


def _number(value: float) -> str:
    """Three significant digits, never in powers of ten."""
    digits = next((digits for limit, digits in ((100, 0), (10, 1), (0.1, 2)) if value >= limit), 3)
    return f"{value:.{digits}f}"
