"""Whether two commits do the same, bit for bit on one machine: ``make golden BASE=<commit>``.

``python -m Testing.golden.compare BASE`` records (see ``record.py``) with the code of BASE, in a temporary worktree, and
with the code that is here, on the same inputs, and prints what is equal. ``python -m Testing.golden.compare --store`` writes
the files that the tests compare with; that belongs into a commit of its own, which says why the outcome changed.
"""

from __future__ import annotations

import argparse
import json
import os
import re
import subprocess
import sys
import tempfile
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

HERE = Path(__file__).resolve().parent
ROOT = HERE.parents[1]
STORED = HERE / "stored"
#: Between machines: the share of a request's voxels that rounding may move over the threshold (1 of 2000; a change of the
#: adapter's weights by 1 of 10,000 moves 3 of 20,000), and how far numbers, and numbers in texts, may go apart (relative
#: above 1).
VOXELS, NUMBERS, TEXTS = 0.0005, 0.005, 0.02

_DIGEST = re.compile(r"[0-9a-f]{32,}")
_NUMBER = re.compile(r"(\d+(?:\.\d+)?)")
_ORDER = {"order", "groups", "top_k", "random_pick"}


@dataclass(frozen=True)
class Recorded:
    """What ``record.py`` left in a folder: what was said, and the masks by the way they took and their request."""

    facts: dict[str, Any]
    masks: dict[str, np.ndarray]

    @classmethod
    def read(cls, folder: Path) -> Recorded:
        """Read a folder."""
        facts = json.loads((folder / "recording.json").read_text(encoding="utf-8"))
        with np.load(folder / "masks.npz") as masks:
            return cls(facts, dict(masks))


def record(checkout: Path, inputs: Path, out: Path) -> Recorded:
    """Record with the code and the test helpers of a checkout."""
    path = os.pathsep.join([str(checkout), str(checkout / "ProGiDiffSlicer")])
    environment = {**os.environ, "PYTHONPATH": path, "OMP_NUM_THREADS": "1", "MKL_NUM_THREADS": "1"}
    command = [sys.executable, str(HERE / "record.py"), str(inputs), str(out)]
    done = subprocess.run(command, env=environment, cwd=checkout, capture_output=True, text=True)
    if done.returncode:
        raise RuntimeError(f"The recording with {checkout} ended with {done.returncode}:\n{done.stderr[-4000:]}")
    return Recorded.read(out)


def differences(before: Any, after: Any, exact: bool, where: str = "") -> Iterator[str]:
    """Places that differ, of what both have. Not ``exact``: numbers may differ a little, digests are left out.

    A name that only one of two dictionaries has is not a difference; see :func:`lone_names`.
    """
    if isinstance(before, dict) and isinstance(after, dict):
        ranked = not exact and before.get("type") == "RankingEvent"
        if ranked and not _ranked_alike(before, after):
            yield f"{where}.order: {before['order']} was, {after['order']} is"
        for name in before.keys() & after.keys():
            if not (ranked and name in _ORDER):
                yield from differences(before[name], after[name], exact, f"{where}.{name}")
    elif isinstance(before, list) and isinstance(after, list) and len(before) == len(after):
        for number, pair in enumerate(zip(before, after, strict=True)):
            yield from differences(*pair, exact, f"{where}[{number}]")
    elif before != after and (exact or not _nearly(before, after)):
        yield f"{where}: {str(before)[:80]} was, {str(after)[:80]} is"


def _ranked_alike(before: dict[str, Any], after: dict[str, Any]) -> bool:
    """Whether an order is one of the earlier scores, but for such that are nearly the same."""
    scores = [before["scores"][number] for number in after["order"]]
    return sorted(before["order"]) == sorted(after["order"]) and all(np.diff(scores) < NUMBERS)


def _nearly(before: Any, after: Any, share: float = NUMBERS) -> bool:
    if isinstance(before, str) and isinstance(after, str):
        parts = _NUMBER.split(before), _NUMBER.split(after)
        if _DIGEST.fullmatch(before) and _DIGEST.fullmatch(after):
            return True
        numbers = zip(parts[0][1::2], parts[1][1::2], strict=False)
        return parts[0][::2] == parts[1][::2] and all(_nearly(float(a), float(b), TEXTS) for a, b in numbers)
    if isinstance(before, float) and isinstance(after, float):
        return abs(before - after) <= share * max(1.0, abs(before))
    return False


def lone_names(before: Any, after: Any) -> Iterator[str]:
    """Fields that only one side has, as ``- Type.name`` (was) or ``+ Type.name`` (is)."""
    if isinstance(before, dict) and isinstance(after, dict):
        for name in sorted(before.keys() ^ after.keys()):
            yield f"{'-' if name in before else '+'} {before.get('type', '')}.{name}"
        for name in before.keys() & after.keys():
            yield from lone_names(before[name], after[name])
    elif isinstance(before, list) and isinstance(after, list):
        for pair in zip(before, after, strict=False):
            yield from lone_names(*pair)


