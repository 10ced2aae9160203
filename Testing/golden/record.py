"""What the product does with fixed inputs, written down: masks, rankings, a session on the wire, kills, undo, saved files.

It runs with the code and the test helpers that PYTHONPATH names, of this commit or of an older one (from e9e1d0e on)::

    PYTHONPATH=CHECKOUT:CHECKOUT/ProGiDiffSlicer python Testing/golden/record.py INPUTS OUT

INPUTS (a tiny model of random weights, adapters, an image) is made where it does not exist; today's code reads what older
code made. These are the interfaces that it needs, imported where they are used; where one of them moves, its import is tried
at the new place first and then at the old one:

- ``Engine.load``, ``set_image``, ``propose``, ``load_adapter``, ``unload_adapter``; ``ProposeRequest``; the events' fields
- ``WorkerClient.load``, ``set_image``, ``propose``, ``cancel``, ``load_adapter``, ``unload_adapter``, ``status``, ``ping``;
  ``RemoteError`` and ``CancelledError``
- the codec: bytes into frames, frames into requests and replies (dataclasses, whose fields are what is recorded)
- ``save_model``, and of the tests ``write_tiny_sd``, ``build_tiny``, ``write_adapter``
- of the tests ``killed_at_every_step`` (curated sets), ``Driver`` (the panels, by their widgets) and ``everything`` (all
  that a user can see of a segmentation)

The body has the same box on all slices, and a pixel of the model is two of the image's: the rule by which a grid is laid on
a body has changed once, and is the same for such an image.
"""

from __future__ import annotations

import dataclasses
import hashlib
import json
import os
import subprocess
import sys
import tempfile
import threading
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import numpy as np

PIXEL_MM, SLICE_MM, SHAPE = 2.0, 5.0, (4, 40, 44)
AFFINE = np.diag([-PIXEL_MM, -PIXEL_MM, SLICE_MM, 1.0])
#: Six kinds of request; the model's head finds the liver everywhere and the spleen nowhere.
REQUESTS: dict[str, dict[str, Any]] = {
    "one slice": {"targets": ("liver",), "proposals": 5, "slices": (1, 2), "seed": 3, "scheduler": "dpmsolver++"},
    "a stack": {"targets": ("liver", "left kidney"), "proposals": 3, "seed": 7},
    "with an adapter": {"targets": ("liver",), "proposals": 3, "seed": 7, "ranking": "medoid"},
    "an absent target": {"targets": ("spleen",), "proposals": 4, "slices": (0, 2), "seed": 1},
    "adaptive N": {"targets": ("liver",), "proposals": 24, "slices": (1, 3), "seed": 1, "adaptive": True, "steps": 1},
    "everywhere": {"targets": ("spleen",), "proposals": 4, "slices": (0, 2), "seed": 1, "everywhere": True},
}
#: Requests with the adapter; adaptive N is one of them because it stops before its maximum there.
ADAPTED = ("with an adapter", "adaptive N")
#: Fields that no two runs share.
VOLATILE = {"timing", "peak_memory_mb", "memory_mb", "device_memory_mb", "uptime_s", "pid", "python", "version", "created"}
PROMPT = "liver; left kidney"


def image() -> np.ndarray:
    """A small CT in HU, int16 (K, J, I), different on every slice within a body that is the same on all."""
    k, j, i = np.meshgrid(*map(np.arange, SHAPE), indexing="ij")
    body = ((j - 20) / 17) ** 2 + ((i - 22) / 19) ** 2 < 1
    organ = ((j - 15 - k) / 6) ** 2 + ((i - 15 + k) / 7) ** 2 < 1
    bone = ((j - 29) / 3) ** 2 + ((i - 24 + k) / 4) ** 2 < 1
    values = 30 + 40 * np.sin(i / 3 + k) * np.cos(j / 4) + 90 * organ + 180 * bone
    return np.where(body, values, -1000).astype(np.int16)


