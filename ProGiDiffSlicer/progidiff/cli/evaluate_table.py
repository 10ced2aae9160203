"""The tables that ``progidiff evaluate`` prints."""

from __future__ import annotations

from pathlib import Path

from rich.console import Console
from rich.table import Table
from rich.text import Text

from progidiff.cli.failures import one_line
from progidiff.evaluation.evaluate import EvaluationDocument
from progidiff.evaluation.report import REPORT_NAME, answer_name, failures, figure_text, number
from progidiff.evaluation.scoring import ANSWERS
from progidiff.evaluation.summary import MEAN, TargetSummary


def print_evaluation(document: EvaluationDocument, out: Path) -> None:
    """Print Dice, distances and presence errors."""
    settings = document.settings
    console = Console(width=210, highlight=False)
    model = settings.model_id + (f" with adapter {settings.adapter_id}" if settings.adapter_id else "")
    made = f"{model}, N = {settings.proposals}, {settings.steps} steps, seed {settings.seed}"
    console.print(_table(f"Dice (95 % interval over patients), {made}", document, "dice"))
    if settings.tolerance_mm is not None:
        by = settings.distances_by
        console.print(_table(f"HD95 in mm over finite ones, and failures ({by})", document, "hd95_mm"))
        console.print(_table(f"NSD at {settings.tolerance_mm:g} mm ({by})", document, "nsd"))
    console.print(_presence(document))
    for note in document.notes:
        console.print(Text(note), soft_wrap=True)
    for failure in document.failures:
        console.print(Text(f"Not measured: {failure.name} of {failure.set}: {one_line(failure.reason)}"), soft_wrap=True)
    console.print(Text(f"Results in {out}; open {REPORT_NAME} there first."), soft_wrap=True)


def _table(title: str, document: EvaluationDocument, field: str) -> Table:
    table = Table(title=title)
    for head in ("set", "target", "n"):
        table.add_column(head)
    for answer in ANSWERS:
        table.add_column(answer_name(answer, document.settings), justify="right")
    for row in document.summary:
        if not row.cases:
            continue
        cells = []
        for answer in ANSWERS:
            summary = row.answers[answer]
            text = figure_text(getattr(summary, field), 1 if field == "hd95_mm" else 3)
            cells.append(f"{text}; {failures(summary)} failed" if field == "hd95_mm" and summary.hd95_failures else text)
        table.add_row(row.set, row.target, _size(row), *cells, end_section=row.target == MEAN)
    return table


def _presence(document: EvaluationDocument) -> Table:
    table = Table(title="Found or not: cases missed and invented by rank 1 and by the consensus")
    heads = ("set", "target", "present", "missed", "missed by consensus", "absent", "invented", "invented by consensus")
    for head in (*heads, "empty proposals where absent", "calibration error"):
        table.add_column(head, justify="left" if head in ("set", "target") else "right")
    for row in document.summary:
        if row.target == MEAN:
            continue
        first, consensus = row.answers["rank1"].presence, row.answers["consensus"].presence
        counts = (row.cases, first["FN"], consensus["FN"], row.absent, first["FP"], consensus["FP"])
        shares = (number(row.absent_empty_share, 2), number(row.calibration_error))
        table.add_row(row.set, row.target, *(str(n) for n in counts), *shares)
    return table


def _size(row: TargetSummary) -> str:
    patients = f"{row.patients} patient{'s' if row.patients != 1 else ''}"
    if row.dimensions == 2:
        return f"{row.cases} slice{'s' if row.cases != 1 else ''}, {patients}"
    return f"{row.cases} volume{'s' if row.cases != 1 else ''} ({row.slices} slices), {patients}"
