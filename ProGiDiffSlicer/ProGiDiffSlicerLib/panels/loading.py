"""Panels from the .ui files that ship with the module."""

from __future__ import annotations

import os
from typing import Any

import slicer

_RESOURCES = os.path.join(os.path.dirname(os.path.dirname(os.path.dirname(os.path.abspath(__file__)))), "Resources")


def load_panel(name: str) -> tuple[Any, Any]:
    """The widget of ``Resources/UI/<name>.ui`` and its children as attributes by their names."""
    widget = slicer.util.loadUI(os.path.join(_RESOURCES, "UI", f"{name}.ui"))
    return widget, slicer.util.childWidgetVariables(widget)
