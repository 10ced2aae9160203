"""3-D Dice of proposals on volumes whose labels lie beside them.

Usage: python -m experiments.example_ct_dice DATA [PROPOSALS]
       python -m experiments.example_ct_dice DATA pieces WORK VOLUME...

DATA holds permissive/ and research/. The first runs ``progidiff propose`` on TotalSegmentator's example CT: it checks the
command from file to file. The second says what tidying the proposals of a stack gives on VOLUME (ct: 112 slices, mr: 20
slices, amos: 10 slices; ct:64:112 for a part). Of the first-ranked proposal, the mean and the consensus, as sampled and then
tidied, and last of the encoder's segmentation head; 8 proposals of 2 steps, seed 0. WORK keeps the sampled masks, a few
slices in a file, so that a run can be ended and gone on with. The labels of TotalSegmentator are another program's output,
and its volumes are among those that the bundled model was trained on.
"""

from __future__ import annotations

import subprocess
import sys
import tempfile
from collections.abc import Callable, Iterator
from pathlib import Path

import numpy as np
import SimpleITK as sitk
import torch

from experiments.head_dice import head_logits, labelled_ct
from experiments.shared_slices import load_shared
from progidiff.proposals.pieces import tidy
from progidiff.proposals.proposals import CONSENSUS, MEAN, Proposals
from progidiff.proposals.ranking import rank
from progidiff.sampling.engine import Engine
from progidiff.sampling.image import LoadedImage, load_image
from progidiff.synthesis.labelmaps import load_totalsegmentator
from progidiff.synthesis.tissues import INDEX, ORGANS, TARGETS
from progidiff.targets import target_for
from progidiff.volumes.reading import read_volume
from progidiff.volumes.slicing import SlicePlan, parse_slice_range
from progidiff.wire.messages import Event, ProposeRequest, SliceEvent

PROPOSALS, STEPS = 8, 2
#: Slices in one file of WORK.
CHUNK = 8
VOLUMES = ("ct", "mr", "amos")
Truth = Callable[[str], np.ndarray]


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


def command(data: Path, proposals: str) -> None:
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


def volume(data: Path, name: str) -> tuple[np.ndarray, np.ndarray, str, Truth]:
    """Voxels (K, J, I), affine, modality, and the label of a target in canonical slices."""
    if name == "ct":
        array, affine, tissues = labelled_ct(data)
        # its rows run from posterior to anterior and its columns from left to right
        return array, affine, "CT", lambda t: np.isin(tissues[:, ::-1, ::-1], [INDEX[n] for n in TARGETS[t]])
    items = load_shared(data, {"mr": "totalsegmentator_mr", "amos": "amos"}[name])

    def truth(target: str) -> np.ndarray:
        return np.stack([item.labels[target] for item in items])

    if name == "mr":
        found = read_volume(data / "permissive/totalsegmentator_tests/example_mr_sm.nii.gz")
        return found.array, found.geometry.affine, "MR", truth
    # the slices are in the canonical view already; they lie 5 mm apart
    rows_mm, columns_mm = items[0].spacing_rc
    return np.stack([item.image for item in items]), np.diag([-columns_mm, -rows_mm, 5.0, 1.0]), "CT", truth


