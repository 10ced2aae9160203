"""What the command line does with what it cannot use: one line, exit code 2, and nothing half-written."""

from __future__ import annotations

import errno
import json
import os
import shlex
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import nibabel as nib
import numpy as np
import pytest
import SimpleITK as sitk
from typer.testing import CliRunner, Result

import progidiff
from progidiff.cli import writing
from progidiff.cli.app import app
from progidiff.cli.failures import one_line
from progidiff.outputs.document import read_document

ORGANS_WORKER = Path(__file__).with_name("organs_worker.py")
PACKAGE_HOME = str(Path(progidiff.__file__).parents[1])


def command(**script: Any) -> str:
    return shlex.join([sys.executable, str(ORGANS_WORKER), json.dumps(script)])


def propose(image: Path, out: Path, *arguments: str, prompt: str = "liver", **script: Any) -> Result:
    options = ["--out", str(out), "--prompt", prompt, "--proposals", "2", "--worker-command", command(**script)]
    return CliRunner().invoke(app, ["propose", str(image), *options, *arguments])


def nifti(path: Path, array: np.ndarray, affine: np.ndarray | None = None) -> Path:
    nib.save(nib.Nifti1Image(array, np.diag([2.0, 2.0, 5.0, 1.0]) if affine is None else affine), path)
    return path


def ct(shape: tuple[int, ...] = (24, 20, 6)) -> np.ndarray:
    return np.random.default_rng(0).normal(40, 20, shape).astype(np.float32)


def good(folder: Path) -> Path:
    return nifti(folder / "ct.nii.gz", ct())


def missing(folder: Path) -> Path:
    return folder / "there is none.nii.gz"


def empty(folder: Path) -> Path:
    path = folder / "empty.nii.gz"
    path.touch()
    return path


def not_a_number(folder: Path) -> Path:
    array = ct()
    array[3, 4, 5] = np.nan
    return nifti(folder / "nan.nii.gz", array)


def four_dimensional(folder: Path) -> Path:
    return nifti(folder / "4d.nii.gz", ct((12, 10, 6, 3)))


def colour(folder: Path) -> Path:
    path = folder / "rgb.nrrd"
    sitk.WriteImage(sitk.GetImageFromArray(np.zeros((6, 10, 12, 3), np.uint8), isVector=True), str(path))
    return path


def renamed_text(folder: Path) -> Path:
    path = folder / "letter.nii.gz"
    path.write_text("Dear colleague, please find the images attached.\n", encoding="utf-8")
    return path


def zero_spacing(folder: Path) -> Path:
    path = nifti(folder / "flat.nii", ct())
    header = bytearray(path.read_bytes())
    header[80:92] = bytes(12)  # pixdim[1..3]
    header[280:328] = bytes(48)  # the three rows of the sform
    path.write_bytes(header)
    return path


def unknown_format(folder: Path) -> Path:
    path = folder / "slide.pptx"
    path.write_bytes(b"PK\x03\x04 something")
    return path


def uniform(folder: Path) -> Path:
    return nifti(folder / "uniform.nii.gz", np.zeros((12, 10, 6), np.float32))


BAD_IMAGES = [
    missing,
    empty,
    not_a_number,
    four_dimensional,
    colour,
    renamed_text,
    zero_spacing,
    unknown_format,
    uniform,
]


def assert_refused(ran: Result, folder: Path, before: list[str], *, lines: int | None = 1) -> str:
    """Exit code 2, one line (the last one where progress was shown before), nothing new on the disk; returns the line."""
    assert ran.exit_code == 2, (ran.output, ran.exception)
    said = ran.stderr.splitlines()
    assert lines is None or len(said) == lines
    assert said[-1].endswith((".", "]", "!"))
    assert "Traceback" not in ran.output
    assert sorted(str(p.relative_to(folder)) for p in folder.rglob("*")) == before
    return said[-1]


def listing(folder: Path) -> list[str]:
    return sorted(str(p.relative_to(folder)) for p in folder.rglob("*"))


