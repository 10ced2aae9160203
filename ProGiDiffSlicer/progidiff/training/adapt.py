"""From a team's own cases to an adapter: split by patient, LoRA, early stop, before and after on held-out cases, card."""

from __future__ import annotations

import hashlib
import json
import shutil
import time
import uuid
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, fields, replace
from pathlib import Path

import numpy as np
import torch

from progidiff.cards import AdapterCard, Counts, ModelCard, Retention, TargetScore, load_card
from progidiff.datasets.slices import LabelledSlice
from progidiff.errors import CancelledError, DatasetError, why_left_out
from progidiff.evaluation.cases import held_out_phantoms
from progidiff.model.adapter import check_adapter_folder, lora_state, save_adapter
from progidiff.model.folder import ProGiDiffModel, load_model
from progidiff.places import claimed, weights_hash
from progidiff.sampling.engine import Engine
from progidiff.training.batches import NOTHING_SHOWN, split_stacks
from progidiff.training.held_out import FirstRanked, before_after_png, choose_slices, first_ranked, mean_score, scores
from progidiff.training.run import Watch, claim, slug, training_device
from progidiff.training.stacks import Stack, open_cases, prepare
from progidiff.training.tuning import TuneSettings, tune
from progidiff.wire.messages import (
    AdaptDone,
    AdaptPicture,
    AdaptRequest,
    AdaptStart,
    AdaptStep,
    AdaptValidation,
    LeftOut,
)

#: Told everything that happens.
Report = Callable[[AdaptStart | AdaptStep | AdaptValidation | AdaptPicture | AdaptDone], None]
#: Proposals of each target on a phantom that retention is measured on.
_PHANTOM_PROPOSALS = 3
_PICTURES = 6


def adapt(request: AdaptRequest, watch: Watch | None = None, report: Report = lambda message: None) -> AdapterCard:
    """Tune a model on cases with LoRA and write the adapter.

    A training that was interrupted in the folder of checkpoints goes on. A cancelled one keeps the best adapter so far; the
    same call goes on from there.

    Args:
        request: what is wanted.
        watch: log, progress and cancellation.
        report: told what happens, the end last.

    Returns:
        the card as written.

    Raises:
        CancelledError: cancelled before anything was better than the base; the checkpoint is kept.
        DatasetError, ModelError, OutputError: the cases, the model or a folder cannot be used, or another run is at work.
    """
    out = Path(request.out)
    work = out.with_name(f"{out.name}-training") if request.work is None else Path(request.work)
    with claimed(out), claimed(work):
        return _adapt(request, out, work, watch or Watch(), report)


