"""``progidiff propose`` from image to result folder, through a real worker process."""

from __future__ import annotations

from pathlib import Path

import highdicom
import nibabel as nib
import numpy as np
import pydicom
import pytest
import SimpleITK as sitk

from progidiff.cli.writing import choose_slices, volume_spread
from progidiff.outputs.document import ProposalsDocument, read_document
from progidiff.outputs.segmentation import write_volume
from progidiff.volumes.geometry import Geometry
from progidiff.volumes.reading import read_volume
from progidiff.volumes.slicing import plan_slices

from ..volume_examples import oriented, write_dicom_series, write_patient_series
from .command_support import propose

GRID = oriented("LPS", (48, 40, 8), (2.0, 2.0, 5.0))


def image_file(path: Path, geometry: Geometry = GRID) -> Path:
    """A CT-like volume: noise around soft tissue in air."""
    array = np.random.default_rng(0).normal(40, 20, geometry.shape_kji).astype(np.int16)
    array[:, :2] = -1000
    write_volume(path, array, geometry)
    return path


def segments_of(path: Path) -> dict[str, tuple[np.ndarray, dict[str, str]]]:
    """Segments of a .seg.nrrd by name: bool (K, J, I) and the fields of its header, read with ITK."""
    image = sitk.ReadImage(str(path))
    array = sitk.GetArrayFromImage(image)
    array = array if array.ndim == 4 else array[..., None]
    header = {key: image.GetMetaData(key) for key in image.GetMetaDataKeys()}
    segments = {}
    for number in range(sum(key.endswith("_ID") for key in header)):
        fields = {key.partition("_")[2]: v for key, v in header.items() if key.startswith(f"Segment{number}_")}
        segments[fields["Name"]] = (array[..., int(fields["Layer"])] == int(fields["LabelValue"]), fields)
    return segments


def voxels(path: Path) -> np.ndarray:
    """(K, J, I) of a NIfTI file."""
    return np.asarray(nib.load(path).dataobj).T


