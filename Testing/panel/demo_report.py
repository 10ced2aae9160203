"""The page of the demonstration that shows proposals before and after tuning, side by side."""

from __future__ import annotations

import base64
import html
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from progidiff.outputs.colours import Outline
from progidiff.outputs.figures import Frame, display_window, outlines_png, windowed
from progidiff.volumes.reading import Volume
from progidiff.volumes.slicing import extract_slice, plan_slices

REPORT_NAME = "before-and-after.html"
_NOTE = (
    "The pictures and figures are of the very slices that were tuned on: they show what was learned of the corrections, and "
    "nothing about other patients. What an adapter gives on patients that it never saw stands on its card, measured on "
    "cases that were held out; with the examples of a single volume there are none."
)
_POLICY = "default-src 'none'; img-src data:; style-src 'unsafe-inline'"
_STYLE = """
body { font: 15px/1.5 system-ui, sans-serif; max-width: 62rem; margin: 2rem auto; padding: 0 1rem; color-scheme: light dark }
table { border-collapse: collapse; margin: 1rem 0 } td, th { padding: .25rem .9rem .25rem 0; text-align: left }
td.number { text-align: right; font-variant-numeric: tabular-nums }
.pair { display: grid; grid-template-columns: 1fr 1fr; gap: 1rem } img { width: 100% } figure { margin: 0 }
.note { border-left: 4px solid #c80; padding-left: .8rem }
"""


@dataclass(frozen=True, eq=False)
class Pair:
    """First-ranked proposals of a target, bool (K, J, I), and the correction that was tuned on.

    Attributes:
        before, after: Dice of each to the correction.
    """

    target: str
    correction: np.ndarray
    base: np.ndarray
    tuned: np.ndarray
    before: float
    after: float


def write_page(path: Path, volume: Volume, pairs: list[Pair], facts: dict[str, str]) -> None:
    """Write the page: a table of Dice, what was tuned, and for each target the slice on which most has changed."""
    rows = "".join(
        f'<tr><td>{_text(pair.target)}</td><td class="number">{pair.before:.3f}</td>'
        f'<td class="number">{pair.after:.3f}</td></tr>'
        for pair in pairs
    )
    about = "".join(f"<tr><td>{_text(name)}</td><td>{_text(value)}</td></tr>" for name, value in facts.items())
    body = "".join(_section(volume, pair) for pair in pairs)
    path.write_text(
        '<!doctype html><html lang="en"><meta charset="utf-8">'
        f'<meta http-equiv="Content-Security-Policy" content="{_POLICY}">'
        f"<title>Before and after tuning</title><style>{_STYLE}</style>"
        f'<h1>Before and after tuning</h1><p class="note">{_text(_NOTE)}</p>'
        "<h2>Dice of the first-ranked proposal to the correction (training cases)</h2>"
        f"<table><tr><th>target<th>before<th>after</tr>{rows}</table>"
        f"<h2>The tuning</h2><table>{about}</table>{body}</html>\n",
        encoding="utf-8",
    )


def _section(volume: Volume, pair: Pair) -> str:
    plan = plan_slices(volume.geometry)
    others = tuple(axis for axis in range(3) if axis != plan.axis)
    changed = (pair.base ^ pair.tuned).sum(axis=others)
    index = int(changed.argmax() if changed.any() else pair.correction.sum(axis=others).argmax())
    frame = Frame(
        windowed(extract_slice(volume.array, plan, index), display_window(volume.array, volume.modality)), plan.spacing_rc
    )
    figures = []
    for name, mask, value in (("before", pair.base, pair.before), ("after", pair.tuned, pair.after)):
        styles = (Outline("#e69f00", "solid", "solid"), Outline("#ffffff", "dashed", "dashed"))
        masks = [extract_slice(each, plan, index) for each in (mask, pair.correction)]
        picture = base64.b64encode(outlines_png(frame, masks, styles)).decode()
        alt = _text(f"{pair.target} {name} tuning, slice {index + 1}")
        caption = f"{name} tuning, Dice {value:.3f} over all slices"
        figures.append(
            f'<figure><img alt="{alt}" src="data:image/png;base64,{picture}"><figcaption>{caption}</figcaption></figure>'
        )
    title = _text(f"{pair.target}, slice {index + 1}")
    legend = "Orange: first-ranked proposal. White, dashed: the correction."
    return f'<h2>{title}</h2><p>{legend}</p><div class="pair">{"".join(figures)}</div>'


def _text(text: str) -> str:
    return html.escape(text)
