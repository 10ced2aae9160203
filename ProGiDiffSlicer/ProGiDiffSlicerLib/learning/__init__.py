"""Training examples and adapters."""

from __future__ import annotations