class Plain:
    """Messages and events as plain data: fields by name, arrays as a digest, the inputs' folder as a word."""

    def __init__(self, folder: Path) -> None:
        self.folder = str(folder)

    def __call__(self, value: Any) -> Any:
        if dataclasses.is_dataclass(value):
            fields = {field.name: getattr(value, field.name) for field in dataclasses.fields(value)}
            return {"type": type(value).__name__, **self(fields)}
        if isinstance(value, dict):
            return {str(name): self(each) for name, each in value.items() if name not in VOLATILE}
        if isinstance(value, tuple | list):
            return [self(each) for each in value]
        if isinstance(value, bytes):
            return {"bytes": len(value), "sha256": hashlib.sha256(value).hexdigest()}
        if isinstance(value, np.ndarray):
            digest = hashlib.sha256(np.ascontiguousarray(value).tobytes()).hexdigest()
            return {"dtype": value.dtype.name, "shape": list(value.shape), "sha256": digest}
        return value.replace(self.folder, "FOLDER") if isinstance(value, str) else value


def gathered(events: Iterable[Any], plain: Plain) -> tuple[list[Any], dict[str, np.ndarray]]:
    """The events of one request but for its progress, and masks, bool.

    By target those of the proposals, (slices, N, rows, columns); by "target above one half" where their mean probability is
    above one half, (slices, rows, columns).
    """
    kept = [event for event in events if type(event).__name__ != "ProgressEvent"]
    parts: dict[str, dict[int, list[np.ndarray]]] = {}
    means: dict[str, dict[int, np.ndarray]] = {}
    for event in kept:
        if hasattr(event, "masks"):
            parts.setdefault(event.target, {}).setdefault(event.slice_index, []).append(np.asarray(event.masks))
            if event.mean_probability is not None:
                means.setdefault(event.target, {})[event.slice_index] = event.mean_probability > 0.5
    masks = {target: np.stack([np.concatenate(slices[k]) for k in sorted(slices)]) for target, slices in parts.items()}
    masks |= {f"{target} above one half": np.stack([slices[k] for k in sorted(slices)]) for target, slices in means.items()}
    return [plain(event) for event in kept], masks


def as_sampled(settings: dict[str, Any]) -> Any:
    """A request for all pieces, as those are what is compared; older code drops none and has no such field."""
    from progidiff.wire.messages import ProposeRequest

    kept = {"keep_pieces": True} if hasattr(ProposeRequest, "keep_pieces") else {}
    return ProposeRequest(**{"steps": 2, **kept, **settings})


def record_engine(folder: Path, plain: Plain) -> tuple[dict[str, Any], dict[str, np.ndarray]]:
    """The six requests, in this process."""
    from progidiff.sampling.engine import Engine

    engine = Engine.load(folder / "model", "cpu")
    engine.set_image(image(), AFFINE, "CT")
    told, masks = {}, {}
    for name, settings in REQUESTS.items():
        if name in ADAPTED:
            engine.load_adapter(folder / "adapter")
        events: list[Any] = []
        engine.propose(as_sampled(settings), events.append, lambda: False)
        engine.unload_adapter()
        told[name], found = gathered(events, plain)
        masks |= {f"{name}: {target}": stack for target, stack in found.items()}
    return told, masks


def record_client(folder: Path, plain: Plain) -> tuple[dict[str, Any], dict[str, np.ndarray], list[Any]]:
    """The six requests and other calls through the client and a worker, and all that went over the wire."""
    from progidiff.errors import CancelledError
    from progidiff.wire.client import RemoteError, WorkerClient
    from progidiff.wire.codec import frame_to_reply, frame_to_request
    from progidiff.wire.frames import FrameDecoder
    from progidiff.wire.messages import ProposeRequest

    told, masks = {}, {}
    with tempfile.TemporaryDirectory() as place:
        command = [sys.executable, __file__, "tap", place, sys.executable, "-m", "progidiff", "worker"]
        with WorkerClient(command, heartbeat_timeout=300, start_timeout=300) as client:

            def refused(call: Any, *arguments: Any) -> None:
                try:
                    list(call(*arguments) or ())
                except RemoteError:
                    return
                raise AssertionError(f"{call.__name__} was not refused")

            refused(client.propose, ProposeRequest(("liver",)))
            client.load(folder / "model", "cpu")
            refused(client.propose, ProposeRequest(("liver",)))
            client.set_image(image(), AFFINE, "CT")
            client.set_image(image(), AFFINE, "CT")  # is there already
            for name, settings in REQUESTS.items():
                if name in ADAPTED:
                    client.load_adapter(folder / "adapter")
                    client.status()
                told[name], found = gathered(client.propose(as_sampled(settings)), plain)
                masks |= {f"{name}: {target}": stack for target, stack in found.items()}
                if name in ADAPTED:
                    client.unload_adapter()
            list(client.propose(ProposeRequest(("liver", "spleen"), proposals=2, steps=1, slices=(0, 1))))
            refused(client.propose, ProposeRequest(("pancreas",)))
            refused(client.load_adapter, folder / "worse")
            with client.propose(ProposeRequest(("liver",), proposals=1000, steps=50)) as stream:
                client.cancel()
                try:
                    list(stream)
                    raise AssertionError("the request was not cancelled")
                except CancelledError:
                    client.status()
            client.status()
        requests, replies = (
            [read(frame) for frame in FrameDecoder().feed((Path(place) / name).read_bytes())]
            for name, read in (("in", frame_to_request), ("out", frame_to_reply))
        )
    wire = []
    for number, request in requests:
        answers = [plain(reply) for answered, reply in replies if answered == number]
        answers = [each for each in answers if each["type"] not in ("ProgressEvent", "Heartbeat")]
        if answers and answers[-1]["type"] == "Cancelled":  # how far it came is a matter of time
            answers = answers[-1:]
        wire.append({"request": plain(request), "replies": answers})
    return told, masks, wire


