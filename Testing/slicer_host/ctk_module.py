"""The module ``ctk``: stand-ins for the widgets of CTK, painted as a person sees them."""

from __future__ import annotations

import importlib
import sys
import types


def install() -> types.ModuleType:
    """Make ``import ctk`` work; calling it again changes nothing."""
    if "ctk" not in sys.modules:
        sys.modules["ctk"] = types.ModuleType("ctk", "Stand-ins for the widgets of CTK.")
        for part in ("ctk_basic", "ctk_numbers", "ctk_ranges", "ctk_paths"):
            importlib.import_module(f"{__package__}.{part}")
    return sys.modules["ctk"]
