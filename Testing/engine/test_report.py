"""The report and its figures: complete, self-contained, escaped, readable in any light."""

from __future__ import annotations

import base64
import io
import json
import re
from dataclasses import fields
from html.parser import HTMLParser
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image

from progidiff.errors import InputError
from progidiff.outputs.document import (
    EnsembleVolumes,
    InputRecord,
    ModelRecord,
    ProposalRecord,
    ProposalsDocument,
    RequestRecord,
    TargetRecord,
    VolumeSpread,
    WarningRecord,
    read_document,
)
from progidiff.outputs.report import (
    OUTLINES,
    Backdrop,
    SlicePicture,
    agreement_png,
    display_window,
    millilitres,
    outlines_png,
    percent,
    render_report,
    seconds,
    windowed,
    write_report,
)
from progidiff.outputs.segmentation import shade
from progidiff.wire.messages import ProposeRequest

from ..proposal_examples import unusual_request

HOSTILE = '<script>alert("x")</script> & "Müller"'


def target_record(name: str = "liver", *, found: bool = True) -> TargetRecord:
    volumes = [1500.0, 1400.0, 0.0] if found else [0.0, 0.0, 12.0]
    proposals = [
        ProposalRecord(
            index=index, rank=rank, score=score, seed=7, millilitres=volumes[index], empty=volumes[index] == 0,
            duplicate_of=duplicate_of, weight=weight, random_pick=index == 0,
            segment=f"{name} {rank} ({score:.2f})" if rank in (1, 2) else None,
        )
        for index, rank, score, duplicate_of, weight in ((0, 2, 0.81, None, 1), (1, 1, 0.93, None, 2), (2, None, 0.5, 1, 0))
    ]  # fmt: skip
    return TargetRecord(
        target=name, name=name, prompt="Leber", snomed_code="10200004", found=found, empty_share=1 / 3 if found else 2 / 3,
        mean_pairwise_dice=0.875, stop_reason="All 3 proposals were sampled.", proposals=proposals,
        volume_ml=VolumeSpread(mean=966.7, sd=838.6, median=1400, low=140, high=1490),
        ensembles_ml=EnsembleVolumes(mean_probability=1450.4, majority=1444, staple=1499),
        agreement_file="agreement_liver.nii.gz", ensemble_file="ensemble_liver.nii.gz",
    )  # fmt: skip


def document(*targets: TargetRecord, name: str = "ct.nii.gz") -> ProposalsDocument:
    return ProposalsDocument(
        input=InputRecord(
            name=name, modality="CT", size_ijk=(64, 48, 12), spacing_mm=(0.9, 0.9, 5.0), orientation="LPS", plane="axial",
            slices=(2, 10), slice_count=12,
        ),
        request=RequestRecord(
            prompts=["Leber"],
            targets=tuple(target.target for target in targets),
            proposals=3,
            top_k=2,
            steps=4,
            scheduler="ddim",
            seed=4711,
            adaptive=False,
            ranking="soft_dice",
        ),
        model=ModelRecord(id="model-xyz", name=HOSTILE, licence="CC0", device="cpu"),
        targets=list(targets),
        warnings=[WarningRecord(code="memory", message=f"The batch was halved {HOSTILE}.")],
        timing_s={"sampling": 75.2},
        peak_memory_mb=512.0,
    )  # fmt: skip


class Outline(HTMLParser):
    """Checks nesting and collects tags, attributes and text."""

    VOID = frozenset({"meta", "img", "br", "link", "input"})

    def __init__(self, html: str) -> None:
        super().__init__()
        self.open: list[str] = []
        self.tags: list[tuple[str, dict[str, str | None]]] = []
        self.text = ""
        self.feed(html)

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append((tag, dict(attrs)))
        if tag not in self.VOID:
            self.open.append(tag)

    def handle_endtag(self, tag: str) -> None:
        assert self.open.pop() == tag

    def handle_data(self, data: str) -> None:
        self.text += " " + data

    def words(self) -> str:
        return " ".join(self.text.split())


def png_array(png: bytes) -> np.ndarray:
    return np.asarray(Image.open(io.BytesIO(png)).convert("RGB"), dtype=np.int16)


def picture(index: int) -> SlicePicture:
    frame = Backdrop(np.full((20, 30), 0.5, np.float32), (1.0, 1.0))
    mask = np.zeros((20, 30), bool)
    mask[5:15, 8:20] = True
    return SlicePicture(index, outlines_png(frame, [mask]), agreement_png(frame, mask.astype(np.float32)))


