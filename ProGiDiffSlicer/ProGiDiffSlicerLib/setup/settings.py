"""The choices of the Setup panel. They belong to the person at this computer, not to the scene."""

from __future__ import annotations

import json
import secrets
from typing import Any, Generic, TypeVar, get_args

import slicer
from slicer.i18n import tr as _

from progidiff.errors import InputError
from progidiff.wire.messages import Device
from ProGiDiffSlicerLib.signals import Signal
from ProGiDiffSlicerLib.worker.command import WorkerCommand, local_command, parse_command

PREFIX = "ProGiDiff/"
DEVICES: tuple[Device, ...] = get_args(Device)
WORKER_KINDS = ("this", "python", "command")
# A worker started before one of these changed is not the one that the settings speak of.
WORKER_SETTINGS = frozenset({"workerKind", "pythonPath", "commandText"})
Text = TypeVar("Text", bound=str)


class Setting(Generic[Text]):
    """One setting, as an attribute of :class:`Settings`: a text without spaces around it, or one of some choices.

    Where something else is stored than a choice, it is the first of them.
    """

    def __init__(self, *choices: Text) -> None:
        self._choices = choices
        self._name = ""

    def __set_name__(self, _owner: type, name: str) -> None:
        self._name = name

    def __get__(self, settings: Settings, _owner: type | None = None) -> Text:
        stored: Any = settings.read(self._name)
        return stored if not self._choices or stored in self._choices else self._choices[0]

    def __set__(self, settings: Settings, value: Text) -> None:
        if self._choices and value not in self._choices:
            raise ValueError(f"{self._name} cannot be {value}")
        settings.write(self._name, value.strip())


class Settings:
    """Settings that outlive the session.

    Only text is stored, because the files of QSettings give back nothing else on every platform.

    Attributes:
        changed: emitted with the name of a setting after its value has changed.
        modelFolder: model folder on the machine where the worker runs; "" for the bundled model.
        device: one of :data:`DEVICES`.
        workerKind: ``"this"`` Slicer's own Python, another ``"python"``, or a whole ``"command"`` such as ssh.
        pythonPath: the other Python's executable.
        commandText: the command as it was typed, e.g. ``ssh gpu-host python -m progidiff worker``.
        wheelFolder: folder of wheels to install from without any network; "" to install from the network.
        curatedFolder: folder of the set of training examples; "" as long as none was chosen.
        adaptersFolder: folder of the adapters that were tuned here; "" as long as none was chosen.
        testedWorker: the :meth:`worker_key` with which the connection was last tested with success.
    """

    modelFolder = Setting[str]()
    device = Setting(*DEVICES)
    workerKind = Setting(*WORKER_KINDS)
    pythonPath = Setting[str]()
    commandText = Setting[str]()
    wheelFolder = Setting[str]()
    curatedFolder = Setting[str]()
    adaptersFolder = Setting[str]()
    testedWorker = Setting[str]()

    def __init__(self, store: Any = None) -> None:
        """``store`` is a QSettings, by default Slicer's user settings."""
        self._store = slicer.app.userSettings() if store is None else store
        self.changed = Signal()

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

    def command_here(self) -> WorkerCommand:
        """The command that starts a worker on this computer, with the same Python, for what reads folders of this computer.

        Raises:
            InputError: the worker runs elsewhere, or as for :meth:`command`.
        """
        if self.workerKind == "command":
            raise InputError(
                _(
                    "Tuning runs on this computer, but the worker is started by a command of its own; choose a Python of "
                    "this computer in Setup, or run progidiff on the other one."
                )
            )
        return self.command()

    def worker_key(self) -> str:
        """One text that is the same as long as the settings speak of the same worker, model and device."""
        of_kind = {"this": "", "python": self.pythonPath, "command": self.commandText}[self.workerKind]
        return json.dumps([self.workerKind, of_kind, self.modelFolder, self.device])

    def read_record(self, name: str) -> dict[str, Any]:
        """A JSON object that was stored by :meth:`write_record`; empty where there is none."""
        try:
            record = json.loads(self.read(name) or "{}")
        except ValueError:  # edited by hand
            return {}
        return record if isinstance(record, dict) else {}

    def write_record(self, name: str, record: dict[str, Any]) -> None:
        """Store a JSON object; an empty one removes the entry."""
        self.write(name, json.dumps(record, sort_keys=True) if record else "")

    def _random(self, name: str, size: int) -> str:
        if not self.read(name):
            self.write(name, secrets.token_hex(size))
        return self.read(name)

    def read(self, name: str) -> str:
        """The text that is stored under a name, or ""."""
        value = self._store.value(PREFIX + name, "")
        return value if isinstance(value, str) else ""

    def write(self, name: str, value: str) -> None:
        """Store a text under a name; an empty one removes the entry."""
        if value == self.read(name):
            return
        if value:
            self._store.setValue(PREFIX + name, value)
        else:
            self._store.remove(PREFIX + name)
        self.changed.emit(name)
