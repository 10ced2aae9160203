"""The module inside 3D Slicer: panels, session, scene and the client of the worker process. It never imports torch."""

from __future__ import annotations