@pytest.fixture(scope="module")
def result(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Liver found, spleen found, pancreas in one of eight proposals; 5 of 8 slices."""
    folder = tmp_path_factory.mktemp("result")
    ran = propose(
        image_file(folder / "Müller 肝.nii.gz"),
        folder / "out",
        *("--prompt", "Leber; Milz", "--prompt", "pancreas and liver"),
        *("--proposals", "8", "--top-k", "3", "--seed", "5", "--slices", "2:7", "--everywhere"),
        absent=["pancreas"],
        block=3,
    )
    assert ran.exit_code == 0, ran.output
    return folder / "out"


def test_the_folder_holds_exactly_what_the_record_lists(result: Path) -> None:
    document = read_document(result / "proposals.json")
    assert sorted(document.files) == sorted(p.name for p in result.iterdir() if not p.name.startswith("."))
    assert {target.target for target in document.targets} == {"liver", "spleen", "pancreas"}
    assert [p.name for p in result.parent.iterdir() if p.name.startswith(".")] == []


def test_the_record_says_what_was_asked_and_who_answered(result: Path) -> None:
    document = read_document(result / "proposals.json")
    assert document.request.prompts == ["Leber; Milz", "pancreas and liver"]
    assert document.request.seed == 5
    assert (document.request.adaptive, document.request.everywhere) == (False, True)
    assert (document.input.name, document.input.slices, document.input.slice_count) == ("Müller 肝.nii.gz", (2, 7), 8)
    assert document.input.content_hash == "0123abcd"
    assert (document.model.id, document.model.device, document.model.licence) == ("organs-1", "cpu", "CC0")
    assert {"sampling", "all together"} <= set(document.timing_s)
    prompts = {target.target: target.prompt for target in document.targets}
    assert prompts == {"liver": "Leber; Milz", "spleen": "Leber; Milz", "pancreas": "pancreas and liver"}
    assert {target.target: target.snomed_code for target in document.targets}["liver"] == "10200004"


@pytest.mark.parametrize("kept", [False, True])
def test_islands_are_dropped_unless_pieces_are_kept(tmp_path: Path, kept: bool) -> None:
    image, out = image_file(tmp_path / "ct.nii.gz"), tmp_path / "out"
    options = ("--prompt", "liver", "--proposals", "4", "--top-k", "4", *(["--keep-pieces"] if kept else []))
    ran = propose(image, out, *options, speck=2)
    assert ran.exit_code == 0, ran.output
    document = read_document(out / "proposals.json")
    assert document.request.keep_pieces == kept
    (target,) = document.targets
    island = 6 * 2 * 2 * 5 / 1000
    assert [p.dropped_pieces for p in target.proposals] == ([0] * 4 if kept else [1, 1, 0, 0])
    assert [p.dropped_ml for p in target.proposals] == pytest.approx([0.0] * 4 if kept else [island, island, 0, 0])
    masks = segments_of(out / "proposals.seg.nrrd")
    for proposal in target.proposals:
        if proposal.segment is not None:
            mask, _ = masks[proposal.segment]
            assert mask[1, 3:5, 3:6].all() == mask[1, 3:5, 3:6].any() == (kept and proposal.index < 2)
            assert mask.sum() * 0.02 == pytest.approx(proposal.millilitres)
    assert bool(voxels(out / "agreement_liver.nii.gz")[1, 3, 3]) == kept
    assert ("1 piece dropped (0.12 mL)" in (out / "report.html").read_text(encoding="utf-8")) != kept


def test_ranks_duplicates_and_picks_add_up(result: Path) -> None:
    for target in read_document(result / "proposals.json").targets:
        assert [proposal.index for proposal in target.proposals] == list(range(8))
        ranked = target.ranked()
        assert [proposal.rank for proposal in ranked] == list(range(1, len(ranked) + 1))
        assert [p.score for p in ranked] == sorted((p.score for p in ranked), reverse=True)
        assert sum(proposal.weight for proposal in target.proposals) == 8
        for proposal in target.proposals:
            assert (proposal.duplicate_of is None) == (proposal.rank is not None)
        assert sum(proposal.random_pick for proposal in target.proposals) == 1
        assert len([p for p in ranked if p.segment]) == min(3, len(ranked))


def test_segments_are_the_best_proposals_voxel_by_voxel(result: Path) -> None:
    document = read_document(result / "proposals.json")
    segments = segments_of(result / "proposals.seg.nrrd")
    wanted = {p.segment: (t, p) for t in document.targets for p in t.proposals if p.segment is not None}
    assert set(segments) == set(wanted)
    per_voxel = 2 * 2 * 5 / 1000
    for name, (mask, fields) in segments.items():
        target, proposal = wanted[name]
        assert name.startswith(f"{target.target} {proposal.rank} (")
        assert mask.sum() * per_voxel == pytest.approx(proposal.millilitres)
        assert not mask[:2].any()
        assert not mask[7:].any()
        tags = dict(tag.split(":", 1) for tag in fields["Tags"].strip("|").split("|"))
        assert tags["ProGiDiff.prompt"] == target.prompt
        assert (tags["ProGiDiff.seed"], tags["ProGiDiff.rank"]) == ("5", str(proposal.rank))
        assert float(tags["ProGiDiff.score"]) == pytest.approx(proposal.score, abs=1e-4)
        assert tags["ProGiDiff.model"] == "organs-1"
        assert target.snomed_code in tags["TerminologyEntry"]


def test_agreement_and_ensemble_fit_each_other_and_the_volumes(result: Path) -> None:
    document = read_document(result / "proposals.json")
    segments = segments_of(result / "proposals.seg.nrrd")
    per_voxel = 2 * 2 * 5 / 1000
    for target in document.targets:
        agreement, ensemble = voxels(result / target.agreement_file), voxels(result / target.ensemble_file)
        assert agreement.dtype == np.float32
        np.testing.assert_allclose(agreement * 8, np.round(agreement * 8), atol=1e-5)
        np.testing.assert_array_equal(ensemble, agreement > 0.5)  # the worker's probabilities are 0 and 1 here
        assert not agreement[:2].any()
        assert not agreement[7:].any()
        assert target.ensembles_ml.majority == pytest.approx((agreement > 0.5).sum() * per_voxel)
        assert target.ensembles_ml.mean_probability == pytest.approx(ensemble.sum() * per_voxel)
        agreed = voxels(result / target.consensus_file)
        assert target.ensembles_ml.consensus == pytest.approx(agreed.sum() * per_voxel)
        if agreed.any():
            assert agreement[agreed > 0].min() > agreement[agreed == 0].max()
        assert agreement.sum() * per_voxel == pytest.approx(target.volume_ml.mean, rel=1e-5)
        everything = np.max([mask for name, (mask, _) in segments.items() if name.startswith(target.target)], axis=0)
        assert (agreement[everything] > 0).all()


def test_an_absent_organ_gives_an_empty_result_that_says_so(result: Path) -> None:
    document = read_document(result / "proposals.json")
    pancreas = next(target for target in document.targets if target.target == "pancreas")
    assert pancreas.found is False
    assert pancreas.empty_share == pytest.approx(7 / 8)
    assert pancreas.ranked()[0].empty
    assert not voxels(result / pancreas.ensemble_file).any()
    warning = next(w for w in document.warnings if w.code == "not_found")
    assert warning.message == "No pancreas was found in these slices: 7 of 8 proposals (88 %) are empty."
    segments = segments_of(result / "proposals.seg.nrrd")
    assert not segments["pancreas 1 (empty)"][0].any()
    html = (result / "report.html").read_text(encoding="utf-8")
    assert "Not found in these slices" in html
    assert html.count("data:image/png;base64,") == 18


def test_an_organ_that_no_proposal_holds(tmp_path: Path) -> None:
    ran = propose(image_file(tmp_path / "ct.nii.gz"), tmp_path / "out", "--prompt", "spleen", never=["spleen"])
    assert ran.exit_code == 0, ran.output
    told = [line for line in ran.stderr.splitlines() if "empty" in line]
    assert len(told) == 1, "said once"
    assert "16 of 16 proposals (100 %) are empty" in told[0]
    assert "not found" in ran.stdout
    document = read_document(tmp_path / "out" / "proposals.json")
    assert [warning.code for warning in document.warnings] == ["invented", "not_found"]
    target = document.targets[0]
    assert (target.empty_share, target.ensembles_ml.staple, target.found) == (1.0, 0.0, False)
    assert not voxels(tmp_path / "out" / "agreement_spleen.nii.gz").any()


@pytest.mark.slow
@pytest.mark.parametrize(("orientation", "plane"), [("RAS", None), ("PSR", "coronal"), ("SRA", "sagittal")])
def test_results_lie_where_the_organ_lies_in_any_orientation(orientation: str, plane: str | None, tmp_path: Path) -> None:
    c, s = np.cos(np.deg2rad(12)), np.sin(np.deg2rad(12))
    affine = np.array([[1, 0, 0, 0], [0, c, -s, 0], [0, s, c, 0], [0, 0, 0, 1]])
    affine = affine @ oriented(orientation, (28, 24, 20), (2.0, 2.0, 5.0)).affine
    image = image_file(tmp_path / "ct.nrrd", Geometry((28, 24, 20), affine))
    plan = plan_slices(read_volume(image).geometry, plane)
    arguments = ["--plane", plane] if plane else []
    ran = propose(image, tmp_path / "out", "--prompt", "liver", "--proposals", "3", *arguments)
    assert ran.exit_code == 0, ran.output

    document = read_document(tmp_path / "out" / "proposals.json")
    assert document.input.plane == plan.plane
    ensemble = nib.load(tmp_path / "out" / "ensemble_liver.nii.gz")
    np.testing.assert_allclose(ensemble.affine, affine, atol=1e-4)
    segmentation = sitk.ReadImage(str(tmp_path / "out" / "proposals.seg.nrrd"))
    np.testing.assert_allclose(np.array(segmentation.GetOrigin()) * (-1, -1, 1), affine[:3, 3], atol=1e-9)

    # the scripted liver lies in the upper left of each canonical view: to the patient's right in axial and coronal ones
    # and to the front in sagittal ones; in front in axial ones and above in the others
    inside = np.argwhere(voxels(tmp_path / "out" / "ensemble_liver.nii.gz"))[:, ::-1]
    centre = (np.array([28, 24, 20]) - 1) / 2
    offset = affine[:3, :3] @ (inside.mean(axis=0) - centre)
    right, front, up = offset
    expected = {"axial": (right, front), "coronal": (right, up), "sagittal": (front, up)}[plan.plane]
    assert min(expected) > 0


@pytest.mark.slow
def test_an_earlier_result_is_replaced_and_other_files_are_respected(tmp_path: Path) -> None:
    image, out = image_file(tmp_path / "Müller 肝.nii.gz"), tmp_path / "out"
    for prompt in ("liver", "spleen"):
        assert propose(image, out, "--prompt", prompt, "--proposals", "2").exit_code == 0
    assert not (out / "ensemble_liver.nii.gz").exists()
    (out / "my notes.txt").write_text("mine", encoding="utf-8")
    refused = propose(image, out, "--prompt", "liver", "--proposals", "2")
    assert refused.exit_code == 2
    assert (out / "ensemble_spleen.nii.gz").exists()
    assert propose(image, out, "--prompt", "liver", "--proposals", "2", "--overwrite").exit_code == 0
    assert (out / "my notes.txt").read_text(encoding="utf-8") == "mine"


def test_json_is_one_object_on_stdout_and_progress_goes_to_stderr(tmp_path: Path) -> None:
    image, out = image_file(tmp_path / "Müller 肝.nii.gz"), tmp_path / "out"
    ran = propose(image, out, "--prompt", "left kidney", "--proposals", "2", "--json")
    assert ran.exit_code == 0, ran.output
    assert ProposalsDocument.model_validate_json(ran.stdout) == read_document(out / "proposals.json")
    assert "sampling left kidney: slice 1/8" in ran.stderr
    assert "about 2 s left" in ran.stderr
    assert "Warning: These proposals are <b>invented</b>." in ran.stderr
    assert (out / "ensemble_left_kidney.nii.gz").exists()
    before = (out / "proposals.seg.nrrd").read_bytes()
    assert propose(image, out, "--prompt", "left kidney", "--proposals", "2").exit_code == 0
    assert (out / "proposals.seg.nrrd").read_bytes() == before, "the same seed gives the same file"


def test_one_series_of_a_dicom_folder_with_what_is_to_be_said_of_it(tmp_path: Path) -> None:
    grid = oriented("LPS", (24, 20, 6), (2.0, 2.0, 5.0))
    array = np.random.default_rng(0).integers(-100, 200, grid.shape_kji).astype(np.int16)
    write_dicom_series(tmp_path / "study", array, grid, uid="41", shifts={2: (0.0, 0.0, 0.1), 4: (0.0, 0.0, -0.1)})
    write_dicom_series(tmp_path / "study", array[:3], grid, uid="52", modality="PT")
    refused = propose(tmp_path / "study", tmp_path / "out", "--prompt", "liver")
    assert refused.exit_code == 2
    assert "2 image series" in refused.stderr
    assert "--series" in refused.stderr
    assert not (tmp_path / "out").exists()

    ran = propose(tmp_path / "study", tmp_path / "out", "--prompt", "liver", "--series", "5.1.41", "--proposals", "4")
    assert ran.exit_code == 0, ran.output
    assert "are rounded" in ran.stderr
    document = read_document(tmp_path / "out" / "proposals.json")
    assert document.input.modality == "CT"
    assert document.input.size_ijk == grid.shape_ijk
    assert ["are rounded" in w.message for w in document.warnings if w.code == "volume"] == [True]
    seen = nib.load(tmp_path / "out" / "agreement_liver.nii.gz")
    assert np.abs(seen.affine - grid.affine).max() < 0.1

    refused = propose(image_file(tmp_path / "Müller 肝.nii.gz"), tmp_path / "no", "--prompt", "liver", "--series", "3")
    assert refused.exit_code == 2
    assert "no series to choose" in refused.stderr


def test_choose_slices_shows_the_fullest_and_spreads() -> None:
    assert choose_slices(np.zeros(9)) == []
    assert choose_slices(np.array([0, 0, 4, 0])) == [2]
    assert choose_slices(np.array([0, 3, 1, 0])) == [1, 2]
    chosen = choose_slices(np.bincount(np.repeat(np.arange(10, 40), 3), minlength=60))
    assert len(chosen) == 3
    assert 10 <= chosen[0] < chosen[0] + 10 <= chosen[-1] < 40


@pytest.mark.slow
def test_a_dicom_series_gets_a_dicom_seg_with_the_same_segments(tmp_path: Path) -> None:
    source, out = tmp_path / "series", tmp_path / "out"
    write_patient_series(source, oriented("LPS", (48, 40, 12), (0.8, 0.8, 0.6)))
    ran = propose(source, out, "--prompt", "liver; spleen", "--proposals", "4", "--plane", "axial")
    assert ran.exit_code == 0, ran.output
    document = read_document(out / "proposals.json")
    assert sorted(document.files) == sorted(p.name for p in out.iterdir() if not p.name.startswith("."))
    seg = highdicom.seg.segread(out / "proposals.dcm")
    assert (seg.PatientID, seg.StudyInstanceUID) == ("P-17", "1.2.826.0.1.3680043.2.1125.1")
    assert seg.SegmentSequence[0].SegmentationAlgorithmIdentificationSequence[0].AlgorithmName == "ProGiDiff organs-1"
    images = sorted((pydicom.dcmread(f) for f in source.iterdir()), key=lambda i: float(i.ImagePositionPatient[2]))
    uids = [image.SOPInstanceUID for image in images]
    pixels = seg.get_pixels_by_source_instance(uids, assert_missing_frames_are_empty=True)
    masks = {name: mask for name, (mask, _) in segments_of(out / "proposals.seg.nrrd").items() if mask.any()}
    assert [segment.SegmentLabel for segment in seg.SegmentSequence] == list(masks)
    for number, mask in enumerate(masks.values()):
        np.testing.assert_array_equal(pixels[..., number], mask)


def test_a_series_that_cannot_have_a_dicom_seg_gets_everything_else(tmp_path: Path) -> None:
    write_patient_series(tmp_path / "series", GRID, without="StudyInstanceUID")
    ran = propose(tmp_path / "series", tmp_path / "out", "--prompt", "liver", "--proposals", "2")
    assert ran.exit_code == 0, ran.output
    assert "No DICOM SEG was written" in ran.stderr
    document = read_document(tmp_path / "out" / "proposals.json")
    assert document.warnings[-1].code == "no_dicom_seg"
    assert "do not say their StudyInstanceUID" in document.warnings[-1].message
    assert not (tmp_path / "out" / "proposals.dcm").exists()
    assert (tmp_path / "out" / "proposals.seg.nrrd").exists()


def test_volume_spread() -> None:
    values = np.random.default_rng(11).normal(1500, 50, 200)
    spread = volume_spread(values.tolist())
    assert spread.mean == pytest.approx(values.mean())
    assert spread.sd == pytest.approx(np.std(values, ddof=1))
    assert spread.low < spread.median < spread.high
    assert ((values >= spread.low) & (values <= spread.high)).mean() == pytest.approx(0.9, abs=0.01)
    single = volume_spread([12.5])
    assert (single.mean, single.sd, single.low, single.high) == (12.5, 0.0, 12.5, 12.5)
