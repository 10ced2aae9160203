"""The recording of ``record.py``, made now, is the stored one but for what rounding on another machine changes."""

from __future__ import annotations

import os
from pathlib import Path

import pytest

from .compare import ROOT, STORED, Recorded, compared, inconsistencies, record


@pytest.mark.skipif(not hasattr(os, "fork"), reason="the system has no fork")
def test_masks_rankings_messages_kills_and_panels_are_as_stored_and_agree(tmp_path: Path) -> None:
    now = record(ROOT, tmp_path / "inputs", tmp_path / "out")
    assert list(inconsistencies(now)) == []
    table = compared(Recorded.read(STORED), now, exact=False)
    assert len(table) > 40
    assert {name: found for name, found in table.items() if found} == {}
