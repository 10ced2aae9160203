"""From the label names of data sets to target keys."""

from __future__ import annotations

from collections.abc import Mapping

import numpy as np

from progidiff.targets.catalog import catalog, find_target


def target_of(name: str) -> str | None:
    """Key of the one target that a label name means, e.g. "left_kidney" or "Leber"; ``None`` if it is not
    in the catalog.
    """
    target = find_target(name)
    return None if target is None else target.key


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
