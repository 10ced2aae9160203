"""Pictures show what a person would see: a slice view with a segment, a panel with text, a foreground overlay."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import ctk
import numpy as np
import pytest
import qt
import slicer

from .. import SliceView, beside, grab

SHAPE = (12, 60, 60)


@pytest.fixture
def volume(scene: Any) -> Any:
    _, j, i = np.indices(SHAPE)
    body = (j - 30) ** 2 + (i - 30) ** 2 < 28**2
    node = slicer.util.addVolumeFromArray(np.where(body, 40, -1000).astype(np.int16), name="CT")
    node.CreateDefaultDisplayNodes()
    node.GetDisplayNode().AutoWindowLevelOff()
    node.GetDisplayNode().SetWindowLevel(400, 40)
    slicer.util.setSliceViewerLayers(background=node, fit=True)
    return node


def green_share(pixels: np.ndarray[Any, Any]) -> float:
    red, green, blue = (pixels[..., channel].astype(int) for channel in range(3))
    return float(np.mean((green > red + 40) & (green > blue + 40)))


def show_slice(size: tuple[int, int] = (300, 300)) -> np.ndarray[Any, Any]:
    with SliceView("Red", size) as view:
        view.fit()
        view.logic.SetSliceOffset(6)
        return view.pixels()


def test_a_segment_is_seen_where_it_is_and_only_while_it_is_shown(volume: Any, scene: Any) -> None:
    plain = show_slice()
    assert plain.shape == (300, 300, 3)
    assert plain.std() > 20
    assert green_share(plain) == 0
    segmentation = scene.AddNewNodeByClass("vtkMRMLSegmentationNode", "Proposals")
    segmentation.CreateDefaultDisplayNodes()
    segmentation.SetReferenceImageGeometryParameterFromVolumeNode(volume)
    mask = np.zeros(SHAPE, np.uint8)
    mask[3:9, 20:40, 10:25] = 1
    segment = segmentation.GetSegmentation().AddEmptySegment("liver", "liver", [0, 1, 0])
    slicer.util.updateSegmentBinaryLabelmapFromArray(mask, segmentation, segment, volume)
    with_segment = show_slice()
    assert green_share(with_segment) == pytest.approx(20 * 15 / 60**2, rel=0.3)
    # in an identity geometry the view shows i growing to the left and j growing upwards
    assert green_share(with_segment[:, 150:]) > 5 * green_share(with_segment[:, :150])
    segmentation.GetDisplayNode().SetSegmentVisibility2DFill(segment, False)
    outline_only = show_slice()
    assert 0 < green_share(outline_only) < green_share(with_segment) / 2
    segmentation.GetDisplayNode().SetVisibility(False)
    assert green_share(show_slice()) == 0


def test_a_panel_is_painted_with_its_text(app: Any, tmp_path: Path) -> None:
    def panel(title: str, collapsed: bool = False) -> Any:
        button = ctk.ctkCollapsibleButton()
        button.setText(title)
        form = qt.QFormLayout(button)
        form.addRow("Proposals:", ctk.ctkSliderWidget())
        form.addRow("Slices:", ctk.ctkRangeWidget())
        button.collapsed = collapsed
        return button

    first = grab(panel("Prompt"), tmp_path / "panel.png", width=400)
    assert (first.width(), qt.QImage(str(tmp_path / "panel.png")).width()) == (400, 400)
    assert first != grab(panel("Review"), width=400)
    assert grab(panel("Prompt", collapsed=True), width=400).height() < first.height() / 2
    if qt.QFontDatabase.families():
        dark = sum(first.pixelColor(x, y).lightness() < 110 for x in range(20, 80) for y in range(4, 20))
        assert dark > 20, "the title is not painted"


def test_panel_beside_views(volume: Any, tmp_path: Path) -> None:
    image = grab(qt.QLabel("panel"), width=200, height=100)
    beside(image, [show_slice((150, 150)), show_slice((150, 150))], tmp_path / "both.png")
    both = qt.QImage(str(tmp_path / "both.png"))
    assert (both.width(), both.height()) == (350, 300)
