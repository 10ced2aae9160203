"""What the module shows to the user and what the user answers, without a window."""

from __future__ import annotations

import logging
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any


@dataclass
class Dialogs:
    """The dialogs of one test.

    ``answers`` are given one after another, then ``default`` is; True is OK, Yes or Retry.
    """

    shown: list[tuple[str, str]] = field(default_factory=list)
    answers: list[bool] = field(default_factory=list)
    default: bool = True

    def texts(self, kind: str | None = None) -> list[str]:
        """The texts shown so far, of one kind ("info", "warning", "error", "question") or of all."""
        return [text for each, text in self.shown if kind in (None, each)]

    def ask(self, text: str) -> bool:
        """Note the question and give the next answer."""
        self.shown.append(("question", text))
        return self.answers.pop(0) if self.answers else self.default

    def tell(self, kind: str, text: str) -> None:
        """Note a message."""
        self.shown.append((kind, text))


@contextmanager
def answering_dialogs() -> Iterator[Dialogs]:
    """Every dialog of ``slicer.util`` goes to the ``Dialogs`` that this gives."""
    import slicer

    dialogs = Dialogs()
    util = slicer.util
    names = (
        "infoDisplay", "warningDisplay", "errorDisplay", "messageBox",
        "confirmOkCancelDisplay", "confirmYesNoDisplay", "confirmRetryCloseDisplay",
    )  # fmt: skip
    before = {name: getattr(util, name) for name in names}

    def telling(kind: str) -> Any:
        def show(text: str, *_arguments: Any, **_options: Any) -> None:
            logging.getLogger(__name__).debug("%s shown", kind)
            dialogs.tell(kind, text)

        return show

    def asking(text: str, *_arguments: Any, **_options: Any) -> bool:
        return dialogs.ask(text)

    replacements = {"infoDisplay": "info", "warningDisplay": "warning", "errorDisplay": "error", "messageBox": "info"}
    for name in names:
        setattr(util, name, telling(replacements[name]) if name in replacements else asking)
    try:
        yield dialogs
    finally:
        for name, function in before.items():
            setattr(util, name, function)
