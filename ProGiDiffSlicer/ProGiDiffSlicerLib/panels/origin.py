"""Where a segment comes from, in words."""

from __future__ import annotations

from typing import Any

from slicer.i18n import tr as _

from ProGiDiffSlicerLib.logic.provenance import Provenance, earlier_provenance, read_provenance
from ProGiDiffSlicerLib.logic.store import row_name
from ProGiDiffSlicerLib.parameters import Plane


def describe_segment(segment: Any) -> str:
    """Lines about a vtkSegment's origin; "" for a segment that was not accepted from a proposal."""
    facts = read_provenance(segment)
    if facts is None:
        return ""
    lines = [_first_line(facts), _run_line(facts), _state_line(facts)]
    earlier = len(earlier_provenance(segment))
    if earlier:
        lines.append(_("Added to {count} earlier accepted ones.").format(count=earlier))
    return "\n".join(lines)


def _first_line(facts: Provenance) -> str:
    name = row_name(facts.ensemble or facts.proposal)
    if facts.rank is None or facts.score is None:
        return _("{proposal} of {count} for “{prompt}”").format(proposal=name, count=facts.proposals, prompt=facts.prompt)
    return _("{proposal} of {count} for “{prompt}”, rank {rank}, score {score:.2f}").format(
        proposal=name, count=facts.proposals, prompt=facts.prompt, rank=facts.rank, score=facts.score
    )


def _run_line(facts: Provenance) -> str:
    line = _("Model {model}, seed {seed}, {steps} steps").format(
        model=facts.model_id or _("unknown"), seed=facts.seed, steps=facts.steps
    )
    if facts.adapter_id:
        line += ", " + _("adapter {adapter}").format(adapter=facts.adapter_id)
    if facts.plane:
        line += ", " + {each.value: each.label().lower() for each in Plane}.get(facts.plane, facts.plane)
    if facts.corrected:
        line += ", " + _("values corrected")
    if facts.slices:
        line += ", " + _("slices {slices}").format(slices=facts.slices)
    return line


def _state_line(facts: Provenance) -> str:
    if not facts.edited:
        return _("Not edited since it was accepted")
    if facts.dice_to_proposal is None:
        return _("Edited")
    return _("Edited, Dice to the proposal {dice:.3f}").format(dice=facts.dice_to_proposal)
