"""A real sshd on the loopback address for the tests of the worker over ssh: keys, configuration and port of its own.

Nothing of the system is changed: sshd reads no file of it, and the folder that it wants where it is run by root is made in a
mount namespace of its own.
"""

from __future__ import annotations

import json
import os
import shlex
import shutil
import socket
import subprocess
import sys
import time
from contextlib import suppress
from pathlib import Path
from typing import Any

import psutil

ORGANS_WORKER = Path(__file__).with_name("engine") / "organs_worker.py"
ENGINE = Path(__file__).resolve().parents[1] / "ProGiDiffSlicer"
SSHD = shutil.which("sshd", path=os.pathsep.join((os.environ.get("PATH", ""), "/usr/sbin", "/usr/local/sbin")))
SEPARATION = Path("/run/sshd")


def missing() -> str:
    """Why no server can be started here; "" where one can."""
    if SSHD is None or shutil.which("ssh") is None or shutil.which("ssh-keygen") is None:
        return "sshd, ssh or ssh-keygen is not installed; `make ssh-server` installs them"
    if os.geteuid() == 0 and not SEPARATION.exists():
        tried = subprocess.run(["unshare", "--mount", "true"], capture_output=True, check=False) if _unshare() else None
        if tried is None or tried.returncode:
            return f"root cannot start sshd without {SEPARATION}, nor make a mount namespace for it"
    return ""


def _unshare() -> bool:
    return shutil.which("unshare") is not None


class SshServer:
    """One sshd, which lets the user who runs the tests in with a key.

    Attributes:
        folder: where its keys and logs are, and the configurations of clients.
    """

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        folder.mkdir(mode=0o700, parents=True, exist_ok=True)
        for name in ("host", "user", "stranger", "other_host"):
            key = ["ssh-keygen", "-q", "-t", "ed25519", "-N", "", "-C", name, "-f", str(folder / name)]
            subprocess.run(key, check=True, capture_output=True)
        (folder / "authorized").write_bytes((folder / "user.pub").read_bytes())
        with socket.socket() as free:
            free.bind(("127.0.0.1", 0))
            self.port = int(free.getsockname()[1])
        options = {
            "ListenAddress": "127.0.0.1",
            "Port": self.port,
            "HostKey": folder / "host",
            "AuthorizedKeysFile": folder / "authorized",
            "PidFile": folder / "pid",
            "StrictModes": "no",
            "UsePAM": "no",
            "PasswordAuthentication": "yes",
            "KbdInteractiveAuthentication": "no",
            "PermitRootLogin": "yes",
        }
        command = [
            str(SSHD),
            "-E",
            str(folder / "sshd.log"),
            "-f",
            "/dev/null",
            *(f"-o{name}={value}" for name, value in options.items()),
        ]
        if os.geteuid() == 0 and not SEPARATION.exists():
            inner = f"mount -t tmpfs none /run && mkdir -m 755 {SEPARATION} && exec {shlex.join(command)}"
            command = ["unshare", "--mount", "sh", "-c", inner]
        # It leaves this process, so that a test finds no children but those of its own.
        subprocess.run(command, check=True, capture_output=True)
        self._process = self._started()

    def _started(self) -> psutil.Process:
        end = time.monotonic() + 20
        while time.monotonic() < end:
            with socket.socket() as probe, suppress(OSError, ValueError):
                probe.connect(("127.0.0.1", self.port))
                return psutil.Process(int((self.folder / "pid").read_text()))
            time.sleep(0.05)
        raise RuntimeError(f"sshd did not start: {(self.folder / 'sshd.log').read_text(errors='replace')}")

    def close(self) -> None:
        """End it with all its connections."""
        for process in [*self.sessions(), self._process]:
            with suppress(psutil.NoSuchProcess):
                process.kill()

    def sessions(self) -> list[psutil.Process]:
        """The server's processes of the connections that are open."""
        return self._process.children(recursive=True)

    def workers(self) -> list[psutil.Process]:
        """The workers that :meth:`organs` has started over there, which is here after all."""
        of = json.dumps({"of": str(self.folder)})[:-1]
        found = psutil.process_iter(["cmdline"])
        return [process for process in found if any(word.startswith(of) for word in process.info["cmdline"] or [])]

    def cut(self) -> None:
        """Cut every connection on the server's side, as where that computer is switched off."""
        for process in self.sessions():
            with suppress(psutil.NoSuchProcess):
                if process.name().startswith("sshd"):
                    process.kill()

    def ssh(
        self, *words: str, user_key: str = "user", known: str = "host", host: str = "127.0.0.1", port: int = 0
    ) -> list[str]:
        """An ssh command that runs ``words`` over there.

        ``user_key``: the key that is shown; ``known``: the host key that is known of it, "" for none.
        """
        name = "-".join(filter(None, (user_key, known or "none", host, str(port))))
        if known:
            public = (self.folder / f"{known}.pub").read_text().split()
            (self.folder / f"{name}.known").write_text(f"[127.0.0.1]:{self.port} {public[0]} {public[1]}\n")
        (self.folder / f"{name}.config").write_text(
            f"Host over-there\n HostName {host}\n Port {port or self.port}\n IdentityFile {self.folder / user_key}\n"
            f" IdentitiesOnly yes\n UserKnownHostsFile {self.folder / name}.known\n GlobalKnownHostsFile /dev/null\n"
        )
        return ["ssh", "-F", str(self.folder / f"{name}.config"), "over-there", *words]

    def organs(self, script: dict[str, Any] | None = None, **options: Any) -> list[str]:
        """An ssh command that runs the worker that invents organs (see its file) over there."""
        run, script = self.folder / "worker.sh", {"of": str(self.folder), **(script or {})}
        words = shlex.join([sys.executable, str(ORGANS_WORKER), json.dumps(script)])
        run.write_text(f"#!/bin/sh\nexport PYTHONPATH={shlex.quote(str(ENGINE))} OMP_NUM_THREADS=1\nexec {words}\n")
        run.chmod(0o755)
        return self.ssh(shlex.quote(str(run)), **options)
