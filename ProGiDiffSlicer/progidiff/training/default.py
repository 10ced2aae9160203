"""The recipe of the bundled model: slices of permissively licensed volumes and phantoms, four stages, resumable."""

from __future__ import annotations

import json
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import torch

from progidiff.cards import ModelCard, TrainingSource, TrainingStage, Window, make_card
from progidiff.errors import DatasetError, ModelError
from progidiff.model.folder import ProGiDiffModel, save_model
from progidiff.model.networks import ControlBranch, tokenize
from progidiff.synthesis.labelmaps import LabelVolume, load_permissive, unpack, with_blends
from progidiff.synthesis.source import BODY_GRIDS, SyntheticSource
from progidiff.synthesis.tissues import VOCABULARY
from progidiff.training import small
from progidiff.training.batches import BatchSource, ReusedBatches, SyntheticBatches, TrainingBatch
from progidiff.training.diffusion import BaseStage, ControlStage
from progidiff.training.loop import LoopSettings, Progress, Stage, run_stage, stage_clock
from progidiff.training.stages import AutoencoderStage, EncoderStage

STAGES = ("autoencoder", "base", "encoder", "control")


#: Pixel size of the grid on a body of ordinary width, mm.
TYPICAL_MM = 2.1


@dataclass(frozen=True)
class DefaultSteps:
    """Optimiser steps per stage."""

    autoencoder: int = 1500
    base: int = 2500
    encoder: int = 30000
    control: int = 14000


#: Steps of a training that goes on from a finished model: its autoencoder stays, and the backbone learns the new words.
FURTHER = DefaultSteps(autoencoder=0, base=500, encoder=6000, control=1500)


