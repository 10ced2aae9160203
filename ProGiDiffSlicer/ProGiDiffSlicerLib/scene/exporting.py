"""Accepted segments out to DICOM: a DICOM SEG in Slicer's DICOM database, beside the images of their volume.

The worker's Python writes it. On this computer it reads the images itself; a worker on another one is sent their headers.
"""

from __future__ import annotations

import os
import uuid
from collections.abc import Callable, Generator
from contextlib import suppress
from typing import Any

import numpy as np
import slicer
from slicer.i18n import tr as _

from progidiff.errors import InputError
from progidiff.wire.conversation import WorkerFailure
from progidiff.wire.messages import SegmentFacts, SegWritten, WriteSeg
from ProGiDiffSlicerLib.idle import IdleQueue, Task
from ProGiDiffSlicerLib.scene.examples import Slices, examine, mask_on_volume, stamp, volume_of
from ProGiDiffSlicerLib.scene.labelmaps import segment_labelmap, segments_of, values_of
from ProGiDiffSlicerLib.scene.provenance import PROVENANCE_TAGS, get_tag
from ProGiDiffSlicerLib.signals import Signal
from ProGiDiffSlicerLib.worker.calls import Call
from ProGiDiffSlicerLib.worker.client import WorkerClient

INSTANCES = "DICOM.instanceUIDs"
_TERMINOLOGY = "TerminologyEntry"
# Asked of the database between two events of the application.
_AT_A_TIME = 20


class Exporting:
    """Writes one segmentation at a time.

    Attributes:
        busy: whether something is being written.
        changed: Signal(): ``busy`` is different.
        told: Signal(sentence) for the user, at the end.
    """

    def __init__(self, idle: IdleQueue, client: WorkerClient, elsewhere: Callable[[], bool]) -> None:
        """``elsewhere``: whether the worker may run on a computer that does not see the files of this one."""
        self.changed = Signal()
        self.told = Signal()
        self._idle = idle
        self._client = client
        self._elsewhere = elsewhere
        self._task: Task | None = None
        self._call: Call | None = None

    @property
    def busy(self) -> bool:
        return self._task is not None or self._call is not None

    def obstacle(self, segmentation: Any, segment_id: str, input_volume: Any) -> str:
        """Why nothing can be exported, in one sentence; "" where it can."""
        if self.busy:
            return _("A DICOM SEG is being written.")
        try:
            _source(segmentation, segment_id, input_volume)
        except InputError as error:
            return str(error)
        return ""

    def export(self, segmentation: Any, segment_id: str, input_volume: Any) -> None:
        """Write all segments of a segmentation; ``told`` says how it went.

        Args:
            segmentation: the vtkMRMLSegmentationNode.
            segment_id: the chosen segment: its volume is the one whose images are referred to.
            input_volume: the volume that is chosen, taken where a segment does not say for which it was accepted.

        Raises:
            InputError: what :meth:`obstacle` says.
        """
        why = self.obstacle(segmentation, segment_id, input_volume)
        if why:
            raise InputError(why)
        steps = _request(segmentation, segment_id, input_volume, self._elsewhere())
        self._task = self._idle.submit(steps, self._send, self._on_not_prepared)
        self.changed.emit()

    def cleanup(self) -> None:
        """End what is under way; nothing half-written is left."""
        if self._task is not None:
            self._task.cancel()
        if self._call is not None:
            self._call.cancel()
        self._task = self._call = None
        self.changed.clear()
        self.told.clear()

    def _send(self, request: WriteSeg) -> None:
        self._task = None
        self._call = call = self._client.write_seg(request)
        call.succeeded.connect(lambda reply: self._on_written(reply, len(request.segments)))
        call.failed.connect(self._on_failed)
        call.cancelled.connect(lambda: self._end(_("The export was cancelled; nothing was written.")))

    def _on_written(self, reply: SegWritten, count: int) -> None:
        try:
            path = _store(bytes(reply.content))
        except InputError as error:
            self._end(str(error))
            return
        text = _(
            "{count} segments are in Slicer's DICOM database as DICOM SEG ({file}), in the study of their images; "
            "the DICOM module sends or copies it."
        )
        self._end(text.format(count=count, file=os.path.basename(path)))

    def _on_failed(self, failure: WorkerFailure) -> None:
        self._end(failure.message)

    def _on_not_prepared(self, error: Exception) -> None:
        if isinstance(error, InputError):
            self._end(str(error))
        elif isinstance(error, MemoryError):
            self._end(_("There is not enough memory to export this; close other volumes."))
        else:
            self._end("")
            raise error

    def _end(self, sentence: str) -> None:
        self._task = self._call = None
        self.changed.emit()
        if sentence:
            self.told.emit(sentence)


