"""The module as Slicer loads it: its life from setup to exit, the scene, and its own test; its worker invents organs."""

from __future__ import annotations

import gc
import hashlib
import sys
import urllib.parse
import urllib.request
import weakref
from collections.abc import Callable, Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import psutil
import pytest
import qt
import slicer

from progidiff.places import sample_volume
from ProGiDiffSlicerLib.scene.provenance import read_provenance
from ProGiDiffSlicerLib.worker.client import WorkerState
from ProGiDiffSlicerLib.worker.command import WorkerCommand

from .. import slicer_host as host
from .accept_support import everything
from .panel_support import GRID, Opened, nested_masks
from .session_support import add_volume
from .worker_support import organs

Spin = Callable[..., None]
MODULE = Path(__file__).resolve().parents[2] / "ProGiDiffSlicer" / "ProGiDiffSlicer.py"


@pytest.fixture
def loaded(app: Any, scene: Any) -> Iterator[Any]:
    """The module as Slicer's factory loads it, unloaded at the end unless the test has done so."""
    made = host.load_module(MODULE)
    yield made
    made.unload()


def invent(widget: Any, **script: Any) -> Any:
    """Give the module a worker process that invents organs, in place of the one that runs."""
    command, client = organs(**script), widget.logic.services.client
    client.stop(wait=True)
    client._command = lambda: command
    return widget


@pytest.fixture
def invented(module: Any) -> Any:
    """The module, shown, with a worker process that invents organs."""
    module.enter()
    return invent(module)


def workers() -> list[psutil.Process]:
    """Worker processes that this process started."""
    return [child for child in psutil.Process().children(recursive=True) if child.status() != psutil.STATUS_ZOMBIE]


def start_run(module: Any, prompt: str = "liver; spleen") -> Any:
    """Load the sample, propose; the session."""
    panels = module.panels
    volume = slicer.util.loadVolume(str(sample_volume()), {"name": "Süßer Bauch"})
    panels.prompt.ui.volumeSelector.setCurrentNode(volume)
    panels.prompt.ui.promptEdit.setText(prompt)
    module._parameters.proposals = 4
    panels.prompt.ui.proposeButton.click()
    assert module.logic.services.session.running, panels.status.text
    return module.logic.services.session


def interrupted_run(module: Any, spin: Spin) -> Any:
    """A run of which the first slices have arrived, and that goes on for long; the session."""
    session = start_run(invent(module, pause=0.2))
    before = session.store
    spin(lambda: session.store not in (None, before))
    return session


def received(session: Any) -> dict[tuple[int, int], np.ndarray]:
    """What has arrived of the liver: a mask for each proposal and slice."""
    found = session.store["liver"]
    return {(number, index): found.slice_mask(number, index) for number in range(found.count) for index in found.uncertainty}


def test_opening_the_module_starts_nothing(module: Any, spin: Spin) -> None:
    module.enter()
    spin()
    assert workers() == []
    assert module.logic.services.client.state is WorkerState.STOPPED


def test_what_slicer_shows_about_the_module(loaded: Any) -> None:
    info = loaded.info
    assert (info.title, info.categories) == ("ProGiDiffSlicer", ["Segmentation"])
    assert "research" in info.helpText
    assert "2601.16060" in info.acknowledgementText
    assert not info.icon.isNull()