@pytest.mark.parametrize("make", BAD_IMAGES)
def test_a_bad_image_is_refused_in_one_line(make: Callable[[Path], Path], tmp_path: Path) -> None:
    image = make(tmp_path)
    before = listing(tmp_path)
    sentence = assert_refused(propose(image, tmp_path / "out"), tmp_path, before)
    assert image.name in sentence or "image" in sentence.lower()


def test_a_bad_image_with_json_gives_one_object(tmp_path: Path) -> None:
    image = renamed_text(tmp_path)
    ran = propose(image, tmp_path / "out", "--json")
    assert ran.exit_code == 2
    assert json.loads(ran.stdout) == {"error": {"code": "input", "message": ran.stderr.strip()}}


@pytest.mark.parametrize("slices", ["7:3", "99", "3:900", "some", "-1"])
def test_bad_slices_are_refused_before_the_worker_starts(slices: str, tmp_path: Path) -> None:
    image = good(tmp_path)
    before = listing(tmp_path)
    assert_refused(propose(image, tmp_path / "out", f"--slices={slices}", fail_load="not reached"), tmp_path, before)


@pytest.mark.slow
@pytest.mark.parametrize("prompt", ["livver", "gallbladder", "  ", "the moon"])
def test_a_prompt_that_names_nothing_known_is_refused(prompt: str, tmp_path: Path) -> None:
    image = good(tmp_path)
    before = listing(tmp_path)
    sentence = assert_refused(propose(image, tmp_path / "out", prompt=prompt), tmp_path, before, lines=None)
    assert "liver" in sentence


def test_a_model_that_does_not_load(tmp_path: Path) -> None:
    image = good(tmp_path)
    before = listing(tmp_path)
    ran = propose(image, tmp_path / "out", "--json", fail_load="The model is damaged; copy it again.")
    assert_refused(ran, tmp_path, before)
    assert json.loads(ran.stdout)["error"] == {"code": "model", "message": "The model is damaged; copy it again."}


@pytest.mark.parametrize(
    "worker", ["no-such-program-here", "'", "", shlex.join([sys.executable, "-c", "raise SystemExit('no torch here')"])]
)
def test_a_worker_that_does_not_start(worker: str, tmp_path: Path) -> None:
    image = good(tmp_path)
    before = listing(tmp_path)
    ran = propose(image, tmp_path / "out", "--worker-command", worker)
    sentence = assert_refused(ran, tmp_path, before)
    assert "worker" in sentence
    assert ("no torch here" in sentence) == ("SystemExit" in worker)


def test_a_worker_that_dies_half_way(tmp_path: Path) -> None:
    image = good(tmp_path)
    before = listing(tmp_path)
    sentence = assert_refused(propose(image, tmp_path / "out", crash_after=3), tmp_path, before, lines=None)
    assert "the scripted end" in sentence


def test_a_worker_that_leaves_out_a_slice(tmp_path: Path) -> None:
    image = good(tmp_path)
    before = listing(tmp_path)
    sentence = assert_refused(propose(image, tmp_path / "out", skip_slice=4), tmp_path, before, lines=None)
    assert "left out" in sentence


def test_paths_and_names_may_hold_any_letters(tmp_path: Path) -> None:
    folder = tmp_path / "Größe 医学 ñ'\""
    folder.mkdir()
    ran = propose(nifti(folder / "Müller 肝.nii.gz", ct()), folder / "Ergebnis ü")
    assert ran.exit_code == 0, ran.output
    assert read_document(folder / "Ergebnis ü" / "proposals.json").input.name == "Müller 肝.nii.gz"


def test_output_below_a_file(tmp_path: Path) -> None:
    image = good(tmp_path)
    before = listing(tmp_path)
    assert_refused(propose(image, image / "out", fail_load="not reached"), tmp_path, before)


