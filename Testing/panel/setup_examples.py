"""What the tests of the setup share: tools that note what they are asked, scratch packages, a real pip."""

from __future__ import annotations

import base64
import hashlib
import subprocess
import sys
import threading
import venv
import zipfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

# of a model, as a worker sends it
CARD = {
    "format_version": "1.0",
    "name": "Remote model",
    "model_id": "remote",
    "licence": "MIT",
    "modalities": ["CT"],
    "vocabulary": ["liver"],
    "windows": {"CT": {"kind": "hu", "low": -160, "high": 240}},
    "image_size": 64,
    "spacing_mm": 5,
    "latent_shift": [0],
    "latent_scale": [1],
    "trainable_parameters": 0,
}


class MemoryStore:
    """QSettings without a file."""

    def __init__(self) -> None:
        self.values: dict[str, Any] = {}

    def value(self, key: str, default: Any = None) -> Any:
        return self.values.get(key, default)

    def setValue(self, key: str, value: Any) -> None:
        assert isinstance(value, str), "only text survives in every kind of settings file"
        self.values[key] = value

    def remove(self, key: str) -> None:
        self.values.pop(key, None)


class ScriptedTools:
    """Answers and acts as a test says, and notes everything in the order in which it happened."""

    def __init__(self, answer: bool = True) -> None:
        self.answer = answer
        self.answers: list[bool] = []
        self.log: list[tuple[str, Any]] = []
        self.questions: list[str] = []
        self.extension_loaded = True
        self.extension_waits = False
        self.extension_installs = True
        self.torch_effect: Callable[[], None] = lambda: None
        self.pip_lines: list[str] = []
        self.pip_code = 0
        self.pip_effect: Callable[[list[str]], None] = lambda arguments: None
        self.uninstall_effect: Callable[[list[str]], None] = lambda names: None

    def ask(self, title: str, text: str, details: str) -> bool:
        self.questions.append(text)
        self.log.append(("ask", details))
        return self.answers.pop(0) if self.answers else self.answer

    def pip_install(self, arguments: list[str], on_line: Callable[[str], None], on_end: Callable[[int], None]) -> None:
        self.log.append(("pip", arguments))
        self.pip_effect(arguments)
        for line in self.pip_lines:
            on_line(line)
        on_end(self.pip_code)

    def pip_uninstall(self, names: list[str], on_line: Callable[[str], None], on_end: Callable[[int], None]) -> None:
        self.log.append(("uninstall", names))
        self.uninstall_effect(names)
        for line in self.pip_lines:
            on_line(line)
        on_end(self.pip_code)

    def torch_extension_loaded(self) -> bool:
        return self.extension_loaded

    def torch_extension_waits(self) -> bool:
        return self.extension_waits

    def install_torch_extension(self) -> bool:
        self.log.append(("extension", None))
        return self.extension_installs

    def install_torch(self, window: str, on_line: Callable[[str], None]) -> None:
        self.log.append(("torch", window))
        self.torch_effect()

    def restart(self) -> None:
        self.log.append(("restart", None))

    @property
    def acts(self) -> list[str]:
        """What happened, without the details."""
        return [act for act, _ in self.log]


def put_package(
    folder: Path, name: str, version: str, requires: tuple[str, ...] = (), code: str | None = "", size: int = 0
) -> None:
    """An installed package as pip leaves it; without ``code`` only its metadata is there."""
    info = folder / f"{name.replace('-', '_')}-{version}.dist-info"
    info.mkdir(parents=True)
    lines = [
        "Metadata-Version: 2.1",
        f"Name: {name}",
        f"Version: {version}",
        *(f"Requires-Dist: {each}" for each in requires),
    ]
    (info / "METADATA").write_text("\n".join(lines) + "\n", encoding="utf-8")
    record = [f"{info.name}/METADATA,,", f"{info.name}/RECORD,,"]
    if code is not None:
        module = folder / name
        module.mkdir(exist_ok=True)
        (module / "__init__.py").write_text(code, encoding="utf-8")
        (module / "data.bin").write_bytes(bytes(size))
        record += [f"{name}/__init__.py,,", f"{name}/data.bin,,"]
    (info / "RECORD").write_text("\n".join(record) + "\n", encoding="utf-8")


