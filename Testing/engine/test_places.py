"""Results appear complete or not at all."""

from __future__ import annotations

import errno
import os
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from pathlib import Path

import pytest

import progidiff
from progidiff import places
from progidiff.errors import InputError, OutputError
from progidiff.places import MARKER, atomic_file, atomic_folder


def contents(folder: Path) -> dict[str, str]:
    return {str(p.relative_to(folder)): p.read_text() for p in sorted(folder.rglob("*")) if p.is_file() and p.name != MARKER}


def write_run(out: Path, *, overwrite: bool = False, **files: str) -> None:
    with atomic_folder(out, overwrite=overwrite) as folder:
        for name, text in files.items():
            (folder / name).write_text(text)


def fail_after_writing(out: Path, error: BaseException, **files: str) -> None:
    with atomic_folder(out) as folder:
        for name, text in files.items():
            (folder / name).write_text(text)
        raise error


def hidden(folder: Path) -> list[str]:
    return [p.name for p in folder.iterdir() if p.name.startswith(".progidiff-") and p.name != MARKER]


def test_new_folder_appears_at_the_end_with_its_parents(tmp_path: Path) -> None:
    out = tmp_path / "a" / "Größe" / "out"
    with atomic_folder(out) as folder:
        (folder / "proposals.json").write_text("{}")
        (folder / "pictures").mkdir()
        (folder / "pictures" / "1.txt").write_text("1")
        assert not out.exists()
    assert contents(out) == {"pictures/1.txt": "1", "proposals.json": "{}"}
    assert hidden(out.parent) == []
    assert out.stat().st_mode & 0o777 == (tmp_path / "a").stat().st_mode & 0o777


@pytest.mark.parametrize(
    ("error", "kind", "says"),
    [
        (InputError("bad"), InputError, "bad"),
        (KeyboardInterrupt(), KeyboardInterrupt, "^$"),
        (BrokenPipeError(errno.EPIPE, "Broken pipe"), BrokenPipeError, "Broken"),
        (OSError(errno.ENOSPC, "full"), OutputError, "space"),
        (OSError(errno.EDQUOT, "full"), OutputError, "space"),
    ],
)
def test_failure_leaves_nothing(error: BaseException, kind: type[BaseException], says: str, tmp_path: Path) -> None:
    with pytest.raises(kind, match=says):
        fail_after_writing(tmp_path / "a" / "b" / "out", error, half="{")
    assert list(tmp_path.iterdir()) == []


def test_earlier_result_is_replaced_entirely_and_survives_a_failing_run(tmp_path: Path) -> None:
    write_run(tmp_path / "out", a="1", b="1")
    write_run(tmp_path / "out", b="2", c="2")
    assert contents(tmp_path / "out") == {"b": "2", "c": "2"}
    with pytest.raises(ZeroDivisionError):
        fail_after_writing(tmp_path / "out", ZeroDivisionError(), b="3")
    assert contents(tmp_path / "out") == {"b": "2", "c": "2"}
    assert hidden(tmp_path / "out") == []


def test_folder_with_other_files_is_refused_and_overwriting_keeps_them(tmp_path: Path) -> None:
    out = tmp_path / "out"
    write_run(out, a="1")
    (out / "thesis.docx").write_text("mine")
    with pytest.raises(OutputError, match=r"thesis\.docx"):
        write_run(out, a="2")
    assert contents(out) == {"a": "1", "thesis.docx": "mine"}
    (out / "b").write_text("a foreign file named like a result")
    write_run(out, overwrite=True, b="2")
    assert contents(out) == {"b": "2", "thesis.docx": "mine"}


def test_current_folder_and_links(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "real").mkdir()
    (tmp_path / "link").symlink_to(tmp_path / "real", target_is_directory=True)
    write_run(tmp_path / "link", a="1")
    assert (tmp_path / "link").is_symlink()
    monkeypatch.chdir(tmp_path / "real")
    write_run(Path("."), b="2")
    assert contents(tmp_path / "real") == {"b": "2"}


def test_marker_cannot_reach_outside_its_folder(tmp_path: Path) -> None:
    out = tmp_path / "out"
    write_run(out, a="1")
    (tmp_path / "precious").write_text("mine")
    (out / MARKER).write_text('{"results": ["a", "../precious", "..", 3]}')
    write_run(out, b="2")
    assert (tmp_path / "precious").read_text() == "mine"
    assert contents(out) == {"b": "2"}


