"""Label volumes that synthetic slices are cut from: read from their sources, blended into new ones, packed into one file.

In canonical axes: z inferior to superior, rows anterior to posterior, columns patient right to left.
"""

from __future__ import annotations

import json
import re
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
from scipy import ndimage

from progidiff.errors import DatasetError
from progidiff.places import replaced_file
from progidiff.synthesis.tissues import INDEX, ORGANS, VOCABULARY, tissue_of

#: Smallest area of the nine organs for which a slice counts as one of the abdomen, mm²: less teaches little but noise.
_ORGAN_AREA_MM2 = 500.0
#: Distances are kept in whole mm up to this.
_FAR_MM = 120


@dataclass(frozen=True, eq=False)
class LabelVolume:
    """One label volume.

    Attributes:
        name: short name of the source.
        modality: ``"CT"`` or ``"MR"``: what ``image`` is, or what the labels were drawn on.
        tissues: uint8 (D, H, W), indices of :data:`progidiff.synthesis.tissues.TISSUES`.
        wall: int8 (D, H, W), signed in-plane distance to the convex hull of the labels in mm, negative inside: about the
            muscular wall of the body.
        skin: int8 (D, H, W), signed in-plane distance to the skin in mm, or ``None`` where the source has no skin.
        image: float16 (D, H, W), HU, or MR values from 0 to 1, or ``None`` for a label map without its image.
        spacing: mm along z, rows, columns.
        slices: indices of the slices that hold target organs.
        licence: licence of the source.
        known: targets that the source labels; any other is unknown in it, never background.
        weight: how often its slices are drawn, beside the other volumes'.
    """

    name: str
    modality: str
    tissues: np.ndarray
    wall: np.ndarray
    skin: np.ndarray | None
    image: np.ndarray | None
    spacing: tuple[float, float, float]
    slices: np.ndarray
    licence: str
    known: frozenset[str] = frozenset(VOCABULARY)
    weight: float = 1.0


