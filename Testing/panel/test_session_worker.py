"""The session with real worker processes: scripted ones, and the engine with a tiny model and with the bundled one."""

from __future__ import annotations

import subprocess
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
import psutil
import pytest
import SimpleITK as sitk
import slicer

from progidiff.places import sample_volume
from progidiff.volumes.geometry import Geometry
from progidiff.volumes.slicing import plan_slices
from ProGiDiffSlicerLib.idle import IdleQueue
from ProGiDiffSlicerLib.session import ProposalSession, RunRequest, SessionState
from ProGiDiffSlicerLib.worker.command import WorkerCommand

from ..volume_examples import GEOMETRIES, oriented
from .session_support import (
    add_sequence,
    add_transform,
    add_volume,
    run_request,
    segment_array,
    segment_points,
    sorted_points,
)
from .worker_support import Client, gone, run_python, scripted, worker

Spin = Callable[..., None]
ROOT = Path(__file__).resolve().parents[2]
PAUSING = Path(__file__).with_name("pausing_worker.py")
#: Axes in the order in which slices are read, so that an engine which works on the array as it is sees canonical slices.
LPS = oriented("LPS", (20, 16, 6), (1.0, 1.0, 2.5))


class Told(ProposalSession):
    """A session that remembers how its runs ended and what it said."""

    def __init__(self, scene: Any, client: Client) -> None:
        super().__init__(scene, client, IdleQueue())
        self.ends: list[tuple[str, ...]] = []
        self.texts: list[str] = []
        self.warnings: list[str] = []
        for name in ("finished", "failed", "cancelled", "dropped"):
            getattr(self, name).connect(self._listener(name))
        self.warned.connect(lambda warning: self.warnings.append(warning.message))
        self.progressChanged.connect(lambda fraction, text, eta_s: self.texts.append(text))

    def _listener(self, name: str) -> Callable[..., None]:
        return lambda *values: self.ends.append((name, *values))


@contextmanager
def session_with(scene: Any, command: WorkerCommand) -> Iterator[tuple[Told, Client]]:
    with worker(command) as client:
        session = Told(scene, client)
        try:
            yield session, client
        finally:
            session.cleanup()


def volume_of(scene: Any, geometry: Geometry = LPS, name: str = "Größe 肝") -> Any:
    values = np.random.default_rng(6).integers(0, 1000, geometry.shape_kji).astype(np.int16)
    return add_volume(scene, geometry, name, values)


def thresholded(volume: Any, count: int) -> np.ndarray:
    """What the scripted engine proposes: bool (N, K, J, I)."""
    array = slicer.util.arrayFromVolume(volume)
    return array > (np.linspace(0.2, 0.8, count) * float(array.max()))[:, None, None, None]


def request(volume: Any, mode: str | None = None, **options: Any) -> RunRequest:
    return run_request(volume, "liver", **{"proposals": 4, "model_folder": mode, "device": "cpu", **options})


def test_a_whole_run(scene: Any, spin: Spin) -> None:
    volume = volume_of(scene)
    with session_with(scene, scripted()) as (session, _client):
        session.start(request(volume))
        spin(lambda: bool(session.ends))
        assert session.ends == [("finished",)]
        assert session.warnings == ["The batch was halved."]
        assert "slice 6/6" in session.texts
        store = session.store
        assert store is not None
        session.proposals.show(store, "liver", range(4), 2)
        spin(lambda: not session.proposals.busy)
        for number, mask in enumerate(thresholded(volume, 4)):
            found = segment_array(session.proposals.node, session.proposals.segment_id(number), LPS.shape_kji)
            np.testing.assert_array_equal(found, mask)


def test_all_frames_of_a_sequence(scene: Any, spin: Spin) -> None:
    rng = np.random.default_rng(9)
    arrays = [rng.integers(0, 1000, LPS.shape_kji).astype(np.int16) for _ in range(3)]
    proxy, browser = add_sequence(scene, LPS, arrays)
    with session_with(scene, scripted()) as (session, _client):
        session.start(request(proxy, frames="all"))
        browser.SetSelectedItemNumber(2)
        spin(lambda: bool(session.ends))
        assert session.ends == [("finished",)]
        for number, array in enumerate(arrays):
            browser.SetSelectedItemNumber(number)
            spin(lambda: not session.proposals.busy)
            assert session.proposals.selected == 0
            found = segment_array(session.proposals.node, session.proposals.segment_id(0), LPS.shape_kji)
            np.testing.assert_array_equal(found, array > 0.2 * array.max())


