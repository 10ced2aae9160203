"""What the worker holds, one engine and one image, and the requests that need them, one at a time on a thread of its own."""

from __future__ import annotations

import math
import threading
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from io import BytesIO
from pathlib import Path
from typing import Any, Protocol

import numpy as np

from progidiff.cards import AdapterCard
from progidiff.errors import CancelledError, InputError, ProGiDiffError, ProtocolError
from progidiff.system import is_out_of_memory
from progidiff.wire.frames import Array
from progidiff.wire.messages import (
    AdapterLoaded,
    AdapterUnloaded,
    Cancelled,
    DoneEvent,
    ErrorReply,
    Event,
    ImageInfo,
    ImageReply,
    Load,
    LoadAdapter,
    Loaded,
    ProgressEvent,
    ProposeRequest,
    Reply,
    Request,
    SegWritten,
    SetImage,
    UnloadAdapter,
    WriteSeg,
    image_key,
)
from progidiff.worker.pipes import BULK_LIMIT, LOG, Outbox, where


class Card(Protocol):
    """The part of a model card that the worker speaks of."""

    @property
    def model_id(self) -> str: ...

    @property
    def vocabulary(self) -> Sequence[str]: ...

    def to_dict(self) -> dict[str, Any]: ...


class LoadedEngine(Protocol):
    """One loaded model, maybe with an adapter, and its current image: ``progidiff.sampling.engine.Engine``."""

    @property
    def device(self) -> str: ...

    @property
    def card(self) -> Card: ...

    @property
    def adapter(self) -> AdapterCard | None: ...

    def load_adapter(self, folder: Path, even_if_worse: bool = False) -> AdapterCard:
        """Use an adapter; where it is refused (``AdapterError``), what was in use stays in use."""

    def unload_adapter(self) -> None:
        """Go back to the base model."""

    def set_image(
        self,
        array_kji: Array,
        affine: Array,
        modality: str | None,
        plane: str | None = None,
        correct_values: bool = False,
    ) -> ImageInfo:
        """Make a volume the current image."""

    def propose(self, request: ProposeRequest, emit: Callable[[Event], None], cancelled: Callable[[], bool]) -> None:
        """Emit proposals; raise ``CancelledError`` soon after ``cancelled()`` turns true."""


# Model folder (None: the bundled model), device, progress(phase, fraction) -> engine.
EngineFactory = Callable[[Path | None, str, Callable[[str, float], None]], LoadedEngine]


def load_engine(folder: Path | None, device: str, progress: Callable[[str, float], None]) -> LoadedEngine:
    """Load the real engine; torch is imported here and not before."""
    progress("starting", 0.0)
    from progidiff.sampling.engine import Engine

    engine: LoadedEngine = Engine.load(folder, device, progress)
    return engine


_LONGEST_DETAIL = 500


class RequestFailed(Exception):
    """A request that cannot be carried out; becomes an error reply."""

    def __init__(self, code: str, message: str, hint: str = "") -> None:
        super().__init__(message)
        self.reply = ErrorReply(code, message, hint)


class RequestRun:
    """One request at work."""

    def __init__(self, request_id: int, request: Request, outbox: Outbox) -> None:
        self.request_id = request_id
        self.request = request
        self._outbox = outbox
        self._cancelled = threading.Event()
        self._start = time.monotonic()

    @property
    def seconds(self) -> float:
        return time.monotonic() - self._start

    def cancel(self) -> None:
        self._cancelled.set()

    def cancelled(self) -> bool:
        return self._cancelled.is_set()

    def check(self) -> None:
        """Raise ``CancelledError`` if the request was cancelled."""
        if self._cancelled.is_set():
            raise CancelledError("The request was cancelled.")

    def emit(self, event: Event) -> None:
        """Send an event; waits while the client is far behind."""
        self._outbox.wait_for_room(BULK_LIMIT)
        self._outbox.post(event, self.request_id)


Work = Callable[[RequestRun], Reply]


