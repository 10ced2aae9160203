"""The names of tables, and what their command refuses: one line, exit code 2, and nothing written."""

from __future__ import annotations

import re
from pathlib import Path

import pytest
from typer.testing import CliRunner

from experiments.__main__ import app
from experiments.tables import TABLES, load_table
from progidiff.errors import InputError


@pytest.mark.parametrize(
    ("arguments", "sentence"),
    [
        (["n-curves"], 'There is no table "n-curves"; choose from cross-validation, n-curve,'),
        (["ranking", "--data", "nowhere"], "give their folder with --data"),
        (["ranking", "--option", "evry=2"], 'This table has no option "evry" (options: sets: sets to measure'),
        (["ranking", "--option", "every"], 'The option every needs a value: "--option every=...".'),
        (["ranking", "--option", "every=0"], 'The option every takes a number from 1 to 1000, not "0".'),
        (["ranking", "--option", "every=1.5"], 'The option every takes a whole number, not "1.5".'),
        (["ranking", "--option", "sets=lungs"], "There is no evaluation set 'lungs'"),
        (["ranking", "--option", "unet=nowhere.safetensors"], 'This table has no option "unet"'),
        (["ranking", "--model", "nowhere"], 'There is no model folder "nowhere"'),
    ],
)
def test_refusals(arguments: list[str], sentence: str, responsive_folder: Path, tmp_path: Path) -> None:
    options = {"--data": str(tmp_path), "--work": str(tmp_path / "work"), "--model": str(responsive_folder)}
    rest = [part for name, value in options.items() if name not in arguments for part in (name, value)]
    result = CliRunner().invoke(app, ["table", *arguments, *rest])
    assert result.exit_code == 2, result.output
    assert sentence in result.output
    assert len(result.output.strip().splitlines()) == 1
    assert not list(tmp_path.rglob("*.md"))


def test_every_name_has_a_table() -> None:
    for name in TABLES:
        module = load_table(name)
        assert module.TITLE
        assert all(module.OPTIONS.values())
    with pytest.raises(InputError):
        load_table("tables")


def test_every_table_has_a_make_target() -> None:
    makefile = (Path(__file__).resolve().parents[2] / "Makefile").read_text(encoding="utf-8")
    (listed,) = re.findall(r"^TABLES := (.+)$", makefile, re.MULTILINE)
    assert sorted(listed.split()) == sorted(TABLES)
