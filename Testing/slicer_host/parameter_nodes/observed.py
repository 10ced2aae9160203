"""Lists and dictionaries that write themselves back into the parameter node when they are changed."""

from __future__ import annotations

from collections.abc import Iterator, MutableMapping, MutableSequence
from typing import Any


class ObservedList(MutableSequence[Any]):
    """A list in a parameter node."""

    def __init__(self, node: Any, serializer: Any, name: str, values: list[Any]) -> None:
        self._where = (node, serializer, name)
        self._values = values

    def _save(self) -> None:
        node, serializer, name = self._where
        serializer.write(node, name, self._values)

    def __len__(self) -> int:
        return len(self._values)

    def __getitem__(self, index: Any) -> Any:
        return self._values[index]

    def __setitem__(self, index: Any, value: Any) -> None:
        self._values[index] = value
        self._save()

    def __delitem__(self, index: Any) -> None:
        del self._values[index]
        self._save()

    def insert(self, index: int, value: Any) -> None:
        self._values.insert(index, value)
        self._save()

    def __eq__(self, other: object) -> bool:
        return list(self) == list(other) if isinstance(other, list | ObservedList) else NotImplemented

    def __repr__(self) -> str:
        return f"ObservedList({self._values})"

    __hash__ = None  # type: ignore[assignment]


class ObservedDict(MutableMapping[Any, Any]):
    """A dictionary in a parameter node."""

    def __init__(self, node: Any, serializer: Any, name: str, values: dict[Any, Any]) -> None:
        self._where = (node, serializer, name)
        self._values = values

    def _save(self) -> None:
        node, serializer, name = self._where
        serializer.write(node, name, self._values)

    def __len__(self) -> int:
        return len(self._values)

    def __iter__(self) -> Iterator[Any]:
        return iter(self._values)

    def __getitem__(self, key: Any) -> Any:
        return self._values[key]

    def __setitem__(self, key: Any, value: Any) -> None:
        self._values[key] = value
        self._save()

    def __delitem__(self, key: Any) -> None:
        del self._values[key]
        self._save()

    def __repr__(self) -> str:
        return f"ObservedDict({self._values})"
