"""From a prompt to training examples with the engine's real worker, by the module's own widgets and Slicer's own editing."""

from __future__ import annotations

import os
import signal
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import slicer

from progidiff.places import sample_volume

from .. import slicer_host as host
from .curating_support import Saver, everything_in
from .demo_learning import Learning, dice
from .driver import Driver, qt
from .worker_support import children

SLICES = (13, 15)


@pytest.fixture
def driver(app: Any, scene: Any) -> Iterator[Driver]:
    """The module in a window, with the middle of the sample volume to work on."""
    before = {child.pid for child in children()}
    opened = Driver()
    opened.load(sample_volume(), "Müller^Hans 4711")
    yield opened
    opened.services.settings.curatedFolder = ""
    opened.close()
    left = [child for child in children() if child.pid not in before]
    for child in left:
        child.kill()
    assert left == []


@pytest.mark.slow
def test_prompt_accept_edit_save_and_read_back(driver: Driver, tmp_path: Path) -> None:
    driver.ask("liver; left kidney", 3, 1, seed=7, slices=SLICES)
    driver.wait(lambda: driver.settled, 120)
    accepted = {}
    for target in driver.session.store.targets:
        driver.choose_target(target)
        driver.press_in_table(qt.Qt.Key_Return)
        accepted[target] = driver.panels.review.parameters.targetSegment
    learning = Learning(driver, sample_volume(), lambda until: driver.wait(until, 60))
    corrections = learning.correct(accepted)
    # Training examples need no worker.
    os.kill(driver.services.client.hello.pid, signal.SIGKILL)
    driver.wait(lambda: driver.services.client.hello is None)
    driver.settle()

    saver = Saver(driver.panels, host.spin, tmp_path / "Beispiele 肝")
    shown = learning.save(corrections, saver.folder)
    assert shown == "left kidney 1, liver 1; CT"
    values = slicer.util.arrayFromVolume(driver.volume)
    cases = {case.targets[0]: case for case in saver.cases}
    for correction in corrections:
        case = cases[correction.target]
        assert correction.strokes > 3
        assert not np.array_equal(correction.before, correction.after)
        first, stop = SLICES[0] - 1, SLICES[1]
        assert correction.after[first:stop].sum() == correction.after.sum()
        image, _affine, masks = case.read()
        assert np.array_equal(image, values[first:stop])
        assert np.array_equal(masks[correction.target], correction.after[first:stop])
        assert case.facts["edited"]
        assert case.facts["dice_to_proposal"] == pytest.approx(dice(correction.before, correction.after))
        assert case.facts["proposal"]["seed"] == 7
        assert case.facts["prompt"] == "liver; left kidney"
    written = everything_in(saver.folder)
    for text in ("Müller", "Hans", "4711", "synthetic_abdomen"):
        assert text.encode() not in written
