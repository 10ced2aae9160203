"""The module's worker behind a real ssh connection: runs, cancelling, and every way in which it fails in one sentence."""

from __future__ import annotations

import shlex
from collections.abc import Callable
from pathlib import Path
from typing import Any

import highdicom
import numpy as np
import pytest

from progidiff.wire.messages import SliceEvent
from ProGiDiffSlicerLib.worker.client import WorkerState
from ProGiDiffSlicerLib.worker.command import WorkerCommand, parse_command

from ..slicer_host.dicom_database import DicomDatabase
from ..sshd import SshServer
from .panel_support import opened
from .test_exporting import THIN, Case, Heard, database, written
from .worker_support import failed_run, finished, worker

Spin = Callable[..., None]
pytestmark = pytest.mark.usefixtures("app")
__all__ = ["database"]  # a fixture


def typed(words: list[str]) -> WorkerCommand:
    """The command as a person types it under Setup."""
    return parse_command(shlex.join(words))


@pytest.mark.slow
def test_a_run_and_a_cancelled_one(ssh_server: SshServer, spin: Spin, asked: Path) -> None:
    with worker(typed(ssh_server.organs({"pause": 0.2}))) as client:
        run = finished(client.run(), spin)
        assert run.outcomes == [("load", "succeeded"), ("set_image", "succeeded"), ("propose", "succeeded")]
        assert {event.slice_index for event in run.of(SliceEvent)} == {0, 1, 2}
        again = client.run()
        spin(lambda: bool(again.of(SliceEvent)))
        client.cancel()
        spin(lambda: again.done)
        assert again.outcomes[-1] == ("propose", "cancelled")
        assert client.state is WorkerState.READY, "the connection and the model stay"
    spin(lambda: not ssh_server.workers())
    assert not asked.exists()


@pytest.mark.slow
def test_a_connection_that_is_cut_keeps_what_came(ssh_server: SshServer, scene: Any, spin: Spin) -> None:
    with worker(typed(ssh_server.organs({"pause": 0.3}))) as client, opened(scene, client) as panel:
        panel.choose_volume()
        panel.propose("liver", proposals=2)
        spin(lambda: panel.session.store is not None and panel.session.store["liver"].received > 1)
        ssh_server.cut()
        spin(lambda: client.state is WorkerState.CRASHED)
        assert panel.said.startswith("The connection to the other computer was lost")
        panel.settle(spin)
        assert panel.table.rowCount > 0
        assert panel.review.accept() is not None
        # Another run starts another connection.
        panel.propose("liver", proposals=2)
        spin(lambda: not panel.session.running)
        assert client.state is WorkerState.READY
    spin(lambda: not ssh_server.workers())


@pytest.mark.slow
def test_a_connection_that_falls_silent_is_given_up(ssh_server: SshServer, spin: Spin) -> None:
    with worker(typed(ssh_server.organs({"pause": 30})), heartbeat_timeout_s=3.0) as client:
        client.start()
        spin(lambda: client.state is WorkerState.READY)
        stopped = ssh_server.sessions()
        for process in stopped:
            process.suspend()
        try:
            run = finished(client.run(), spin)
        finally:
            for process in stopped:
                process.resume()
        assert run.failure.kind == "lost"
    spin(lambda: not ssh_server.workers())


# The table of all that ssh says is with the command line.
FAILURES: dict[str, tuple[Callable[[SshServer], list[str]], str]] = {
    "unknown host key": (lambda s: s.organs(known=""), "The host key of the other computer is not known here"),
    "password": (lambda s: s.organs(user_key="stranger"), "lets nobody in without a password"),
}


@pytest.mark.slow
@pytest.mark.parametrize("name", FAILURES)
def test_what_fails_before_the_worker_runs_asks_nobody(name: str, ssh_server: SshServer, spin: Spin, asked: Path) -> None:
    command, sentence = FAILURES[name]
    with worker(typed(command(ssh_server)), start_timeout_s=30.0) as client:
        failure = failed_run(client, spin).failure
        assert failure.kind == "start"
        assert sentence in failure.message
        assert failure.details, "what ssh itself said is among the details"
    assert not asked.exists()


@pytest.mark.slow
def test_segments_become_dicom_over_there_and_come_back(
    ssh_server: SshServer, scene: Any, database: DicomDatabase, tmp_path: Path, spin: Spin
) -> None:
    case = Case(scene, database, tmp_path / "series", THIN)
    with worker(typed(ssh_server.organs())) as client:
        assert Heard(client, elsewhere=True).export(case, spin).startswith("2 segments are in Slicer's DICOM database")
    seg = highdicom.seg.segread(written(database))
    pixels = seg.get_pixels_by_source_instance(case.uids, assert_missing_frames_are_empty=True)
    for number, mask in enumerate(case.masks.values()):
        np.testing.assert_array_equal(pixels[..., number], mask)
