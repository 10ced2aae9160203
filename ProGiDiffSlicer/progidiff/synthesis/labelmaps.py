"""Label volumes that synthetic slices are cut from: canonical axes, tissues, body outline, and the image if there is one."""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import nibabel as nib
import numpy as np
import SimpleITK as sitk
from scipy import ndimage

from progidiff.errors import DatasetError
from progidiff.synthesis.tissues import INDEX, ORGANS, tissue_of


@dataclass(frozen=True)
class LabelVolume:
    """One label volume in canonical axes: z inferior to superior, rows anterior to posterior, columns patient right to left.

    Attributes:
        name: short name of the source.
        modality: ``"CT"`` or ``"MR"``: what ``image`` is, or what the labels were drawn on.
        tissues: uint8 (D, H, W), indices of :data:`progidiff.synthesis.tissues.TISSUES`.
        outline: float32 (D, H, W), signed distance to the convex hull of the labels in mm, negative inside.
        image: float32 (D, H, W), HU or raw MR values, or ``None`` for a label map without its image.
        spacing: mm along z, rows, columns.
        slices: indices of the slices that hold target organs.
        licence: licence of the source.
    """

    name: str
    modality: str
    tissues: np.ndarray
    outline: np.ndarray
    image: np.ndarray | None
    spacing: tuple[float, float, float]
    slices: np.ndarray
    licence: str


def _hull_distance(labels: np.ndarray, spacing: tuple[float, float, float]) -> np.ndarray:
    """Signed in-plane distance (mm) to each slice's convex hull of labelled voxels; empty slices are far outside."""
    from scipy.spatial import ConvexHull, QhullError
    from scipy.spatial import Delaunay as _Delaunay

    out = np.full(labels.shape, 200.0, np.float32)
    rows, cols = np.mgrid[: labels.shape[1], : labels.shape[2]]
    pixels = np.stack([rows.ravel(), cols.ravel()], 1)
    for k in range(labels.shape[0]):
        points = np.argwhere(labels[k] > 0)
        if len(points) < 50:
            continue
        try:
            hull = points[ConvexHull(points).vertices]
        except QhullError:
            continue
        inside = (_Delaunay(hull).find_simplex(pixels) >= 0).reshape(labels.shape[1:])
        outer = ndimage.distance_transform_edt(~inside, sampling=spacing[1:])
        inner = ndimage.distance_transform_edt(inside, sampling=spacing[1:])
        out[k] = outer - inner
    return out


def _finish(
    name: str,
    modality: str,
    tissues: np.ndarray,
    image: np.ndarray | None,
    spacing: tuple[float, float, float],
    licence: str,
) -> LabelVolume:
    organ_area = ((tissues > 0) & (tissues <= len(ORGANS))).sum((1, 2)) * spacing[1] * spacing[2]
    slices = np.flatnonzero(organ_area > 500.0)  # mm²: below this a slice teaches little but noise
    if len(slices) == 0:
        raise DatasetError(f"The label volume {name!r} holds none of the target organs; leave it out.")
    return LabelVolume(
        name=name,
        modality=modality,
        tissues=np.ascontiguousarray(tissues.astype(np.uint8)),
        outline=_hull_distance(tissues, spacing),
        image=None if image is None else np.ascontiguousarray(image.astype(np.float32)),
        spacing=spacing,
        slices=slices,
        licence=licence,
    )


def split_duodenum(tissues: np.ndarray, spacing: tuple[float, float, float]) -> np.ndarray:
    """Separate the duodenum from a joint "stomach and duodenum" label by thickness.

    The stomach is what survives an opening with a ball of 9 mm and hangs together with the largest such piece; the rest,
    thin and winding, is duodenum.
    """
    joint = tissues == INDEX["stomach"]
    depth = ndimage.distance_transform_edt(joint, sampling=spacing)
    pieces, count = ndimage.label(depth > 9.0)
    if count == 0:
        return tissues
    core = pieces == 1 + int(np.argmax(np.bincount(pieces.ravel())[1:]))
    stomach = joint & (ndimage.distance_transform_edt(~core, sampling=spacing) <= 12.0)
    out = tissues.copy()
    out[joint & ~stomach] = INDEX["duodenum"]
    return out


