"""Writers of a curated set that are killed: at random moments, at every step, and by a loss of power.

``python -m Testing.engine.curation_kills --kills 300`` prints how many cases were written, how many writers were killed, and
how many cases were lost. The tests run a small number of the same. It needs ``os.fork``.
"""

from __future__ import annotations

import argparse
import os
import random
import signal
import sys
import tempfile
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import SimpleITK as sitk

from progidiff.curation import CuratedSet, NewCase

WRITERS = 3
_KILLED = 9


def example(number: int) -> NewCase:
    """A small case; every number makes another one."""
    image = np.random.default_rng(number).normal(0, 100, (3, 12, 14)).astype(np.int16)
    mask = np.zeros(image.shape, dtype=bool)
    mask[1, 2 : 4 + number % 5, 3:9] = True
    return NewCase(image, np.diag([-2.0, -2.0, 5.0, 1.0]), {"liver": mask}, "CT", "axial", "liver", volume_key=str(number))


@dataclass
class Tally:
    """What happened.

    Attributes:
        saved: ids that a writer was told are saved.
        kills: writers that were killed.
        lost: ids that were saved and are not whole in the set.
        half: cases that are listed and not whole.
    """

    saved: set[str] = field(default_factory=set)
    kills: int = 0
    lost: set[str] = field(default_factory=set)
    half: set[str] = field(default_factory=set)

    def judge(self, folder: Path) -> None:
        """Look for lost and half cases, and whether the index can be made again from what is there."""
        kept = CuratedSet(folder)
        if not kept.is_set(folder):
            self.lost |= self.saved
            return
        whole = set()
        for case in kept.list():
            try:
                case.read()
                whole.add(case.id)
            except Exception:
                self.half.add(case.id)
        self.half |= {p.case for p in kept.verify(older_than_s=0) if not p.harmless}
        self.lost |= self.saved - whole
        assert kept.rebuild_index() == len(kept.list())

    def __str__(self) -> str:
        return f"cases written {len(self.saved)}, kills {self.kills}, lost {len(self.lost)}, half cases {len(self.half)}"


def random_kills(folder: Path, kills: int, seed: int = 0, longest_s: float = 0.6) -> Tally:
    """Several writers at once on one folder, each killed (SIGKILL) after a random moment; new ones take their place."""
    chance, tally = random.Random(seed), Tally()
    running: dict[int, tuple[int, float]] = {}  # pid: pipe of ids, time of death
    began = 0
    while tally.kills < kills or running:
        while len(running) < WRITERS and began < kills:
            pid, pipe = _writer(folder, seed * 1_000_000 + began * 1000)
            running[pid] = pipe, time.monotonic() + chance.uniform(0.002, longest_s)
            began += 1
        pid = min(running, key=lambda each: running[each][1])
        pipe, due = running.pop(pid)
        time.sleep(max(0.0, due - time.monotonic()))
        os.kill(pid, signal.SIGKILL)
        os.waitpid(pid, 0)
        with os.fdopen(pipe) as told:
            # a line that was cut is an id that nobody was told
            tally.saved |= {line.strip() for line in told if len(line) == 33}
        tally.kills += 1
    tally.judge(folder)
    return tally


def _writer(folder: Path, number: int) -> tuple[int, int]:
    """A process that saves cases for ever and tells their ids."""
    ours, theirs = os.pipe()
    pid = os.fork()
    if pid == 0:
        os.close(ours)
        try:
            kept = CuratedSet(folder)
            while True:
                number += 1
                os.write(theirs, f"{kept.add(example(number))}\n".encode())
        finally:
            os._exit(1)
    os.close(theirs)
    return pid, ours


