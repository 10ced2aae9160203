"""Volumes: reading them, where they lie in the patient, and their slices."""

from __future__ import annotations
