"""Accuracy against reference masks: one definition of every metric."""