def _signed_distance(inside: np.ndarray, spacing_rc: Sequence[float]) -> np.ndarray:
    """Signed distance (mm, negative inside) of one plane's mask, int8 (H, W)."""
    if not inside.any():
        return np.full(inside.shape, _FAR_MM, np.int8)
    outer = ndimage.distance_transform_edt(~inside, sampling=spacing_rc)
    inner = ndimage.distance_transform_edt(inside, sampling=spacing_rc)
    distance = np.clip(np.rint(outer - inner), -_FAR_MM, _FAR_MM).astype(np.int8)
    # far from the border every fourth mm is enough, and packs into a fraction
    return np.where(np.abs(distance) > 24, distance // 4 * 4, distance).astype(np.int8)


def _hull(mask: np.ndarray) -> np.ndarray:
    """The convex hull of a plane's mask, bool (H, W); empty where there is next to nothing."""
    from scipy.spatial import ConvexHull, Delaunay, QhullError

    points = np.argwhere(mask)
    if len(points) < 50:
        return np.zeros_like(mask)
    try:
        corners = points[ConvexHull(points).vertices]
        rows, cols = np.mgrid[: mask.shape[0], : mask.shape[1]]
        return np.asarray(Delaunay(corners).find_simplex(np.stack([rows.ravel(), cols.ravel()], 1)) >= 0).reshape(mask.shape)
    except QhullError:
        return np.zeros_like(mask)


def _organ_slices(tissues: np.ndarray, spacing: Sequence[float]) -> np.ndarray:
    area = ((tissues > 0) & (tissues <= len(ORGANS))).sum((1, 2)) * spacing[1] * spacing[2]
    return np.flatnonzero(area > _ORGAN_AREA_MM2)


def make_volume(
    name: str,
    modality: str,
    tissues: np.ndarray,
    spacing: tuple[float, float, float],
    licence: str,
    *,
    body: np.ndarray | None = None,
    image: np.ndarray | None = None,
    known: Iterable[str] = VOCABULARY,
    weight: float = 1.0,
) -> LabelVolume:
    """A label volume of its tissues.

    Args:
        name, modality, spacing, licence, known, weight: see :class:`LabelVolume`.
        tissues: tissue indices (D, H, W).
        body: bool (D, H, W), everything within the skin, where the source knows it.
        image: (D, H, W), HU, or MR values from 0 to 1.

    Raises:
        DatasetError: there is none of the target organs.
    """
    slices = _organ_slices(tissues, spacing)
    if len(slices) == 0:
        raise DatasetError(f"The label volume {name!r} holds none of the target organs; leave it out.")
    hulls = (_hull(plane > 0) for plane in tissues)
    return LabelVolume(
        name=name,
        modality=modality,
        tissues=np.ascontiguousarray(tissues.astype(np.uint8)),
        wall=np.stack([_signed_distance(hull, spacing[1:]) for hull in hulls]),
        skin=None if body is None else np.stack([_signed_distance(plane, spacing[1:]) for plane in body]),
        image=None if image is None else np.ascontiguousarray(image.astype(np.float16)),
        spacing=spacing,
        slices=slices,
        licence=licence,
        known=frozenset(known),
        weight=weight,
    )


# Sources -----------------------------------------------------------------------------------------------------------------


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


def _lookup(labels: np.ndarray, names: Mapping[int, str]) -> np.ndarray:
    """Tissue indices of label values by their names; a value without a name is "other"."""
    lut = np.zeros(int(labels.max()) + 1, np.uint8)
    for value in np.unique(labels):
        if value > 0:
            lut[value] = tissue_of(names.get(int(value), "other"))
    return lut[labels]


def load_spl_atlas(folder: Path) -> LabelVolume:
    """The SPL abdominal atlas (``seg.nrrd`` + ``AbdominalAtlasColors.ctbl``; 3D Slicer License)."""
    import SimpleITK as sitk

    image = sitk.ReadImage(str(folder / "seg.nrrd"))
    # SimpleITK gives (z, y, x) in the file's axis order; direction cosines say which way each axis runs.
    labels = sitk.GetArrayFromImage(sitk.DICOMOrient(image, "LPS"))  # z up, rows A->P, columns R->L
    names = {
        int(parts[0]): parts[1]
        for line in (folder / "AbdominalAtlasColors.ctbl").read_text().splitlines()
        if len(parts := line.split()) > 1 and parts[0].isdigit()
    }
    sx, sy, sz = image.GetSpacing()
    spacing = (sz, sy, sx)
    tissues = split_duodenum(_lookup(labels, names), spacing)
    # "colon and ileum" is one label, the duodenum a guess, and what lies above the liver is not labelled at all
    known = {*ORGANS, "kidneys", "right adrenal gland", "left adrenal gland", "spine", "iliopsoas muscles"}
    return make_volume("spl_abdominal_atlas", "CT", tissues, spacing, "3D Slicer License", known=known)


def _label_names(image: Any) -> Mapping[int, str]:
    """Label names from the NIfTI extension that TotalSegmentator writes."""
    for extension in image.header.extensions:
        text = extension.get_content()
        text = text.decode("utf-8", "ignore") if isinstance(text, bytes) else str(text)
        found = re.findall(r'<Label Key="(\d+)".*?<!\[CDATA\[(.*?)\]\]>', text, re.DOTALL)
        if found:
            return {int(key): name for key, name in found}
    raise DatasetError("The label file has no label names in its NIfTI header; write one with TotalSegmentator --ml.")


def _nifti(path: Path) -> tuple[np.ndarray, tuple[float, float, float], Any]:
    """Array in canonical axes, spacing along them, and the image as loaded."""
    import nibabel as nib

    loaded = nib.load(path)  # type: ignore[attr-defined]
    canonical = nib.as_closest_canonical(loaded)  # type: ignore[attr-defined]
    # RAS -> z up, rows A->P, columns R->L
    array = np.asarray(canonical.dataobj)[::-1, ::-1, :].transpose(2, 1, 0)
    sx, sy, sz = (float(s) for s in canonical.header.get_zooms()[:3])
    return array, (sz, sy, sx), loaded


def _finer(labels: np.ndarray) -> np.ndarray:
    """A label map at twice the resolution along each axis, with the smooth borders of linear interpolation."""
    best = np.full([2 * side - 1 for side in labels.shape], 0.4999, np.float32)
    out = np.zeros(best.shape, labels.dtype)
    for value in np.unique(labels[labels > 0]):
        share = ndimage.zoom((labels == value).astype(np.float32), 2 - 1 / np.array(labels.shape), order=1)
        out[share > best] = value
        best = np.maximum(best, share)
    return out


def load_totalsegmentator(image_path: Path, label_path: Path, modality: str) -> LabelVolume:
    """A CT or MR with a TotalSegmentator multi-label map (label names from the NIfTI header), at half its pixel size."""
    labels, spacing, loaded = _nifti(label_path)
    pixels = _nifti(image_path)[0].astype(np.float32)
    fine = _finer(_lookup(np.rint(labels).astype(np.int64), _label_names(loaded)))
    pixels = ndimage.zoom(pixels, 2 - 1 / np.array(pixels.shape), order=1)
    if modality == "MR":
        low, high = np.percentile(pixels, [1, 99.5])
        pixels = np.clip((pixels - low) / (high - low), 0, 1)
    body = _body(pixels > (-300 if modality == "CT" else 0.08))
    name = f"totalsegmentator_{modality.lower()}"
    half = (spacing[0] / 2, spacing[1] / 2, spacing[2] / 2)
    return make_volume(name, modality, fine, half, "Apache-2.0", body=body, image=pixels, weight=1.0)


def _body(bright: np.ndarray) -> np.ndarray:
    """The body of an image: the largest bright thing of each plane, without holes."""
    out = np.zeros_like(bright)
    for plane, found in zip(out, ndimage.binary_opening(bright, np.ones((1, 3, 3))), strict=True):
        pieces, count = ndimage.label(found)
        if count:
            plane[:] = ndimage.binary_fill_holes(pieces == 1 + int(np.argmax(np.bincount(pieces.ravel())[1:])))
    return out


#: Ids of TotalSegmentator v2's task "total" that are needed, beside the ids of a re-publication that joins some of them.
_JOINED = {200: "body", 201: "lung_left", 202: "lung_right", 203: "vertebrae", 204: "intervertebral_discs"}


def _load_whole(name: str, path: Path, names: Mapping[int, str], licence: str, **fields: Any) -> LabelVolume:
    """A whole patient's label map with a label for everything within the skin."""
    labels, spacing, _ = _nifti(path)
    labels = np.rint(labels).astype(np.int64)
    body = None if not (labels == 200).any() else ndimage.binary_fill_holes(labels > 0, np.ones((1, 3, 3)))
    labels[labels == 200] = 0
    return make_volume(name, "CT", _lookup(labels, names), spacing, licence, body=body, **fields)


def load_two_patients(folder: Path) -> list[LabelVolume]:
    """Two whole patients of the TotalSegmentator CT data set (CC BY 4.0; label maps of 1.5 mm)."""
    names = {int(key): name for key, name in json.loads((folder / "LABELS.json").read_text())["ids"].items()} | _JOINED
    return [
        _load_whole(
            f"totalsegmentator_{patient}",
            folder / f"{patient}_combined_totalseg_v2_ids.nii.gz",
            names,
            "CC BY 4.0",
            weight=1.3,
        )
        for patient in ("s0327", "s0328")
    ]


#: What the meshes of the Visible Human hold and show well enough to be learned from; its vessels are rough.
_VISIBLE_HUMAN = frozenset(
    [
        "liver",
        "spleen",
        "right kidney",
        "left kidney",
        "kidneys",
        "pancreas",
        "gallbladder",
        "duodenum",
        "small bowel",
        "colon",
        "urinary bladder",
        "heart",
    ]
)


def load_visible_human(folder: Path, names: Mapping[int, str]) -> list[LabelVolume]:
    """The Visible Human man and woman (CC BY 4.0; label maps of 1.5 mm made of meshes, TotalSegmentator v2 ids)."""
    return [
        _load_whole(
            f"visible_human_{sex.lower()}",
            folder / f"VH_{sex}_labels_1p5mm.nii.gz",
            names,
            "CC BY 4.0",
            known=_VISIBLE_HUMAN,
            weight=0.35,
        )
        for sex in ("Male", "Female")
    ]


def load_permissive(data: Path, development: bool = False) -> list[LabelVolume]:
    """All label volumes under ``data/permissive`` that a shipped model may be trained on.

    Args:
        data: folder that holds ``permissive``.
        development: also the CT that accuracy in three dimensions is measured on; its figures are then those of a patient
            that was seen.

    Raises:
        DatasetError: a source is not there.
    """
    permissive = data / "permissive"
    if not permissive.is_dir():
        raise DatasetError(f"There is no folder '{permissive}'; put the label volumes there, or train on phantoms only.")
    tests = permissive / "totalsegmentator_tests"
    patients = permissive / "totalsegmentator_ct_s0327_s0328"
    try:
        ids = {int(k): name for k, name in json.loads((patients / "LABELS.json").read_text())["ids"].items()} | _JOINED
        volumes = [
            load_spl_atlas(permissive / "spl_abdominal_atlas"),
            *load_two_patients(patients),
            load_totalsegmentator(tests / "example_mr_sm.nii.gz", tests / "example_seg_mr.nii.gz", "MR"),
            *load_visible_human(permissive / "hubmap_visible_human", ids),
        ]
        if development:
            volumes.append(load_totalsegmentator(tests / "example_ct_sm.nii.gz", tests / "example_seg.nii.gz", "CT"))
    except OSError as error:
        raise DatasetError(f"The label volumes in '{permissive}' are not complete ({error}); copy them again.") from error
    return volumes


# New anatomies out of two ------------------------------------------------------------------------------------------------

#: Organs of which a shape between two patients' is an organ again; winding ones are not, nor those that a volume cuts off.
_BLENDED = tuple(INDEX[name] for name in (*ORGANS[:7], "right adrenal gland", "left adrenal gland"))


def _centre_mm(mask: np.ndarray, spacing: Sequence[float]) -> np.ndarray:
    return np.array(ndimage.center_of_mass(mask)) * spacing


def blend(shape_of: LabelVolume, place_of: LabelVolume, share: float) -> LabelVolume:
    """A patient between two: the body of one, with organs whose shapes and places lie between both patients'.

    The first patient is brought to the second by a shift and scale along each axis that fit the organs' centres; each organ
    is then the zero level of the blended signed distances, moved to the blended centre.

    Args:
        shape_of: whose organs are mixed in.
        place_of: whose body, bones, muscles and bowels stay.
        share: share of ``shape_of``, 0 to 1.
    """
    a, b = shape_of.tissues, place_of.tissues
    pairs = [t for t in _BLENDED if (a == t).sum() > 60 and (b == t).sum() > 60]
    from_mm = np.array([_centre_mm(a == t, shape_of.spacing) for t in pairs])
    to_mm = np.array([_centre_mm(b == t, place_of.spacing) for t in pairs])
    scale, shift = np.empty(3), np.empty(3)
    for axis in range(3):
        slope = np.polyfit(from_mm[:, axis], to_mm[:, axis], 1)[0] if len(pairs) > 3 else 1.0
        scale[axis] = np.clip(slope, 0.8, 1.25)
        shift[axis] = (to_mm[:, axis] - scale[axis] * from_mm[:, axis]).mean()
    best = np.zeros(b.shape, np.float32)  # negative inside
    chosen = np.zeros(b.shape, np.uint8)
    free = ~np.isin(b, [INDEX[n] for n in ("vertebra", "bone", "disc", "muscle", "iliopsoas", "spinal cord", "lung")])
    for tissue, start, end in zip(pairs, from_mm, to_mm, strict=True):
        # both patients' organ in the second one's frame, each with its centre moved to the blended one
        goal = share * (scale * start + shift) + (1 - share) * end
        box, fields = None, []
        for labels, spacing, grow, centre in (
            (a, np.array(shape_of.spacing), scale, start),
            (b, np.array(place_of.spacing), np.ones(3), end),
        ):
            if box is None:
                reach = max(
                    (np.ptp(np.argwhere(m == tissue), 0) * s).max()
                    for m, s in ((a, scale * shape_of.spacing), (b, place_of.spacing))
                )
                low = np.floor((goal - 0.5 * reach - 25) / place_of.spacing).astype(int).clip(0)
                high = np.minimum(np.ceil((goal + 0.5 * reach + 25) / place_of.spacing).astype(int), b.shape)
                box = tuple(slice(int(lo), int(hi)) for lo, hi in zip(low, high, strict=True))
            step = np.array(place_of.spacing) / grow / spacing
            offset = (centre + (low * place_of.spacing - goal) / grow) / spacing
            mask = ndimage.affine_transform(
                (labels == tissue).astype(np.float32), step, offset, output_shape=tuple(high - low), order=1
            )
            inside = mask > 0.5
            outer = ndimage.distance_transform_edt(~inside, sampling=place_of.spacing)
            fields.append(outer - ndimage.distance_transform_edt(inside, sampling=place_of.spacing))
        level = (share * fields[0] + (1 - share) * fields[1]).astype(np.float32)
        part, where = best[box], level < best[box]
        part[where] = level[where]
        chosen[box][where] = tissue
    tissues = np.where(np.isin(b, pairs), 0, b)
    put = (chosen > 0) & free
    tissues[put] = chosen[put]
    return replace(
        place_of,
        name=f"{shape_of.name} x {place_of.name}",
        tissues=tissues,
        image=None,
        slices=_organ_slices(tissues, place_of.spacing),
        licence=" and ".join(dict.fromkeys((shape_of.licence, place_of.licence))),
        weight=0.5,
    )


#: Pairs of sources that are blended, by the beginning of their names, and the share of the first.
_PAIRS = (
    ("spl", "totalsegmentator_s0327", 0.6),
    ("spl", "totalsegmentator_s0328", 0.5),
    ("totalsegmentator_s0328", "totalsegmentator_s0327", 0.5),
    ("totalsegmentator_s0327", "totalsegmentator_s0328", 0.5),
    ("visible_human_male", "totalsegmentator_s0328", 0.5),
    ("visible_human_female", "totalsegmentator_s0327", 0.5),
)


def with_blends(volumes: Sequence[LabelVolume]) -> list[LabelVolume]:
    """The volumes, and the blends of those that are there."""
    found = {key: volume for volume in volumes for pair in _PAIRS for key in pair[:2] if volume.name.startswith(key)}
    return [*volumes, *(blend(found[a], found[b], share) for a, b, share in _PAIRS if a in found and b in found)]


# One file ----------------------------------------------------------------------------------------------------------------

_ARRAYS = ("tissues", "wall", "skin", "image", "slices")


def pack(volumes: Sequence[LabelVolume], path: Path) -> None:
    """Write label volumes into one compressed file, which :func:`unpack` reads with numpy alone."""
    content: dict[str, Any] = {}
    facts = []
    for volume in volumes:
        names = {}
        for key in _ARRAYS:
            array = getattr(volume, key)
            if array is not None:  # a blend shares arrays with the patient whose body it has
                names[key] = next((name for name, known in content.items() if known is array), f"{len(content)}")
                content[names[key]] = array
        facts.append(
            {key: getattr(volume, key) for key in ("name", "modality", "spacing", "licence", "weight")}
            | {"known": sorted(volume.known), "arrays": names}
        )
    with replaced_file(path) as staged, staged.open("wb") as file:
        np.savez_compressed(file, facts=np.frombuffer(json.dumps(facts).encode(), np.uint8), **content)


def unpack(path: Path) -> list[LabelVolume]:
    """The label volumes of a packed file.

    Raises:
        DatasetError: it is not there, or not such a file.
    """
    try:
        with np.load(path, allow_pickle=False) as content:
            facts = json.loads(content["facts"].tobytes())
            arrays = {name: content[name] for name in content.files}
        volumes = []
        for fact in facts:
            names = fact.pop("arrays")
            fields: dict[str, Any] = {key: arrays.get(names.get(key, "")) for key in _ARRAYS}
            fields |= {**fact, "spacing": tuple(fact["spacing"]), "known": frozenset(fact["known"])}
            volumes.append(LabelVolume(**fields))
        return volumes
    except (OSError, ValueError, KeyError) as error:
        raise DatasetError(f"The packed label volumes '{path}' cannot be read ({error}); pack them again.") from error
