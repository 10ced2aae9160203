"""The versions of Slicer that this host can be: the Qt side alone. The MRML library stays slicer-core's, of Slicer 5.13."""

from __future__ import annotations

import sys
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import slicer
import slicer.util

from . import facts


@contextmanager
def as_version(version: str) -> Iterator[None]:
    """Be Slicer 5.10 or 5.13 for a while, in what Python can reach and in these points of behaviour.

    5.10 has no ``slicer.packaging``; ``connectGui`` of a parameter node wrapper leaves its observer behind; the Segment
    Editor crashes (here: raises RuntimeError) when its node brings an active effect without a segmentation.

    Raises:
        ValueError: the host cannot be that version.
    """
    if version not in facts.VERSIONS:
        raise ValueError(f"this host can be Slicer {' or '.join(facts.VERSIONS)}, not {version}")
    before, facts.chosen = facts.chosen, version
    packaging: Any = sys.modules["slicer.packaging"]
    pips = {name: getattr(slicer.util, name) for name in ("pip_install", "pip_uninstall")}
    if version == "5.10" and packaging is not None:
        sys.modules["slicer.packaging"] = None  # type: ignore[assignment]
        del slicer.packaging
        slicer.util.pip_install, slicer.util.pip_uninstall = packaging.pip_install, packaging.pip_uninstall
    try:
        yield
    finally:
        facts.chosen = before
        sys.modules["slicer.packaging"] = packaging
        if packaging is not None:
            slicer.packaging = packaging
        for name, function in pips.items():
            setattr(slicer.util, name, function)
