"""What an installation would do, worked out and put into one question before anything is done."""

from __future__ import annotations

import platform
import shutil
import sys
from dataclasses import dataclass
from pathlib import Path

from slicer.i18n import tr as _

from ProGiDiffSlicerLib.setup.status import Package, Status
from ProGiDiffSlicerLib.setup.tools import TORCH_EXTENSION, Tools

_GB = 1e9
# Between a build for the CPU alone and one with all libraries for graphics cards.
TORCH_GB = "1 - 6"


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


def make_plan(status: Status, wheel_folder: str, tools: Tools) -> Plan:
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


def _obstacle(status: Status) -> str:
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
