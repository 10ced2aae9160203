"""The model card: what it accepts, what it refuses, and that nothing is lost on the way through the file."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from progidiff.cards import (
    Accuracy,
    TrainingSource,
    TrainingStage,
    load_card,
    make_card,
    save_card,
)
from progidiff.errors import ModelError
from progidiff.places import CARD_NAME


def fields(**changes: Any) -> dict[str, Any]:
    return {
        "model_id": "tiny-1",
        "name": "Tiny",
        "licence": "Apache-2.0",
        "modalities": ["CT", "MR"],
        "planes": ["axial", "coronal"],
        "vocabulary": ["liver", "left kidney"],
        "prompt_template": "the {target} in {modality}",
        "windows": {
            "CT": {"kind": "hu", "low": -160, "high": 240},
            "MR": {"kind": "percentile", "low": 1, "high": 99},
        },
        "image_size": 256,
        "spacing_mm": 1.5,
        "latent_shift": [0.1, -0.2],
        "latent_scale": [0.5, 2.0],
        "trained_on": [TrainingSource(name="phantoms", licence="Apache-2.0", what="label maps", n=100)],
        "training": [TrainingStage(stage="base", steps=10, seconds=1.5, device="cpu", seeds=[0, 1])],
        "accuracy": [Accuracy(set="held-out", target="liver", metric="dice", value=0.91, n_slices=7, n_patients=3)],
        "trainable_parameters": 123,
        "notes": "Leber und Milz, gemäß Vorlage",
        "sha256": {"unet/diffusion_pytorch_model.safetensors": "0" * 64},
        **changes,
    }


def test_card_round_trip_keeps_every_field(tmp_path: Path) -> None:
    card = make_card(fields())
    save_card(card, tmp_path)
    assert load_card(tmp_path) == card
    assert [path.name for path in tmp_path.iterdir()] == [CARD_NAME]


def test_card_keeps_fields_of_a_later_minor_version(tmp_path: Path) -> None:
    save_card(make_card(fields(format_version="1.7", adapter_of="other")), tmp_path)
    card = load_card(tmp_path)
    save_card(card, tmp_path)
    written = json.loads((tmp_path / CARD_NAME).read_text(encoding="utf-8"))
    assert (written["format_version"], written["adapter_of"]) == ("1.7", "other")


def test_prompt_and_window_of_a_modality() -> None:
    card = make_card(fields())
    assert card.prompt("liver") == "the liver in CT"
    assert card.prompt("liver", "MR") == "the liver in MR"
    assert card.window("MR").kind == "percentile"
    assert card.window().high == 240
    only_ct = make_card(fields(modalities=["CT"], windows={"CT": fields()["windows"]["CT"]}))
    with pytest.raises(ModelError, match="made for CT, not for MR"):
        only_ct.window("MR")


@pytest.mark.parametrize(
    ("changes", "part_of_message"),
    [
        ({"format_version": "2.0"}, "format version 2.0"),
        ({"format_version": "next"}, "format_version"),
        ({"modalities": []}, "modalities"),
        ({"modalities": ["US"]}, "modalities.0"),
        ({"windows": {"CT": {"kind": "hu", "low": 1, "high": 0}}}, "not below its high end"),
        ({"windows": {"CT": {"kind": "hu", "low": -160, "high": 240}}}, "no window for MR"),
        ({"windows": {"CT": {"kind": "percentile", "low": -1, "high": 99}}}, "within 0 and 100"),
        ({"latent_scale": [1.0]}, "differ in length"),
        ({"latent_scale": [0.0, 1.0]}, "latent_scale.0"),
        ({"prediction_type": "epsilon"}, "prediction_type"),
        ({"prompt_template": "an organ"}, "prompt template"),
        ({"prompt_template": "{target} {size}"}, "prompt template"),
        ({"vocabulary": ["liver", "liver"]}, "twice"),
        ({"image_size": 0}, "image_size"),
        ({"spacing_mm": -1}, "spacing_mm"),
        ({"sha256": {"a": "abc"}}, "sha256.a"),
    ],
)
def test_a_wrong_card_is_refused_in_one_line(tmp_path: Path, changes: dict[str, Any], part_of_message: str) -> None:
    good = make_card(fields()).to_dict()
    (tmp_path / CARD_NAME).write_text(json.dumps({**good, **changes}), encoding="utf-8")
    with pytest.raises(ModelError, match=part_of_message) as caught:
        load_card(tmp_path)
    assert "\n" not in str(caught.value)


def test_a_missing_field_is_named(tmp_path: Path) -> None:
    incomplete = make_card(fields()).to_dict()
    del incomplete["licence"]
    (tmp_path / CARD_NAME).write_text(json.dumps(incomplete), encoding="utf-8")
    with pytest.raises(ModelError, match="licence: missing"):
        load_card(tmp_path)


@pytest.mark.parametrize("content", [b"", b"{", b"[]", b"\xff\xfe\x00", b"<html></html>"])
def test_a_card_that_is_no_card(tmp_path: Path, content: bytes) -> None:
    (tmp_path / CARD_NAME).write_bytes(content)
    with pytest.raises(ModelError, match="copy the model folder again"):
        load_card(tmp_path)


def test_a_folder_without_card(tmp_path: Path) -> None:
    with pytest.raises(ModelError, match=f"no {CARD_NAME}"):
        load_card(tmp_path)
