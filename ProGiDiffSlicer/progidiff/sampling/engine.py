"""The engine: one loaded model, one current image, and requests for proposals on it."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Literal

import numpy as np
import torch

from progidiff.cards import AdapterCard, ModelCard, load_adapter_card
from progidiff.errors import AdapterError, InputError, ModelError, WorseAdapterError
from progidiff.model.adapter import AppliedAdapter, apply_adapter
from progidiff.model.folder import ProGiDiffModel, load_model
from progidiff.proposals.proposals import MAJORITY, Gathered
from progidiff.proposals.votes import AdaptiveStopping
from progidiff.sampling.conditioning import Conditioner
from progidiff.sampling.denoise import make_scheduler
from progidiff.sampling.image import LoadedImage, load_image
from progidiff.sampling.sampler import Emit, Sampler, SamplingRun
from progidiff.system import peak_memory_mb
from progidiff.wire.messages import DoneEvent, Event, ImageInfo, ProposeRequest, WarningEvent

#: Most proposals of one target.
MAX_PROPOSALS = 1000
#: Slices on which adaptive sampling decides how many proposals a larger stack needs.
PILOT_SLICES = 8
#: Proposals in a block of adaptive sampling, and the fewest on which it may stop.
BLOCK, FEWEST = 4, 8
#: Samples per network call where the user leaves it open: on two CPU cores larger batches gain nothing and delay the
#: first slice.
CPU_BATCH, CUDA_BATCH = 8, 64


class Engine:
    """Samples proposals with one model on one device.

    Args:
        model: a loaded model.
    """

    def __init__(self, model: ProGiDiffModel) -> None:
        self.model = model
        self.device = str(model.device)
        self._conditioner = Conditioner(model)
        self._image: LoadedImage | None = None
        self._applied: AppliedAdapter | None = None

    @classmethod
    def load(
        cls,
        folder: Path | None,
        device: Literal["auto", "cpu", "cuda"] | str = "auto",
        progress: Callable[[str, float], None] | None = None,
    ) -> Engine:
        """Load a model folder (the bundled one by default) onto a device; ``"auto"`` is CUDA where there is one.

        Raises:
            ModelError: the folder cannot be used, the device is unknown, or CUDA was asked for and is not there.
        """
        chosen = _device(device)
        dtype = torch.bfloat16 if chosen.type == "cuda" and torch.cuda.is_bf16_supported() else torch.float32
        model = load_model(folder, chosen, dtype, progress)
        if chosen.type == "cpu":
            for network in model.networks.values():
                # about a tenth faster in oneDNN's convolutions
                network.to(memory_format=torch.channels_last)  # type: ignore[call-overload]
        return cls(model)

    @property
    def card(self) -> ModelCard:
        """Card of the loaded model."""
        return self.model.card

    @property
    def adapter(self) -> AdapterCard | None:
        """Card of the adapter in use."""
        return None if self._applied is None else self._applied.card

    def load_adapter(self, folder: Path, even_if_worse: bool = False) -> AdapterCard:
        """Use an adapter on the loaded model, in place of the one in use; the model is not loaded again.

        Args:
            folder: the adapter's folder.
            even_if_worse: also take one that was not better than its base on the cases held out from its training.

        Raises:
            AdapterError: it cannot be used; what was in use stays in use.
            WorseAdapterError: it was not better than its base, and ``even_if_worse`` is false.
        """
        folder = Path(folder)
        card = load_adapter_card(folder)
        if not card.better and not even_if_worse:
            raise WorseAdapterError(
                f'The adapter "{card.name}" was not taken into use: {card.reason} Choose another one, or insist on it.'
            )
        before = self._applied
        if before is not None and before.card == card:
            return card
        if before is not None:
            before.remove()
            self._applied = None
        try:
            self._applied = apply_adapter(self.model, folder)
        except AdapterError:
            if before is not None:
                self._applied = before.again()
            raise
        finally:
            self._conditioner.forget_slices()
        return card

    def unload_adapter(self) -> None:
        """Go back to the base model, bit for bit."""
        if self._applied is not None:
            self._applied.remove()
            self._applied = None
            self._conditioner.forget_slices()

    def set_image(
        self,
        array_kji: np.ndarray,
        affine: np.ndarray,
        modality: str | None,
        plane: str | None = None,
        correct_values: bool = False,
    ) -> ImageInfo:
        """Make a volume the current image. It is not copied, and must not be changed while it is in use.

        Args:
            array_kji: numeric (K, J, I); HU for CT, any unit for MR.
            affine: (4, 4), IJK to RAS in mm.
            modality: "CT" or "MR"; any other code of DICOM, or ``None``, to guess from the values.
            plane: plane of the slices, or ``None`` for the one that suits volume and model.
            correct_values: take values of a CT that cannot be Hounsfield units for what they look like.

        Raises:
            InputError: the geometry or the values cannot be used.
            ModelError: the model was not made for this modality.
        """
        image = load_image(array_kji, affine, modality, plane, self.card, correct_values)
        if self._image is None or self._image.info.content_hash != image.info.content_hash:
            self._conditioner.forget_slices()
        self._image = image
        return image.info

    def propose(self, request: ProposeRequest, emit: Emit, cancelled: Callable[[], bool]) -> None:
        """Sample, rank and report proposals on the current image.

        Slices stream out as they are decoded; then, of each target, those that were tidied, and its ranking; then the end.
        The same request gives the same masks whatever the batch size, up to floating-point rounding of the device.

        Raises:
            CancelledError: ``cancelled()`` turned true; noticed within one denoising step.
            InputError: numbers that cannot be served.
            ModelError: a target outside the vocabulary, or too little memory even for one sample.
        """
        image = self._image
        if image is None:
            raise InputError("There is no image to work on; set one first.")
        request = self._checked(request, image)
        slices = list(range(image.plan.count) if request.slices is None else range(*request.slices))
        automatic = CUDA_BATCH if self.model.device.type == "cuda" else CPU_BATCH
        run = SamplingRun(request, image.plan, slices, request.batch_size or automatic, emit, cancelled)
        for warning in self._warnings(image):
            emit(warning)
        run.check()
        run.progress("encoding", slices[0], request.targets[0])
        sampler = Sampler(self.model, image, self._conditioner)
        reasons = self._adaptive(run, sampler) if request.adaptive else self._fixed(run, sampler)
        for target, proposals in run.proposals.items():
            run.check()
            if run.tidied:
                for slice_event in proposals.tidy(run.check):
                    emit(slice_event)
            event = proposals.rank(request, image.voxel_ml, reasons[target])
            emit(event)
            if event.empty_share >= 0.5:
                share = f"{event.empty_share:.0%}"
                emit(WarningEvent("empty", f"{target}: {share} of the proposals are empty; it may not be in these slices."))
            elif not proposals.tally(MAJORITY).voxels:
                message = f"{target}: the proposals do not agree on any place; it may not be in these slices."
                emit(WarningEvent("disagreement", message))
        count = max(proposals.count for proposals in run.proposals.values())
        adapter = None if self.adapter is None else self.adapter.adapter_id
        emit(DoneEvent(self.card.model_id, count, run.timing(), peak_memory_mb(), adapter))

    def gather(
        self,
        request: ProposeRequest,
        cancelled: Callable[[], bool] = lambda: False,
        told: Emit = lambda event: None,
    ) -> Gathered:
        """:meth:`propose`, and everything that it reports in one piece; ``told`` also receives the events one by one.

        Raises:
            As :meth:`propose`.
        """
        if self._image is None:
            raise InputError("There is no image to work on; set one first.")
        gathered = Gathered(request.targets, self._image.plan, request.slices)

        def emit(event: Event) -> None:
            gathered.add(event)
            told(event)

        self.propose(request, emit, cancelled)
        return gathered

    def _checked(self, request: ProposeRequest, image: LoadedImage) -> ProposeRequest:
        """The request with repeated targets removed.

        Everything is checked before sampling begins, since that can take long.
        """
        if not request.targets:
            raise InputError("No target was asked for; name at least one.")
        unknown = [t for t in request.targets if t not in self.card.vocabulary]
        if unknown:
            raise ModelError(f"This model does not know {', '.join(unknown)}; it knows {', '.join(self.card.vocabulary)}.")
        if not 1 <= request.proposals <= MAX_PROPOSALS or request.top_k < 1:
            raise InputError(f"The number of proposals must be from 1 to {MAX_PROPOSALS}, and k at least 1.")
        if request.batch_size is not None and request.batch_size < 1:
            raise InputError("The batch size must be at least 1.")
        if request.seed < 0:
            raise InputError(f"The seed must not be negative, as {request.seed} is.")
        if request.ranking not in ("soft_dice", "medoid"):
            raise InputError(f'There is no ranking "{request.ranking}"; choose "soft_dice" or "medoid".')
        make_scheduler(self.model.scheduler, request.scheduler, request.steps)
        if request.slices is not None:
            start, stop = request.slices
            if not 0 <= start < stop <= image.plan.count:
                raise InputError(f"The slices {start} to {stop} are not within the image's {image.plan.count} slices.")
        return replace(request, targets=tuple(dict.fromkeys(request.targets)))

    def _warnings(self, image: LoadedImage) -> list[WarningEvent]:
        """What to know of an image, the most important first."""
        found = []
        if (message := self.card.strange_planes([image.plan.plane])) is not None:
            found.append(WarningEvent("plane", message))
        if (values := _values_warning(image)) is not None:
            found.append(values)
        if image.guessed:
            guess = f"its values look like {image.modality}"
            if image.modality == "MR" and image.values is not None:
                guess += f", or like those of a CT, {image.values.looks}; say so where it is one"
            if len(self.card.modalities) == 1:
                guess = f"it is taken as {image.modality}, the only one of this model"
            made_for = " and ".join(self.card.modalities)
            said = "does not say its modality"
            if image.stated is not None:
                said = f"is {image.stated}, but this model was made for {made_for}"
            found.append(WarningEvent("modality", f"The image {said}; {guess}."))
        return found

    def _fixed(self, run: SamplingRun, sampler: Sampler) -> dict[str, str]:
        """Sample the proposals that were asked for; why sampling ended, by target."""
        count = run.request.proposals
        sampler.stream(run, run.slices, {target: range(count) for target in run.request.targets})
        return dict.fromkeys(run.request.targets, f"Stopped at the {count} proposals that were asked for.")

    def _adaptive(self, run: SamplingRun, sampler: Sampler) -> dict[str, str]:
        """Sample blocks on a few slices until each consensus has settled, then as many on the other slices; the reasons."""
        places = np.linspace(0, len(run.slices) - 1, min(PILOT_SLICES, len(run.slices))).round().astype(int)
        pilot = [run.slices[place] for place in places]
        reasons = self._pilot(run, sampler, pilot)
        run.slices_done = len(pilot)
        others = [index for index in run.slices if index not in set(pilot)]
        counts = {target: proposals.count for target, proposals in run.proposals.items()}
        run.rows_total = run.rows_done + len(others) * sum(counts.values())
        run.progress("sampling")
        if not others:
            return reasons
        sampler.stream(run, others, {target: range(count) for target, count in counts.items()})
        seen = f"judged on {len(pilot)} of {len(run.slices)} slices"
        return {target: f"{reason.removesuffix('.')}; {seen}." for target, reason in reasons.items()}

    def _pilot(self, run: SamplingRun, sampler: Sampler, slices: list[int]) -> dict[str, str]:
        """Sample blocks on some slices until each target's consensus has settled; the reasons."""
        most = run.request.proposals
        rules = {t: AdaptiveStopping(block=BLOCK, minimum=min(FEWEST, most), maximum=most) for t in run.request.targets}
        reasons: dict[str, str] = {}
        while len(reasons) < len(rules):
            known = {t: run.proposals[t].count for t in rules if t not in reasons}
            going = {t: range(count, count + rules[t].next_block(count)) for t, count in known.items()}
            sampler.stream(run, slices, going, keep=True)
            for target, count in known.items():
                proposals = run.proposals[target]
                change = proposals.consensus_change()
                decision = rules[target].update(proposals.gram, change if count else None)
                if decision.stop:
                    reasons[target] = decision.reason
                    for index in slices:
                        if not run.tidied:
                            proposals.let_go(index)
                        del run.probabilities[index, target]
        return reasons


