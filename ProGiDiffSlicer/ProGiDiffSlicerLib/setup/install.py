"""Installing what the worker needs into Slicer's Python: one question, then step by step, never by itself."""

from __future__ import annotations

import contextlib
import os
import sys
import tempfile
from collections.abc import Callable
from dataclasses import replace
from importlib import metadata
from subprocess import CalledProcessError

import qt
from packaging.utils import canonicalize_name
from packaging.version import InvalidVersion, Version
from slicer.i18n import tr as _

from ProGiDiffSlicerLib.setup.downloads import Ledger
from ProGiDiffSlicerLib.setup.failures import Failure, explain
from ProGiDiffSlicerLib.setup.outcome import Outcome
from ProGiDiffSlicerLib.setup.plan import TORCH_GB, Plan, make_plan
from ProGiDiffSlicerLib.setup.requirements import HELD
from ProGiDiffSlicerLib.setup.settings import Settings
from ProGiDiffSlicerLib.setup.status import PythonHome
from ProGiDiffSlicerLib.setup.tools import Tools
from ProGiDiffSlicerLib.signals import Signal

_MARKER = "pendingInstall"
# What stops the PyTorch extension and would stop pip as well.
_NOT_MENDED_BY_PIP = frozenset({"disk", "in_use", "permission"})
# Never wait for a person's typing on a console nobody sees; wheels before anything that would have to be compiled.
_PIP_OPTIONS = ("--no-input", "--disable-pip-version-check", "--progress-bar", "off", "--prefer-binary")


