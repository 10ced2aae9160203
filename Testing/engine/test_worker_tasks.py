"""What a worker of its own does over the wire: examples are kept, whole or not at all, also without their client."""

from __future__ import annotations

import sys
import time
from pathlib import Path
from typing import Any

import numpy as np

from progidiff.curation import CuratedSet
from progidiff.wire.messages import (
    Cancel,
    Cancelled,
    CountCases,
    CuratedCases,
    ErrorReply,
    KeepCase,
    SwapCases,
)

from .curation_kills import example
from .worker_pipe import Peer, request_bytes

WORKER = [sys.executable, "-P", "-m", "progidiff", "worker"]
# One in which writing an image takes longer than a cancelled request is waited for.
SLOW = """
import time
from progidiff.curation import curated_set
from progidiff.worker.server import serve
write = curated_set.write_image
def write_image(path, array, geometry):
    print("writing", flush=True)
    time.sleep(4)
    write(path, array, geometry)
curated_set.write_image = write_image
serve()
"""


def keep(folder: Path, number: int = 1, **more: Any) -> KeepCase:
    case = example(number)
    return KeepCase(
        str(folder), "liver", case.image, case.masks["liver"], case.affine, "CT", "axial", "liver", volume_key="v", **more
    )


def until_writing(peer: Peer) -> None:
    while b"writing" not in peer.log:
        time.sleep(0.02)


def test_cases_are_counted_kept_and_swapped(tmp_path: Path) -> None:
    folder = tmp_path / "Größe 肝"
    facts = {"code": {"type": {"meaning": "Liver"}}, "proposal": {"seed": 2**60, "score": 0.5}, "dice_to_proposal": 0.25}
    with Peer(WORKER) as peer:
        peer.send(CountCases(str(folder)), 1)
        assert peer.final(1) == CuratedCases(0, {}, ())
        assert not folder.exists()
        peer.send(keep(folder, edited=True, editor="e", patient_key="p", **facts), 2)
        first = peer.final(2)
        assert first == CuratedCases(1, {"liver": 1}, ("CT",), first.kept)
        (case,) = CuratedSet(folder).list()
        assert case.id == first.kept
        image, affine, masks = case.read()
        np.testing.assert_array_equal(image, example(1).image)
        np.testing.assert_array_equal(masks["liver"], example(1).masks["liver"])
        np.testing.assert_allclose(affine, example(1).affine)
        for name, value in {**facts, "edited": True, "editor": "e", "patient_key": "p", "plane": "axial"}.items():
            assert case.facts[name] == value
        peer.send(keep(folder, 2, replaces=first.kept), 3)
        second = peer.final(3)
        assert (second.cases, second.replaced) == (1, first.kept)
        for number, (remove, restore, left) in enumerate(
            [((second.kept,), (first.kept,), first.kept), ((second.kept,), (first.kept,), first.kept)], 4
        ):
            peer.send(SwapCases(str(folder), remove, restore), number)
            assert peer.final(number) == CuratedCases(1, {"liver": 1}, ("CT",))
            assert [each.id for each in CuratedSet(folder).list()] == [left]
        assert str(folder).encode() not in peer.log


def test_what_cannot_be_kept_is_said_and_leaves_nothing(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("no folder")
    empty = keep(tmp_path / "set")
    empty.mask[:] = False
    with Peer(WORKER) as peer:
        for number, request in enumerate((keep(tmp_path / "file" / "set"), empty, SwapCases(str(tmp_path), ("a" * 32,))), 1):
            peer.send(request, number)
            reply = peer.final(number)
            if number < 3:
                assert isinstance(reply, ErrorReply)
                assert reply.code == ("output", "input")[number - 1]
                assert reply.message.endswith(".")
            else:
                assert reply == CuratedCases(0, {}, ())
    assert [path.name for path in tmp_path.iterdir()] == ["file"]


def test_a_cancelled_example_leaves_nothing(tmp_path: Path) -> None:
    with Peer([sys.executable, "-c", SLOW]) as peer:
        peer.send(keep(tmp_path / "set"), 1)
        until_writing(peer)
        peer.send(Cancel(1), 2)
        assert peer.final(1) == Cancelled()
        assert CuratedSet(tmp_path / "set").list() == []
        assert [path.name for path in (tmp_path / "set").iterdir()] == ["progidiff-set"]


def test_an_example_that_has_arrived_is_saved_without_its_client(tmp_path: Path) -> None:
    data = request_bytes(keep(tmp_path / "set"), 1)
    with Peer([sys.executable, "-c", SLOW]) as peer:
        peer.send_bytes(data)
        until_writing(peer)
        peer.close_input()
        assert peer.wait() == 0
    (case,) = CuratedSet(tmp_path / "set").list()
    assert np.array_equal(case.read()[0], example(1).image)
    with Peer(WORKER) as peer:
        peer.send_bytes(data[:-1])
        peer.close_input()
        peer.wait()
    assert len(CuratedSet(tmp_path / "set").list()) == 1
