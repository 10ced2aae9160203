"""The doctor: finds what is missing, and names it."""

from __future__ import annotations

import json
import shlex
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
from typer.testing import Result

from progidiff import __version__, doctor
from progidiff.cards import save_card

from .command_support import invoke, organs
from .conftest import tiny_card

PROBE = """print('a line of chatter')
print('{"version": "2.9.0", "cuda_build": %s, "threads": 2, "cuda_devices": %s}')"""


def probe(cuda_build: str, devices: str) -> list[str]:
    return [sys.executable, "-c", PROBE % (cuda_build, devices)]


@pytest.fixture
def quick_torch(monkeypatch: pytest.MonkeyPatch) -> None:
    """Answer for torch at once; its real probe has a test of its own."""
    answer = doctor.check_torch(probe("null", "[]"))
    monkeypatch.setattr(doctor, "check_torch", lambda: answer)


@pytest.fixture
def model_folder(tmp_path: Path) -> Path:
    folder = tmp_path / "modèle"
    folder.mkdir()
    save_card(tiny_card(model_id="tiny-1", name="Tiny", modalities=["CT"], vocabulary=["liver"]), folder)
    return folder


def run(*arguments: str, **script: Any) -> Result:
    return invoke("doctor", "--worker-command", organs(**script), *arguments)


@pytest.mark.usefixtures("quick_torch")
def test_a_sound_installation_is_told_so() -> None:
    result = run("--json")
    assert result.exit_code == 0, result.output
    found = json.loads(result.stdout)
    assert found["ok"] is True
    checks = {check["name"]: check for check in found["checks"]}
    assert checks["ProGiDiff"]["data"]["version"] == __version__
    assert checks["Python"]["data"]["executable"] == sys.executable
    assert checks["numpy"]["data"]["version"][0].isdigit()
    assert checks["Worker"]["data"]["version"] == __version__
    assert checks["Loading the model"]["data"]["model_id"] == "organs-1"
    assert checks["Loading the model"]["data"]["device"] == "cpu"
    assert "pancreas" in checks["Loading the model"]["data"]["vocabulary"]
    assert any(name.startswith("Disk") and check["data"]["free_mb"] > 0 for name, check in checks.items())
    assert "Model folder" not in checks, "a folder of another machine cannot be looked at from here"


@pytest.mark.usefixtures("quick_torch")
def test_a_missing_package_ends_with_1_and_an_optional_one_is_only_noted(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(doctor, "OPTIONAL_PACKAGES", {"no-such-thing": "nothing at all"})
    result = run("--json")
    assert result.exit_code == 0
    check = next(c for c in json.loads(result.stdout)["checks"] if c["name"] == "no-such-thing")
    assert check["status"] == "warning"
    assert "only needed for nothing at all" in check["detail"]
    monkeypatch.setattr(doctor, "REQUIRED_PACKAGES", ("numpy", "no-such-package"))
    result = run()
    assert result.exit_code == 1
    assert "Missing: no-such-package." in result.stdout
    assert "pip install no-such-package" in " ".join(result.stdout.split())


@pytest.mark.usefixtures("quick_torch")
def test_a_model_that_does_not_load_ends_with_1() -> None:
    result = run("--json", fail_load="The weights are truncated; copy the model folder again.")
    assert result.exit_code == 1
    checks = {check["name"]: check for check in json.loads(result.stdout)["checks"]}
    assert checks["Worker"]["status"] == "ok"
    assert checks["Loading the model"]["status"] == "missing"
    assert "truncated" in checks["Loading the model"]["detail"]


@pytest.mark.usefixtures("quick_torch")
@pytest.mark.parametrize("command", [["no-such-program-here"], [sys.executable, "-c", "raise SystemExit('broken')"]])
def test_a_worker_that_does_not_start_ends_with_1(command: list[str]) -> None:
    diagnosis = doctor.examine(worker_command=command)
    assert not diagnosis.ok
    check = diagnosis.checks[-1]
    assert (check.name, check.status) == ("Worker", "missing")
    assert check.advice


@pytest.mark.slow
def test_the_real_torch_is_asked_in_a_process_of_its_own() -> None:
    check = doctor.check_torch()
    assert check.status == "ok"
    assert check.data["version"]
    assert check.data["threads"] >= 1


def test_torch_devices_and_little_space_are_told(monkeypatch: pytest.MonkeyPatch) -> None:
    check = doctor.check_torch(probe('"12.8"', '[{"name": "Some GPU", "memory_mb": 24576}]'))
    assert (check.status, check.detail) == ("ok", "CUDA: Some GPU (24 GiB)")
    assert "a CPU build" in doctor.check_torch(probe("null", "[]")).detail
    assert "built for CUDA 12.8" in doctor.check_torch(probe('"12.8"', "[]")).detail
    monkeypatch.setattr(doctor, "LITTLE_DISK", 1 << 60)
    monkeypatch.setattr(doctor, "LITTLE_MEMORY", 1 << 60)
    assert {check.status for check in (doctor._memory(), *doctor._disks())} == {"warning"}


@pytest.mark.parametrize(
    ("program", "cause"),
    [("raise ImportError('libcudart.so.12: cannot open shared object file')", "libcudart"), ("pass", "exit code 0")],
)
def test_a_torch_that_cannot_be_imported_is_missing(program: str, cause: str) -> None:
    check = doctor.check_torch([sys.executable, "-c", program])
    assert check.status == "missing"
    assert cause in check.detail
    assert check.advice


@pytest.mark.usefixtures("quick_torch")
def test_the_model_folder_and_its_card(model_folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(doctor, "check_worker", lambda *arguments: iter(()))
    check = doctor.check_model_folder(str(model_folder))
    assert check.status == "ok"
    assert "Tiny (tiny-1, CT" in check.detail
    assert check.data["card"]["vocabulary"] == ["liver"]
    assert check.data["bytes"] > 100

    assert "Model folder" in [check.name for check in doctor.examine(str(model_folder)).checks]
    (model_folder / "model_card.json").write_text("{", encoding="utf-8")
    assert doctor.check_model_folder(str(model_folder)).status == "missing"
    assert doctor.check_model_folder(str(tmp_path / "nowhere")).status == "missing"


def test_python_outside_the_window_is_missing(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(doctor, "PYTHON_WINDOW", ((3, 98), (3, 100)))
    check = doctor._python()
    assert check.status == "missing"
    assert check.advice == "Use Python 3.98 to 3.99."


def test_the_doctor_itself_imports_nothing_heavy() -> None:
    program = (
        "import sys; from progidiff import doctor;"
        "doctor.check_torch = lambda: doctor.Check('torch devices', 'ok', 'asked elsewhere');"
        f"doctor.examine(worker_command={shlex.split(organs())!r});"
        "heavy = {'torch', 'diffusers', 'transformers', 'SimpleITK', 'matplotlib'} & set(sys.modules);"
        "sys.exit(f'imported {heavy}' if heavy else 0)"
    )
    ran = subprocess.run(
        [sys.executable, "-c", program], capture_output=True, text=True, cwd=Path(doctor.__file__).parents[1], check=False
    )
    assert ran.returncode == 0, ran.stderr
