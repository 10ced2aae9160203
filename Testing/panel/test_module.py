"""The module as Slicer loads it: its life from setup to exit, the scene, and its own test with the real worker."""

from __future__ import annotations

import ast
import gc
import hashlib
import os
import subprocess
import sys
import urllib.parse
import urllib.request
import weakref
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import psutil
import pytest
import qt
import slicer

from progidiff.places import sample_volume
from ProGiDiffSlicerLib.worker.client import WorkerState
from ProGiDiffSlicerLib.worker.command import WorkerCommand

from .. import slicer_host as host
from .panel_support import GRID, nested_masks, opened
from .session_support import add_volume
from .worker_support import organs

Spin = Callable[..., None]
MODULE = Path(__file__).resolve().parents[2] / "ProGiDiffSlicer" / "ProGiDiffSlicer.py"


@pytest.fixture
def invented(module: Any) -> Any:
    """The module with a worker process that invents organs."""
    command = organs()
    module.logic.services.client._command = lambda: command
    return module


def workers() -> list[psutil.Process]:
    """Worker processes that this process started."""
    return [child for child in psutil.Process().children(recursive=True) if child.status() != psutil.STATUS_ZOMBIE]


def start_run(module: Any, spin: Spin, **values: Any) -> Any:
    """Load the sample, propose; the session."""
    volume = slicer.util.loadVolume(str(sample_volume()), {"name": "Süßer Bauch"})
    panels = module.panels
    panels.prompt.ui.volumeSelector.setCurrentNode(volume)
    panels.prompt.ui.promptEdit.setText("liver; spleen")
    for name, value in {"proposals": 4, **values}.items():
        setattr(module._parameters, name, value)
    panels.prompt.ui.proposeButton.click()
    assert module.logic.services.session.running, panels.status.text
    return module.logic.services.session


def wait_for_slices(session: Any, spin: Spin) -> None:
    """Until the first slice has arrived."""
    spin(lambda: session.store is not None)


def test_opening_the_module_starts_nothing(module: Any, spin: Spin) -> None:
    module.enter()
    spin()
    assert workers() == []
    assert module.logic.services.client.state is WorkerState.STOPPED


def test_what_slicer_shows_about_the_module(app: Any, scene: Any) -> None:
    loaded = host.load_module(MODULE)
    try:
        info = loaded.info
        assert info.title == "ProGiDiffSlicer"
        assert info.categories == ["Segmentation"]
        assert "research" in info.helpText
        assert "2601.16060" in info.acknowledgementText
        assert not info.icon.isNull()
    finally:
        loaded.unload()


