"""Pictures of the panel in its states and of slice views: ``python -m Testing.panel.screenshots --out FOLDER``.

Every picture shows what the module's own widgets and Slicer's own displayable managers paint after the module was used as a
person uses it, with the engine's real worker and model. The images are real CT where it lies beside the checkout
(../shared/data), else the bundled sample volume.
"""

from __future__ import annotations

import argparse
import dataclasses
import os
import sys
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image

from progidiff.errors import ProGiDiffError
from progidiff.places import atomic_folder, sample_volume
from progidiff.volumes.geometry import Geometry
from progidiff.volumes.reading import read_volume

from .driver import ROOT, VIEWS, Driver, host, qt

DATA = ROOT.parent / "shared" / "data"
# Apache-2.0: pictures of it may be published.
FREE_CT = DATA / "permissive/totalsegmentator_tests/example_ct_sm.nii.gz"
# For looking only: pictures of it stay on this computer.
RESEARCH_CT = DATA / "research/amos_ct_slices/amos_0001_slices61-70_img.nii.gz"
# Window and level in which abdominal CT is read.
SOFT_TISSUE = 400.0, 40.0
PUBLISHED = ROOT / "Resources" / "Screenshots"
LARGEST_BYTES = 400_000


class Screenshots:
    """Takes the pictures in an order in which one state leads to the next."""

    def __init__(self, out: Path, proposals: int, publish: Path | None) -> None:
        self.out = out
        self.proposals = proposals
        self.publish = publish

    def take(self) -> None:
        """All of them."""
        with without_packages(), opened() as driver:
            driver.open_sections("setup", "prompt")
            driver.panels.setup.ui.detailsSection.collapsed = False
            driver.panel(self.out / "panel-1-setup-needed.png")
        with opened() as driver:
            self.main_path(driver)
            self.accidents(driver)
        if RESEARCH_CT.is_file():
            with opened() as driver:
                self.research(driver)

    def main_path(self, driver: Driver) -> None:
        """From an empty panel to an edited segment."""
        free = FREE_CT.is_file()
        driver.load(FREE_CT if free else sample_volume(), "Abdomen CT")
        driver.set_window(*SOFT_TISSUE)
        driver.fill("liver; left kidney; spleen", self.proposals, 4, seed=3)
        self.panel(driver, "2-ready")
        driver.propose()
        driver.wait(lambda: driver.session.store is not None and driver.session.store["liver"].received > 4)
        self.panel(driver, "3-proposing")
        driver.wait(lambda: driver.settled)
        self.targets(driver, "slices")
        self.panel(driver, "4-proposals")
        driver.click(driver.panels.proposals.ui.uncertainButton)
        driver.settle()
        driver.save_views(self.out / "slices-most-uncertain.png")
        driver.go_to_middle("liver")
        self.published(driver, 1, driver.save_both)
        self.published(driver, 2, driver.save_large)
        driver.panels.proposals.ui.blindedCheckBox.setChecked(True)
        driver.settle()
        self.panel(driver, "5-blinded")
        driver.panels.proposals.ui.blindedCheckBox.setChecked(False)
        driver.settle()
        for target in reversed(driver.session.store.targets):
            driver.choose_target(target)
            driver.press_in_table(qt.Qt.Key_Return)
            driver.settle()
        driver.hide_proposals()
        self.panel(driver, "6-accepted")
        driver.save_views(self.out / "slices-accepted.png")
        self.published(driver, 3, driver.save_both)
        driver.click(driver.panels.review.ui.editButton)
        driver.settle()
        self.panel(driver, "7-editing")
        driver.panels.review.ui.editorSection.collapsed = True

    def accidents(self, driver: Driver) -> None:
        """What the panel says when something is wrong."""
        driver.fill("lever", self.proposals, 4, seed=3)
        driver.propose()
        self.panel(driver, "8-unknown-structure")
        driver.fill("liver", self.proposals, 4, seed=5)
        driver.propose()
        first = driver.session.store
        driver.wait(lambda: driver.session.store is not first and driver.session.store["liver"].received > 3)
        os.kill(driver.services.client.hello.pid, 9)
        driver.wait(lambda: driver.settled)
        self.panel(driver, "9-worker-ended")

    def research(self, driver: Driver) -> None:
        """Slices of a clinical CT in full resolution."""
        volume = read_volume(RESEARCH_CT)
        # The file's affine holds spacings only: i runs to the patient's left and j to the front.
        affine = np.diag([-1.0, 1.0, 1.0, 1.0]) @ np.diag([*volume.geometry.spacing, 1.0])
        driver.add(dataclasses.replace(volume, geometry=Geometry(volume.geometry.shape_ijk, affine)), "Clinical CT")
        driver.set_window(*SOFT_TISSUE)
        driver.ask("liver; spleen; left kidney; pancreas", self.proposals, 4, seed=3, slices=(4, 6))
        driver.wait(lambda: driver.settled)
        self.targets(driver, "clinical", ("Red",))
        driver.save_both(self.out / "clinical-panel.png")

    def targets(self, driver: Driver, name: str, views: Sequence[str] = VIEWS) -> None:
        """Pictures of all targets, of the liver last; stop where the run did not end well."""
        if not driver.complete:
            raise ProGiDiffError(driver.said or "The run ended without proposals.")
        for target in driver.session.store.targets:
            driver.look_at(target)
            driver.save_views(self.out / f"{name}-{'-'.join(target.split())}.png", views)
        driver.look_at("liver")

    def panel(self, driver: Driver, name: str) -> None:
        """The panel as it is now."""
        driver.panel(self.out / f"panel-{name}.png")

    def published(self, driver: Driver, number: int, save: Any) -> None:
        """A picture of the README and of the extension's page."""
        path = self.out / f"{number}.png"
        save(path)
        smaller(path)
        if self.publish is not None:
            self.publish.mkdir(parents=True, exist_ok=True)
            (self.publish / path.name).write_bytes(path.read_bytes())


