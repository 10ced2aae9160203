"""Requests: what a client asks of the worker. Pure functions between dataclasses and frames."""

from __future__ import annotations

import hashlib
import re
from collections.abc import Callable
from dataclasses import asdict, dataclass, field
from typing import Any, Literal, get_args

import numpy as np

from progidiff.errors import ProtocolError
from progidiff.events import ProposeRequest, RankingMethod, SchedulerName
from progidiff.protocol.arrays import Array
from progidiff.protocol.fields import MAX_ID, Fields, plain
from progidiff.protocol.frames import Frame

PROTOCOL_VERSION = 1

Device = Literal["auto", "cpu", "cuda"]

_MODALITY = re.compile(r"[A-Z0-9]{2,16}")
_PLANES = ("axial", "coronal", "sagittal")
_MAX_TARGETS = 64
_MAX_PROPOSALS = 1024
_MAX_PROMPT = 10_000
_MAX_SEGMENTS = 1024
_MAX_INSTANCES = 100_000


@dataclass(frozen=True)
class Hello:
    """Who are you, and what can you do? Answered before torch is imported."""


@dataclass(frozen=True)
class Ping:
    """Are you there?"""


@dataclass(frozen=True)
class Status:
    """State and memory, now."""


@dataclass(frozen=True)
class Shutdown:
    """Cancel what runs, say goodbye and end."""


@dataclass(frozen=True)
class Cancel:
    """Cancel the running request, or only the request with id ``request``."""

    request: int | None = None


@dataclass(frozen=True)
class Load:
    """Load a model folder as the worker's machine sees it (``None``: the bundled model)."""

    folder: str | None = None
    device: Device = "auto"


@dataclass(frozen=True, eq=False)
class SetImage:
    """Make a volume the current one.

    Attributes:
        array: (K, J, I) numbers; ``None`` asks for the image with ``key`` that the worker may still hold.
        affine: 4x4 float64, IJK -> RAS in mm; ``None`` together with ``array``.
        modality: "CT" or "MR", another code of DICOM where that is what the image says to be, or ``None``.
        key: :func:`image_key` of the rest; required without ``array``.
        correct_values: take values of a CT that cannot be Hounsfield units for what they look like.
    """

    array: Array | None
    affine: Array | None
    modality: str | None = None
    plane: str | None = None
    key: str | None = None
    correct_values: bool = False


@dataclass(frozen=True)
class Propose:
    """Proposals on the current image, of ``request.targets`` or else of what ``prompt`` (free text) names."""

    request: ProposeRequest
    prompt: str | None = None


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


@dataclass(frozen=True)
class SegmentFacts:
    """What a segment is, beside its mask: as in :class:`progidiff.outputs.segmentation.Segment`."""

    name: str
    color: tuple[float, float, float]
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

    segments: tuple[SegmentFacts, ...]
    masks: Array
    columns: int
    affine: Array
    instances: tuple[str, ...]
    files: tuple[str, ...] = ()
    headers: Array | None = None
    header_sizes: tuple[int, ...] = ()


Request = Hello | Ping | Status | Shutdown | Cancel | Load | SetImage | Propose | LoadAdapter | UnloadAdapter | WriteSeg


class RequestError(ProtocolError):
    """A request that cannot be understood.

    Attributes:
        code: ``"frame"``, ``"version"``, ``"type"`` or ``"schema"``.
        request_id: id of the request if that much could be read.
    """

    def __init__(self, message: str, code: str, request_id: int | None) -> None:
        super().__init__(message)
        self.code = code
        self.request_id = request_id


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


def request_to_frame(request: Request, request_id: int) -> Frame:
    """Frame of a request, to be written with :func:`~progidiff.protocol.frames.encode_frame`."""
    header: dict[str, Any] = {"type": _NAMES[type(request)], "v": PROTOCOL_VERSION, "id": request_id}
    arrays: dict[str, Array] = {}
    if isinstance(request, SetImage):
        header |= {"modality": request.modality, "plane": request.plane, "key": request.key}
        if request.correct_values:  # a worker that does not know it is only told where it matters
            header["correct_values"] = True
        if request.array is not None and request.affine is not None:
            arrays = {"array": request.array, "affine": np.asarray(request.affine, dtype=np.float64)}
    elif isinstance(request, Propose):
        header |= plain(asdict(request.request))
        if request.prompt is not None:
            header["prompt"] = request.prompt
            del header["targets"]
    elif isinstance(request, WriteSeg):
        arrays = {"masks": request.masks, "affine": np.asarray(request.affine, dtype=np.float64)}
        if request.headers is not None:
            arrays["headers"] = request.headers
        names = ("segments", "columns", "instances", "files", "header_sizes")
        header |= plain({name: getattr(request, name) for name in names} | {"segments": list(map(asdict, request.segments))})
    else:
        header |= plain(asdict(request))
    return Frame(header, arrays)


