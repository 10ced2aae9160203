"""What the worker holds: one engine and one image, and the requests that need them."""

from __future__ import annotations

import math
from dataclasses import dataclass
from io import BytesIO
from pathlib import Path

import numpy as np

from progidiff.errors import InputError
from progidiff.wire.frames import Array
from progidiff.wire.messages import (
    AdapterLoaded,
    AdapterUnloaded,
    Cancelled,
    DoneEvent,
    Event,
    ImageInfo,
    ImageReply,
    Load,
    LoadAdapter,
    Loaded,
    ProgressEvent,
    ProposeRequest,
    Reply,
    SegWritten,
    SetImage,
    UnloadAdapter,
    WriteSeg,
    image_key,
)
from progidiff.worker.compute import RequestFailed, Run
from progidiff.worker.engine_api import Engine, EngineFactory
from progidiff.worker.log import LOG


@dataclass(frozen=True)
class _Image:
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
        self._engine: Engine | None = None
        self._image: _Image | None = None
        self._info: ImageInfo | None = None
        self.device: str | None = None

    @property
    def model_id(self) -> str | None:
        engine = self._engine
        return None if engine is None else engine.card.model_id

    @property
    def adapter_id(self) -> str | None:
        adapter = getattr(self._engine, "adapter", None)
        return None if adapter is None else adapter.adapter_id

    @property
    def image_key(self) -> str | None:
        image = self._image
        return None if image is None else image.key

    def load(self, request: Load, run: Run) -> Reply:
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
        self.device = str(getattr(engine, "device", request.device))
        card = engine.card
        LOG.info("model loaded on %s, %d targets", self.device, len(card.vocabulary))
        return Loaded(card.model_id, tuple(card.vocabulary), self.device, card.to_dict())

    def load_adapter(self, request: LoadAdapter, run: Run) -> Reply:
        """Use an adapter on the loaded model, which is not loaded again; the image stays."""
        engine = self._need_engine()
        run.emit(ProgressEvent("loading the adapter", 0.0))
        card = engine.load_adapter(Path(request.folder), request.even_if_worse)
        LOG.info("adapter in use")
        return AdapterLoaded(card.adapter_id, card.to_dict())

    def unload_adapter(self, request: UnloadAdapter, run: Run) -> Reply:
        """Go back to the base model; nothing happens where no adapter is in use."""
        self._need_engine().unload_adapter()
        LOG.info("base model in use")
        return AdapterUnloaded()

    def set_image(self, request: SetImage, run: Run) -> Reply:
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
            self._image = _Image(key, request.array, request.affine, request.modality, request.plane, request.correct_values)
        LOG.info("image of %s, %s", "x".join(map(str, request.array.shape)), request.array.dtype)
        return ImageReply(key, self._apply_image(engine, self._image))

    def propose(self, request: ProposeRequest, run: Run) -> Reply:
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

    def _need_engine(self) -> Engine:
        if self._engine is None:
            raise RequestFailed("no_model", "No model is loaded.", "Load a model first.")
        return self._engine

    def _apply_image(self, engine: Engine, image: _Image) -> ImageInfo:
        if self._info is None:
            try:
                self._info = engine.set_image(image.array, image.affine, image.modality, image.plane, image.correct_values)
            except BaseException:
                self._image = None
                raise
        return self._info


def write_seg(request: WriteSeg, run: Run) -> SegWritten:
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
