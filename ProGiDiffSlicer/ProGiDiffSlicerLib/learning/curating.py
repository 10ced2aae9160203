"""Saving segments as training examples, taking that back, and what a set holds.

One action of the user is one step: it may save several segments, and each case that takes the place of an earlier one of the
same segment brings that one back when the step is undone.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict, dataclass, field
from typing import Any

from slicer.i18n import tr as _

from progidiff.errors import InputError
from progidiff.targets import target_for
from ProGiDiffSlicerLib.idle import IdleQueue, Task
from ProGiDiffSlicerLib.learning.curating_process import Keeper, Reply, Request
from ProGiDiffSlicerLib.scene.examples import Example, Voxels, collect, patient_key, terminology
from ProGiDiffSlicerLib.scene.provenance import PREFIX, Provenance, get_tag, set_tag
from ProGiDiffSlicerLib.signals import Signal

# The case that a segment was saved as; random, and known to its set alone.
CASE_TAG = PREFIX + "case"


@dataclass(frozen=True)
class Contents:
    """What a set holds.

    Attributes:
        cases: number of cases.
        counts: cases by target, in the order in which the set lists them.
        modalities: "CT" and "MR", as far as there are cases of them.
    """

    cases: int
    counts: dict[str, int]
    modalities: tuple[str, ...]


@dataclass(eq=False)
class Saving:
    """One action: what is saved with it, and what was.

    Attributes:
        folder: of the set.
        saved: what is in the set by now.
    """

    folder: str
    who: Who
    waiting: list[Example]
    saved: list[Saved] = field(default_factory=list)
    task: Task | None = None
    request: Request | None = None


class Curating:
    """Keeps training examples in a folder.

    Attributes:
        contents: what the set holds; ``None`` as long as that is not known.
        trouble: why it is not known; "" for nothing in the way.
        changed: Signal(): something of this is different, or a saving began or ended.
        told: Signal(sentence) for the user.
    """

    def __init__(self, idle: IdleQueue, keeper: Keeper) -> None:
        self.contents: Contents | None = None
        self.trouble = ""
        self.changed = Signal()
        self.told = Signal()
        self._idle = idle
        self._keeper = keeper
        self._saving: Saving | None = None
        self._steps: list[Saving] = []
        self._cases: dict[tuple[str, ...], str] = {}
        self._looking: Request | None = None
        self._undoing = False

    @property
    def busy(self) -> bool:
        """Whether something is being saved or taken back."""
        return self._saving is not None or self._undoing

    @property
    def looking(self) -> bool:
        """Whether the folder has been asked what it holds and has not answered yet."""
        return self._looking is not None

    @property
    def saving(self) -> bool:
        """Whether something is being saved, which can be cancelled."""
        return self._saving is not None

    @property
    def can_undo(self) -> bool:
        """Whether there is a saving to take back."""
        return bool(self._steps) and not self.busy

    def look(self, folder: str) -> None:
        """Ask what the set in a folder holds; ``changed`` is emitted when the answer is there."""
        if self._looking is not None:
            self._keeper.drop(self._looking)
            self._looking = None
        self.contents, self.trouble = None, ""
        if folder:
            self._looking = self._keeper.ask(
                {"request": "counts", "folder": folder}, self._on_contents, self._on_no_contents
            )
        self.changed.emit()

    def save(self, folder: str, examples: Sequence[Example], who: Who) -> None:
        """Save segments, one case each; ``told`` says how it went.

        Raises:
            InputError: no folder is chosen, there is nothing to save, or something is being saved.
        """
        if self.busy:
            raise InputError(_("Something is being saved; wait a moment, then save this."))
        if not folder.strip():
            raise InputError(_("Choose the folder in which training examples are kept."))
        if not examples:
            raise InputError(
                _("No segment of this segmentation was accepted from a proposal; select one and save it alone.")
            )
        self._saving = Saving(folder, who, list(examples))
        self._next()
        self.changed.emit()

    def cancel(self) -> None:
        """Save no more; what is complete stays, what is not leaves nothing."""
        saving = self._saving
        if saving is None:
            return
        if saving.task is not None:
            saving.task.cancel()
        if saving.request is not None:
            self._keeper.drop(saving.request)
        self._finish(_("Cancelled."))
        self.look(saving.folder)

    def undo(self) -> None:
        """Take the last saving back: its cases leave the set, and those that they replaced come back."""
        if not self.can_undo:
            return
        step = self._steps[-1]
        header = {
            "request": "swap",
            "folder": step.folder,
            "remove": [each.case for each in step.saved],
            "restore": [each.replaced for each in step.saved if each.replaced],
        }
        self._undoing = True
        self._keeper.ask(header, self._on_undone, self._on_not_undone)
        self.changed.emit()

    def cleanup(self) -> None:
        """End what is under way; a case that only waits for the disk is finished."""
        if self._saving is not None and self._saving.task is not None:
            self._saving.task.cancel()
        self._saving = self._looking = None
        self._keeper.close()
        self.changed.clear()
        self.told.clear()

    # Saving ---------------------------------------------------------------------------------------------------------------

    def _next(self) -> None:
        saving = self._saving
        assert saving is not None
        example = saving.waiting[0]
        saving.request = None
        steps = collect(example)
        saving.task = self._idle.submit(steps, lambda voxels: self._send(example, voxels), self._on_uncollected)

    def _send(self, example: Example, voxels: Voxels) -> None:
        saving = self._saving
        assert saving is not None
        saving.task = None
        header = {
            "request": "add",
            "folder": saving.folder,
            "case": case_record(example, voxels, saving.who),
            "replaces": self._case_of(example),
        }
        arrays = {"image": voxels.image, "mask": voxels.mask, "affine": voxels.affine}
        saving.request = self._keeper.ask(
            header, lambda reply: self._on_added(example, voxels.slices, reply), self._on_failed, arrays
        )

    def _on_added(self, example: Example, slices: range, reply: Reply) -> None:
        saving = self._saving
        assert saving is not None
        case = reply["case"]
        saving.saved.append(Saved(case["id"], case["replaced"] or "", example, slices))
        saving.waiting.pop(0)
        self._note(example, case["id"])
        self._take(reply)
        if saving.waiting:
            self._next()
        else:
            self._finish("")
        self.changed.emit()

    def _on_uncollected(self, error: Exception) -> None:
        if not isinstance(error, InputError | MemoryError):
            self._saving = None
            self.changed.emit()
            raise error
        self._on_failed(str(error) or _("There is not enough memory to save this; close other volumes."))

    def _on_failed(self, sentence: str) -> None:
        self._finish(sentence)

    def _finish(self, problem: str) -> None:
        """End the action; what it did save is a step that can be undone."""
        saving, self._saving = self._saving, None
        assert saving is not None
        said = [problem] if problem else []
        if saving.saved:
            self._steps.append(saving)
            said.insert(0, saved_sentence(saving.saved))
        self.changed.emit()
        self.told.emit(" ".join(said))

    # Undoing --------------------------------------------------------------------------------------------------------------

    def _on_undone(self, reply: Reply) -> None:
        step = self._steps.pop()
        self._undoing = False
        for each in reversed(step.saved):
            self._note(each.example, each.replaced)
        self._take(reply)
        back = sum(1 for each in step.saved if each.replaced)
        names = ", ".join(target_for(each.example.target).name("en") for each in step.saved)
        sentence = _("No longer a training example: {names}.").format(names=names)
        if back:
            sentence += " " + _("What was saved before is back.")
        self.changed.emit()
        self.told.emit(sentence)

    def _on_not_undone(self, sentence: str) -> None:
        self._undoing = False
        self.changed.emit()
        self.told.emit(sentence)

    # What the set holds ---------------------------------------------------------------------------------------------------

    def _on_contents(self, reply: Reply) -> None:
        self._looking = None
        self._take(reply)
        self.changed.emit()

    def _on_no_contents(self, sentence: str) -> None:
        self._looking, self.contents, self.trouble = None, None, sentence
        self.changed.emit()

    def _take(self, reply: Reply) -> None:
        self.contents = Contents(int(reply["cases"]), dict(reply["counts"]), tuple(reply["modalities"]))
        self.trouble = ""

    # Which case a segment is ----------------------------------------------------------------------------------------------

    def _case_of(self, example: Example) -> str:
        """The case as which the segment was saved before; "" for none."""
        return self._cases.get(_identity(example)) or get_tag(_present(example) or example.segment, CASE_TAG) or ""

    def _note(self, example: Example, case: str) -> None:
        """The tag outlives the session; undo and redo of an accept may bring back a segment without it."""
        self._cases[_identity(example)] = case
        segment = _present(example)
        if segment is not None:
            set_tag(segment, CASE_TAG, case)


def _identity(example: Example) -> tuple[str, ...]:
    """A segment of this session; identifiers of segments that were undone are given again."""
    created = "" if example.facts is None else f"{example.facts.created} {example.facts.target} {example.facts.proposal}"
    return (example.segmentation.GetID() or "", example.segment_id, str(example.volume.frame), created)


def _present(example: Example) -> Any | None:
    """The segment, where it is still there."""
    segment = example.segmentation.GetSegmentation().GetSegment(example.segment_id)
    return segment if segment is example.segment else None


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
    own = {name: getattr(facts, name) for name in ("rank", "score", "plane", "corrected")}
    return {"index": facts.proposal, **own, **asdict(facts.request)}


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
