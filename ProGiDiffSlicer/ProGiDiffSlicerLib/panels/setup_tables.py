"""The words and tables of the setup panel: packages, the model, its accuracy."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import qt
from slicer.i18n import tr as _

from progidiff.cards import Accuracy, ModelCard
from ProGiDiffSlicerLib.setup.status import Package, Status


def show_packages(table: Any, status: Status) -> None:
    """One row per package that the worker needs."""
    rows = [(each.need.name, each.installed, each.need.window, _state_text(each)) for each in status.packages]
    _fill(table, [_("Package"), _("Installed"), _("Needed"), _("State")], rows)


def show_accuracy(table: Any, card: ModelCard) -> None:
    """One row per data set and target, one column per metric."""
    metrics = list(dict.fromkeys(figure.metric for figure in card.accuracy))
    lines: dict[tuple[str, str], dict[str, Accuracy]] = {}
    for figure in card.accuracy:
        lines.setdefault((figure.set, figure.target), {})[figure.metric] = figure
    rows = []
    for (data_set, target), figures in lines.items():
        patients = max(figure.n_patients for figure in figures.values())
        values = [f"{figures[metric].value:.2f}" if metric in figures else "" for metric in metrics]
        rows.append((f"{data_set}, n={patients}", target, *values))
    _fill(table, [_("Patients of"), _("Target"), *metrics], rows)


def model_text(card: ModelCard, bundled: bool) -> str:
    """What the model is, in a few lines."""
    lines = [
        _("Bundled model: {name}").format(name=card.name) if bundled else card.name,
        _("Images: {modalities}. Licence: {licence}.").format(modalities=", ".join(card.modalities), licence=card.licence),
        _("Knows: {vocabulary}.").format(vocabulary=", ".join(card.vocabulary) or _("nothing yet, it is not trained")),
    ]
    return "\n".join([*lines, card.notes] if card.notes else lines)


def _state_text(package: Package) -> str:
    return {
        "ok": _("ready"),
        "missing": _("not installed"),
        "unfit": _("wrong version"),
        "damaged": _("damaged"),
    }[package.state]


def _fill(table: Any, titles: list[str], rows: Sequence[tuple[str, ...]]) -> None:
    table.setColumnCount(len(titles))
    table.setHorizontalHeaderLabels(titles)
    table.setRowCount(len(rows))
    for row, cells in enumerate(rows):
        for column, text in enumerate(cells):
            table.setItem(row, column, qt.QTableWidgetItem(text))
    table.verticalHeader().setVisible(False)
    table.resizeColumnsToContents()
    table.resizeRowsToContents()
    table.horizontalHeader().setStretchLastSection(True)
