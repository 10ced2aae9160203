"""A small curve of a tuning: loss and Dice over steps, as pixels."""

from __future__ import annotations

from collections.abc import Sequence
from itertools import pairwise

import numpy as np

Points = Sequence[tuple[int, float]]

LOSS_COLOUR, DICE_COLOUR = (150, 150, 150), (0, 114, 178)
_PAPER, _FRAME, _GRID = 255, 190, 232
_MARGIN = 4


def curve(losses: Points, dices: Points, steps: int, width: int = 360, height: int = 120) -> np.ndarray:
    """Colours (height, width, 3) uint8.

    The Dice on held-out cases runs from 0 (bottom) to 1 (top), with lines at quarters and a dot at each validation. The
    loss, smoothed, fills the height from its lowest to its highest value.

    Args:
        losses, dices: (step, value).
        steps: the last step on the axis, where more are planned than made.
        width, height: in pixels.
    """
    picture = np.full((height, width, 3), _PAPER, dtype=np.uint8)
    for quarter in range(1, 4):
        picture[_row(quarter / 4, height), _MARGIN : width - _MARGIN] = _GRID
    last = max([steps, 1, *(step for step, _value in (*losses, *dices))])
    if losses:
        smooth = _smoothed([value for _step, value in losses])
        low, high = min(smooth), max(smooth)
        span = max(high - low, 1e-9)
        places = [
            (_column(step, last, width), _row((value - low) / span, height))
            for (step, _value), value in zip(losses, smooth, strict=True)
        ]
        _line(picture, places, LOSS_COLOUR)
    places = [(_column(step, last, width), _row(value, height)) for step, value in dices]
    _line(picture, places, DICE_COLOUR)
    for x, y in places:
        picture[max(0, y - 2) : y + 3, max(0, x - 2) : x + 3] = DICE_COLOUR
    picture[0], picture[-1], picture[:, 0], picture[:, -1] = _FRAME, _FRAME, _FRAME, _FRAME
    return picture


def _column(step: int, last: int, width: int) -> int:
    return _MARGIN + round(step / last * (width - 1 - 2 * _MARGIN))


def _row(value: float, height: int) -> int:
    return height - 1 - _MARGIN - round(min(max(value, 0.0), 1.0) * (height - 1 - 2 * _MARGIN))


def _smoothed(values: Sequence[float], share: float = 0.15) -> list[float]:
    """Running mean: single steps of few images jump too much to be read."""
    found, mean = [], values[0]
    for value in values:
        mean += share * (value - mean)
        found.append(mean)
    return found


def _line(picture: np.ndarray, places: Sequence[tuple[int, int]], colour: tuple[int, int, int]) -> None:
    for (x0, y0), (x1, y1) in pairwise(places):
        count = max(abs(x1 - x0), abs(y1 - y0), 1) + 1
        rows = np.linspace(y0, y1, count).round().astype(int)
        columns = np.linspace(x0, x1, count).round().astype(int)
        picture[rows, columns] = colour
        picture[np.minimum(rows + 1, len(picture) - 1), columns] = colour
