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


def edit(folder: Path, change: Callable[[dict[str, Any]], None]) -> None:
    path = folder / "model_card.json"
    card = json.loads(path.read_text(encoding="utf-8"))
    change(card)
    path.write_text(json.dumps(card), encoding="utf-8")


def test_it_says_what_the_engine_says_of_the_bundled_model(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("PROGIDIFF_MODEL", raising=False)
    assert bundled_folder() == default_model_folder()
    card, theirs = read_card(), load_card(default_model_folder())
    assert card == theirs
    assert card.accuracy


def test_the_environment_names_the_default_as_it_does_for_the_worker(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PROGIDIFF_MODEL", str(folder))
    assert bundled_folder() == default_model_folder() == folder
    assert read_card("") == load_card(folder)


def test_a_folder_that_is_no_model(folder: Path, tmp_path: Path) -> None:
    with pytest.raises(ModelError, match=r"no folder .*; choose an existing model folder"):
        read_card(tmp_path / "nowhere")
    (folder / "model_index.json").unlink()
    with pytest.raises(ModelError, match='"Modèle à Größe" holds no ProGiDiff model'):
        read_card(folder)


def test_a_model_that_is_not_complete(folder: Path) -> None:
    shutil.rmtree(folder / "unet")
    for file in (folder / "scheduler").iterdir():
        file.unlink()
    with pytest.raises(ModelError, match="lacks unet, scheduler; copy the whole folder again"):
        read_card(folder)


@pytest.mark.parametrize(
    ("change", "told"),
    [
        (lambda card: card.update(format_version="2.0"), "another version of ProGiDiff"),
        (lambda card: card.pop("name"), r"damaged \(name\)"),
        (lambda card: card.update(vocabulary="liver"), "damaged"),
        (lambda card: card.update(vocabulary=["liver", 3]), "damaged"),
        (lambda card: card.update(accuracy=[{"set": "a"}]), "damaged"),
        (lambda card: card["accuracy"][0].update(value="good"), "damaged"),
    ],
)
def test_a_card_that_cannot_be_used(folder: Path, change: Callable[[dict[str, Any]], None], told: str) -> None:
    edit(folder, change)
    with pytest.raises(ModelError, match=told):
        read_card(folder)


@pytest.mark.parametrize("content", [b"{", b"[]", b"\xff\xfe"])
def test_a_card_that_is_no_json(folder: Path, content: bytes) -> None:
    (folder / "model_card.json").write_bytes(content)
    with pytest.raises(ModelError, match=r'"model_card\.json" of the model (cannot be read|is damaged); copy'):
        read_card(folder)


def test_what_a_later_version_adds_is_passed_over(folder: Path) -> None:
    edit(folder, lambda card: card.update(format_version="1.7", mood="good"))
    assert read_card(folder).model_id.startswith("progidiff-abdomen-small-")
