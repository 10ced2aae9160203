"""The tables of the evaluation: one file each, by name, loaded only when asked for.

A table's module has ``TITLE``, ``OPTIONS`` (name of an option -> what it does) and ``run(setup) -> TableResult``.
"""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING, Protocol, cast

from progidiff.errors import InputError

if TYPE_CHECKING:
    from collections.abc import Mapping

    from progidiff.evaluation.tables.setup import TableResult, TableSetup

#: Name of a table -> its module.
TABLES: dict[str, str] = {
    "cross-validation": "progidiff.evaluation.tables.cross_validation",
    "n-curve": "progidiff.evaluation.tables.n_curve",
    "encoder": "progidiff.evaluation.tables.encoder",
    "mr": "progidiff.evaluation.tables.mr",
    "raters": "progidiff.evaluation.tables.raters",
    "ranking": "progidiff.evaluation.tables.ranking",
    "ablations": "progidiff.evaluation.tables.ablations",
}


class Table(Protocol):
    """What the module of a table has."""

    TITLE: str
    OPTIONS: Mapping[str, str]

    def run(self, setup: TableSetup) -> TableResult:
        """Measure, resuming from what the work folder holds."""
        ...


def load_table(name: str) -> Table:
    """The module of a table.

    Raises:
        InputError: there is no such table.
    """
    if name not in TABLES:
        raise InputError(f'There is no table "{name}"; choose from {", ".join(TABLES)}.')
    return cast(Table, import_module(TABLES[name]))
