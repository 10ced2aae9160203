"""The command line; :mod:`progidiff.cli.app` is the program."""

from __future__ import annotations
