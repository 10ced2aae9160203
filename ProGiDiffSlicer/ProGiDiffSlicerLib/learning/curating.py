"""Saving segments as training examples, taking that back, and what a set holds.

One action of the user is one step: it may save several segments, and each case that takes the place of an earlier one of the
same segment brings that one back when the step is undone.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, field
from typing import Any

from slicer.i18n import tr as _

from progidiff.errors import InputError
from progidiff.targets import target_for
from progidiff.wire.conversation import WorkerFailure
from progidiff.wire.messages import CountCases, CuratedCases, KeepCase, SwapCases
from ProGiDiffSlicerLib.idle import IdleQueue, Task
from ProGiDiffSlicerLib.scene.examples import Example, Voxels, collect, patient_key, terminology
from ProGiDiffSlicerLib.scene.provenance import PREFIX, Provenance, get_tag, set_tag
from ProGiDiffSlicerLib.signals import Signal
from ProGiDiffSlicerLib.worker.calls import Call
from ProGiDiffSlicerLib.worker.client import WorkerClient

# The case that a segment was saved as; random, and known to its set alone.
CASE_TAG = PREFIX + "case"


@dataclass(eq=False)
class Saving:
    """One action: what is saved with it, and what was.

    Attributes:
        folder: of the set.
        saved: what is in the set by now.
        task, call: what is under way: the copying of a segment, or the worker's writing.
        cancelled: whether the user wants no more of it.
    """

    folder: str
    who: Who
    waiting: list[Example]
    saved: list[Saved] = field(default_factory=list)
    task: Task | None = None
    call: Call | None = None
    cancelled: bool = False


class Curating:
    """Keeps training examples in a folder, by a worker of its own.

    Packing a volume takes seconds, and a folder on a network may not answer at all. The voxels travel through the worker's
    pipe and are written nowhere but into the set.

    Attributes:
        contents: what the set holds; ``None`` as long as that is not known.
        trouble: why it is not known; "" for nothing in the way.
        changed: Signal(): something of this is different, or a saving began or ended.
        told: Signal(sentence) for the user.
    """

    def __init__(self, idle: IdleQueue, client: WorkerClient) -> None:
        self.contents: CuratedCases | None = None
        self.trouble = ""
        self.changed = Signal()
        self.told = Signal()
        self._idle = idle
        self._client = client
        self._saving: Saving | None = None
        self._steps: list[Saving] = []
        self._cases: dict[tuple[str, ...], str] = {}
        self._looking: Call | None = None
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
            _deaf(self._looking)
            self._looking.cancel()
            self._looking = None
        self.contents, self.trouble = None, ""
        if folder:
            self._looking = self._ask(CountCases(folder), self._on_contents, self._on_no_contents)
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
        """Save no more; what is complete stays, what is not leaves nothing. ``told`` says what became of it."""
        saving = self._saving
        if saving is None:
            return
        saving.cancelled = True
        if saving.task is not None:
            saving.task.cancel()
            self._finish(_("Cancelled."))
        elif saving.call is not None:
            saving.call.cancel()

    def undo(self) -> None:
        """Take the last saving back: its cases leave the set, and those that they replaced come back."""
        if not self.can_undo:
            return
        step = self._steps[-1]
        request = SwapCases(
            step.folder,
            tuple(each.case for each in step.saved),
            tuple(each.replaced for each in step.saved if each.replaced),
        )
        self._undoing = True
        self._ask(request, self._on_undone, self._on_not_undone)
        self.changed.emit()

    def cleanup(self) -> None:
        """End what is under way; a case that only waits for the disk is finished."""
        saving, self._saving = self._saving, None
        if saving is not None and saving.task is not None:
            saving.task.cancel()
        for call in (self._looking, None if saving is None else saving.call):
            if call is not None:
                _deaf(call)
        self._looking = None
        self._client.stop(wait=True)
        self.changed.clear()
        self.told.clear()

    def _ask(
        self,
        request: CountCases | KeepCase | SwapCases,
        done: Callable[[CuratedCases], None],
        failed: Callable[[str], None],
    ) -> Call:
        call = self._client.ask(request, CuratedCases)
        call.succeeded.connect(done)
        call.failed.connect(lambda failure: failed(_sentence(failure)))
        return call

    # Saving ---------------------------------------------------------------------------------------------------------------

    def _next(self) -> None:
        saving = self._saving
        assert saving is not None
        example = saving.waiting[0]
        steps = collect(example)
        saving.task = self._idle.submit(steps, lambda voxels: self._send(example, voxels), self._on_uncollected)

    def _send(self, example: Example, voxels: Voxels) -> None:
        saving = self._saving
        assert saving is not None
        saving.task = None
        request = keep_case(saving.folder, example, voxels, saving.who, self._case_of(example))
        saving.call = self._ask(request, lambda reply: self._on_kept(example, voxels.slices, reply), self._on_failed)
        saving.call.cancelled.connect(lambda: self._on_failed(_("Cancelled.")))

    def _on_kept(self, example: Example, slices: range, reply: CuratedCases) -> None:
        saving = self._saving
        assert saving is not None
        saving.call = None
        saving.saved.append(Saved(reply.kept, reply.replaced, example, slices))
        saving.waiting.pop(0)
        self._note(example, reply.kept)
        self._take(reply)
        if not saving.waiting:
            self._finish("")
        elif saving.cancelled:
            self._finish(_("Cancelled."))
        else:
            self._next()
        self.changed.emit()

    def _on_uncollected(self, error: Exception) -> None:
        if not isinstance(error, InputError | MemoryError):
            self._saving = None
            self.changed.emit()
            raise error
        self._on_failed(str(error) or _("There is not enough memory to save this; close other volumes."))

    def _on_failed(self, sentence: str) -> None:
        saving = self._saving
        assert saving is not None
        self._finish(sentence)
        self.look(saving.folder)  # what was under way may be complete all the same

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

    def _on_undone(self, reply: CuratedCases) -> None:
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

    def _on_contents(self, reply: CuratedCases) -> None:
        self._looking = None
        self._take(reply)
        self.changed.emit()

    def _on_no_contents(self, sentence: str) -> None:
        self._looking, self.contents, self.trouble = None, None, sentence
        self.changed.emit()

    def _take(self, reply: CuratedCases) -> None:
        self.contents, self.trouble = reply, ""

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


def _deaf(call: Call) -> None:
    """Nobody wants to hear of it any more."""
    for signal in (call.succeeded, call.failed, call.cancelled):
        signal.clear()


def _sentence(failure: WorkerFailure) -> str:
    if failure.kind == "remote":
        return failure.message
    return f"{failure.message} " + _("Every example in the set is whole; save again what is missing.")


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


def keep_case(folder: str, example: Example, voxels: Voxels, who: Who, replaces: str) -> KeepCase:
    """The request that saves an example: no name of a volume, a node or a file is in it."""
    facts = example.facts
    return KeepCase(
        folder=folder,
        target=example.target,
        image=voxels.image,
        mask=voxels.mask,
        affine=voxels.affine,
        modality=example.modality,
        plane=example.plan.plane,
        prompt="" if facts is None else facts.prompt,
        code=terminology(example.target),
        proposal=None if facts is None else _proposal(facts),
        edited=facts is None or facts.edited,
        editor=who.annotator,
        model_id="" if facts is None else facts.model_id,
        adapter_id=None if facts is None else facts.adapter_id or None,
        dice_to_proposal=None if facts is None else facts.dice_to_proposal,
        volume_key=voxels.volume_key,
        patient_key=patient_key(example.volume_node, who.secret),
        replaces=replaces,
    )


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
