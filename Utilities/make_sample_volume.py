"""Make the sample CT and its labels under Resources/SampleData from the SPL abdominal atlas (3D Slicer License).

Usage: python Utilities/make_sample_volume.py DATA, where DATA holds permissive/spl_abdominal_atlas.
"""

from __future__ import annotations

import sys
from pathlib import Path

from progidiff.outputs.segmentation import write_volume
from progidiff.synthesis.labelmaps import load_spl_atlas
from progidiff.synthesis.sample_volume import paint_volume
from progidiff.volumes.geometry import Geometry

OUT = Path(__file__).resolve().parents[1] / "Resources" / "SampleData"


def main(data: Path) -> None:
    """Paint and write both volumes."""
    painted = paint_volume(load_spl_atlas(data / "permissive" / "spl_abdominal_atlas"))
    k, j, i = painted.hu.shape
    geometry = Geometry((i, j, k), painted.affine)
    OUT.mkdir(parents=True, exist_ok=True)
    write_volume(OUT / "synthetic_abdomen_ct.nii.gz", painted.hu, geometry)
    write_volume(OUT / "labels" / "synthetic_abdomen_labels.nii.gz", painted.organs, geometry)


if __name__ == "__main__":
    if len(sys.argv) != 2:
        sys.exit(__doc__)
    main(Path(sys.argv[1]))
