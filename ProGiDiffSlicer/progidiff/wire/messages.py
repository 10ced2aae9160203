"""The messages between a client and the worker, a dataclass each; their annotations say what :mod:`.codec` reads and writes.

Every request gets exactly one final reply (:data:`FINAL`) with its id; events may come before it, heartbeats at any time.
The engine speaks in the same events.
"""

from __future__ import annotations

import hashlib
import re
from dataclasses import dataclass, field
from typing import Annotated, Any, Literal, get_args

import numpy as np

from progidiff.wire.frames import Array
from progidiff.wire.request import Place, Proposals, Range
from progidiff.wire.request import ProposeRequest as ProposeRequest

PROTOCOL_VERSION = 2
MAX_ID = 2**53  # whole numbers that survive every JSON reader
MAX_TEXT = 32_768  # the longest path that Windows knows

Device = Literal["auto", "cpu", "cuda"]
Plane = Literal["axial", "coronal", "sagittal"]
Modality = Literal["CT", "MR"]


@dataclass(frozen=True)
class Of:
    """What an array holds, and along how many axes."""

    dtype: str
    axes: int


Id = Annotated[int, Range(0, MAX_ID)]

# What is asked --------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Hello:
    """Who are you? Answered before torch is imported."""


@dataclass(frozen=True)
class Status:
    """State and memory, now."""


@dataclass(frozen=True)
class Shutdown:
    """Cancel what runs, say goodbye and end."""


@dataclass(frozen=True)
class Cancel:
    """Cancel the running request, or only the request with id ``request``."""

    request: Id | None = None


@dataclass(frozen=True)
class Load:
    """Load a model folder as the worker's machine sees it (``None``: the bundled model)."""

    folder: str | None = None
    device: Device = "auto"


@dataclass(frozen=True)
class LoadAdapter:
    """Use a LoRA adapter on the loaded model, in place of the one in use.

    Attributes:
        folder: the adapter's folder, of the worker's machine.
        even_if_worse: also one that was not better than its base on the cases held out from its training.
    """

    folder: str
    even_if_worse: bool = False


@dataclass(frozen=True)
class UnloadAdapter:
    """Go back to the base model."""


@dataclass(frozen=True, eq=False)
class SetImage:
    """Make a volume the current one.

    Attributes:
        array: (K, J, I) numbers; ``None`` asks for the image with ``key`` that the worker may still hold.
        affine: 4x4 float64, IJK -> RAS in mm; ``None`` together with ``array``.
        modality: "CT" or "MR", another code of DICOM where that is what the image says to be, or ``None``.
        plane: of the slices, or ``None``: what suits volume and model.
        key: :func:`image_key` of the rest; required without ``array``.
        correct_values: take values of a CT that cannot be Hounsfield units for what they look like.
    """

    array: Array | None = None
    affine: Array | None = None
    modality: str | None = None
    plane: str | None = None
    key: Annotated[str, Range(0, 128)] | None = None
    correct_values: bool = False

    def problem(self) -> str | None:
        """What is wrong with the fields together, as a sentence."""
        if self.modality is not None and not re.fullmatch("[A-Z0-9]{2,16}", self.modality):
            return 'The field "modality" of a set_image message must be a code of DICOM, such as CT or MR.'
        if self.plane not in (None, "axial", "coronal", "sagittal"):
            return 'The field "plane" of a set_image message must be one of axial, coronal, sagittal.'
        if self.array is None and self.affine is None and self.key is not None:
            return None
        if self.array is None or self.affine is None:
            return "A set_image message needs the arrays named array and affine, or the key of an image."
        if self.array.ndim != 3 or self.array.size == 0 or self.array.dtype == np.bool_:
            return "The image must be a non-empty volume of numbers with three axes."
        return _affine_problem(self.affine)