def make_wheel(folder: Path, name: str, version: str, requires: tuple[str, ...] = ()) -> Path:
    """A wheel of one tiny package."""
    folder.mkdir(parents=True, exist_ok=True)
    info = f"{name}-{version}.dist-info"
    needs = "".join(f"Requires-Dist: {each}\n" for each in requires)
    files = {
        f"{name}/__init__.py": f"__version__ = {version!r}\n",
        f"{info}/METADATA": f"Metadata-Version: 2.1\nName: {name}\nVersion: {version}\n{needs}",
        f"{info}/WHEEL": "Wheel-Version: 1.0\nGenerator: test\nRoot-Is-Purelib: true\nTag: py3-none-any\n",
    }
    record = "".join(f"{path},sha256={_digest(text)},{len(text)}\n" for path, text in files.items())
    wheel = folder / f"{name}-{version}-py3-none-any.whl"
    with zipfile.ZipFile(wheel, "w") as archive:
        for path, text in {**files, f"{info}/RECORD": record + f"{info}/RECORD,,\n"}.items():
            archive.writestr(path, text)
    return wheel


def _digest(text: str) -> str:
    return base64.urlsafe_b64encode(hashlib.sha256(text.encode()).digest()).rstrip(b"=").decode()


class ScratchPython:
    """A Python environment of its own, and a real pip that works on it with the face of ``slicer.packaging``."""

    def __init__(self, folder: Path) -> None:
        venv.create(folder, with_pip=False, symlinks=sys.platform != "win32")
        self.prefix = str(folder)
        self.program = folder / ("Scripts/python.exe" if sys.platform == "win32" else "bin/python")
        version = f"python{sys.version_info.major}.{sys.version_info.minor}"
        self.site = folder / ("Lib/site-packages" if sys.platform == "win32" else f"lib/{version}/site-packages")
        self.calls: list[list[str]] = []

    def pip(self, *arguments: str) -> subprocess.CompletedProcess[str]:
        """Run pip on it to its end."""
        command = [sys.executable, "-m", "pip", "--python", str(self.program), *arguments]
        return subprocess.run(command, capture_output=True, text=True, check=False, stdin=subprocess.DEVNULL)

    def pip_install(
        self,
        requirements: list[str],
        blocking: bool = True,
        show_progress: bool = True,
        logCallback: Callable[[str], None] | None = None,
        completedCallback: Callable[[int], None] | None = None,
    ) -> None:
        """As Slicer 5.12 does it when it is not to block."""
        assert not blocking
        assert not show_progress
        self._later(["install", *requirements], logCallback, completedCallback)

    def pip_uninstall(
        self,
        requirements: list[str],
        blocking: bool = True,
        logCallback: Callable[[str], None] | None = None,
        completedCallback: Callable[[int], None] | None = None,
    ) -> None:
        assert not blocking
        self._later(["uninstall", *requirements, "--yes"], logCallback, completedCallback)

    def install_and_wait(self, requirements: list[str]) -> None:
        """As Slicer 5.10 does it: print, and raise where pip fails."""
        self._now(["install", *requirements])

    def uninstall_and_wait(self, requirements: list[str]) -> None:
        self._now(["uninstall", *requirements, "--yes"])

    def _now(self, arguments: list[str]) -> None:
        self.calls.append(arguments)
        ran = self.pip(*arguments)
        print(ran.stdout + ran.stderr)
        ran.check_returncode()

    def _later(self, arguments: list[str], on_line: Any, on_end: Any) -> None:
        import qt

        self.calls.append(arguments)
        ran: list[subprocess.CompletedProcess[str]] = []
        thread = threading.Thread(target=lambda: ran.append(self.pip(*arguments)))
        thread.start()

        def look() -> None:
            if thread.is_alive():
                qt.QTimer.singleShot(20, look)
                return
            for line in (ran[0].stdout + ran[0].stderr).splitlines():
                on_line(line)
            on_end(ran[0].returncode)

        qt.QTimer.singleShot(0, look)
