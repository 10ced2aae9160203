"""Logic of the module: volumes, proposals and accepted segments in the scene. No widgets."""

from __future__ import annotations