@pytest.mark.slow
@pytest.mark.parametrize(
    ("mode", "said"),
    [
        ("memory", "not enough memory"),
        ("missing", "choose a model folder"),
        ("refuse_image", "choose another"),
        ("die", "ended unexpectedly"),
        ("unfinished", "ended without a result"),
    ],
)
def test_failures_are_one_sentence_and_the_next_run_works(scene: Any, spin: Spin, mode: str, said: str) -> None:
    volume = volume_of(scene)
    with session_with(scene, scripted()) as (session, _client):
        session.start(request(volume, mode))
        spin(lambda: bool(session.ends))
        ((how, message),) = session.ends
        assert how == "failed"
        assert said in message
        assert session.failure is not None
        session.start(request(volume))
        spin(lambda: len(session.ends) > 1)
        assert session.ends[-1] == ("finished",)


def half_way(session: Told, spin: Spin, volume: Any) -> None:
    session.start(request(volume, "pause"))
    spin(lambda: session.store is not None and session.store["liver"].received == 3)


def assert_half_kept(session: Told, spin: Spin, volume: Any) -> None:
    expected = thresholded(volume, 4)
    expected[:, 3:] = False
    store = session.store
    assert store is not None
    assert [row.rank for row in store.rows("liver")] == [None] * 4
    spin(lambda: not session.proposals.busy)
    found = segment_array(session.proposals.node, session.proposals.segment_id(1), LPS.shape_kji)
    np.testing.assert_array_equal(found, expected[1])


def test_a_worker_that_is_killed_keeps_what_was_received(scene: Any, spin: Spin) -> None:
    volume = volume_of(scene)
    with session_with(scene, run_python(str(PAUSING))) as (session, client):
        half_way(session, spin, volume)
        psutil.Process(client.pid).kill()
        spin(lambda: bool(session.ends))
        assert session.ends[0][0] == "failed"
        assert_half_kept(session, spin, volume)
        session.start(request(volume))
        spin(lambda: len(session.ends) > 1)
        assert session.ends[-1] == ("finished",)


def test_a_cancelled_run_keeps_what_was_received(scene: Any, spin: Spin) -> None:
    volume = volume_of(scene)
    with session_with(scene, run_python(str(PAUSING))) as (session, client):
        half_way(session, spin, volume)
        pid = client.pid
        session.cancel()
        spin(lambda: bool(session.ends))
        assert session.ends == [("cancelled",)]
        assert_half_kept(session, spin, volume)
        assert not gone(pid), "the same worker goes on"


def test_a_second_run_takes_over_at_once(scene: Any, spin: Spin) -> None:
    volume = volume_of(scene)
    with session_with(scene, run_python(str(PAUSING))) as (session, client):
        half_way(session, spin, volume)
        pid = client.pid
        session.start(request(volume, proposals=2))
        spin(lambda: len(session.ends) > 1)
        assert session.ends == [("cancelled",), ("finished",)]
        assert client.pid == pid
        assert session.store is not None
        assert len(session.store.rows("liver")) == 2


@pytest.mark.parametrize("how", ["closed", "deleted"])
def test_scene_closed_and_volume_deleted_half_way(scene: Any, spin: Spin, how: str) -> None:
    volume = volume_of(scene)
    with session_with(scene, run_python(str(PAUSING))) as (session, _client):
        half_way(session, spin, volume)
        if how == "closed":
            scene.Clear(0)
            assert session.ends == [("cancelled",)]
        else:
            scene.RemoveNode(volume)
            assert session.ends[0][0] == "dropped"
        assert session.state is SessionState.IDLE
        assert session.store is None
        again = volume_of(scene, name="again")
        session.start(request(again))
        spin(lambda: session.ends[-1] == ("finished",))
        store = session.store
        assert store is not None
        assert store["liver"].mask(3).array.sum() == thresholded(again, 4)[3].sum()


def test_cleaning_up_half_way_leaves_no_process(scene: Any, spin: Spin) -> None:
    volume = volume_of(scene)
    with worker(run_python(str(PAUSING))) as client:
        session = Told(scene, client)
        half_way(session, spin, volume)
        pid = client.pid
        session.cleanup()
        client.stop(wait=True)
        assert gone(pid)
        assert session.proposals.node is None


# The engine ---------------------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def tiny_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The engine tests' tiny untrained model, built by another process: this one stays without torch."""
    folder = tmp_path_factory.mktemp("modèle 肝")
    code = (
        "import sys; from pathlib import Path; from Testing.engine.conftest import build_tiny, write_tiny_sd; "
        "folder = Path(sys.argv[1]); "
        "build_tiny(write_tiny_sd(folder / 'sd'), folder / 'model', vocabulary=['liver', 'spleen'], "
        "modalities=['CT', 'MR'])"
    )
    command = run_python("-c", code, str(folder))
    subprocess.run([command.program, *command.arguments], cwd=ROOT, env=command.environment, check=True, timeout=300)
    return folder / "model"


