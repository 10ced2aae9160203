"""Results on disk: written at once or not at all."""

from __future__ import annotations
