"""The client with the real worker: the engine, torch and a tiny model behind the pipe."""

from __future__ import annotations

import dataclasses
from pathlib import Path

import numpy as np
import psutil
import pytest

from progidiff.wire.messages import ProgressEvent, ProposeRequest, RankingEvent, SliceEvent
from ProGiDiffSlicerLib.worker.client import WorkerState
from ProGiDiffSlicerLib.worker.command import local_command

from ..engine.conftest import phantom, tiny_model_folder, tiny_sd
from .worker_support import Client, Record, Spin, finished, gone, worker

pytestmark = pytest.mark.usefixtures("app")
__all__ = ["tiny_model_folder", "tiny_sd"]  # fixtures
REQUEST = ProposeRequest(("liver",), proposals=4, steps=2, seed=3)
LONG = dataclasses.replace(REQUEST, proposals=512, steps=50)


def submit(client: Client, folder: Path, request: ProposeRequest = REQUEST) -> Record:
    volume, affine = phantom()
    return Record(client.load(str(folder), "cpu"), client.set_image(volume, affine, "CT"), client.propose(request))


def masks(record: Record) -> dict[int, np.ndarray]:
    """bool (N, rows, columns) by slice; a slice may come in several blocks."""
    parts: dict[int, list[np.ndarray]] = {}
    for event in record.of(SliceEvent):
        known = parts.setdefault(event.slice_index, [])
        assert event.first_proposal == sum(map(len, known))
        known.append(event.masks)
    return {index: np.concatenate(known) for index, known in parts.items()}


@pytest.mark.slow
def test_a_run_gives_the_same_proposals_again_and_in_a_worker_started_anew(tiny_model_folder: Path, spin: Spin) -> None:
    with worker(local_command()) as client:
        runs = [submit(client, tiny_model_folder)]
        spin(lambda: runs[-1].done, 240)
        assert runs[0].outcomes == [("load", "succeeded"), ("set_image", "succeeded"), ("propose", "succeeded")]
        assert client.loaded is not None
        assert client.loaded.vocabulary == ("liver",)
        first = masks(runs[0])
        assert sorted(first) == [0, 1, 2, 3]
        assert all(stack.shape == (4, 30, 34) for stack in first.values())
        assert len(runs[0].of(RankingEvent)) == 1
        runs.append(submit(client, tiny_model_folder))
        spin(lambda: runs[-1].done, 240)
        psutil.Process(client.pid).kill()
        spin(lambda: client.state is WorkerState.CRASHED)
        runs.append(submit(client, tiny_model_folder))
        spin(lambda: runs[-1].done, 240)
        for run in runs[1:]:
            again = masks(run)
            assert sorted(again) == sorted(first)
            assert all(np.array_equal(again[index], first[index]) for index in first)


@pytest.mark.slow
def test_cancel_unknown_target_and_stop_on_one_worker(tiny_model_folder: Path, tmp_path: Path, spin: Spin) -> None:
    with worker(local_command()) as client:
        run = submit(client, tiny_model_folder, LONG)
        spin(lambda: len(run.ends) == 2 and bool(run.of(ProgressEvent)), 240)
        assert client.cancel()
        spin(lambda: run.done, 240)
        assert run.outcomes[-1] == ("propose", "cancelled")
        pid = client.pid

        wrong = finished(Record(client.propose(dataclasses.replace(REQUEST, targets=("heart",)))), spin)
        assert (wrong.failure.kind, wrong.failure.code) == ("remote", "model")

        missing = finished(submit(client, tmp_path / "no model"), spin)
        assert (missing.failure.kind, missing.failure.code) == ("remote", "model")
        assert client.pid == pid

        last = submit(client, tiny_model_folder, LONG)
        spin(lambda: len(last.ends) == 2 and bool(last.of(ProgressEvent)), 240)
        client.stop()
        assert last.outcomes[-1] == ("propose", "cancelled")
        spin(lambda: gone(pid) and not client._leaving)
