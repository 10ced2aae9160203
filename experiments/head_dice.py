"""Dice of an image encoder's segmentation head on labelled images that training never sees: the curve of the long training.

Usage: python -m experiments.head_dice DATA MODEL [EVERY]

DATA holds permissive/ and research/; MODEL is a model folder, or the work folder of a training, of whose encoder the
averaged weights of the checkpoint are taken. EVERY n-th slice is measured. Prints JSON: for each set the Dice by target,
the share of slices on which an absent one is rightly left out, and the numbers of slices; then the 3-D Dice of a whole CT.
"""

from __future__ import annotations

import json
import sys
from collections.abc import Iterable
from pathlib import Path

import nibabel as nib
import numpy as np
import torch
from safetensors import safe_open

from experiments.shared_slices import load_shared
from progidiff.cards import ModelCard
from progidiff.datasets.slices import LabelledSlice
from progidiff.evaluation.accuracy import PlainSegmenter, TwinNetwork
from progidiff.evaluation.metrics import dice
from progidiff.model.folder import load_model
from progidiff.model.networks import ImageEncoder
from progidiff.sampling.image import OUTSIDE, LoadedImage, load_image
from progidiff.synthesis.tissues import INDEX, TARGETS, tissue_of
from progidiff.training.default import empty_card
from progidiff.training.small import make_encoder

SETS = ("curvas", "amos", "totalsegmentator_mr", "kidney_mr", "pancreas_mr")
MIN_AREA_MM2 = 100.0


def open_encoder(folder: Path) -> tuple[ImageEncoder, ModelCard, int]:
    """An encoder, the card of its model, and the training steps it has done (0 for a finished model)."""
    checkpoint = folder / "encoder" / "checkpoint.safetensors"
    if not checkpoint.exists():
        model = load_model(folder, torch.device("cpu"), torch.float32, None)
        return model.image_encoder.eval(), model.card, 0
    card = empty_card()
    encoder = make_encoder(len(card.vocabulary), coordinates=True)
    for module in (encoder.text_scale_shift, encoder.hint_norm, encoder.hint_in, encoder.hint_out):
        module.requires_grad_(False)
    with safe_open(checkpoint, framework="pt") as file, torch.no_grad():
        for number, parameter in enumerate(p for p in encoder.parameters() if p.requires_grad):
            parameter.copy_(file.get_tensor(f"ema.{number}"))
        step = int(file.metadata()["step"])
    return encoder.eval(), card, step


def slices(segment: PlainSegmenter, items: Iterable[LabelledSlice], vocabulary: list[str]) -> dict[str, object]:
    """Mean Dice of present targets, and share of absent ones that are left out, each with its number of slices."""
    present: dict[str, list[float]] = {}
    absent: dict[str, list[float]] = {}
    for item in items:
        area = item.spacing_rc[0] * item.spacing_rc[1]
        for target in (t for t in vocabulary if t in item.labelled):
            truth = item.labels[target]
            if truth.sum() * area >= MIN_AREA_MM2:
                present.setdefault(target, []).append(dice(segment(item, target), truth))
            elif not truth.any():
                absent.setdefault(target, []).append(float(not segment(item, target).any()))
    mean = {t: (round(float(np.mean(v)), 3), len(v)) for t, v in present.items()}
    empty = {t: (round(float(np.mean(v)), 2), len(v)) for t, v in absent.items()}
    return {"mean": round(float(np.mean([m for m, _ in mean.values()])), 3), "dice": mean, "absent": empty}


def codes_in(path: Path) -> np.ndarray:
    """Values of a label map, int (K, J, I)."""
    return np.asarray(nib.Nifti1Image.from_filename(path).dataobj).astype(int).transpose(2, 1, 0)


def labelled_ct(data: Path) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """The CT of 112 slices: HU (K, J, I), its affine, and the index of each voxel's tissue."""
    folder = data / "permissive" / "totalsegmentator_example_ct_full"
    names = json.loads((data / "permissive/totalsegmentator_ct_s0327_s0328/LABELS.json").read_text())["ids"]
    volume = nib.Nifti1Image.from_filename(folder / "example_ct.nii.gz")
    array = np.ascontiguousarray(np.asarray(volume.dataobj, np.float32).transpose(2, 1, 0))
    labels = codes_in(folder / "example_seg_fast_force_split.nii.gz")
    lut = np.zeros(labels.max() + 1, np.uint8)
    for value in np.unique(labels[labels > 0]):
        lut[value] = tissue_of(names.get(str(value), "other"))
    tissues = lut[labels]
    version1 = codes_in(folder / "example_seg_v1_104classes_5de6e4dc.nii.gz")
    tissues[np.isin(tissues, [INDEX["pancreas"], INDEX["esophagus"]])] = 0
    tissues[version1 == 10], tissues[version1 == 42] = INDEX["pancreas"], INDEX["esophagus"]
    return array, volume.affine, tissues


def head_logits(encoder: ImageEncoder, image: LoadedImage, index: int) -> torch.Tensor:
    """What the segmentation head says of a slice, at the slice's own pixels: float (targets, rows, columns)."""
    with torch.inference_mode():
        return image.grid.from_model(encoder.segment(encoder(image.pixels(index)))[0], outside=OUTSIDE)


def whole_ct(data: Path, encoder: ImageEncoder, card: ModelCard, every: int) -> dict[str, object]:
    """3-D Dice on the CT of 112 slices, slices without the organ counted."""
    array, affine, tissues = labelled_ct(data)
    image = load_image(array, affine, "CT", "axial", card)
    sums = {t: np.zeros(2) for t in card.vocabulary}
    for k in range(0, len(array), every):
        found = (head_logits(encoder, image, k) > 0).numpy()[:, ::-1, ::-1]
        for target, mask in zip(card.vocabulary, found, strict=True):
            truth = np.isin(tissues[k], [INDEX[n] for n in TARGETS[target]])
            sums[target] += (2 * (mask & truth).sum(), mask.sum() + truth.sum())
    three = {t: round(float(a / max(b, 1)), 3) for t, (a, b) in sums.items() if b}
    nine = [three[t] for t in card.vocabulary[:9] if t in three]
    return {"mean of the first nine": round(float(np.mean(nine)), 3), "dice": three}


def main() -> None:
    data, folder = Path(sys.argv[1]), Path(sys.argv[2])
    every = int(sys.argv[3]) if len(sys.argv) > 3 else 1
    torch.set_num_threads(1)
    encoder, card, step = open_encoder(folder)
    segment = PlainSegmenter(TwinNetwork(encoder).eval(), card)
    result: dict[str, object] = {"step": step}
    for name in SETS:
        result[name] = slices(segment, load_shared(data, name)[::every], card.vocabulary)
    result["totalsegmentator_ct_full"] = whole_ct(data, encoder, card, 2 * every)
    print(json.dumps(result))


if __name__ == "__main__":
    main()
