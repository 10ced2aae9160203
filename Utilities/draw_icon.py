"""Draw the icon of the module and of the extension: an organ with several proposals of its outline.

Run it after a change: ``.venv/bin/python Utilities/draw_icon.py``.
"""

from __future__ import annotations

from pathlib import Path

import matplotlib

matplotlib.use("Agg")

import matplotlib.pyplot as plt
import numpy as np

ROOT = Path(__file__).resolve().parents[1]
ICONS = (ROOT / "ProGiDiffSlicer/Resources/Icons/ProGiDiffSlicer.png", ROOT / "Resources/ProGiDiffSlicer.png")
SIZE = 128

# Smooth closed curves: radius over the angle as a sum of waves (order, amplitude, phase).
_ORGAN = ((1, 0.10, 0.4), (2, 0.14, 2.6), (3, 0.06, 1.0))
_PROPOSALS = (
    ("#2a9d8f", 1.13, ((2, 0.05, 0.6), (4, 0.03, 2.0))),
    ("#e9c46a", 1.02, ((3, 0.06, 2.2), (5, 0.02, 0.3))),
    ("#e76f51", 0.90, ((2, 0.07, 3.4), (4, 0.03, 1.1))),
)


def curve(scale: float, extra: tuple[tuple[int, float, float], ...] = ()) -> tuple[np.ndarray, np.ndarray]:
    """x and y of a closed curve around the origin."""
    angle = np.linspace(0, 2 * np.pi, 400)
    radius = 0.66 + sum(a * np.cos(order * angle + phase) for order, a, phase in (*_ORGAN, *extra))
    return scale * radius * np.cos(angle) - 0.02, scale * 0.82 * radius * np.sin(angle) + 0.2


def draw(path: Path) -> None:
    """Write the icon as a PNG of 128 x 128 pixels without a background."""
    figure = plt.figure(figsize=(1, 1), dpi=SIZE)
    axes = figure.add_axes((0, 0, 1, 1))
    axes.set_xlim(-1, 1)
    axes.set_ylim(-1, 1)
    axes.axis("off")
    axes.fill(*curve(1.0), color="#e76f51", alpha=0.35, linewidth=0)
    for colour, scale, extra in _PROPOSALS:
        axes.plot(*curve(scale, extra), color=colour, linewidth=3.2)
    # The line in which the prompt is typed.
    axes.plot([-0.8, 0.45], [-0.84, -0.84], color="#5f6b7a", linewidth=5, solid_capstyle="round")
    axes.plot([0.74, 0.74], [-0.95, -0.73], color="#2a9d8f", linewidth=4, solid_capstyle="round")
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path, dpi=SIZE, transparent=True, metadata={"Software": None})
    plt.close(figure)


if __name__ == "__main__":
    for icon in ICONS:
        draw(icon)
