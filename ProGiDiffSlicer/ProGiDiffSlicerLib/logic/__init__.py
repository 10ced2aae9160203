"""A run from a prompt to what has arrived, and the processes of tuning and of training examples. No widgets."""

from __future__ import annotations
