"""The engine: one loaded model, one current image, and requests for proposals on it."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from itertools import groupby, islice
from pathlib import Path
from typing import Literal

import numpy as np
import torch
from torch import Tensor

from progidiff.errors import CancelledError, InputError, ModelError
from progidiff.events import (
    DoneEvent,
    Event,
    ImageInfo,
    ProgressEvent,
    ProposeRequest,
    SliceEvent,
    WarningEvent,
)
from progidiff.memory import is_out_of_memory, peak_memory_mb
from progidiff.model.card import Modality, ModelCard
from progidiff.model.folder import ProGiDiffModel, load_model
from progidiff.protocol import image_key
from progidiff.ranking.stopping import AdaptiveStopping
from progidiff.sampling.conditioning import Conditioner
from progidiff.sampling.denoise import decode, denoise, make_scheduler
from progidiff.sampling.grid import ModelGrid, body_centre
from progidiff.sampling.intensity import guess_modality, normaliser
from progidiff.sampling.noise import proposal_noise
from progidiff.sampling.stack import OpenSlice, TargetStack
from progidiff.volumes.geometry import Geometry
from progidiff.volumes.slicing import SlicePlan, extract_slice, plan_slices

Emit = Callable[[Event], None]
Row = tuple[int, str, int]  # slice, target, proposal

#: Slices on which adaptive sampling decides how many proposals a larger stack needs.
PILOT_SLICES = 8
#: Samples per network call where the user leaves it open: on two CPU cores larger batches gain nothing and delay the first preview.
CPU_BATCH, CUDA_BATCH = 8, 64


@dataclass(frozen=True)
class _Image:
    array: np.ndarray
    plan: SlicePlan
    grid: ModelGrid
    normalise: Callable[[np.ndarray], np.ndarray]
    modality: Modality
    guessed: bool
    voxel_ml: float
    info: ImageInfo


@dataclass
class _Run:
    """One request while it runs."""

    request: ProposeRequest
    emit: Emit
    cancelled: Callable[[], bool]
    slices: list[int]
    batch: int
    stacks: dict[str, TargetStack]
    began: float = field(default_factory=time.monotonic)
    first: float | None = None
    rows_done: float = 0.0
    rows_total: int = 1
    slices_done: int = 0
    timing: dict[str, float] = field(default_factory=lambda: {"encode_s": 0.0, "denoise_s": 0.0, "decode_s": 0.0})

    def progress(self, phase: str, index: int | None, target: str | None) -> None:
        """Report how far the request is, with the time left at the pace so far."""
        share = min(self.rows_done / self.rows_total, 1.0)
        spent = time.monotonic() - self.began
        eta = spent * (1 - share) / share if share > 0 else None
        self.emit(ProgressEvent(phase, share, index, self.slices_done, len(self.slices), target, eta))


class Engine:
    """Samples proposals with one model on one device.

    Args:
        model: a loaded model.
    """

    def __init__(self, model: ProGiDiffModel) -> None:
        self.model = model
        self.device = str(model.device)
        self._conditioner = Conditioner(model)
        self._image: _Image | None = None
        self._features: tuple[int, Tensor] | None = None

    @classmethod
    def load(
        cls,
        folder: Path | None,
        device: Literal["auto", "cpu", "cuda"] | str = "auto",
        progress: Callable[[str, float], None] | None = None,
    ) -> Engine:
        """Load a model folder (the bundled one by default) onto a device; ``"auto"`` is CUDA where there is one.

        Raises:
            ModelError: the folder cannot be used, or CUDA was asked for and is not there.
        """
        if device == "cuda" and not torch.cuda.is_available():
            raise ModelError("There is no CUDA device that torch can use; choose the device cpu or auto.")
        chosen = ("cuda" if torch.cuda.is_available() else "cpu") if device == "auto" else device
        dtype = torch.bfloat16 if chosen == "cuda" and torch.cuda.is_bf16_supported() else torch.float32
        model = load_model(folder, chosen, dtype, progress)
        if chosen == "cpu":
            for network in model.networks.values():
                network.to(memory_format=torch.channels_last)  # about a tenth faster in oneDNN's convolutions
        return cls(model)

    @property
    def card(self) -> ModelCard:
        """Card of the loaded model."""
        return self.model.card

    def set_image(
        self, array_kji: np.ndarray, affine: np.ndarray, modality: str | None, plane: str | None = None
    ) -> ImageInfo:
        """Make a volume the current image.

        Args:
            array_kji: numeric (K, J, I); HU for CT, any unit for MR.
            affine: (4, 4), IJK to RAS in mm.
            modality: "CT", "MR" or ``None`` to guess from the values.
            plane: plane of the slices, or ``None`` for the acquisition plane.

        Raises:
            InputError: the geometry or the values cannot be used.
            ModelError: the model was not made for this modality.
        """
        if array_kji.ndim != 3:
            raise InputError("The image is not a single 3-D volume; choose one frame or channel of it.")
        if not np.isfinite(array_kji[:: max(1, len(array_kji) // 16)]).all():
            raise InputError("The image holds values that are not numbers (NaN or infinite); replace them first.")
        k, j, i = array_kji.shape
        geometry = Geometry((i, j, k), affine)
        plan = plan_slices(geometry, plane)
        known: Modality = "MR" if modality == "MR" else "CT" if modality == "CT" else guess_modality(array_kji)
        normalise = normaliser(array_kji, self.card, known)
        look = np.linspace(0, plan.count - 1, min(plan.count, 7)).round().astype(int)
        centre = body_centre([normalise(extract_slice(array_kji, plan, int(s))) for s in look])
        grid = ModelGrid(self.card.image_size, self.card.spacing_mm, plan.shape_rc, plan.spacing_rc, centre)
        info = ImageInfo(
            content_hash=image_key(array_kji, affine, modality, plane),
            plane=plan.plane,
            slice_count=plan.count,
            slice_shape=plan.shape_rc,
            spacing_rc=plan.spacing_rc,
            slice_spacing=plan.slice_spacing,
        )
        guessed = modality not in ("CT", "MR")
        self._image = _Image(array_kji, plan, grid, normalise, known, guessed, geometry.voxel_volume_ml, info)
        self._features = None
        return info

    def propose(self, request: ProposeRequest, emit: Emit, cancelled: Callable[[], bool]) -> None:
        """Sample, rank and report proposals on the current image.

        Slices stream out as they are decoded, then one ranking per target, then the end. The same request gives the same masks
        whatever the batch size, up to floating-point rounding of the device.

        Raises:
            CancelledError: ``cancelled()`` turned true; noticed within one denoising step.
            InputError: numbers that cannot be served.
            ModelError: a target outside the vocabulary, or too little memory even for one sample.
        """
        image = self._checked(request)
        slices = list(range(image.plan.count) if request.slices is None else range(*request.slices))
        automatic = CUDA_BATCH if self.model.device.type == "cuda" else CPU_BATCH
        run = _Run(
            request, emit, cancelled, slices, request.batch_size or automatic, {t: TargetStack(t) for t in request.targets}
        )
        self._warn(run, image)
        reasons = self._sample(run)
        for target, stack in run.stacks.items():
            event = stack.ranking(request, image.voxel_ml, reasons[target])
            emit(event)
            if event.empty_share >= 0.5:
                share = f"{event.empty_share:.0%}"
                emit(WarningEvent("empty", f"{target}: {share} of the proposals are empty; it may not be in these slices."))
        timing = {**run.timing, "first_proposal_s": run.first or 0.0, "total_s": time.monotonic() - run.began}
        count = max(len(s.gram) for s in run.stacks.values())
        emit(DoneEvent(self.card.model_id, count, timing, peak_memory_mb()))

    def _checked(self, request: ProposeRequest) -> _Image:
        if self._image is None:
            raise InputError("There is no image to work on; set one first.")
        if not request.targets:
            raise InputError("No target was asked for; name at least one.")
        unknown = [t for t in request.targets if t not in self.card.vocabulary]
        if unknown:
            raise ModelError(f"This model does not know {', '.join(unknown)}; it knows {', '.join(self.card.vocabulary)}.")
        if not 1 <= request.proposals <= 1000 or request.top_k < 1:
            raise InputError("The number of proposals must be from 1 to 1000, and k at least 1.")
        if request.batch_size is not None and request.batch_size < 1:
            raise InputError("The batch size must be at least 1.")
        if request.slices is not None:
            start, stop = request.slices
            if not 0 <= start < stop <= self._image.plan.count:
                raise InputError(f"The slices {start} to {stop} are not within the image's {self._image.plan.count} slices.")
        return self._image

    def _warn(self, run: _Run, image: _Image) -> None:
        if image.plan.plane not in self.card.planes:
            message = f"The slices are {image.plan.plane}, but this model was trained on {' and '.join(self.card.planes)} ones."
            run.emit(WarningEvent("plane", message))
        if image.guessed:
            message = f"The image does not say its modality; its values look like {image.modality}."
            run.emit(WarningEvent("modality", message))

    # -- sampling ---------------------------------------------------------------------------------------------------------------

    def _sample(self, run: _Run) -> dict[str, str]:
        """Sample everything; returns why sampling ended, per target."""
        request = run.request
        run.rows_total = len(run.slices) * len(request.targets) * request.proposals
        fixed = {t: f"Stopped at the {request.proposals} proposals that were asked for." for t in request.targets}
        if not request.adaptive:
            self._stream(run, run.slices, {t: (0, request.proposals) for t in request.targets}, {}, preview=False)
            return fixed
        small = len(run.slices) <= PILOT_SLICES
        places = np.linspace(0, len(run.slices) - 1, min(PILOT_SLICES, len(run.slices))).round().astype(int)
        counts, reasons = self._pilot(run, [run.slices[p] for p in places], preview=not small)
        if not small:
            run.stacks = {t: TargetStack(t) for t in request.targets}
            run.rows_total = run.rows_total // request.proposals * max(counts.values()) + int(run.rows_done)
            self._stream(run, run.slices, {t: (0, n) for t, n in counts.items()}, {}, preview=False)
        return reasons

    def _pilot(self, run: _Run, slices: list[int], preview: bool) -> tuple[dict[str, int], dict[str, str]]:
        """Sample blocks on a few slices until each target's consensus has settled: proposals and reason per target."""
        most = run.request.proposals
        rules = {t: AdaptiveStopping(block=4, minimum=min(8, most), maximum=most) for t in run.request.targets}
        counts = dict.fromkeys(run.request.targets, 0)
        reasons: dict[str, str] = {}
        pieces: dict[tuple[int, str], OpenSlice] = {}
        while len(reasons) < len(rules):
            going = {t: (counts[t], rules[t].next_block(counts[t])) for t in rules if t not in reasons}
            self._stream(run, slices, going, pieces, preview)
            for target, (known, block) in going.items():
                counts[target] = known + block
                stack = run.stacks[target]
                change = stack.consensus_change()
                decision = rules[target].update(stack.gram, change if known else None)
                if decision.stop:
                    reasons[target] = decision.reason
        return counts, reasons

    def _stream(
        self,
        run: _Run,
        slices: list[int],
        wanted: dict[str, tuple[int, int]],
        pieces: dict[tuple[int, str], OpenSlice],
        preview: bool,
    ) -> None:
        """Sample ``wanted`` (target: first proposal, count) on ``slices`` and emit every slice as it is decoded.

        Rows run slice by slice, so a slice is complete before much of the next one is begun; slices are dropped when complete unless
        the caller keeps them by passing a non-empty or shared ``pieces``.
        """
        keep = run.request.adaptive and (preview or len(slices) <= PILOT_SLICES)
        rows: Iterator[Row] = (
            (s, t, p) for s in slices for t, (first, count) in wanted.items() for p in range(first, first + count)
        )
        pending: list[Row] = []
        while True:
            pending += islice(rows, run.batch - len(pending))
            if not pending:
                return
            batch = pending[: run.batch]
            try:
                logits = self._logits(run, batch)
            except CancelledError:
                raise
            except Exception as error:
                if not is_out_of_memory(error):
                    raise
                self._halve(run, error)
                continue
            pending = pending[len(batch) :]
            run.rows_done = round(run.rows_done)
            offset = 0
            for (s, target), group in groupby(batch, key=lambda row: row[:2]):
                members = [p for _, _, p in group]
                piece = pieces.setdefault((s, target), OpenSlice())
                self._emit_slice(run, s, target, members, logits[offset : offset + len(members)], piece, wanted[target], preview)
                offset += len(members)
                if members[-1] + 1 == sum(wanted[target]):
                    if not keep:
                        del pieces[s, target]
                    if target == list(wanted)[-1] and not preview:
                        run.slices_done = min(run.slices_done + 1, len(run.slices))
            run.progress("sampling", batch[-1][0], batch[-1][1])

    def _halve(self, run: _Run, error: BaseException) -> None:
        if torch.cuda.is_available():
            torch.cuda.empty_cache()
        if run.batch == 1:
            raise ModelError(
                "There is not enough memory for a single sample; close other programs, or choose the device cpu or a smaller model."
            ) from error
        run.batch = max(1, run.batch // 2)
        run.rows_done = float(int(run.rows_done))
        run.emit(WarningEvent("memory", f"Memory ran out; going on with {run.batch} samples at a time."))

    def _emit_slice(
        self,
        run: _Run,
        index: int,
        target: str,
        members: list[int],
        logits: Tensor,
        piece: OpenSlice,
        wanted: tuple[int, int],
        preview: bool,
    ) -> None:
        """Bring logits to the slice's own pixels, count them, and send them."""
        assert self._image is not None
        began = time.monotonic()
        native = self._image.grid.from_model(logits, outside=-20.0)
        masks = (native > 0).cpu().numpy()
        piece.add(masks, torch.sigmoid(native).cpu().numpy())
        last = members[-1] + 1 == sum(wanted)
        if last:
            run.stacks[target].close_block(piece)
        run.emit(
            SliceEvent(
                target=target,
                slice_index=index,
                first_proposal=members[0],
                masks=masks,
                agreement=piece.agreement() if last else None,
                mean_probability=piece.mean_probability() if last else None,
                preview=preview,
            )
        )
        if run.first is None:
            run.first = time.monotonic() - run.began
        run.timing["decode_s"] += time.monotonic() - began

    @torch.inference_mode()
    def _logits(self, run: _Run, batch: list[Row]) -> Tensor:
        """Mask logits (B, S, S) of a batch of rows."""
        assert self._image is not None
        began = time.monotonic()
        model, request = self.model, run.request
        hints: dict[tuple[int, str], Tensor] = {}
        for s, target, _ in batch:
            if (s, target) not in hints:
                hints[s, target] = self._conditioner.hint(self._slice_features(s), target)
        hint = torch.cat([hints[s, t] for s, t, _ in batch])
        states = torch.cat([self._conditioner.prompt(t).states for _, t, _ in batch])
        shape = (model.unet.config.in_channels, *hint.shape[-2:])
        spacing = self._image.plan.slice_spacing
        noise = torch.stack([proposal_noise(request.seed, t, p, s * spacing, shape) for s, t, p in batch]).to(model.device)
        scheduler = make_scheduler(model, request.scheduler, request.steps)
        run.timing["encode_s"] += time.monotonic() - began
        began = time.monotonic()

        def after_step() -> bool:
            run.rows_done += len(batch) / request.steps
            run.progress("sampling", batch[0][0], batch[0][1])
            return run.cancelled()

        if run.cancelled():
            raise CancelledError("Cancelled.")
        latents = denoise(model, noise, states, hint, scheduler, after_step)
        run.timing["denoise_s"] += time.monotonic() - began
        began = time.monotonic()
        logits = decode(model, latents)
        run.timing["decode_s"] += time.monotonic() - began
        return logits

    def _slice_features(self, index: int) -> Tensor:
        """Image features of a slice, kept until another slice is asked for."""
        assert self._image is not None
        if self._features is None or self._features[0] != index:
            canonical = np.ascontiguousarray(extract_slice(self._image.array, self._image.plan, index))
            pixels = torch.from_numpy(self._image.normalise(canonical)).to(self.model.device)
            self._features = index, self._conditioner.features(self._image.grid.to_model(pixels))
        return self._features[1]
