"""Checks, trains and measures on a machine with one large CUDA card and no network.

At home, once:       python experiments/gpu/gpu.py pack DATA FOLDER
On the machine:      python3 experiments/gpu/gpu.py check|train|bench FOLDER OUT [--minutes 8] [--model DIR] [--stage STAGE]

``pack`` writes the label volumes and the packages that such a machine usually lacks into FOLDER, less than 35 MB together.
The machine needs torch, transformers, peft and safetensors. Each mode ends by itself, within the given minutes:

check  proposing, tuning and training give on CUDA in bfloat16 what they give on the CPU, within the tolerances below; a run
       is cancelled within a step; a card without free memory is answered in one sentence and works again afterwards.
train  goes on from the newest weights (a model folder) with a fresh optimiser and a short warm-up, at a batch that fills the
       card; the averaged weights are written to OUT every minute, three files below 16 MB each.
bench  the bundled model and one of Stable Diffusion 1.5's size with random weights, beside diffusers' own pipeline.

Everything runs on the CPU as well, with ``--device cpu``; a test does that in miniature.
"""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
import tempfile
import time
import types
from collections.abc import Callable
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[2]
#: Packages that a machine for machine learning may lack, and the Python that it has.
PACKAGES, PYTHON = ("diffusers", "pydantic", "pydantic_core", "annotated-types", "typing-inspection"), "3.12"
MOST_MB = 35.0
#: Readers of files: nothing is read here but packed arrays.
READERS = ("SimpleITK", "nibabel", "monai", "monai.metrics", "monai.networks", "monai.networks.nets")
#: Least Dice between the CPU's and the card's masks, and largest relative difference of losses.
LEAST_DICE, LOSS_TOLERANCE = 0.97, 0.03


def pack(data: Path, folder: Path) -> None:
    """Write the label volumes and wheels of the missing packages."""
    _prepare(folder)
    from progidiff.synthesis.labelmaps import load_permissive, with_blends
    from progidiff.synthesis.labelmaps import pack as write

    folder.mkdir(parents=True, exist_ok=True)
    write(with_blends(load_permissive(data)), folder / "volumes.npz")
    pins = dict(
        line.split("==")
        for line in (ROOT / "Utilities" / "constraints.txt").read_text().split()
        if "==" in line and not line.startswith("#")
    )
    wanted = [f"{name}=={pins[name]}" if name in pins else name for name in PACKAGES]
    subprocess.run(
        [sys.executable, "-m", "pip", "download", "-q", "--no-deps", "--only-binary=:all:", "--python-version", PYTHON,
         "--implementation", "cp", "--platform", "manylinux2014_x86_64", "-d", str(folder / "wheels"), *wanted],
        check=True,
    )  # fmt: skip
    size = sum(path.stat().st_size for path in folder.rglob("*") if path.is_file()) / 1e6
    print(f"{folder}: {size:.1f} MB")
    if size > MOST_MB:
        raise SystemExit(f"That is more than {MOST_MB:g} MB; leave a blend or a package out.")


def _prepare(folder: Path) -> None:
    """Make this checkout and the brought packages importable; readers of files get an empty stand-in where they are not."""
    sys.path[:0] = [str(ROOT / "ProGiDiffSlicer"), str(ROOT)]
    brought = folder / "packages"
    wheels = sorted((folder / "wheels").glob("*.whl"))
    if wheels and not brought.is_dir():
        command = [sys.executable, "-m", "pip", "install", "-q", "--no-index", "--no-deps", "--target", str(brought)]
        subprocess.run([*command, *map(str, wheels)], check=True)
    if brought.is_dir():
        sys.path.append(str(brought))
    for name in READERS:
        try:
            __import__(name)
        except ImportError:
            sys.modules[name] = types.ModuleType(name)


class Told:
    """What was found: lines on the screen and a JSON file that is written after each."""

    def __init__(self, path: Path) -> None:
        path.parent.mkdir(parents=True, exist_ok=True)
        self._path, self.facts, self.failed = path, dict[str, Any](), False

    def __call__(self, name: str, value: object, right: bool | None = None) -> None:
        print(f"{name}: {value}{'' if right is None else '  right' if right else '  WRONG'}", flush=True)
        self.failed |= right is False
        self.facts[name] = value if right is None else {"value": value, "right": right}
        self._path.write_text(json.dumps(self.facts, indent=1))


