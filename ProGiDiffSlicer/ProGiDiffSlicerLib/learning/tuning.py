"""Tuning on the curated set, and the search for the next case to correct, each in a process of its own: what they are asked
and tell.
"""

from __future__ import annotations

import base64
import os
import time
from dataclasses import dataclass
from typing import Any

from slicer.i18n import tr as _

from progidiff.errors import InputError
from ProGiDiffSlicerLib.signals import Signal
from ProGiDiffSlicerLib.worker.lines import Choices, LineProcess, engine_command


@dataclass(frozen=True)
class Picture:
    """A held-out slice with the first-ranked proposal before and after, as PNG."""

    target: str
    before: float
    after: float
    png: bytes


@dataclass(frozen=True)
class TuningOptions:
    """What the user chose; ``None`` takes the default of ``progidiff adapt``.

    Attributes:
        name: of the adapter; "" for one by the date.
        target: the only target to tune; "" for all.
        steps, rank: of the training.
    """

    name: str = ""
    target: str = ""
    steps: int | None = None
    rank: int | None = None


class Tuning:
    """Starts and follows ``progidiff adapt``.

    Attributes:
        losses: (step, loss) so far.
        dices: (step, mean Dice on held-out cases) so far; step 0 is the base model.
        pictures: of held-out slices, at the end.
        steps: steps that were planned; 0 as long as that is not known.
        eta_s: seconds left, or ``None``.
        message: how things stand, a sentence.
        folder: of the adapter that the latest tuning has left; "" for none.
        better: whether that adapter is better than the base on held-out cases.
        changed: Signal(): something of this is different.
        finished: Signal(folder, better): an adapter was made.
        failed: Signal(sentence).
    """

    def __init__(self, settings: Choices, process: LineProcess) -> None:
        self.losses: list[tuple[int, float]] = []
        self.dices: list[tuple[int, float]] = []
        self.pictures: list[Picture] = []
        self.steps = 0
        self.eta_s: float | None = None
        self.message = ""
        self.folder = ""
        self.better = False
        self.changed, self.finished, self.failed = Signal(), Signal(), Signal()
        self._settings = settings
        self._process = process
        self._unfinished = ""
        process.said.connect(self._on_event)
        process.ended.connect(self._on_ended)

    @property
    def running(self) -> bool:
        """Whether a tuning is under way."""
        return self._process.running

    @property
    def stopping(self) -> bool:
        """Whether it was asked to stop."""
        return self._process.running and self._process.stopping

    @property
    def fraction(self) -> float:
        """Share of the planned steps that are made."""
        return min(1.0, self.losses[-1][0] / self.steps) if self.steps and self.losses else 0.0

    @property
    def log_text(self) -> str:
        """The last lines of its log."""
        return self._process.log_text

    def start(self, options: TuningOptions) -> None:
        """Start; does nothing while one runs.

        Raises:
            InputError: a folder is not chosen, or the worker does not run on this computer.
        """
        if self.running:
            return
        cases, adapters = self._settings.curatedFolder, self._settings.adaptersFolder
        if not cases or not os.path.isdir(cases):
            raise InputError(_("There are no training examples yet: save some under Review first."))
        if not adapters:
            raise InputError(_("Choose a folder for the adapters first."))
        command = engine_command(self._settings, *self._arguments(options, cases, adapters))
        self.losses, self.dices, self.pictures = [], [], []
        self.steps, self.eta_s, self.folder, self.better = 0, None, "", False
        self.message = _("Starting …")
        self._process.start(command)
        self.changed.emit()

    def stop(self) -> None:
        """Stop and keep the best so far; asked again, end it at once."""
        self._process.stop()
        self.message = _("Stopping: the best so far is measured and kept …")
        self.changed.emit()

    def close(self) -> None:
        """End it for good; its checkpoint stays."""
        self._process.close()

    def _arguments(self, options: TuningOptions, cases: str, adapters: str) -> list[str]:
        # One that was ended before it had finished goes on from its checkpoint.
        name = options.name.strip() or self._unfinished or time.strftime("adapter-%Y%m%d-%H%M%S")
        slug = "".join(c if c.isalnum() or c in "-_" else "-" for c in name).strip("-") or "adapter"
        out = os.path.join(adapters, slug)
        if os.path.exists(out):
            raise InputError(_('There is an adapter "{name}" already; choose another name.').format(name=name))
        self._unfinished = name
        arguments = ["adapt", "--cases", cases, "--out", out, "--name", name, "--device", self._settings.device, "--json"]
        if self._settings.modelFolder:
            arguments += ["--model", self._settings.modelFolder]
        if options.target:
            arguments += ["--target", options.target]
        if options.steps is not None:
            arguments += ["--steps", str(options.steps)]
        if options.rank is not None:
            arguments += ["--rank", str(options.rank)]
        return arguments

    def _on_event(self, event: dict[str, Any]) -> None:
        handler = {
            "start": self._on_start,
            "step": self._on_step,
            "validation": self._on_validation,
            "pictures": self._on_pictures,
            "done": self._on_done,
        }.get(event["event"])
        if handler is None:
            return
        try:
            handler(event)
        except (KeyError, TypeError, ValueError):
            return  # another version's line; the end of the process says what came of it
        self.changed.emit()

    def _on_start(self, event: dict[str, Any]) -> None:
        self.steps = int(event["steps"])
        training, held_out = int(event["cases"]["training"]), int(event["cases"]["validation"])
        text = _("Tuning on {training} cases; {held_out} are held out. Measuring the base model …")
        self.message = text.format(training=training, held_out=held_out)

    def _on_step(self, event: dict[str, Any]) -> None:
        self.losses.append((int(event["step"]), float(event["loss"])))
        self.steps = int(event["steps"])
        self.eta_s = None if event.get("eta_s") is None else float(event["eta_s"])
        if not self.stopping:
            self.message = _("Step {step} of {steps}").format(step=self.losses[-1][0], steps=self.steps)

    def _on_validation(self, event: dict[str, Any]) -> None:
        self.dices.append((int(event["step"]), float(event["dice"])))

    def _on_pictures(self, event: dict[str, Any]) -> None:
        self.pictures = [
            Picture(str(item["target"]), float(item["before"]), float(item["after"]), base64.b64decode(item["png"]))
            for item in event["items"]
        ]

    def _on_done(self, event: dict[str, Any]) -> None:
        self.folder, self.better = str(event["folder"]), event["better"] is True
        self._unfinished = ""
        self.message = str(event["reason"])

    def _on_ended(self, trouble: str) -> None:
        self.eta_s = None
        if self.folder and not trouble:
            self.changed.emit()
            self.finished.emit(self.folder, self.better)
            return
        if not self.losses:
            self._unfinished = ""  # nothing of it is worth going on with, or it was refused
        self.message = trouble or _("The tuning ended without an adapter; see its log.")
        self.changed.emit()
        self.failed.emit(self.message)


