"""ProGiDiff engine: prompt-driven diffusion proposals for organs. Importing it loads neither torch nor Slicer."""

from __future__ import annotations

__version__ = "0.1.0"
