"""Dice of ``progidiff propose`` on TotalSegmentator's example CT against the labels beside it, in 3-D.

Usage: python -m experiments.example_ct_dice DATA [PROPOSALS]; DATA holds permissive/totalsegmentator_tests. The labels are
another program's output, and the CT is among the volumes that the bundled model was trained on: this checks the command from
file to file, no more.
"""

from __future__ import annotations

import subprocess
import sys
import tempfile
from pathlib import Path

import numpy as np
import SimpleITK as sitk

from progidiff.synthesis.labelmaps import load_totalsegmentator
from progidiff.synthesis.tissues import ORGANS
from progidiff.targets import target_for
from progidiff.volumes.reading import read_volume


def dice(a: np.ndarray, b: np.ndarray) -> float:
    """Dice of two bool arrays of one shape."""
    return float(2 * (a & b).sum() / max(int(a.sum() + b.sum()), 1))


def canonical(image: sitk.Image) -> np.ndarray:
    """Voxels with z from inferior to superior, rows from anterior to posterior, columns from right to left."""
    return sitk.GetArrayFromImage(sitk.DICOMOrient(image, "LPS"))


def first_segments(path: Path) -> dict[str, np.ndarray]:
    """The first segment of each target of a ``.seg.nrrd``, by the target's name."""
    image = sitk.ReadImage(str(path))
    layers = (
        [image]
        if image.GetNumberOfComponentsPerPixel() == 1
        else [sitk.VectorIndexSelectionCast(image, n) for n in range(image.GetNumberOfComponentsPerPixel())]
    )
    found: dict[str, np.ndarray] = {}
    number = 0
    while image.HasMetaDataKey(f"Segment{number}_Name"):
        name = image.GetMetaData(f"Segment{number}_Name")
        layer = layers[int(image.GetMetaData(f"Segment{number}_Layer"))]
        label = int(image.GetMetaData(f"Segment{number}_LabelValue"))
        found.setdefault(name, canonical(layer) == label)
        number += 1
    return found


def main(data: Path, proposals: str) -> None:
    """Propose, read the files, compare."""
    folder = data / "permissive" / "totalsegmentator_tests"
    truth = load_totalsegmentator(folder / "example_ct_sm.nii.gz", folder / "example_seg.nii.gz", "CT")
    assert truth.image is not None
    volume = read_volume(folder / "example_ct_sm.nii.gz")
    with tempfile.TemporaryDirectory() as scratch:
        out = Path(scratch, "out")
        command = [sys.executable, "-m", "progidiff", "propose", str(folder / "example_ct_sm.nii.gz"), "--out", str(out)]
        subprocess.run([*command, "--prompt", "; ".join(ORGANS), "--proposals", proposals], check=True)
        segments = first_segments(out / "proposals.seg.nrrd")
        for number, organ in enumerate(ORGANS, 1):
            label = truth.tissues == number
            first = next((mask for name, mask in segments.items() if name.lower().startswith(organ)), None)
            ensemble, consensus = (
                canonical(sitk.ReadImage(str(out / f"{what}_{organ.replace(' ', '_')}.nii.gz"))) > 0
                for what in ("ensemble", "consensus")
            )
            shown = "empty" if first is None else f"{dice(first, label):.3f}"
            print(f"{target_for(organ).name():20s} first-ranked {shown}  ensemble {dice(ensemble, label):.3f}", end="")
            print(f"  consensus {dice(consensus, label):.3f}")
    print(f"{volume.array.shape[0]} slices")


if __name__ == "__main__":
    if len(sys.argv) not in (2, 3):
        sys.exit(__doc__)
    main(Path(sys.argv[1]), sys.argv[2] if len(sys.argv) == 3 else "16")
