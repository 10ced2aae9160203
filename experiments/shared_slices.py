"""Readers of public abdominal slice sets, brought to one orientation, for measuring accuracy.

Each reader knows its set's encoding and undoes its orientation (several of the sets are stored mirrored
or upside down). The sets themselves are not part of this project; their licences are stated where they
are kept.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from pathlib import Path

import nibabel as nib
import numpy as np
from PIL import Image

from progidiff.datasets.slices import LabelledSlice, Modality, NamedSets, with_unions
from progidiff.errors import DatasetError

SHARED_SETS: tuple[str, ...]
"""Names that :func:`load_shared` knows."""

_CURVAS = {"pancreas": 1, "kidneys": 2, "liver": 3}
_AMOS = {
    "spleen": 1,
    "right kidney": 2,
    "left kidney": 3,
    "gallbladder": 4,
    "esophagus": 5,
    "liver": 6,
    "stomach": 7,
    "aorta": 8,
    "inferior vena cava": 9,
    "pancreas": 10,
    "right adrenal gland": 11,
    "left adrenal gland": 12,
    "duodenum": 13,
}
# Ids of TotalSegmentator v2, tasks `total` and `total_mr`; only organs of the abdomen are taken.
_TOTAL_COMMON = {
    "spleen": 1,
    "right kidney": 2,
    "left kidney": 3,
    "gallbladder": 4,
    "liver": 5,
    "stomach": 6,
    "pancreas": 7,
    "right adrenal gland": 8,
    "left adrenal gland": 9,
}
_TOTAL_CT = _TOTAL_COMMON | {
    "duodenum": 19,
    "aorta": 52,
    "inferior vena cava": 63,
    "portal vein and splenic vein": 64,
}
_TOTAL_MR = _TOTAL_COMMON | {
    "duodenum": 14,
    "aorta": 23,
    "inferior vena cava": 24,
    "portal vein and splenic vein": 25,
}

# The picture sets do not tell their pixel size. These are typical values: about 400 mm field of view on 512
# pixels for CT, 384 mm (256 pixels of 1.5 mm, enlarged to 512) for MR.
_CT_TYPICAL_MM = 0.78
_MR_TYPICAL_MM = 0.75


def load_shared(folder: Path, name: str) -> list[LabelledSlice]:
    """All labelled slices of one public evaluation set, in canonical orientation.

    Args:
        folder: the folder that holds ``permissive/`` and ``research/``.
        name: one of :data:`SHARED_SETS`.

    Returns:
        Slices in file order; ``labelled`` is the same for every slice of a set, and pairs such as
        "kidneys" are labelled wherever both sides are.

    Raises:
        DatasetError: the name is unknown, or the set is not in the folder or is damaged.
    """
    try:
        reader = _READERS[name]
    except KeyError:
        raise DatasetError(f"There is no evaluation set '{name}'; choose one of {', '.join(SHARED_SETS)}.") from None
    try:
        slices = reader(Path(folder))
    except (OSError, KeyError, ValueError) as error:
        raise DatasetError(
            f"The evaluation set '{name}' cannot be read in '{folder}' ({error}); copy it there again."
        ) from error
    if not slices:
        raise DatasetError(f"The evaluation set '{name}' is not in '{folder}'; copy it there first.")
    return slices


def _masks(values: np.ndarray, ids: Mapping[str, int]) -> dict[str, np.ndarray]:
    return with_unions({target: values == value for target, value in ids.items()})


def _nifti(path: Path, *, canonical: bool = False) -> nib.Nifti1Image:
    """A NIfTI image, in the stored axis order or with its axes permuted and flipped to RAS."""
    image = nib.Nifti1Image.from_filename(path)
    return nib.as_closest_canonical(image) if canonical else image


def _curvas(folder: Path) -> list[LabelledSlice]:
    with np.load(folder / "research/curvas_ct_multirater/curvas_slices.npz", allow_pickle=False) as data:
        arrays = {key: data[key] for key in data.files}
    slices = []
    for i, slice_id in enumerate(arrays["slice_id"]):
        labels = _masks(arrays["mask_rater1"][i], _CURVAS)
        # Where rater 1 is the annotator, `mask_annotation` repeats rater 1 and is no second opinion.
        second = None if arrays["annotation_id"][i] == 1 else _masks(arrays["mask_annotation"][i], _CURVAS)
        column_mm, row_mm = (float(v) for v in arrays["spacing"][i][:2])
        slices.append(
            LabelledSlice(
                image=arrays["image"][i].astype(np.float32) / 255.0,
                spacing_rc=(row_mm, column_mm),
                labels=labels,
                labelled=frozenset(labels),
                patient=str(arrays["case_id"][i]),
                modality="CT",
                window="display",
                second_labels=second,
                slice_id=str(slice_id),
            )
        )
    return slices


def _amos(folder: Path) -> list[LabelledSlice]:
    base = folder / "research/amos_ct_slices"
    image = _nifti(base / "amos_0001_slices61-70_img.nii.gz")
    values = np.asarray(image.dataobj, dtype=np.float32)
    ids = np.rint(np.asarray(_nifti(base / "amos_0001_slices61-70_lab.nii.gz").dataobj)).astype(np.int16)
    spacing_i, spacing_j, _ = (float(v) for v in image.header.get_zooms())
    slices = []
    for k in range(values.shape[2]):
        # The affine holds the spacing only; j runs from posterior to anterior, i from patient right to left.
        labels = _masks(np.ascontiguousarray(ids[:, ::-1, k].T), _AMOS)
        slices.append(
            LabelledSlice(
                image=np.ascontiguousarray(values[:, ::-1, k].T),
                spacing_rc=(spacing_j, spacing_i),
                labels=labels,
                labelled=frozenset(labels),
                patient="amos_0001",
                modality="CT",
                slice_id=f"amos_0001_{61 + k}",
            )
        )
    return slices


def _totalsegmentator(image_name: str, label_name: str, ids: Mapping[str, int], modality: Modality) -> _Reader:
    def read(folder: Path) -> list[LabelledSlice]:
        base = folder / "permissive/totalsegmentator_tests"
        image = _nifti(base / image_name, canonical=True)
        values = np.asarray(image.dataobj, dtype=np.float32)
        label = _nifti(base / label_name, canonical=True)
        codes = np.rint(np.asarray(label.dataobj)).astype(np.int16)
        spacing_i, spacing_j, _ = (float(v) for v in image.header.get_zooms())
        patient = image_name.removesuffix(".nii.gz")
        slices = []
        for k in range(values.shape[2]):
            # Closest canonical is RAS: both axes are reversed to run anterior-posterior and right-left.
            labels = _masks(np.ascontiguousarray(codes[::-1, ::-1, k].T), ids)
            slices.append(
                LabelledSlice(
                    image=np.ascontiguousarray(values[::-1, ::-1, k].T),
                    spacing_rc=(spacing_j, spacing_i),
                    labels=labels,
                    labelled=frozenset(labels),
                    patient=patient,
                    modality=modality,
                    slice_id=f"{patient}_{k}",
                )
            )
        return slices

    return read


def _pictures(
    where: str,
    target: str,
    modality: Modality,
    spacing_mm: float,
    foreground: Callable[[np.ndarray], np.ndarray],
    *,
    patient: Callable[[str], str] = lambda stem: stem.split("_")[0],
    flip_rows: bool = False,
    flip_columns: bool = False,
    plane: str = "axial",
) -> _Reader:
    """Reader of a folder with ``images/`` and ``masks/`` of equal file names; ``foreground`` gets uint8
    (R, C, 3).
    """

    def read(folder: Path) -> list[LabelledSlice]:
        base = folder / where
        step = (-1 if flip_rows else 1, -1 if flip_columns else 1)
        slices = []
        for path in sorted((base / "images").iterdir()):
            with Image.open(path) as picture:
                image = np.asarray(picture.convert("L"), dtype=np.float32) / 255.0
            with Image.open(base / "masks" / path.name) as picture:
                mask = foreground(np.asarray(picture.convert("RGB")))
            slices.append(
                LabelledSlice(
                    image=np.ascontiguousarray(image[:: step[0], :: step[1]]),
                    spacing_rc=(spacing_mm, spacing_mm),
                    labels={target: np.ascontiguousarray(mask[:: step[0], :: step[1]])},
                    labelled=frozenset({target}),
                    patient=patient(path.stem),
                    modality=modality,
                    window="display",
                    slice_id=path.stem,
                    plane=plane,
                    spacing_exact=False,
                )
            )
        return slices

    return read


def _any_channel(rgb: np.ndarray) -> np.ndarray:
    """Half-way threshold of an anti-aliased or JPEG-compressed mask of whatever colour."""
    return np.asarray(rgb.max(axis=2) >= 128)


def _blue(rgb: np.ndarray) -> np.ndarray:
    """Kidney without its tumour (which is red): the parenchyma that an organ model outlines."""
    return np.asarray((rgb[..., 2] >= 128) & (rgb[..., 0] < 128))


_Reader = Callable[[Path], list[LabelledSlice]]
_READERS: dict[str, _Reader] = {
    "curvas": _curvas,
    "amos": _amos,
    "kits": _pictures("research/kits19_ct_slices", "kidneys", "CT", _CT_TYPICAL_MM, _blue),
    "chaos": _pictures("research/chaos_ct_liver_slices", "liver", "CT", _CT_TYPICAL_MM, _any_channel),
    # Stored mirrored: the liver is on the image's right. Files are named slice first, then case
    # ("10003_spleen_26").
    "msd_spleen": _pictures(
        "research/msd_spleen_ct_slices",
        "spleen",
        "CT",
        _CT_TYPICAL_MM,
        _any_channel,
        patient=lambda stem: stem.partition("_")[2],
        flip_columns=True,
    ),
    # Stored mirrored likewise.
    "pancreas_mr": _pictures("research/pancreas_t2w_mr", "pancreas", "MR", _MR_TYPICAL_MM, _any_channel, flip_columns=True),
    # Coronal, stored upside down: liver and spleen are drawn below the kidneys.
    "kidney_mr": _pictures(
        "permissive/kidney_t2w_mr",
        "kidneys",
        "MR",
        _MR_TYPICAL_MM,
        _any_channel,
        flip_rows=True,
        plane="coronal",
    ),
    "totalsegmentator_ct": _totalsegmentator("example_ct_sm.nii.gz", "example_seg.nii.gz", _TOTAL_CT, "CT"),
    "totalsegmentator_mr": _totalsegmentator("example_mr_sm.nii.gz", "example_seg_mr.nii.gz", _TOTAL_MR, "MR"),
}
SHARED_SETS = tuple(_READERS)
#: As commands take them; the images lie beside a checkout and are never part of it.
SHARED = NamedSets(load_shared, ("curvas", "amos", "totalsegmentator_ct", "totalsegmentator_mr"), Path("../shared/data"))
