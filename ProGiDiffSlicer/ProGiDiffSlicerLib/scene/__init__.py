"""Segments, volumes and proposals as nodes of the scene: accepting, undo, editing, exporting."""

from __future__ import annotations
