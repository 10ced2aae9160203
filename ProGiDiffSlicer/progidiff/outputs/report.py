"""``report.html``: a result to be read without any program: pictures, tables, how it was made.

The page loads nothing from outside (a content security policy in it forbids that), runs no script, escapes
every text, and is legible in light and dark mode and on paper.
"""

from __future__ import annotations

import base64
import io
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
from jinja2 import Environment, PackageLoader, StrictUndefined
from markupsafe import Markup

from progidiff.outputs.document import DOCUMENT_NAME, ProposalRecord, ProposalsDocument, TargetRecord

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure


REPORT_NAME = "report.html"


@dataclass(frozen=True)
class SlicePicture:
    """Two PNG pictures of one slice: the outlines of the best proposals, and the agreement map."""

    slice_index: int
    outlines_png: bytes
    agreement_png: bytes


def render_page(template: str, **values: object) -> str:
    """HTML text of a template of this package: every text is escaped, a name that it lacks is an error.

    Beside ``values`` it has ``data_uri``, which turns PNG bytes into an address that holds them.
    """
    environment = Environment(
        loader=PackageLoader("progidiff.outputs", "."),
        autoescape=True,
        undefined=StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    return environment.get_template(template).render(data_uri=_data_uri, **values)


def render_report(document: ProposalsDocument, pictures: Mapping[str, Sequence[SlicePicture]]) -> str:
    """HTML text of the report.

    Args:
        document: the record that is also written as ``proposals.json``.
        pictures: slices to show, by target; a target without pictures gets its tables only.
    """
    names = ", ".join(target.name for target in document.targets)
    return render_page(
        "report.html.j2",
        doc=document,
        title=f"Proposals: {names}",
        document_name=DOCUMENT_NAME,
        pictures=pictures,
        facts=_facts(document),
        gradient=Markup(agreement_gradient()),
        drawn=drawn_proposals,
        empties=_empties,
        ml=millilitres,
        notes=_notes,
        outline=_outline,
        percent=percent,
        score=score,
    )


def write_report(path: Path, document: ProposalsDocument, pictures: Mapping[str, Sequence[SlicePicture]]) -> None:
    """Write :func:`render_report` as UTF-8; an ``OSError`` is the caller's to explain."""
    path.write_text(render_report(document, pictures), encoding="utf-8", newline="\n")


def drawn_proposals(target: TargetRecord) -> list[ProposalRecord]:
    """The proposals that are put forward as segments, best first: the ones to outline, in the order of
    ``OUTLINES``.
    """
    return [proposal for proposal in target.ranked() if proposal.segment is not None]


def millilitres(volume: float) -> str:
    """Volume with about three significant figures: ``"1480"``, ``"92.4"``, ``"3.85"``, ``"0"``."""
    if volume == 0:
        return "0"
    if volume >= 100:
        return f"{volume:.0f}"
    return f"{volume:.1f}" if volume >= 10 else f"{volume:.2f}"


def percent(share: float) -> str:
    """``0.9375`` -> ``"94 %"``; never rounds some to none or to all."""
    if 0 < share < 0.01:
        return "<1 %"
    if 0.99 < share < 1:
        return ">99 %"
    return f"{100 * share:.0f} %"


def score(value: float) -> str:
    """Score with two decimals."""
    return f"{value:.2f}"


def seconds(duration: float) -> str:
    """``0.42`` -> ``"0.42 s"``, ``75`` -> ``"1 min 15 s"``."""
    if duration < 10:
        return f"{duration:.2f} s"
    if duration < 60:
        return f"{duration:.0f} s"
    minutes, rest = divmod(round(duration), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours} h {minutes} min" if hours else f"{minutes} min {rest} s"


def _facts(document: ProposalsDocument) -> list[tuple[str, str]]:
    image, request, model = document.input, document.request, document.model
    first, last = image.slices[0], image.slices[1] - 1
    looked_at = f"{first} to {last}" if last > first else str(first)
    device = f" on {model.device}" if model.device else ""
    kind = ", ".join(word for word in (image.modality or "", "values corrected" if request.correct_values else "") if word)
    facts = [
        ("Image", f"{image.name}{f' ({kind})' if kind else ''}"),
        ("Voxels", " × ".join(str(n) for n in image.size_ijk)),
        ("Spacing", " × ".join(f"{s:.4g}" for s in image.spacing_mm) + f" mm, axes {image.orientation}"),
        ("Slices", f"{image.plane}, {looked_at} of {image.slice_count} (numbered from 0)"),
        ("Prompts", "; ".join(request.prompts)),
        ("Model", f"{model.name or model.id}{device}"),
        ("Model id", model.id + (f" with adapter {model.adapter_id}" if model.adapter_id else "")),
        ("Sampling", f"{request.steps} steps of {request.scheduler}, {_asked(document)}"),
        ("Ranking", f"{request.ranking.replace('_', ' ')}, the best {request.top_k} put forward"),
        ("Seed", str(request.seed)),
    ]
    if model.licence:
        facts.append(("Model licence", model.licence))
    if document.timing_s:
        facts.append(("Time", ", ".join(f"{_words(name)} {seconds(t)}" for name, t in document.timing_s.items())))
    if document.peak_memory_mb:
        facts.append(("Peak memory", f"{document.peak_memory_mb:,.0f} MiB"))
    return facts


def _asked(document: ProposalsDocument) -> str:
    request = document.request
    count = f"up to {request.proposals} proposals (adaptive)" if request.adaptive else f"{request.proposals} proposals"
    told = ("targets", "proposals", "steps", "scheduler", "seed", "slices", "adaptive", "ranking", "top_k")
    return ", ".join([count, *request.unusual(*told)])


def _words(name: str) -> str:
    return name.removesuffix("_s").replace("_", " ")


def _notes(proposal: ProposalRecord) -> str:
    notes = []
    if proposal.empty:
        notes.append("empty")
    if proposal.segment is not None:
        notes.append(f"segment “{proposal.segment}”")
    if proposal.random_pick:
        notes.append("random pick among the best")
    if proposal.dropped_pieces:
        pieces = "1 piece" if proposal.dropped_pieces == 1 else f"{proposal.dropped_pieces} pieces"
        notes.append(f"{pieces} dropped ({millilitres(proposal.dropped_ml)} mL)")
    return ", ".join(notes)


def _empties(target: TargetRecord) -> int:
    return sum(proposal.empty for proposal in target.proposals)


def _outline(place: int) -> Outline:
    return OUTLINES[place % len(OUTLINES)]


def _data_uri(png: bytes) -> str:
    return "data:image/png;base64," + base64.b64encode(png).decode("ascii")


# Pictures of slices as PNG bytes, drawn with matplotlib's Agg canvas: no display, no global state. It is imported at the
# first picture, since that takes time. Masks and images are canonical 2-D slice views.

# A slice is drawn this wide at most; 2-D slices are small, and a report of many slices must stay mailable.
LONGEST_SIDE_INCHES = 4.2
DPI = 110
AGREEMENT_COLOURS = "viridis"
# Halo under each outline, so that it stays visible on bright bone and on black air alike.
_HALO = (0.0, 0.0, 0.0, 0.55)


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


@dataclass(frozen=True)
class Backdrop:
    """One slice to draw on: ``image`` float (R, C) in [0, 1], pixel spacing in mm (row, column)."""

    image: np.ndarray
    spacing_rc: tuple[float, float]


def display_window(array: np.ndarray, modality: str | None) -> tuple[float, float]:
    """Grey values drawn black and white: the abdominal window for CT, else the 1st and 99.5th percentile.

    Files that do not name their modality count as CT when they hold the Hounsfield units of air.
    """
    if modality == "CT" or (modality is None and float(array.min()) <= -500):
        return -160.0, 240.0
    # every n-th voxel is enough for a display window, and keeps large volumes quick
    sample = np.asarray(array).reshape(-1)[:: max(1, array.size // 500_000)]
    low, high = (float(v) for v in np.percentile(sample, (1.0, 99.5)))
    return (low, high) if high > low else (low, low + 1.0)


def windowed(slice2d: np.ndarray, window: tuple[float, float]) -> np.ndarray:
    """float32 (R, C) in [0, 1]."""
    low, high = window
    scaled = (np.asarray(slice2d, np.float32) - low) / (high - low)
    return np.clip(scaled, 0.0, 1.0)


def outlines_png(frame: Backdrop, masks: Sequence[np.ndarray], outlines: Sequence[Outline] = OUTLINES) -> bytes:
    """Slice with the outline of each mask (bool (R, C)); the first mask is drawn last, on top."""
    figure, axes = _canvas(frame)
    for place in reversed(range(len(masks))):
        mask = np.asarray(masks[place])
        if not mask.any():
            continue
        # zero padding closes the outline of a mask that touches the picture's edge
        padded = np.pad(mask, 1).astype(np.float32)
        rows, cols = np.arange(-1, mask.shape[0] + 1), np.arange(-1, mask.shape[1] + 1)
        style = outlines[place % len(outlines)]
        width = 1.9 if place == 0 else 1.4
        axes.contour(cols, rows, padded, levels=[0.5], colors=[_HALO], linewidths=[width + 1.4])
        axes.contour(
            cols,
            rows,
            padded,
            levels=[0.5],
            colors=[style.colour],
            linewidths=[width],
            linestyles=[style.line],
        )
    return _png(figure)


def agreement_png(frame: Backdrop, agreement: np.ndarray) -> bytes:
    """Slice under the share of proposals (float (R, C) in [0, 1]) that contain each pixel; nothing is drawn
    where it is 0.
    """
    figure, axes = _canvas(frame)
    shares = np.ma.masked_less_equal(np.asarray(agreement, np.float32), 0.0)
    axes.imshow(shares, cmap=AGREEMENT_COLOURS, vmin=0.0, vmax=1.0, alpha=0.65, interpolation="nearest", aspect="auto")
    return _png(figure)


def agreement_gradient() -> str:
    """CSS colour stops of the agreement map from 0 to 100 %."""
    from matplotlib import colormaps

    stops = colormaps[AGREEMENT_COLOURS](np.linspace(0.0, 1.0, 9))
    return ", ".join("#" + "".join(f"{round(float(c) * 255):02x}" for c in stop[:3]) for stop in stops)


def _canvas(frame: Backdrop) -> tuple[Figure, Axes]:
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    rows, cols = frame.image.shape
    height, width = rows * frame.spacing_rc[0], cols * frame.spacing_rc[1]
    # a stack of a few thick slices seen from the side would be a thread: no picture is flatter than 1:6
    scale = LONGEST_SIDE_INCHES / max(height, width)
    size = (max(width * scale, LONGEST_SIDE_INCHES / 6), max(height * scale, LONGEST_SIDE_INCHES / 6))
    figure = Figure(figsize=size, dpi=DPI, facecolor="black")
    FigureCanvasAgg(figure)
    axes = figure.add_axes((0.0, 0.0, 1.0, 1.0))
    axes.set_axis_off()
    axes.imshow(frame.image, cmap="gray", vmin=0.0, vmax=1.0, interpolation="bilinear", aspect="auto")
    axes.set_xlim(-0.5, cols - 0.5)
    axes.set_ylim(rows - 0.5, -0.5)
    axes.set_autoscale_on(False)
    return figure, axes


def _png(figure: Figure) -> bytes:
    buffer = io.BytesIO()
    # no software or time stamps: the same result gives the same bytes
    figure.savefig(buffer, format="png", dpi=DPI, metadata={"Software": None})
    return buffer.getvalue()