def test_the_sample_volume_is_registered_from_the_installation(loaded: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    categories: list[str] = []
    sources: list[dict[str, Any]] = []
    logic = SimpleNamespace(
        registerCustomSampleDataCategory=lambda category, title: categories.append(category),
        registerCustomSampleDataSource=lambda **source: sources.append(source),
    )
    monkeypatch.setitem(sys.modules, "SampleData", SimpleNamespace(SampleDataLogic=logic))
    loaded.source.registerSampleData()
    assert categories == ["ProGiDiffSlicer"]
    (source,) = sources
    url = urllib.parse.urlparse(source["uris"])
    assert url.scheme == "file"
    found = Path(urllib.request.url2pathname(url.path))
    assert found == sample_volume()
    assert source["checksums"] == "SHA256:" + hashlib.sha256(found.read_bytes()).hexdigest()
    assert Path(source["thumbnailFileName"]).is_file()


def test_the_first_volume_is_chosen(module: Any, scene: Any) -> None:
    assert module._parameters.inputVolume is None
    node = add_volume(scene, GRID)
    module.enter()
    assert module.panels.prompt.ui.volumeSelector.currentNode() is node


@pytest.mark.slow
def test_a_killed_worker_leaves_what_had_arrived_and_one_click_starts_another(invented: Any, spin: Spin) -> None:
    panels, client = invented.panels, invented.logic.services.client
    session = start_run(invented)
    spin(lambda: not session.running)
    accepted = panels.review.accept()
    assert accepted.changed_voxels > 0
    before = everything(accepted.segmentation_node, invented._parameters.inputVolume)
    interrupted_run(invented, spin)
    had = received(session)
    (worker,) = workers()
    worker.kill()
    spin(lambda: not session.running)
    assert panels.status.text.startswith("The worker")
    assert panels.prompt.line.text == invented._parameters.prompt == "liver; spleen"
    left = received(session)
    assert all(np.array_equal(left[place], mask) for place, mask in had.items())
    assert everything(accepted.segmentation_node, invented._parameters.inputVolume) == before
    assert panels.proposals.selected is not None
    quick = organs()
    client._command = lambda: quick
    assert not panels.ui.restartButton.isHidden()
    panels.ui.restartButton.click()
    spin(lambda: client.state is WorkerState.READY)
    assert panels.ui.restartButton.isHidden()
    assert panels.review.accept() is not None
    panels.prompt.ui.proposeButton.click()
    spin(lambda: not session.running)
    assert session.failure is None
    assert panels.proposals.selected.rank == 1


def test_a_worker_that_cannot_be_started_is_one_sentence(invented: Any, spin: Spin) -> None:
    invented.logic.services.client._command = lambda: WorkerCommand("/nowhere/python", ("-m", "progidiff"), {})
    session = start_run(invented)
    spin(lambda: not session.running)
    said = invented.panels.status.text
    assert said
    assert "\n" not in said
    assert not invented.panels.ui.restartButton.isHidden()
    assert invented.panels.prompt.line.text == "liver; spleen"


@pytest.mark.slow
def test_a_cancelled_run_then_a_closed_scene_in_the_next_one(invented: Any, scene: Any, spin: Spin) -> None:
    panels, session = invented.panels, interrupted_run(invented, spin)
    (worker,) = workers()
    panels.prompt.ui.proposeButton.click()
    spin(lambda: not session.running)
    assert not session.store["liver"].ranked
    accepted = panels.review.accept()
    facts = read_provenance(accepted.segmentation_node.GetSegmentation().GetSegment(accepted.segment_id))
    assert facts.rank is None, "what is there can be accepted, without a rank"
    panels.prompt.ui.proposeButton.click()
    invented.exit()  # switching modules does not stop a run
    spin(lambda: session.running and session.store is not None and session.store["liver"].received > 0)
    invented.enter()
    scene.Clear(0)
    spin()
    assert not session.running
    assert session.store is None
    assert panels.proposals.selected is None
    assert panels.prompt.ui.volumeSelector.currentNode() is None
    assert slicer.util.getNodesByClass("vtkMRMLSegmentationNode") == []
    assert workers() == [worker], "it stays for the next prompt"
    again = start_run(invent(invented))
    spin(lambda: not again.running)
    assert again.failure is None


@pytest.mark.slow
def test_unloading_in_a_run_leaves_no_process_and_no_observer(app: Any, scene: Any, spin: Spin) -> None:
    before = observed(scene)
    loaded = host.load_module(MODULE)
    loaded.holder.enter()
    interrupted_run(loaded.widget, spin)
    panels = weakref.ref(loaded.widget.panels)
    services = weakref.ref(loaded.widget.logic.services)
    loaded.unload()
    assert workers() == []
    assert observed(scene) == before
    del loaded
    gc.collect()
    assert panels() is None, "somebody still holds the panels"
    assert services() is None, "somebody still holds the services"


@pytest.mark.slow
@pytest.mark.usefixtures("slicer_version")
def test_closing_scenes_leaves_no_parameters_behind(loaded: Any, scene: Any) -> None:
    """Slicer 5.10 never removes the observer of ``connectGui``, which holds the parameters and their observers."""
    loaded.holder.enter()
    shown = []
    for _closed in range(3):
        shown.append(weakref.ref(loaded.widget._parameters))
        loaded.widget.panels.prompt.ui.promptEdit.setText("liver")
        scene.Clear(0)
        assert loaded.widget._parameters is not shown[-1]()
        assert loaded.widget.panels.prompt.ui.promptEdit.text == loaded.widget._parameters.prompt
    gc.collect()
    assert [each() for each in shown] == [None] * 3


@pytest.mark.slow
def test_the_application_quits_in_a_run_while_a_segment_is_edited(loaded: Any, spin: Spin) -> None:
    """The clean-up needs the Segment Editor and the module of segmentations, which are unloaded later."""
    session = start_run(invent(loaded.widget))
    spin(lambda: not session.running)
    review = loaded.widget.panels.review
    review.accept()
    loaded.widget.panels.prompt.ui.proposeButton.click()
    review.edit()
    review.ui.segmentEditor.setActiveEffectByName("Paint")
    order = host.unload_order()
    needed = ("Markups", "Segmentations", "Sequences", "SubjectHierarchy", "Terminologies", "Volumes")
    assert all(order.index("ProGiDiffSlicer") < order.index(name) for name in needed)
    assert session.running
    host.quit_application()
    assert loaded.widget.panels is None
    assert workers() == []


def test_a_module_that_could_not_be_set_up_is_quiet(app: Any, scene: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    from ProGiDiffSlicerLib.panels.module import ModulePanels

    def breaks(*_arguments: Any) -> None:
        raise RuntimeError("no panels")

    monkeypatch.setattr(ModulePanels, "__init__", breaks)
    import ProGiDiffSlicer

    widget = ProGiDiffSlicer.ProGiDiffSlicerWidget(slicer.qMRMLWidget())
    widget.parent.setLayout(qt.QVBoxLayout())
    with pytest.raises(RuntimeError, match="no panels"):
        widget.setup()
    widget.enter()
    widget.onSceneStartClose(None, "")
    widget.onSceneEndClose(None, "")
    widget.onSceneEndImport(None, "")
    widget.exit()
    before = observed(scene)
    widget._onModuleAboutToBeUnloaded("ProGiDiffSlicer")
    assert observed(scene) != before
    assert widget.logic is None, "what the panels would have worked with is closed"


def test_the_worker_ends_also_where_modules_are_not_unloaded(invented: Any, app: Any, spin: Spin) -> None:
    start_run(invented)
    spin(lambda: bool(workers()))
    app.aboutToQuit.emit()
    assert workers() == []


def test_a_skipped_self_test_is_no_failure(module: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    told: list[str] = []
    monkeypatch.setattr(type(module.panels.setup), "ready", property(lambda panel: False))
    monkeypatch.setattr(slicer.util, "delayDisplay", lambda message, *_rest: told.append(message))
    slicer.selfTests["ProGiDiffSlicer"](msec=0)
    assert told == ["Test skipped: The setup is not complete: open the module and install what it needs."]


@pytest.mark.slow
def test_reloading_in_a_run_reads_the_library_again_ends_the_worker_and_goes_on(loaded: Any, spin: Spin) -> None:
    old, library = loaded.widget, sys.modules["ProGiDiffSlicerLib.panels.module"]
    loaded.holder.enter()
    start_run(invent(old), "spleen")
    spin(lambda: bool(workers()))
    old.onReload()
    assert workers() == []
    new = loaded.widget
    assert new is not old
    assert old.panels is None
    assert sys.modules["ProGiDiffSlicerLib.panels.module"] is not library
    assert new.panels.prompt.line.text == "spleen", "the prompt is never lost"
    assert new.panels.prompt.keys._installed, "it is still shown"
    loaded.holder.exit()
    assert not new.panels.prompt.keys._installed
    new.onReload()
    assert not loaded.widget.panels.prompt.keys._installed


def test_another_worker_in_the_settings_ends_the_present_one(panel: Opened) -> None:
    assert panel.panels.setup.ready
    assert panel.panels.ui.setupSection.collapsed, "it closes by itself when all is ready"
    panel.services.settings.device = "cpu"
    assert panel.client.stops == []
    panel.services.settings.workerKind = "command"
    assert panel.client.stops == [False]


def test_the_list_gets_the_keyboard_when_a_run_ends_and_nothing_else_is_typed(panel: Opened, spin: Spin) -> None:
    panel.window.activateWindow()
    panel.prompt.ui.promptEdit.setFocus()
    spin()
    panel.run(spin)
    assert panel.table.focus
    panel.prompt.ui.promptEdit.setFocus()
    panel.propose()
    panel.prompt.ui.promptEdit.setText("liver; spl")
    panel.arrive(panel.parameters.inputVolume, nested_masks(GRID, 5))
    panel.client.finish()
    panel.settle(spin)
    assert panel.prompt.ui.promptEdit.focus, "the user is typing the next prompt"


@pytest.mark.slow
@pytest.mark.usefixtures("slicer_version", "dialogs")
def test_the_modules_own_test_passes_in_each_slicer(invented: Any) -> None:
    slicer.selfTests["ProGiDiffSlicer"](msec=0)
    names = [node.GetName() for node in slicer.util.getNodesByClass("vtkMRMLSegmentationNode")]
    assert "Synthetic abdomen CT segmentation" in names


def observed(scene: Any) -> dict[str, bool]:
    """Which events of the scene somebody observes."""
    kinds = slicer.vtkMRMLScene
    events = ("NodeAddedEvent", "NodeRemovedEvent", "NodeAboutToBeRemovedEvent", "StartCloseEvent", "EndCloseEvent")
    return {event: bool(scene.HasObserver(getattr(kinds, event))) for event in (*events, "StartSaveEvent", "EndImportEvent")}
