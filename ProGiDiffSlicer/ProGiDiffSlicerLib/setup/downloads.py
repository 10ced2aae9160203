"""What the Install button has put on this computer, and taking exactly that away again."""

from __future__ import annotations

import sys
from dataclasses import dataclass
from importlib import metadata

from packaging.requirements import InvalidRequirement, Requirement
from packaging.utils import canonicalize_name
from slicer.i18n import tr as _

from ProGiDiffSlicerLib.setup.failures import explain
from ProGiDiffSlicerLib.setup.outcome import Outcome
from ProGiDiffSlicerLib.setup.requirements import HELD
from ProGiDiffSlicerLib.setup.settings import Settings
from ProGiDiffSlicerLib.setup.status import PythonHome
from ProGiDiffSlicerLib.setup.tools import Tools
from ProGiDiffSlicerLib.signals import Signal

_RECORD = "installedPackages"
# torch itself is no part of Slicer: it is held while pip works, and may go where the Install button has brought it.
_NEVER_REMOVED = frozenset(HELD) - {"torch", "torchvision"} | {"pip", "setuptools", "packaging", "wheel"}


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


class Remover:
    """Takes away what the Install button has brought: one question, then pip.

    Attributes:
        starting: emitted after the question was answered with yes and before anything is changed; a worker that runs
            has to be stopped now.
        line: emitted with every line that pip prints.
        ended: emitted with the :class:`Outcome`.
        running: whether a removal is under way.
    """

    def __init__(
        self,
        settings: Settings,
        tools: Tools,
        home: PythonHome | None = None,
    ) -> None:
        """``home`` is the Python from which ``tools`` removes; by default this one."""
        self._tools = tools
        self._home = PythonHome() if home is None else home
        self._ledger = Ledger(settings, self._home.prefix)
        self._lines: list[str] = []
        self._removal = Removal((), 0, ())
        self.running = False
        self.starting = Signal()
        self.line = Signal()
        self.ended = Signal()

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

    def abandon(self) -> None:
        """Tell nobody anything more; what pip is doing it finishes, and the account of it is kept."""
        for signal in (self.starting, self.line, self.ended):
            signal.clear()

    def _told(self, line: str) -> None:
        self._lines.append(line)
        self.line.emit(line)

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