def load_spl_atlas(folder: Path) -> LabelVolume:
    """The SPL abdominal atlas (``seg.nrrd`` + ``AbdominalAtlasColors.ctbl``; 3D Slicer License)."""
    image = sitk.ReadImage(str(folder / "seg.nrrd"))
    # SimpleITK gives (z, y, x) in the file's axis order; direction cosines say which way each axis runs.
    labels = sitk.GetArrayFromImage(sitk.DICOMOrient(image, "LPS"))  # z up, rows A->P, columns R->L
    names = {
        int(parts[0]): parts[1]
        for line in (folder / "AbdominalAtlasColors.ctbl").read_text().splitlines()
        if len(parts := line.split()) > 1 and parts[0].isdigit()
    }
    lut = np.zeros(int(labels.max()) + 1, np.uint8)
    for value in np.unique(labels):
        if value > 0:
            lut[value] = tissue_of(names.get(int(value), "other"))
    sx, sy, sz = image.GetSpacing()
    spacing = (sz, sy, sx)
    tissues = split_duodenum(lut[labels], spacing)
    return _finish("spl_abdominal_atlas", "CT", tissues, None, spacing, "3D Slicer License")


def _label_names(image: Any) -> Mapping[int, str]:
    """Label names from the NIfTI extension that TotalSegmentator writes."""
    for extension in image.header.extensions:
        text = extension.get_content()
        text = text.decode("utf-8", "ignore") if isinstance(text, bytes) else str(text)
        found = re.findall(r'<Label Key="(\d+)".*?<!\[CDATA\[(.*?)\]\]>', text, re.DOTALL)
        if found:
            return {int(key): name for key, name in found}
    raise DatasetError("The label file has no label names in its NIfTI header; write one with TotalSegmentator --ml.")


def load_totalsegmentator(image_path: Path, label_path: Path, modality: str) -> LabelVolume:
    """A CT or MR with a TotalSegmentator multi-label map (label names from the NIfTI header)."""
    volume = nib.as_closest_canonical(nib.load(image_path))
    loaded = nib.load(label_path)
    names = _label_names(loaded)
    labels = np.rint(np.asarray(nib.as_closest_canonical(loaded).dataobj)).astype(np.int64)
    lut = np.zeros(int(labels.max()) + 1, np.uint8)
    for value in np.unique(labels):
        if value > 0:
            lut[value] = tissue_of(names.get(int(value), "other"))

    def canonical(array: np.ndarray) -> np.ndarray:  # RAS -> z up, rows A->P, columns R->L
        return array[::-1, ::-1, :].transpose(2, 1, 0)

    sx, sy, sz = (float(s) for s in volume.header.get_zooms()[:3])
    pixels = np.asarray(volume.dataobj, np.float32)
    name = f"totalsegmentator_{modality.lower()}"
    return _finish(name, modality, canonical(lut[labels]), canonical(pixels), (sz, sy, sx), "Apache-2.0")


def load_permissive(data: Path) -> list[LabelVolume]:
    """All label volumes under ``data/permissive`` that a shipped model may be trained on.

    Raises:
        DatasetError: when the folder is not there.
    """
    permissive = data / "permissive"
    if not permissive.is_dir():
        raise DatasetError(f"There is no folder '{permissive}'; put the label volumes there, or train on phantoms only.")
    tests = permissive / "totalsegmentator_tests"
    return [
        load_spl_atlas(permissive / "spl_abdominal_atlas"),
        load_totalsegmentator(tests / "example_ct_sm.nii.gz", tests / "example_seg.nii.gz", "CT"),
        load_totalsegmentator(tests / "example_mr_sm.nii.gz", tests / "example_seg_mr.nii.gz", "MR"),
    ]
