"""The program as a whole: help, quick start, progress, and commands that are thin."""

from __future__ import annotations

import io
import json
import subprocess
import sys
from pathlib import Path

import pytest

import progidiff
from progidiff.cli.common import split_command
from progidiff.cli.view import PlainLines, progress_view, remaining, slice_text
from progidiff.errors import InputError
from progidiff.model import parameters
from progidiff.wire.messages import ProgressEvent

from .command_support import ENVIRONMENT, ct, invoke, organs

HEAVY = ("torch", "diffusers", "transformers", "accelerate", "peft", "monai", "scipy")


def run_python(program: str, *arguments: str) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "-c", program, *arguments]
    return subprocess.run(command, capture_output=True, text=True, encoding="utf-8", env=ENVIRONMENT, check=False)


def loaded_after(arguments: list[str], unwanted: tuple[str, ...]) -> str:
    """Names of ``unwanted`` modules that a command has imported, as text; the command must succeed."""
    program = (
        "import sys\n"
        "from progidiff.cli.app import app\n"
        "try:\n    app(prog_name='progidiff')\n"
        "except SystemExit as end:\n    assert not end.code, end.code\n"
        f"print('LOADED', sorted(set({unwanted!r}) & set(sys.modules)), file=sys.stderr)"
    )
    ran = run_python(program, *arguments)
    assert ran.returncode == 0, ran.stderr
    return ran.stderr.splitlines()[-1]


@pytest.mark.parametrize("arguments", [["--help"], ["propose", "--help"], ["doctor", "--help"], ["--version"]])
def test_help_imports_nothing_heavy(arguments: list[str]) -> None:
    assert loaded_after(arguments, (*HEAVY, "numpy", "SimpleITK", "matplotlib")) == "LOADED []"


@pytest.mark.slow
def test_propose_imports_no_networks(tmp_path: Path) -> None:
    arguments = ["propose", str(ct(tmp_path / "ct.nii.gz")), "--prompt", "liver", "--out", str(tmp_path / "out")]
    heavy = tuple(name for name in HEAVY if name != "scipy")
    assert loaded_after([*arguments, "--worker-command", organs()], heavy) == "LOADED []"


def test_help_lists_every_command() -> None:
    text = invoke("--help").stdout
    for name in ("propose", "info", "doctor", "worker"):
        assert name in text
    assert "not a medical device" in " ".join(text.split())


def test_version() -> None:
    assert invoke("--version").stdout == f"progidiff {progidiff.__version__}\n"


def test_propose_needs_a_prompt_and_a_place() -> None:
    for arguments in (["x.nii.gz", "--out", "o"], ["x.nii.gz", "--prompt", "liver"]):
        assert invoke("propose", *arguments).exit_code == 2


@pytest.mark.parametrize(
    "option", ["--proposals=0", "--top-k=0", "--steps=101", "--seed=-1", "--scheduler=euler", "--device=tpu"]
)
def test_numbers_out_of_range_are_refused(option: str) -> None:
    ran = invoke("propose", "x.nii.gz", "--prompt", "liver", "--out", "o", option)
    assert ran.exit_code == 2
    assert option.partition("=")[0] in ran.stderr


@pytest.mark.slow
def test_worker_passes_its_options_on() -> None:
    ran = run_python("from progidiff.cli.app import main; main()", "worker", "--heartbeat", "soon")
    assert ran.returncode == 2
    assert "argument --heartbeat" in ran.stderr
    ran = run_python("from progidiff.cli.app import main; main()", "worker", "--help")
    assert ran.returncode == 0
    assert "--max-payload" in ran.stdout


def test_info_prints_what_it_is_told(monkeypatch: pytest.MonkeyPatch) -> None:
    asked: list[tuple[object, bool]] = []

    def print_info(what: object, as_json: bool = False) -> str | dict[str, object]:
        asked.append((what, as_json))
        return {"trainable_parameters": 367} if as_json else "a table"

    monkeypatch.setattr(parameters, "print_info", print_info)
    assert invoke("info", "--config", "sd15").stdout == "a table\n"
    ran = invoke("info", "--model", "some/folder", "--json")
    assert json.loads(ran.stdout) == {"trainable_parameters": 367}
    assert asked == [("sd15", False), (Path("some/folder"), True)]


def test_info_refuses_what_is_no_model(tmp_path: Path) -> None:
    both = invoke("info", "--config", "sd15", "--model", tmp_path)
    assert both.exit_code == 2
    assert len(both.stderr.splitlines()) == 1
    nothing = invoke("info", "--model", tmp_path / "nowhere", "--json")
    assert nothing.exit_code == 2
    assert json.loads(nothing.stdout)["error"]["code"] == "model"


def test_worker_commands_are_split_like_a_shell_does() -> None:
    assert split_command(None) is None
    assert split_command("ssh 'gpu host' python -m progidiff worker") == [
        "ssh",
        "gpu host",
        *("python", "-m", "progidiff", "worker"),
    ]
    for bad in ("", "  ", "ssh 'host"):
        with pytest.raises(InputError, match="worker command"):
            split_command(bad)


def test_progress_tells_slice_and_time() -> None:
    event = ProgressEvent("sampling", 0.15, 11, 11, 80, "liver", eta_s=None)
    assert slice_text(event) == "slice 12/80"
    assert remaining(event, elapsed_s=3.0) == "about 17 s left"
    assert remaining(ProgressEvent("sampling", 0.15, eta_s=600), 3.0) == "about 10 min left"
    assert remaining(ProgressEvent("sampling", 0.15, eta_s=7200), 3.0) == "about 2.0 h left"
    assert remaining(ProgressEvent("sampling", 0.01), 3.0) == ""
    assert remaining(ProgressEvent("sampling", 1.0), 3.0) == ""
    assert slice_text(ProgressEvent("sampling", 1.0, 79, 80, 80)) == "slice 80/80"
    assert slice_text(ProgressEvent("loading", 0.5)) == ""


def test_a_log_file_gets_a_line_for_each_tenth() -> None:
    stream = io.StringIO()
    with progress_view(stream) as view:
        assert isinstance(view, PlainLines)
        for step in range(201):
            view.show(ProgressEvent("sampling", step / 200, step, step, 201, "liver", 1.0))
        view.show(ProgressEvent("writing", 0.0))
        view.warn("Look [here].")
    lines = stream.getvalue().splitlines()
    assert len(lines) == 13
    assert lines[0] == "sampling liver: slice 1/201, about 1 s left"
    assert lines[1].startswith("sampling liver: slice 21/201, 10 %")
    assert lines[-2:] == ["writing", "Warning: Look [here]."]


class Terminal(io.StringIO):
    """Claims to be a terminal."""

    def isatty(self) -> bool:
        return True


def test_a_terminal_gets_a_bar(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("TERM", "xterm-256color")
    monkeypatch.setenv("COLUMNS", "120")
    monkeypatch.delenv("NO_COLOR", raising=False)
    stream = Terminal()
    with progress_view(stream) as view:
        view.show(ProgressEvent("sampling", 0.15, 11, 11, 80, "liver", 42.0))
        view.warn("Look [here].")
    text = stream.getvalue()
    for expected in ("sampling liver", "15%", "slice 12/80", "about 42 s left", "Look [here]."):
        assert expected in text, expected
