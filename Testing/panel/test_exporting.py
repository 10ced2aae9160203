"""Accepted segments as DICOM SEG in Slicer's DICOM database, through a real worker process."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import highdicom
import numpy as np
import psutil
import pydicom
import pytest
import slicer

from progidiff.targets import target_for
from progidiff.volumes.geometry import Geometry
from progidiff.volumes.reading import read_volume
from progidiff.wire.messages import ProposeRequest, WriteSeg
from ProGiDiffSlicerLib.idle import IdleQueue
from ProGiDiffSlicerLib.scene.exporting import INSTANCES, Exporting, _request
from ProGiDiffSlicerLib.scene.labelmaps import segments_of
from ProGiDiffSlicerLib.scene.provenance import Provenance, write_provenance

from ..slicer_host.dicom_database import REACHABLE, DicomDatabase
from ..volume_examples import oblique, oriented, write_patient_series
from .accept_support import add_segments, add_transform
from .panel_support import opened
from .session_support import FakeClient, add_volume
from .worker_support import Client, python, scripted, worker

Spin = Callable[..., None]
THIN = oriented("LPS", (24, 20, 16), (0.8, 0.8, 0.6))
TILTED = oblique((21, 19, 12))


@pytest.fixture
def database(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> DicomDatabase:
    made = DicomDatabase(tmp_path / "database")
    monkeypatch.setattr(slicer, "dicomDatabase", made, raising=False)
    return made


class Case:
    """A volume from the database, and two segments of it that overlap."""

    def __init__(self, scene: Any, database: DicomDatabase, folder: Path, geometry: Geometry) -> None:
        write_patient_series(folder, geometry)
        volume = read_volume(folder)
        self.uids = [str(pydicom.dcmread(file).SOPInstanceUID) for file in volume.dicom_files]
        for file in volume.dicom_files:
            database.insert(str(file), False, False)
        self.geometry = volume.geometry
        self.volume = add_volume(scene, volume.geometry, "CT", volume.array)
        self.volume.SetAttribute(INSTANCES, " ".join(self.uids))
        rng = np.random.default_rng(5)
        shape = volume.geometry.shape_kji
        self.masks = {"Liver": rng.random(shape) < 0.3, "Left kidney": rng.random(shape) < 0.2}
        self.masks["Liver"][0, 0, 0] = self.masks["Left kidney"][-1, -1, -1] = True
        self.segmentation = add_segments(scene, self.volume, self.masks, shared=False)
        liver = self.segment("Liver")
        target = target_for("liver")
        liver.SetColor(*target.color)
        liver.SetTag("TerminologyEntry", target.terminology_entry)
        asked = ProposeRequest(("liver", "spleen"), seed=7)
        write_provenance(liver, Provenance("Leber; Milz", "liver", 3, asked, model_id="abdomen-1", adapter_id="mr-2"))

    def segment(self, name: str) -> Any:
        return self.segmentation.GetSegmentation().GetSegment(name)


class Heard:
    """An exporting, and what it told."""

    def __init__(self, client: Any, elsewhere: bool) -> None:
        self.idle = IdleQueue()
        self.exporting = Exporting(self.idle, client, lambda: elsewhere)
        self.told: list[str] = []
        self.exporting.told.connect(self.told.append)

    def export(self, case: Case, spin: Spin) -> str:
        self.exporting.export(case.segmentation, "Liver", case.volume)
        assert self.exporting.busy
        spin(lambda: not self.exporting.busy)
        (sentence,) = self.told
        return sentence


def written(database: DicomDatabase) -> Path:
    (path,) = (Path(database.databaseDirectory) / "dicom" / "ProGiDiff").iterdir()
    assert database.instanceForFile(str(path))
    return path


def test_the_stand_in_offers_only_what_python_reaches() -> None:
    offered = {name for name in dir(DicomDatabase) if not name.startswith("_")}
    assert offered <= REACHABLE


@pytest.mark.slow
@pytest.mark.parametrize(("geometry", "elsewhere"), [(THIN, False), (TILTED, True)], ids=["thin here", "oblique elsewhere"])
def test_segments_are_in_the_database_to_the_last_voxel(
    geometry: Geometry, elsewhere: bool, scene: Any, database: DicomDatabase, tmp_path: Path, spin: Spin
) -> None:
    case = Case(scene, database, tmp_path / "series", geometry)
    # Moved in the scene, the images stay where they were taken.
    shift = add_transform(scene, np.array([[1, 0, 0, 30.0], [0, 1, 0, 0], [0, 0, 1, -8], [0, 0, 0, 1]]))
    case.volume.SetAndObserveTransformNodeID(shift.GetID())
    case.segmentation.SetAndObserveTransformNodeID(shift.GetID())
    with worker() as client:
        sentence = Heard(client, elsewhere).export(case, spin)
    assert sentence.startswith("2 segments are in Slicer's DICOM database")
    path = written(database)
    assert path.name in sentence
    seg = highdicom.seg.segread(path)
    pixels = seg.get_pixels_by_source_instance(case.uids, assert_missing_frames_are_empty=True)
    for number, (name, mask) in enumerate(case.masks.items()):
        assert seg.SegmentSequence[number].SegmentLabel == name
        np.testing.assert_array_equal(pixels[..., number], mask)
    assert (str(seg.PatientName), seg.PatientID, seg.StudyDescription) == ("Müller^Jörg", "P-17", "Größe")
    liver, kidney = seg.SegmentSequence
    assert (liver.SegmentAlgorithmType, kidney.SegmentAlgorithmType) == ("SEMIAUTOMATIC", "MANUAL")
    assert liver.SegmentedPropertyTypeCodeSequence[0].CodeValue == target_for("liver").type.value
    assert liver.SegmentationAlgorithmIdentificationSequence[0].AlgorithmName == "ProGiDiff abdomen-1 + mr-2"


def test_headers_travel_where_paths_mean_nothing(scene: Any, database: DicomDatabase, tmp_path: Path, spin: Spin) -> None:
    case = Case(scene, database, tmp_path / "series", THIN)
    sent: dict[bool, WriteSeg] = {}
    for elsewhere in (False, True):
        client = WritingClient()
        heard = Heard(client, elsewhere)
        heard.exporting.export(case.segmentation, "Liver", case.volume)
        spin(lambda client=client: bool(client.calls))
        (sent[elsewhere],) = client.values
        heard.exporting.cleanup()
    assert sent[False].files == tuple(database.fileForInstance(uid) for uid in case.uids)
    assert sent[False].headers is None
    headers = sent[True].headers
    assert headers is not None
    assert (sent[True].files, len(sent[True].header_sizes)) == ((), len(case.uids))
    # The pixels stay here: of each file what stands before them, and no path.
    whole = b"".join(Path(file).read_bytes() for file in sent[False].files)
    assert len(whole) - headers.size >= 2 * THIN.shape_ijk[0] * THIN.shape_ijk[1] * len(case.uids)
    assert str(tmp_path).encode() not in headers.tobytes()
    for request in sent.values():
        assert request.instances == tuple(case.uids)


class WritingClient(FakeClient):
    def write_seg(self, request: WriteSeg) -> Any:
        return self._call("write_seg", request)


def test_why_it_cannot_be_exported(scene: Any, database: DicomDatabase, tmp_path: Path, spin: Spin) -> None:
    case = Case(scene, database, tmp_path / "series", THIN)
    exporting = Heard(WritingClient(), False).exporting

    def why() -> str:
        return exporting.obstacle(case.segmentation, "Liver", case.volume)

    assert why() == ""
    assert exporting.obstacle(None, "", case.volume).startswith("Accept a proposal")
    case.volume.RemoveAttribute(INSTANCES)
    assert why().startswith("CT is not from Slicer's DICOM database")
    case.volume.SetAttribute(INSTANCES, "1.2.3 1.2.4")
    assert why().startswith("The images of CT are not in Slicer's DICOM database any more")
    case.volume.SetAttribute(INSTANCES, " ".join(case.uids))
    database.closeDatabase()
    assert why().startswith("The images of CT are not in Slicer's DICOM database any more")


@pytest.mark.parametrize("elsewhere", [False, True], ids=["here", "elsewhere"])
def test_an_image_that_is_gone_is_told_and_nothing_is_written(
    elsewhere: bool, scene: Any, database: DicomDatabase, tmp_path: Path, spin: Spin
) -> None:
    case = Case(scene, database, tmp_path / "series", THIN)
    Path(database.fileForInstance(case.uids[5])).unlink()
    heard = Heard(WritingClient(), elsewhere)
    assert heard.export(case, spin).startswith("An image of CT is not in Slicer's DICOM database any more")
    assert not Path(database.databaseDirectory).exists()


@pytest.mark.slow
def test_what_the_worker_refuses_is_told_and_takes_no_run_along(
    scene: Any, database: DicomDatabase, tmp_path: Path, spin: Spin
) -> None:
    case = Case(scene, database, tmp_path / "series", THIN)

    def harden(shift_mm: float) -> None:
        shift = add_transform(scene, np.array([[1, 0, 0, 0], [0, 1, 0, 0], [0, 0, 1, shift_mm], [0, 0, 0, 1.0]]))
        for node in (case.volume, case.segmentation):
            node.SetAndObserveTransformNodeID(shift.GetID())
            node.HardenTransform()

    with worker() as client:
        harden(0.6)
        assert "voxels are not those of its DICOM images" in Heard(client, False).export(case, spin)
        harden(-0.6)
        place = Path(database.databaseDirectory)
        place.write_text("a file where the folder should be")
        assert Heard(client, False).export(case, spin).startswith("The DICOM SEG cannot be written to ")
        place.unlink()
        heard = Heard(client, False)
        heard.exporting.export(case.segmentation, "Liver", case.volume)
        spin(lambda: not heard.idle.waiting)
        Path(database.fileForInstance(case.uids[0])).write_bytes(b"overwritten meanwhile" * 50)
        run = client.run()
        spin(lambda: run.done and not heard.exporting.busy)
    assert "replaced or moved since they were loaded" in heard.told[0]
    assert run.outcomes == [("load", "succeeded"), ("set_image", "succeeded"), ("propose", "succeeded")]
    assert len(list(segments_of(case.segmentation))) == 2


def test_a_segment_that_is_edited_meanwhile_is_told(scene: Any, database: DicomDatabase, tmp_path: Path, spin: Spin) -> None:
    case = Case(scene, database, tmp_path / "series", THIN)
    heard = Heard(WritingClient(), False)
    steps = _request(case.segmentation, "Liver", case.volume, False)
    next(steps)
    labelmap = case.segment("Liver").GetRepresentation("Binary labelmap")
    labelmap.Modified()
    heard.idle.submit(steps, heard.told.append, lambda error: heard.told.append(str(error)))
    spin(lambda: bool(heard.told))
    assert heard.told == ["Liver was changed meanwhile; export it again."]


@pytest.mark.slow
def test_a_worker_that_ends_is_told_and_another_export_works(
    scene: Any, database: DicomDatabase, tmp_path: Path, spin: Spin
) -> None:
    case = Case(scene, database, tmp_path / "series", THIN)
    with worker(python("import sys; sys.exit(3)")) as client:
        assert "did not start" in Heard(client, False).export(case, spin)
    with worker() as client:
        client.start()
        spin(lambda: client.hello is not None)
        heard = Heard(client, False)
        heard.exporting.export(case.segmentation, "Liver", case.volume)
        spin(lambda: client.state.value == "busy")
        psutil.Process(client.pid).kill()
        spin(lambda: not heard.exporting.busy)
        assert heard.told[0].startswith("The worker ended unexpectedly")
        heard.told.clear()
        assert heard.export(case, spin).startswith("2 segments are in")
    written(database)


@pytest.fixture
def client(app: Any) -> Iterator[Client]:
    with worker(scripted()) as made:
        yield made


@pytest.mark.slow
def test_the_button(scene: Any, database: DicomDatabase, tmp_path: Path, spin: Spin, client: Client) -> None:
    with opened(scene, client) as panel:
        button = panel.review.ui.exportButton
        assert not button.enabled
        assert button.toolTip.startswith("Accept a proposal")
        other = panel.choose_volume(name="loaded from NIfTI")
        panel.parameters.targetSegmentation = add_segments(scene, other, {"a": np.ones((8, 12, 14), bool)})
        assert not button.enabled
        assert button.toolTip.startswith("loaded from NIfTI is not from Slicer's DICOM database")

        case = Case(scene, database, tmp_path / "series", THIN)
        panel.prompt.ui.volumeSelector.setCurrentNode(case.volume)
        panel.parameters.targetSegmentation = case.segmentation
        assert button.enabled
        assert button.toolTip.startswith("Writes the segments")
        button.click()
        assert not button.enabled
        spin(lambda: button.enabled)
        assert panel.said.startswith("2 segments are in Slicer's DICOM database")
    written(database)
