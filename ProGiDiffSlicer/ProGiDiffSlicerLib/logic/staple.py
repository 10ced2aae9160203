"""STAPLE in small steps: the same consensus as :func:`progidiff.ranking.ensembles.staple`, without stalling the window.

Voxels on which the proposals vote alike are alike to STAPLE, so it iterates over the different patterns of votes and how
often each occurs. There are far fewer of them than voxels.
"""

from __future__ import annotations

from collections.abc import Generator

import numpy as np

from ProGiDiffSlicerLib.logic.boxes import Box, hull, pack

_MOST_ITERATIONS = 100
#: Change of the weights below which the estimate has settled, as in ITK.
_SETTLED = 1e-14
_START = 0.99999

Slices = dict[int, list[Box | None]]


def staple_steps(slices: Slices, shape: tuple[int, int]) -> Generator[None, None, dict[int, Box | None]]:
    """The consensus of proposals.

    Args:
        slices: the masks of all proposals (equally many) on every slice.
        shape: rows and columns of a slice.

    Returns:
        The consensus on every slice; yields between portions of work of a few milliseconds.
    """
    around = hull(box for boxes in slices.values() for box in boxes)
    filled = [index for index, boxes in slices.items() if any(box is not None for box in boxes)]
    if around is None or not filled:
        return dict.fromkeys(slices)
    # As the reference, inside the bounding box of all proposals: its empty slices count as background too.
    inside = range(min(filled), max(filled) + 1)
    count = len(next(iter(slices.values())))
    found: dict[bytes, int] = {}
    codes: dict[int, np.ndarray] = {}
    for index in inside:
        patterns = _patterns(slices.get(index, [None] * count), around)
        yield
        distinct, inverse = np.unique(patterns, return_inverse=True)
        numbers = np.array([found.setdefault(bytes(pattern), len(found)) for pattern in distinct], np.int64)
        codes[index] = numbers[inverse.reshape(-1)]
        yield
    counts = sum(np.bincount(code, minlength=len(found)) for code in codes.values())
    table = np.frombuffer(b"".join(found), np.uint8).reshape(len(found), -1)
    ballots = np.unpackbits(table, axis=1, count=count).astype(np.float64)
    weights = yield from _estimate(ballots, np.asarray(counts, np.float64))
    chosen = weights >= 0.5
    top, left, bottom, right = around
    result: dict[int, Box | None] = dict.fromkeys(slices)
    for index, code in codes.items():
        full = np.zeros(shape, np.bool_)
        full[top:bottom, left:right] = chosen[code].reshape(bottom - top, right - left)
        result[index] = pack(full)
        yield
    return result


def _patterns(boxes: list[Box | None], around: tuple[int, int, int, int]) -> np.ndarray:
    """How the proposals vote on each pixel: packed bits as one fixed-size byte string for each."""
    top, left, bottom, right = around
    width = (len(boxes) + 7) // 8
    packed = np.zeros((bottom - top, right - left, width), np.uint8)
    for number, box in enumerate(boxes):
        if box is not None:
            part = packed[
                box.top - top : box.top - top + box.rows, box.left - left : box.left - left + box.columns, number // 8
            ]
            part |= box.mask().astype(np.uint8) << (7 - number % 8)
    return packed.reshape(-1, width).view(f"V{width}").reshape(-1)


def _estimate(ballots: np.ndarray, counts: np.ndarray) -> Generator[None, None, np.ndarray]:
    """Probability of the foreground for each pattern, float64; expectation maximisation (Warfield et al., IEEE TMI 2004)."""
    if (ballots == ballots[:, :1]).all():
        return ballots[:, 0]  # one proposal, or all alike: nothing to weigh
    prior = float(counts @ ballots.mean(axis=1) / counts.sum())
    sensitivity = np.full(ballots.shape[1], _START)
    specificity = np.full(ballots.shape[1], _START)
    weights = np.zeros(len(ballots))
    against = 1.0 - ballots
    for _ in range(_MOST_ITERATIONS):
        with np.errstate(divide="ignore"):
            inside = np.log(prior) + ballots @ np.log(sensitivity) + against @ np.log1p(-sensitivity)
            outside = np.log1p(-prior) + ballots @ np.log1p(-specificity) + against @ np.log(specificity)
        before, weights = weights, 1.0 / (1.0 + np.exp(np.clip(outside - inside, -700, 700)))
        yield
        if counts @ (weights - before) ** 2 < _SETTLED:
            break
        heavy, light = counts * weights, counts * (1.0 - weights)
        sensitivity = np.clip(heavy @ ballots / max(heavy.sum(), 1e-300), 1e-12, 1 - 1e-12)
        specificity = np.clip(light @ against / max(light.sum(), 1e-300), 1e-12, 1 - 1e-12)
        yield
    return weights