RESULT_NAME = "progidiff-next.json"


@dataclass(frozen=True)
class NextItem:
    """A volume that was looked at.

    Attributes:
        path: of its file or folder of DICOM slices.
        label: the same within the searched folder.
        disagreement: of its proposals; the highest one teaches most.
        target: the target that they disagree on most.
        ras: the place that they disagree on most, mm; ``None`` where that is not told.
        notes: sentences about its plane, its values and its modality, the most important first.
    """

    path: str
    label: str
    disagreement: float
    target: str
    ras: tuple[float, float, float] | None
    notes: tuple[str, ...] = ()


class NextCase:
    """Starts and follows ``progidiff next``.

    Attributes:
        items: what was looked at so far, the most uncertain first.
        done, volumes: how many are done, and how many there are; 0 as long as that is not known.
        eta_s: seconds left, or ``None``.
        message: how things stand.
        changed: Signal(): something of this is different.
    """

    def __init__(self, settings: Choices, process: LineProcess) -> None:
        self.items: list[NextItem] = []
        self.done = self.volumes = 0
        self.eta_s: float | None = None
        self.message = ""
        self.changed = Signal()
        self._settings = settings
        self._process = process
        self._folder = ""
        process.said.connect(self._on_event)
        process.ended.connect(self._on_ended)

    @property
    def running(self) -> bool:
        """Whether a search is under way."""
        return self._process.running

    def start(self, folder: str, prompt: str, adapter_folder: str = "", even_if_worse: bool = False) -> None:
        """Search a folder; what an earlier search of the same prompt has measured is taken over.

        Raises:
            InputError: no folder, no prompt, or the worker does not run on this computer.
        """
        if self.running:
            return
        if not folder or not os.path.isdir(folder):
            raise InputError(_("Choose a folder with volumes first."))
        if not prompt.strip():
            raise InputError(_("Type under Prompt what to look for first."))
        out = os.path.join(folder, RESULT_NAME)
        arguments = [
            "next",
            "--folder",
            folder,
            "--prompt",
            prompt,
            "--out",
            out,
            "--device",
            self._settings.device,
            "--json",
        ]
        if self._settings.modelFolder:
            arguments += ["--model", self._settings.modelFolder]
        if adapter_folder:
            arguments += ["--adapter", adapter_folder, *(["--even-if-worse"] if even_if_worse else [])]
        command = engine_command(self._settings, *arguments)
        self._folder = folder
        self.items, self.done, self.volumes, self.eta_s = [], 0, 0, None
        self.message = _("Starting …")
        self._process.start(command)
        self.changed.emit()

    def stop(self) -> None:
        """Stop; what was measured is kept."""
        self._process.stop()
        self.message = _("Stopping …")
        self.changed.emit()

    def close(self) -> None:
        """End it for good; what was measured is on disk."""
        self._process.close()

    def _on_event(self, event: dict[str, Any]) -> None:
        try:
            if event["event"] == "start":
                self.volumes = int(event["volumes"])
                self.message = _("{count} volumes, {known} of them known").format(count=self.volumes, known=event["known"])
            elif event["event"] == "volume":
                self._on_volume(event)
            elif event["event"] == "done":
                self._on_done(event)
        except (KeyError, TypeError, ValueError):
            return  # another version's line
        self.changed.emit()

    def _on_volume(self, event: dict[str, Any]) -> None:
        self.done, self.volumes = int(event["done"]), int(event["volumes"])
        self.eta_s = None if event.get("eta_s") is None else float(event["eta_s"])
        self.message = _("Volume {done} of {count}").format(done=self.done, count=self.volumes)
        if event["item"].get("disagreement") is not None:  # one that could not be read has none
            self._keep([self._item(event["item"])])

    def _on_done(self, event: dict[str, Any]) -> None:
        self.items = []
        self._keep([self._item(entry) for entry in event["ranking"]])
        self.message = _("{count} volumes, the most uncertain first").format(count=len(self.items))

    def _keep(self, items: list[NextItem]) -> None:
        paths = {item.path for item in items}
        every = [item for item in self.items if item.path not in paths] + items
        self.items = sorted(every, key=lambda item: -item.disagreement)

    def _item(self, entry: dict[str, Any]) -> NextItem:
        label = str(entry["path"])
        ras = entry.get("ras")
        return NextItem(
            os.path.join(self._folder, *label.split("/")),
            label,
            float(entry["disagreement"]),
            str(entry["target"]),
            None if ras is None else (float(ras[0]), float(ras[1]), float(ras[2])),
            tuple(str(note) for note in entry.get("notes", ())),
        )

    def _on_ended(self, trouble: str) -> None:
        self.eta_s = None
        if trouble:
            self.message = trouble
        self.changed.emit()