@contextmanager
def opened() -> Iterator[Driver]:
    """The module in an empty scene."""
    host.start()
    host.clear_scene()
    driver = Driver()
    try:
        yield driver
    finally:
        driver.close()
        host.clear_scene()


@contextmanager
def without_packages() -> Iterator[None]:
    """A Slicer as it comes from its installer: with its own packages and none of the worker's."""
    host.install()
    Driver.find_library()
    from ProGiDiffSlicerLib.setup.status import Package, PythonHome, PythonStatus

    looked = PythonHome.status

    def status(self: Any) -> PythonStatus:
        found = looked(self)
        packages = tuple(p if p.need.source == "slicer" else Package(p.need, "", "missing") for p in found.packages)
        return dataclasses.replace(found, packages=packages)

    PythonHome.status = status  # type: ignore[method-assign]
    try:
        yield
    finally:
        PythonHome.status = looked  # type: ignore[method-assign]


def smaller(path: Path) -> None:
    """Write a picture with as few bytes as its content needs, with 256 colours where it is still too large."""
    picture = Image.open(path).convert("RGB")
    picture.save(path, optimize=True)
    if path.stat().st_size > LARGEST_BYTES:
        picture.quantize(256).save(path, optimize=True)


def main(arguments: Sequence[str] | None = None) -> int:
    """The command; returns the exit code."""
    parser = argparse.ArgumentParser(prog="screenshots", description=__doc__)
    parser.add_argument("--out", type=Path, required=True, metavar="FOLDER", help="where the pictures appear")
    parser.add_argument("--proposals", type=int, default=8, metavar="N", help="proposals of each target (8)")
    parser.add_argument("--publish", action="store_true", help=f"also write 1.png to 3.png to {PUBLISHED.relative_to(ROOT)}")
    options = parser.parse_args(arguments)
    try:
        with atomic_folder(options.out) as folder:
            Screenshots(folder, options.proposals, PUBLISHED if options.publish else None).take()
    except ProGiDiffError as error:
        print(str(error), file=sys.stderr)
        return 2
    print(f"{options.out}: {len(list(options.out.glob('*.png')))} pictures of the panel and of slice views")
    return 0


if __name__ == "__main__":
    sys.exit(main())
