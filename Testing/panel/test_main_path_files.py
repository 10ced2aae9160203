"""Through how many of the product's files a prompt goes, from the click on Propose to the proposals that are shown."""

from __future__ import annotations

import os
import sys
import threading
from pathlib import Path
from typing import Any

import pytest

from progidiff.places import sample_volume

from .driver import Driver

PRODUCT = Path(__file__).resolve().parents[2] / "ProGiDiffSlicer"
#: No more than this, the window's process and the worker together: whoever follows a prompt reads them all.
MOST = 58

# What every Python process that finds this file does: it writes down the product's files of which a function has run. The
# body of a file or a class, which runs when it is imported, does not count.
COUNTING = """
import os, sys, threading

product, told, seen = os.environ["PRODUCT"] + os.sep, os.environ["FILES_TOLD"], set()

def note(frame, event, argument):
    code = frame.f_code
    if event == "call" and code.co_filename not in seen and code.co_flags & 1:
        seen.add(code.co_filename)
        if code.co_filename.startswith(product):
            with open(told, "a", encoding="utf-8") as file:
                file.write(code.co_filename[len(product):] + chr(10))

threading.setprofile(note)
sys.setprofile(note)
"""


@pytest.mark.slow
def test_a_prompt_goes_through_few_files(app: Any, scene: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "sitecustomize.py").write_text(COUNTING)
    told = tmp_path / "files"
    monkeypatch.setenv("PRODUCT", str(PRODUCT))
    monkeypatch.setenv("FILES_TOLD", str(told))
    monkeypatch.setenv("PYTHONPATH", os.pathsep.join([str(tmp_path), os.environ.get("PYTHONPATH", "")]))
    driver = Driver()
    try:
        driver.load(sample_volume())
        driver.fill("liver", 1, 1, 1, (13, 13))
        before = sys.getprofile()
        exec(COUNTING, {})
        try:
            driver.propose()
            driver.wait(lambda: driver.settled, 480)
        finally:
            sys.setprofile(before)
            threading.setprofile(None)
        assert driver.complete, driver.said
    finally:
        driver.close()
    files = sorted(set(told.read_text(encoding="utf-8").splitlines()))
    assert "progidiff/sampling/sampler.py" in files, "the worker has told its files too"
    assert len(files) <= MOST, "\n".join(files)