def sampled(engine: Engine, plan: SlicePlan, slices: range, work: Path, name: str) -> Iterator[SliceEvent]:
    """All proposals as they were sampled, or as a file of WORK keeps them."""
    for first in range(slices.start, slices.stop, CHUNK):
        path, stop = work / f"{name}_{first}.npz", min(first + CHUNK, slices.stop)
        if not path.exists():
            masks: dict[tuple[str, int], list[np.ndarray]] = {}
            means: dict[tuple[str, int], np.ndarray] = {}

            def told(
                event: Event,
                masks: dict[tuple[str, int], list[np.ndarray]] = masks,
                means: dict[tuple[str, int], np.ndarray] = means,
            ) -> None:
                if isinstance(event, SliceEvent):
                    masks.setdefault((event.target, event.slice_index), []).append(event.masks)
                    if event.mean_probability is not None:
                        means[event.target, event.slice_index] = event.mean_probability > 0.5

            targets = tuple(engine.card.vocabulary)
            request = ProposeRequest(targets, proposals=PROPOSALS, steps=STEPS, slices=(first, stop), keep_pieces=True)
            engine.propose(request, told, lambda: False)
            packed = {
                f"{index}|{t}": np.packbits([*np.concatenate(m), means[t, index]], -1) for (t, index), m in masks.items()
            }
            np.savez_compressed(path, **packed)  # type: ignore[arg-type]
        with np.load(path) as kept:
            for key in kept.files:
                index, _, target = key.partition("|")
                *each, mean = np.unpackbits(kept[key], axis=-1, count=plan.shape_rc[1]).astype(bool)
                yield SliceEvent(target, int(index), 0, np.stack(each), mean.astype(np.float32))


def head(engine: Engine, image: LoadedImage, slices: range) -> np.ndarray:
    """Probabilities of the encoder's segmentation head in 255ths, uint8 (targets, slices, rows, columns)."""
    logits = (head_logits(engine.model.image_encoder, image, index) for index in slices)
    return np.stack([(255 * torch.sigmoid(each)).round().byte().numpy() for each in logits], axis=1)


def scores(proposals: Proposals, label: np.ndarray, slices: range) -> list[float]:
    """Dice of the first-ranked proposal, the mean of all, and the consensus."""
    first = rank(proposals.gram).order[0]
    stacks = (np.stack([proposals.slice_mask(key, k) for k in slices]) for key in (first, MEAN, CONSENSUS))
    return [dice(stack, label) for stack in stacks]


def pieces(data: Path, work: Path, name: str, part: str) -> None:
    """Dice as sampled and tidied, of the head and of proposals, by target."""
    torch.set_num_threads(1)
    array, affine, modality, truth = volume(data, name)
    engine = Engine.load(None, "cpu")
    engine.set_image(array, affine, modality, "axial")
    image = load_image(array, affine, modality, "axial", engine.card)
    plan, slices = image.plan, parse_slice_range(part or "all", image.plan.count)
    heads = head(engine, image, slices)
    gathered = {target: Proposals(target, plan, slices) for target in engine.card.vocabulary}
    for event in sampled(engine, plan, slices, work, name):
        gathered[event.target].add(event)
    table = []
    for shares, (target, proposals) in zip(heads, gathered.items(), strict=True):
        label = truth(target)[slices.start : slices.stop]
        if not label.any():
            continue
        row = scores(proposals, label, slices)
        for _ in proposals.tidy():
            pass
        row += scores(proposals, label, slices)
        spacing = (plan.slice_spacing, *plan.spacing_rc)
        tidied, _ = tidy(shares > 127, shares, 255, target_for(target), spacing, np.ones((3, 2), bool))
        row += [dice(shares > 127, label), dice(tidied, label)]
        table.append(row)
        print(f"| {name} | {target} | " + " | ".join(f"{value:.3f}" for value in row) + " |", flush=True)
    print(f"| {name} | mean | " + " | ".join(f"{value:.3f}" for value in np.mean(table, axis=0)) + " |", flush=True)


def main(arguments: list[str]) -> None:
    """The command, or what tidying gives."""
    wanted = [each.partition(":")[::2] for each in arguments[3:]]
    if arguments[1:2] == ["pieces"] and wanted and {name for name, _ in wanted} <= {*VOLUMES}:
        for name, part in wanted:
            pieces(Path(arguments[0]), Path(arguments[2]), name, part)
    elif len(arguments) in (1, 2):
        command(Path(arguments[0]), arguments[1] if len(arguments) == 2 else "16")
    else:
        sys.exit(__doc__)


if __name__ == "__main__":
    main(sys.argv[1:])
