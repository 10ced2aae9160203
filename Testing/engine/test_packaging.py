"""What an installation holds: the wheel, the bundled files, and the steps of the setup script."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
import zipfile
from dataclasses import dataclass
from pathlib import Path

import pytest

from progidiff.errors import InputError
from progidiff.places import sample_volume

ROOT = Path(__file__).resolve().parents[2]

# Answers `-c` like the real interpreter; notes what it is asked to install instead of doing it.
FAKE_PYTHON = f"""#!/bin/sh
case "$1 $2" in
"-m venv") mkdir -p .venv/bin; cp "$0" .venv/bin/python; echo "venv by $(basename "$0")" >>"$CALLS"; exit 0 ;;
"-m pip") echo "$*" >>"$CALLS"; exit "${{PIP_STATUS:-0}}" ;;
esac
case "$2" in *ensurepip*) [ -z "${{NO_VENV:-}}" ] || exit 1 ;; esac
exec "{sys.executable}" "$@"
"""
DEAD_SHIM = "#!/bin/sh\necho 'command not found' >&2\nexit 127\n"
OLD_PYTHON = "#!/bin/sh\nexit 1\n"


@dataclass
class Setup:
    """A copy of the setup script with a PATH that holds only the interpreters which a test puts there."""

    folder: Path

    def put(self, name: str, script: str = FAKE_PYTHON) -> Path:
        path = self.folder / name if "/" in name else self.folder / "bin" / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(script, encoding="utf-8")
        path.chmod(0o755)
        return path

    def run(self, **environment: str) -> subprocess.CompletedProcess[str]:
        known = {"PATH": str(self.folder / "bin"), "HOME": str(self.folder), "CALLS": str(self.folder / "calls")}
        script = [shutil.which("sh") or "sh", str(self.folder / "project/Utilities/setup.sh")]
        return subprocess.run(script, capture_output=True, text=True, env=known | environment, check=False)

    @property
    def calls(self) -> list[str]:
        """What the interpreters were asked to do since the last look."""
        path = self.folder / "calls"
        lines = path.read_text(encoding="utf-8").splitlines() if path.exists() else []
        path.unlink(missing_ok=True)
        return lines


@pytest.fixture
def setup(tmp_path: Path) -> Setup:
    if os.name != "posix":
        pytest.skip("the setup script needs a POSIX shell")
    (tmp_path / "project/Utilities").mkdir(parents=True)
    for name in ("pyproject.toml", "Utilities/setup.sh", "Utilities/constraints.txt"):
        shutil.copy(ROOT / name, tmp_path / "project" / name)
    (tmp_path / "bin").mkdir()
    for tool in ("basename", "cat", "cksum", "cp", "dirname", "id", "mkdir", "rm", "sed", "uname"):
        found = shutil.which(tool)
        (tmp_path / "bin" / tool).symlink_to(found)
    return Setup(tmp_path)


def test_setup_passes_over_what_does_not_fit_and_installs_torch_first(setup: Setup) -> None:
    setup.put("python3.12", DEAD_SHIM)
    setup.put("python3", OLD_PYTHON)
    result = setup.run()
    assert (result.returncode, result.stdout, result.stderr.count("\n")) == (1, "", 1)
    assert "3.11, 3.12 or 3.13" in result.stderr
    assert not (setup.folder / "project/.venv").exists()
    setup.put("python3.11")
    assert setup.run().returncode == 0
    venv, torch, backend, engine = setup.calls
    assert venv == "venv by python3.11"
    assert " torch==2.13.0" in torch
    assert "hatchling==" in backend
    assert engine.endswith("-e .[test,slicer]")


def test_setup_finds_pyenv_interpreters_that_are_not_on_the_path(setup: Setup) -> None:
    setup.put(".pyenv/versions/3.10.13/bin/python3", OLD_PYTHON)
    setup.put(".pyenv/versions/3.13.0/bin/python3")
    result = setup.run()
    assert result.returncode == 0, result.stderr
    assert ".pyenv/versions/3.13.0/bin/python3" in result.stdout


def test_setup_does_nothing_again_until_the_requirements_change(setup: Setup) -> None:
    setup.put("python3")
    result = setup.run(PIP_STATUS="1")
    assert result.returncode == 1
    assert "torch==2.13.0 could not be installed" in result.stderr
    assert len(setup.calls) == 2
    assert setup.run().returncode == 0
    assert len(setup.calls) == 3, "what failed is tried again"
    assert setup.run().returncode == 0
    assert setup.calls == []
    with (setup.folder / "project/pyproject.toml").open("a", encoding="utf-8") as file:
        file.write("# changed\n")
    assert setup.run().returncode == 0
    assert [call.split()[0] for call in setup.calls] == ["-m", "-m", "-m"]


@pytest.mark.parametrize("script", [OLD_PYTHON, DEAD_SHIM])
def test_setup_refuses_what_does_not_fit(setup: Setup, script: str) -> None:
    setup.put("python3")
    result = setup.run(NO_VENV="1")
    assert result.returncode == 1
    assert f"python{sys.version_info[0]}.{sys.version_info[1]}-venv" in result.stderr
    named = setup.put("other/python", script)
    result = setup.run(PYTHON=str(named))
    assert result.returncode == 1
    assert str(named) in result.stderr
    assert setup.calls == []


@pytest.mark.slow
def test_wheel_holds_the_engine_and_what_is_bundled(tmp_path: Path) -> None:
    subprocess.run(
        [sys.executable, "-m", "hatchling", "build", "-t", "wheel", "-d", str(tmp_path)],
        cwd=ROOT,
        check=True,
        capture_output=True,
    )
    (wheel,) = tmp_path.glob("progidiff-*.whl")
    with zipfile.ZipFile(wheel) as archive:
        inside = {name for name in archive.namelist() if ".dist-info/" not in name}
        (entry_points,) = (name for name in archive.namelist() if name.endswith("entry_points.txt"))
        assert "progidiff = progidiff.__main__:main" in archive.read(entry_points).decode()
    package = ROOT / "ProGiDiffSlicer/progidiff"
    expected = {
        f"progidiff/{path.relative_to(package).as_posix()}"
        for path in package.rglob("*")
        if path.is_file() and path.suffix != ".pyc" and path.name != ".DS_Store"
    }
    for folder in ("Models", "SampleData"):
        files = (ROOT / "Resources" / folder).rglob("*")
        expected |= {f"progidiff/_resources/{p.relative_to(ROOT / 'Resources').as_posix()}" for p in files if p.is_file()}
    assert inside == expected


@pytest.mark.parametrize("folder", ["repository/Resources", "repository/ProGiDiffSlicer/progidiff/_resources"])
def test_sample_is_found_in_a_checkout_and_in_an_installation(tmp_path: Path, folder: str) -> None:
    package = tmp_path / "repository/ProGiDiffSlicer/progidiff"
    with pytest.raises(InputError, match="no sample volume"):
        sample_volume(package)
    sample = tmp_path / folder / "SampleData/sample.nii.gz"
    sample.parent.mkdir(parents=True)
    sample.touch()
    assert sample_volume(package) == sample
