"""What the tests of training examples share: hands for the panel, and eyes for the set that it fills."""

from __future__ import annotations

import gzip
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import slicer

from progidiff.curation import CuratedCase, CuratedSet

Spin = Callable[..., None]


class Saver:
    """The panel that saves training examples, used through its own widgets."""

    def __init__(self, panels: Any, spin: Spin, folder: Path) -> None:
        """``panels``: the ModulePanels; ``folder`` becomes the folder of the set."""
        self.panels, self.folder, self._spin = panels, folder, spin
        self.curating = panels.review.curating.curating
        self.ui = panels.review.curating.ui
        panels.review.ui.examplesSection.collapsed = False
        self.ui.examplesFolderEdit.setCurrentPath(str(folder))
        self.settle()

    @property
    def said(self) -> str:
        return str(self.panels.status.text)

    @property
    def shown(self) -> str:
        """What the panel says of the set."""
        return str(self.ui.examplesLabel.text)

    @property
    def cases(self) -> list[CuratedCase]:
        """The cases of the set, read from the disk."""
        return list(CuratedSet(self.folder).list())

    def settle(self) -> None:
        """Wait until nothing is under way."""
        self._spin(lambda: not self.curating.busy and not self.panels.review.curating.looking)
        self._spin()

    def save(self) -> str:
        """Press the button and wait; what the status line says then."""
        assert self.ui.saveExampleButton.enabled
        self.ui.saveExampleButton.click()
        self.settle()
        return self.said

    def undo(self) -> str:
        """Take the last save back."""
        assert self.ui.undoSaveButton.enabled
        self.ui.undoSaveButton.click()
        self.settle()
        return self.said

    def choose(self, box: str, text: str) -> None:
        """Choose an entry of a box by its text."""
        widget = getattr(self.ui, box)
        texts = [widget.itemText(number) for number in range(widget.count)]
        widget.setCurrentIndex(texts.index(text))


def draw(node: Any, segment_id: str, volume: Any, mask: np.ndarray) -> None:
    """Change a segment as Slicer's own tools do."""
    slicer.util.updateSegmentBinaryLabelmapFromArray(mask.astype(np.uint8), node, segment_id, volume)


def only(cases: list[CuratedCase]) -> tuple[CuratedCase, np.ndarray, np.ndarray, np.ndarray]:
    """The one case with its image, affine and mask."""
    (case,) = cases
    image, affine, masks = case.read()
    assert list(masks) == list(case.targets)
    return case, image, affine, masks[case.targets[0]]


def everything_in(folder: Path) -> bytes:
    """All that is written in a folder, names included, packed files unpacked."""
    found = []
    for path in sorted(folder.rglob("*")):
        found.append(str(path.relative_to(folder)).encode())
        if path.is_file():
            data = path.read_bytes()
            found += [data, gzip.decompress(data) if data[:2] == b"\x1f\x8b" else b""]
    return b"\n".join(found)