class Steps:
    """Ends this process before or after the n-th step on the file system, and notes what a power loss would undo.

    Attributes:
        renames: (source, place) of renames whose folder was not written out since.
        unsynced: files that were not written out.
    """

    def __init__(self, fatal: int, note: Path) -> None:
        self._fatal, self._note, self._done = fatal, note, 0
        self._renames: list[tuple[str, str]] = []
        self._synced: set[int] = set()

    def install(self) -> None:
        """Count the steps from here on."""
        for owner, name in ((os, "replace"), (os, "rename"), (os, "fsync"), (os, "mkdir"), (sitk, "WriteImage")):
            setattr(owner, name, self._counted(name, getattr(owner, name)))

    def _counted(self, name: str, call: Callable[..., Any]) -> Callable[..., Any]:
        def step(*args: Any, **kwargs: Any) -> Any:
            self._tick()
            result = call(*args, **kwargs)
            if name in ("replace", "rename"):
                self._renames.append((str(args[0]), str(args[1])))
            elif name == "fsync":
                self._synced.add(os.fstat(args[0]).st_ino)
                held = {str(p) for _s, p in self._renames if _inode(Path(p).parent) == os.fstat(args[0]).st_ino}
                self._renames = [pair for pair in self._renames if pair[1] not in held]
            self._tick()
            return result

        return step

    def _tick(self) -> None:
        self._done += 1
        if self._done == self._fatal:
            lines = [f"rename\t{source}\t{place}" for source, place in self._renames]
            lines += [f"synced\t{inode}\t" for inode in self._synced]
            self._note.write_text("\n".join(lines))
            os._exit(_KILLED)


def _inode(path: Path) -> int:
    try:
        return path.stat().st_ino
    except OSError:
        return -1


def killed_at_every_step(folder: Path, power_loss: bool = False, seed: int = 0) -> Tally:
    """One writer after the other on one folder, the n-th ended at its n-th step, until one comes through.

    With ``power_loss`` what was not written out is gone as well: contents, and any of the renames.
    """
    chance, tally = random.Random(seed), Tally()
    kept: set[str] = set()  # files that the disk has had time to write out
    for fatal in range(1, 1000):
        note, told = folder.parent / "note", folder.parent / "told"
        for path in (note, told):
            path.unlink(missing_ok=True)
        pid = os.fork()
        if pid == 0:
            try:
                Steps(fatal, note).install()
                identifier = CuratedSet(folder).add(example(fatal))
                told.write_text(identifier)
            finally:
                os._exit(0)
        _pid, status = os.waitpid(pid, 0)
        if told.exists():
            tally.saved.add(told.read_text())
        if os.waitstatus_to_exitcode(status) != _KILLED:
            break
        tally.kills += 1
        if power_loss:
            kept = _lose_power(folder, note, chance, kept)
    tally.judge(folder)
    return tally


def _lose_power(folder: Path, note: Path, chance: random.Random, kept: set[str]) -> set[str]:
    """Undo what was not written out, but for ``kept``, files of earlier writers; the files that are there then."""
    lines = [line.split("\t") for line in note.read_text().splitlines()]
    synced = {int(inode) for kind, inode, _rest in lines if kind == "synced"}
    for kind, source, place in reversed(lines):
        if kind == "rename" and chance.random() < 0.5 and Path(place).exists() and Path(source).parent.is_dir():
            os.rename(place, source)
    known = {str(p) for p in folder.rglob("*") if p.is_file() and p.stat().st_ino not in synced}
    for path in known - kept:
        if chance.random() < 0.7:
            os.truncate(path, 0)
    return {str(p) for p in folder.rglob("*") if p.is_file()}


def main() -> int:
    """Run all three; 0 where nothing was lost."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--kills", type=int, default=300, help="writers to kill at random moments")
    parser.add_argument("--seed", type=int, default=0)
    options = parser.parse_args()
    bad = 0
    with tempfile.TemporaryDirectory() as place:
        for number, (name, run) in enumerate(
            {
                "killed at random": lambda folder: random_kills(folder, options.kills, options.seed),
                "killed at every step": lambda folder: killed_at_every_step(folder),
                "power lost at every step": lambda folder: killed_at_every_step(folder, True, options.seed),
            }.items()
        ):
            folder = Path(place) / str(number) / "set"
            folder.parent.mkdir()
            tally = run(folder)
            print(f"{name}: {tally}", flush=True)
            bad += len(tally.lost) + len(tally.half)
    return 1 if bad else 0


if __name__ == "__main__":
    sys.exit(main())