class DefaultRecipe:
    """Builds the networks and runs the stages; every stage resumes from its own checkpoint folder.

    Args:
        folder: work folder; one subfolder per stage.
        volumes: label volumes, see :func:`progidiff.synthesis.labelmaps.load_permissive`.
        steps: steps per stage (default: :class:`DefaultSteps` from nothing, :data:`FURTHER` from a model).
        device: where to train; synthesis runs there as well.
        log: receives one line per report.
        progress: told stage, steps done and steps in all after each step.
        cancelled: asked after each step; see :func:`progidiff.training.loop.run_stage`.
        start: a finished small model to go on from, with a fresh optimiser; it may know fewer targets and other grids.
    """

    def __init__(
        self,
        folder: Path,
        volumes: Sequence[LabelVolume],
        steps: DefaultSteps | None = None,
        device: str = "cpu",
        log: Callable[[str], None] = print,
        progress: Progress | None = None,
        cancelled: Callable[[], bool] = lambda: False,
        start: ProGiDiffModel | None = None,
    ) -> None:
        self._progress, self._cancelled = progress, cancelled
        self.folder, self.volumes, self.device, self.log = folder, list(volumes), torch.device(device), log
        self.steps, self.start = steps or (DefaultSteps() if start is None else FURTHER), start
        torch.manual_seed(0)
        self.tokenizer = small.make_tokenizer(VOCABULARY)
        self.text_encoder = small.make_text_encoder(len(self.tokenizer)).to(self.device)
        self.vae, self.decoder = small.make_vae().to(self.device), small.make_mask_decoder().to(self.device)
        self.unet, self.schedule = small.make_unet(max(BODY_GRIDS["axial"])).to(self.device), small.make_schedule()
        self.encoder = small.make_encoder(len(VOCABULARY), coordinates=True).to(self.device)
        self.control: ControlBranch | None = None
        if start is not None:
            self._take_over(start)
        self._validation: list[TrainingBatch] | None = None

    def _take_over(self, start: ProGiDiffModel) -> None:
        """Take the weights of a finished model; what is new starts so that the answers to what it knows stay the same.

        Raises:
            ModelError: it is not of the small architecture.
        """
        words, embedding = self.tokenizer.get_vocab(), self.text_encoder.get_input_embeddings().weight
        known = start.tokenizer.get_vocab()
        encoder = dict(start.image_encoder.float().state_dict())
        try:
            self.vae.load_state_dict(start.vae.float().state_dict())
            self.unet.load_state_dict(start.unet.float().state_dict())
            self.decoder.load_state_dict(start.networks["mask_decoder"].float().state_dict())
            text = dict(start.text_encoder.float().state_dict())
            (name,) = (key for key in text if key.endswith("token_embedding.weight"))
            rows = embedding.detach().clone()
            for word in words.keys() & known.keys():
                rows[words[word]] = text[name][known[word]]
            self.text_encoder.load_state_dict(text | {name: rows})
            stem = torch.zeros_like(self.encoder.stem.weight)  # it looks at the places in the grid as it learns to
            stem[:, : encoder["stem.weight"].shape[1]] = encoder["stem.weight"]
            weight, bias = self.encoder.segmentation_head.weight.detach() * 0.1, self.encoder.segmentation_head.bias * 0 - 4
            each = self.encoder.config.stride**2
            for place, target in enumerate(start.card.vocabulary):
                if target not in VOCABULARY:
                    continue
                old, new = (slice(each * i, each * (i + 1)) for i in (place, VOCABULARY.index(target)))
                weight[new], bias[new] = encoder["segmentation_head.weight"][old], encoder["segmentation_head.bias"][old]
            encoder |= {"stem.weight": stem, "segmentation_head.weight": weight, "segmentation_head.bias": bias.detach()}
            self.encoder.load_state_dict(encoder)
        except (KeyError, RuntimeError, ValueError) as error:
            raise ModelError(
                f"Training cannot go on from '{start.folder}': it is not built as the bundled model is ({error})."
            ) from None

    def _paint(self, seed: int) -> SyntheticSource:
        return SyntheticSource(self.volumes, BODY_GRIDS, device=self.device, seed=seed)

    def source(self, seed: int) -> BatchSource:
        """A stream of synthetic batches with its own seed; on a graphics card painting is cheap and every slice is new."""
        if self.device.type == "cuda":
            return SyntheticBatches(self._paint(seed), VOCABULARY)
        return ReusedBatches(self._paint(seed), VOCABULARY, seed)

    @property
    def validation(self) -> list[TrainingBatch]:
        """Held-out draws of the same source (never used for training: another seed)."""
        if self._validation is None:
            source = SyntheticBatches(self._paint(999), VOCABULARY)
            self._validation = [source.batch(8) for _ in range(3)]
        return self._validation

    def latents(self) -> tuple[list[float], list[float]]:
        """Shift and scale of the latents, measured once after the autoencoder stage."""
        path = self.folder / "latents.json"
        if not path.exists():
            raise DatasetError("The autoencoder stage has not finished; run it before the stages that build on it.")
        shift, scale = json.loads(path.read_text())
        return shift, scale

    def run(self, stage: str) -> None:
        """Run or resume one stage; the stages before it must be done.

        Raises:
            CancelledError: it was cancelled; its checkpoint is written.
        """
        with stage_clock(self.folder / stage):
            {"autoencoder": self._autoencoder, "base": self._base, "encoder": self._encoder, "control": self._control}[
                stage
            ]()

    def _rate(self, from_nothing: float) -> float:
        """Learning rate: weights that are already good are moved less."""
        return from_nothing * (0.6 if self.start is not None else 1.0)

    def _run(self, stage: Stage, settings: LoopSettings) -> None:
        run_stage(stage, settings, self.folder / stage.name, self.log, self._cancelled, self._progress)

    def _autoencoder(self) -> None:
        if self.start is not None:
            known = [self.start.card.latent_shift, self.start.card.latent_scale]
            (self.folder / "latents.json").write_text(json.dumps(known))
            return
        stage = AutoencoderStage(self.vae, self.decoder, self.source(1), self.validation)
        settings = LoopSettings(self.steps.autoencoder, 4, 2e-3, validate_every=500, seed=1)
        self._run(stage, settings)
        path = self.folder / "latents.json"
        if not path.exists():
            path.write_text(json.dumps(stage.latent_statistics()))

    def _base(self) -> None:
        stage = BaseStage(**self._diffusion(2))
        settings = LoopSettings(self.steps.base, 4, self._rate(8e-4), validate_every=500, seed=2, bf16=True)
        self._run(stage, settings)

    def _encoder(self) -> None:
        stage = EncoderStage(self.encoder, self.source(3), self.validation)
        settings = LoopSettings(
            self.steps.encoder,
            8,
            self._rate(1.5e-3),
            warmup=200,
            ema=0.999,
            validate_every=1000,
            log_every=100,
            seed=3,
            bf16=True,
        )
        self._run(stage, settings)

    def _control(self) -> None:
        self.control = small.make_control(self.unet).to(self.device)
        if self.start is not None:
            self.control.load_state_dict(self.start.controlnet.float().state_dict())
        stage = ControlStage(self.control, self.encoder, recycled=0.5, dice_weight=0.2, **self._diffusion(4))
        settings = LoopSettings(self.steps.control, 4, self._rate(8e-4), validate_every=1000, seed=4, bf16=True)
        self._run(stage, settings)

    def _diffusion(self, seed: int) -> dict[str, Any]:
        shift, scale = self.latents()
        return {
            "vae": self.vae,
            "unet": self.unet,
            "decoder": self.decoder,
            "schedule": self.schedule,
            "tokens": tokenize(self.tokenizer, VOCABULARY, self.device),
            "text_encoder": self.text_encoder,
            "latent_shift": shift,
            "latent_scale": scale,
            "source": self.source(seed),
            "validation": self.validation,
            "prompts_per_image": 4,
        }


