"""Reading a worker's command line."""

from __future__ import annotations

import os
import shlex

from progidiff.errors import InputError


def split_command(command: str | None) -> list[str] | None:
    """A worker's command line as a list of arguments; ``None`` for this machine's own worker.

    Raises:
        InputError: quotes that are not closed, or an empty command.
    """
    if command is None:
        return None
    try:
        # on Windows the backslash separates folders and cannot protect characters
        parts = shlex.split(command, posix=os.name != "nt")
    except ValueError as error:
        raise InputError(f"The worker command cannot be read ({error}); check its quotes.") from None
    if not parts:
        raise InputError("The worker command is empty; leave it out to use this machine.")
    return [part.strip('"') for part in parts] if os.name == "nt" else parts