def _adapt(request: AdaptRequest, out: Path, work: Path, watch: Watch, report: Report) -> AdapterCard:
    began = time.monotonic()
    model = None if request.model is None else Path(request.model)
    check_adapter_folder(out)
    device = training_device(request.device)
    card = load_card(model)
    stacks, modalities = open_cases(
        [Path(folder) for folder in request.cases], request.plane, card.planes, request.correct_values, watch.log
    )
    stacks = _wanted(stacks, card.vocabulary, request.targets)
    for each in modalities:
        card.window(each)
    parts = load_model(model, device)
    stacks, left_out = _sound(stacks, parts.card, watch)
    train, held_out = _split(stacks, request, watch)
    counts = _count(train, held_out, parts.card.vocabulary)
    tuning = TuneSettings(
        **{entry.name: getattr(request, entry.name) for entry in fields(TuneSettings) if hasattr(request, entry.name)}
    )
    adapter_id = _claim_run(work, parts, stacks, request, tuning, out)
    report(
        AdaptStart(
            adapter_id,
            tuning.steps,
            {"training": len(train), "validation": len(held_out)},
            {target: count.to_dict() for target, count in counts.items()},
            tuple(left_out),
        )
    )
    vocabulary = list(counts)
    items = choose_slices(held_out, vocabulary, tuning.validation_images)
    phantoms = held_out_phantoms(request.phantoms, parts.card.image_size, parts.card.spacing_mm)
    if (strange := parts.card.strange_planes({item.plane for item in items})) is not None:
        watch.log(strange)
    watch.log("measuring the base model on the held-out cases")
    base = _Measured.of(parts, items, vocabulary, phantoms)
    modality = modalities[0] if len(modalities) == 1 else None
    tuned = tune(parts, train, held_out, work, tuning, watch, modality, _Steps(report, tuning.steps, counts))
    if tuned.cancelled and (tuned.best_step == 0 or tuned.steps == 0):
        raise CancelledError(
            f"Stopped at step {tuned.steps}, before anything beat the base model; the same command goes on from here."
        )
    watch.log("measuring the adapter on the held-out cases")
    now = _Measured.of(parts, items, vocabulary, phantoms)
    better, reason = _verdict(base.by_target, now.by_target)
    notes = (
        f"{len(left_out)} of {len(left_out) + len(stacks)} cases could not be used and were left out." if left_out else ""
    )
    written = save_adapter(
        lora_state(parts),
        {
            "adapter_id": adapter_id,
            "name": request.name or out.name,
            "base_model_id": parts.card.model_id,
            "base_sha256": weights_hash(parts.card.sha256),
            "rank": tuning.rank,
            "alpha": tuning.alpha or float(tuning.rank),
            "layers": tuning.layers,
            "modalities": modalities,
            "vocabulary": vocabulary,
            "cases": Counts(training=len(train), validation=len(held_out)),
            "patients": Counts(training=_patients(train), validation=_patients(held_out)),
            "targets": counts,
            "steps": tuned.steps,
            "best_step": tuned.best_step,
            "seconds": round(time.monotonic() - began, 1),
            "device": str(device),
            "seed": tuning.seed,
            "settings": {**asdict(tuning), "torch": torch.__version__},
            "before": base.by_target,
            "after": now.by_target,
            "mean_before": mean_score(base.by_target),
            "mean_after": mean_score(now.by_target),
            "retention": Retention(set="held-out phantoms", n=len(phantoms), before=base.phantoms, after=now.phantoms),
            "better": better,
            "reason": reason,
            "notes": notes,
        },
        out,
    )
    _keep_curve(work, out)
    if not tuned.cancelled:
        shutil.rmtree(work, ignore_errors=True)
    for picture in _pictures(base.first, now.first):
        report(picture)
    report(AdaptDone(str(out), adapter_id, better, tuned.cancelled, f"{reason} {notes}".strip(), written.to_dict()))
    return written


@dataclass(frozen=True)
class _Measured:
    """First-ranked proposals on the held-out slices, their Dice by target, and the mean on phantoms."""

    first: list[FirstRanked]
    by_target: dict[str, TargetScore]
    phantoms: float

    @classmethod
    def of(
        cls,
        model: ProGiDiffModel,
        items: Sequence[LabelledSlice],
        vocabulary: Sequence[str],
        phantoms: Sequence[LabelledSlice],
    ) -> _Measured:
        engine = Engine(model)
        first = first_ranked(engine, items, vocabulary)
        kept = first_ranked(engine, phantoms, model.card.vocabulary, _PHANTOM_PROPOSALS)
        return cls(first, scores(first), mean_score(scores(kept)) or 0.0)


class _Steps:
    """Turns what the loop tells into events, with the time that is left."""

    def __init__(self, report: Report, steps: int, targets: dict[str, Counts]) -> None:
        self._report, self._steps, self._targets = report, steps, targets
        self._began, self._first = time.monotonic(), -1

    def __call__(self, event: str, figures: dict[str, float]) -> None:
        step = int(figures["step"])
        if event == "step":
            if self._first < 0:
                self._began, self._first = time.monotonic(), step
            pace = (time.monotonic() - self._began) / max(step - self._first, 1)
            eta = round(pace * (self._steps - step), 1) if step > self._first else None
            self._report(AdaptStep(step, self._steps, figures["loss"], eta))
        elif "dice" in figures:
            per_target = {t: figures[t] for t in self._targets if t in figures}
            self._report(AdaptValidation(step, figures["dice"], per_target, bool(figures["best"])))


def _wanted(stacks: Sequence[Stack], vocabulary: Sequence[str], targets: tuple[str, ...]) -> list[Stack]:
    """Stacks that label something to tune, and nothing else of it."""
    unknown = sorted(set(targets).difference(vocabulary))
    if unknown:
        raise DatasetError(f"This model does not know {', '.join(unknown)}; it knows {', '.join(vocabulary)}.")
    wanted = frozenset(targets or vocabulary)
    found = [_narrowed(s, s.labelled & wanted) for s in stacks if s.labelled & wanted]
    if not found:
        raise DatasetError("No case labels a target that is to be tuned; save training examples of it first.")
    return found