def empty_card(**fields: Any) -> ModelCard:
    """The card of the bundled model, with what its training has found out in the given fields."""
    known = {
        # Segments name the model that they come from: another training is another model.
        "model_id": f"progidiff-abdomen-small-{datetime.now(UTC):%Y%m%d}",
        "name": "ProGiDiff abdomen, small",
        "licence": "Apache-2.0",
        "modalities": ["CT", "MR"],
        "planes": list(BODY_GRIDS),
        "vocabulary": list(VOCABULARY),
        "windows": {"CT": Window(kind="hu", low=-160, high=240), "MR": Window(kind="percentile", low=1, high=99)},
        "image_size": max(BODY_GRIDS["axial"]),
        "spacing_mm": TYPICAL_MM,
        "body_grids": dict(BODY_GRIDS),
        "latent_shift": [0.0] * small.LATENT_CHANNELS,
        "latent_scale": [1.0] * small.LATENT_CHANNELS,
        "trainable_parameters": 0,
    }
    return make_card(known | fields)


def assemble_default(recipe: DefaultRecipe, out: Path) -> ModelCard:
    """Write the finished networks as a model folder, in half precision, with what they were trained on.

    Raises:
        ModelError: the control stage has not run.
    """
    if recipe.control is None:
        raise ModelError("The control stage has not run; run every stage before assembling the model.")
    shift, scale = recipe.latents()
    model = ProGiDiffModel(
        vae=recipe.vae,
        unet=recipe.unet,
        controlnet=recipe.control,
        image_encoder=recipe.encoder,
        text_encoder=recipe.text_encoder,
        tokenizer=recipe.tokenizer,
        scheduler=recipe.schedule,
        mask_decoder=recipe.decoder,
        card=empty_card(
            latent_shift=shift,
            latent_scale=scale,
            trained_on=_sources(recipe),
            training=[
                *(recipe.start.card.training if recipe.start is not None else []),
                *(
                    TrainingStage(
                        stage=stage,
                        steps=steps,
                        seconds=json.loads((recipe.folder / stage / "seconds.json").read_text()),
                        device=str(recipe.device),
                        seeds=[seed],
                    )
                    for seed, stage in enumerate(STAGES, 1)
                    if (steps := getattr(recipe.steps, stage))
                ),
            ],
            notes=(
                "Trained on pictures painted on label maps of the patients above, on blends of two of them and on procedural"
                " phantoms; of the volumes with an image the real slices, recoloured and deformed, were among the pictures."
                " TotalSegmentator's labels are a network's output, not drawn by hand."
                " For research, not for diagnosis."
            ),
        ),
    )
    return save_model(model, out, torch.float16)


def _sources(recipe: DefaultRecipe) -> list[TrainingSource]:
    """What the weights have seen: the volumes of this training, and those of the model that it went on from."""
    phantoms = TrainingSource(name="procedural abdominal phantoms", licence="Apache-2.0", what="generated slices")
    before = [] if recipe.start is None else recipe.start.card.trained_on
    now = [
        TrainingSource(
            name=v.name,
            licence=v.licence,
            what=f"slices of one patient's label volume{'' if v.image is None else ' and of its image'}",
            n=len(v.slices),
        )
        for v in recipe.volumes
    ]
    return list({source.name: source for source in (phantoms, *before, *now)}.values())


def load_volumes(data: Path | None) -> list[LabelVolume]:
    """Label volumes for the recipe, with blends of them; an empty list (phantoms only) when ``data`` is ``None``.

    ``data`` is a folder that holds ``permissive``, or a file of packed volumes. The model that ships learns from the
    development CT as well.
    """
    if data is None:
        return []
    return unpack(data) if data.is_file() else with_blends(load_permissive(data, development=True))