def compared(before: Recorded, after: Recorded, exact: bool) -> dict[str, list[str]]:
    """What is compared, by name, and how it differs."""
    table: dict[str, list[str]] = {}
    for name in {**before.masks, **after.masks}:
        table[f"masks, {name}"] = list(_mask_differences(before.masks.get(name), after.masks.get(name), exact))
    for kind in ("engine", "client", "kills", "panels"):
        for name, state in before.facts[kind].items():
            table[f"{kind}, {name}"] = list(differences(state, after.facts[kind].get(name), exact))
    old, new = before.facts["wire"], after.facts["wire"]
    sent = [[each["request"]["type"] for each in side] for side in (old, new)]
    table[f"wire, order of {len(old)} requests"] = list(differences(*sent, exact))
    for number, pair in enumerate(zip(old, new, strict=False)):
        table[f"wire, {number} {pair[0]['request']['type']}, {len(pair[0]['replies'])} replies"] = list(
            differences(*pair, exact)
        )
    return table


def _mask_differences(old: np.ndarray | None, new: np.ndarray | None, exact: bool) -> Iterator[str]:
    if old is None or new is None or old.shape != new.shape:
        yield f"{'none' if old is None else old.shape} was, {'none' if new is None else new.shape} is"
    elif (count := int(np.count_nonzero(old != new))) > (0 if exact else VOXELS * old.size):
        yield f"{count} of {old.size} voxels"


def inconsistencies(recorded: Recorded) -> Iterator[str]:
    """What has to hold within one recording: the same by every way, and nothing lost by undo and files."""
    facts, panels = recorded.facts, recorded.facts["panels"]
    # The mean probability travels in 256 steps; where it is above one half is among the masks.
    engine, client = (_without("mean_probability", facts[way]) for way in ("engine", "client"))
    yield from (f"engine and client{each}" for each in differences(engine, client, True))
    for name, mask in recorded.masks.items():
        way, what = name.split(", ")
        if way == "client":
            other = recorded.masks.get(f"engine, {what}")
        elif way == "accepted":  # the first line of the first target's list, the second of the second
            lines = panels["lists"][what.lower()]
            chosen = lines[list(panels["lists"]).index(what.lower())][0]
            other = recorded.masks[f"engine, a stack: {what.lower()}"][:, int(chosen.split()[-1]) - 1]
        else:
            continue
        yield from (f"{name}: {each}" for each in _mask_differences(other, mask, True))
    if panels["undo"] != panels["accepted"][:1] or panels["undo again"] or panels["redo"] != panels["undo"]:
        yield "undo and redo step by step"
    if panels["redo again"] != panels["accepted"]:
        yield "undo and redo of all"
    for file in ("read from .mrb", "read from .seg.nrrd"):
        for old, new in zip(panels["accepted"], panels[file], strict=True):
            if [*new[:4], *new[5:]] != [*old[:4], *old[5:]] or not np.allclose(new[4], old[4], atol=1e-6):
                yield f"{file}: {old[1]}"
    for name, tally in facts["kills"].items():
        if not tally["many steps"] or not tally["saved"] or tally["lost"] or tally["half"]:
            yield f"kills {name}: {tally}"


def _without(name: str, facts: Any) -> Any:
    if isinstance(facts, dict):
        return {key: _without(name, value) for key, value in facts.items() if key != name}
    return [_without(name, each) for each in facts] if isinstance(facts, list) else facts


def report(base: str, before: Recorded, after: Recorded) -> int:
    """Print the table; the number of lines that are not equal."""
    table = compared(before, after, exact=True)
    table |= {f"within {name}": list(inconsistencies(side)) for name, side in ((base, before), ("this checkout", after))}
    width = max(map(len, table))
    for name, found in table.items():
        print(f"{name:<{width}}  {'equal' if not found else f'{len(found)} DIFFER, first {found[0]}'}")
    lone = Counter(lone_names(before.facts, after.facts))
    if lone:
        print(f"fields that only {base} (-) or this checkout (+) has, and how often; they were not compared:")
        print("\n".join(f"  {name}  {count}" for name, count in sorted(lone.items())))
    differing = sum(map(bool, table.values()))
    print(f"{len(table) - differing} of {len(table)} equal, bit for bit")
    return differing


def main() -> int:
    """0 where all that both have is equal."""
    parser = argparse.ArgumentParser(
        prog="golden", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("base", nargs="?", metavar="BASE", help="commit to compare with")
    parser.add_argument("--store", action="store_true", help="record the files that the tests compare with")
    options = parser.parse_args()
    if bool(options.base) == options.store:
        parser.error("name a commit, as in make golden BASE=main, or --store")
    with tempfile.TemporaryDirectory() as place:
        inputs, checkout = Path(place) / "inputs", Path(place) / "base"
        if options.store:
            record(ROOT, inputs, STORED)
            return 0
        git = ["git", "-C", str(ROOT), "worktree"]
        if subprocess.run([*git, "add", "--quiet", "--detach", str(checkout), options.base]).returncode:
            parser.error(f'"{options.base}" cannot be checked out; name a commit that this repository has')
        try:
            before = record(checkout, inputs, Path(place) / "before")
            after = record(ROOT, inputs, Path(place) / "after")
        finally:
            subprocess.run([*git, "remove", "--force", str(checkout)], check=True)
    return 1 if report(options.base, before, after) else 0


if __name__ == "__main__":
    sys.exit(main())
