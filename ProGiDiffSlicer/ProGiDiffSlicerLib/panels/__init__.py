"""One class per panel of the module. No logic."""

from __future__ import annotations
