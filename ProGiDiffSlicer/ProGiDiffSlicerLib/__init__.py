"""The module inside 3D Slicer: panels, logic and the client of the worker process. It never imports torch."""

from __future__ import annotations