def test_output_that_is_a_folder_of_somebody_else(tmp_path: Path) -> None:
    image = good(tmp_path)
    before = listing(tmp_path)
    assert "already holds" in assert_refused(propose(image, tmp_path, fail_load="not reached"), tmp_path, before)


def test_read_only_output(tmp_path: Path) -> None:
    image = good(tmp_path)
    locked = tmp_path / "locked"
    locked.mkdir()
    locked.chmod(0o500)
    if os.access(locked, os.W_OK):  # as for root: take a place where nobody can write
        locked = Path("/sys")
        if not locked.is_dir():
            pytest.skip("no place is read-only for this user")
    before = listing(tmp_path)
    ran = propose(image, locked / "out", fail_load="not reached")
    assert_refused(ran, tmp_path, before)
    assert not (locked / "out").exists()


@pytest.mark.slow
@pytest.mark.parametrize("code", [errno.ENOSPC, errno.EDQUOT])
def test_a_disk_that_fills_up_at_the_last_file(code: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def full(*arguments: object) -> None:
        raise OSError(code, os.strerror(code))

    monkeypatch.setattr(writing, "write_report", full)
    image = good(tmp_path)
    before = listing(tmp_path)
    assert "space" in assert_refused(propose(image, tmp_path / "out"), tmp_path, before, lines=None)


@pytest.mark.slow
@pytest.mark.skipif(sys.platform == "win32", reason="file size limits are POSIX")
@pytest.mark.parametrize("limit", [0, 1000, 100_000])
def test_files_that_the_system_cuts_off(limit: int, tmp_path: Path) -> None:
    image = good(tmp_path)
    before = listing(tmp_path)
    program = (
        f"import resource; resource.setrlimit(resource.RLIMIT_FSIZE, ({limit}, {limit}));"
        "from progidiff.cli.app import main; main()"
    )
    options = ["--out", str(tmp_path / "out"), "--prompt", "liver", "--worker-command", command()]
    ran = subprocess.run(
        [sys.executable, "-c", program, "propose", str(image), *options],
        capture_output=True,
        text=True,
        env={**os.environ, "PYTHONPATH": PACKAGE_HOME, "PYTHONDONTWRITEBYTECODE": "1"},
        check=False,
    )
    assert ran.returncode == 2, ran.stderr
    assert "space" in ran.stderr.splitlines()[-1]
    assert "Traceback" not in ran.stderr
    assert listing(tmp_path) == before


@pytest.mark.slow
@pytest.mark.skipif(sys.platform == "win32", reason="signals are POSIX")
@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_ctrl_c_cancels_cleanly(number: signal.Signals, tmp_path: Path) -> None:
    image, note = good(tmp_path), tmp_path / "note.txt"
    options = ["--out", str(tmp_path / "out"), "--prompt", "liver", "--json"]
    process = subprocess.Popen(
        [
            *(sys.executable, "-m", "progidiff", "propose", str(image), *options),
            *("--worker-command", command(pause=0.5, note=str(note))),
        ],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        env={**os.environ, "PYTHONPATH": PACKAGE_HOME},
    )
    try:
        deadline = time.monotonic() + 120
        while not note.exists():
            assert process.poll() is None, process.communicate()
            assert time.monotonic() < deadline
            time.sleep(0.05)
        process.send_signal(number)
        stdout, stderr = process.communicate(timeout=60)
    finally:
        process.kill()
    assert process.returncode == 130
    assert stderr.splitlines()[-1] == "Cancelled; nothing was written."
    assert json.loads(stdout)["error"]["code"] == "cancelled"
    assert "Traceback" not in stderr
    assert note.read_text(encoding="utf-8") == "cancelled\n"
    assert listing(tmp_path) == ["ct.nii.gz", "note.txt"]


def test_one_line_keeps_the_sentence_and_the_cause() -> None:
    assert one_line("Stop.") == "Stop."
    assert one_line("The worker ended.\n  line 1\n  ImportError: x\n") == "The worker ended. [ImportError: x]"
    assert one_line("a\tb\x1b[31m") == "a b [31m"
