"""``report.html`` of an evaluation: figures, plots and pictures, to be read without any program.

Like the report of a result it loads nothing, runs no script and escapes every text.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from progidiff.evaluation.evaluate import EvaluationDocument, SettingsRecord
from progidiff.evaluation.examples import ExamplePicture
from progidiff.evaluation.plots import calibration_plot, curve_plot, dice_plot, score_plot
from progidiff.evaluation.scoring import ANSWERS, SINGLE
from progidiff.evaluation.summary import MEAN, AnswerSummary, Figure, TargetSummary
from progidiff.outputs.report import OUTLINES, render_page

REPORT_NAME, JSON_NAME, CSV_NAME = "report.html", "evaluation.json", "evaluation.csv"


@dataclass(frozen=True)
class Section:
    """One set: the rows of its targets and of their mean, its plots as (caption, PNG), its pictures by target."""

    title: str
    what: str
    rows: list[TargetSummary]
    plots: list[tuple[str, bytes]]
    pictures: dict[str, list[ExamplePicture]]


def render_evaluation(document: EvaluationDocument, examples: Sequence[ExamplePicture]) -> str:
    """HTML text of the report."""
    settings = document.settings
    return render_page(
        "evaluation_report.html.j2",
        doc=document,
        sections=sections(document, examples),
        answers=[(answer, answer_name(answer, settings)) for answer in ANSWERS],
        single=[(answer, answer_name(answer, settings)) for answer in SINGLE],
        outlines=OUTLINES,
        number=number,
        failures=failures,
        mean_name=MEAN,
        json_name=JSON_NAME,
        csv_name=CSV_NAME,
    )


def sections(document: EvaluationDocument, examples: Sequence[ExamplePicture]) -> list[Section]:
    """The report's parts: one for each set, and for slices and volumes of a set apart."""
    found = []
    for name, dimensions in dict.fromkeys((row.set, row.dimensions) for row in document.summary):
        rows = [row for row in document.summary if (row.set, row.dimensions) == (name, dimensions)]
        cases = [c for c in document.cases if (c.set, c.dimensions) == (name, dimensions)]
        overall = rows[-1]
        plots: list[tuple[str, bytes]] = []
        if any(row.cases for row in rows):
            settings = document.settings
            plots.append(("Dice of rank 1 by organ", dice_plot(rows, cases, settings.proposals)))
            plots.append((f"Dice by number of proposals, {overall.target}", curve_plot(overall, settings.k)))
            plots.append(("Calibration of the mean probability", calibration_plot(overall)))
            plots.append(("Score of rank 1 against its Dice", score_plot(cases)))
        pictures: dict[str, list[ExamplePicture]] = {}
        for example in examples:
            if (example.set, example.dimensions) == (name, dimensions):
                pictures.setdefault(example.target, []).append(example)
        patients = len({c.patient for c in cases})
        slices = sum(c.slices for c in cases)
        if dimensions == 2:
            what = f"{_n(slices, 'slice')} of {_n(patients, 'patient')}, measured in 2-D"
        else:
            what = f"{_n(len(cases), 'volume')} ({_n(slices, 'slice')}) of {_n(patients, 'patient')}, measured in 3-D"
        found.append(Section(name, what, rows, plots, pictures))
    return found


def answer_name(answer: str, settings: SettingsRecord) -> str:
    """Heading of an answer."""
    return {
        "rank1": "rank 1",
        "medoid": "medoid",
        "consensus": "consensus",
        "ensemble": "mean probability",
        "mean": f"mean of {settings.proposals}",
        "best": f"best of {settings.proposals}",
        "rand_top_k": f"RandTop-{settings.k}",
    }[answer]


def figure_text(figure: Figure, digits: int = 3) -> str:
    """``"0.812 (0.745-0.871)"``, without the interval where there is none."""
    if figure.mean is None:
        return "–"
    mean = f"{figure.mean:.{digits}f}"
    if figure.low is None or figure.high is None:
        return mean
    return f"{mean} ({figure.low:.{digits}f}–{figure.high:.{digits}f})"


def number(value: float | None, digits: int = 3) -> str:
    """A number, or a dash where there is none."""
    return "–" if value is None else f"{value:.{digits}f}"


def failures(answer: AnswerSummary) -> str:
    """How many distances are infinite, with a decimal only for answers that average proposals; "" for none."""
    count = answer.hd95_failures
    if not count:
        return ""
    return f"{count:.0f}" if float(count).is_integer() else f"{count:.1f}"


def _n(count: int, word: str) -> str:
    return f"{count} {word}" if count == 1 else f"{count} {word}s"