def tap(place: Path, command: list[str]) -> int:
    """Run a worker, and copy what goes in and out of it into the files ``in`` and ``out``."""
    worker = subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE)

    def copy(source: Any, target: Any, path: Path) -> None:
        with path.open("wb", buffering=0) as file, target:
            while data := source.read1(1 << 16):
                file.write(data)
                target.write(data)
                target.flush()

    threading.Thread(target=copy, args=(sys.stdin.buffer, worker.stdin, place / "in"), daemon=True).start()
    copy(worker.stdout, sys.stdout.buffer, place / "out")
    return worker.wait()


def record_kills() -> dict[str, Any]:
    """What became of a curated set whose writers were killed at every step; ``make kills`` also kills at random moments."""
    from Testing.engine.curation_kills import killed_at_every_step

    told = {}
    for name, power_loss in (("at every step", False), ("power lost at every step", True)):
        with tempfile.TemporaryDirectory() as place:
            tally = killed_at_every_step(Path(place) / "set", power_loss)
        facts = {"many steps": tally.kills > 20, "saved": len(tally.saved), "lost": len(tally.lost), "half": len(tally.half)}
        told[name] = facts
    return told


def record_panels(folder: Path, plain: Plain) -> tuple[dict[str, Any], dict[str, np.ndarray]]:
    """A prompt, two accepted segments, undo and redo, and both kinds of files read again, by the module's own widgets.

    Returns what was seen, and the accepted masks, bool (K, J, I).
    """
    from Testing.panel.driver import Driver, qt, slicer  # isort: skip
    from Testing.panel.accept_support import everything

    raised: list[Any] = []
    sys.excepthook = lambda *error: raised.append(error)  # where Qt and VTK leave what is raised in a slot
    driver = Driver()
    driver.panels.setup.ui.modelFolderEdit.setCurrentPath(str(folder / "model"))
    driver.load(folder / "image.nii.gz", "Größe 肝")
    if hasattr(driver.panels.prompt.ui, "keepPiecesCheckBox"):  # see as_sampled
        driver.panels.prompt.ui.keepPiecesCheckBox.setChecked(True)
    driver.ask(PROMPT, REQUESTS["a stack"]["proposals"], 2, seed=REQUESTS["a stack"]["seed"])
    driver.wait(lambda: driver.settled, 240)
    lists = {}
    for number, target in enumerate(PROMPT.split("; ")):
        driver.choose_target(target)
        lists[target] = driver.rows()
        driver.press_in_table((qt.Qt.Key_1, qt.Qt.Key_2)[number])
        driver.press_in_table(qt.Qt.Key_Return)
        driver.settle()

    names: dict[str, str] = {}  # identifiers are drawn at random
    masks: dict[str, np.ndarray] = {}

    def seen(node: Any, volume: Any) -> Any:
        segments = [] if node is None else everything(node, volume)
        for _id, name, *rest in segments:
            masks.setdefault(name, np.frombuffer(rest[-1], bool).reshape(SHAPE))
        return [[names.setdefault(first, f"segment {len(names)}"), *rest] for first, *rest in segments]

    review, states = driver.panels.review.ui, {"accepted": seen(driver.accepted(), driver.volume)}
    for name in ("undo", "undo again", "redo", "redo again"):
        driver.click(review.undoButton if name.startswith("undo") else review.redoButton)
        driver.settle()
        states[name] = seen(driver.accepted(), driver.volume)
    with tempfile.TemporaryDirectory() as place:
        scene, segments = str(Path(place) / "Szene é.mrb"), str(Path(place) / "Segmente 肝.seg.nrrd")
        assert slicer.util.saveNode(driver.accepted(), segments)
        assert slicer.util.saveScene(scene)
        slicer.mrmlScene.Clear(0)
        slicer.util.loadScene(scene)
        (node,) = slicer.util.getNodesByClass("vtkMRMLSegmentationNode")
        (volume,) = slicer.util.getNodesByClass("vtkMRMLScalarVolumeNode")
        states["read from .mrb"] = seen(node, volume)
        states["read from .seg.nrrd"] = seen(slicer.util.loadSegmentation(segments), volume)
    driver.close()
    assert not raised, raised
    return {"lists": lists, **{name: plain(state) for name, state in states.items()}}, masks