class Compute:
    """Runs work on one long-lived thread (torch keeps its thread pools per calling thread)."""

    def __init__(self, outbox: Outbox) -> None:
        self._outbox = outbox
        self._changed = threading.Condition()
        self._run: RequestRun | None = None
        self._work: Work | None = None
        threading.Thread(target=self._loop, name="compute", daemon=True).start()

    @property
    def run(self) -> RequestRun | None:
        """The request at work."""
        return self._run

    def submit(self, request_id: int, request: Request, work: Work) -> bool:
        """Start ``work``, whose result is the final reply; false while another request is at work."""
        with self._changed:
            if self._run is not None:
                return False
            self._run = RequestRun(request_id, request, self._outbox)
            self._work = work
            self._changed.notify_all()
            return True

    def cancel(self, request_id: int | None) -> bool:
        """Cancel the request at work (only if it is ``request_id``, when given); whether there was one."""
        with self._changed:
            if self._run is None or request_id not in (None, self._run.request_id):
                return False
            self._run.cancel()
            return True

    def wait_idle(self, timeout: float) -> bool:
        """Wait until nothing is at work and the last reply is posted."""
        with self._changed:
            return self._changed.wait_for(lambda: self._run is None, timeout)

    def _loop(self) -> None:
        while True:
            with self._changed:
                self._changed.wait_for(lambda: self._work is not None)
                run, work = self._run, self._work
                self._work = None
            if run is not None and work is not None:
                self._carry_out(run, work)

    def _carry_out(self, run: RequestRun, work: Work) -> None:
        LOG.info("request %d: %s", run.request_id, type(run.request).__name__)
        reply = _reply_of(run, work)
        outcome = f"error {reply.code}" if isinstance(reply, ErrorReply) else type(reply).__name__.lower()
        LOG.info("request %d: %s after %.2f s", run.request_id, outcome, run.seconds)
        with self._changed:
            # Idle first: a client that has the final reply may ask for the next thing at once.
            self._run = None
            try:
                self._outbox.post(reply, run.request_id)
            except ProtocolError as error:
                self._outbox.post(ErrorReply("internal", str(error)), run.request_id)
            self._changed.notify_all()


def _reply_of(run: RequestRun, work: Work) -> Reply:
    try:
        return work(run)
    except CancelledError:
        return Cancelled()
    except RequestFailed as failure:
        return failure.reply
    except ProGiDiffError as error:
        return ErrorReply(error.code, str(error))
    except BaseException as error:  # the worker outlives whatever the engine does, a SystemExit too
        LOG.error("request %d: %s", run.request_id, where(error))
        if is_out_of_memory(error):
            return ErrorReply(
                "memory",
                "There was not enough memory for this request.",
                "Ask for fewer proposals or a smaller batch, or close other programs, then try again.",
            )
        return ErrorReply(
            "internal",
            f"The engine failed ({type(error).__name__}: {str(error)[:_LONGEST_DETAIL]}).",
            "Try again; if it happens again, report it with the log.",
        )


@dataclass(frozen=True)
class _CurrentImage:
    """The current image, kept so that another model can take it over without a second transfer."""

    key: str
    array: Array
    affine: Array
    modality: str | None
    plane: str | None
    correct_values: bool