class Installer:
    """Brings this Python to where the worker can run in it.

    Attributes:
        starting: emitted after the question was answered with yes and before anything is changed; a worker that
            runs has to be stopped now, because Windows keeps the files of a running program.
        step: emitted with a sentence when another step begins.
        line: emitted with every line that pip or the PyTorch extension prints.
        ended: emitted with the :class:`Outcome`.
        running: whether an installation is under way.
    """

    def __init__(
        self,
        settings: Settings,
        tools: Tools,
        home: PythonHome | None = None,
    ) -> None:
        """``home`` is the Python into which ``tools`` installs; by default this one."""
        self._settings = settings
        self._tools = tools
        self._home = PythonHome() if home is None else home
        self._ledger = Ledger(settings, self._home.prefix)
        self._plan = Plan()
        self._steps: list[Callable[[], None]] = []
        self._before: dict[str, str] = {}
        self._lines: list[str] = []
        self._constraints = ""
        self._abandoned = False
        self.running = False
        self.starting = Signal()
        self.step = Signal()
        self.line = Signal()
        self.ended = Signal()

    def continues(self) -> bool:
        """Whether an installation that was agreed to waits for its continuation after a restart."""
        marker = self._settings.read_record(_MARKER)
        return marker.get("prefix") == self._home.prefix and not self._home.status().ready

    def start(self) -> None:
        """Ask once, then install; the end is told by :attr:`ended`. Does nothing while one is under way."""
        if self.running:
            return
        plan = make_plan(self._home.status(), self._settings.wheelFolder, self._tools)
        if plan.obstacle:
            self._end(Outcome("failed", plan.obstacle))
            return
        if not plan.wanted:
            self._end(Outcome("done", self._home.status().sentence()))
            return
        if not self._agreed(plan):
            text, details = plan.question()
            if not self._tools.ask(_("Install packages for ProGiDiff"), text, details):
                self._end(Outcome("declined", _("Nothing was installed; press Install when you want to go on.")))
                return
        self._plan = plan
        self._before = self._home.versions()
        self._lines = []
        self._steps = self._steps_of(plan)
        self.running = True
        self.starting.emit()
        self._next()

    def abandon(self) -> None:
        """Begin no further step and tell nobody anything more; what pip is doing it finishes, and that is accounted for."""
        self._steps = []
        self._abandoned = True
        for signal in (self.starting, self.step, self.line, self.ended):
            signal.clear()

    def _steps_of(self, plan: Plan) -> list[Callable[[], None]]:
        if plan.extension:
            return [self._install_extension]  # the rest follows after the restart
        steps = [self._remove_damaged] if plan.damaged else []
        steps += [self._install_torch] if plan.torch else []
        return steps + ([self._install_packages] if plan.packages else [])

    def _agreed(self, plan: Plan) -> bool:
        """Whether this very installation, or a larger one, was agreed to before a restart."""
        marker = self._settings.read_record(_MARKER)
        same = marker.get("prefix") == self._home.prefix and marker.get("wheelFolder") == plan.wheel_folder
        return same and set(plan.wanted) <= set(marker.get("wanted", []))

    def _next(self) -> None:
        if self._abandoned:
            self.running = False
        elif self._steps:
            # Through the event loop, so that the panel shows what happens before a step blocks it.
            step = self._steps.pop(0)
            qt.QTimer.singleShot(0, step)
        else:
            self._verify()

    def _install_extension(self) -> None:
        self.step.emit(_("Installing the PyTorch extension"))
        if self._tools.torch_extension_waits() or self._guarded(self._tools.install_torch_extension):
            self._wait_for_restart(_("The PyTorch extension is installed; restart Slicer and continue the installation."))
            return
        text = _(
            "The PyTorch extension could not be installed; install it with the Extensions Manager, restart Slicer and press"
            " Install again, or use a wheel folder."
        )
        self._end(Outcome("failed", text, "\n".join(self._lines)))

    def _install_torch(self) -> None:
        self.step.emit(_("Installing torch through the PyTorch extension"))
        finished = self._guarded(self._let_torch_be_installed)
        self._keep_account()
        # It loads torch at the end, and that may fail here although the worker can load it.
        if self._home.status().wanting("torch"):
            if not self._lines or finished:
                self._lines.append(_("it did not install torch"))
            failure = explain(self._lines, program=_("The PyTorch extension"))
            if self._abandoned or failure.kind in _NOT_MENDED_BY_PIP or not self._wants_torch_of_pip(failure):
                self._fail(_("The PyTorch extension"))
                return
            self._lines = []
            self._plan = replace(self._plan, packages=(f"torch{self._plan.torch}", *self._plan.packages))
            self._steps = [self._install_packages]
        self._next()

    def _wants_torch_of_pip(self, failure: Failure) -> bool:
        """Offer the second way to torch: its extension asks a server of its own, which can be blocked where pip's is not."""
        text = _(
            "{failure}\n\nThe second way is pip with its own server and its usual build of torch, which is not chosen for"
            " your graphics card. About {size} GB are downloaded. Install torch that way now?"
        )
        text = text.format(failure=failure.message, size=TORCH_GB)
        return self._tools.ask(_("Install torch with pip"), text, failure.details)

    def _let_torch_be_installed(self) -> bool:
        self._tools.install_torch(self._plan.torch, self._told)
        return True

    def _remove_damaged(self) -> None:
        self.step.emit(_("Removing what is left of damaged packages"))
        self._tools.pip_uninstall(list(self._plan.damaged), self._told, self._removed_damaged)

    def _removed_damaged(self, code: int) -> None:
        if code != 0:
            self._fail()
            return
        self._next()

    def _install_packages(self) -> None:
        self.step.emit(_("Installing {count} packages with pip").format(count=len(self._plan.packages)))
        self._constraints = _write_constraints(self._home.versions())
        arguments = [*self._plan.packages, "--constraint", self._constraints, *_PIP_OPTIONS]
        if self._plan.wheel_folder:
            arguments += ["--no-index", "--find-links", self._plan.wheel_folder]
        self._tools.pip_install(arguments, self._told, self._pip_ended)

    def _pip_ended(self, code: int) -> None:
        with contextlib.suppress(OSError):  # somebody emptied the folder for temporary files
            os.remove(self._constraints)
        self._keep_account()
        if code != 0:
            self._fail()
            return
        self._next()

    def _verify(self) -> None:
        status = self._home.status()
        if not status.ready:
            names = ", ".join(package.need.name for package in status.wanting())
            text = _("pip reported no error, but {names} cannot be found; restart Slicer and press Install again.")
            self._end(Outcome("failed", text.format(names=names), "\n".join(self._lines)))
            return
        loaded = loaded_and_changed(self._before, self._home.versions())
        message = status.sentence()
        if loaded:
            text = _("{message} Restart Slicer before other extensions use {names}, which were loaded in another version.")
            message = text.format(message=message, names=", ".join(loaded))
        self._end(Outcome("done", message, "\n".join(self._lines)))

    def _told(self, line: str) -> None:
        self._lines.append(line)
        self.line.emit(line)

    def _guarded(self, action: Callable[[], bool]) -> bool:
        """Run what belongs to another extension: whatever it raises becomes a line of the report."""
        try:
            return action()
        except Exception as error:
            # pip's own last line says more than that it ended with a code.
            if not (isinstance(error, CalledProcessError) and self._lines):
                self._told(f"{type(error).__name__}: {error}")
            return False

    def _keep_account(self) -> None:
        """Note what this installation has added, even if it failed half-way."""
        now = self._home.versions()
        self._ledger.add({name: version for name, version in now.items() if name not in self._before})

    def _fail(self, program: str = "pip") -> None:
        failure = explain(self._lines, bool(self._plan.wheel_folder), program)
        if failure.kind == "in_use":
            self._wait_for_restart(failure.message)
            return
        self._end(Outcome("failed", failure.message, failure.details))

    def _wait_for_restart(self, message: str) -> None:
        marker = {"prefix": self._home.prefix, "wanted": list(self._plan.wanted), "wheelFolder": self._plan.wheel_folder}
        self._settings.write_record(_MARKER, marker)
        self._end(Outcome("restart", message, "\n".join(self._lines)))

    def _end(self, outcome: Outcome) -> None:
        self.running = False
        self._steps = []
        if outcome.kind != "restart":
            self._settings.write_record(_MARKER, {})
        self.ended.emit(outcome)


def loaded_and_changed(before: dict[str, str], after: dict[str, str]) -> tuple[str, ...]:
    """Packages of which another version is installed now than the one that this process has loaded."""
    changed = {name for name, version in before.items() if after.get(name, version) != version}
    if not changed:
        return ()
    loaded: set[str] = set()
    for module, names in metadata.packages_distributions().items():
        if module in sys.modules:
            loaded |= changed & {str(canonicalize_name(name)) for name in names}
    return tuple(sorted(loaded))


def _write_constraints(installed: dict[str, str]) -> str:
    """A file that makes pip keep what other parts of Slicer live on; the caller removes it."""
    lines = [f"{name}=={installed[name]}" for name in HELD if name in installed and _is_version(installed[name])]
    handle, path = tempfile.mkstemp(prefix="progidiff-constraints-", suffix=".txt")
    with open(handle, "w", encoding="utf-8") as file:
        file.write("\n".join(lines) + "\n")
    return path


def _is_version(text: str) -> bool:
    """Whether pip would understand it; one constraint that it does not understand stops it."""
    try:
        Version(text)
    except InvalidVersion:
        return False
    return True
