"""Installing what the worker needs into Slicer's Python, and taking exactly that away again; never by itself."""

from __future__ import annotations

import contextlib
import os
import platform
import shutil
import sys
import tempfile
from collections.abc import Callable
from dataclasses import dataclass, replace
from importlib import metadata
from pathlib import Path
from subprocess import CalledProcessError
from typing import Literal

import qt
from packaging.requirements import InvalidRequirement, Requirement
from packaging.utils import canonicalize_name
from packaging.version import InvalidVersion, Version
from slicer.i18n import tr as _

from ProGiDiffSlicerLib.setup.failures import Failure, explain
from ProGiDiffSlicerLib.setup.settings import Settings
from ProGiDiffSlicerLib.setup.status import HELD, Package, PythonHome, PythonStatus
from ProGiDiffSlicerLib.setup.tools import TORCH_EXTENSION, Tools
from ProGiDiffSlicerLib.signals import Signal

_GB = 1e9
# Between a build for the CPU alone and one with all libraries for graphics cards.
TORCH_GB = "1 - 6"
_MARKER = "pendingInstall"
# What stops the PyTorch extension and would stop pip as well.
_NOT_MENDED_BY_PIP = frozenset({"disk", "in_use", "permission"})
# Never wait for a person's typing on a console nobody sees; wheels before anything that would have to be compiled.
_PIP_OPTIONS = ("--no-input", "--disable-pip-version-check", "--progress-bar", "off", "--prefer-binary")
_RECORD = "installedPackages"
# torch itself is no part of Slicer: it is held while pip works, and may go where the Install button has brought it.
_NEVER_REMOVED = frozenset(HELD) - {"torch", "torchvision"} | {"pip", "setuptools", "packaging", "wheel"}


@dataclass(frozen=True)
class Outcome:
    """What is told to the user.

    Attributes:
        kind: ``"restart"`` means that Slicer has to be restarted, after which it goes on by one click.
        message: one sentence; for a failure with the next step.
        details: what was printed, for a support person.
    """

    kind: Literal["done", "declined", "failed", "restart"]
    message: str
    details: str = ""


@dataclass(frozen=True)
class Plan:
    """The steps of an installation.

    Attributes:
        extension: whether the PyTorch extension has to be installed first, which needs a restart.
        torch: versions of torch that the PyTorch extension is asked for, or "".
        damaged: packages that are listed without their files; they are removed first.
        packages: requirements for pip.
        replaced: packages that are there in another version, as "name version".
        wheel_folder: folder to install from, or "" for the network.
        obstacle: why nothing can be installed, in one sentence with the next step, or "".
    """

    extension: bool = False
    torch: str = ""
    damaged: tuple[str, ...] = ()
    packages: tuple[str, ...] = ()
    replaced: tuple[str, ...] = ()
    wheel_folder: str = ""
    obstacle: str = ""

    @property
    def wanted(self) -> tuple[str, ...]:
        """Everything that will be installed."""
        torch = (f"torch{self.torch}",) if self.torch else ()
        extension = (_("{name} extension of Slicer").format(name=TORCH_EXTENSION),) if self.extension else ()
        return extension + torch + self.packages

    def question(self) -> tuple[str, str]:
        """The one question: its text, and the details behind it."""
        names = ", ".join(self.wanted)
        parts = [_("ProGiDiff needs packages in Slicer's own Python: {names}.").format(names=names)]
        if self.wheel_folder:
            parts.append(_('They are installed from "{folder}"; the network is not used.').format(folder=self.wheel_folder))
        else:
            size = TORCH_GB if self.torch else "0.1"
            parts.append(_("About {size} GB are downloaded.").format(size=size))
        text = _("{free} GB are free on this disk. Packages that are part of Slicer are not changed.")
        if self.torch:
            text = _(
                "{free} GB are free on this disk. Packages that are part of Slicer are not changed, but for pip itself,"
                " which the PyTorch extension may replace by an older version."
            )
        parts.append(text.format(free=f"{free_bytes() / _GB:.1f}"))
        if self.replaced:
            text = _("Another version of these is replaced, which other extensions may notice: {names}.")
            parts.append(text.format(names=", ".join(self.replaced)))
        if self.extension:
            parts.append(_("Slicer has to be restarted once; the installation goes on afterwards."))
        parts.append(_("Install them now?"))
        return "\n\n".join(parts), "\n".join(self.wanted)


