"""The choices of the Setup panel. They belong to the person at this computer, not to the scene."""

from __future__ import annotations

import json
import secrets
from typing import Any, Protocol, get_args

import slicer

from progidiff.wire.messages import Device
from ProGiDiffSlicerLib.signals import Signal
from ProGiDiffSlicerLib.worker.command import WorkerCommand, local_command, parse_command

PREFIX = "ProGiDiff/"
DEVICES: tuple[Device, ...] = get_args(Device)
WORKER_KINDS = ("this", "python", "command")
# A worker started before one of these changed is not the one that the settings speak of.
WORKER_SETTINGS = frozenset({"workerKind", "pythonPath", "commandText"})


class Store(Protocol):
    """The part of QSettings that is used."""

    def value(self, key: str, default: Any = None) -> Any: ...

    def setValue(self, key: str, value: Any) -> None: ...

    def remove(self, key: str) -> None: ...


class Settings:
    """Settings that outlive the session.

    Only text is stored, because the files of QSettings give back nothing else on every platform.

    Attributes:
        changed: emitted with the name of a setting after its value has changed.
    """

    def __init__(self, store: Store | None = None) -> None:
        """``store`` is Slicer's user settings unless another one is given."""
        self._store = slicer.app.userSettings() if store is None else store
        self.changed = Signal()

    @property
    def modelFolder(self) -> str:
        """Model folder on the machine where the worker runs; "" for the bundled model."""
        return self._text("modelFolder")

    @modelFolder.setter
    def modelFolder(self, folder: str) -> None:
        self._set("modelFolder", folder.strip())

    @property
    def device(self) -> Device:
        """One of :data:`DEVICES`."""
        stored = self._text("device")
        return next((device for device in DEVICES if device == stored), DEVICES[0])

    @device.setter
    def device(self, device: Device) -> None:
        if device not in DEVICES:
            raise ValueError(f"not a device: {device}")
        self._set("device", device)

    @property
    def workerKind(self) -> str:
        """``"this"`` Slicer's own Python, another ``"python"``, or a whole ``"command"`` such as ssh."""
        kind = self._text("workerKind")
        return kind if kind in WORKER_KINDS else WORKER_KINDS[0]

    @workerKind.setter
    def workerKind(self, kind: str) -> None:
        if kind not in WORKER_KINDS:
            raise ValueError(f"not a kind of worker: {kind}")
        self._set("workerKind", kind)

    @property
    def pythonPath(self) -> str:
        """The other Python's executable."""
        return self._text("pythonPath")

    @pythonPath.setter
    def pythonPath(self, path: str) -> None:
        self._set("pythonPath", path.strip())

    @property
    def commandText(self) -> str:
        """The command as it was typed, e.g. ``ssh gpu-host python -m progidiff worker``."""
        return self._text("commandText")

    @commandText.setter
    def commandText(self, text: str) -> None:
        self._set("commandText", text.strip())

    @property
    def wheelFolder(self) -> str:
        """Folder of wheels to install from without any network; "" to install from the network."""
        return self._text("wheelFolder")

    @wheelFolder.setter
    def wheelFolder(self, folder: str) -> None:
        self._set("wheelFolder", folder.strip())

    @property
    def curatedFolder(self) -> str:
        """Folder of the set of training examples; "" as long as none was chosen."""
        return self._text("curatedFolder")

    @curatedFolder.setter
    def curatedFolder(self, folder: str) -> None:
        self._set("curatedFolder", folder.strip())

    @property
    def adaptersFolder(self) -> str:
        """Folder of the adapters that were tuned here; "" as long as none was chosen."""
        return self._text("adaptersFolder")

    @adaptersFolder.setter
    def adaptersFolder(self, folder: str) -> None:
        self._set("adaptersFolder", folder.strip())

    @property
    def annotatorId(self) -> str:
        """A random text that stands for this user in training examples; made when it is first needed."""
        return self._random("annotatorId", 8)

    @property
    def annotatorSecret(self) -> str:
        """With which IDs of patients are hashed; made when it is first needed, and never written anywhere else."""
        return self._random("annotatorSecret", 32)

    def command(self) -> WorkerCommand:
        """The command that starts the worker.

        Raises:
            InputError: the command cannot be understood, or no Python has been chosen.
        """
        if self.workerKind == "command":
            return parse_command(self.commandText)
        if self.workerKind == "python":
            return local_command(self.pythonPath)
        return local_command()

    def worker_key(self) -> str:
        """One text that is the same as long as the settings speak of the same worker, model and device."""
        of_kind = {"this": "", "python": self.pythonPath, "command": self.commandText}[self.workerKind]
        return json.dumps([self.workerKind, of_kind, self.modelFolder, self.device])

    @property
    def testedWorker(self) -> str:
        """The :meth:`worker_key` with which the connection was last tested with success."""
        return self._text("testedWorker")

    @testedWorker.setter
    def testedWorker(self, key: str) -> None:
        self._set("testedWorker", key)

    def read_record(self, name: str) -> dict[str, Any]:
        """A JSON object that was stored by :meth:`write_record`; empty where there is none."""
        try:
            record = json.loads(self._text(name) or "{}")
        except ValueError:  # edited by hand
            return {}
        return record if isinstance(record, dict) else {}

    def write_record(self, name: str, record: dict[str, Any]) -> None:
        """Store a JSON object; an empty one removes the entry."""
        self._set(name, json.dumps(record, sort_keys=True) if record else "")

    def _random(self, name: str, size: int) -> str:
        if not self._text(name):
            self._set(name, secrets.token_hex(size))
        return self._text(name)

    def _text(self, name: str) -> str:
        value = self._store.value(PREFIX + name, "")
        return value if isinstance(value, str) else ""

    def _set(self, name: str, value: str) -> None:
        if value == self._text(name):
            return
        if value:
            self._store.setValue(PREFIX + name, value)
        else:
            self._store.remove(PREFIX + name)
        self.changed.emit(name)
