"""Which anatomical axis each axis of a grid runs along. numpy only: Slicer's own Python has no nibabel."""

from __future__ import annotations

import numpy as np


def nearest_axes(affine: np.ndarray) -> list[tuple[int, int]]:
    """The RAS axis (0 R, 1 A, 2 S) that each of i, j and k is nearest to, and the sign it grows with; one to one.

    Same result as ``nibabel.io_orientation``: directions are compared after taking the rotation nearest to the affine.

    Args:
        affine: float (4, 4), IJK to RAS; regular.
    """
    directions = affine[:3, :3] / np.linalg.norm(affine[:3, :3], axis=0)
    left, _, right = np.linalg.svd(directions)
    rotation = left @ right
    found = {}
    # The axis that is clearest chooses first, so that an oblique grid's other axes take what is left.
    for ijk in np.argsort(-np.abs(rotation).max(0), kind="stable"):
        ras = int(np.argmax(np.abs(rotation[:, ijk])))
        found[int(ijk)] = (ras, 1 if rotation[ras, ijk] > 0 else -1)
        rotation[ras] = 0
    return [found[ijk] for ijk in range(3)]