def make_plan(status: PythonStatus, wheel_folder: str, tools: Tools) -> Plan:
    """What is to be done so that the worker can run in this Python; an empty plan where nothing is."""
    obstacle = _obstacle(status) or _wheel_obstacle(wheel_folder)
    if obstacle:
        return Plan(wheel_folder=wheel_folder, obstacle=obstacle)
    wanting = status.wanting("pip")
    packages = [package.need.text for package in wanting]
    damaged = tuple(package.need.name for package in wanting if package.state == "damaged")
    replaced = tuple(f"{package.need.name} {package.installed}" for package in wanting if package.state == "unfit")
    missing_torch = next((package.need for package in status.wanting("torch")), None)
    if missing_torch is None:
        return Plan(False, "", damaged, tuple(packages), replaced, wheel_folder)
    if wheel_folder:
        return Plan(False, "", damaged, (missing_torch.text, *packages), replaced, wheel_folder)
    if sys.platform == "darwin" and platform.machine() == "x86_64":
        # Builds for it ended with torch 2.2; also an Intel Slicer on an Apple processor says x86_64 of itself.
        text = _(
            "There is no torch {window} for a Slicer that is built for Intel Macs; choose Another Python for the worker (on"
            " a Mac with an Apple processor one that is built for arm64) or another computer."
        )
        return Plan(obstacle=text.format(window=missing_torch.window))
    extension = not tools.torch_extension_loaded()
    return Plan(extension, missing_torch.window, damaged, tuple(packages), replaced)


def free_bytes() -> int:
    """Free bytes on the disk where packages go."""
    return shutil.disk_usage(sys.prefix).free


def _obstacle(status: PythonStatus) -> str:
    if not status.python_fits:
        return status.sentence()
    for package in status.wanting("slicer"):
        return _of_slicer(package)
    for package in status.wanting("torch"):
        if package.state == "unfit":
            text = _(
                "torch {installed} is installed for another extension, and {window} is needed; change it with the PyTorch"
                " Utils module, or choose another Python for the worker."
            )
            return text.format(installed=package.installed, window=package.need.window)
        if package.state == "damaged":
            return _("torch is damaged; uninstall it with the PyTorch Utils module, restart Slicer and press Install again.")
    return ""


def _of_slicer(package: Package) -> str:
    if package.state == "unfit":
        text = _(
            "This Slicer comes with {name} {installed}, and {window} is needed; use a newer Slicer, or choose another Python"
            " for the worker."
        )
    else:
        text = _("This Slicer comes without {name}; use the Slicer of slicer.org, or choose another Python for the worker.")
    return text.format(name=package.need.name, installed=package.installed, window=package.need.window)


def _wheel_obstacle(folder: str) -> str:
    if not folder:
        return ""
    if not Path(folder).is_dir():
        return _('There is no folder "{folder}"; choose the one with the wheels, or empty the field.').format(folder=folder)
    if not any(Path(folder).glob("*.whl")):
        return _('The folder "{folder}" holds no wheels; choose another one, or empty the field.').format(folder=folder)
    return ""


class _Change:
    """What installing and removing do alike.

    Attributes:
        starting: emitted after the question was answered with yes and before anything is changed; a worker that
            runs has to be stopped now, because Windows keeps the files of a running program.
        step: emitted with a sentence when another step begins.
        line: emitted with every line that pip or the PyTorch extension prints.
        ended: emitted with the :class:`Outcome`.
        running: whether packages are being changed.
    """

    def __init__(self, settings: Settings, tools: Tools, home: PythonHome | None = None) -> None:
        """``home`` is the Python that ``tools`` change; by default this one."""
        self._settings = settings
        self._tools = tools
        self._home = PythonHome() if home is None else home
        self._ledger = Ledger(settings, self._home.prefix)
        self._lines: list[str] = []
        self.running = False
        self.starting, self.step, self.line, self.ended = Signal(), Signal(), Signal(), Signal()

    def abandon(self) -> None:
        """Tell nobody anything more; what pip is doing it finishes, and that is accounted for."""
        for signal in (self.starting, self.step, self.line, self.ended):
            signal.clear()

    def _told(self, line: str) -> None:
        self._lines.append(line)
        self.line.emit(line)


class Installer(_Change):
    """Brings this Python to where the worker can run in it."""

    def __init__(self, settings: Settings, tools: Tools, home: PythonHome | None = None) -> None:
        super().__init__(settings, tools, home)
        self._plan = Plan()
        self._steps: list[Callable[[], None]] = []
        self._before: dict[str, str] = {}
        self._constraints = ""
        self._abandoned = False

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
        super().abandon()

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


class Ledger:
    """The packages that were not there before the Install button brought them, by Python installation."""

    def __init__(self, settings: Settings, prefix: str = sys.prefix) -> None:
        """``prefix`` tells one Slicer's Python from another's; they share their settings."""
        self._settings = settings
        self._prefix = prefix

    def packages(self) -> dict[str, str]:
        """Version by package."""
        entries = self._settings.read_record(_RECORD).get(self._prefix, {})
        return {str(name): str(version) for name, version in entries.items()} if isinstance(entries, dict) else {}

    def add(self, packages: dict[str, str]) -> None:
        """Note packages that were installed just now."""
        self._write({**self.packages(), **packages})

    def keep_only(self, packages: dict[str, str]) -> None:
        """Forget the packages that are not among those that are installed now."""
        self._write({name: version for name, version in self.packages().items() if name in packages})

    def _write(self, packages: dict[str, str]) -> None:
        record = self._settings.read_record(_RECORD)
        record.pop(self._prefix, None)
        if packages:
            record[self._prefix] = packages
        self._settings.write_record(_RECORD, record)


