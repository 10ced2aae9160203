"""Where the bundled sample volume lies. Standard library only.

What is bundled ships twice: in a checkout it is the repository's ``Resources`` folder, in a wheel and in the
Slicer package it is the folder ``_resources`` of this package. The bundled model is found by
:mod:`progidiff.locations`.
"""

from __future__ import annotations

from pathlib import Path

from progidiff.errors import InputError

_PACKAGE = Path(__file__).resolve().parent


def resource_folders(package: Path = _PACKAGE) -> tuple[Path, Path]:
    """Where bundled files may lie, given the package's folder: in a checkout, in an installation."""
    return package.parents[1] / "Resources", package / "_resources"


def sample_volume(package: Path = _PACKAGE) -> Path:
    """The bundled sample volume (``SampleData/*.nii.gz``; the first by name where there are several).

    Raises:
        InputError: this installation has none.
    """
    for folder in resource_folders(package):
        for sample in sorted((folder / "SampleData").glob("*.nii.gz")):
            return sample
    raise InputError("This installation has no sample volume; name an image of your own.")