class Session:
    """State behind the requests. Only the compute thread changes it."""

    def __init__(self, load_engine: EngineFactory) -> None:
        self._load_engine = load_engine
        self._engine: LoadedEngine | None = None
        self._image: _CurrentImage | None = None
        self._info: ImageInfo | None = None
        self.device: str | None = None

    @property
    def model_id(self) -> str | None:
        engine = self._engine
        return None if engine is None else engine.card.model_id

    @property
    def adapter_id(self) -> str | None:
        engine = self._engine
        adapter = None if engine is None else engine.adapter
        return None if adapter is None else adapter.adapter_id

    @property
    def image_key(self) -> str | None:
        image = self._image
        return None if image is None else image.key

    def load(self, request: Load, run: RequestRun) -> Reply:
        """Replace the model; the image stays."""

        def progress(phase: str, fraction: float) -> None:
            run.check()
            known = float(fraction) if math.isfinite(fraction) else 0.0
            run.emit(ProgressEvent(phase, min(max(known, 0.0), 1.0)))

        # The old model goes first: two large ones at a time may not fit.
        self._engine = self._info = self.device = None
        folder = None if request.folder is None else Path(request.folder)
        engine = self._load_engine(folder, request.device, progress)
        self._engine = engine
        self.device = engine.device
        card = engine.card
        LOG.info("model loaded on %s, %d targets", self.device, len(card.vocabulary))
        return Loaded(card.model_id, tuple(card.vocabulary), self.device, card.to_dict())

    def load_adapter(self, request: LoadAdapter, run: RequestRun) -> Reply:
        """Use an adapter on the loaded model, which is not loaded again; the image stays."""
        engine = self._need_engine()
        run.emit(ProgressEvent("loading the adapter", 0.0))
        card = engine.load_adapter(Path(request.folder), request.even_if_worse)
        LOG.info("adapter in use")
        return AdapterLoaded(card.adapter_id, card.to_dict())

    def unload_adapter(self, request: UnloadAdapter, run: RequestRun) -> Reply:
        """Go back to the base model; nothing happens where no adapter is in use."""
        self._need_engine().unload_adapter()
        LOG.info("base model in use")
        return AdapterUnloaded()

    def set_image(self, request: SetImage, run: RequestRun) -> Reply:
        """Make an image the current one; an image that is the current one already costs nothing."""
        engine = self._need_engine()
        if request.array is None or request.affine is None:
            if self._image is None or self._image.key != request.key:
                raise RequestFailed("unknown_image", "The worker does not hold this image.", "Send its pixels.")
            return ImageReply(self._image.key, self._apply_image(engine, self._image))
        key = image_key(request.array, request.affine, request.modality, request.plane, request.correct_values)
        if request.key not in (None, key):
            raise RequestFailed("input", "The image was damaged on its way to the worker.", "Try again.")
        if self._image is None or self._image.key != key:
            self._info = None
            said = (request.modality, request.plane, request.correct_values)
            self._image = _CurrentImage(key, request.array, request.affine, *said)
        LOG.info("image of %s, %s", "x".join(map(str, request.array.shape)), request.array.dtype)
        return ImageReply(key, self._apply_image(engine, self._image))

    def propose(self, request: ProposeRequest, run: RequestRun) -> Reply:
        """Run the engine on the current image."""
        engine = self._need_engine()
        if self._image is None:
            raise RequestFailed("no_image", "There is no image to work on.", "Set an image first.")
        vocabulary = engine.card.vocabulary
        known = [target if target in vocabulary else "(unknown)" for target in request.targets]
        LOG.info("%d proposals of %s", request.proposals, ", ".join(known))
        self._apply_image(engine, self._image)
        done: list[DoneEvent] = []

        def emit(event: Event) -> None:
            run.check()
            # The final reply is sent last, when it is sure that nothing fails or follows.
            if isinstance(event, DoneEvent):
                done.append(event)
            else:
                run.emit(event)

        engine.propose(request, emit, run.cancelled)
        if run.cancelled():
            return Cancelled()
        if not done:
            raise RequestFailed("internal", "The engine ended without a result.", "Try again.")
        return done[-1]

    def _need_engine(self) -> LoadedEngine:
        if self._engine is None:
            raise RequestFailed("no_model", "No model is loaded.", "Load a model first.")
        return self._engine

    def _apply_image(self, engine: LoadedEngine, image: _CurrentImage) -> ImageInfo:
        if self._info is None:
            try:
                self._info = engine.set_image(image.array, image.affine, image.modality, image.plane, image.correct_values)
            except BaseException:
                self._image = None
                raise
        return self._info


def write_seg(request: WriteSeg, run: RequestRun) -> SegWritten:
    """Accepted segments as DICOM SEG; needs neither a model nor an image.

    Raises:
        InputError: the images are not those of the volume, or not to be read, or highdicom is missing.
    """
    from progidiff.outputs.dicom_seg import dicom_seg, read_headers
    from progidiff.outputs.segmentation import Segment
    from progidiff.volumes.geometry import Geometry
    from progidiff.volumes.slicing import PackedMask

    if request.headers is None:
        headers = read_headers([Path(file) for file in request.files])
    else:
        ends = np.cumsum(request.header_sizes)
        parts = np.split(request.headers, ends[:-1])
        headers = read_headers([BytesIO(part.tobytes()) for part in parts])
    if [header.SOPInstanceUID for header in headers] != list(request.instances):
        raise InputError("The DICOM images were replaced or moved since they were loaded; load the series again.")
    run.check()
    _count, k, j, _bytes = request.masks.shape
    segments = [
        Segment(mask=PackedMask.from_bits(bits, request.columns), **vars(facts))
        for facts, bits in zip(request.segments, request.masks, strict=True)
    ]
    content = dicom_seg(segments, Geometry((request.columns, j, k), request.affine), headers, by_hand=True)
    return SegWritten(np.frombuffer(content, dtype=np.uint8))