def _sound(stacks: Sequence[Stack], card: ModelCard, watch: Watch) -> tuple[list[Stack], list[LeftOut]]:
    """The stacks that can be used, and each other one: one bad case does not end a long run."""
    sound: list[Stack] = []
    left_out: list[LeftOut] = []
    shown = False
    for number, stack in enumerate(stacks):
        if watch.cancelled():  # the training itself is what stops
            sound, shown = [*sound, *stacks[number:]], True
            break
        try:
            prepared = prepare(stack, card)
        except Exception as error:
            left_out.append(LeftOut(stack.name, why_left_out(stack.name, error)))
            continue
        sound.append(stack)
        shown = shown or (prepared is not None and bool(prepared.present.any()))
    if not sound:
        raise DatasetError(f"None of the {len(stacks)} cases can be used; of the first one: {left_out[0].reason}")
    if left_out:
        watch.log(f"{len(left_out)} of {len(stacks)} cases cannot be used and are left out.")
    if not shown:
        raise DatasetError(NOTHING_SHOWN)
    return sound, left_out


def _narrowed(stack: Stack, targets: frozenset[str]) -> Stack:
    def read() -> list[LabelledSlice]:
        return [replace(item, labelled=item.labelled & targets) for item in stack.read()]

    return replace(stack, labelled=targets, read=read)


def _split(stacks: Sequence[Stack], request: AdaptRequest, watch: Watch) -> tuple[list[Stack], list[Stack]]:
    if request.validation_share and len({s.patient for s in stacks}) < 2:
        watch.log("All cases are of one patient: nobody is held out, and nobody knows whether the adapter is better.")
        return list(stacks), []
    return split_stacks(stacks, request.validation_share, request.seed)


def _count(train: Sequence[Stack], held_out: Sequence[Stack], vocabulary: Sequence[str]) -> dict[str, Counts]:
    labelled = frozenset[str]().union(*(s.labelled for s in (*train, *held_out)))
    return {
        target: Counts(
            training=sum(target in s.labelled for s in train), validation=sum(target in s.labelled for s in held_out)
        )
        for target in vocabulary
        if target in labelled
    }


def _patients(stacks: Sequence[Stack]) -> int:
    return len({s.patient for s in stacks})


def _claim_run(
    work: Path, parts: ProGiDiffModel, stacks: Sequence[Stack], request: AdaptRequest, tuning: TuneSettings, out: Path
) -> str:
    """Mark the work folder as this run's; the adapter's id, which stays the same when it goes on."""
    settings = {k: v for k, v in asdict(tuning).items() if k not in ("steps", "patience", "cache_mb")}
    claim(
        work,
        {
            "kind": "adapter",
            "model": weights_hash(parts.card.sha256),
            # a digest: names of cases and patients have no place in a file of checkpoints
            "data": hashlib.sha256(json.dumps(sorted((s.name, s.patient) for s in stacks)).encode()).hexdigest(),
            "settings": settings,
            "validation share": request.validation_share,
            **({"plane": request.plane} if request.plane else {}),
            **({"corrected": True} if request.correct_values else {}),
        },
    )
    path = work / "adapter_id.json"
    if not path.exists():
        path.write_text(json.dumps(f"{slug(out.name)}-{uuid.uuid4().hex[:8]}"), encoding="utf-8")
    return str(json.loads(path.read_text(encoding="utf-8")))


def _verdict(before: dict[str, TargetScore], after: dict[str, TargetScore]) -> tuple[bool, str]:
    """Whether the adapter is better on the held-out cases, and a sentence on it."""
    first, second = mean_score(before), mean_score(after)
    if first is None or second is None:
        return False, "No case was held out, so nobody knows whether it is better than the base model."
    patients = max(s.n_patients for s in after.values())
    slices = sum(s.n_slices for s in after.values())
    word = "better" if second > first else "not better"
    return second > first, (
        f"On held-out cases it is {word} than the base model: mean Dice {first:.3f} before, {second:.3f} after"
        f" ({slices} slices, {patients} patient{'s' if patients > 1 else ''})."
    )


def _keep_curve(work: Path, out: Path) -> None:
    for name in ("curve.png", "curve.json"):
        if (work / name).exists():
            shutil.copyfile(work / name, out / name)


def _pictures(before: Sequence[FirstRanked], after: Sequence[FirstRanked]) -> list[AdaptPicture]:
    """Pictures spread over the held-out slices, in memory only."""
    step = max(1, -(-len(before) // _PICTURES))
    pairs = list(zip(before, after, strict=True))[::step]
    return [
        AdaptPicture(
            b.item.slice_id, b.target, round(b.dice, 4), round(a.dice, 4), np.frombuffer(before_after_png(b, a), np.uint8)
        )
        for b, a in pairs
    ]
