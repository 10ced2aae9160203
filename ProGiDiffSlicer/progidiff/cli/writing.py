"""Turns gathered proposals into the files of a result folder."""

from __future__ import annotations

import math
import statistics
import time
from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from progidiff.errors import InputError
from progidiff.outputs.dicom_seg import dicom_seg, read_headers
from progidiff.outputs.document import (
    DOCUMENT_NAME,
    EnsembleVolumes,
    InputRecord,
    ModelRecord,
    ProposalRecord,
    ProposalsDocument,
    RequestRecord,
    TargetRecord,
    VolumeSpread,
    WarningRecord,
)
from progidiff.outputs.report import (
    REPORT_NAME,
    Backdrop,
    SlicePicture,
    agreement_png,
    display_window,
    outlines_png,
    percent,
    windowed,
    write_report,
)
from progidiff.outputs.segmentation import Segment, request_tags, shade, tag_text, write_seg_nrrd, write_volume
from progidiff.proposals.proposals import CONSENSUS, MAJORITY, MEAN, Gathered, Proposals
from progidiff.targets.catalog import Target
from progidiff.volumes.reading import Volume
from progidiff.volumes.slicing import PackedMask, SlicePlan, extract_slice
from progidiff.wire.messages import DoneEvent, ImageInfo, RankingEvent

if TYPE_CHECKING:
    from progidiff.cli.propose import ProposeOptions

SEGMENTATION_NAME = "proposals.seg.nrrd"
DICOM_NAME = "proposals.dcm"
SLICES_PER_TARGET = 3


@dataclass(frozen=True)
class Wanted:
    """One target and the prompt that named it."""

    target: Target
    prompt: str


@dataclass(frozen=True)
class RunFacts:
    """What was asked for, of which image, and who answered.

    Attributes:
        options: of the command; the request as it was sent.
        volume: the image.
        modality: ``"CT"``, ``"MR"`` or ``None``.
        plan: how it is cut into slices.
        image: the worker's description of the image.
        wanted: the targets of the prompts, none twice.
        model: the model that answered.
        began: ``time.monotonic()`` at the start of the command.
    """

    options: ProposeOptions
    volume: Volume
    modality: str | None
    plan: SlicePlan
    image: ImageInfo
    wanted: tuple[Wanted, ...]
    model: ModelRecord
    began: float = field(default_factory=time.monotonic)


@dataclass
class _TargetResult:
    record: TargetRecord
    segments: list[Segment]
    pictures: list[SlicePicture]
    warnings: list[WarningRecord]


def write_results(folder: Path, job: RunFacts, gathered: Gathered) -> ProposalsDocument:
    """Write every file of a result into an empty folder; returns what is also in ``proposals.json``.

    Memory: the packed proposals, and one float32 volume at a time.

    Raises:
        ProtocolError: the worker's events do not add up to a result.
        OutputError: a file cannot be written.
    """
    done = gathered.finished()
    job = replace(job, model=job.model.model_copy(update={"adapter_id": done.adapter_id}))
    results = []
    for wanted in job.wanted:
        proposals = gathered[wanted.target.key]
        results.append(_write_target(folder, job, wanted, proposals, proposals.checked()))
    segments = [segment for result in results for segment in result.segments]
    write_seg_nrrd(folder / SEGMENTATION_NAME, segments, job.volume.geometry)
    dicom_files, dicom_warnings = _write_dicom(folder, job, segments)

    records = [result.record for result in results]
    maps = [name for record in records for name in (record.agreement_file, record.ensemble_file, record.consensus_file)]
    missing = {record.target for record in records if not record.found}
    said = [w for w in gathered.warnings if w.code != "empty" or w.message.partition(":")[0] not in missing]
    document = ProposalsDocument(
        input=_input_record(job),
        request=RequestRecord(
            **vars(job.options.request), prompts=job.options.prompt, correct_values=job.options.correct_values
        ),
        model=job.model,
        targets=records,
        warnings=[WarningRecord(code=w.code, message=w.message) for w in said]
        + [warning for result in results for warning in result.warnings]
        + dicom_warnings,
        timing_s=_timing(done, job),
        peak_memory_mb=_finite(done.peak_memory_mb),
        files=[SEGMENTATION_NAME, *dicom_files, DOCUMENT_NAME, REPORT_NAME, *maps],
    )
    (folder / DOCUMENT_NAME).write_text(document.to_json(), encoding="utf-8", newline="\n")
    write_report(folder / REPORT_NAME, document, {result.record.target: result.pictures for result in results})
    return document


