"""The host's application and scene: modules, files, slice views, dialogs, and loading a scripted module."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import slicer

from .. import collected_exceptions, load_module, quit_application, unload_order

UI = """<?xml version="1.0" encoding="UTF-8"?>
<ui version="4.0"><class>Panel</class><widget class="qMRMLWidget" name="Panel"><layout class="QVBoxLayout" name="column">
 <item><widget class="ctkUnheardOf" name="slider"/></item></layout></widget>
<customwidgets>
 <customwidget><class>qMRMLWidget</class><extends>QWidget</extends><header>qMRMLWidget.h</header><container>1</container></customwidget>
 <customwidget><class>ctkUnheardOf</class><extends>QWidget</extends><header>ctkUnheardOf.h</header></customwidget>
</customwidgets></ui>
"""

MODULE = """
from slicer.ScriptedLoadableModule import *

class HostExample(ScriptedLoadableModule):
    pass

class HostExampleWidget(ScriptedLoadableModuleWidget):
    pass
"""


def test_ui_file_with_an_unknown_class(app: Any, tmp_path: Path) -> None:
    path = tmp_path / "Panel.ui"
    path.write_text(UI, encoding="utf-8")
    with pytest.raises(RuntimeError, match=r"no stand-in .* ctkUnheardOf"):
        slicer.util.loadUI(str(path))


def test_segments_have_items_and_a_removed_segmentation_is_still_watched(
    scene: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    node = scene.AddNewNodeByClass("vtkMRMLSegmentationNode", "Accepted")
    hierarchy, segmentation = scene.GetSubjectHierarchyNode(), node.GetSegmentation()
    for name in ("liver", "spleen"):
        segmentation.AddEmptySegment(name, name)
    segmentation.GetSegment("liver").SetName("Leber")
    item = hierarchy.GetItemByDataNode(node)
    assert hierarchy.GetNumberOfItemChildren(item) == 2
    assert hierarchy.GetItemChildWithName(item, "Leber")
    segmentation.RemoveSegment("liver")
    assert hierarchy.GetNumberOfItemChildren(item) == 1
    scene.RemoveNode(node)
    with collected_exceptions(monkeypatch) as complaints:
        segmentation.RemoveSegment("spleen")
    assert len(complaints) == 1
    assert "Subject hierarchy item cannot be found for segmentation node Accepted" in complaints[0]
    scene.AddNode(node)
    segmentation.AddEmptySegment("spleen", "spleen")
    assert hierarchy.GetNumberOfItemChildren(hierarchy.GetItemByDataNode(node)) == 1


def test_modules_are_unloaded_in_the_reverse_order_and_come_back(scene: Any, tmp_path: Path) -> None:
    path = tmp_path / "HostExample.py"
    path.write_text(MODULE, encoding="utf-8")
    loaded = load_module(path)
    order = unload_order()
    assert order.index("Markups") < order.index("HostExample") < order.index("Colors")
    loaded.info.dependencies = ["Markups"]
    order = unload_order()
    assert order.index("HostExample") < order.index("Markups")
    assert order.index("Segmentations") < order.index("HostExample")
    gone: list[bool] = []
    loaded.widget.cleanup = lambda: gone.append(hasattr(slicer.modules, "segmentations"))
    told: list[bool] = []
    slicer.app.aboutToQuit.connect(told_once := lambda: told.append(hasattr(slicer.modules, "markups")))
    quit_application()
    slicer.app.aboutToQuit.disconnect(told_once)
    assert gone == [False]
    assert told == [False], "who listens to the end of the application hears of it after all modules are gone"
    assert slicer.modules.markups.logic() is not None


def test_nothing_is_installed(app: Any) -> None:
    with pytest.raises(RuntimeError, match="installs nothing"):
        slicer.util.pip_install("torch")
    assert slicer.packaging.pip_check("numpy>=1.20")
    assert not slicer.packaging.pip_check("numpy>=99")
