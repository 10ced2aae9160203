"""What the module needs before it can work: packages, model, device and worker command."""

from __future__ import annotations
