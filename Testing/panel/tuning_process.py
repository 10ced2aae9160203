"""A stand-in for ``progidiff adapt`` and ``progidiff next``: says scripted JSON lines and obeys the word "stop".

Run as ``python tuning_process.py SCRIPT OUT``; SCRIPT is one of the names below.
"""

from __future__ import annotations

import base64
import json
import sys
import time
from pathlib import Path

# one grey pixel
PNG = base64.b64decode("iVBORw0KGgoAAAANSUhEUgAAAAEAAAABCAAAAAA6fptVAAAACklEQVR4nGNoAAAAggCBd81ytgAAAABJRU5ErkJggg==")


def say(**event: object) -> None:
    print(json.dumps(event), flush=True)


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


def adapt(script: str, out: Path) -> int:
    """The course of a tuning."""
    cases, targets = {"training": 4, "validation": 2}, {"liver": {"training": 4, "validation": 2}}
    say(event="start", adapter_id="a", steps=4, cases=cases, targets=targets)
    print("a stray print of a library", flush=True)
    say(event="validation", step=0, dice=0.5, per_target={"liver": 0.5}, best=True)
    for step in range(1, 5):
        say(event="step", step=step, steps=4, loss=1.0 / step, eta_s=4.0 - step)
    if script == "crash":
        print("torch.OutOfMemoryError: no memory", file=sys.stderr)
        return 3
    if script == "refuse":
        say(event="error", code="dataset", message="No case labels a target that is to be tuned.")
        return 2
    if script == "deaf":
        time.sleep(600)
    stopped = script == "wait" and sys.stdin.readline().strip() == "stop"
    say(event="validation", step=4, dice=0.75, per_target={"liver": 0.75}, best=True)
    write_adapter(out, better=script != "worse")
    picture = {"case": "x", "target": "liver", "before": 0.5, "after": 0.75, "png": base64.b64encode(PNG).decode()}
    say(event="pictures", items=[picture])
    say(
        event="done",
        folder=str(out),
        adapter_id="a",
        better=script != "worse",
        cancelled=stopped,
        reason="It was measured.",
        card={},
    )
    return 0


def search(script: str) -> int:
    """The course of a search for the next case."""
    say(event="start", volumes=2, known=0, message="")
    items = [
        {"path": "a.nii.gz", "disagreement": 0.2, "target": "liver", "slice": 1, "ras": [1.0, 2.0, 3.0]},
        {"path": "deep/b.nii.gz", "disagreement": 0.6, "target": "pancreas", "slice": 4, "ras": [4.0, 5.0, 6.0]},
    ]
    items[1]["notes"] = ["The slices are coronal.", "The values are odd."]
    for done, item in enumerate(items, 1):
        say(event="volume", done=done, volumes=2, eta_s=1.0, item=item)
    if script == "search and wait":
        sys.stdin.readline()
    say(event="done", ranking=sorted(items, key=lambda item: -float(item["disagreement"])), failures=[], cancelled=False)  # type: ignore[arg-type]
    return 0


if __name__ == "__main__":
    sys.exit(search(sys.argv[1]) if sys.argv[1].startswith("search") else adapt(sys.argv[1], Path(sys.argv[2])))
