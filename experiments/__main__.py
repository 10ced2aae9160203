"""``python -m experiments``: the product's measuring with the public sets by name, the tables, and the speed."""

from __future__ import annotations

from experiments.bench import command as bench
from experiments.shared_slices import SHARED
from experiments.tables import command as table
from progidiff.cli import evaluate
from progidiff.cli.app import program

app = program("experiments", "What the documents say was measured, measured again.", (evaluate, table, bench), SHARED)

if __name__ == "__main__":
    app(prog_name="experiments")
