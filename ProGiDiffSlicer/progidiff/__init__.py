"""ProGiDiff engine: prompt-driven diffusion proposals for organs. Importing it loads neither torch nor Slicer."""

from __future__ import annotations

__version__ = "0.1.0"

#: The first Python that the engine runs on, and the first that it does not.
PYTHON_WINDOW = ((3, 11), (3, 14))
