"""What is written down of a training example beside its voxels, and how a saving is told."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from slicer.i18n import tr as _

from progidiff.targets import target_for
from ProGiDiffSlicerLib.scene.examples import Example, Voxels
from ProGiDiffSlicerLib.scene.facts import patient_key, terminology
from ProGiDiffSlicerLib.scene.provenance import Provenance


@dataclass(frozen=True)
class Who:
    """The person who saves.

    Attributes:
        annotator: a random text that stands for them.
        secret: with which the IDs of patients are hashed.
    """

    annotator: str
    secret: str


@dataclass(frozen=True, eq=False)
class Saved:
    """A case that was saved.

    Attributes:
        case: its identifier.
        replaced: the earlier case of the same segment, which left the set; "" for none.
        example: what was saved.
        slices: which slices, counted from 0.
    """

    case: str
    replaced: str
    example: Example
    slices: range


def case_record(example: Example, voxels: Voxels, who: Who) -> dict[str, Any]:
    """Everything of a case but its voxels: no name of a volume, a node or a file is among it."""
    facts = example.facts
    return {
        "target": example.target,
        "modality": example.modality,
        "plane": example.plan.plane,
        "prompt": "" if facts is None else facts.prompt,
        "code": terminology(example.target),
        "proposal": None if facts is None else _proposal(facts),
        "edited": facts is None or facts.edited,
        "editor": who.annotator,
        "model_id": "" if facts is None else facts.model_id,
        "adapter_id": None if facts is None else facts.adapter_id or None,
        "dice_to_proposal": None if facts is None else facts.dice_to_proposal,
        "volume_key": voxels.volume_key,
        "patient_key": patient_key(example.volume_node, who.secret),
    }


def _proposal(facts: Provenance) -> dict[str, Any]:
    names = ("seed", "rank", "score", "proposals", "steps", "scheduler", "everywhere", "plane", "corrected")
    return {"index": facts.proposal, **{name: getattr(facts, name) for name in names}}


def saved_sentence(saved: Sequence[Saved]) -> str:
    """What was saved, for the status line."""
    if len(saved) == 1:
        (only,) = saved
        sentence = _("Saved as training example: {target} of {volume}, {slices}.").format(
            target=target_for(only.example.target).name("en"), volume=_volume_name(only.example), slices=_slices(only.slices)
        )
    else:
        names = ", ".join(target_for(each.example.target).name("en") for each in saved)
        sentence = _("Saved as {count} training examples: {names}.").format(count=len(saved), names=names)
    replaced = sum(1 for each in saved if each.replaced)
    if replaced:
        sentence += " " + _("It takes the place of what was saved before.")
    if any(each.example.facts is None for each in saved):
        sentence += " " + _("It was drawn by hand and comes from no proposal.")
    return sentence


def _slices(slices: range) -> str:
    if len(slices) == 1:
        return str(_("slice {number}").format(number=slices.start + 1))
    return str(_("slices {first} to {last}").format(first=slices.start + 1, last=slices.stop))


def _volume_name(example: Example) -> str:
    if example.volume.frame is None:
        return example.volume.name
    return str(_("{volume}, frame {number}").format(volume=example.volume.name, number=example.volume.frame + 1))
