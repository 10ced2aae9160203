"""Where a segment comes from is in its tags, and survives every file that Slicer writes."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from progidiff.volumes.slicing import PackedMask
from progidiff.wire.messages import ProposeRequest

from ..proposal_examples import unusual_request
from .accept_support import (
    LIVER,
    REQUEST,
    SPLEEN,
    A,
    B,
    add_segments,
    add_volume,
    crop_of,
    everything,
    mask_in,
    save_and_load_scene,
    save_and_load_segmentation,
    tag,
)

slicer = pytest.importorskip("slicer", reason="needs slicer-core (pip install slicer-core)")

PROMPTS = [
    "liver",
    "liver | left kidney: all; 50 % (%7C)",
    "Leber und Niere, größer 1,5 cm",
    "肝臓 печень كبد 🫀",
    "liver\nspleen\r\n\tboth\\n",
    "||::||",
    " spaces at both ends ",
    "",
    "a:=b",
    "%25%0D",
]


def facts(**changes: Any) -> Any:
    from ProGiDiffSlicerLib.scene.provenance import Provenance

    full = {
        "prompt": "liver",
        "target": "liver",
        "proposal": 3,
        "rank": 1,
        "score": 0.1 + 0.2,
        "dropped_pieces": 2,
        "dropped_ml": 0.3,
        "model_id": "progidiff/ct:2026|β",
        "adapter_id": "MR (Größe 4)",
        "plane": "coronal",
        "corrected": True,
        "ensemble": "",
        "dice_to_proposal": 1.0,
        "created": "2026-11-22T10:00:00+00:00",
    }
    asked = replace(unusual_request(), seed=2**63 - 1)
    asked = replace(asked, **{name: changes.pop(name) for name in REQUEST & changes.keys()})
    return Provenance(**{**full, **changes}, request=asked)


def segment_of(node: Any, identifier: str) -> Any:
    return node.GetSegmentation().GetSegment(identifier)


@pytest.mark.parametrize("prompt", PROMPTS)
def test_tags_survive_seg_nrrd(scene: Any, acceptance: Any, prompt: str, tmp_path: Path) -> None:
    from ProGiDiffSlicerLib.scene.provenance import read_provenance

    volume = add_volume(scene)
    done = acceptance.accept(crop_of(A), volume, LIVER, facts(prompt=prompt))
    folder = tmp_path / "Lékař 肝"
    folder.mkdir()
    loaded = save_and_load_segmentation(done.segmentation_node, folder / "a.seg.nrrd")
    segment = segment_of(loaded, done.segment_id)
    assert read_provenance(segment) == facts(prompt=prompt)
    assert tag(segment, "TerminologyEntry") == LIVER.terminology_entry
    assert segment.GetName() == "Liver"
    assert tuple(round(255 * part) for part in segment.GetColor()) == LIVER.color_rgb  # Slicer writes six digits
    logic = slicer.vtkSlicerSegmentationsModuleLogic
    assert logic.GetSegmentStatus(segment) == logic.InProgress


def test_everything_survives_mrb(scene: Any, acceptance: Any, tmp_path: Path) -> None:
    from ProGiDiffSlicerLib.scene.provenance import earlier_provenance, read_provenance

    volume = add_volume(scene)
    node = None
    for prompt, mask in zip(PROMPTS, (np.roll(A, n, axis=1) for n in range(len(PROMPTS))), strict=True):
        node = acceptance.accept(crop_of(mask), volume, LIVER, facts(prompt=prompt), node).segmentation_node
    first = node.GetSegmentation().GetNthSegmentID(0)
    acceptance.accept(crop_of(B), volume, LIVER, facts(prompt=PROMPTS[4], seed=5), node, "add", first)
    before = everything(node, volume)
    save_and_load_scene(scene, tmp_path / "Szene.mrb")
    volume = scene.GetFirstNodeByClass("vtkMRMLScalarVolumeNode")
    node = scene.GetFirstNodeByClass("vtkMRMLSegmentationNode")
    after = everything(node, add_volume(scene))  # Slicer turned the left-handed volume around on loading
    for old, new in zip(before, after, strict=True):
        np.testing.assert_allclose(old[4], new[4], atol=1e-6)  # Slicer writes six digits
        assert old[:4] + old[5:] == new[:4] + new[5:]
    read = [read_provenance(segment_of(node, row[0])).prompt for row in after]
    assert read == [PROMPTS[4], *PROMPTS[1:]]
    assert earlier_provenance(segment_of(node, first)) == [facts(prompt=PROMPTS[0])]
    assert node.GetAttribute("ProGiDiff.Role") == "accepted"
    assert node.GetNodeReferenceID(node.GetReferenceImageGeometryReferenceRole()) == volume.GetID()
    converter = slicer.vtkSegmentationConverter
    assert node.GetSegmentation().GetConversionParameter(converter.GetReferenceImageGeometryParameterName())


def test_a_second_round_of_saving_changes_nothing(scene: Any, acceptance: Any, tmp_path: Path) -> None:
    from ProGiDiffSlicerLib.scene.provenance import read_provenance

    volume = add_volume(scene)
    done = acceptance.accept(crop_of(A), volume, LIVER, facts(prompt=PROMPTS[1]))
    loaded = done.segmentation_node
    for n in range(3):
        loaded = save_and_load_segmentation(loaded, tmp_path / f"{n}.seg.nrrd")
    assert read_provenance(segment_of(loaded, done.segment_id)) == facts(prompt=PROMPTS[1])


def test_what_was_not_known_comes_back_as_not_known(scene: Any, acceptance: Any, tmp_path: Path) -> None:
    from ProGiDiffSlicerLib.scene.provenance import Provenance, read_provenance

    volume = add_volume(scene)
    few = Provenance(prompt="spleen", target="spleen", proposal=-1, request=ProposeRequest(("spleen",)), ensemble="mean")
    done = acceptance.accept(crop_of(A), volume, SPLEEN, few)
    loaded = save_and_load_segmentation(done.segmentation_node, tmp_path / "a.seg.nrrd")
    read = read_provenance(segment_of(loaded, done.segment_id))
    assert read.rank is None
    assert read.score is None
    assert read.created.endswith("+00:00")
    assert read == replace(few, created=read.created, dice_to_proposal=1.0)


def test_segments_of_others_have_none_and_damaged_tags_do_no_harm(scene: Any) -> None:
    from ProGiDiffSlicerLib.scene.provenance import EARLIER_TAG, earlier_provenance, read_provenance, write_provenance

    node = add_segments(scene, add_volume(scene), {"mine": A})
    segment = segment_of(node, "mine")
    assert read_provenance(segment) is None
    assert earlier_provenance(segment) == []
    write_provenance(segment, facts())
    segment.SetTag("ProGiDiff.seed", "many")
    segment.SetTag("ProGiDiff.score", "high")
    segment.RemoveTag("ProGiDiff.model")
    for broken in ("{", "[1]", '{"prompt": 1}', "null"):
        segment.SetTag(EARLIER_TAG, broken)
        assert earlier_provenance(segment) == []
    assert read_provenance(segment) == facts(seed=0, score=None, model_id="")


def test_tags_that_the_command_line_writes_are_read_too(scene: Any, tmp_path: Path) -> None:
    from progidiff.outputs.segmentation import Segment, write_seg_nrrd
    from ProGiDiffSlicerLib.scene.provenance import read_provenance

    from ..volume_examples import oblique

    tags = {"ProGiDiff.prompt": "liver | all", "ProGiDiff.target": "liver", "ProGiDiff.seed": "4", "ProGiDiff.proposal": "2"}
    tags |= {"ProGiDiff.rank": "1", "ProGiDiff.score": "0.9130", "ProGiDiff.model": "m"}
    segment = Segment("liver 1", np.ones((6, 8, 9), bool), (1, 0, 0), LIVER.terminology_entry, tags, "one")
    write_seg_nrrd(tmp_path / "a.seg.nrrd", [segment], oblique())
    node = scene.AddNewNodeByClass("vtkMRMLSegmentationNode")
    storage = scene.AddNewNodeByClass("vtkMRMLSegmentationStorageNode")
    storage.SetFileName(str(tmp_path / "a.seg.nrrd"))
    assert storage.ReadData(node) == 1
    read = read_provenance(segment_of(node, "one"))
    assert (read.prompt, read.target, read.request.seed, read.proposal) == ("liver | all", "liver", 4, 2)
    assert (read.rank, read.score, read.model_id) == (1, 0.913, "m")


def test_tags_of_earlier_versions_are_read_and_what_they_do_not_say_is_not_made_up(scene: Any) -> None:
    from ProGiDiffSlicerLib.scene.provenance import EARLIER_TAG, earlier_provenance, read_provenance

    segment = segment_of(add_segments(scene, add_volume(scene), {"mine": A}), "mine")
    told = {"prompt": "Leber", "target": "liver", "seed": "7", "proposal": "2", "proposals": "12", "steps": "8"}
    told |= {"scheduler": "ddim", "everywhere": "1", "slices": "12-40", "corrected": "0"}
    for name, text in told.items():
        segment.SetTag(f"ProGiDiff.{name}", text)
    segment.SetTag(EARLIER_TAG, json.dumps([{"prompt": "Niere", "target": "left kidney", "seed": "4", "slices": ""}]))
    read, (earlier,) = read_provenance(segment), earlier_provenance(segment)
    assert (read.prompt, read.target, read.proposal, read.corrected) == ("Leber", "liver", 2, False)
    assert read.request == ProposeRequest((), proposals=12, steps=8, seed=7, slices=(11, 40), everywhere=True)
    assert (earlier.prompt, earlier.request.seed, earlier.request.slices) == ("Niere", 4, None)
    assert (earlier.request.proposals, earlier.request.steps, earlier.request.scheduler) == (1, 0, "")
    for broken in ("5-2", "0-3", "a-b", "7", "1-2-3"):
        segment.SetTag("ProGiDiff.slices", broken)
        assert read_provenance(segment).request.slices is None


def test_replace_forgets_and_add_keeps_what_was_there(scene: Any, acceptance: Any) -> None:
    from ProGiDiffSlicerLib.scene.provenance import earlier_provenance, read_provenance

    volume = add_volume(scene)
    done = acceptance.accept(crop_of(A), volume, LIVER, facts(seed=1))
    node, identifier = done.segmentation_node, done.segment_id
    for seed in (2, 3):
        acceptance.accept(crop_of(np.roll(B, seed, axis=2)), volume, LIVER, facts(seed=seed), node, "add", identifier)
    assert [fact.request.seed for fact in earlier_provenance(segment_of(node, identifier))] == [1, 2]
    assert read_provenance(segment_of(node, identifier)).request.seed == 3
    acceptance.accept(crop_of(A), volume, LIVER, facts(seed=4), node, "replace", identifier)
    assert earlier_provenance(segment_of(node, identifier)) == []
    assert read_provenance(segment_of(node, identifier)).request.seed == 4
    acceptance.undo.undo()
    assert [fact.request.seed for fact in earlier_provenance(segment_of(node, identifier))] == [1, 2]


def test_update_after_edit(scene: Any, acceptance: Any) -> None:
    from ProGiDiffSlicerLib.scene.labelmaps import labelmap_of, volume_grid
    from ProGiDiffSlicerLib.scene.provenance import update_after_edit

    volume = add_volume(scene)
    done = acceptance.accept(crop_of(A), volume, LIVER, facts())
    node, identifier = done.segmentation_node, done.segment_id
    assert update_after_edit(node, identifier, packed(A)) == facts()
    logic = slicer.vtkSlicerSegmentationsModuleLogic
    image = labelmap_of(B, (0, 0, 0), volume_grid(volume))
    logic.SetBinaryLabelmapToSegment(image, node, identifier, logic.MODE_MERGE_MASK, image.GetExtent(), False, [])
    np.testing.assert_array_equal(mask_in(node, identifier, volume), A | B)
    expected = 2 * np.count_nonzero(A) / (np.count_nonzero(A) + np.count_nonzero(A | B))
    now = update_after_edit(node, identifier, packed(A))
    assert now.edited
    assert now.dice_to_proposal == pytest.approx(expected, abs=1e-12)
    unknown = update_after_edit(node, identifier, None)
    assert unknown.edited
    assert unknown.dice_to_proposal is None
    logic.ClearSegment(node, identifier)
    assert update_after_edit(node, identifier, packed(A)).dice_to_proposal == 0.0
    assert update_after_edit(node, "gone", packed(A)) is None
    other = add_segments(scene, volume, {"mine": A})
    assert update_after_edit(other, "mine", packed(A)) is None
    assert tag(segment_of(other, "mine"), "ProGiDiff.edited") is None


def test_identity_of_a_mask_is_its_voxels_and_their_place() -> None:
    from ProGiDiffSlicerLib.scene.labelmaps import tight
    from ProGiDiffSlicerLib.scene.provenance import dice_of, mask_identity

    tight_a = tight(*_whole(A))
    assert mask_identity(*tight_a) == mask_identity(*tight(crop_of(A).array, crop_of(A).origin_kji))
    different = [np.roll(A, 1, axis=axis) for axis in range(3)] + [A.transpose(0, 2, 1)[:, :30, :30], A & ~B]
    nearly = A.copy()
    nearly[5, 5, 5] = False
    identities = {mask_identity(*tight(*_whole(mask))) for mask in [A, *different, nearly, np.zeros_like(A)]}
    assert len(identities) == 8
    nothing = tight(*_whole(np.zeros_like(A)))
    assert dice_of(nothing, nothing) == 1.0
    assert dice_of(tight_a, nothing) == 0.0
    assert dice_of(tight_a, tight(*_whole(B))) == pytest.approx(2 * np.sum(A & B) / (A.sum() + B.sum()))
    assert tight_a[1] == (2, 3, 4)


def packed(mask: np.ndarray) -> tuple[PackedMask, tuple[int, int, int]]:
    crop = crop_of(mask)
    return PackedMask.from_array(crop.array), crop.origin_kji


def _whole(mask: np.ndarray) -> tuple[np.ndarray, tuple[int, int, int]]:
    return mask, (0, 0, 0)