def engine_command() -> WorkerCommand:
    return run_python("-P", "-m", "progidiff", "worker")


@pytest.mark.slow
def test_the_engine_and_the_session_cut_every_volume_alike(scene: Any, spin: Spin, tiny_folder: Path) -> None:
    """The engine's slices fit, and what it says of the volumes agrees with the voxels that lie in the scene."""
    with session_with(scene, engine_command()) as (session, _client):
        for name in ("PSR", "ARI", "oblique", "single slice"):
            geometry = GEOMETRIES[name]
            volume = volume_of(scene, geometry)
            ends = len(session.ends)
            session.start(request(volume, str(tiny_folder), proposals=3, steps=1))
            spin(lambda before=ends: len(session.ends) > before, 180)
            assert session.ends[-1] == ("finished",), session.ends
            store = session.store
            assert store is not None
            assert store["liver"].received == plan_slices(geometry).count
            rows = store.rows("liver")
            assert any(row.millilitres > 0 for row in rows)
            session.proposals.show(store, "liver", [row.index for row in rows], None)
            spin(lambda: not session.proposals.busy)
            for row in rows:
                crop = store["liver"].mask(row.index)
                assert int(crop.array.sum()) * geometry.voxel_volume_ml == pytest.approx(row.millilitres)
                points = sorted_points(np.argwhere(crop.array) + np.array(crop.origin_kji), geometry.affine)
                found = segment_points(session.proposals.node, session.proposals.segment_id(row.index))
                np.testing.assert_allclose(found, points, atol=2e-4)


def dice(a: np.ndarray, b: np.ndarray) -> float:
    return float(2 * (a & b).sum() / (a.sum() + b.sum()))


@pytest.mark.slow
def test_the_bundled_model_on_the_bundled_volume(scene: Any, spin: Spin) -> None:
    """The liver is where the labels have it, and a volume that a transform turns into place gives the very same proposals.

    The second volume is stored rotated by half a turn about the long axis, as of a patient who lies face down; its parent
    transform turns it back.
    """
    path = sample_volume()
    image = sitk.ReadImage(str(path))
    geometry, array = Geometry.from_sitk(image), sitk.GetArrayFromImage(image)
    labels = sitk.GetArrayFromImage(sitk.ReadImage(str(path.parent / "labels" / "synthetic_abdomen_labels.nii.gz")))
    turn = np.diag([-1.0, -1.0, 1.0, 1.0])
    plain = add_volume(scene, geometry, "as it is", array)
    turned = add_volume(scene, Geometry(geometry.shape_ijk, turn @ geometry.affine), "face down", array)
    turned.SetAndObserveTransformNodeID(add_transform(scene, turn).GetID())
    found: list[list[np.ndarray]] = []
    with session_with(scene, engine_command()) as (session, _client):
        for volume in (plain, turned):
            ends = len(session.ends)
            session.start(request(volume, None, extent="range", slices=(12, 13), proposals=3, top_k=2, seed=3))
            spin(lambda before=ends: len(session.ends) > before, 300)
            assert session.ends[-1] == ("finished",), session.ends
            store = session.store
            assert store is not None
            assert list(store.slices) == [12]
            best = store.rows("liver")[0].index
            session.proposals.show(store, "liver", range(3), best)
            spin(lambda: not session.proposals.busy)
            node = session.proposals.node
            assert node.GetTransformNodeID() == volume.GetTransformNodeID()
            masks = [segment_array(node, session.proposals.segment_id(n), geometry.shape_kji) for n in range(3)]
            assert dice(masks[int(best)][12], labels[12] == 1) > 0.8
            assert not masks[int(best)][:12].any()
            found.append(masks)
    for first, second in zip(*found, strict=True):
        np.testing.assert_array_equal(first, second)


@pytest.mark.slow
def test_nothing_here_needs_torch() -> None:
    """Imported on its own, the session's side loads neither torch nor nibabel nor pydantic."""
    code = (
        "import sys; sys.path.insert(0, sys.argv[1]); from Testing import slicer_host as host; host.start(); "
        "import ProGiDiffSlicerLib.session, ProGiDiffSlicerLib.worker.client; "
        "print([name for name in ('torch', 'diffusers', 'nibabel', 'pydantic', 'scipy') if name in sys.modules])"
    )
    command = run_python("-c", code, str(ROOT))
    result = subprocess.run(
        [sys.executable, *command.arguments],
        cwd=ROOT,
        env={**command.environment, "QT_QPA_PLATFORM": "offscreen"},
        capture_output=True,
        text=True,
        timeout=120,
    )
    assert result.stdout.strip().splitlines()[-1:] == ["[]"], result.stdout + result.stderr