def frame_to_request(frame: Frame) -> tuple[int, Request]:
    """Id and request of a frame.

    Raises:
        RequestError: the frame is broken, of another version, of unknown type, or breaks the type's schema.
    """
    request_id = frame.header.get("id")
    if not isinstance(request_id, int) or isinstance(request_id, bool) or not 0 <= request_id <= MAX_ID:
        request_id = None
    if frame.problem is not None:
        raise RequestError(frame.problem, "frame", request_id)
    version = frame.header.get("v")
    if version != PROTOCOL_VERSION or isinstance(version, bool):
        raise RequestError(
            f"This worker speaks version {PROTOCOL_VERSION} of the protocol; install the same version on both sides.",
            "version",
            request_id,
        )
    kind = frame.header.get("type")
    if not isinstance(kind, str) or kind not in _READERS:
        raise RequestError(
            "The worker does not know this type of request; install the same version on both sides.", "type", request_id
        )
    if request_id is None:
        raise RequestError("A request needs an id, a whole number from 0.", "schema", None)
    fields = Fields(frame.header, kind)
    try:
        request = _READERS[kind](fields, frame.arrays)
        fields.nothing_else()
        if frame.arrays and not isinstance(request, SetImage | WriteSeg):
            raise ProtocolError(f"A {kind} message carries no arrays.")
    except ProtocolError as error:
        raise RequestError(str(error), "schema", request_id) from None
    return request_id, request


def _read_cancel(fields: Fields, arrays: dict[str, Array]) -> Cancel:
    return Cancel(fields.integer("request", 0, MAX_ID, default=None))


def _read_load(fields: Fields, arrays: dict[str, Array]) -> Load:
    return Load(fields.text("folder", default=None), fields.choice("device", get_args(Device), default="auto"))


def _read_set_image(fields: Fields, arrays: dict[str, Array]) -> SetImage:
    modality = fields.text("modality", default=None)
    if modality is not None and not _MODALITY.fullmatch(modality):
        raise fields.wrong("modality", "a code of DICOM, such as CT or MR")
    plane = fields.choice("plane", _PLANES, default=None)
    key = fields.text("key", default=None, longest=128)
    correct = fields.boolean("correct_values", default=False)
    if not arrays:
        if key is None:
            raise ProtocolError("A set_image message needs the arrays named array and affine, or the key of an image.")
        return SetImage(None, None, modality, plane, key, correct)
    if set(arrays) != {"array", "affine"}:
        raise ProtocolError("A set_image message needs exactly the arrays named array and affine.")
    array, affine = arrays["array"], arrays["affine"]
    if array.ndim != 3 or array.size == 0 or array.dtype == np.bool_:
        raise ProtocolError("The image must be a non-empty volume of numbers with three axes.")
    if affine.shape != (4, 4) or affine.dtype.kind != "f" or not np.isfinite(affine).all():
        raise ProtocolError("The affine of an image must be 4 x 4 finite floating point numbers.")
    return SetImage(array, affine, modality, plane, key, correct)


def _read_propose(fields: Fields, arrays: dict[str, Array]) -> Propose:
    defaults = ProposeRequest(())
    targets = fields.texts("targets", _MAX_TARGETS, longest=200, default=None)
    prompt = fields.text("prompt", default=None, longest=_MAX_PROMPT)
    if (targets is None) == (prompt is None) or targets == ():
        raise ProtocolError("A propose message needs either targets, at least one, or a prompt.")
    slices = fields.integers("slices", 0, 2**31, default=None)
    if slices is not None and (len(slices) != 2 or slices[0] >= slices[1]):
        raise fields.wrong("slices", "a start and a larger stop")
    return Propose(
        ProposeRequest(
            targets=targets or (),
            proposals=fields.integer("proposals", 1, _MAX_PROPOSALS, default=defaults.proposals),
            top_k=fields.integer("top_k", 1, _MAX_PROPOSALS, default=defaults.top_k),
            steps=fields.integer("steps", 1, 100, default=defaults.steps),
            scheduler=fields.choice("scheduler", get_args(SchedulerName), default=defaults.scheduler),
            seed=fields.integer("seed", 0, 2**63 - 1, default=defaults.seed),
            slices=None if slices is None else (slices[0], slices[1]),
            adaptive=fields.boolean("adaptive", default=defaults.adaptive),
            batch_size=fields.integer("batch_size", 1, 65_536, default=None),
            ranking=fields.choice("ranking", get_args(RankingMethod), default=defaults.ranking),
            everywhere=fields.boolean("everywhere", default=defaults.everywhere),
        ),
        prompt,
    )


