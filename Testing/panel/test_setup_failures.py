"""One sentence with the next step for each way in which pip fails; the output is a real pip's wherever it can be had."""

from __future__ import annotations

import subprocess
import sys
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from threading import Thread

import pytest

from ProGiDiffSlicerLib.setup.failures import explain, last_line

from .setup_examples import make_wheel

pytestmark = pytest.mark.usefixtures("app")

# A port of this computer where nothing listens: the network cannot be reached, without any being asked.
_NOWHERE = "http://127.0.0.1:9"
PYTHON = f"Python {sys.version_info.major}.{sys.version_info.minor}"


def pip(*arguments: str) -> list[str]:
    """Lines of a pip that fails."""
    command = [sys.executable, "-m", "pip", "--isolated", "install", "--no-input", "--retries", "1", *arguments]
    ran = subprocess.run(command, capture_output=True, text=True, check=False, stdin=subprocess.DEVNULL)
    assert ran.returncode != 0, ran.stdout
    return (ran.stdout + ran.stderr).splitlines()


@pytest.fixture(autouse=True)
def no_proxy(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("HTTP_PROXY", "HTTPS_PROXY", "ALL_PROXY", "http_proxy", "https_proxy", "all_proxy"):
        monkeypatch.delenv(name, raising=False)


@pytest.fixture
def refusing_proxy() -> Iterator[str]:
    """A proxy that wants a password."""

    class Handler(BaseHTTPRequestHandler):
        def do_CONNECT(self) -> None:
            self.send_error(407)

        def log_message(self, *args: object) -> None:
            """Nothing is to be printed."""

    with ThreadingHTTPServer(("127.0.0.1", 0), Handler) as server:
        Thread(target=server.serve_forever, daemon=True).start()
        yield f"http://127.0.0.1:{server.server_port}"
        server.shutdown()


def test_no_network(tmp_path: Path) -> None:
    lines = pip("--target", str(tmp_path), "--index-url", f"{_NOWHERE}/simple", "progidiff-thing")
    failure = explain(lines)
    assert failure.kind == "network"
    assert failure.message.startswith("The package server cannot be reached; check the network connection")
    assert "127.0.0.1" in failure.details


def test_no_network_where_a_proxy_is_set(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HTTPS_PROXY", "http://name:secret@127.0.0.1:9")
    failure = explain(pip("--target", str(tmp_path), "--index-url", "https://packages.invalid/simple", "progidiff-thing"))
    assert failure.kind == "proxy"
    assert "secret" not in failure.message


def test_a_proxy_that_refuses(tmp_path: Path, refusing_proxy: str) -> None:
    arguments = ("--target", str(tmp_path), "--proxy", refusing_proxy, "--index-url", "https://packages.invalid/simple")
    failure = explain(pip(*arguments, "progidiff-thing"))
    assert failure.kind == "proxy"
    assert "HTTPS_PROXY" in failure.message


@pytest.mark.slow
@pytest.mark.skipif(sys.platform == "win32", reason="folders have no such permission there")
def test_a_folder_that_cannot_be_written(tmp_path: Path) -> None:
    wheel = make_wheel(tmp_path / "wheels", "alpha", "1.0")
    (tmp_path / "file").touch()
    failure = explain(pip("--target", str(tmp_path / "file" / "t"), "--no-index", str(wheel)))
    assert failure.kind == "other"
    assert failure.message.startswith("pip failed: ")
    assert "Not a directory" in failure.message


@pytest.mark.parametrize(
    ("line", "kind", "told"),
    [
        ("ERROR: Could not install packages due to an OSError: [Errno 28] No space left on device", "disk", "disk is full"),
        ("OSError: [WinError 112] There is not enough space on the disk", "disk", "disk is full"),
        ("ERROR: ... due to an OSError: [WinError 5] Access is denied: 'C:\\\\_core.pyd'", "in_use", "restart Slicer"),
        ("[WinError 32] The file is being used by another process", "in_use", "restart Slicer"),
        ("WARNING: Retrying: ProxyError(OSError('Tunnel connection failed: 407'))", "proxy", "HTTPS_PROXY"),
        ("SSLError(1, '[SSL: CERTIFICATE_VERIFY_FAILED] self-signed certificate in chain'))", "certificate", "PIP_CERT"),
        ("NewConnectionError: [Errno -3] Temporary failure in name resolution", "network", "cannot be reached; check"),
        ("ReadTimeoutError: HTTPSConnectionPool: Read timed out.", "network", "cannot be reached; check"),
        ("ERROR: ... due to an OSError: [Errno 13] Permission denied: '/opt/Slicer'", "permission", "cannot be written to"),
        ("    The user requested (constraint) beta==1.0\nERROR: ResolutionImpossible: for help", "conflict", "(beta==1.0)"),
        ("ERROR: Could not find a version that satisfies the requirement beta>=2", "no_match", f"has no beta for {PYTHON} "),
    ],
)
def test_each_kind_of_failure_is_one_sentence_that_says_what_to_do(line: str, kind: str, told: str) -> None:
    failure = explain(["Collecting torch", line, "ERROR: No matching distribution found for torch"])
    assert failure.kind == kind
    assert told in failure.message
    assert failure.message.endswith(".")
    assert ";" in failure.message, "the sentence says what to do"
    assert "\n" not in failure.message


def test_the_last_line_that_says_something() -> None:
    lines = ["Collecting a", "ERROR: the wheel is corrupt.", "", "[notice] A new release of pip is available", "WARNING: x"]
    assert last_line(lines) == "the wheel is corrupt."
    assert explain(lines).message.startswith("pip failed: the wheel is corrupt; see the details, or choose")
    assert explain([]).message.startswith("pip failed: it did not say why; ")
