"""A worker that tunes, and looks for the next case, by a script: ``python tuning_process.py SCRIPT``, a name below."""

from __future__ import annotations

import base64
import json
import os
import sys
import time
from pathlib import Path

import numpy as np

from progidiff.errors import DatasetError
from progidiff.wire.messages import (
    AdaptDone,
    AdaptPicture,
    AdaptRequest,
    AdaptStart,
    AdaptStep,
    AdaptValidation,
    NextDone,
    NextItem,
    NextRequest,
    NextStart,
    NextVolume,
)
from progidiff.worker import tasks
from progidiff.worker.server import serve
from progidiff.worker.session import RequestRun

# one grey pixel
PNG = base64.b64decode("iVBORw0KGgoAAAANSUhEUgAAAAEAAAABCAAAAAA6fptVAAAACklEQVR4nGNoAAAAggCBd81ytgAAAABJRU5ErkJggg==")


def write_adapter(out: Path, better: bool = True, base: str = "0" * 64) -> None:
    """A folder that looks like an adapter."""
    out.mkdir(parents=True, exist_ok=True)
    cases = {"training": 4, "validation": 2}
    score = {"dice": 0.5, "n_slices": 3, "n_patients": 2}
    card = {
        "format_version": "1.0", "name": out.name, "adapter_id": f"id-{out.name}", "base_model_id": "base",
        "base_sha256": base, "better": better, "reason": "On held-out cases it was measured.",
        "rank": 8, "alpha": 8, "layers": "attention", "modalities": ["CT"], "vocabulary": ["liver"], "cases": cases,
        "patients": cases, "steps": 4, "best_step": 4, "seconds": 1, "device": "cpu", "seed": 0, "sha256": "0" * 64,
        "targets": {"liver": cases}, "before": {"liver": score},
        "after": {"liver": {**score, "dice": 0.75}}, "retention": {"set": "phantoms", "n": 5, "before": 0.8, "after": 0.79},
    }  # fmt: skip
    (out / "adapter.safetensors").write_bytes(b"weights")
    (out / "adapter_card.json").write_text(json.dumps(card), "utf-8")


def adapt(request: AdaptRequest, run: RequestRun) -> AdaptDone:
    """The course of a tuning."""
    cases = {"training": 4, "validation": 2}
    run.emit(AdaptStart("a", 4, cases, {"liver": cases}))
    print("a stray print of a library", flush=True)
    run.emit(AdaptValidation(0, 0.5, {"liver": 0.5}, best=True))
    for step in range(1, 5):
        run.emit(AdaptStep(step, 4, 1.0 / step, 4.0 - step))
    if SCRIPT == "crash":
        time.sleep(0.5)  # what was said before is written by then
        print("torch.OutOfMemoryError: no memory", file=sys.stderr, flush=True)
        os._exit(3)
    if SCRIPT == "refuse":
        raise DatasetError("No case labels a target that is to be tuned.")
    if SCRIPT == "deaf":
        time.sleep(600)
    while SCRIPT == "wait" and not run.cancelled():
        time.sleep(0.01)
    run.emit(AdaptValidation(4, 0.75, {"liver": 0.75}, best=True))
    write_adapter(Path(request.out), better=SCRIPT != "worse")
    run.emit(AdaptPicture("x", "liver", 0.5, 0.75, np.frombuffer(PNG, np.uint8)))
    return AdaptDone(request.out, "a", SCRIPT != "worse", run.cancelled(), "It was measured.", {})


def find_next(request: NextRequest, run: RequestRun) -> NextDone:
    """The course of a search for the next case."""
    run.emit(NextStart(3, 0, ""))
    odd = ("The slices are coronal.", "The values are odd.")
    items = [
        NextItem("a.nii.gz", 0.2, "liver", 1, (1.0, 2.0, 3.0)),
        NextItem("deep/b.nii.gz", 0.6, "pancreas", 4, (4.0, 5.0, 6.0), notes=odd),
    ]
    broken = NextItem("c.nii.gz", reason="It cannot be read.")
    for done, item in enumerate([*items, broken], 1):
        run.emit(NextVolume(done, 3, 1.0, item))
    while SCRIPT == "search and wait" and not run.cancelled():
        time.sleep(0.01)
    return NextDone((items[1], items[0]), (broken,), run.cancelled())


if __name__ == "__main__":
    SCRIPT = sys.argv[1]
    tasks.adapt, tasks.find_next = adapt, find_next
    serve()