def test_report_says_everything_that_the_record_holds(tmp_path: Path) -> None:
    write_report(tmp_path / "a.html", document(target_record()), {"liver": [picture(4), picture(6)]})
    html = (tmp_path / "a.html").read_text(encoding="utf-8")
    words = Outline(html).words()
    assert Outline(html).open == []
    for expected in (
        *("Proposals: liver", "ct.nii.gz", "not a medical device", "model-xyz", "4711", "4 steps of ddim, 3 proposals"),
        *("axial, 2 to 9 of 12", "sampling 1 min 15 s", "512 MiB", "1450 mL", "1444 mL", "1499 mL", "967 ± 839 mL"),
        *("1400 (140–1490) mL", "Axial slice 4", "Axial slice 6", "mean Dice between two of them 0.88"),
        *("random pick among the best", "The patient's right side is on the left", "The batch was halved"),
    ):
        assert expected in words, expected
    rows = re.findall(r"<tr><td class=\"n\">(\d+)</td><td class=\"n\">([\d.]+)</td>", html)
    assert rows == [("1", "0.93"), ("2", "0.81")]


def test_report_loads_nothing_and_runs_nothing() -> None:
    html = render_report(document(target_record()), {"liver": [picture(4)]})
    page = Outline(html)
    sources = [value for _, attrs in page.tags for key, value in attrs.items() if key in ("src", "href", "action")]
    assert len(sources) == 2
    for source in sources:
        assert source.startswith("data:image/png;base64,")
        assert base64.b64decode(source.partition(",")[2]).startswith(b"\x89PNG")
    assert not {"script", "link", "iframe", "object"} & {tag for tag, _ in page.tags}
    assert not re.search(r"https?://|url\(|@import", html)
    assert "default-src 'none'" in html


def test_report_escapes_every_text() -> None:
    record = target_record().model_copy(update={"name": HOSTILE, "stop_reason": HOSTILE})
    html = render_report(document(record, name=HOSTILE), {})
    assert "<script" not in html
    assert html.count("&lt;script&gt;") >= 5
    assert HOSTILE in Outline(html).words()


def test_report_says_that_an_organ_was_not_found() -> None:
    words = Outline(render_report(document(target_record(found=False)), {})).words()
    assert "Not found in these slices. 2 of 3 proposals (67 %) are empty" in words
    assert "liver not found" in words


@pytest.mark.parametrize(
    ("write", "texts"),
    [
        (millilitres, {0: "0", 3.849: "3.85", 92.44: "92.4", 1480.4: "1480", 0.004: "0.00"}),
        (percent, {0: "0 %", 1: "100 %", 0.001: "<1 %", 0.999: ">99 %", 0.9375: "94 %"}),
        (seconds, {0.42: "0.42 s", 59.4: "59 s", 75: "1 min 15 s", 7260: "2 h 1 min"}),
    ],
)
def test_numbers_are_written_for_people(write: Any, texts: dict[float, str]) -> None:
    assert [write(value) for value in texts] == list(texts.values())


def test_outline_is_drawn_at_the_masks_edge_and_nowhere_else() -> None:
    frame = Backdrop(np.full((40, 60), 0.5, np.float32), (1.0, 1.0))
    mask = np.zeros((40, 60), bool)
    mask[10:30, 20:50] = True
    drawn = png_array(outlines_png(frame, [mask]))
    plain = png_array(outlines_png(frame, [np.zeros_like(mask)]))
    changed = np.abs(drawn - plain).max(axis=2) > 20
    rows, cols = np.nonzero(changed)
    height, width = changed.shape
    # edges of the mask, in pixels of the picture (mask edges lie between pixel centres)
    assert rows.min() / height == pytest.approx(10 / 40, abs=0.02)
    assert rows.max() / height == pytest.approx(30 / 40, abs=0.02)
    assert cols.min() / width == pytest.approx(20 / 60, abs=0.02)
    assert cols.max() / width == pytest.approx(50 / 60, abs=0.02)
    assert not changed[int(0.4 * height) : int(0.6 * height), int(0.45 * width) : int(0.7 * width)].any()


def test_the_first_mask_lies_on_top() -> None:
    frame = Backdrop(np.zeros((40, 40), np.float32), (1.0, 1.0))
    mask = np.zeros((40, 40), bool)
    mask[10:30, 10:30] = True
    both = png_array(outlines_png(frame, [mask, mask]))
    colour = np.array([int(OUTLINES[0].colour[i : i + 2], 16) for i in (1, 3, 5)])
    other = np.array([int(OUTLINES[1].colour[i : i + 2], 16) for i in (1, 3, 5)])
    near = np.abs(both - colour).max(axis=2) < 25
    assert near.sum() > 200
    assert (np.abs(both - other).max(axis=2) < 25).sum() < near.sum() / 20


