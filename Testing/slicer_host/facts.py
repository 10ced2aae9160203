"""What Slicer's Python can reach of the C++ classes that the module and this host use.

``slicer_classes.json`` holds it for Slicer 5.10 and 5.13: the properties, the methods that are slots or invokable, and the
signals, as the headers declare them, each class without what it inherits. PythonQt shows these and nothing else of a class
of CTK or Slicer: ``ctkCollapsibleButton::setCollapsed`` is public, but no slot, and Python cannot call it. Of Qt's own
classes it shows all public methods. A default argument is written with ``=``; ``only`` names what just one version has.
"""

from __future__ import annotations

import json
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any

VERSIONS = ("5.10", "5.13")
#: The version that the host is.
chosen = VERSIONS[-1]


@dataclass(frozen=True)
class Reach:
    """What Python can reach of one class.

    Attributes:
        qt_base: the class of Qt that it derives from; all public members of that can be reached too.
        properties: whether they can be written, by name.
        methods, signals: the arguments of each overload, by name.
    """

    qt_base: str
    properties: dict[str, bool]
    methods: dict[str, tuple[str, ...]]
    signals: dict[str, tuple[str, ...]]

    def takes(self, method: str, count: int) -> bool:
        """Whether some overload of the method takes that many arguments."""
        return any(_least(each) <= count <= _most(each) for each in self.methods[method])


def _most(arguments: str) -> int:
    return arguments.count(",") + 1 if arguments else 0


def _least(arguments: str) -> int:
    return _most(arguments) - arguments.count("=")


@cache
def table() -> dict[str, Any]:
    """The file."""
    return dict(json.loads(Path(__file__).with_name("slicer_classes.json").read_text(encoding="utf-8")))


@cache
def reach(name: str, version: str) -> Reach:
    """What Python can reach of the class ``name`` in a version, what it inherits included.

    Raises:
        KeyError: the table does not hold the class.
    """
    entry = table()[name]
    absent = {each for other, names in entry.get("only", {}).items() if other != version for each in names}
    properties = {
        each: not kind.endswith("read only")
        for each, kind in entry.get("properties", {}).items()
        if f"property {each}" not in absent
    }
    methods, signals = (
        {each: tuple(overloads) for each, overloads in entry.get(f"{kind}s", {}).items() if f"{kind} {each}" not in absent}
        for kind in ("method", "signal")
    )
    base = entry["base"]
    if base not in table():
        return Reach(base, properties, methods, signals)
    inherited = reach(base, version)
    return Reach(
        inherited.qt_base,
        {**inherited.properties, **properties},
        {**inherited.methods, **methods},
        {**inherited.signals, **signals},
    )


def of(name: str) -> Reach:
    """What Python can reach of the class in the version that the host is."""
    return reach(name, chosen)
