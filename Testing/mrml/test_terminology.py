"""Terminology entries, read back by 3D Slicer's own terminology logic."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

import pytest

from progidiff.targets import Target, catalog, target_for

slicer = pytest.importorskip("slicer", reason="3D Slicer's library (slicer-core) is not installed")

TARGETS = [*catalog().values(), target_for("a target outside the catalog")]
NO_COLOR_GIVEN = (127, 127, 127)
LOGIC = slicer.vtkSlicerTerminologiesModuleLogic


def _parsed(entry: str) -> Any:
    parsed = slicer.vtkSlicerTerminologyEntry()
    assert LOGIC.DeserializeTerminologyEntry(entry, parsed)
    return parsed


def _triple(coded: Any) -> tuple[str, str, str]:
    return coded.GetCodingSchemeDesignator(), coded.GetCodeValue(), coded.GetCodeMeaning()


@pytest.mark.parametrize("target", TARGETS, ids=lambda target: target.key)
def test_slicer_reads_the_entry_back(target: Target) -> None:
    parsed = _parsed(target.terminology_entry)
    assert parsed.GetTerminologyContextName() == target.terminology_list
    for coded, code in ((parsed.GetCategoryObject(), target.category), (parsed.GetTypeObject(), target.type)):
        assert _triple(coded) == (code.scheme, code.value, code.meaning)
    modifier = parsed.GetTypeModifierObject()
    if target.modifier is None:
        assert not modifier.GetCodeValue()
    else:
        assert _triple(modifier) == (target.modifier.scheme, target.modifier.value, target.modifier.meaning)
    assert LOGIC.SerializeTerminologyEntry(parsed) == target.terminology_entry


def test_default_of_a_new_segment_is_what_unknown_targets_get() -> None:
    segment = slicer.vtkSegment()
    assert segment.GetTerminology() == target_for("a target outside the catalog").terminology_entry


@pytest.mark.parametrize("target", TARGETS, ids=lambda target: target.key)
def test_entry_survives_as_a_segment_tag(target: Target) -> None:
    segment = slicer.vtkSegment()
    segment.SetTerminology(target.terminology_entry)
    assert segment.GetTerminology() == target.terminology_entry
    assert not set(target.terminology_entry) & {"|", "\n"}


def test_codes_and_colours_are_those_of_an_installed_slicer() -> None:
    """Compares with terminology files as Slicer ships them; its Python library comes without."""
    folder = os.environ.get("PROGIDIFF_SLICER_TERMINOLOGIES")
    if not folder:
        pytest.skip("PROGIDIFF_SLICER_TERMINOLOGIES does not name the folder of Slicer's terminology files")
    logic = LOGIC()
    loaded = {logic.LoadTerminologyFromFile(str(path)) for path in Path(folder).glob("Segmentation*.json")}
    in_loaded = [target for target in catalog().values() if target.terminology_list in loaded]
    assert len(in_loaded) > 30
    for target in in_loaded:
        parsed = _parsed(target.terminology_entry)
        assert logic.UpdateEntryFromLoadedTerminologies(parsed, [target.terminology_list], []), target.key
        assert parsed.GetTerminologyContextName() == target.terminology_list
        assert _triple(parsed.GetTypeObject())[1:] == (target.type.value, target.type.meaning)
        coded = parsed.GetTypeModifierObject() if target.modifier else parsed.GetTypeObject()
        color = tuple(coded.GetRecommendedDisplayRGBValue())
        assert color in (target.color_rgb, NO_COLOR_GIVEN), target.key
        if "General Anatomy" in target.terminology_list:
            assert color == target.color_rgb, target.key
