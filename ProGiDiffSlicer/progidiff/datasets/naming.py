"""From the label names of data sets to target keys."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np

from progidiff.targets.catalog import catalog, find_target


def target_of(name: str) -> str | None:
    """Key of the one target that a label name means, e.g. "left_kidney" or "Leber"; ``None`` if it is not
    in the catalog.
    """
    target = find_target(name)
    return None if target is None else target.key


def read_json(path: Path) -> Any:
    """The content of a JSON file, with or without a byte-order mark.

    Raises:
        OSError: it cannot be read.
        ValueError: it is no JSON, or gives something twice, of which all but the last would be lost.
    """
    return json.loads(path.read_text(encoding="utf-8-sig"), object_pairs_hook=_once)


def _once(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    found = dict(pairs)
    if len(found) < len(pairs):
        twice = next(key for key, _ in pairs if sum(key == other for other, _ in pairs) > 1)
        raise ValueError(f"it gives '{twice}' twice")
    return found


def with_unions(labels: Mapping[str, np.ndarray]) -> dict[str, np.ndarray]:
    """Add the targets all of whose parts are labelled, e.g. "kidneys" where both single kidneys are.

    Args:
        labels: target key -> bool mask; all masks have one shape.
    """
    result = dict(labels)
    # Parts may be unions themselves (a lung of its lobes), so go on until nothing new is complete.
    while complete := [
        target
        for target in catalog().values()
        if target.parts and target.key not in result and result.keys() >= {*target.parts}
    ]:
        for target in complete:
            result[target.key] = np.logical_or.reduce([result[part] for part in target.parts])
    return result
