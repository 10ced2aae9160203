"""One request while it runs, and its rows in as few batches as fit: noise, denoising, decoding, the slices streamed out."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from itertools import groupby, islice

import numpy as np
import torch
from torch import Tensor

from progidiff.errors import CancelledError, ModelError
from progidiff.model.folder import ProGiDiffModel
from progidiff.proposals.proposals import Proposals
from progidiff.sampling.conditioning import Conditioner, predict, presence_threshold
from progidiff.sampling.denoise import decode, denoise, make_scheduler, proposal_noise
from progidiff.sampling.image import OUTSIDE, LoadedImage
from progidiff.system import is_out_of_memory
from progidiff.volumes.slicing import SlicePlan
from progidiff.wire.messages import Event, ProgressEvent, ProposeRequest, SliceEvent, WarningEvent

Emit = Callable[[Event], None]


class SamplingRun:
    """Bookkeeping of one request. A *row* is one proposal of one target on one slice.

    Args:
        request: the checked request.
        plan: how the image is cut into slices.
        slices: slice indices, in the order in which they are sampled.
        batch: most rows in one network call, to begin with.
        emit: receives the events.
        cancelled: asked often; true ends the request.

    Attributes:
        proposals: what has been sampled, by target.
        probabilities: of slices in the making, by slice and target: the sum over the proposals, float32 (rows, columns).
        tidied: whether pieces that are not the organ are dropped in the end; the masks are held until then. On one slice
            nobody can tell: what is apart on it may be joined on the next.
    """

    def __init__(
        self,
        request: ProposeRequest,
        plan: SlicePlan,
        slices: list[int],
        batch: int,
        emit: Emit,
        cancelled: Callable[[], bool],
    ) -> None:
        self.request = request
        self.slices = slices
        self.batch = batch
        self.emit = emit
        self.proposals = {target: Proposals(target, plan, range(plan.count)) for target in request.targets}
        self.probabilities: dict[tuple[int, str], np.ndarray] = {}
        self.tidied = len(slices) > 1 and not request.keep_pieces
        self.rows_total = len(slices) * len(request.targets) * request.proposals
        self.slices_done = 0
        self._cancelled = cancelled
        self._began = time.monotonic()
        self._first: float | None = None
        self._rows_done = 0
        self._timing = {"encode_s": 0.0, "denoise_s": 0.0, "decode_s": 0.0}

    @property
    def rows_done(self) -> int:
        """Rows that have been sent."""
        return self._rows_done

    def check(self) -> None:
        """End the request if the user wants it.

        Raises:
            CancelledError: they do.
        """
        if self._cancelled():
            raise CancelledError("The request was cancelled.")

    def after_step(self, rows: int, share: float, index: int, target: str) -> bool:
        """Report that ``share`` of the steps of a batch of ``rows`` are done; returns whether the request is cancelled."""
        self.progress("sampling", index, target, rows * share)
        return self._cancelled()

    def sent(self, rows: int) -> None:
        """Count rows whose masks have been sent."""
        if self._first is None:
            self._first = time.monotonic() - self._began
        self._rows_done += rows

    def progress(self, phase: str, index: int | None = None, target: str | None = None, running: float = 0.0) -> None:
        """Report how far the request is, ``running`` rows of the current batch included, and the time left at this pace."""
        share = min((self._rows_done + running) / self.rows_total, 1.0)
        spent = time.monotonic() - self._began
        eta = spent * (1 - share) / share if share > 0 else None
        self.emit(ProgressEvent(phase, share, index, self.slices_done, len(self.slices), target, eta))

    def halve(self, rows: int) -> None:
        """Go on with half of the ``rows`` for which memory was too small.

        Raises:
            ModelError: it was too small for a single one.
        """
        if rows == 1:
            raise ModelError(
                "There is not enough memory for a single sample; "
                "close other programs, choose the device cpu, or take a smaller model."
            )
        self.batch = rows // 2
        few = "1 sample" if self.batch == 1 else f"{self.batch} samples"
        self.emit(WarningEvent("memory", f"Memory ran out; going on with {few} at a time."))

    @contextmanager
    def timed(self, part: str) -> Iterator[None]:
        """Add the time of a block to a part of the timing."""
        began = time.monotonic()
        try:
            yield
        finally:
            self._timing[part] += time.monotonic() - began

    def timing(self) -> dict[str, float]:
        """Seconds by part, to the first proposal and in all."""
        return {**self._timing, "first_proposal_s": self._first or 0.0, "total_s": time.monotonic() - self._began}


Row = tuple[int, str, int]  # slice, target, proposal

#: Samples in the very first batch of a request that leaves the batch size open, so that something is seen early.
FIRST_BATCH = 2


@dataclass(frozen=True)
class _Block:
    """Consecutive proposals of one target on one slice, bool (n, H, W), and the sum of their probabilities (H, W)."""

    index: int
    target: str
    first: int
    masks: np.ndarray
    probability: np.ndarray


class Sampler:
    """Samples proposals on one image.

    Args:
        model: the loaded model.
        image: the current image.
        conditioner: codes of its slices and of prompts.
    """

    def __init__(self, model: ProGiDiffModel, image: LoadedImage, conditioner: Conditioner) -> None:
        self._model = model
        self._image = image
        self._conditioner = conditioner

    def stream(self, run: SamplingRun, slices: list[int], wanted: Mapping[str, range], keep: bool = False) -> None:
        """Sample the proposals ``wanted`` of each target on ``slices``, and emit every slice as it is decoded.

        Rows run slice by slice, so that a slice is complete before much of the next one is begun, and only slices in the
        making are held.

        Args:
            run: the request.
            slices: slice indices.
            wanted: proposals by target.
            keep: further proposals on these slices will follow; otherwise a slice is counted as done when it is complete,
                and its masks are let go of where they are not tidied later.
        """
        last_target = list(wanted)[-1]
        rows: Iterator[Row] = ((s, t, p) for s in slices for t, proposals in wanted.items() for p in proposals)
        pending: list[Row] = []
        while True:
            early = run.rows_done == 0 and run.request.batch_size is None
            size = min(run.batch, FIRST_BATCH) if early else run.batch
            pending += islice(rows, max(0, size - len(pending)))
            if not pending:
                return
            batch = pending[:size]
            parts = self._sampled(run, batch)
            if parts is None:
                run.halve(len(batch))
                continue
            pending = pending[len(batch) :]
            for part in parts:
                run.check()
                last = part.first + len(part.masks) == wanted[part.target].stop
                self._send(run, part, last)
                if last and not keep:
                    del run.probabilities[part.index, part.target]
                    if not run.tidied:
                        run.proposals[part.target].let_go(part.index)
                    run.slices_done += part.target == last_target
            run.progress("sampling", batch[-1][0], batch[-1][1])

    def _send(self, run: SamplingRun, part: _Block, last: bool) -> None:
        """Gather a part and send it; the last one of a block with what all proposals of the slice so far say."""
        place = (part.index, part.target)
        before = run.probabilities.get(place)
        total = run.probabilities[place] = part.probability if before is None else before + part.probability
        mean = np.asarray(total / (part.first + len(part.masks)), np.float32) if last else None
        event = SliceEvent(part.target, part.index, part.first, part.masks, mean_probability=mean)
        run.proposals[part.target].add(event)
        run.emit(event)
        run.sent(len(part.masks))

    def _sampled(self, run: SamplingRun, batch: list[Row]) -> list[_Block] | None:
        """The batch at the slices' own pixels; ``None`` where memory is too small for it."""
        try:
            return self._parts(run, batch)
        except Exception as error:
            if not is_out_of_memory(error):
                raise
        # Only here has the error gone, and with it the tensors that its traceback held.
        if torch.cuda.is_available():
            torch.cuda.empty_cache()
        return None

    @torch.inference_mode()
    def _parts(self, run: SamplingRun, batch: list[Row]) -> list[_Block]:
        with run.timed("encode_s"):
            shown = [row for row in batch if self._is_shown(run, row)]
        logits = dict(zip(shown, self._logits(run, shown), strict=True)) if shown else {}
        parts = []
        with run.timed("decode_s"):
            for (index, target), group in groupby(batch, key=lambda row: row[:2]):
                run.check()
                rows = list(group)
                masks = np.zeros((len(rows), *self._image.grid.shape_rc), dtype=bool)
                probability = np.zeros(self._image.grid.shape_rc, dtype=np.float32)
                if drawn := [place for place, row in enumerate(rows) if row in logits]:
                    chosen = torch.stack([logits[rows[place]] for place in drawn])
                    native = self._image.grid.from_model(chosen, outside=OUTSIDE)
                    masks[drawn] = (native > 0).cpu().numpy()
                    probability = torch.sigmoid(native).sum(0).cpu().numpy()
                parts.append(_Block(index, target, rows[0][2], masks, probability))
        return parts

    def _is_shown(self, run: SamplingRun, row: Row) -> bool:
        """Whether a proposal shows its target on a slice; where it does not, nothing is sampled."""
        if run.request.everywhere:
            return True
        run.check()
        index, target, proposal = row
        presence = self._conditioner.presence(index, partial(self._image.pixels, index), self._image.grid.pixel_mm).get(
            target, 1.0
        )
        return presence > presence_threshold(proposal)

    def _logits(self, run: SamplingRun, batch: list[Row]) -> Tensor:
        """Mask logits (B, S, S) of a batch of rows."""
        model, request, image = self._model, run.request, self._image
        with run.timed("encode_s"):
            prompts = {t: self._conditioner.prompt(t, image.modality) for t in dict.fromkeys(row[1] for row in batch)}
            hints: dict[tuple[int, str], Tensor] = {}
            for index, target in dict.fromkeys(row[:2] for row in batch):
                run.check()
                features = self._conditioner.features(index, partial(image.pixels, index))
                hints[index, target] = self._conditioner.hint(features, prompts[target])
            hint = torch.cat([hints[index, target] for index, target, _ in batch])
            states = torch.cat([prompts[target].states for _, target, _ in batch])
            shape = (model.unet.config.in_channels, *hint.shape[-2:])
            fields = [proposal_noise(request.seed, t, p, image.position_mm(s), shape) for s, t, p in batch]
            noise = torch.stack(fields).to(model.device)
            scheduler = make_scheduler(model.scheduler, request.scheduler, request.steps)
        run.check()
        done = 0

        def after_step() -> bool:
            nonlocal done
            done += 1
            return run.after_step(len(batch), done / request.steps, *batch[0][:2])

        with run.timed("denoise_s"):
            latents = denoise(lambda z, t: predict(model, z.to(model.dtype), t, states, hint), noise, scheduler, after_step)
        with run.timed("decode_s"):
            return decode(model, latents)