def _read_write_seg(fields: Fields, arrays: dict[str, Array]) -> WriteSeg:
    entries = fields.anything("segments")
    if not isinstance(entries, list) or not 0 < len(entries) <= _MAX_SEGMENTS:
        raise fields.wrong("segments", f"a list of 1 to {_MAX_SEGMENTS} segments")
    segments = tuple(_read_segment(entry) for entry in entries)
    columns = fields.integer("columns", 1, 2**31)
    masks, affine, headers = arrays.get("masks"), arrays.get("affine"), arrays.get("headers")
    if masks is None or masks.dtype != np.uint8 or masks.ndim != 4 or masks.size == 0:
        raise ProtocolError("A write_seg message needs the array masks, uint8 with four axes.")
    if (masks.shape[0], masks.shape[3]) != (len(segments), (columns + 7) // 8):
        raise ProtocolError("The masks of a write_seg message must be one for each segment, with one bit for each column.")
    if affine is None or affine.shape != (4, 4) or affine.dtype.kind != "f" or not np.isfinite(affine).all():
        raise ProtocolError("The affine of an image must be 4 x 4 finite floating point numbers.")
    instances = fields.texts("instances", _MAX_INSTANCES, longest=64)
    files = fields.texts("files", _MAX_INSTANCES, default=())
    sizes = fields.integers("header_sizes", 1, 2**31, default=[])
    if headers is None:
        complete = len(files) == len(instances) and not sizes
    else:
        complete = headers.dtype == np.uint8 and headers.ndim == 1 and sum(sizes) == headers.size
        complete = complete and len(sizes) == len(instances) and not files
    if not complete or len(arrays) != (2 if headers is None else 3):
        raise ProtocolError("A write_seg message needs either the file or the header of each instance.")
    return WriteSeg(segments, masks, columns, affine, instances, files, headers, tuple(sizes))


def _read_segment(entry: object) -> SegmentFacts:
    if not isinstance(entry, dict):
        raise ProtocolError("A segment of a write_seg message must be an object.")
    fields = Fields(entry, "write_seg")
    color, tags = fields.numbers("color"), fields.mapping("tags")
    if len(color) != 3 or not all(0 <= part <= 1 for part in color):
        raise fields.wrong("color", "three numbers from 0 to 1")
    if not all(isinstance(text, str) for text in tags.values()):
        raise fields.wrong("tags", "texts by name")
    return SegmentFacts(
        fields.text("name"), (color[0], color[1], color[2]), fields.text("terminology"), tags, str(entry.get("id", ""))
    )


_NAMES: dict[type[Request], str] = {
    Hello: "hello",
    Ping: "ping",
    Status: "status",
    Shutdown: "shutdown",
    Cancel: "cancel",
    Load: "load",
    SetImage: "set_image",
    Propose: "propose",
    LoadAdapter: "load_adapter",
    UnloadAdapter: "unload_adapter",
    WriteSeg: "write_seg",
}
_READERS: dict[str, Callable[[Fields, dict[str, Array]], Request]] = {
    "hello": lambda fields, arrays: Hello(),
    "ping": lambda fields, arrays: Ping(),
    "status": lambda fields, arrays: Status(),
    "shutdown": lambda fields, arrays: Shutdown(),
    "cancel": _read_cancel,
    "load": _read_load,
    "set_image": _read_set_image,
    "propose": _read_propose,
    "load_adapter": lambda fields, arrays: LoadAdapter(
        fields.text("folder"), fields.boolean("even_if_worse", default=False)
    ),
    "unload_adapter": lambda fields, arrays: UnloadAdapter(),
    "write_seg": _read_write_seg,
}
CAPABILITIES = tuple(sorted(_READERS))