def _values_warning(image: LoadedImage) -> WarningEvent | None:
    """About values that should be Hounsfield units."""
    values = image.values if image.modality == "CT" else None
    if values is None:
        if not image.corrected:
            return None
        why = "they can be Hounsfield units"
        if image.modality != "CT":
            why = "it is not known to be a CT" if image.guessed else "it is no CT"
        return WarningEvent("values_kept", f"The values of the image were not corrected: {why}.")
    if image.corrected and values.known:
        return WarningEvent("values_corrected", f"The values of this CT were taken for {values.looks}.")
    return WarningEvent("values" if values.known else "values_unknown", values.warning)


def _device(name: str) -> torch.device:
    if name == "auto":
        return torch.device("cuda" if torch.cuda.is_available() else "cpu")
    try:
        device = torch.device(name)
    except RuntimeError:
        device = torch.device("meta")
    if device.type not in ("cpu", "cuda"):
        raise ModelError(f'There is no device "{name}"; choose auto, cpu or cuda.')
    if device.type == "cuda" and not torch.cuda.is_available():
        raise ModelError("There is no CUDA device that torch can use; choose the device cpu or auto.")
    return device


def weights_key(engine: Engine) -> str:
    """Digest of the weights that an engine samples with, its adapter included."""
    adapter = engine.adapter
    parts = [
        json.dumps(engine.card.sha256, sort_keys=True),
        "" if adapter is None else f"{adapter.adapter_id} {adapter.sha256}",
    ]
    return hashlib.sha256("|".join(parts).encode()).hexdigest()
