"""How an installation or a removal ended."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal


@dataclass(frozen=True)
class Outcome:
    """What is told to the user.

    Attributes:
        kind: ``"restart"`` means that Slicer has to be restarted, after which it goes on by one click.
        message: one sentence; for a failure with the next step.
        details: what was printed, for a support person.
    """

    kind: Literal["done", "declined", "failed", "restart"]
    message: str
    details: str = ""
