"""The tables of the evaluation: one file each, by name, loaded only when asked for.

A table's module has ``TITLE``, ``OPTIONS`` (name of an option -> what it does) and ``run(setup) -> TableResult``.
"""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING, Protocol, cast

from progidiff.errors import InputError

if TYPE_CHECKING:
    from collections.abc import Mapping

    from experiments.tables.setup import TableResult, TableSetup

#: Name of a table -> its module.
TABLES: dict[str, str] = {
    "cross-validation": "experiments.tables.cross_validation",
    "n-curve": "experiments.tables.n_curve",
    "encoder": "experiments.tables.encoder",
    "mr": "experiments.tables.mr",
    "raters": "experiments.tables.raters",
    "ranking": "experiments.tables.ranking",
    "ablations": "experiments.tables.ablations",
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
