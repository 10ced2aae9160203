"""``report.html``: a result to be read without any program: pictures, tables, how it was made.

The page loads nothing from outside (a content security policy in it forbids that), runs no script, escapes
every text, and is legible in light and dark mode and on paper.
"""

from __future__ import annotations

import base64
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from jinja2 import Environment, PackageLoader, StrictUndefined
from markupsafe import Markup

from progidiff.outputs.colours import OUTLINES, Outline
from progidiff.outputs.document import DOCUMENT_NAME, ProposalRecord, ProposalsDocument, TargetRecord
from progidiff.outputs.figures import agreement_gradient

REPORT_NAME = "report.html"


@dataclass(frozen=True)
class SlicePicture:
    """Two PNG pictures of one slice: the outlines of the best proposals, and the agreement map."""

    slice_index: int
    outlines_png: bytes
    agreement_png: bytes


def render_report(document: ProposalsDocument, pictures: Mapping[str, Sequence[SlicePicture]]) -> str:
    """HTML text of the report.

    Args:
        document: the record that is also written as ``proposals.json``.
        pictures: slices to show, by target; a target without pictures gets its tables only.
    """
    environment = Environment(
        loader=PackageLoader("progidiff.outputs", "."),
        autoescape=True,
        undefined=StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    names = ", ".join(target.name for target in document.targets)
    return environment.get_template("report.html.j2").render(
        doc=document,
        title=f"Proposals: {names}",
        document_name=DOCUMENT_NAME,
        pictures=pictures,
        facts=_facts(document),
        gradient=Markup(agreement_gradient()),
        data_uri=_data_uri,
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
    return f"{count}, also where a target seems to be absent" if request.everywhere else count


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
    return ", ".join(notes)


def _empties(target: TargetRecord) -> int:
    return sum(proposal.empty for proposal in target.proposals)


def _outline(place: int) -> Outline:
    return OUTLINES[place % len(OUTLINES)]


def _data_uri(png: bytes) -> str:
    return "data:image/png;base64," + base64.b64encode(png).decode("ascii")