def test_pictures_keep_the_slices_proportions() -> None:
    tall = Image.open(io.BytesIO(outlines_png(Backdrop(np.zeros((30, 60), np.float32), (4.0, 1.0)), [])))
    assert tall.height / tall.width == pytest.approx(2.0, rel=0.02)
    thread = Image.open(io.BytesIO(outlines_png(Backdrop(np.zeros((1, 400), np.float32), (1.0, 1.0)), [])))
    assert thread.height >= thread.width / 7


def test_agreement_colours_grow_with_the_share() -> None:
    frame = Backdrop(np.zeros((30, 30), np.float32), (1.0, 1.0))
    shares = np.zeros((30, 30), np.float32)
    shares[:, 10:20], shares[:, 20:] = 0.4, 1.0
    picture = png_array(agreement_png(frame, shares)).mean(axis=2)
    none, some, every = (picture[:, int(w * picture.shape[1])].mean() for w in (0.15, 0.5, 0.85))
    assert none == 0
    assert 0 < some < every


def test_display_windows() -> None:
    ct = np.array([[[-1000.0, 0.0, 3000.0]]], np.float32)
    assert display_window(ct, "CT") == display_window(ct, None) == (-160.0, 240.0)
    mr = np.arange(1000, dtype=np.float32).reshape(10, 10, 10)
    low, high = display_window(mr, None)
    assert 0 < low < 20 < 980 < high < 1000
    assert display_window(np.zeros((2, 2, 2)), "MR") == (0.0, 1.0)
    np.testing.assert_allclose(windowed(np.array([[-500, 40, 900]]), (-160.0, 240.0)), [[0, 0.5, 1]])


def test_shades_begin_with_the_targets_colour_and_differ() -> None:
    shades = [shade((221, 130, 101), place, 5) for place in range(5)]
    assert shades[0] == pytest.approx((221 / 255, 130 / 255, 101 / 255))
    assert all(0 <= channel <= 1 for colour in shades for channel in colour)
    distances = [np.abs(np.subtract(a, b)).max() for i, a in enumerate(shades) for b in shades[:i]]
    assert min(distances) > 0.04


def test_document_survives_the_round_trip(tmp_path: Path) -> None:
    record = document(target_record(), name="Größe.nii.gz")
    path = tmp_path / "proposals.json"
    path.write_text(record.to_json(), encoding="utf-8")
    assert read_document(path) == record
    assert "Größe" in path.read_text(encoding="utf-8")


def test_results_hold_every_field_of_their_request_and_those_of_earlier_versions_are_read(tmp_path: Path) -> None:
    asked = unusual_request()
    record = document(target_record()).model_copy(update={"request": RequestRecord(**vars(asked), prompts=["Leber"])})
    told = json.loads(record.to_json())
    for field in fields(ProposeRequest):
        assert told["request"].pop(field.name) == json.loads(json.dumps(getattr(asked, field.name))) != field.default
    assert told["request"] == {"prompts": ["Leber"], "correct_values": False}

    path = tmp_path / "proposals.json"
    old = {"prompts": ["Leber"], "targets": ["liver"], "proposals": 8, "top_k": 2, "steps": 4, "scheduler": "dpmsolver++"}
    old |= {"seed": 7, "adaptive": True, "ranking": "medoid", "a later field": 1}
    path.write_text(json.dumps({**told, "request": old}), encoding="utf-8")
    same = ProposeRequest(("liver",), 8, 2, scheduler="dpmsolver++", seed=7, adaptive=True, ranking="medoid")
    assert read_document(path).request == RequestRecord(**vars(same), prompts=["Leber"])
    for name, wrong in (("proposals", 0), ("scheduler", "euler"), ("targets", []), ("prompts", []), ("seed", -1)):
        path.write_text(json.dumps({**told, "request": {**old, name: wrong}}), encoding="utf-8")
        with pytest.raises(InputError, match=f"request.{name}"):
            read_document(path)


def test_document_refuses_what_is_not_one(tmp_path: Path) -> None:
    path = tmp_path / "proposals.json"
    with pytest.raises(InputError, match="cannot be read"):
        read_document(path)
    path.write_text('{"format": "something else"}', encoding="utf-8")
    with pytest.raises(InputError, match="format"):
        read_document(path)
    path.write_text(document(target_record()).to_json().replace("0.93", "NaN"), encoding="utf-8")
    with pytest.raises(InputError, match="choose another file"):
        read_document(path)
