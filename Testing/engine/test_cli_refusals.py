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

import numpy as np
import pytest
from typer.testing import Result

from progidiff.cli import writing
from progidiff.cli.common import one_line
from progidiff.outputs.document import read_document

from ..volume_examples import oblique, write_nifti
from .command_support import ENVIRONMENT, ct, listing, organs, propose


@pytest.fixture
def image(tmp_path: Path) -> Path:
    return ct(tmp_path / "ct.nii.gz")


def refused(image: Path, *arguments: object, out: Path | None = None, lines: int | None = 1, **script: Any) -> Result:
    """Exit code 2, one line at the end (the only one unless progress was shown before), nothing new on the disk."""
    before = listing(image.parent)
    options = () if "--prompt" in arguments else ("--prompt", "liver")
    ran = propose(image, out or image.parent / "out", "--proposals", 2, *options, *arguments, **script)
    assert ran.exit_code == 2, (ran.output, ran.exception)
    said = ran.stderr.splitlines()
    assert lines is None or len(said) == lines
    assert said[-1].endswith((".", "]", "!"))
    assert "Traceback" not in ran.output
    assert listing(image.parent) == before
    return ran


def sentence(ran: Result) -> str:
    return ran.stderr.splitlines()[-1]


def missing(path: Path) -> None:
    path.unlink()


def renamed_text(path: Path) -> None:
    path.write_text("Dear colleague, please find the images attached.\n", encoding="utf-8")


def uniform(path: Path) -> None:
    write_nifti(path, oblique(), np.zeros(oblique().shape_kji, np.float32))


# All that can be wrong with an image is in test_volumes_bad_input.
@pytest.mark.parametrize("change", [missing, renamed_text, uniform])
def test_a_bad_image_is_refused_in_one_line(change: Callable[[Path], None], image: Path) -> None:
    change(image)
    assert image.name in sentence(refused(image))


def test_a_bad_image_with_json_gives_one_object(image: Path) -> None:
    renamed_text(image)
    ran = refused(image, "--json")
    assert json.loads(ran.stdout) == {"error": {"code": "input", "message": ran.stderr.strip()}}


@pytest.mark.parametrize("slices", ["7:3", "99", "-1"])
def test_bad_slices_are_refused_before_the_worker_starts(slices: str, image: Path) -> None:
    assert "slices" in sentence(refused(image, f"--slices={slices}", fail_load="not reached"))


@pytest.mark.slow
@pytest.mark.parametrize("prompt", ["livver", "gallbladder", "  ", "the moon"])
def test_a_prompt_that_names_nothing_known_is_refused(prompt: str, image: Path) -> None:
    assert "liver" in sentence(refused(image, "--prompt", prompt, lines=None))


def test_a_model_that_does_not_load(image: Path) -> None:
    ran = refused(image, "--json", fail_load="The model is damaged; copy it again.")
    assert json.loads(ran.stdout)["error"] == {"code": "model", "message": "The model is damaged; copy it again."}


@pytest.mark.parametrize(
    "worker", ["no-such-program-here", "'", "", shlex.join([sys.executable, "-c", "raise SystemExit('no torch here')"])]
)
def test_a_worker_that_does_not_start(worker: str, image: Path) -> None:
    said = sentence(refused(image, "--worker-command", worker))
    assert "worker" in said
    assert ("no torch here" in said) == ("SystemExit" in worker)


@pytest.mark.parametrize(("script", "says"), [({"crash_after": 3}, "the scripted end"), ({"skip_slice": 4}, "left out")])
def test_a_worker_that_dies_or_leaves_out_a_slice(script: dict[str, Any], says: str, image: Path) -> None:
    assert says in sentence(refused(image, lines=None, **script))


def test_paths_and_names_may_hold_any_letters(tmp_path: Path) -> None:
    folder = tmp_path / "Größe 医学 ñ'\""
    folder.mkdir()
    ran = propose(ct(folder / "Müller 肝.nii.gz"), folder / "Ergebnis ü", "--prompt", "liver", "--proposals", 2)
    assert ran.exit_code == 0, ran.output
    assert read_document(folder / "Ergebnis ü" / "proposals.json").input.name == "Müller 肝.nii.gz"


def test_places_that_cannot_be_written_to_are_refused_before_the_worker_starts(image: Path, tmp_path: Path) -> None:
    refused(image, out=image / "out", fail_load="not reached")
    assert "already holds" in sentence(refused(image, out=tmp_path, fail_load="not reached"))
    locked = tmp_path / "locked"
    locked.mkdir()
    locked.chmod(0o500)
    if os.access(locked, os.W_OK):  # as for root: take a place where nobody can write
        locked = Path("/sys")
        if not locked.is_dir():
            pytest.skip("no place is read-only for this user")
    refused(image, out=locked / "out", fail_load="not reached")
    assert not (locked / "out").exists()


@pytest.mark.slow
@pytest.mark.parametrize("code", [errno.ENOSPC, errno.EDQUOT])
def test_a_disk_that_fills_up_at_the_last_file(code: int, image: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def full(*arguments: object) -> None:
        raise OSError(code, os.strerror(code))

    monkeypatch.setattr(writing, "write_report", full)
    assert "space" in sentence(refused(image, lines=None))


@pytest.mark.slow
@pytest.mark.skipif(sys.platform == "win32", reason="file size limits are POSIX")
@pytest.mark.parametrize("limit", [0, 1000, 100_000])
def test_files_that_the_system_cuts_off(limit: int, image: Path, tmp_path: Path) -> None:
    before = listing(tmp_path)
    program = (
        f"import resource; resource.setrlimit(resource.RLIMIT_FSIZE, ({limit}, {limit}));"
        "from progidiff.cli.app import main; main()"
    )
    options = ["--out", str(tmp_path / "out"), "--prompt", "liver", "--worker-command", organs()]
    command = [sys.executable, "-c", program, "propose", str(image), *options]
    ran = subprocess.run(command, capture_output=True, text=True, env=ENVIRONMENT, check=False)
    assert ran.returncode == 2, ran.stderr
    assert "space" in ran.stderr.splitlines()[-1]
    assert "Traceback" not in ran.stderr
    assert listing(tmp_path) == before


@pytest.mark.slow
@pytest.mark.skipif(sys.platform == "win32", reason="signals are POSIX")
@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_ctrl_c_cancels_cleanly(number: signal.Signals, image: Path, tmp_path: Path) -> None:
    note = tmp_path / "note.txt"
    options = ["--out", str(tmp_path / "out"), "--prompt", "liver", "--json"]
    worker = ["--worker-command", organs(pause=0.5, note=str(note))]
    process = subprocess.Popen(
        [sys.executable, "-m", "progidiff", "propose", str(image), *options, *worker],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        env=ENVIRONMENT,
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