@dataclass(frozen=True)
class Removal:
    """What would be removed.

    Attributes:
        packages: names of the packages.
        size: bytes that their files take.
        kept: packages that the Install button has brought and that stay, each with the reason.
    """

    packages: tuple[str, ...]
    size: int
    kept: tuple[str, ...]

    def question(self) -> tuple[str, str]:
        """The one question: its text, and the list behind it."""
        text = _(
            "What the Install button has brought is removed from Slicer's Python: packages: {count}, size: {size}.\n\n"
            "Model folders, wheel folders and whatever was there before are not touched. An extension that has come to use"
            " one of these packages without saying so will ask to install it again.\n\nRemove them now?"
        ).format(count=len(self.packages), size=size_text(self.size))
        return text, "\n".join((*self.packages, *self.kept))


def plan_removal(ledger: Ledger, home: PythonHome) -> Removal:
    """What of the ledger can go from a Python: what is unchanged since, and needed by nothing that stays."""
    noted = ledger.packages()
    found = home.distributions()
    kept: dict[str, str] = {}
    for name, version in noted.items():
        if name in found and found[name].version != version:
            kept[name] = _("{name} stays: it was changed to {version} since").format(name=name, version=found[name].version)
        elif name in found and name in _NEVER_REMOVED:
            kept[name] = _("{name} stays: Slicer itself uses it").format(name=name)
    going = {name for name in noted if name in found and name not in kept}
    needs = {name: _needs(distribution) for name, distribution in found.items()}
    # What stays holds what it needs, and what is held so holds what it needs in turn.
    while held := {need: user for user in sorted(needs.keys() - going) for need in needs[user] if need in going}:
        for name, user in held.items():
            kept[name] = _("{name} stays: {user} needs it").format(name=name, user=user)
        going -= held.keys()
    size = sum(_size(found[name]) for name in going)
    return Removal(tuple(sorted(going)), size, tuple(kept[name] for name in sorted(kept)))


class Remover(_Change):
    """Takes away what the Install button has brought: one question, then pip."""

    _removal = Removal((), 0, ())

    def possible(self) -> bool:
        """Whether the Install button has brought anything."""
        return bool(self._ledger.packages())

    def start(self) -> None:
        """Say what goes and how much that is, ask once, and remove it; the end is told by :attr:`ended`."""
        if self.running:
            return
        self._removal = plan_removal(self._ledger, self._home)
        if not self._removal.packages:
            text = _("There is nothing to remove: what was installed is needed by other packages, or is gone already.")
            self.ended.emit(Outcome("done", text, "\n".join(self._removal.kept)))
            return
        text, details = self._removal.question()
        if not self._tools.ask(_("Remove downloaded files"), text, details):
            self.ended.emit(Outcome("declined", _("Nothing was removed.")))
            return
        self._lines = []
        self.running = True
        self.starting.emit()
        self._tools.pip_uninstall(list(self._removal.packages), self._told, self._removed)

    def _removed(self, code: int) -> None:
        self.running = False
        self._ledger.keep_only(self._home.versions())
        details = "\n".join((*self._removal.kept, *self._lines))
        if code != 0:
            self.ended.emit(Outcome("failed", explain(self._lines).message, details))
            return
        text = _("Removed packages: {count}, {size} in all.")
        message = text.format(count=len(self._removal.packages), size=size_text(self._removal.size))
        self.ended.emit(Outcome("done", message, details))


def size_text(size: int) -> str:
    """Bytes as a person reads them."""
    return f"{size / 1e9:.1f} GB" if size >= 1e9 else f"{size / 1e6:.1f} MB"


def _needs(distribution: metadata.Distribution) -> set[str]:
    """Packages without which a distribution does not work here; its optional extras are not among them."""
    needs = set()
    for line in distribution.requires or []:
        try:
            requirement = Requirement(line)
        except InvalidRequirement:  # an old package; what it means cannot be known
            continue
        if requirement.marker is None or requirement.marker.evaluate({"extra": ""}):
            needs.add(str(canonicalize_name(requirement.name)))
    return needs


def _size(distribution: metadata.Distribution) -> int:
    total = 0
    for file in distribution.files or []:
        place = distribution.locate_file(file)
        try:
            total += place.stat().st_size  # type: ignore[attr-defined]
        except OSError:  # listed, but gone
            continue
    return total