def _clock(minutes: float) -> Callable[[], bool]:
    end = time.monotonic() + minutes * 60
    return lambda: time.monotonic() > end


# check ---------------------------------------------------------------------------------------------------------------------


def check(arguments: argparse.Namespace) -> None:
    """Whether the device computes what the CPU computes."""
    import torch

    told = Told(arguments.out / "check.json")
    told("device", torch.cuda.get_device_name() if arguments.device == "cuda" else "cpu")
    told("torch", torch.__version__)
    _check_proposals(arguments, told)
    _check_training(arguments, told)
    _check_tuning(arguments, told)
    if arguments.device == "cuda":
        told("peak memory, MiB", round(torch.cuda.max_memory_allocated() / 2**20))
        _check_full_memory(arguments, told)
    if told.failed:
        raise SystemExit("Some things are wrong; see above.")


def _masks(engine: Any, array: Any, affine: Any, request: Any, cancelled: Callable[[], bool] = lambda: False) -> Any:
    """Masks of one target on one slice, bool (N, H, W)."""
    engine.set_image(array, affine, "CT", "axial")
    gathered = engine.gather(request, cancelled)
    return gathered[request.targets[0]].slice_masks(gathered.slices[0])


def _check_proposals(arguments: argparse.Namespace, told: Told) -> None:
    from experiments.bench.scene import Scene
    from progidiff.errors import CancelledError
    from progidiff.evaluation.metrics import dice
    from progidiff.sampling.engine import Engine
    from progidiff.wire.messages import ProposeRequest

    here, there = Engine.load(arguments.model, "cpu"), Engine.load(arguments.model, arguments.device)
    scene = Scene.make(here.model, 256)
    request = ProposeRequest((scene.target,), proposals=arguments.proposals, slices=(0, 1), seed=3)
    wanted, found = (_masks(engine, scene.array, scene.affine, request) for engine in (here, there))
    values = [dice(a, b) for a, b in zip(wanted, found, strict=True)]
    told("proposals: mean Dice to the CPU's", round(sum(values) / len(values), 4), sum(values) / len(values) >= LEAST_DICE)
    told("proposals: voxels in them", [int(mask.sum()) for mask in found[:4]], bool(found.any()))
    asked = iter(range(10**6))
    try:
        _masks(there, scene.array, scene.affine, request, lambda: next(asked) >= 3)
        told("cancel", "nothing was cancelled", False)
    except CancelledError:
        told("cancel", "within a step", True)


def _check_training(arguments: argparse.Namespace, told: Told) -> None:
    """One batch through the encoder's and the control branch's stage on both devices."""
    import copy

    import torch

    from progidiff.model.folder import load_model
    from progidiff.training.batches import painted_batches
    from progidiff.training.loop import uses_bf16
    from progidiff.training.stages import EncoderStage

    losses = []
    model = load_model(arguments.model, torch.device("cpu"), torch.float32, None)
    batch = painted_batches([], model.card, "cpu", 4).batch(4)
    for device in ("cpu", arguments.device):
        encoder = copy.deepcopy(model.image_encoder).to(device)
        here = type(batch)(*(getattr(batch, name).to(device) for name in ("images", "masks", "known")))
        stage = EncoderStage(encoder, _Given(here), [])  # type: ignore[arg-type]  # nothing resumes
        with torch.autocast(device, torch.bfloat16, enabled=device == "cuda" and uses_bf16(False)):
            loss, _ = stage.loss(4)
        loss.backward()
        size = sum(float(p.grad.square().sum()) for p in encoder.parameters() if p.grad is not None) ** 0.5
        losses.append((float(loss.detach()), size))
    for name, one, other in zip(("loss", "gradient"), *losses, strict=True):
        told(f"training: {name}, CPU and device", [round(one, 5), round(other, 5)], abs(one - other) <= LOSS_TOLERANCE * one)


class _Given:
    """A source of one batch."""

    def __init__(self, batch: Any) -> None:
        self._batch = batch

    def batch(self, count: int) -> Any:
        return self._batch