def _write_dicom(folder: Path, job: RunFacts, segments: Sequence[Segment]) -> tuple[list[str], list[WarningRecord]]:
    """What was written as DICOM SEG, where the image is a DICOM series; a series that cannot have one costs nothing else."""
    if not job.volume.dicom_files:
        return [], []
    try:
        content = dicom_seg(segments, job.volume.geometry, read_headers(job.volume.dicom_files))
    except InputError as error:
        return [], [WarningRecord(code="no_dicom_seg", message=f"No DICOM SEG was written, all other results were: {error}")]
    (folder / DICOM_NAME).write_bytes(content)
    return [DICOM_NAME], []


def file_stem(target: str) -> str:
    """Target name as part of a file name: ``"left kidney"`` -> ``"left_kidney"``."""
    return "".join(c if c.isalnum() else "_" for c in target)


def _write_target(folder: Path, job: RunFacts, wanted: Wanted, proposals: Proposals, ranking: RankingEvent) -> _TargetResult:
    key, geometry = wanted.target.key, job.volume.geometry
    stem = file_stem(key)
    agreement_file, ensemble_file = f"agreement_{stem}.nii.gz", f"ensemble_{stem}.nii.gz"
    consensus_file = f"consensus_{stem}.nii.gz"
    agreement = proposals.agreement()
    write_volume(folder / agreement_file, agreement, geometry)
    write_volume(folder / ensemble_file, proposals.volume(MEAN), geometry)
    write_volume(folder / consensus_file, proposals.volume(CONSENSUS), geometry)

    warnings = []
    found = not ranking.empty[ranking.order[0]]
    if not found:
        warnings.append(_not_found(key, ranking))
    per_voxel = geometry.voxel_volume_ml
    record = TargetRecord(
        target=key,
        name=key,
        prompt=wanted.prompt,
        snomed_code=wanted.target.type.value,
        found=found,
        empty_share=statistics.fmean(ranking.empty),
        mean_pairwise_dice=_finite(ranking.mean_pairwise_dice),
        stop_reason=ranking.stop_reason,
        volume_ml=volume_spread(ranking.millilitres),
        ensembles_ml=EnsembleVolumes(
            consensus=proposals.tally(CONSENSUS).voxels * per_voxel,
            mean_probability=proposals.tally(MEAN).voxels * per_voxel,
            majority=proposals.tally(MAJORITY).voxels * per_voxel,
            staple=proposals.staple().voxels * per_voxel,
        ),
        agreement_file=agreement_file,
        ensemble_file=ensemble_file,
        consensus_file=consensus_file,
        proposals=_proposal_records(key, ranking, job.options.request.seed),
    )
    pictures = target_pictures(
        job.volume.array,
        job.plan,
        display_window(job.volume.array, job.modality),
        proposals,
        agreement,
        [proposal.index for proposal in record.ranked() if proposal.segment is not None],
    )
    return _TargetResult(record, _segments(job, wanted, proposals, record), pictures, warnings)


def choose_slices(weights: np.ndarray, count: int = SLICES_PER_TARGET) -> list[int]:
    """Slices that show an organ best: the fullest one, and others at even shares of its volume; ascending.

    Args:
        weights: float (slices,), e.g. the sum of the agreement map on each slice; no slice is chosen where
            all are 0.
        count: how many slices at most.
    """
    weights = np.asarray(weights, dtype=np.float64)
    total = weights.sum()
    if total <= 0 or count < 1:
        return []
    passed = np.cumsum(weights) / total
    chosen = [int(weights.argmax())]
    for place in range(count):
        index = int(np.searchsorted(passed, (place + 0.5) / count))
        if index not in chosen and len(chosen) < count:
            chosen.append(index)
    # a thin organ has one slice at several shares: fill up with its next fullest slices
    for index in np.argsort(-weights, kind="stable").tolist():
        if len(chosen) < count and weights[index] > 0 and index not in chosen:
            chosen.append(index)
    return sorted(chosen)


def target_pictures(
    array_kji: np.ndarray,
    plan: SlicePlan,
    window: tuple[float, float],
    proposals: Proposals,
    agreement_kji: np.ndarray,
    put_forward: Sequence[int],
) -> list[SlicePicture]:
    """Pictures of one target.

    Args:
        array_kji: the image, (K, J, I).
        plan: how it is cut into slices.
        window: grey values drawn black and white.
        proposals: the target's proposals.
        agreement_kji: share of proposals, float32 (K, J, I).
        put_forward: proposals to outline, best first.
    """
    other_axes = tuple(axis for axis in range(3) if axis != plan.axis)
    pictures = []
    for index in choose_slices(agreement_kji.sum(axis=other_axes, dtype=np.float64)):
        frame = Backdrop(windowed(extract_slice(array_kji, plan, index), window), plan.spacing_rc)
        masks = [proposals.slice_mask(number, index) for number in put_forward]
        agreement = extract_slice(agreement_kji, plan, index)
        pictures.append(SlicePicture(index, outlines_png(frame, masks), agreement_png(frame, agreement)))
    return pictures


