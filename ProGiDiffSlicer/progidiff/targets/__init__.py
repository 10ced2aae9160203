"""What can be asked for: targets, their names, codes and colours, and the parser of prompts."""

from __future__ import annotations

from progidiff.targets.catalog import LANGUAGES, Code, Target, catalog, find_target, target_for
from progidiff.targets.prompts import MAX_PROMPT_LENGTH, complete, parse_prompt

__all__ = [
    "LANGUAGES",
    "MAX_PROMPT_LENGTH",
    "Code",
    "Target",
    "catalog",
    "complete",
    "find_target",
    "parse_prompt",
    "target_for",
]
