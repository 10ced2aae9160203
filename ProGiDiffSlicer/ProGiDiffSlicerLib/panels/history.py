"""Earlier prompts, as a shell remembers commands."""

from __future__ import annotations

from collections.abc import Iterable

MOST_KEPT = 20


class PromptHistory:
    """Prompts in the order of their last use, and a place in that order for the up and down keys."""

    def __init__(self, prompts: Iterable[str] = ()) -> None:
        self._prompts: list[str] = []
        self._draft = ""
        self._position = 0
        for prompt in prompts:
            self.add(prompt)

    @property
    def prompts(self) -> list[str]:
        """Latest last."""
        return list(self._prompts)

    def add(self, prompt: str) -> None:
        """Remember a prompt as the latest; an empty one is passed over."""
        prompt = prompt.strip()
        if prompt:
            self._prompts = [*(known for known in self._prompts if known != prompt), prompt][-MOST_KEPT:]
        self._position = len(self._prompts)

    def previous(self, typed: str) -> str:
        """The prompt before the present place; ``typed`` is kept as a draft to come back to."""
        if self._position == len(self._prompts):
            self._draft = typed
        if not self._prompts:
            return typed
        self._position = max(self._position - 1, 0)
        return self._prompts[self._position]

    def next(self, typed: str) -> str:
        """The prompt after the present place, in the end what had been typed."""
        if self._position >= len(self._prompts):
            return typed
        self._position += 1
        return self._draft if self._position == len(self._prompts) else self._prompts[self._position]

    def typed_anew(self) -> None:
        """The user typed something: the up key starts from the latest prompt again."""
        self._position = len(self._prompts)
