"""Tags of segments: text that survives Slicer's own tag list. Standard library only."""

from __future__ import annotations

import re


def escape_tag(text: str, *, key: bool = False) -> str:
    """Protect the characters that Slicer's tag list cannot hold: ``|`` anywhere and ``:`` in a key.

    Slicer writes tags as ``key:value|key:value|`` without any protection, so a value is cut at its first
    ``|`` and a key at its first ``:``. They become ``%7C`` and ``%3A``; all other text, and so nearly every
    tag, stays readable as it is. ``unescape_tag`` gives the text back exactly.
    """
    special = r"\||\r|:" if key else r"\||\r"
    return re.sub(special + r"|%(?=7C|3A|0D|25)", lambda m: f"%{ord(m.group()):02X}", text)


def unescape_tag(text: str) -> str:
    """The text that ``escape_tag`` was given."""
    return re.sub("%(7C|3A|0D|25)", lambda m: chr(int(m.group(1), 16)), text)
