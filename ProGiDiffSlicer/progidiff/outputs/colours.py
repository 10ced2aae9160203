"""Colours of proposals: shades of the target's colour in a segmentation, distinct outlines in a report."""

from __future__ import annotations

import colorsys
from dataclasses import dataclass


@dataclass(frozen=True)
class Outline:
    """How one proposal is outlined: colour and line style differ, so that a grey printout can still be
    read.
    """

    colour: str
    line: str
    css: str


# Okabe and Ito's palette (2008), told apart with every common colour vision; bright ones first, on dark CT.
OUTLINES = (
    Outline("#56b4e9", "solid", "solid"),
    Outline("#e69f00", "dashed", "dashed"),
    Outline("#cc79a7", "dotted", "dotted"),
    Outline("#f0e442", "dashdot", "solid"),
    Outline("#009e73", "solid", "solid"),
    Outline("#d55e00", "dashed", "dashed"),
)


def shade(rgb255: tuple[int, int, int], place: int, count: int) -> tuple[float, float, float]:
    """Colour (0..1) of the ``place``-th of ``count`` proposals: the target's own first, then lighter and darker.

    The hue stays the target's; lightness moves in growing steps so that neighbours in rank are told apart.
    """
    red, green, blue = (channel / 255.0 for channel in rgb255)
    if place == 0:
        return red, green, blue
    hue, light, saturation = colorsys.rgb_to_hls(red, green, blue)
    levels = max(1, count // 2)
    step = (place + 1) // 2 / levels
    moved = light + (0.92 - light) * 0.75 * step if place % 2 else light - (light - 0.12) * 0.65 * step
    return colorsys.hls_to_rgb(hue, min(max(moved, 0.0), 1.0), saturation)
