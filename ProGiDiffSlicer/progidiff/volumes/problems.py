"""What can be wrong with an image file, said in the same words whatever its format."""

from __future__ import annotations

from collections.abc import Iterable
from pathlib import Path

from progidiff.errors import InputError, why_left_out

# Far above any scanner's output; a header that claims more is damaged, and reading it would exhaust the
# memory.
MAX_VOXELS = 2**32


def damaged(name: str, kind: str) -> InputError:
    """The error for a file that its library refuses."""
    return InputError(f"{name} cannot be read as {kind}: it is damaged, cut off or not what its name says; export it again.")


def not_a_volume(name: str, what: str) -> InputError:
    """The error for an image with more than one value per voxel or more than three dimensions."""
    return InputError(f"{name} is {what}, not a single volume; export one 3-D greyscale volume and use that.")


def bad_spacing(name: str, spacing: Iterable[object]) -> InputError:
    """The error for voxels without a size."""
    stated = " × ".join(f"{s:g}" if isinstance(s, float) else str(s) for s in spacing)
    return InputError(
        f"{name} has a voxel spacing that is not above zero ({stated} mm); "
        "correct the spacing in its header or export it again."
    )


def too_large(name: str) -> InputError:
    """The error for an image that does not fit into memory."""
    return InputError(why_left_out(name, MemoryError()))


def is_text(path: Path) -> bool:
    """Whether a path can be written as text, as SimpleITK needs it: with any other it ends the whole program."""
    try:
        str(path).encode()
    except UnicodeEncodeError:
        return False
    return True


def check_size(name: str, shape: Iterable[int]) -> None:
    """Refuse a header that claims no voxels, or more than any scan has.

    Raises:
        InputError: with the number of voxels that is claimed.
    """
    voxels = 1
    for n in shape:
        voxels *= int(n)
    if voxels < 1:
        raise InputError(f"{name} holds no voxels; export the image again.")
    if voxels > MAX_VOXELS:
        raise InputError(f"{name} claims {voxels:,} voxels, too many for a scan; the file seems to be damaged.")
