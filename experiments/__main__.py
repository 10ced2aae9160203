"""``python -m experiments``: the product's measuring with the public sets by name, the tables, and the speed."""

from __future__ import annotations

from progidiff.cli import accuracy, bench, evaluate, table
from progidiff.cli.app import program
from progidiff.datasets.shared_slices import SHARED

app = program(
    "experiments", "What the documents say was measured, measured again.", (accuracy, evaluate, table, bench), SHARED
)

if __name__ == "__main__":
    app(prog_name="experiments")
