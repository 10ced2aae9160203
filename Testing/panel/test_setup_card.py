"""What a model folder says about itself, read without the packages that the worker needs."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from progidiff.cards import load_card
from progidiff.errors import ModelError
from progidiff.places import default_model_folder
from ProGiDiffSlicerLib.setup.card import bundled_folder, read_card

pytestmark = pytest.mark.usefixtures("app")


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """A copy of the bundled model without its weights, at a path that is not ASCII."""
    target = tmp_path / "Modèle à Größe"
    shutil.copytree(default_model_folder(), target, ignore=shutil.ignore_patterns("*.safetensors"))
    return target


def edit(folder: Path, **changes: Any) -> None:
    path = folder / "model_card.json"
    card = json.loads(path.read_text(encoding="utf-8"))
    path.write_text(json.dumps({**card, **changes}), encoding="utf-8")


def test_it_says_what_the_engine_says_of_the_bundled_model(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("PROGIDIFF_MODEL", raising=False)
    assert bundled_folder() == default_model_folder()
    card = read_card()
    assert card == load_card(default_model_folder())
    assert card.accuracy


def test_the_environment_names_the_default_as_it_does_for_the_worker(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PROGIDIFF_MODEL", str(folder))
    assert bundled_folder() == default_model_folder() == folder
    assert read_card("") == load_card(folder)
    edit(folder, format_version="1.7", mood="good")  # what a later version adds is passed over
    assert read_card(folder).model_id.startswith("progidiff-abdomen-small-")


def _unfinished_copy(folder: Path) -> None:
    shutil.rmtree(folder / "unet")
    for file in (folder / "scheduler").iterdir():
        file.unlink()


@pytest.mark.parametrize(
    ("damage", "told"),
    [
        (shutil.rmtree, r"no folder .*; choose an existing model folder"),
        (lambda folder: (folder / "model_index.json").unlink(), '"Modèle à Größe" holds no ProGiDiff model'),
        (_unfinished_copy, "lacks unet, scheduler; copy the whole folder again"),
        (lambda folder: edit(folder, format_version="2.0"), "another version of ProGiDiff"),
        (lambda folder: edit(folder, name=None), r"damaged \(name\)"),
        (lambda folder: edit(folder, vocabulary=["liver", 3]), "damaged"),
        (lambda folder: edit(folder, accuracy=[{"set": "a"}]), "damaged"),
        (lambda folder: (folder / "model_card.json").write_bytes(b"\xff\xfe"), "cannot be read; copy"),
        (lambda folder: (folder / "model_card.json").write_bytes(b"[]"), "is damaged; copy"),
    ],
)
def test_a_folder_that_cannot_be_used(folder: Path, damage: Callable[[Path], None], told: str) -> None:
    damage(folder)
    with pytest.raises(ModelError, match=told):
        read_card(folder)