def volume_spread(millilitres: Sequence[float]) -> VolumeSpread:
    """Spread of one or more volumes in mL; percentiles by linear interpolation."""
    values = np.asarray(millilitres, dtype=np.float64)
    low, median, high = (float(v) for v in np.percentile(values, (5, 50, 95)))
    sd = float(values.std(ddof=1)) if values.size > 1 else 0.0
    return VolumeSpread(mean=float(values.mean()), sd=sd, median=median, low=low, high=high)


def _proposal_records(key: str, ranking: RankingEvent, seed: int) -> list[ProposalRecord]:
    rank_of = {index: place for place, index in enumerate(ranking.order, start=1)}
    stands_for = {group[0]: len(group) for group in ranking.groups}
    repeats = {member: group[0] for group in ranking.groups for member in group[1:]}
    put_forward, nothing = set(ranking.top_k), [0] * len(ranking.scores)
    records = []
    for index, points in enumerate(ranking.scores):
        rank, empty = rank_of.get(index), ranking.empty[index]
        shown = index in put_forward and rank is not None
        records.append(
            ProposalRecord(
                index=index,
                rank=rank,
                score=points,
                seed=seed,
                millilitres=ranking.millilitres[index],
                empty=empty,
                duplicate_of=repeats.get(index),
                weight=stands_for.get(index, 1) if rank is not None else 0,
                segment=f"{key} {rank} ({'empty' if empty else f'{points:.2f}'})" if shown else None,
                random_pick=index == ranking.random_pick,
                dropped_pieces=(ranking.dropped_pieces or nothing)[index],
                dropped_ml=(ranking.dropped_ml or nothing)[index],
                filled_ml=(ranking.filled_ml or nothing)[index],
            )
        )
    return records


def _segments(job: RunFacts, wanted: Wanted, proposals: Proposals, record: TargetRecord) -> list[Segment]:
    shown = [proposal for proposal in record.ranked() if proposal.segment is not None]
    asked = request_tags(replace(job.options.request, proposals=len(record.proposals)))
    return [
        Segment(
            name=proposal.segment or record.name,
            mask=PackedMask.from_array(proposals.volume(proposal.index)),
            color=shade(wanted.target.color_rgb, place, len(shown)),
            terminology=wanted.target.terminology_entry,
            tags={
                **asked,
                "ProGiDiff.prompt": wanted.prompt,
                "ProGiDiff.target": record.target,
                "ProGiDiff.proposal": str(proposal.index),
                "ProGiDiff.rank": str(proposal.rank),
                "ProGiDiff.score": f"{proposal.score:.4f}",
                "ProGiDiff.model": job.model.id,
                **({"ProGiDiff.adapter": job.model.adapter_id} if job.model.adapter_id else {}),
                "ProGiDiff.plane": job.plan.plane,
                "ProGiDiff.corrected": tag_text(job.options.correct_values),
            },
        )
        for place, proposal in enumerate(shown)
    ]


def _not_found(key: str, ranking: RankingEvent) -> WarningRecord:
    empty, count = sum(ranking.empty), len(ranking.empty)
    share = percent(empty / count)
    message = f"No {key} was found in these slices: {empty} of {count} proposals ({share}) are empty."
    return WarningRecord(code="not_found", message=message)


def _input_record(job: RunFacts) -> InputRecord:
    geometry, source = job.volume.geometry, job.options.source
    return InputRecord(
        name=source.name or source.resolve().name,
        content_hash=job.image.content_hash,
        modality=job.modality,
        size_ijk=geometry.shape_ijk,
        spacing_mm=geometry.spacing,
        orientation=geometry.orientation,
        plane=job.plan.plane,
        slices=job.options.request.slices or (0, job.plan.count),
        slice_count=job.plan.count,
    )


def _timing(done: DoneEvent, job: RunFacts) -> dict[str, float]:
    known = {name: duration for name, duration in done.timing.items() if math.isfinite(duration)}
    return {**known, "all together": time.monotonic() - job.began}


def _finite(value: float) -> float | None:
    return value if math.isfinite(value) else None


def model_record(model_id: str, card: dict[str, Any], device: str | None) -> ModelRecord:
    """What to keep of a model card."""
    return ModelRecord(
        id=model_id, name=str(card.get("name", "")), licence=str(card.get("licence", "")), device=device or ""
    )


def names(wanted: Sequence[Wanted]) -> tuple[str, ...]:
    """Canonical target names, as a request takes them."""
    return tuple(entry.target.key for entry in wanted)