def test_the_sample_volume_is_registered_from_the_installation(
    app: Any, scene: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    categories: list[str] = []
    sources: list[dict[str, Any]] = []

    class SampleDataLogic:
        @staticmethod
        def registerCustomSampleDataCategory(category: str, title: str) -> None:
            categories.append(category)

        @staticmethod
        def registerCustomSampleDataSource(**source: Any) -> None:
            sources.append(source)

    monkeypatch.setitem(sys.modules, "SampleData", SimpleNamespace(SampleDataLogic=SampleDataLogic))
    loaded = host.load_module(MODULE)
    try:
        loaded.source.registerSampleData()
    finally:
        loaded.unload()
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
@pytest.mark.usefixtures("slicer_version")
def test_from_prompt_to_segment_with_a_process(invented: Any, spin: Spin) -> None:
    invented.enter()
    session = start_run(invented, spin)
    spin(lambda: not session.running)
    assert session.failure is None
    assert session.store["liver"].ranked
    assert session.store["spleen"].ranked
    accepted = invented.panels.review.accept()
    assert accepted.changed_voxels > 0
    assert len(workers()) == 1, "the worker stays for the next prompt"


@pytest.mark.slow
def test_a_killed_worker_leaves_what_had_arrived_and_one_click_starts_another(invented: Any, spin: Spin) -> None:
    slow, quick = organs(pause=0.2), organs()
    client = invented.logic.services.client
    client._command = lambda: slow
    invented.enter()
    session = start_run(invented, spin)
    wait_for_slices(session, spin)
    (worker,) = workers()
    worker.kill()
    spin(lambda: not session.running)
    panels = invented.panels
    assert panels.status.text.startswith("The worker")
    assert panels.prompt.line.text == invented._parameters.prompt == "liver; spleen"
    assert panels.proposals.selected is not None
    assert not panels.ui.restartButton.isHidden()
    assert panels.review.accept() is not None
    client._command = lambda: quick
    panels.ui.restartButton.click()
    spin(lambda: client.state is WorkerState.READY)
    panels.prompt.ui.proposeButton.click()
    spin(lambda: not session.running)
    assert session.failure is None
    assert panels.proposals.selected.rank == 1


def test_a_worker_that_cannot_be_started_is_one_sentence(invented: Any, spin: Spin) -> None:
    invented.logic.services.client._command = lambda: WorkerCommand("/nowhere/python", ("-m", "progidiff"), {})
    session = start_run(invented, spin)
    spin(lambda: not session.running)
    said = invented.panels.status.text
    assert said
    assert "\n" not in said
    assert not invented.panels.ui.restartButton.isHidden()
    assert invented.panels.prompt.line.text == "liver; spleen"


@pytest.mark.slow
def test_closing_the_scene_in_a_run_leaves_an_empty_panel(invented: Any, scene: Any, spin: Spin) -> None:
    command = organs(pause=0.2)
    invented.logic.services.client._command = lambda: command
    invented.enter()
    session = start_run(invented, spin)
    wait_for_slices(session, spin)
    scene.Clear(0)
    spin()
    assert not session.running
    assert session.store is None
    panels = invented.panels
    assert panels.proposals.selected is None
    assert panels.prompt.ui.volumeSelector.currentNode() is None
    assert slicer.util.getNodesByClass("vtkMRMLSegmentationNode") == []
    quick = organs()
    invented.logic.services.client._command = lambda: quick
    invented.logic.services.client.stop(wait=True)
    again = start_run(invented, spin)
    spin(lambda: not again.running)
    assert again.failure is None


@pytest.mark.slow
def test_switching_modules_does_not_stop_a_run(invented: Any, spin: Spin) -> None:
    invented.enter()
    session = start_run(invented, spin)
    invented.exit()
    spin(lambda: not session.running)
    assert session.store["liver"].ranked
    invented.enter()
    assert invented.panels.proposals.selected.rank == 1


@pytest.mark.slow
def test_unloading_in_a_run_leaves_no_process_and_no_observer(app: Any, scene: Any, spin: Spin) -> None:
    before = observed(scene)
    loaded = host.load_module(MODULE)
    command = organs(pause=0.2)
    loaded.widget.logic.services.client._command = lambda: command
    loaded.widget.enter()
    wait_for_slices(start_run(loaded.widget, spin), spin)
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
def test_closing_scenes_leaves_no_parameters_behind(app: Any, scene: Any) -> None:
    """Slicer 5.10 never removes the observer of ``connectGui``, which holds the parameters and their observers."""
    loaded = host.load_module(MODULE)
    try:
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
    finally:
        loaded.unload()


@pytest.mark.slow
def test_the_module_is_unloaded_before_what_it_works_with(app: Any, scene: Any, spin: Spin) -> None:
    """At exit: an effect is active, so that the clean-up needs the Segment Editor and the segmentation's module."""
    loaded = host.load_module(MODULE)
    command = organs()
    loaded.widget.logic.services.client._command = lambda: command
    session = start_run(loaded.widget, spin)
    spin(lambda: not session.running)
    review = loaded.widget.panels.review
    review.accept()
    review.edit()
    review.ui.segmentEditor.setActiveEffectByName("Paint")
    order = host.unload_order()
    needed = ("Markups", "Segmentations", "Sequences", "SubjectHierarchy", "Terminologies", "Volumes")
    assert all(order.index("ProGiDiffSlicer") < order.index(name) for name in needed)
    assert set(needed) <= set(order)
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


def test_the_application_quits(app: Any, scene: Any, spin: Spin) -> None:
    loaded = host.load_module(MODULE)
    command = organs(pause=0.2)
    loaded.widget.logic.services.client._command = lambda: command
    session = start_run(loaded.widget, spin)
    spin(lambda: bool(workers()))
    assert session.running
    host.quit_application()
    assert workers() == []
    assert loaded.widget.panels is None


@pytest.mark.slow
def test_opening_the_panel_loads_no_library_that_it_can_open_without() -> None:
    """SimpleITK alone is a good part of the time; the others are not there in Slicer's Python."""
    code = (
        "import sys\nfrom Testing import slicer_host as host\nhost.install()\nhost.start()\nbefore = set(sys.modules)\n"
        "import ProGiDiffSlicerLib.panels.module\nprint(sorted({name.split('.')[0] for name in set(sys.modules) - before}))"
    )
    environment = {**os.environ, "PYTHONPATH": str(MODULE.parent)}
    ran = subprocess.run(
        [sys.executable, "-c", code], cwd=MODULE.parents[1], env=environment, capture_output=True, text=True, check=True
    )
    loaded = set(ast.literal_eval(ran.stdout.splitlines()[-1]))
    assert "ProGiDiffSlicerLib" in loaded
    assert loaded & {"SimpleITK", "torch", "scipy", "nibabel", "pydantic", "psutil", "matplotlib"} == set()


def test_the_worker_ends_also_where_modules_are_not_unloaded(app: Any, scene: Any, spin: Spin) -> None:
    loaded = host.load_module(MODULE)
    command = organs(pause=0.2)
    loaded.widget.logic.services.client._command = lambda: command
    start_run(loaded.widget, spin)
    spin(lambda: bool(workers()))
    app.aboutToQuit.emit()
    assert workers() == []
    loaded.unload()


@pytest.mark.slow
def test_a_module_that_is_reloaded_while_it_is_shown_goes_on(app: Any, scene: Any) -> None:
    loaded = host.load_module(MODULE)
    try:
        loaded.widget.onReload()
        assert not loaded.widget._entered, "it was not shown"
        loaded.holder.enter()
        loaded.widget.onReload()
        assert loaded.widget._entered
        assert loaded.widget.panels.prompt.keys._installed
        loaded.holder.exit()
        assert not loaded.widget.panels.prompt.keys._installed
    finally:
        loaded.unload()


def test_a_skipped_self_test_is_no_failure(module: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    told: list[str] = []
    monkeypatch.setattr(type(module.panels.setup), "ready", property(lambda panel: False))
    monkeypatch.setattr(slicer.util, "delayDisplay", lambda message, *_rest: told.append(message))
    slicer.selfTests["ProGiDiffSlicer"](msec=0)
    assert told == ["Test skipped: The setup is not complete: open the module and install what it needs."]


def test_reloading_reads_the_library_again_and_works(app: Any, scene: Any, spin: Spin) -> None:
    kept = {name: module for name, module in sys.modules.items() if name.startswith("ProGiDiffSlicerLib")}
    loaded = host.load_module(MODULE)
    try:
        loaded.widget.enter()
        loaded.widget.panels.prompt.ui.promptEdit.setText("spleen")
        old = loaded.widget
        old.onReload()
        assert loaded.widget is not old
        assert old.panels is None
        assert sys.modules["ProGiDiffSlicerLib.panels.module"] is not kept["ProGiDiffSlicerLib.panels.module"]
        loaded.widget.enter()
        assert loaded.widget.panels.prompt.line.text == "spleen", "the prompt is never lost"
    finally:
        loaded.unload()
        for name in [name for name in sys.modules if name.startswith("ProGiDiffSlicerLib")]:
            del sys.modules[name]
        sys.modules.update(kept)


def test_another_worker_in_the_settings_ends_the_present_one(scene: Any) -> None:
    with opened(scene) as panel:
        panel.services.settings.device = "cpu"
        assert panel.client.stops == []
        panel.services.settings.workerKind = "command"
        assert panel.client.stops == [False]


def test_the_setup_section_closes_by_itself_when_all_is_ready(scene: Any) -> None:
    with opened(scene) as panel:
        assert panel.panels.setup.ready
        assert panel.panels.ui.setupSection.collapsed


def test_the_list_gets_the_keyboard_when_a_run_ends_and_nothing_else_is_typed(scene: Any, spin: Spin) -> None:
    with opened(scene) as panel:
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
@pytest.mark.usefixtures("dialogs")
def test_the_modules_own_test_passes_with_the_real_worker(module: Any, spin: Spin) -> None:
    module.enter()
    slicer.selfTests["ProGiDiffSlicer"](msec=0)
    names = [node.GetName() for node in slicer.util.getNodesByClass("vtkMRMLSegmentationNode")]
    assert "Synthetic abdomen CT segmentation" in names


def observed(scene: Any) -> dict[str, bool]:
    """Which events of the scene somebody observes."""
    kinds = slicer.vtkMRMLScene
    events = ("NodeAddedEvent", "NodeRemovedEvent", "NodeAboutToBeRemovedEvent", "StartCloseEvent", "EndCloseEvent")
    return {event: bool(scene.HasObserver(getattr(kinds, event))) for event in (*events, "StartSaveEvent", "EndImportEvent")}