def _check_tuning(arguments: argparse.Namespace, told: Told) -> None:
    """A few steps of LoRA on phantoms; the best weights are those of a finished tuning, and cancelling keeps them."""
    import torch

    from progidiff.evaluation.cases import held_out_phantoms
    from progidiff.model.folder import load_model
    from progidiff.training.run import Watch
    from progidiff.training.stacks import stacks_of
    from progidiff.training.tuning import TuneSettings, tune

    model = load_model(arguments.model, torch.device(arguments.device), torch.float32, None)
    stacks = stacks_of(held_out_phantoms(6))
    steps = arguments.steps
    settings = TuneSettings(steps=steps, validate_every=max(1, steps // 2), validation_images=4, patience=None)
    tuned = tune(model, stacks[:4], stacks[4:], arguments.out / "tuning", settings, Watch(log=lambda line: None))
    before, best = tuned.curve[0]["dice"], max(point["dice"] for point in tuned.curve)
    told("tuning: Dice before and best", [round(before, 3), round(best, 3)], best >= before)
    told("tuning: steps", tuned.steps, tuned.steps == steps)


def _check_full_memory(arguments: argparse.Namespace, told: Told) -> None:
    """Proposals on a card that something else fills: refused in words, and right again when there is room."""
    import torch

    from experiments.bench.scene import Scene
    from progidiff.errors import ModelError
    from progidiff.sampling.engine import Engine
    from progidiff.wire.messages import ProposeRequest

    engine = Engine.load(arguments.model, "cuda")
    scene = Scene.make(engine.model, 512)
    request = ProposeRequest((scene.target,), proposals=64, slices=(0, 1), seed=3, batch_size=64)
    torch.cuda.empty_cache()
    torch.cuda.set_per_process_memory_fraction(1e-3)
    try:
        _masks(engine, scene.array, scene.affine, request)
        told("full memory", "smaller batches were enough")
    except ModelError as error:
        told("full memory", str(error), True)
    finally:
        torch.cuda.set_per_process_memory_fraction(1.0)
    told("after it, voxels", int(_masks(engine, scene.array, scene.affine, request).sum()), True)


# train ---------------------------------------------------------------------------------------------------------------------


def train(arguments: argparse.Namespace) -> None:
    """Go on with the encoder or the control branch for some minutes."""
    import torch
    from safetensors.torch import save_file

    from progidiff.model.folder import load_model
    from progidiff.model.networks import tokenize
    from progidiff.synthesis.labelmaps import unpack
    from progidiff.training.batches import painted_batches
    from progidiff.training.diffusion import ControlStage
    from progidiff.training.loop import LoopSettings, run_stage
    from progidiff.training.stages import EncoderStage

    done = _clock(arguments.minutes)
    told = Told(arguments.out / "train.json")
    device = torch.device(arguments.device)
    model = load_model(arguments.model, device, torch.float32, None)
    packed = arguments.folder / "volumes.npz"
    volumes = unpack(packed) if packed.exists() else []
    source = painted_batches(volumes, model.card, device, arguments.seed)
    validation = [painted_batches(volumes, model.card, device, 999).batch(8) for _ in range(2)]
    if arguments.stage == "encoder":
        stage: Any = EncoderStage(model.image_encoder, source, validation)
    else:
        assert model.mask_decoder is not None
        stage = ControlStage(
            model.controlnet,
            model.image_encoder,
            recycled=arguments.recycled,
            dice_weight=arguments.dice,
            vae=model.vae,
            unet=model.unet,
            decoder=model.mask_decoder,
            schedule=model.scheduler,
            tokens=tokenize(model.tokenizer, [model.card.prompt(t) for t in model.card.vocabulary], device),
            text_encoder=model.text_encoder,
            latent_shift=model.card.latent_shift,
            latent_scale=model.card.latent_scale,
            source=source,
            validation=validation,
            prompts_per_image=4,
        )
    images = arguments.images or _filling_batch(stage, device)
    told("images per step", images)
    told("seconds per step", _seconds_per_step(stage, images))
    left = arguments.minutes * 60 - 25
    steps = arguments.steps if arguments.device == "cpu" else max(20, int(left / told.facts["seconds per step"]))
    written = [time.monotonic()]

    def write() -> None:
        for name, network in (("image_encoder", model.image_encoder), ("controlnet", model.controlnet)):
            if name == "image_encoder" or arguments.stage == "control":
                tensors = {key: value.detach().half().cpu().contiguous() for key, value in network.state_dict().items()}
                save_file(tensors, arguments.out / f"{name}.safetensors")
        written[0] = time.monotonic()

    def stop() -> bool:
        if time.monotonic() - written[0] > 60:
            write()
        return done()

    from progidiff.errors import CancelledError

    settings = LoopSettings(
        steps, images, arguments.rate, warmup=min(40, max(1, steps // 5)), ema=0.99, validate_every=max(10, steps // 4),
        checkpoint_every=10**9, log_every=20, seed=arguments.seed,
    )  # fmt: skip
    made = [0]

    def count(name: str, step: int, total: int) -> None:
        made[0] = step

    with tempfile.TemporaryDirectory() as fresh:  # nothing is resumed: weights come from model folders alone
        try:
            told("curve", run_stage(stage, settings, Path(fresh), print, stop, count))
        except CancelledError as error:
            told("ended early", str(error))
    write()
    told("pictures", images * made[0])


def _filling_batch(stage: Any, device: Any) -> int:
    """The largest power of two of images whose step fits into the card's memory with a fifth to spare."""
    import torch

    if device.type != "cuda":
        return 2
    images = 16
    while images < 1024:
        torch.cuda.empty_cache()
        torch.cuda.reset_peak_memory_stats()
        try:
            _seconds_per_step(stage, images, 1)
        except torch.OutOfMemoryError:
            return images // 2
        if 2 * torch.cuda.max_memory_allocated() > 0.8 * torch.cuda.mem_get_info()[1]:
            return images
        images *= 2
    return images


def _seconds_per_step(stage: Any, images: int, repeats: int = 3) -> float:
    import torch

    began = 0.0
    for number in range(repeats + 1):
        if number == 1 or repeats == 1:
            began = time.monotonic()
        with torch.autocast("cuda", torch.bfloat16, enabled=torch.cuda.is_available()):
            loss, _ = stage.loss(images)
        loss.backward()
        for parameter in stage.trainable.parameters():
            parameter.grad = None
        if torch.cuda.is_available():
            torch.cuda.synchronize()
    return round((time.monotonic() - began) / repeats, 4)


# bench ---------------------------------------------------------------------------------------------------------------------


def bench(arguments: argparse.Namespace) -> None:
    """Speed of the bundled model, and of the full size where the device is a card."""
    from experiments.bench import BenchSettings, as_text, run_bench

    small = arguments.device == "cpu"
    settings = BenchSettings(
        arguments.model,
        arguments.device,
        arguments.proposals,
        repeats=1 if small else 5,
        slice_size=128 if small else 512,
        worker=False,
    )
    report = run_bench(settings, lambda line: print(line, flush=True))
    Told(arguments.out / "bench.json")("report", report.as_dict())
    print(as_text(report))


def main(argv: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("mode", choices=("pack", "check", "train", "bench"))
    parser.add_argument("folder", type=Path, help="folder of the packed data; for pack: folder that holds permissive/")
    parser.add_argument("out", type=Path, help="folder of the results; for pack: folder of the packed data")
    parser.add_argument("--model", type=Path, default=ROOT / "Resources" / "Models" / "default", help="newest weights")
    parser.add_argument("--device", choices=("cuda", "cpu"), default="cuda")
    parser.add_argument("--minutes", type=float, default=8.0, help="after which training ends")
    parser.add_argument("--stage", choices=("encoder", "control"), default="control")
    parser.add_argument("--images", type=int, help="images per step; by default as many as fill the card")
    parser.add_argument("--steps", type=int, default=40, help="of tuning, and of training on a CPU")
    parser.add_argument("--proposals", type=int, default=16)
    parser.add_argument("--rate", type=float, default=4e-4, help="peak learning rate")
    parser.add_argument("--recycled", type=float, default=0.5, help="share of masks noised from the model's own estimate")
    parser.add_argument("--dice", type=float, default=0.3, help="weight of the Dice loss on the decoded estimate")
    parser.add_argument("--seed", type=int, default=int(time.time()) % 10**6, help="of pictures and noise")
    arguments = parser.parse_args(argv)
    if arguments.mode == "pack":
        return pack(arguments.folder, arguments.out)
    _prepare(arguments.folder)
    arguments.out.mkdir(parents=True, exist_ok=True)
    return {"check": check, "train": train, "bench": bench}[arguments.mode](arguments)


if __name__ == "__main__":
    main()
