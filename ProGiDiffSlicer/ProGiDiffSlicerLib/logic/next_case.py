"""Which volume of a folder to correct next: the search in a process of its own, and its list."""

from __future__ import annotations

import os
from dataclasses import dataclass
from typing import Any

from slicer.i18n import tr as _

from progidiff.errors import InputError
from ProGiDiffSlicerLib.signals import Signal
from ProGiDiffSlicerLib.worker.lines import Choices, LineProcess, engine_command

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