def _source(segmentation: Any, segment_id: str, input_volume: Any) -> tuple[Any, list[str]]:
    """The volume of a segment, and the UIDs of its DICOM images.

    Raises:
        InputError: there is no segment, or its volume is not from the database; the sentence says what to do.
    """
    segment = None if segmentation is None else segmentation.GetSegmentation().GetSegment(segment_id)
    if segment is None:
        raise InputError(_("Accept a proposal, or choose a segmentation with a segment, to export it."))
    if segment_labelmap(segment) is None:
        raise InputError(
            _("{segment} is not made of voxels; make Binary labelmap its source.").format(segment=segment.GetName())
        )
    volume, _step = volume_of(segmentation, segment_id, segment, input_volume)
    uids = (volume.GetAttribute(INSTANCES) or "").split()
    database = getattr(slicer, "dicomDatabase", None)
    if not uids:
        text = _("{volume} is not from Slicer's DICOM database; add its series there and load it with the DICOM module.")
        raise InputError(text.format(volume=volume.GetName()))
    if database is None or not database.isOpen or not database.fileForInstance(uids[0]):
        text = _("The images of {volume} are not in Slicer's DICOM database any more; import its series again.")
        raise InputError(text.format(volume=volume.GetName()))
    return volume, uids


def _request(segmentation: Any, segment_id: str, input_volume: Any, elsewhere: bool) -> Generator[None, None, WriteSeg]:
    """Everything that the worker needs, gathered in portions.

    Raises:
        InputError: a segment does not lie on the volume, or an image is gone.
    """
    volume, uids = _source(segmentation, segment_id, input_volume)
    facts, masks, affine, columns = [], [], np.eye(4), 0
    for identifier, segment in list(segments_of(segmentation)):
        example = examine(segmentation, identifier, input_volume, Slices.VOLUME, target=segment.GetName())
        if example.volume_node is not volume:
            text = _("{segment} was accepted for {other}, not for {volume}; move it into a segmentation of its own.")
            names = {"segment": segment.GetName(), "other": example.volume_node.GetName(), "volume": volume.GetName()}
            raise InputError(text.format(**names))
        before = stamp(segment)
        mask, _occupied = yield from mask_on_volume(example, values_of(segment_labelmap(segment)))
        bits = np.empty((*mask.shape[:2], (mask.shape[2] + 7) // 8), dtype=np.uint8)
        for k, plane in enumerate(mask):
            bits[k] = np.packbits(plane, axis=-1)
            yield
        if stamp(segment) != before:
            text = _("{segment} was changed meanwhile; export it again.")
            raise InputError(text.format(segment=segment.GetName()))
        # Without parent transforms: where the images lie, wherever the volume has been moved since.
        affine, columns = example.volume.local_affine, mask.shape[2]
        masks.append(bits)
        tags = {name: get_tag(segment, name) for name in PROVENANCE_TAGS}
        facts.append(
            SegmentFacts(
                segment.GetName(),
                tuple(segment.GetColor()),
                get_tag(segment, _TERMINOLOGY) or "",
                {name: text for name, text in tags.items() if text},
                identifier,
            )
        )
    files = []
    for number, uid in enumerate(uids):
        files.append(slicer.dicomDatabase.fileForInstance(uid))
        if not files[-1] or not os.path.isfile(files[-1]):
            text = _("An image of {volume} is not in Slicer's DICOM database any more; import its series again.")
            raise InputError(text.format(volume=volume.GetName()))
        if number % _AT_A_TIME == 0:
            yield
    stack = np.stack(masks)
    if not elsewhere:
        return WriteSeg(tuple(facts), stack, columns, affine, tuple(uids), tuple(files))
    headers = []
    for file in files:
        headers.append(_header(file))
        yield
    return WriteSeg(
        tuple(facts),
        stack,
        columns,
        affine,
        tuple(uids),
        headers=np.frombuffer(b"".join(headers), dtype=np.uint8),
        header_sizes=tuple(map(len, headers)),
    )


def _header(path: str) -> bytes:
    """A DICOM file up to its pixels.

    Raises:
        InputError: it cannot be read.
    """
    import pydicom

    try:
        with open(path, "rb") as stream:
            pydicom.dcmread(stream, stop_before_pixels=True, force=True)
            size = stream.tell()
            stream.seek(0)
            return stream.read(size)
    except Exception as error:  # whatever a damaged file makes the library raise
        text = _("The DICOM image {file} cannot be read; export or copy the series again.")
        raise InputError(text.format(file=os.path.basename(path))) from error


def _store(content: bytes) -> str:
    """Add a file to the database, in its folder, so that it leaves with its entry; the file's path.

    Raises:
        InputError: it cannot be written, or the database refuses it.
    """
    database = slicer.dicomDatabase
    folder = os.path.join(database.databaseDirectory, "dicom", "ProGiDiff")
    path = os.path.join(folder, f"{uuid.uuid4().hex}.dcm")
    try:
        os.makedirs(folder, exist_ok=True)
        with open(path, "xb") as stream:
            stream.write(content)
        database.prepareInsert()
        database.insert(path, False, False)
        known = bool(database.instanceForFile(path))
    except OSError as error:
        _remove(path)
        text = _(
            "The DICOM SEG cannot be written to {folder} ({reason}); free space there or choose another database folder."
        )
        raise InputError(text.format(folder=folder, reason=error.strerror or error)) from error
    if not known:
        _remove(path)
        raise InputError(
            _("Slicer's DICOM database did not take the DICOM SEG; open the DICOM module, repair it and try again.")
        )
    return path


def _remove(path: str) -> None:
    with suppress(OSError):
        os.remove(path)
