"""Fixtures shared by all tests."""

from __future__ import annotations

import locale
import signal
from collections.abc import Iterator
from pathlib import Path

import pytest

from . import sshd

# Where tests run in the background of a shell, Ctrl+C is ignored, and what they start inherits that.
signal.signal(signal.SIGINT, signal.default_int_handler)

ROOT = Path(__file__).resolve().parents[1]
SHARED_DATA = ROOT.parent / "shared" / "data"


@pytest.fixture(autouse=True)
def same_locale() -> Iterator[None]:
    """The locale stays what it was: GDCM's writer, which makes the tests' DICOM images, leaves the process in "C"."""
    before = locale.setlocale(locale.LC_ALL)
    yield
    locale.setlocale(locale.LC_ALL, before)


@pytest.fixture(scope="session")
def shared_data() -> Path:
    """Folder of real CT and MR with labels, beside the checkout; tests that need it skip where it is absent."""
    if not SHARED_DATA.is_dir():
        pytest.skip("real CT and MR are not beside this checkout (../shared/data)")
    return SHARED_DATA


@pytest.fixture(scope="session")
def ssh_server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[sshd.SshServer]:
    """An sshd of the tests' own; tests that need it skip where none can be started."""
    reason = sshd.missing()
    if reason:
        pytest.skip(reason)
    server = sshd.SshServer(tmp_path_factory.mktemp("sshd"))
    yield server
    server.close()


@pytest.fixture
def asked(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Path:
    """Whatever ssh asks, it asks a program that never answers; the file exists once it has asked."""
    note, program = tmp_path / "asked", tmp_path / "askpass"
    program.write_text(f"#!/bin/sh\ntouch '{note}'\nexec sleep 600\n")
    program.chmod(0o755)
    for name, value in {"SSH_ASKPASS": str(program), "SSH_ASKPASS_REQUIRE": "force", "DISPLAY": ":0"}.items():
        monkeypatch.setenv(name, value)
    return note