def test_failing_swap_is_undone(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    out = tmp_path / "out"
    write_run(out, a="1", b="1")
    real_rename = os.rename

    def rename(source: Path, target: Path) -> None:
        if Path(source).name == "c" and Path(target).parent == out:
            raise OSError(errno.EIO, "Input/output error", str(target))
        real_rename(source, target)

    monkeypatch.setattr(places.os, "rename", rename)
    with pytest.raises(OutputError, match="Input/output error"):
        write_run(out, a="2", c="2")
    assert contents(out) == {"a": "1", "b": "1"}


def test_output_that_is_a_file(tmp_path: Path) -> None:
    (tmp_path / "out").write_text("mine")
    with pytest.raises(OutputError, match="is a file"):
        write_run(tmp_path / "out", a="1")
    with pytest.raises(OutputError, match="cannot be written"):
        write_run(tmp_path / "out" / "below", a="1")
    with pytest.raises(OutputError, match="cannot be written"), atomic_file(tmp_path / "no" / "a.txt"):
        raise AssertionError("not reached")
    with pytest.raises(FileNotFoundError), atomic_folder(tmp_path / "new"):  # an input, not the output
        (tmp_path / "model.json").read_text()
    assert (tmp_path / "out").read_text() == "mine"


@pytest.fixture
def read_only_folder() -> Iterator[Path]:
    """A folder in which this process may not write; root, whom permissions do not bind, drops its rights."""
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        folder.chmod(0o555)
        was_root = os.geteuid() == 0
        if was_root:
            os.seteuid(65534)
        try:
            yield folder
        finally:
            if was_root:
                os.seteuid(0)
            folder.chmod(0o755)


@pytest.mark.skipif(not hasattr(os, "seteuid"), reason="permission bits of folders work differently on Windows")
def test_read_only_output(read_only_folder: Path) -> None:
    for out in (read_only_folder / "out", read_only_folder):
        with pytest.raises(OutputError, match="read-only") as caught:
            write_run(out, a="1")
        assert "\n" not in str(caught.value)
    with pytest.raises(OutputError, match="read-only"), atomic_file(read_only_folder / "a.txt") as staged:
        staged.write_text("1")
    assert list(read_only_folder.iterdir()) == []


def test_file_replaces_file_only_when_complete(tmp_path: Path) -> None:
    target = tmp_path / "a.nii.gz"
    target.write_text("old")

    def write(text: str) -> None:
        with atomic_file(target) as staged:
            assert staged.name == "a.nii.gz"
            staged.write_text(text)
            if text == "half":
                raise ZeroDivisionError

    with pytest.raises(ZeroDivisionError):
        write("half")
    assert target.read_text() == "old"
    write("new")
    assert target.read_text() == "new"
    assert [p.name for p in tmp_path.iterdir()] == ["a.nii.gz"]


FULL_DISK = """
import resource, signal, sys
from pathlib import Path
import numpy as np
from progidiff.errors import OutputError
from progidiff.places import atomic_folder
from progidiff.outputs.segmentation import Segment, write_seg_nrrd
from progidiff.outputs.segmentation import write_volume
from progidiff.volumes.geometry import Geometry

signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
resource.setrlimit(resource.RLIMIT_FSIZE, (20_000, 20_000))
geometry = Geometry((64, 64, 40), np.eye(4))
noise = np.random.default_rng(0).random(geometry.shape_kji)
try:
    with atomic_folder(Path(sys.argv[1])) as folder:
        (folder / "small.json").write_text("{}")
        if sys.argv[2] == "seg.nrrd":
            write_seg_nrrd(folder / "a.seg.nrrd", [Segment("a", noise > 0.5, (1, 0, 0))], geometry)
        else:
            write_volume(folder / f"a.{sys.argv[2]}", noise, geometry)
except OutputError as error:
    print(error)
    sys.exit(2)
"""


@pytest.mark.slow
@pytest.mark.skipif(sys.platform == "win32", reason="a file size limit stands in for the full disk")
@pytest.mark.parametrize("kind", ["seg.nrrd", "nii.gz", "mha"])
def test_full_disk_leaves_nothing(kind: str, tmp_path: Path) -> None:
    source = str(Path(progidiff.__file__).parents[1])
    done = subprocess.run(
        [sys.executable, "-c", FULL_DISK, str(tmp_path / "out"), kind],
        capture_output=True,
        text=True,
        check=False,
        env={**os.environ, "PYTHONPATH": source},
    )
    assert done.returncode == 2, done.stdout + done.stderr
    assert done.stdout.count("\n") == 1
    assert "space" in done.stdout
    assert list(tmp_path.iterdir()) == []