@dataclass(frozen=True)
class SegmentFacts:
    """What a segment is, beside its mask: as in :class:`progidiff.outputs.segmentation.Segment`."""

    name: str
    color: tuple[Annotated[float, Range(0, 1)], Annotated[float, Range(0, 1)], Annotated[float, Range(0, 1)]]
    terminology: str = ""
    tags: dict[str, str] = field(default_factory=dict)
    id: str = ""


@dataclass(frozen=True, eq=False)
class WriteSeg:
    """Write segments, which a person accepted, as DICOM SEG beside the DICOM images that their volume was read from.

    Attributes:
        segments: what they are.
        masks: uint8 (segment, K, J, I / 8 rounded up), bits along I; they may overlap.
        columns: voxels along I.
        affine: 4x4 float64, IJK -> RAS in mm, of the volume.
        instances: SOP instance UIDs of the images.
        files: the images on the worker's machine, in the order of ``instances``; none where their headers are sent.
        headers: uint8, one after another: the images up to their pixels, in the same order.
        header_sizes: bytes of each.
    """

    segments: Annotated[tuple[SegmentFacts, ...], Range(1, 1024)]
    masks: Annotated[Array, Of("uint8", 4)]
    columns: Annotated[int, Range(1, 2**31)]
    affine: Array
    instances: Annotated[tuple[Annotated[str, Range(0, 64)], ...], Range(0, 100_000)]
    files: Annotated[tuple[str, ...], Range(0, 100_000)] = ()
    headers: Annotated[Array, Of("uint8", 1)] | None = None
    header_sizes: tuple[Annotated[int, Range(1, 2**31)], ...] = ()

    def problem(self) -> str | None:
        """What is wrong with the fields together, as a sentence."""
        if not self.masks.size or self.masks.shape[::3] != (len(self.segments), (self.columns + 7) // 8):
            return "The masks of a write_seg message must be one for each segment, with one bit for each column."
        sent = 0 if self.headers is None else self.headers.size
        named, given = (self.files, self.header_sizes) if self.headers is None else (self.header_sizes, self.files)
        if len(named) != len(self.instances) or given or sum(self.header_sizes) != sent:
            return "A write_seg message needs either the file or the header of each instance."
        return _affine_problem(self.affine)


@dataclass(frozen=True)
class CountCases:
    """What does the curated set in a folder hold? Answered by :class:`CuratedCases`, as the next two; they need no model."""

    folder: str


@dataclass(frozen=True, eq=False)
class KeepCase:
    """Save a training example in a curated set, which is made where there is none.

    Attributes:
        folder: of the set, on the worker's machine.
        target: key of the only target that is known in the case.
        image: (K, J, I), raw scanner values of any numeric type.
        mask: bool, on the grid of ``image``.
        affine: 4x4 float64, IJK -> RAS in mm.
        replaces: the case whose place it takes; "" for none.

    The others are those of :class:`progidiff.curation.NewCase`.
    """

    folder: str
    target: Annotated[str, Range(0, 200)]
    image: Array
    mask: Annotated[Array, Of("bool", 3)]
    affine: Array
    modality: Modality
    plane: Plane
    prompt: str
    code: dict[str, Any] | None = None
    proposal: dict[str, Any] | None = None
    edited: bool = False
    editor: str = ""
    model_id: str = ""
    adapter_id: str | None = None
    dice_to_proposal: float | None = None
    volume_key: str = ""
    patient_key: str | None = None
    replaces: str = ""

    def problem(self) -> str | None:
        """What is wrong with the fields together, as a sentence."""
        return _affine_problem(self.affine)


@dataclass(frozen=True)
class SwapCases:
    """Take cases out of a curated set, and bring earlier ones back, which comes first."""

    folder: str
    remove: tuple[str, ...]
    restore: tuple[str, ...] = ()


@dataclass(frozen=True)
class NextSettings:
    """How much is sampled of each volume; equal settings give equal numbers.

    Attributes:
        proposals: N per target and slice, at least 2.
        steps: denoising steps.
        slices: slices spread evenly over the volume.
        closer: further slices for each target, between those on which it was found and their neighbours.
        seed: seed of the noise.
        modality: "CT" or "MR" for files that do not say it; ``None`` guesses from the values.
        plane: plane of the slices; ``None`` for the one that suits each volume and the model.
        correct_values: take values of a CT that cannot be Hounsfield units for what they look like.
    """

    proposals: Proposals = 6
    steps: Annotated[int, Range(1, 100)] = 2
    slices: Place = 8
    closer: Place = 4
    seed: Annotated[int, Range(0, 2**63 - 1)] = 0
    modality: Modality | None = None
    plane: Plane | None = None
    correct_values: bool = False


@dataclass(frozen=True)
class NextRequest:
    """Which volume of a folder to correct next?

    Told by :class:`NextStart` and :class:`NextVolume`, ends with :class:`NextDone`; a cancelled one keeps what was measured.

    Attributes:
        folder: with volumes, also in folders below it.
        prompt: what to look for.
        out: the result file; the same request goes on from it.
        model, adapter: folders; ``None`` for the bundled model, and for none.
        even_if_worse: take an adapter that was not better than its base.
    """

    folder: str
    prompt: str
    out: str
    model: str | None = None
    adapter: str | None = None
    even_if_worse: bool = False
    device: Device = "auto"
    settings: NextSettings = NextSettings()


@dataclass(frozen=True)
class AdaptRequest:
    """Tune a model on own cases with LoRA, and write the adapter.

    Told by :class:`AdaptStart`, :class:`AdaptStep`, :class:`AdaptValidation` and :class:`AdaptPicture`, ends with
    :class:`AdaptDone`; cancelled, it keeps the best so far.

    Attributes:
        cases: curated sets, nnU-Net raw folders or slice folders.
        out: the adapter's folder; an earlier adapter there is replaced at the end.
        model: its folder; ``None`` for the bundled one.
        work: checkpoints, from which the same request goes on; ``None`` for ``out`` with ``-training`` behind it. It is
            removed when the training has run to its end.
        targets: what to tune; all that the cases label by default.
        validation_share: share of the patients that are held out; with a single patient nobody is.
        name: shown to users; by default that of the folder.
        plane: plane of the slices of volumes; ``None`` for the one that suits each volume and the model.
        correct_values: take values of a CT that cannot be Hounsfield units for what they look like.
        phantoms: held-out phantoms that retention is measured on.

    The others are those of :class:`progidiff.training.tuning.TuneSettings`.
    """

    cases: Annotated[tuple[str, ...], Range(1, 1024)]
    out: str
    model: str | None = None
    work: str | None = None
    targets: Annotated[tuple[Annotated[str, Range(0, 200)], ...], Range(0, 64)] = ()
    validation_share: Annotated[float, Range(0, 0.9)] = 0.25
    device: Device = "auto"
    name: str = ""
    plane: Plane | None = None
    correct_values: bool = False
    phantoms: Place = 5
    steps: Annotated[int, Range(1, 2**31)] = 150
    rank: Annotated[int, Range(1, 256)] = 8
    layers: Literal["attention", "all"] = "all"
    learning_rate: Annotated[float, Range(1e-8, 1)] | None = None
    images: Annotated[int, Range(1, 2**16)] = 4
    prompts_per_image: Annotated[int, Range(1, 2**16)] = 2
    replay_share: Annotated[float, Range(0, 0.9)] = 0.25
    validate_every: Annotated[int, Range(1, 2**31)] = 25
    patience: Annotated[int, Range(1, 2**31)] | None = 4
    validation_images: Place = 12
    seed: Annotated[int, Range(0, 2**31)] = 0


Request = (
    Hello
    | Status
    | Shutdown
    | Cancel
    | Load
    | LoadAdapter
    | UnloadAdapter
    | SetImage
    | ProposeRequest
    | WriteSeg
    | CountCases
    | KeepCase
    | SwapCases
    | NextRequest
    | AdaptRequest
)


def _affine_problem(affine: Array) -> str | None:
    if affine.shape == (4, 4) and affine.dtype.kind == "f" and np.isfinite(affine).all():
        return None
    return "The affine of an image must be 4 x 4 finite floating point numbers."


# What the engine tells while it works ---------------------------------------------------------------------------------


@dataclass(frozen=True)
class ImageInfo:
    """What the engine made of an image: its content hash and its slice plan."""

    content_hash: str
    plane: str
    slice_count: Id
    slice_shape: tuple[Id, Id]
    spacing_rc: tuple[float, float]
    slice_spacing: float


@dataclass(frozen=True)
class ProgressEvent:
    """Progress of the running request; ``fraction`` is in [0, 1], ``eta_s`` in seconds."""

    phase: str
    fraction: float
    slice_index: Place | None = None
    slices_done: Place = 0
    slices_total: Place = 0
    target: str | None = None
    eta_s: float | None = None


@dataclass(frozen=True)
class SliceEvent:
    """Proposals of one target on one slice, in the canonical slice view at the image's own resolution.

    Attributes:
        target: canonical target name.
        slice_index: index along the slice axis.
        first_proposal: index of ``masks[0]``; a slice may arrive in several parts.
        masks: bool (n, rows, columns).
        mean_probability: float32 (rows, columns), mean of the probabilities of the proposals 0..first_proposal+n; ``None``
            in the middle of a block. Adaptive sampling sends one for each of its blocks; the last one counts. It travels in
            256 steps, none of which crosses one half.
    """

    target: str
    slice_index: Place
    first_proposal: Place
    masks: Annotated[Array, Of("bool", 3)]
    mean_probability: Annotated[Array, Of("float32", 2)] | None = None

    @property
    def complete(self) -> bool:
        """Whether a block of the slice's proposals ends with these."""
        return self.mean_probability is not None


@dataclass(frozen=True)
class TidiedEvent:
    """A slice of a target whose proposals are complete, after pieces were dropped and holes filled; it takes the earlier
    masks' place.

    Attributes:
        target: canonical target name.
        slice_index: index along the slice axis.
        corner: row and column of the slice at which the masks begin; nothing is inside beyond them.
        masks: bool (N + 1, rows, columns): all proposals, and where their mean probability is above one half.
    """

    target: str
    slice_index: Place
    corner: tuple[Place, Place]
    masks: Annotated[Array, Of("bool", 3)]


@dataclass(frozen=True)
class RankingEvent:
    """The proposals of one target over the whole requested extent, ranked without ground truth.

    Attributes:
        target: canonical target name.
        order: proposal indices, best first (representatives of near-duplicate groups only).
        scores: score of each proposal by index, in [0, 1].
        groups: near-duplicates (pairwise Dice above 0.98), one list per entry of ``order``, representative first.
        top_k: the k best representatives; ``random_pick`` is one of them, drawn with the request's seed (RandTop-k).
        millilitres: volume of each proposal by index.
        empty: whether each proposal is empty; ``empty_share`` is their share.
        mean_pairwise_dice: diversity (1 = all alike).
        stop_reason: why sampling ended, as a sentence.
        dropped_pieces, dropped_ml, filled_ml: what was dropped of each proposal and filled in it, by index; empty where all
            were left as they were sampled.
    """

    target: str
    order: list[Place]
    scores: list[float]
    groups: list[list[Place]]
    top_k: list[Place]
    random_pick: Annotated[int, Range(-(2**31), 2**31)]
    millilitres: list[float]
    empty: list[bool]
    empty_share: float
    mean_pairwise_dice: float
    stop_reason: str
    dropped_pieces: list[Place] = field(default_factory=list)
    dropped_ml: list[float] = field(default_factory=list)
    filled_ml: list[float] = field(default_factory=list)


#: Codes of warnings about an image as a whole, the most important first.
IMAGE_WARNINGS = ("plane", "values", "values_unknown", "values_corrected", "values_kept", "modality")


@dataclass(frozen=True)
class WarningEvent:
    """Something the user should know that did not stop the request."""

    code: str
    message: str


@dataclass(frozen=True)
class DoneEvent:
    """The request is complete. Times in seconds, memory in MiB."""

    model_id: str
    proposals: Place
    timing: dict[str, float] = field(default_factory=dict)
    peak_memory_mb: float = 0.0
    adapter_id: str | None = None


@dataclass(frozen=True)
class NextStart:
    """The search begins: how many volumes, how many of them ``known`` already, and a sentence on an earlier result."""

    volumes: Place
    known: Place
    message: str


@dataclass(frozen=True)
class NextItem:
    """A volume that was looked at; the most uncertain one teaches most.

    Attributes:
        path: relative to the searched folder, with forward slashes.
        disagreement: of its proposals; ``None`` where it could not be measured, for ``reason``.
        target: the target that they disagree on most, on ``slice`` around ``ras`` (mm).
        notes: sentences about its plane, its values and its modality, the most important first.

    The others are those of :class:`progidiff.active.record.Item`.
    """

    path: str
    disagreement: float | None = None
    target: str = ""
    slice: Place = 0
    ras: tuple[float, float, float] | None = None
    plane: str = ""
    slice_count: Place = 0
    per_target: dict[str, dict[str, Any]] = field(default_factory=dict)
    notes: tuple[str, ...] = ()
    reason: str = ""


@dataclass(frozen=True)
class NextVolume:
    """One more volume is ``done``, of so many; ``eta_s`` in seconds."""

    done: Place
    volumes: Place
    eta_s: float | None
    item: NextItem


@dataclass(frozen=True)
class LeftOut:
    """A case that cannot be used, and why."""

    case: str
    reason: str


@dataclass(frozen=True)
class AdaptStart:
    """The training begins: how many cases are for ``training`` and for ``validation``, in all and by target."""

    adapter_id: str
    steps: Place
    cases: dict[str, Id]
    targets: dict[str, dict[str, Id]]
    left_out: tuple[LeftOut, ...] = ()


@dataclass(frozen=True)
class AdaptStep:
    """An optimiser step of at most ``steps``; ``eta_s`` in seconds."""

    step: Place
    steps: Place
    loss: float
    eta_s: float | None


@dataclass(frozen=True)
class AdaptValidation:
    """Mean Dice on held-out cases after a step, 0 for the base model; ``best`` so far or not."""

    step: Place
    dice: float
    per_target: dict[str, float]
    best: bool


@dataclass(frozen=True, eq=False)
class AdaptPicture:
    """A held-out slice with the first-ranked proposal before and after, their Dice, and both as PNG, uint8."""

    case: str
    target: str
    before: float
    after: float
    png: Annotated[Array, Of("uint8", 1)]


# What else the worker says --------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class HelloReply:
    """The worker introduces itself; ``heartbeat_s`` lies between heartbeats, ``max_payload`` is in bytes."""

    version: str
    pid: Id
    python: str
    max_payload: Id
    heartbeat_s: float


@dataclass(frozen=True)
class Heartbeat:
    """The process lives, and has worked on request ``running`` for ``running_s`` seconds."""

    running: Id | None
    running_s: float


@dataclass(frozen=True)
class StatusReply:
    """``state`` is ``"empty"`` (no model), ``"ready"`` or ``"working"``; memory in MiB.

    ``None`` stands for what is not known or not there.
    """

    state: str
    running: Id | None
    model_id: str | None
    device: str | None
    image_key: str | None
    memory_mb: float | None
    device_memory_mb: float | None
    uptime_s: float
    adapter_id: str | None = None


@dataclass(frozen=True)
class Acknowledged:
    """Answer to cancel: whether there was something to cancel, which gets its own final reply."""

    running: bool


@dataclass(frozen=True)
class Loaded:
    """A model is loaded; ``card`` is its model card as JSON."""

    model_id: str
    vocabulary: Annotated[tuple[str, ...], Range(0, 100_000)]
    device: str | None
    card: dict[str, Any] = field(default_factory=dict)


@dataclass(frozen=True)
class AdapterLoaded:
    """An adapter is in use; ``card`` is its card as JSON."""

    adapter_id: str
    card: dict[str, Any] = field(default_factory=dict)


@dataclass(frozen=True)
class AdapterUnloaded:
    """The base model is in use."""


@dataclass(frozen=True)
class ImageReply:
    """The image is the current one; ``key`` is its :func:`image_key`."""

    key: str
    info: ImageInfo


@dataclass(frozen=True, eq=False)
class SegWritten:
    """The content of a DICOM SEG file."""

    content: Annotated[Array, Of("uint8", 1)]


@dataclass(frozen=True)
class CuratedCases:
    """What a curated set holds.

    Attributes:
        cases: number of cases.
        counts: cases by target, in the catalogue's order.
        modalities: "CT" and "MR", as far as there are cases of them.
        kept: id of the case that was saved; "" where nothing was.
        replaced: the case whose place it took, which left the set; "" for none.
    """

    cases: Id
    counts: dict[str, Id]
    modalities: tuple[str, ...]
    kept: str = ""
    replaced: str = ""


@dataclass(frozen=True)
class NextDone:
    """The search has ended: the most uncertain volume first, and those that could not be measured."""

    ranking: tuple[NextItem, ...]
    failures: tuple[NextItem, ...]
    cancelled: bool


@dataclass(frozen=True)
class AdaptDone:
    """The adapter is in ``folder``: whether it is ``better`` on held-out cases, a sentence on that, and its card."""

    folder: str
    adapter_id: str
    better: bool
    cancelled: bool
    reason: str
    card: dict[str, Any]


@dataclass(frozen=True)
class Cancelled:
    """Final reply of a request that was cancelled."""


@dataclass(frozen=True)
class Bye:
    """Last frame before a requested end."""


@dataclass(frozen=True)
class ErrorReply:
    """Final reply of a request that failed: a stable code, a sentence for the user, and maybe what to try."""

    code: str
    message: str
    hint: str = ""


Event = (
    ProgressEvent
    | SliceEvent
    | TidiedEvent
    | RankingEvent
    | WarningEvent
    | DoneEvent
    | NextStart
    | NextVolume
    | AdaptStart
    | AdaptStep
    | AdaptValidation
    | AdaptPicture
)
Final = (
    HelloReply
    | StatusReply
    | Acknowledged
    | Loaded
    | AdapterLoaded
    | AdapterUnloaded
    | ImageReply
    | SegWritten
    | CuratedCases
    | NextDone
    | AdaptDone
    | DoneEvent
    | Cancelled
    | Bye
    | ErrorReply
)
Reply = Final | Heartbeat | Event
#: The replies after which nothing more is said about their request.
FINAL = get_args(Final)

# Images by their content ----------------------------------------------------------------------------------------------


def image_key(array: Array, affine: Array, modality: str | None, plane: str | None, correct_values: bool = False) -> str:
    """Content hash (BLAKE2b, hex) by which client and worker agree that an image needs no second transfer."""
    digest = image_digest(array.dtype, array.shape, affine, modality, plane, correct_values)
    little = np.ascontiguousarray(array, dtype=array.dtype.newbyteorder("<"))
    digest.update(little.reshape(-1).view(np.uint8).data)
    return digest.hexdigest()


def image_digest(
    dtype: np.dtype[Any],
    shape: tuple[int, ...],
    affine: Array,
    modality: str | None,
    plane: str | None,
    correct_values: bool = False,
) -> hashlib.blake2b:
    """:func:`image_key` for whoever hashes in portions: update it with the voxels' bytes, little endian in C order."""
    digest = hashlib.blake2b(digest_size=20)
    facts: tuple[object, ...] = (dtype.newbyteorder("<").str, shape, modality, plane)
    digest.update(repr((*facts, "corrected") if correct_values else facts).encode())
    digest.update(np.ascontiguousarray(affine, dtype="<f8").tobytes())
    return digest
