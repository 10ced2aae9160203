"""The command line: one small file per command, registered in :mod:`progidiff.cli.app`."""

from __future__ import annotations