def make(folder: Path) -> None:
    """A model whose control branch speaks and whose head finds the liver and the left kidney everywhere, the spleen nowhere;
    an adapter for it, one that is worse than its base, and the image as a file."""
    import SimpleITK as sitk
    import torch
    from Testing.engine.conftest import build_tiny, write_tiny_sd
    from Testing.engine.test_worker_real_engine import write_adapter

    from progidiff.model.folder import save_model

    folder.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory() as place:
        settings = {"vocabulary": ["liver", "spleen", "left kidney"], "spacing_mm": 2 * PIXEL_MM, "modalities": ["CT"]}
        model = build_tiny(write_tiny_sd(Path(place) / "sd"), Path(place) / "silent", **settings)
    numbers = torch.Generator().manual_seed(2)
    for module in (*model.controlnet.controlnet_down_blocks, model.controlnet.controlnet_mid_block):
        for parameter in module.parameters():
            parameter.data = torch.randn(parameter.shape, generator=numbers)
    encoder = model.image_encoder
    encoder.learn_classes(3)
    encoder.segmentation_head.requires_grad_(False)
    encoder.segmentation_head.weight.zero_()
    odds = torch.logit(torch.tensor([0.99, 1e-4, 0.99]))
    encoder.segmentation_head.bias.copy_(odds.repeat_interleave(encoder.config.stride**2))
    save_model(model, folder / "model")
    write_adapter(folder / "model", folder / "adapter", 1)
    write_adapter(folder / "model", folder / "worse", 2, better=False, reason="It is not better.")
    volume = sitk.GetImageFromArray(image())
    volume.SetSpacing((PIXEL_MM, PIXEL_MM, SLICE_MM))
    sitk.WriteImage(volume, str(folder / "image.nii.gz"))


def record(folder: Path, out: Path) -> None:
    """Record everything; the writers first, since they fork."""
    plain = Plain(folder)
    kills = record_kills()
    if not folder.exists():
        make(folder)
    panels, accepted = record_panels(folder, plain)
    client, client_masks, wire = record_client(folder, plain)
    engine, masks = record_engine(folder, plain)
    out.mkdir(parents=True, exist_ok=True)
    recording = {"engine": engine, "client": client, "wire": wire, "kills": kills, "panels": panels}
    (out / "recording.json").write_text(json.dumps(recording, ensure_ascii=False), encoding="utf-8")
    by_way = {"engine": masks, "client": client_masks, "accepted": accepted}
    arrays = {f"{way}, {name}": mask for way, found in by_way.items() for name, mask in found.items()}
    np.savez_compressed(out / "masks.npz", **arrays)


if __name__ == "__main__":
    if sys.argv[1] == "tap":
        sys.exit(tap(Path(sys.argv[2]), sys.argv[3:]))
    record(Path(sys.argv[1]).resolve(), Path(sys.argv[2]))
    sys.stdout.flush()
    os._exit(0)  # without the end of Qt and VTK, which may crash where torch is loaded too
